"""Configuration of all but the text decoder, from a published `config.json` (fact sheet, 1.3 to 1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from model_impl.config import Count, Published, TextConfig, read_config, validated
from model_impl.errors import ConfigError

Eps = Annotated[float, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0)]


class _VisionRope(Published):
    rope_type: Literal["default", "axial"] = "axial"
    """Two names of one thing: each half of a head rotates by one coordinate."""
    rope_theta: Annotated[float, Field(gt=0)] = 100.0


class _PublishedVision(Published):
    model_type: Literal["gemma4_vision"] = "gemma4_vision"
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    patch_size: Count = 16
    pooling_kernel_size: Count = 3
    position_embedding_size: Count = 10_240
    default_output_length: Count = 280
    rms_norm_eps: Eps = 1e-6
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False, None] = False
    rope_parameters: _VisionRope = _VisionRope()
    standardize: bool = False
    use_clipped_linears: bool = False


class _PublishedAudio(Published):
    model_type: Literal["gemma4_audio"] = "gemma4_audio"
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    hidden_act: Literal["silu"] = "silu"
    attention_chunk_size: Count = 12
    attention_context_left: Count = 13
    attention_context_right: Literal[0] = 0
    attention_logit_cap: Annotated[float, Field(gt=0)] = 50.0
    attention_invalid_logits_value: float = -1e9
    conv_kernel_size: Count = 5
    gradient_clipping: Annotated[float, Field(gt=0)] = 1e10
    residual_weight: float = 0.5
    rms_norm_eps: Eps = 1e-6
    subsampling_conv_channels: tuple[Count, Count] = Field(default=(128, 32), strict=False)
    output_proj_dims: Count
    use_clipped_linears: bool = True


class _PublishedPatches(Published):
    model_type: Literal["gemma4_unified_vision"]
    mm_embed_dim: Count
    mm_posemb_size: Count
    model_patch_size: Count = 48
    patch_size: Count = 16
    pooling_kernel_size: Count = 3
    num_soft_tokens: Count = 280
    output_proj_dims: Count
    rms_norm_eps: Eps = 1e-6


class _PublishedFrames(Published):
    model_type: Literal["gemma4_unified_audio"]
    audio_embed_dim: Count
    audio_samples_per_token: Count
    rms_norm_eps: Eps = 1e-6


class _PublishedTokens(Published):
    """Ids stand at the configuration's top level, and nowhere else."""

    image_token_id: TokenId
    video_token_id: TokenId | None = None
    audio_token_id: TokenId | None = None
    boi_token_id: TokenId
    eoi_token_id: TokenId
    boa_token_id: TokenId | None = None
    eoa_token_id: TokenId | None = None
    eoa_token_index: TokenId | None = None
    """As the 12B file spells the one before; others have both."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    patch_size: int
    pooling: int
    """Patches of a soft token along each side."""
    positions: int
    """Rows of each of the two position tables."""
    soft_tokens: int
    """Most soft tokens of an image, unless a request says otherwise."""
    rope_theta: float
    rms_norm_eps: float
    standardize: bool
    """Pooled features are shifted and scaled by stored statistics."""
    clipped_linears: bool
    """Inputs and outputs of linears are clamped to stored bounds."""


@dataclass(frozen=True)
class AudioConfig:
    """The audio tower."""

    hidden_size: int
    num_layers: int
    num_heads: int
    chunk_size: int
    """Queries of a block."""
    context_left: int
    """One more than the past frames of a block's first query."""
    logit_cap: float
    masked_logit: float
    conv_kernel: int
    clamp: float
    residual_weight: float
    rms_norm_eps: float
    channels: tuple[int, int]
    """Of the two convolutions that halve the frame rate."""
    output_size: int
    clipped_linears: bool


@dataclass(frozen=True)
class PatchConfig:
    """The encoder-free way of images (12B): tiles of pixels become soft tokens directly."""

    width: int
    """Of the embedding inside."""
    positions: int
    """Rows of the position table."""
    tile: int
    """Pixels of a soft token along each side."""
    patch_size: int
    pooling: int
    soft_tokens: int
    output_size: int
    rms_norm_eps: float


@dataclass(frozen=True)
class FrameConfig:
    """The encoder-free way of audio (12B): stretches of the waveform become soft tokens directly."""

    samples: int
    """Of a soft token."""
    rms_norm_eps: float


@dataclass(frozen=True)
class MediaTokens:
    """Ids of the tokens that stand for media in a prompt."""

    image: int
    """One for each soft token of an image."""
    video: int | None
    audio: int | None
    image_begin: int
    image_end: int
    audio_begin: int | None
    audio_end: int | None


