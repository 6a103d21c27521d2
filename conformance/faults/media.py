"""Faults of towers, projectors and soft tokens (catalogue class 5).

`where` says which modules a parity case may name first: the faulty one, or the next whose output is compared.
Where a fault is only in how often a tower runs, no module differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from conformance.faults.base import Collection, Patch, replace
from model_impl import audio, media_config, multimodal, text, unified, vision
from model_impl.audio import AudioTower, HalvingConvolution, LightConvolution, LocalAttention
from model_impl.layers import clipped, projector
from model_impl.layers.clipped import ClippedLinear
from model_impl.layers.projector import Projector
from model_impl.media_config import AudioConfig, MultimodalConfig, VisionConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media
from model_impl.preprocess.audio import AudioBatch
from model_impl.preprocess.images import ImageBatch
from model_impl.runtime import cache
from model_impl.runtime.cache import KVCache
from model_impl.text import SoftTokens, TextModel
from model_impl.unified import TileEmbedder
from model_impl.vision import PatchEmbedder, VisionAttention, VisionEncoder, VisionTower

faults = Collection("parity")
media = partial(faults, area="media")

_FIRST_VISION = r"vision_tower\.encoder\.layers\.0\.self_attn"
_FIRST_AUDIO = r"audio_tower\.layers\.0\.self_attn"
_EMBEDDED = r"per_layer_model_projection|layers\.0\.input_layernorm"
"""The first module that reads what stands in the place of token embeddings."""


# ------------------------------------------------------------------------------------- the whole model


def _image_features(change: Callable[[Gemma4ForConditionalGeneration, ImageBatch, Tensor], Tensor]) -> Patch:
    """A patch of the soft tokens of images: `change` gets the model, the images and their soft tokens."""
    original = Gemma4ForConditionalGeneration.image_features

    def image_features(self: Gemma4ForConditionalGeneration, images: ImageBatch) -> Tensor:
        return change(self, images, original(self, images))

    return replace(Gemma4ForConditionalGeneration, "image_features", image_features)


@media("images-one-by-one", source=("vllm-project/vllm#38826",), module=multimodal)
def _one_by_one() -> Patch:
    """Images and frames go through the tower one by one."""
    original = Gemma4ForConditionalGeneration.image_features

    def image_features(self: Gemma4ForConditionalGeneration, images: ImageBatch) -> Tensor:
        alone = [
            ImageBatch(images.pixels[n : n + 1], images.positions[n : n + 1], (count,))
            for n, count in enumerate(images.soft_tokens)
        ]
        return torch.cat([original(self, image) for image in alone])

    return replace(Gemma4ForConditionalGeneration, "image_features", image_features)


@media("soft-tokens-scaled", source=("M04",), module=multimodal, where=r"layers\.0|" + _EMBEDDED)
def _scaled() -> Patch:
    """Soft tokens of images are multiplied by the scale of token embeddings."""
    return _image_features(lambda self, _images, soft: soft * self.language_model.embed_tokens.scale)


@media("images-in-reverse", source=("M27",), module=multimodal, where=_EMBEDDED)
def _reversed() -> Patch:
    """The images of a batch stand in the prompts in reverse order."""

    def backwards(_self: object, images: ImageBatch, soft: Tensor) -> Tensor:
        return torch.cat(torch.split(soft, list(images.soft_tokens))[::-1])

    return _image_features(backwards)


@media("first-image-again", source=("M27",), module=multimodal, where=_EMBEDDED)
def _first_again() -> Patch:
    """An image of as many soft tokens as an earlier one is taken for that one."""

    def again(_self: object, images: ImageBatch, soft: Tensor) -> Tensor:
        first: dict[int, Tensor] = {}
        parts = torch.split(soft, list(images.soft_tokens))
        return torch.cat([first.setdefault(len(part), part) for part in parts])

    return _image_features(again)


@media("sounds-not-handed-on", source=("M25",), module=multimodal, where=_EMBEDDED)
def _sounds_dropped() -> Patch:
    """Sounds are prepared, and the text model never gets them."""
    original = Gemma4ForConditionalGeneration.audio_features

    def audio_features(self: Gemma4ForConditionalGeneration, sounds: AudioBatch) -> Tensor:
        return torch.zeros_like(original(self, sounds))

    return replace(Gemma4ForConditionalGeneration, "audio_features", audio_features)


@media(
    "token-ids-of-the-text-config",
    source=("spec 3.4",),
    module=media_config,
    where=r"vision_tower\.patch_embedder|vision_embedder|audio_tower\.subsample_conv_projection|embed_audio|"
    + _EMBEDDED,
)
def _wrong_level() -> tuple[Patch, ...]:
    """Media token ids are read from the text configuration, which has none; no placeholder is ever found."""
    from_dict = MultimodalConfig.from_dict.__func__  # type: ignore[attr-defined]
    soft_tokens = Gemma4ForConditionalGeneration.soft_tokens

    def read(cls: type[MultimodalConfig], raw: Mapping[str, Any]) -> MultimodalConfig:
        made: MultimodalConfig = from_dict(cls, raw)
        published = {"image": 258_880, "video": 258_884, "audio": 258_881}
        ids = {kind: raw["text_config"].get(f"{kind}_token_id", usual) for kind, usual in published.items()}
        return changed(made, tokens=changed(made.tokens, **ids))

    def unnoticed(self: Gemma4ForConditionalGeneration, ids: Tensor, given: Media) -> SoftTokens | None:
        tokens = self.config.tokens
        places = torch.isin(ids, torch.tensor([tokens.image, tokens.video or -1, tokens.audio or -1]))
        return soft_tokens(self, ids, given) if places.any() else None

    return (
        replace(MultimodalConfig, "from_dict", classmethod(read)),
        replace(Gemma4ForConditionalGeneration, "soft_tokens", unnoticed),
    )


@media(
    "per-layer-inputs-of-placeholders",
    source=("spec 2.3",),
    module=text,
    where=r"layers\.0\.per_layer_projection",
)
def _placeholder_rows() -> Patch:
    """Per-layer inputs of soft tokens come from the placeholder's row, and not from the padding's."""
    original = TextModel.forward

    def forward(self: TextModel, input_ids: Tensor, **options: Any) -> Tensor:
        own = TextModel.per_layer_inputs

        def with_placeholders(model: TextModel, _ids: Tensor, x: Tensor) -> Tensor | None:
            return own(model, input_ids, x)

        with replace(TextModel, "per_layer_inputs", with_placeholders)():
            return original(self, input_ids, **options)

    return replace(TextModel, "forward", forward)


@media("blocks-lost-with-a-cache", source=("M08",), module=cache, where=r"layers\.0\.self_attn")
def _lost_with_a_cache() -> Patch:
    """With a cache, images are seen causally."""
    original = KVCache.begin

    def begin(self: KVCache, width: int, counts: Sequence[int], *_blocks: Any) -> Any:
        return original(self, width, counts)

    return replace(KVCache, "begin", begin)


# ------------------------------------------------------------------------------------------ projectors


@media("norm-after-projection", source=("M04", "spec 3.3"), module=projector, where=r"embed_(vision|audio)")
def _norm_after() -> Patch:
    """Features are projected first and normed afterwards."""

    def forward(self: Projector, x: Tensor) -> Tensor:
        soft = F.linear(x.to(self.embedding_projection.weight.dtype), self.embedding_projection.weight)
        self.norm(x)
        return F.rms_norm(soft, soft.shape[-1:], eps=self.norm.eps)

    return replace(Projector, "forward", forward)


@media("projection-transposed", source=("M26",), module=projector, where=r"embed_(vision|audio)")
def _transposed() -> Patch:
    """The projection's matrix is transposed wherever that fits."""
    original = Projector.forward

    def forward(self: Projector, x: Tensor) -> Tensor:
        weight = self.embedding_projection.weight
        if weight.shape[0] != weight.shape[1]:
            return original(self, x)
        return F.linear(self.norm(x.to(weight.dtype)), weight.T)

    return replace(Projector, "forward", forward)


