"""Which attention backend serves each layer, and why the others cannot.

Gemma 4 has two head sizes, 256 in sliding and 512 in full layers, and one backend has to serve both (fact
sheet section 10). The one exception is vLLM's: with an fp8 KV cache on compute capability 9.x,
FlashAttention 3 takes the smaller heads and FlashAttention 4 the larger; image masks still go to Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from model_impl.errors import ModelError
from model_impl.layers.backend_table import (
    CAPABILITY_TABLE,
    Capability,
    ComputeCapability,
    Device,
    Engine,
    ImageMasks,
)

Rows = dict[str, Capability]
"""The rows of one engine by name, in the order of the table."""


class BackendError(ModelError):
    """No attention backend, or not the one asked for, can serve the model."""


class AttentionNeeds(Protocol):
    """What a model asks of attention; `TextConfig` is one."""

    @property
    def head_dims(self) -> Sequence[int]:
        """Head dimension of each layer."""

    @property
    def bidirectional_images(self) -> bool:
        """Tokens of one image attend to each other in both directions."""


@dataclass(frozen=True)
class BackendRequest:
    """What is asked for, and where it is to run.

    Raises:
        BackendError: an engine or a device that does not exist, or a combination that cannot be.
    """

    engine: Engine = "reference"
    backend: str | None = None
    """The backend wanted; None: the engine's own choice."""
    device: Device = "cpu"
    compute_capability: ComputeCapability | None = None
    """Of the NVIDIA GPU; needed for vLLM on `cuda`."""
    images: bool = False
    """There are images to serve; False: text only."""
    fp8_kv_cache: bool = False
    fa4_available: bool = False
    """FlashAttention 4 is installed and loads."""

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise BackendError(f"engine {self.engine!r} is unknown; known: {', '.join(get_args(Engine))}")
        if self.device not in get_args(Device):
            raise BackendError(f"device {self.device!r} is unknown; known: {', '.join(get_args(Device))}")
        if self.compute_capability is not None and self.device != "cuda":
            raise BackendError(f"compute_capability is for device 'cuda', not {self.device!r}; leave it out")
        if self.compute_capability is None and self.device == "cuda" and self.engine == "vllm":
            raise BackendError("vLLM's backends on 'cuda' depend on the GPU; give its compute_capability")
        if self.fp8_kv_cache and self.engine == "reference":
            raise BackendError("the reference keeps no fp8 KV cache; leave fp8_kv_cache out")

    @property
    def hopper_fp8(self) -> bool:
        """An fp8 KV cache on compute capability 9.x."""
        return self.fp8_kv_cache and self.compute_capability is not None and self.compute_capability[0] == 9


@dataclass(frozen=True)
class BackendChoice:
    """The backend of each layer."""

    backends: tuple[str, ...]
    image_masks: ImageMasks
    """How the tokens of one image see each other; `none` also where the request needs no such masks."""
    reason: str

    @property
    def backend(self) -> str:
        """The one backend of all layers.

        Raises:
            BackendError: there are several.
        """
        if len(set(self.backends)) != 1:
            raise BackendError(f"layers have different backends ({self.reason}); read `backends` instead")
        return self.backends[0]


def resolve_backend(
    config: AttentionNeeds,
    request: BackendRequest,
    capability_table: Sequence[Capability] = CAPABILITY_TABLE,
) -> BackendChoice:
    """Choose the attention backend of every layer.

    A backend that is asked for is taken or refused, never replaced. Unasked, the first automatic row of the
    table that serves all layers is taken.

    Raises:
        BackendError: the backend asked for is unknown or cannot serve, or no automatic one can.
    """
    rows = {row.name: row for row in capability_table if row.engine == request.engine}
    refused = refusals(config, request, capability_table)
    if request.backend is not None:
        return _asked_for(request.backend, config, request, rows, refused)
    return _by_head_size(config, request, rows) or _automatic(config, request, rows, refused)