@dataclass(frozen=True)
class MultimodalConfig:
    """A whole model: the text decoder, and what there is beside it."""

    text: TextConfig
    tokens: MediaTokens
    vision: VisionConfig | PatchConfig | None
    audio: AudioConfig | FrameConfig | None

    @property
    def unified(self) -> bool:
        """Whether media reach the decoder without towers."""
        return isinstance(self.vision, PatchConfig) or isinstance(self.audio, FrameConfig)

    @classmethod
    def from_file(cls, path: Path) -> MultimodalConfig:
        """Read a `config.json`.

        Raises:
            ConfigError: it cannot be read, or as in `from_dict`.
        """
        return cls.from_dict(read_config(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MultimodalConfig:
        """Read the configuration of a whole model, with any subset of towers.

        Raises:
            ConfigError: a part is missing or does not fit, or a tower is there without its token ids.
        """
        if "text_config" not in raw:
            raise ConfigError(
                "this configuration has no text_config: it is a text model's; load it as one, or give the "
                "whole model's"
            )
        tokens = validated(_PublishedTokens, raw, "multimodal configuration")
        audio = _audio(raw.get("audio_config"))
        end = tokens.eoa_token_id if tokens.eoa_token_id is not None else tokens.eoa_token_index
        if audio is not None:
            named = {
                "audio_token_id": tokens.audio_token_id,
                "boa_token_id": tokens.boa_token_id,
                "eoa_token_id": end,
            }
            missing = [name for name, value in named.items() if value is None]
            if missing:
                raise ConfigError(f"there is an audio_config, and no {', '.join(missing)}")
        return cls(
            text=TextConfig.from_dict(raw),
            tokens=MediaTokens(
                image=tokens.image_token_id,
                video=tokens.video_token_id,
                audio=tokens.audio_token_id,
                image_begin=tokens.boi_token_id,
                image_end=tokens.eoi_token_id,
                audio_begin=tokens.boa_token_id,
                audio_end=end,
            ),
            vision=_vision(raw.get("vision_config")),
            audio=audio,
        )


def _vision(raw: Mapping[str, Any] | None) -> VisionConfig | PatchConfig | None:
    if raw is None:
        return None
    if raw.get("model_type") == "gemma4_unified_vision":
        patches = validated(_PublishedPatches, raw, "vision configuration")
        if patches.model_patch_size != patches.patch_size * patches.pooling_kernel_size:
            raise ConfigError(
                f"vision_config: model_patch_size {patches.model_patch_size} is not patch_size "
                f"{patches.patch_size} times pooling_kernel_size {patches.pooling_kernel_size}"
            )
        return PatchConfig(
            width=patches.mm_embed_dim,
            positions=patches.mm_posemb_size,
            tile=patches.model_patch_size,
            patch_size=patches.patch_size,
            pooling=patches.pooling_kernel_size,
            soft_tokens=patches.num_soft_tokens,
            output_size=patches.output_proj_dims,
            rms_norm_eps=patches.rms_norm_eps,
        )
    tower = validated(_PublishedVision, raw, "vision configuration")
    if tower.head_dim % 4:
        raise ConfigError(
            f"vision_config: head_dim {tower.head_dim} must be a multiple of four: each half rotates by one "
            "coordinate, in pairs"
        )
    return VisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_layers=tower.num_hidden_layers,
        num_heads=tower.num_attention_heads,
        num_kv_heads=tower.num_key_value_heads,
        head_dim=tower.head_dim,
        patch_size=tower.patch_size,
        pooling=tower.pooling_kernel_size,
        positions=tower.position_embedding_size,
        soft_tokens=tower.default_output_length,
        rope_theta=tower.rope_parameters.rope_theta,
        rms_norm_eps=tower.rms_norm_eps,
        standardize=tower.standardize,
        clipped_linears=tower.use_clipped_linears,
    )


def _audio(raw: Mapping[str, Any] | None) -> AudioConfig | FrameConfig | None:
    if raw is None:
        return None
    if raw.get("model_type") == "gemma4_unified_audio":
        frames = validated(_PublishedFrames, raw, "audio configuration")
        if frames.audio_embed_dim != frames.audio_samples_per_token:
            raise ConfigError(
                f"audio_config: audio_embed_dim {frames.audio_embed_dim} is not audio_samples_per_token "
                f"{frames.audio_samples_per_token}, and samples are projected as they are"
            )
        return FrameConfig(samples=frames.audio_samples_per_token, rms_norm_eps=frames.rms_norm_eps)
    tower = validated(_PublishedAudio, raw, "audio configuration")
    if tower.hidden_size % tower.num_attention_heads:
        raise ConfigError(
            f"audio_config: hidden_size {tower.hidden_size} is no multiple of num_attention_heads "
            f"{tower.num_attention_heads}"
        )
    return AudioConfig(
        hidden_size=tower.hidden_size,
        num_layers=tower.num_hidden_layers,
        num_heads=tower.num_attention_heads,
        chunk_size=tower.attention_chunk_size,
        context_left=tower.attention_context_left,
        logit_cap=tower.attention_logit_cap,
        masked_logit=tower.attention_invalid_logits_value,
        conv_kernel=tower.conv_kernel_size,
        clamp=tower.gradient_clipping,
        residual_weight=tower.residual_weight,
        rms_norm_eps=tower.rms_norm_eps,
        channels=tower.subsampling_conv_channels,
        output_size=tower.output_proj_dims,
        clipped_linears=tower.use_clipped_linears,
    )