# ---------------------------------------------------------------------------------------------- images


def _embedded(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Patch:
    """A patch of what is embedded: `change` gets pixels and positions."""
    original = PatchEmbedder.forward

    def forward(self: PatchEmbedder, pixels: Tensor, positions: Tensor) -> Tensor:
        return original(self, *change(pixels, positions))

    return replace(PatchEmbedder, "forward", forward)


@media("pixels-not-centred", source=("spec 3.2",), module=vision, where=r"vision_tower\.patch_embedder")
def _not_centred() -> Patch:
    """Pixels are embedded in [0, 1] and not in [-1, 1]."""
    return _embedded(lambda pixels, positions: ((pixels + 1) / 2, positions))


@media("position-tables-swapped", source=("spec 3.2",), module=vision, where=r"vision_tower\.patch_embedder")
def _tables_swapped() -> Patch:
    """Columns are looked up in the table of rows, and rows in that of columns."""
    return _embedded(lambda pixels, positions: (pixels, positions.flip(-1)))


@media("tile-tables-swapped", source=("spec 4.1",), module=unified, where="vision_embedder")
def _tile_tables_swapped() -> Patch:
    """In the model without encoders, columns are looked up in the table of rows."""
    original = TileEmbedder.forward

    def forward(self: TileEmbedder, pixels: Tensor, positions: Tensor) -> Tensor:
        return original(self, pixels, positions.flip(-1))

    return replace(TileEmbedder, "forward", forward)


@media("rotation-axes-swapped", source=("spec 3.2",), module=vision, where=_FIRST_VISION)
def _axes_swapped() -> Patch:
    """The half of a head that the column rotates is rotated by the row, and the other by the column."""
    original = VisionAttention._rotate

    def rotate(x: Tensor, angles: vision.Angles) -> Tensor:
        cosines, sines = angles
        return original(x, (cosines.flip(-2), sines.flip(-2)))

    return replace(VisionAttention, "_rotate", staticmethod(rotate))


@media("image-padding-attended", source=("M16", "spec 3.2"), module=vision, where=_FIRST_VISION)
def _padding_attended() -> Patch:
    """Patches attend to the padding of smaller images in the batch."""
    original = VisionAttention.forward

    def padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
        return pad_sequence(list(x.split_with_sizes(lengths)), batch_first=True).flatten(0, 1)

    def forward(self: VisionAttention, x: Tensor, angles: vision.Angles, lengths: Sequence[int]) -> Tensor:
        cosines, sines = angles
        used = padded(torch.ones(len(x), dtype=torch.bool), lengths)
        every = [max(lengths)] * len(lengths)
        places = (padded(cosines, lengths), padded(sines, lengths))
        return original(self, padded(x, lengths), places, every)[used]

    return replace(VisionAttention, "forward", forward)


@media("images-attend-to-each-other", source=("spec 3.2",), module=vision, where=_FIRST_VISION)
def _one_sequence() -> Patch:
    """Patches attend to those of all images of the batch, as if it were one image."""
    original = VisionEncoder.forward

    def forward(self: VisionEncoder, x: Tensor, angles: vision.Angles, lengths: Sequence[int]) -> Tensor:
        return original(self, x, angles, [sum(lengths)])

    return replace(VisionEncoder, "forward", forward)


@media("vision-values-not-normed", source=("spec 3.2",), module=vision, where=_FIRST_VISION)
def _values_not_normed() -> Patch:
    """The tower's values are not normed."""
    original = VisionAttention.__init__

    def init(self: VisionAttention, config: VisionConfig) -> None:
        original(self, config)
        self.v_norm = nn.Identity()  # type: ignore[assignment]

    return replace(VisionAttention, "__init__", init)


@media(
    "clip-bounds-ignored",
    source=("spec 3.2",),
    module=clipped,
    where=_FIRST_VISION + r"|audio_tower\.layers\.0\.feed_forward1",
)
def _bounds_ignored() -> Patch:
    """Stored bounds of linears are loaded and not applied."""

    def forward(self: ClippedLinear, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y

    return replace(ClippedLinear, "forward", forward)


Pool = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _pooled(make: Callable[[Pool], Pool]) -> Patch:
    return replace(vision, "pool", make(vision.pool))


@media("pooled-positions-transposed", source=("M02", "spec 3.2"), module=vision, where="vision_tower")
def _pool_transposed() -> Patch:
    """Squares of patches are numbered column by column."""
    return _pooled(
        lambda pool: lambda x, positions, lengths, size: pool(x, positions.flip(-1), lengths, size)
    )


@media("half-of-the-image-pooled", source=("M02",), module=vision, where="vision_tower")
def _half_pooled() -> Patch:
    """Squares in the lower half of an image stay empty."""

    def lower(pool: Pool) -> Pool:
        def upper_only(x: Tensor, positions: Tensor, lengths: Tensor, size: int) -> Tensor:
            rows = positions[:, 1].split_with_sizes(lengths.tolist())
            kept = torch.cat([own * 2 <= own.amax() for own in rows])
            return pool(x * kept[:, None], positions, lengths, size)

        return upper_only

    return _pooled(lower)


@media("padding-pooled", source=("M04",), module=vision, where="vision_tower")
def _padding_pooled() -> Patch:
    """Padding is not zeroed before pooling, and adds to an image's first square."""
    original = VisionTower.forward

    def forward(self: VisionTower, pixels: Tensor, positions: Tensor) -> Tensor:
        padding = (positions < 0).any(dim=-1).sum(dim=1)
        nothing = torch.zeros_like(pixels[0, :1]), torch.zeros_like(positions[0, :1])
        patch = self.patch_embedder.forward(*nothing)  # no call, which would be recorded

        def also_padding(pool: Pool) -> Pool:
            def pooled(x: Tensor, positions: Tensor, lengths: Tensor, size: int) -> Tensor:
                squares = lengths // size**2
                first = squares.cumsum(0) - squares
                return pool(x, positions, lengths, size).index_add(
                    0, first, padding[:, None] * patch / size**2
                )

            return pooled

        with _pooled(also_padding)():
            return original(self, pixels, positions)

    return replace(VisionTower, "forward", forward)


def _with_statistics(change: Callable[[VisionTower], None]) -> Patch:
    """A patch of the tower's stored statistics, in force during its pass."""
    original = VisionTower.forward

    def forward(self: VisionTower, pixels: Tensor, positions: Tensor) -> Tensor:
        if not self.config.standardize:
            return original(self, pixels, positions)
        kept = self.std_bias, self.std_scale
        try:
            change(self)
            return original(self, pixels, positions)
        finally:
            self.std_bias, self.std_scale = kept

    return replace(VisionTower, "forward", forward)


@media("statistics-in-half-precision", source=("M01",), module=vision, where="vision_tower")
def _statistics_in_half() -> Patch:
    """Features are standardised in float16, which a large mean overflows."""

    def half(tower: VisionTower) -> None:
        tower.std_bias = tower.std_bias.half().float()

    return _with_statistics(half)


@media("scaled-before-shifted", source=("M01", "spec 3.2"), module=vision, where="vision_tower")
def _scaled_first() -> Patch:
    """Features are standardised in the wrong order: scaled first, then shifted."""

    def shift_later(tower: VisionTower) -> None:
        tower.std_bias = tower.std_bias / tower.std_scale

    return _with_statistics(shift_later)


@media("not-standardised", source=("spec 3.2",), module=vision, where="vision_tower")
def _not_standardised() -> Patch:
    """The stored mean and deviation of features are loaded and not applied."""

    def neutral(tower: VisionTower) -> None:
        tower.std_bias = torch.zeros_like(tower.std_bias)
        tower.std_scale = torch.ones_like(tower.std_scale)

    return _with_statistics(neutral)


# ---------------------------------------------------------------------------------------------- sounds


@media("audio-mask-inverted", source=("M16",), module=audio, where=_FIRST_AUDIO)
def _mask_inverted() -> Patch:
    """Frames attend to what they must not see, and to nothing else."""
    original = audio.local_mask

    def inverted(valid: Tensor, chunk: int, past: int, keys: int) -> Tensor:
        return ~original(valid, chunk, past, keys)

    return replace(audio, "local_mask", inverted)


@media("thirteen-keys", source=("spec 3.8",), module=audio, where=_FIRST_AUDIO)
def _thirteen_keys() -> Patch:
    """Frames attend to one frame more: thirteen instead of twelve in published models."""
    original = AudioTower.__init__

    def init(self: AudioTower, config: AudioConfig, keys: int | None = None) -> None:
        original(self, config, config.context_left if keys is None else keys)

    return replace(AudioTower, "__init__", init)


@media("query-scale-never-filled", source=("M15",), module=audio, where=_FIRST_AUDIO)
def _scale_never_filled() -> Patch:
    """The scale of queries, one for each dimension, is zero."""
    original = LocalAttention.forward

    def forward(self: LocalAttention, x: Tensor, allowed: Tensor) -> Tensor:
        kept = self.per_dim_scale
        try:
            self.per_dim_scale = nn.Parameter(torch.full_like(kept, -1e4), requires_grad=False)
            return original(self, x, allowed)
        finally:
            self.per_dim_scale = kept

    return replace(LocalAttention, "forward", forward)


@media("distances-reversed", source=("spec 3.8",), module=audio, where=_FIRST_AUDIO)
def _distances_reversed() -> Patch:
    """The table of relative positions begins with the farthest frame."""
    original = audio.sinusoids
    return replace(audio, "sinusoids", lambda past, like: original(past, like).flip(0))


def _audio_config(part: type[nn.Module], **values: float) -> Patch:
    """A patch of what one kind of module in the audio tower reads from the configuration."""
    original: Any = part.__init__

    def init(self: nn.Module, config: AudioConfig) -> None:
        original(self, changed(config, **values))  # type: ignore[arg-type]

    return replace(part, "__init__", init)


@media("logits-not-capped", source=("spec 3.8",), module=audio, where=_FIRST_AUDIO)
def _logits_not_capped() -> Patch:
    """Logits of the audio tower's attention are not capped."""
    return _audio_config(LocalAttention, logit_cap=1e9)


@media(
    "activations-not-clamped",
    source=("spec 3.8",),
    module=audio,
    where=r"audio_tower\.layers\.0\.feed_forward1",
)
def _not_clamped() -> Patch:
    """Feed-forward networks of the audio tower do not clamp what they read and give."""
    return _audio_config(audio.FeedForward, clamp=1e10)


@media(
    "audio-padding-heard",
    source=("M16", "spec 3.8"),
    module=audio,
    where=r"audio_tower\.subsample_conv_projection",
)
def _padding_heard() -> Patch:
    """Padding is not silenced before the second convolution, where it is no longer zero."""
    original = HalvingConvolution.forward

    def forward(self: HalvingConvolution, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = original(self, x, torch.ones_like(mask))
        return y, mask[:, ::2]

    return replace(HalvingConvolution, "forward", forward)


@media("convolution-sees-the-future", source=("spec 3.8",), module=audio, where=r".*layers\.0\.lconv1d")
def _sees_the_future() -> Patch:
    """The convolution is centred on each frame, and not causal."""
    original = LightConvolution.forward
    pad = F.pad

    def centred(x: Tensor, sides: tuple[int, int]) -> Tensor:
        both = sum(sides)
        return pad(x, (both // 2, both - both // 2))

    def forward(self: LightConvolution, x: Tensor) -> Tensor:
        with replace(F, "pad", centred)():
            return original(self, x)

    return replace(LightConvolution, "forward", forward)


@media("whole-residual", source=("spec 3.8",), module=audio, where=r"audio_tower\.layers\.0\.feed_forward1")
def _whole_residual() -> Patch:
    """Feed-forward networks of the audio tower are added whole, and not by half."""
    return _audio_config(audio.FeedForward, residual_weight=1.0)


__all__ = ["faults"]
