"""The whole model: text decoder, towers, and how soft tokens get into the text (fact sheet, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model_impl.audio import AudioTower
from model_impl.checkpoint import assign_exactly, is_dead, read_tensors
from model_impl.errors import MediaError
from model_impl.layers.backend_table import Device
from model_impl.layers.projector import Projector
from model_impl.layout import lay_out
from model_impl.media_config import FrameConfig, MultimodalConfig, PatchConfig
from model_impl.preprocess.audio import AudioBatch
from model_impl.preprocess.images import ImageBatch
from model_impl.preprocess.video import VideoBatch
from model_impl.runtime.masks import NO_BLOCK, BlockMode
from model_impl.runtime.step import Cache
from model_impl.text import SoftTokens, States, TextModel
from model_impl.unified import TileEmbedder
from model_impl.unified_audio import StretchEmbedder
from model_impl.vision import VisionTower

_PREFIX = "model."
_TEXT = "language_model."
_HEAD = "lm_head."
_LEFT_BEHIND = ("model.vision_tower.pooler.scale", "model.embed_vision.embedding.")
"""In some files: nothing in any implementation reads these."""


@dataclass(frozen=True)
class Media:
    """What a batch of prompts holds besides text, in the order of the placeholders, row by row."""

    images: ImageBatch | None = None
    videos: VideoBatch | None = None
    audio: AudioBatch | None = None


class Gemma4ForConditionalGeneration(nn.Module):
    """Token ids, images, videos and sounds to hidden states and logits, with any subset of towers.

    Args:
        config: The whole model's.
        attention: Backend of the text decoder; left out, the first that can serve it.
        device: Where it will run.
        long_blocks: What becomes of an image that is longer than the window.
        audio_keys: How many frames a frame of the audio tower attends to; see `AudioTower`.

    Raises:
        BackendError, ConfigError: as the parts.
    """

    def __init__(
        self,
        config: MultimodalConfig,
        attention: str | None = None,
        device: Device = "cpu",
        *,
        long_blocks: BlockMode = "clamp_past",
        audio_keys: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.text.hidden_size
        self.language_model = TextModel(config.text, attention, device, long_blocks)
        if isinstance(config.vision, PatchConfig):
            self.vision_embedder = TileEmbedder(config.vision)
            self.embed_vision = Projector(config.vision.width, hidden, config.vision.rms_norm_eps)
        elif config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.embed_vision = Projector(config.vision.hidden_size, hidden, config.vision.rms_norm_eps)
        if isinstance(config.audio, FrameConfig):
            self.audio_embedder = StretchEmbedder(config.audio)
            self.embed_audio = Projector(config.audio.samples, hidden, config.audio.rms_norm_eps)
        elif config.audio is not None:
            self.audio_tower = AudioTower(config.audio, audio_keys)
            self.embed_audio = Projector(config.audio.output_size, hidden, config.audio.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        media: Media | None = None,
        *,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: int [B, T], right-padded; a placeholder for each soft token.
            media: What the placeholders stand for. All images go through their tower at once, all frames too.
            cache: As in `TextModel`. An image's placeholders must all be in one pass.
            lengths: As in `TextModel`.

        Returns:
            [B, T, H]; what stands at padding means nothing.

        Raises:
            MediaError: as `soft_tokens`.
            CacheError: as `TextModel`.
        """
        soft = self.soft_tokens(input_ids, media or Media())
        hidden: Tensor = self.language_model(input_ids, cache=cache, lengths=lengths, soft=soft)
        return hidden

    def states(
        self,
        input_ids: Tensor,
        media: Media | None = None,
        *,
        aux_layers: Sequence[int] = (),
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> States:
        """As `forward`, with the states that a draft model reads; see `TextModel.states`.

        Raises:
            MediaError, CacheError: as `forward`.
            ModelError: as `TextModel.states`.
        """
        soft = self.soft_tokens(input_ids, media or Media())
        return self.language_model.states(
            input_ids, aux_layers=aux_layers, cache=cache, lengths=lengths, soft=soft
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to scaled embeddings [..., H], as a draft model reads them."""
        embedded: Tensor = self.language_model.embed_tokens(ids)
        return embedded

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image's soft tokens, from the whole model's configuration.

        What a draft head is given in their place: its own embedding of this token.
        """
        return self.config.tokens.image

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary]."""
        return self.language_model.logits(hidden)

    def soft_tokens(self, input_ids: Tensor, media: Media) -> SoftTokens | None:
        """What stands in the place of the placeholders; None where there is none.

        Raises:
            MediaError: placeholders and media do not match, or there is no tower for a kind of media.
        """
        tokens, videos = self.config.tokens, media.videos
        weight = self.language_model.embed_tokens.weight
        blocks = torch.full_like(input_ids, NO_BLOCK)
        where = torch.zeros_like(input_ids, dtype=torch.bool)
        every = weight.new_zeros(*input_ids.shape, weight.shape[1])
        number = 0
        for name, token, pieces in (
            ("images", tokens.image, media.images),
            ("frames", tokens.video, None if videos is None else videos.images),
            ("sounds", tokens.audio, media.audio),
        ):
            own = torch.zeros_like(where) if token is None else input_ids == token
            counts = () if pieces is None else pieces.soft_tokens
            if int(own.sum()) != sum(counts):
                raise MediaError(
                    f"the prompts hold {int(own.sum())} placeholders of {name}, and the {len(counts)} {name} "
                    f"take {sum(counts)} soft tokens; put one placeholder for each soft token"
                )
            if pieces is None:
                continue
            if isinstance(pieces, ImageBatch):
                blocks[own] = number + _numbers(own, counts, name)
                number += len(counts)
                every[own] = self.image_features(pieces)
            else:
                every[own] = self.audio_features(pieces)
            where |= own
        return SoftTokens(where, every[where], blocks) if where.any() else None

    def image_features(self, images: ImageBatch) -> Tensor:
        """Soft tokens of all images or frames, [n, H], through the tower at once.

        Raises:
            MediaError: there is no tower for images, or the images do not fit it.
        """
        config = self.config.vision
        if config is None:
            raise MediaError(
                "this model has no vision tower; leave images and videos out, or load one that has"
            )
        embed = self.vision_embedder if isinstance(config, PatchConfig) else self.vision_tower
        device = self.language_model.embed_tokens.weight.device
        features: Tensor = self.embed_vision(embed(images.pixels.to(device), images.positions.to(device)))
        return features

    def audio_features(self, audio: AudioBatch) -> Tensor:
        """Soft tokens of all clips, [n, H], through the tower at once.

        Raises:
            MediaError: there is no tower for sound, or the features do not fit it.
        """
        config = self.config.audio
        if config is None:
            raise MediaError("this model has no audio tower; leave sounds out, or load one that has")
        embed = self.audio_embedder if isinstance(config, FrameConfig) else self.audio_tower
        device = self.language_model.embed_tokens.weight.device
        features: Tensor = self.embed_audio(embed(audio.features.to(device), audio.mask.to(device)))
        return features


def load_multimodal_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    long_blocks: BlockMode = "clamp_past",
) -> Gemma4ForConditionalGeneration:
    """Build the model of a checkpoint folder, with the towers that its configuration has, and load it.

    Args:
        folder: Holds `config.json`, and one or several safetensors files.
        dtype: Of parameters and of the computation.
        attention: Backend of the text decoder; left out, the first that can serve it.
        long_blocks: What becomes of an image that is longer than the window.

    Raises:
        BackendError: the backend asked for cannot serve the model.
        ConfigError: as `MultimodalConfig.from_file`.
        CheckpointError: no weights, a broken file, or tensors that do not fit.
    """
    config = MultimodalConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config, attention, long_blocks=long_blocks)
    tensors = read_tensors(folder, dtype, _name)
    text = model.config.text
    alive = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith(_TEXT) and is_dead(name.removeprefix(_TEXT), text))
    }
    assign_exactly(model, alive, str(folder))
    lay_out(model)
    return model.eval().requires_grad_(False)


def _name(stored: str) -> str | None:
    """A stored tensor's name to the one in the model; None for what a conversion left behind."""
    if stored.startswith(_LEFT_BEHIND):
        return None
    return _TEXT + stored if stored.startswith(_HEAD) else stored.removeprefix(_PREFIX)


def _numbers(own: Tensor, counts: Sequence[int], name: str) -> Tensor:
    """Which image each placeholder belongs to, int [placeholders], row by row.

    Raises:
        MediaError: the placeholders of one image do not stand side by side.
    """
    numbers = torch.repeat_interleave(
        torch.arange(len(counts), device=own.device), torch.tensor(counts, device=own.device)
    )
    rows, columns = own.nonzero(as_tuple=True)
    same = numbers[1:] == numbers[:-1]
    apart = same & ((rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1))
    if apart.any():
        broken = int(numbers[1:][apart][0])
        raise MediaError(
            f"the placeholders of number {broken + 1} of the {name} do not stand side by side; put all of "
            f"its {counts[broken]} in one run of one prompt"
        )
    return numbers
