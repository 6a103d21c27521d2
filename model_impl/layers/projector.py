"""From the features of an image or a sound to soft tokens of the text decoder (fact sheet, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from model_impl.layers.norm import RMSNorm


class Projector(nn.Module):
    """`W · rms(x)`: a norm without weight, then a linear.

    The order is transformers' and vLLM's; the first-party implementation norms audio after its projection.
    """

    def __init__(self, width: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps, scale=False)
        self.embedding_projection = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., H]; soft tokens are not scaled as embedded tokens are."""
        soft: Tensor = self.embedding_projection(self.norm(x.to(self.embedding_projection.weight.dtype)))
        return soft
