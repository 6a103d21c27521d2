"""Adapters of a model whose layers run in other processes: who holds which part, and which rows use them.

An adapter is read and judged once, here, and each rank is sent what belongs to its own modules: the pairs of
its stage's layers, and of each pair what its shard of the weight takes. Where outputs are divided that is a
part of B; where inputs are, a part of A, and the ranks add up. What belongs to no rank is an error before any
rank hears of the adapter, as what a rank refuses ends it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from model_impl.config import TextConfig
from model_impl.errors import CheckpointError
from model_impl.lora import AdapterError, LowRank, Parts, names
from model_impl.lora.apply import check_new
from model_impl.lora.sites import HEAD, TEXT, is_text
from model_impl.parallel.group import Group
from model_impl.parallel.layout import Layout, Place
from model_impl.parallel.messages import Acted, AddAdapter, RemoveAdapter, packed, unpacked
from model_impl.parallel.shards import Cut, cut_of

_TABLE = f"{TEXT}embed_tokens"
_LISTED = 8


class ParallelAdapters:
    """The adapters of all ranks, as `model_impl.lora.Adapters` are those of one process.

    Args:
        group: Its ranks have loaded the model.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._known: set[str] = set()
        self._used: set[str] = set()
        self.wanted: tuple[str | None, ...] = ()
        """For each row of the passes that come the name of its adapter; empty: none has one."""
        self.held: dict[str, dict[int, dict[str, list[list[int]]]]] = {}
        """By adapter and rank: the sites that the rank holds something for, with the shapes of what it holds,
        as the rank said itself."""

    def add(self, name: str, adapter: Parts) -> None:
        """As `Adapters.add`; each rank gets its own parts.

        Raises:
            AdapterError: there is or was one of this name, or it is for more than the text model.
            CheckpointError: something of it belongs to no rank.
            ParallelError: a rank went wrong; the processes have ended.
        """
        check_new(name, self._known, self._used)
        sent = self._parts(adapter)
        answers = self._group.ask(
            {rank: AddAdapter(name, adapter.where, packed(named(parts))) for rank, parts in sent.items()}
        )
        self.held[name] = {rank: json.loads(answer) for rank, answer in answers.items()}
        self._known.add(name)
        self._used.add(name)

    def remove(self, name: str) -> None:
        """As `Adapters.remove`.

        Raises:
            AdapterError: there is none of this name, or rows use it.
            ParallelError: a rank went wrong; the processes have ended.
        """
        self._check(name)
        if name in self.wanted:
            raise AdapterError(f"the adapter {name!r} is in use; wait until the pass is over")
        self._group.ask(dict.fromkeys(self.held.pop(name), RemoveAdapter(name)))
        self._known.discard(name)

    @contextmanager
    def rows(self, wanted: Sequence[str | None]) -> Iterator[None]:
        """As `Adapters.rows`.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        for name in wanted:
            if name is not None:
                self._check(name)
        before = self.wanted
        self.wanted = tuple(wanted) if any(name is not None for name in wanted) else ()
        try:
            yield
        finally:
            self.wanted = before

    def of_pass(self, rows: int) -> tuple[str | None, ...]:
        """The adapters of a pass over so many rows, as ranks are told.

        Raises:
            AdapterError: other rows were announced.
        """
        if self.wanted and len(self.wanted) != rows:
            raise AdapterError(f"a pass has {rows} rows, and {len(self.wanted)} rows were announced")
        return self.wanted

    def acted(self, name: str) -> tuple[str, ...]:
        """As `Adapters.acted`: on any rank.

        Raises:
            AdapterError: there is no adapter of this name.
            ParallelError: a rank went wrong; the processes have ended.
        """
        self._check(name)
        answers = self._group.ask(dict.fromkeys(self.held[name], Acted(name)))
        return tuple(sorted({site for answer in answers.values() for site in json.loads(answer)}))

    def _check(self, name: str) -> None:
        if name not in self._known:
            known = ", ".join(map(repr, sorted(self._known))) or "none"
            raise AdapterError(f"there is no adapter {name!r}; there are: {known}")

    def _parts(self, adapter: Parts) -> dict[int, Parts]:
        """What each rank gets; ranks that hold nothing of it are not there."""
        layout, config = self._group.layout, self._group.config
        outside = [site for site in names(adapter) if not is_text(site)]
        if outside:
            raise AdapterError(
                f"{adapter.where}: these processes hold the text model, and {', '.join(outside[:_LISTED])} "
                "are not in it; add the parts of the text model here, and the rest where media are encoded"
            )
        found: dict[int, Parts] = {}
        for rank, loaded in self._group.loaded.items():
            place = layout.place(rank)
            own = adapter.only(partial(holds, parameters=loaded.parameters, layout=layout, place=place))
            if own.changes or own.copies:
                found[rank] = cut_parts(own, config, layout, place.shard)
        taken = {site for parts in found.values() for site in names(parts)}
        if lost := [site for site in names(adapter) if site not in taken]:
            raise CheckpointError(f"{adapter.where}: no rank of {layout} holds {', '.join(lost[:_LISTED])}")
        return found


def holds(site: str, parameters: Collection[str], layout: Layout, place: Place) -> bool:
    """Whether a rank computes what an adapter at a site changes.

    The table of a tied head lies in the last stage as well, which reads no tokens.

    Args:
        site: Of the text model.
        parameters: Names of what the rank holds.
        layout: Of all ranks.
        place: The rank's.
    """
    if site == HEAD:
        return place.stage == layout.stages - 1
    if site == _TABLE:
        return place.stage == 0
    name = site.removeprefix(TEXT)
    return name in parameters or f"{name}.weight" in parameters


def cut_parts(parts: Parts, config: TextConfig, layout: Layout, shard: int) -> Parts:
    """What a rank's shards of the weights take, of parts for a whole stage.

    Raises:
        LayoutError: as `cut_of`.
    """
    changes = {}
    for site, change in parts.changes.items():
        experts = change.a.ndim == 3
        name = site.removeprefix(TEXT)
        cut = cut_of(name if experts else f"{name}.weight", config, layout, shard)
        table = site.rpartition(".")[2].startswith("embed_tokens")
        changes[site] = cut_change(change, cut, embedding=table)
    copies = {
        site: {name: _cut_copy(site, name, tensor, config, layout, shard) for name, tensor in copy.items()}
        for site, copy in parts.copies.items()
    }
    return Parts(parts.where, changes, copies)


def cut_change(change: LowRank, cut: Cut | None, *, embedding: bool = False) -> LowRank:
    """What belongs to a part of a weight: rows of it to rows of B, columns to columns of A, experts to both.

    Args:
        change: Of the whole weight.
        cut: The part; None for all of it.
        embedding: The weight is B A transposed.
    """
    if cut is None:
        return change
    if embedding:
        return LowRank(Cut(1 - cut.axis, cut.ranges).of(change.a), change.b)
    experts = change.a.ndim == 3
    if experts and cut.axis == 0:
        return LowRank(cut.of(change.a), cut.of(change.b))
    if cut.axis == int(experts):
        return LowRank(change.a, cut.of(change.b))
    return LowRank(cut.of(change.a), change.b)


def _cut_copy(site: str, name: str, tensor: Tensor, config: TextConfig, layout: Layout, shard: int) -> Tensor:
    cut = cut_of(f"{site.removeprefix(TEXT)}.{name}", config, layout, shard)
    return tensor if cut is None else cut.of(tensor)


def named(parts: Parts) -> dict[str, Tensor]:
    """The tensors of parts by names that `parts_of` knows."""
    found: dict[str, Tensor] = {}
    for site, change in parts.changes.items():
        found |= {f"a/{site}": change.a, f"b/{site}": change.b}
    for site, copy in parts.copies.items():
        found |= {f"{name}/{site}": tensor for name, tensor in copy.items()}
    return found


def parts_of(where: str, data: bytes) -> Parts:
    """Parts from the bytes of `named` tensors."""
    changes: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    for key, tensor in unpacked(data).items():
        name, _, site = key.partition("/")
        (changes if name in ("a", "b") else copies).setdefault(site, {})[name] = tensor
    return Parts(where, {site: LowRank(own["a"], own["b"]) for site, own in changes.items()}, copies)


def shapes(parts: Parts) -> Mapping[str, list[list[int]]]:
    """What is held for each site: shapes of A and B, or of copies."""
    found = {site: [list(change.a.shape), list(change.b.shape)] for site, change in parts.changes.items()}
    for site, copy in parts.copies.items():
        found[site] = [*found.get(site, []), *(list(tensor.shape) for tensor in copy.values())]
    return found


__all__ = ["ParallelAdapters", "cut_change", "cut_of", "cut_parts", "holds", "named", "parts_of", "shapes"]
