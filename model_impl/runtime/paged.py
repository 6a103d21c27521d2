"""Paged key-value cache: each layer's keys and values lie in a pool of blocks that sequences own or share.

The table of a sequence says which block holds its positions 0 to block_size - 1, the next ones, and so on;
all layers of a kind have the same table. Sliding layers read only their window, so that the blocks before
it may be given to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_impl.config import AttentionKind, LayerConfig, TextConfig
from model_impl.errors import CacheError
from model_impl.layers.backends import Mask
from model_impl.runtime.masks import NO_BLOCK, BlockMode, Blocks, visible
from model_impl.runtime.stored import StoredAs, dtype_name, movable, narrowed, storage_dtype

NO_TABLE_ENTRY = -1
"""In a table: a block that was given back, because its positions have left the window."""

Table = Sequence[int]
"""Ids of the blocks of a sequence, in the order of its positions."""


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of the pools, for each kind of layer, and the dtype of what they hold."""

    block_size: Mapping[AttentionKind, int]
    """Positions in a block."""
    blocks: Mapping[AttentionKind, int]
    """Blocks in the pool of each layer."""
    stored: StoredAs | None = None
    """The dtype of keys and values in the pools; None: that of the computation."""

    def check(self, kinds: Sequence[AttentionKind]) -> None:
        """Refuse sizes that are not positive, or that leave out a kind.

        Raises:
            CacheError: as said.
        """
        for kind in kinds:
            size, blocks = self.block_size.get(kind, 0), self.blocks.get(kind, 0)
            if size < 1 or blocks < 1:
                raise CacheError(
                    f"{kind}: {blocks} blocks of {size} positions; give both for each kind of layer, and "
                    "make them 1 or more"
                )


@dataclass(frozen=True)
class Place:
    """Where one row of a pass lies in the cache."""

    start: int
    """Position of its first new token; the cache holds all positions before that layers still read."""
    count: int
    """New tokens, at least one."""
    tables: Mapping[AttentionKind, Table]
    """Reach over the new tokens."""


@dataclass(frozen=True)
class _Plan:
    """What the layers of one kind write and read in one pass."""

    written: Tensor
    """Slots that the new tokens go to, int [M], row by row."""
    new: Tensor | None
    """Which of all [B * T] columns they are, int [M]; None for all."""
    read: Tensor | slice
    """Slots of the keys, int [B * S], or a run of them for a single row."""
    keys: int
    """S."""
    mask: Mask


