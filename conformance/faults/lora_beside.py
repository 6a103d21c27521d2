"""Faults of LoRA adapters beside layouts, drafts and shared prefixes (catalogue class 8).

Ranks are processes of their own: what is patched is what they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from functools import partial
from weakref import WeakKeyDictionary

from conformance.faults.base import Collection, Patch, replace
from model_impl.config import TextConfig
from model_impl.lora.adapter import Parts
from model_impl.parallel import adapters as over_ranks
from model_impl.parallel.adapters import ParallelAdapters
from model_impl.parallel.layout import Layout
from model_impl.parallel.shards import Cut
from model_impl.runtime import blocks, prefix
from model_impl.runtime import runner as runners
from model_impl.runtime.blocks import Digest
from model_impl.runtime.runner import Batch, LocalRunner
from model_impl.text import States

faults = Collection("lora")
beside = partial(faults, area="lora-layouts")


@beside("first-stage-alone", source=("spec 8.1",), module=over_ranks)
def _first_stage_alone() -> Patch:
    """Over several stages, the first one alone has its adapters."""
    original = ParallelAdapters._parts

    def parts(self: ParallelAdapters, given: Parts) -> dict[int, Parts]:
        layout = self._group.layout
        return {rank: own for rank, own in original(self, given).items() if layout.place(rank).stage == 0}

    return replace(ParallelAdapters, "_parts", parts)


@beside("last-stage-alone", source=("spec 8.1",), module=over_ranks)
def _last_stage_alone() -> Patch:
    """Over several stages, the last one alone has its adapters."""
    original = ParallelAdapters._parts

    def parts(self: ParallelAdapters, given: Parts) -> dict[int, Parts]:
        layout = self._group.layout
        last = layout.stages - 1
        return {rank: own for rank, own in original(self, given).items() if layout.place(rank).stage == last}

    return replace(ParallelAdapters, "_parts", parts)


def _first_part(is_wrong: Callable[[str, Cut, Layout], bool]) -> Patch:
    """A patch that gives every rank the first rank's part of some matrices."""
    original = over_ranks.cut_of

    def cut_of(name: str, known: TextConfig, layout: Layout, shard: int) -> Cut | None:
        cut = original(name, known, layout, shard)
        return original(name, known, layout, 0) if cut and is_wrong(name, cut, layout) else cut

    return replace(over_ranks, "cut_of", cut_of)


@beside("first-part-of-outputs", source=("spec 8.3",), module=over_ranks)
def _first_part_of_outputs() -> Patch:
    """Where the ranks divide a projection's outputs, each adds what an adapter makes of the first rank's."""
    return _first_part(lambda name, cut, _layout: ".experts." not in name and cut.axis == 0)


@beside("first-part-of-inputs", source=("spec 8.3",), module=over_ranks)
def _first_part_of_inputs() -> Patch:
    """Where the ranks divide a projection's inputs, each multiplies them by A's part for the first rank's."""
    return _first_part(lambda name, cut, _layout: ".experts." not in name and cut.axis == 1)


@beside("parts-of-experts-not-cut", source=("L02",), module=over_ranks)
def _parts_of_experts() -> Patch:
    """Where each rank has a part of every expert, each uses the adapter's part for the first rank."""
    return _first_part(lambda name, _cut, layout: ".experts." in name and not layout.expert)


@beside("experts-counted-within-a-rank", source=("L02",), module=over_ranks)
def _experts_within_a_rank() -> Patch:
    """Where each rank has some experts whole, an adapter's are counted from the rank's first one."""
    return _first_part(lambda name, _cut, layout: ".experts." in name and layout.expert)


@beside("prefixes-of-another-adapter", source=("check 16",), module=prefix)
def _prefixes_of_another() -> Patch:
    """A block of a prompt is found whatever adapter has computed it."""
    original = blocks.block_digest

    def without(
        previous: Digest, ids: Sequence[int], soft: Sequence[Digest | None], _adapter: str | None
    ) -> Digest:
        return original(previous, ids, soft, None)

    return replace(prefix, "block_digest", without)


@beside("dropped-in-verification", source=("check 19",), module=runners)
def _dropped_in_verification() -> Patch:
    """The pass that verifies drafted tokens runs without adapters."""
    original = LocalRunner.run

    def run(self: LocalRunner, batch: Batch) -> States:
        pieces = (
            changed(piece, adapter=None) if piece.start and len(piece.ids) > 1 else piece
            for piece in batch.pieces
        )
        return original(self, Batch(tuple(pieces)))

    return replace(LocalRunner, "run", run)


@beside("rows-of-the-pass-before", source=("check 13",), module=runners)
def _rows_of_the_pass_before() -> Patch:
    """Which row uses which adapter is set anew only when the number of rows changes."""
    original = LocalRunner.run
    before: WeakKeyDictionary[LocalRunner, list[str | None]] = WeakKeyDictionary()

    def run(self: LocalRunner, batch: Batch) -> States:
        known = before.get(self, [])
        if len(known) != len(batch.pieces):
            before[self] = known = batch.adapters
        pieces = (changed(piece, adapter=own) for piece, own in zip(batch.pieces, known, strict=True))
        return original(self, Batch(tuple(pieces)))

    return replace(LocalRunner, "run", run)
