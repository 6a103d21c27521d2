"""What an engine asks of a model, wherever its layers run: passes over pieces of sequences.

A batch is plain data: ids, positions, and the blocks of a paged cache that belong to each sequence. Who runs
it holds the weights and the pools of blocks, and keeps nothing about sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model_impl.config import AttentionKind, TextConfig
from model_impl.errors import ModelError
from model_impl.runtime.masks import NO_BLOCK
from model_impl.runtime.paged import CacheSizes, PagedCache, Place
from model_impl.speculative.assistant import TargetKV, kv_layers
from model_impl.text import SoftTokens, States, TextModel, check_aux_layers


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence in one pass."""

    ids: tuple[int, ...]
    """At least one."""
    start: int
    """Position of the first; those before it are in the cache."""
    tables: Mapping[AttentionKind, tuple[int, ...]]
    """Blocks of the sequence for each kind of layer, from position 0 on to beyond the new tokens; what has
    left the window is `NO_TABLE_ENTRY`."""
    soft: SoftTokens | None = None
    """Of exactly these columns, as one row: `where` and `blocks` are [1, len(ids)]."""
    adapter: str | None = None
    """Name of the adapter that the sequence runs with."""

    @property
    def place(self) -> Place:
        """Where it lies in the cache."""
        return Place(self.start, len(self.ids), self.tables)


@dataclass(frozen=True)
class Batch:
    """One pass: a row for each piece, right-padded to the longest."""

    pieces: tuple[Piece, ...]

    @property
    def lengths(self) -> list[int]:
        """New tokens of each row."""
        return [len(piece.ids) for piece in self.pieces]

    @property
    def adapters(self) -> list[str | None]:
        """The adapter of each row."""
        return [piece.adapter for piece in self.pieces]

    def input_ids(self, padding: int, device: torch.device | str = "cpu") -> Tensor:
        """The new tokens, int [B, T]."""
        width = max(self.lengths)
        rows = [[*piece.ids, *[padding] * (width - len(piece.ids))] for piece in self.pieces]
        return torch.tensor(rows, device=device)

    def soft_tokens(self) -> SoftTokens | None:
        """Those of all rows, padded; None where there is none.

        Raises:
            ModelError: a piece's are not of its own columns.
        """
        given = [piece.soft for piece in self.pieces if piece.soft is not None]
        if not given:
            return None
        device, width = given[0].where.device, max(self.lengths)
        where = torch.zeros(len(self.pieces), width, dtype=torch.bool, device=device)
        blocks = torch.full_like(where, NO_BLOCK, dtype=torch.int64)
        for row, piece in enumerate(self.pieces):
            if piece.soft is None:
                continue
            if piece.soft.where.shape != (1, len(piece.ids)):
                raise ModelError(
                    f"piece {row}: soft tokens of {list(piece.soft.where.shape)} rows and columns do not fit "
                    f"its {len(piece.ids)} tokens"
                )
            where[row, : len(piece.ids)] = piece.soft.where[0]
            blocks[row, : len(piece.ids)] = piece.soft.blocks[0]
        return SoftTokens(where, torch.cat([soft.features for soft in given]), blocks)


class Runner(Protocol):
    """Holds a model and the pools of its paged cache, in this process or in others."""

    @property
    def config(self) -> TextConfig:
        """The whole model's."""
        ...

    @property
    def sizes(self) -> CacheSizes:
        """Of the pools that `Piece.tables` point into; the same wherever a layer runs."""
        ...

    @property
    def stored(self) -> str:
        """Names of the dtypes in which the pools hold keys and values, commonly one."""
        ...

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """After how many layers `run` gives the residual stream as well; see `TextModel.states`."""
        ...

    def run(self, batch: Batch) -> States:
        """One pass: keys and values go into the cache, hidden states [B, T, H] come out.

        What stands at padding means nothing. A pass may be one of many at once on the way through several
        processes, but its cache has all passes before it.

        Raises:
            ModelError: a piece does not fit its tables or its soft tokens, or names an unknown adapter.
        """
        ...

    def logits(self, hidden: Tensor, adapters: Sequence[str | None] = ()) -> Tensor:
        """Hidden states [n, H] of `run` to [n, vocabulary].

        Args:
            hidden: From any rows of any passes.
            adapters: For each of the n the name of its row's adapter; left out, none has one.

        Raises:
            ModelError: an unknown adapter is named.
        """
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to the scaled embeddings [..., H] that the first layer gets without adapters."""
        ...

    def kept(self, places: Sequence[Place]) -> Mapping[AttentionKind, TargetKV]:
        """Of each kind of layer the keys and values that later layers, and draft models, read.

        Those of the last layer of the kind with its own, up to and including the new tokens of `places`; of
        sliding layers the newest `sliding_window` only.
        """
        ...

    def close(self) -> None:
        """Give everything back; the runner is of no use after that. Twice is once."""
        ...


Activate = Callable[[Sequence[str | None]], AbstractContextManager[object]]
"""Makes the rows of a pass run with the adapters of these names."""


class LocalRunner:
    """A model in this process.

    Args:
        model: In any dtype, on any device.
        sizes: Of the pools of its cache.
        aux_layers: After how many layers the residual stream is wanted as well.
        activate: Entered around each pass with the adapter of each row; without it, a piece that names an
            adapter is refused.

    Raises:
        CacheError: sizes are missing or not positive.
        ModelError: `aux_layers` is not distinct, ascending, and within the model.
    """

    def __init__(
        self,
        model: TextModel,
        sizes: CacheSizes,
        aux_layers: Sequence[int] = (),
        activate: Activate | None = None,
    ) -> None:
        check_aux_layers(aux_layers, len(model.layers))
        weight = model.embed_tokens.weight
        self.model = model
        self.config = model.config
        self.sizes = sizes
        self.aux_layers = tuple(aux_layers)
        self.cache = PagedCache(model.config, sizes, dtype=weight.dtype, device=weight.device)
        self.stored = self.cache.stored or ""
        self._device = weight.device
        self._activate = activate

    @torch.inference_mode()
    def run(self, batch: Batch) -> States:
        """As `Runner.run`."""
        with self._adapters(batch.adapters):
            return self.model.states(
                batch.input_ids(self.config.pad_token_id, self._device),
                aux_layers=self.aux_layers,
                cache=self.cache.view([piece.place for piece in batch.pieces]),
                lengths=batch.lengths,
                soft=batch.soft_tokens(),
            )

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: Sequence[str | None] = ()) -> Tensor:
        """As `Runner.logits`."""
        with self._adapters(adapters):
            return self.model.logits(hidden)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """As `Runner.embed`."""
        embedded: Tensor = self.model.embed_tokens(ids.to(self._device))
        return embedded

    @torch.inference_mode()
    def kept(self, places: Sequence[Place]) -> Mapping[AttentionKind, TargetKV]:
        """As `Runner.kept`."""
        layers = kv_layers(self.config)
        return {kind: TargetKV(*self.cache.kept(layer, places)) for kind, layer in layers.items()}

    def close(self) -> None:
        """As `Runner.close`."""
        self.cache.pools.clear()

    def _adapters(self, names: Sequence[str | None]) -> AbstractContextManager[object]:
        if self._activate is not None:
            return self._activate(names)
        named = [name for name in names if name is not None]
        if named:
            raise ModelError(f"no adapters are loaded here; {named[0]!r} is asked for")
        return nullcontext()