class PagedCache:
    """Pools of blocks for the keys and values of some layers.

    Args:
        config: The model's.
        sizes: Of the pools.
        layers: Whose keys and values these are, with the heads that they have here; left out, all layers of
            the model with keys and values of their own.
        dtype: Of the computation, and of keys and values unless the sizes name another.
        device: Where they live.

    Raises:
        CacheError: sizes are missing or not positive, or name no dtype.
    """

    def __init__(
        self,
        config: TextConfig,
        sizes: CacheSizes,
        *,
        layers: Sequence[LayerConfig] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes.check(config.kinds)
        self.config = config
        self.sizes = sizes
        self._dtype = dtype
        self._stored = storage_dtype(sizes.stored, dtype)
        self._device = torch.device(device)
        own = [layer for layer in config.layers if not layer.shares_kv] if layers is None else layers
        self.pools: dict[int, tuple[Tensor, Tensor]] = {layer.index: self._pool(layer) for layer in own}
        """Keys and values by the layer's index, each [blocks, block_size, g, d]."""

    @property
    def stored(self) -> str | None:
        """Names of the dtypes of all pools, commonly one; None where there is no pool."""
        dtypes = {pool.dtype for pair in self.pools.values() for pool in pair}
        return ", ".join(sorted(map(dtype_name, dtypes))) or None

    def view(self, places: Sequence[Place]) -> PagedView:
        """The cache as one pass sees it, a place for each row.

        Raises:
            CacheError: a row has no new token, or a table does not reach over its tokens.
        """
        return PagedView(self, places)

    def check(self, config: TextConfig, dtype: torch.dtype) -> None:
        """Refuse a model that this cache was not made for.

        Raises:
            CacheError: another configuration, or another dtype.
        """
        if config != self.config:
            raise CacheError("the cache was made for another configuration; make one for this model")
        if dtype != self._dtype:
            raise CacheError(
                f"the cache is for {self._dtype}, the model computes in {dtype}; pass dtype={dtype}"
            )

    def kept(self, layer: LayerConfig, places: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """What the cache holds of a layer once the new tokens of `places` are in it.

        Returns:
            Keys and values [B, g, S, d], and positions int [B, S], negative where there is no key; of a
            sliding layer the newest `sliding_window` only.
        """
        newest = [Place(place.start + place.count - 1, 1, place.tables) for place in places]
        slots, positions = self.slots(layer.kind, newest)
        k, v = (self.gather(pool, slots.flatten(), len(places)) for pool in self.pools[layer.index])
        return k, v, positions

    def slots(self, kind: AttentionKind, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
        """Slots and positions of all keys that the rows read, new ones included, both int [B, S].

        A slot is block * block_size + offset. Where a row has fewer keys, its position is -1 and its
        slot that of its own first key: masks take away what a key weighs, but not NaN of another row.
        """
        size = self.sizes.block_size[kind]
        window = self.config.sliding_window if kind == "sliding_attention" else None
        first = [0 if window is None else max(0, place.start - window + 1) for place in places]
        stop = [place.start + place.count for place in places]
        span = max(b - a for a, b in zip(first, stop, strict=True))
        column = torch.arange(span, device=self._device)[None]
        positions = torch.tensor(first, device=self._device)[:, None] + column
        inside = positions < torch.tensor(stop, device=self._device)[:, None]
        # Only the blocks that are read cross over to the device, from the first one on.
        lead = [at // size for at in first]
        width = max(-(-b // size) - a for a, b in zip(lead, stop, strict=True))
        rows = [list(place.tables[kind][a : a + width]) for place, a in zip(places, lead, strict=True)]
        blocks = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._device)
        entry = (positions // size - torch.tensor(lead, device=self._device)[:, None]).clamp(max=width - 1)
        slots = blocks.gather(1, entry) * size + positions % size
        return torch.where(inside, slots, slots[:, :1]), torch.where(inside, positions, -1)

    def gather(self, pool: Tensor, slots: Tensor | slice, rows: int) -> Tensor:
        """Keys or values of some slots in the dtype of the computation, [B, g, S, d].

        Of a run of slots that are stored in it, without a copy.
        """
        flat = movable(pool).flatten(0, 1)
        found = flat[slots] if isinstance(slots, slice) else flat.index_select(0, slots)
        read = found.view(pool.dtype).to(self._dtype)
        return read.view(rows, -1, *pool.shape[2:]).transpose(1, 2)

    def put(self, pool: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Store keys or values [M, g, d] in slots, int [M]."""
        stored = movable(narrowed(rows, pool.dtype))
        movable(pool).flatten(0, 1).index_copy_(0, slots, stored)

    def _pool(self, layer: LayerConfig) -> tuple[Tensor, Tensor]:
        blocks, size = self.sizes.blocks[layer.kind], self.sizes.block_size[layer.kind]
        shape = blocks, size, layer.num_kv_heads, layer.head_dim
        k, v = (torch.zeros(shape, dtype=self._stored, device=self._device) for _ in "kv")
        return k, v


class PagedView:
    """One pass over a paged cache; what `TextModel` takes as its cache."""

    def __init__(self, cache: PagedCache, places: Sequence[Place]) -> None:
        for row, place in enumerate(places):
            for kind in cache.config.kinds:
                reach = len(place.tables.get(kind, ())) * cache.sizes.block_size[kind]
                if place.count < 1 or place.start < 0 or place.start + place.count > reach:
                    raise CacheError(
                        f"row {row}: {place.count} tokens from position {place.start} on do not fit a table "
                        f"of {kind} layers that reaches over {reach} positions"
                    )
        self._cache = cache
        self._places = list(places)
        self._plans: dict[AttentionKind, _Plan] = {}

    def check(self, config: TextConfig, dtype: torch.dtype) -> None:
        """As `PagedCache.check`."""
        self._cache.check(config, dtype)

    def begin(
        self, width: int, counts: Sequence[int], blocks: Tensor | None = None, mode: BlockMode = "clamp_past"
    ) -> tuple[Tensor, dict[AttentionKind, Mask]]:
        """As `Cache.begin`; `counts` are those of the places.

        Raises:
            CacheError: they are others, or more than `width`.
        """
        own = [place.count for place in self._places]
        if list(counts) != own or max(own) > width:
            raise CacheError(f"the view is one of {own} new tokens; {list(counts)} in {width} columns differ")
        device = self._cache._device
        first = torch.tensor([place.start for place in self._places], device=device)[:, None]
        column = torch.arange(width, device=device)[None]
        positions = first + column
        last = first + torch.tensor(own, device=device)[:, None] - 1
        # Padding sees what the row's last token sees: something, so that no softmax is over nothing.
        seeing = torch.minimum(positions, last)
        new = None
        if any(count < width for count in own):
            new = (positions <= last).flatten().nonzero()[:, 0]
        self._plans = {
            kind: self._plan(
                kind, seeing, new, blocks if kind == "sliding_attention" else None, mode, column, first
            )
            for kind in self._cache.config.kinds
        }
        return positions, {kind: plan.mask for kind, plan in self._plans.items()}

    def extend(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values [B, g, T, d]; return all that they attend to."""
        plan = self._plans[layer.kind]
        seen = []
        for pool, made in zip(self._cache.pools[layer.index], (k, v), strict=True):
            rows = made.transpose(1, 2).flatten(0, 1)
            self._cache.put(pool, plan.written, rows if plan.new is None else rows[plan.new])
            seen.append(self._cache.gather(pool, plan.read, len(self._places)))
        return seen[0], seen[1]

    def commit(self) -> None:
        """End the pass. What counts as kept is up to those who own the tables."""
        self._plans = {}

    def _plan(
        self,
        kind: AttentionKind,
        seeing: Tensor,
        new: Tensor | None,
        blocks: Tensor | None,
        mode: BlockMode,
        column: Tensor,
        first: Tensor,
    ) -> _Plan:
        cache = self._cache
        window = cache.config.sliding_window if kind == "sliding_attention" else None
        slots, keys = cache.slots(kind, self._places)
        # The new tokens are the last keys of their row.
        at = (first - keys[:, :1] + column).clamp(max=keys.shape[1] - 1)
        written = slots.gather(1, at).flatten()
        read: Tensor | slice = slots.flatten()
        if len(slots) == 1 and bool((slots[0, 1:] == slots[0, :-1] + 1).all()):
            read = slice(int(slots[0, 0]), int(slots[0, -1]) + 1)
        return _Plan(
            written if new is None else written[new],
            new,
            read,
            keys.shape[1],
            self._mask(seeing, keys, window, self._blocks(blocks, keys, first), mode),
        )

    def _blocks(self, blocks: Tensor | None, keys: Tensor, first: Tensor) -> tuple[Tensor, Tensor] | None:
        """Blocks of the queries and of the keys; kept tokens are in none."""
        if blocks is None:
            return None
        column = keys - first
        own = blocks.gather(1, column.clamp(0, blocks.shape[1] - 1))
        return blocks, torch.where(column >= 0, own, NO_BLOCK)

    def _mask(
        self,
        seeing: Tensor,
        keys: Tensor,
        window: int | None,
        blocks: tuple[Tensor, Tensor] | None,
        mode: BlockMode,
    ) -> Mask:
        rows, width = seeing.shape
        span = keys.shape[1]
        if rows == width == 1:
            return Mask(None)
        allowed = visible(seeing, keys, window, None if blocks is None else Blocks(*blocks, mode))
        if width == 1 and bool(allowed.all()):
            return Mask(None)
        starts = {place.start for place in self._places}
        if starts == {0} and span == width and blocks is None and (window is None or width <= window):
            return Mask(None, causal=True)
        return Mask(allowed)