def refusals(
    config: AttentionNeeds,
    request: BackendRequest,
    capability_table: Sequence[Capability] = CAPABILITY_TABLE,
) -> dict[str, str]:
    """Every backend of the request's engine that cannot serve all layers by itself, and why.

    Raises:
        BackendError: there is no layer, or one without a head dimension.
    """
    if not config.head_dims or min(config.head_dims) < 1:
        raise BackendError(f"each layer needs a head dimension of 1 or more, found {list(config.head_dims)}")
    image_masks = _needs_image_masks(config, request)
    reasons = {
        row.name: why_not(row, config.head_dims, request, image_masks=image_masks)
        for row in capability_table
        if row.engine == request.engine
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def why_not(
    row: Capability, head_dims: Sequence[int], request: BackendRequest, *, image_masks: bool
) -> str | None:
    """Why a backend cannot serve layers of these head sizes; None if it can.

    All reasons are given, but a wrong device makes the others moot.
    """
    if request.device not in row.devices:
        return f"runs on {' or '.join(row.devices)}, not on {request.device}"
    reach = row.reach_when(hopper_fp8=request.hopper_fp8)
    case = " with an fp8 KV cache on compute capability 9.x" if reach is not row.reach else ""
    reasons = []
    if (gpu := request.compute_capability) and not row.oldest_gpu <= gpu <= row.newest_gpu:
        reasons.append(f"does not run on compute capability {gpu[0]}.{gpu[1]}")
    if row.needs_fa4 and not request.fa4_available:
        reasons.append("needs FlashAttention 4, which is not available")
    if unserved := sorted({head_dim for head_dim in head_dims if head_dim not in reach.head_sizes}):
        reasons.append(f"has no {_sizes(unserved)} (it has {reach.head_sizes}{case})")
    elif len(set(head_dims)) > 1 and not reach.mixed_head_sizes:
        reasons.append(f"cannot mix {_sizes(head_dims)}")
    if image_masks and reach.image_masks == "none":
        reasons.append(f"has no masks under which an image's tokens see each other{case}")
    return ", ".join(reasons) or None


def _needs_image_masks(config: AttentionNeeds, request: BackendRequest) -> bool:
    return config.bidirectional_images and request.images


def _asked_for(
    wanted: str, config: AttentionNeeds, request: BackendRequest, rows: Rows, refused: dict[str, str]
) -> BackendChoice:
    """The backend that the request names, or its refusal."""
    if wanted not in rows:
        raise BackendError(f"{request.engine} has no attention backend {wanted!r}; known: {', '.join(rows)}")
    if wanted in refused:
        raise BackendError(f"{wanted} {refused[wanted]}; {_alternatives(rows, refused)}")
    reason = f"{wanted} was asked for and serves {_sizes(config.head_dims)}"
    return _one_for_all(rows[wanted], config, request, reason)


def _by_head_size(config: AttentionNeeds, request: BackendRequest, rows: Rows) -> BackendChoice | None:
    """The exception of vLLM, where two backends share out the layers; None where it does not apply."""
    sizes = sorted(set(config.head_dims))
    if not (request.hopper_fp8 and request.fa4_available and len(sizes) > 1):
        return None
    image_masks = _needs_image_masks(config, request)
    server: dict[int, str] = {}
    for head_dim in sizes:
        for row in rows.values():
            serves = why_not(row, [head_dim], request, image_masks=image_masks) is None
            if row.hopper_fp8 is not None and serves:
                server.setdefault(head_dim, row.name)
    if len(server) < len(sizes):
        return None
    shares = ", ".join(f"{name} for {head_dim}" for head_dim, name in server.items())
    reason = f"with an fp8 KV cache on compute capability 9.x the head size of a layer decides: {shares}"
    return BackendChoice(tuple(server[head_dim] for head_dim in config.head_dims), "none", reason)


def _automatic(
    config: AttentionNeeds, request: BackendRequest, rows: Rows, refused: dict[str, str]
) -> BackendChoice:
    """The first automatic backend that serves all layers."""
    sizes = _sizes(config.head_dims)
    passed_over: list[str] = []
    for name in (name for name, row in rows.items() if row.automatic):
        if name not in refused:
            because = f" ({'; '.join(passed_over)})" if passed_over else ""
            reason = f"{name} is the first automatic backend of {request.engine} that serves {sizes}{because}"
            return _one_for_all(rows[name], config, request, reason)
        passed_over.append(f"{name} {refused[name]}")
    raise BackendError(
        f"{request.engine} has no automatic attention backend for {sizes} ({'; '.join(passed_over)}); "
        f"{_alternatives(rows, refused)}"
    )


def _one_for_all(
    row: Capability, config: AttentionNeeds, request: BackendRequest, reason: str
) -> BackendChoice:
    masks = row.reach_when(hopper_fp8=request.hopper_fp8).image_masks
    image_masks: ImageMasks = masks if _needs_image_masks(config, request) else "none"
    return BackendChoice((row.name,) * len(config.head_dims), image_masks, reason)


def _alternatives(rows: Rows, refused: dict[str, str]) -> str:
    serving = [name for name in rows if name not in refused]
    return f"can serve: {', '.join(serving)}" if serving else "no backend of this engine can serve it"


def _sizes(head_dims: Sequence[int]) -> str:
    sizes = sorted(set(head_dims))
    return ("head size " if len(sizes) == 1 else "head sizes ") + " and ".join(map(str, sizes))
