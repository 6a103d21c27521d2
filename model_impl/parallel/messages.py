"""What the driver and its ranks say to each other: plain data, tensors as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor

from model_impl.parallel.layout import Layout
from model_impl.parallel.loading import Weights
from model_impl.runtime.paged import CacheSizes, Place
from model_impl.text import SoftTokens


@dataclass(frozen=True)
class Preparation:
    """A function that a rank calls before it loads anything: what a harness sets up in its processes."""

    module: str
    """Dotted name."""
    function: str
    argument: str


@dataclass(frozen=True)
class Start:
    """The first message of a rank: what it is."""

    layout: Layout
    rank: int
    weights: Weights
    folder: str
    """Where ranks find each other, and say what they are doing."""
    threads: int
    deadline: float
    """Seconds that a rank waits for another."""
    preparation: Preparation | None = None


@dataclass(frozen=True)
class Loaded:
    """A rank has its weights, and has run once."""

    parameters: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer that it holds, by its published name."""
    nbytes: int
    """Of all of them."""
    attention: str
    """The backend that its layers run."""
    dtype: str
    """Of its layers, as torch names it behind the dot."""
    threads: int
    """That a computation of its uses at most."""


@dataclass(frozen=True)
class Forward:
    """One pass."""

    ids: tuple[tuple[int, ...], ...]
    """All rows, padded to the same width."""
    lengths: tuple[int, ...] | None
    soft: bytes | None
    """`packed_soft`; without features behind the first stage."""
    aux_layers: tuple[int, ...]
    cache: int | None
    """Number of the cache that holds what came before, made when it is new."""
    places: tuple[Place, ...] | None = None
    """Of each row in the cache, where that is a paged one."""
    adapters: tuple[str | None, ...] = ()
    """Of each row; empty: no row has one."""


@dataclass(frozen=True)
class MakePools:
    """An empty paged cache; a rank answers with the dtypes of its pools."""

    cache: int
    sizes: CacheSizes


@dataclass(frozen=True)
class Embed:
    """Token ids whose scaled embeddings are wanted; for ranks of the first stage."""

    ids: bytes


@dataclass(frozen=True)
class Kept:
    """What a paged cache holds of some layers; each rank sends what it has of those in its own stage."""

    cache: int
    layers: tuple[int, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Forget:
    """Caches that nobody needs any more."""

    caches: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """Hidden states whose logits are wanted; for ranks of the last stage."""

    hidden: bytes
    adapters: tuple[str | None, ...] = ()
    """Of each row of them; empty: no row has one."""


@dataclass(frozen=True)
class AddAdapter:
    """The parts of an adapter that belong to a rank; it answers with the shapes of what it holds then."""

    name: str
    where: str
    """The adapter's folder, for errors."""
    parts: bytes


@dataclass(frozen=True)
class RemoveAdapter:
    """An adapter that nobody needs any more."""

    name: str


@dataclass(frozen=True)
class Acted:
    """An adapter; ranks that hold parts of it answer with the sites where it has changed something."""

    name: str


@dataclass(frozen=True)
class Close:
    """The last message."""


Request = Forward | Forget | Head | MakePools | Embed | Kept | AddAdapter | RemoveAdapter | Acted | Close


@dataclass(frozen=True)
class Done:
    """A request is answered; with tensors, where they are wanted and this rank is the one to send them."""

    answer: bytes | Loaded | None = None


@dataclass(frozen=True)
class Failed:
    """A rank has raised, and ends."""

    error: str
    """Type and message."""
    lost_touch: bool
    """It was another rank that went wrong."""


Reply = Done | Failed


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as bytes."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpacked(data: bytes) -> dict[str, Tensor]:
    """Tensors from `packed`."""
    return load(data)


def packed_soft(soft: SoftTokens, *, features: bool) -> bytes:
    """Soft tokens as bytes; with no features for stages that do not look at them."""
    own = soft.features if features else soft.features[:0]
    return packed({"where": soft.where, "features": own, "blocks": soft.blocks})


def unpacked_soft(data: bytes) -> SoftTokens:
    """Soft tokens from `packed_soft`."""
    return SoftTokens(**unpacked(data))
