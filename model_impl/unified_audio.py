"""Audio without an encoder, as in the unified 12B (fact sheet, section 4.1)."""

from __future__ import annotations

from torch import Tensor, nn

from model_impl.errors import MediaError
from model_impl.media_config import FrameConfig


class StretchEmbedder(nn.Module):
    """Stretches of the waveform are the features of soft tokens as they are; there is nothing to learn here.

    What follows, a norm without weight and a linear, is the projector.
    """

    def __init__(self, config: FrameConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Soft tokens of all clips, one clip after the other; padding leaves no trace.

        Args:
            features: [N, S, samples of a soft token].
            mask: bool [N, S]; false at padding.

        Returns:
            [all soft tokens, samples of a soft token].

        Raises:
            MediaError: the features are not of that form, mel features of the other models for example.
        """
        samples = self.config.samples
        if features.ndim != 3 or features.shape[-1] != samples or mask.shape != features.shape[:2]:
            raise MediaError(
                f"audio features {list(features.shape)} with a mask {list(mask.shape)} do not fit this "
                f"model: they must be [clips, tokens, {samples}] and [clips, tokens]; `prepare_waves` makes "
                "such"
            )
        return features[mask]
