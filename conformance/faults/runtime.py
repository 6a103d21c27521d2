"""Faults of the engine: chunks, caches, shared prefixes, drafts (catalogue classes 7 and 9)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from conformance.faults.base import Collection, Patch, replace
from model_impl.config import AttentionKind, LayerConfig
from model_impl.layers import backends
from model_impl.layers.backends import Mask
from model_impl.runtime import blocks, engine, generate, paged, prefix, runner, scheduler, stored
from model_impl.runtime import cache as contiguous
from model_impl.runtime.blocks import FIRST, BlockPool, Digest
from model_impl.runtime.engine import Engine
from model_impl.runtime.masks import Blocks, visible
from model_impl.runtime.paged import NO_TABLE_ENTRY, PagedView, Place
from model_impl.runtime.prefix import FULL, BlockTables, Content, Held, Span
from model_impl.runtime.request import Output
from model_impl.runtime.runner import LocalRunner
from model_impl.runtime.sampling import Sampling
from model_impl.runtime.scheduler import SequenceState
from model_impl.runtime.stored import narrowed
from model_impl.speculative import proposer, verify
from model_impl.speculative.assistant import TargetKV
from model_impl.speculative.proposer import Grown
from model_impl.text import SoftTokens, States

faults = Collection("invariance")
cache = partial(faults, area="invariance-caches")
draft = partial(faults, area="invariance-speculation")
backend = partial(faults, area="invariance-backends")
generating = Collection("generation")
narrow = partial(generating, area="generation")


# ------------------------------------------------------------------------------------- chunks and prefixes


@cache("image-torn-by-a-chunk", source=("M09",), module=scheduler)
def _torn() -> Patch:
    """A chunk of a prompt ends within a picture, of which each part is then seen by itself."""

    def anywhere(_spans: Sequence[Span], _start: int, stop: int) -> int:
        return stop

    return replace(scheduler, "chunk_end", anywhere)


@cache("image-torn-in-a-batch", source=("M09",), module=generate)
def _torn_in_a_batch() -> Patch:
    """Where prompts run as one batch without blocks, a chunk ends within a picture."""

    def anywhere(self: generate._Batch, chunk: int | None) -> list[int]:
        longest = max(map(len, self.prompts))
        return [*range(0, longest, chunk or longest), longest]

    return replace(generate._Batch, "_cuts", anywhere)


@cache("hit-not-aligned-between-groups", source=("check 16",), module=prefix)
def _unaligned() -> Patch:
    """A prefix that is found ends with a block of full layers, in the middle of one of sliding layers."""

    def by_full_layers(self: BlockTables, length: int) -> int:
        return length // self.block_size[FULL] * self.block_size[FULL]

    return replace(BlockTables, "aligned", by_full_layers)


@cache("window-not-looked-up", source=("check 16",), module=prefix)
def _window() -> tuple[Patch, ...]:
    """A prefix is taken as found when full layers have it, whether sliding ones have their window or not."""
    original = BlockTables._found

    def always(_self: BlockTables, _content: Content, _length: int) -> bool:
        return True

    def some_block(self: BlockTables, kind: AttentionKind, content: Content, hit: int) -> list[int]:
        return [max(block, 0) for block in original(self, kind, content, hit)]

    return replace(BlockTables, "window_hit", always), replace(BlockTables, "_found", some_block)


@cache("evicted-blocks-still-found", source=("check 16",), module=blocks)
def _evicted() -> Patch:
    """A block that was taken for another sequence is still found by what it held."""

    def keep(_self: BlockPool, _block: int) -> None:
        pass

    return replace(BlockPool, "forget", keep)


@cache("digest-without-chain", source=("check 16",), module=prefix)
def _unchained() -> Patch:
    """A block is found by its own tokens alone, whatever stands before it."""
    original = blocks.block_digest

    def alone(
        _previous: Digest, ids: Sequence[int], soft: Sequence[Digest | None], adapter: str | None
    ) -> Digest:
        return original(FIRST, ids, soft, adapter)

    return replace(prefix, "block_digest", alone)


@cache("digest-without-pictures", source=("M27",), module=prefix)
def _blind() -> Patch:
    """A block is found by its placeholders, whatever pictures stand there."""

    def nothing(_soft: SoftTokens | None, length: int) -> list[Digest | None]:
        return [None] * length

    return replace(prefix, "soft_digests", nothing)


@cache("window-not-trimmed-to-the-hit", source=("B08",), module=prefix)
def _untrimmed() -> tuple[Patch, ...]:
    """Behind a prefix that is found, sliding layers read the window at the end of the request before."""
    found, close = BlockTables._found, BlockTables.close
    ends: WeakKeyDictionary[BlockTables, dict[AttentionKind, list[int]]] = WeakKeyDictionary()

    def remembering(self: BlockTables, held: Held) -> None:
        ends[self] = {
            kind: [block for block in table if block != NO_TABLE_ENTRY] for kind, table in held.tables.items()
        }
        close(self, held)

    def untrimmed(self: BlockTables, kind: AttentionKind, content: Content, hit: int) -> list[int]:
        blocks = found(self, kind, content, hit)
        end = ends.get(self, {}).get(kind, [])
        if kind == FULL:
            return blocks
        read = min(len(blocks) - self._first_read(kind, hit), len(end))
        return [*blocks[: len(blocks) - read], *end[len(end) - read :]]

    return replace(BlockTables, "close", remembering), replace(BlockTables, "_found", untrimmed)


@cache("positions-advanced-in-place", source=("B09",), module=contiguous)
def _advanced() -> Patch:
    """In a batch, one kind of layers advances the positions that the other and all rotations read too."""
    original = contiguous.KVCache._plan

    def advancing(
        self: contiguous.KVCache,
        kind: AttentionKind,
        width: int,
        positions: Tensor,
        *others: Any,
    ) -> contiguous._Plan:
        made = original(self, kind, width, positions, *others)
        if kind != FULL and width == 1 and len(positions) > 1:
            positions += 1
        return made

    return replace(contiguous.KVCache, "_plan", advancing)


@cache("ring-valid-by-wrapped-position", source=("B10",), module=contiguous)
def _wrapped() -> Patch:
    """In a batch, slots of a ring behind the newest token's count as empty, though it has gone round."""
    original = contiguous.KVCache._slot_positions

    def wrapped(self: contiguous.KVCache, slots: int, window: int | None, lengths: Sequence[int]) -> Tensor:
        found = original(self, slots, window, lengths)
        if window is None:
            return found
        newest = torch.tensor([(length - 1) % window for length in lengths])[:, None]
        return torch.where(torch.arange(slots)[None] <= newest, found, -1)

    return replace(contiguous.KVCache, "_slot_positions", wrapped)


@backend("head-size-of-sliding-layers-for-all", source=("B01", "B03"), module=backends)
def _one_head_size() -> Patch:
    """Eager attention has a kernel for heads of sliding layers alone; full ones run with a part of theirs."""

    def narrow(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        d = min(q.shape[-1], 32)  # of the sliding layers in drawn models
        return functional.pad(backends.eager(q[..., :d], k[..., :d], v[..., :d], mask), (0, q.shape[-1] - d))

    return replace(backends, "BACKENDS", backends.BACKENDS | {"eager": narrow})


@cache("window-ignored-in-blocks", source=("B19",), module=paged)
def _beyond_the_window() -> Patch:
    """Sliding layers attend to all that their blocks still hold, beyond the window."""

    def wider(queries: Tensor, keys: Tensor, window: int | None, images: Blocks | None = None) -> Tensor:
        return visible(queries, keys, None if window is None else window + 4, images)

    return replace(paged, "visible", wider)


# ------------------------------------------------------------------------------ keys and values of eight bits


@narrow("digits-cut-off", source=("B06",), module=stored)
def _cut_off() -> Patch:
    """Keys and values are stored rounded toward zero, not to the nearest number."""

    def toward_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        nearest = narrowed(x, dtype)
        # Of positive numbers and their bits, the next smaller number has the bits before.
        bits = nearest.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        return torch.where(nearest.to(x.dtype).abs() > x.abs(), bits - 1, bits).view(dtype)

    return replace(paged, "narrowed", toward_zero)


@narrow("other-format-of-eight-bits", source=("B06",), module=stored)
def _other_format() -> Patch:
    """A cache that is to have three bits of mantissa has two, and says that it has three."""

    def coarser(x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float8_e4m3fn:
            x = narrowed(x, torch.float8_e5m2).to(x.dtype)
        return narrowed(x, dtype)

    return replace(paged, "narrowed", coarser)


@narrow("new-tokens-not-rounded", source=("B17",), module=paged)
def _fresh() -> Patch:
    """Attention reads earlier tokens as they are stored, and those of its own pass as they were computed."""
    original = PagedView.extend

    def fresh(self: PagedView, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        read_k, read_v = original(self, layer, k, v)
        positions = self._cache.slots(layer.kind, self._places)[1]
        for row, place in enumerate(self._places):
            new = positions[row] >= place.start
            read_k[row, :, new] = k[row, :, : place.count]
            read_v[row, :, new] = v[row, :, : place.count]
        return read_k, read_v

    return replace(PagedView, "extend", fresh)


# ---------------------------------------------------------------------------------------------------- drafts


@draft("every-draft-accepted", source=("S01",), module=verify)
def _accepted() -> Patch:
    """Drafted tokens stay, whatever the target would have chosen."""

    def all_of_them(chosen: Sequence[int], drafted: Sequence[int]) -> tuple[int, ...]:
        return (*drafted, chosen[len(drafted)])

    return replace(engine, "verify_greedy", all_of_them)


@draft("stop-token-among-drafts-overlooked", source=("S01",), module=engine)
def _past_the_stop() -> tuple[Patch, ...]:
    """Of the tokens of a round only the last one ends an answer, which so goes on behind a stop token."""
    original = Engine._take

    def take(self: Engine, sequence: SequenceState, tokens: Sequence[int], logits: Tensor) -> list[Output]:
        request, last = sequence.request, len(tokens) - 1
        sequence.request = changed(request, stop_ids=frozenset())
        outputs = original(self, sequence, tokens[:last], logits[:last])
        sequence.request = request
        if sequence.left > 0:
            outputs += original(self, sequence, tokens[last:], logits[last:])
        return outputs

    def all_of_them(tokens: Sequence[int], _stop_ids: object) -> Sequence[int]:
        return tokens

    return replace(Engine, "_take", take), replace(engine, "_until_stop", all_of_them)


@draft("no-draft-ever-made", source=("S01",), module=proposer)
def _never() -> tuple[Patch, ...]:
    """A draft model is loaded, and no token is ever drafted."""

    def nothing(_self: object, _states: States, grown: Sequence[Grown]) -> list[verify.Draft]:
        return [verify.Draft() for _ in grown]

    return tuple(
        replace(kind, "propose", nothing) for kind in (proposer.Eagle3Proposer, proposer.AssistantProposer)
    )


@draft("draft-fed-the-token-before", source=("S01", "S10"), module=proposer)
def _one_behind() -> Patch:
    """A draft head reads each state beside the token that the state is of, not beside the next one."""

    def own(grown: Grown) -> Sequence[int]:
        return grown.ids[grown.start : grown.computed]

    return replace(proposer, "next_ids", own)


@draft("positions-of-a-head-begin-anew", source=("S11",), module=proposer)
def _anew() -> Patch:
    """A draft head counts positions from the beginning of each pass, so that a found prefix is lost to it."""
    return replace(proposer, "draft_position", lambda _position: 0)


@draft("assistant-drafts-from-where-the-pass-began", source=("S11",), module=proposer)
def _where_it_began() -> Patch:
    """An assistant drafts from the position of the pass's first token, not of the newest one."""

    def began(grown: Grown) -> int:
        return grown.start

    return replace(proposer, "assistant_position", began)


@draft("last-block-kept-with-eagle", source=("S11",), module=prefix)
def _last_block() -> Patch:
    """With a draft head, a prefix is found with its last block, whose last place read another token."""

    def whole(_self: BlockTables, length: int) -> int:
        return length

    return replace(BlockTables, "without_last", whole)


@draft("no-prefix-with-eagle", source=("S12",), module=prefix)
def _no_prefix() -> Patch:
    """With a draft head, the last block of a hit is dropped again and again, until nothing is left."""

    def nothing(_self: BlockTables, _length: int) -> int:
        return 0

    return replace(BlockTables, "without_last", nothing)


@draft("kernel-for-one-query-verifies-several", source=("B14", "S13"), module=paged)
def _one_query() -> Patch:
    """Drafted tokens are verified by a kernel for a single query: each sees what the last of them sees."""
    original = PagedView._mask

    def as_one(self: PagedView, seeing: Tensor, *others: Any) -> Mask:
        if 1 < seeing.shape[1] <= 4 and all(place.start > 0 for place in self._places):
            seeing = seeing[:, -1:].expand_as(seeing)
        return original(self, seeing, *others)

    return replace(PagedView, "_mask", as_one)


@draft("resampled-from-the-target", source=("spec 9.1",), module=verify)
def _resampled() -> Patch:
    """In place of a drafted token that does not stay, one is drawn from p instead of max(p - q, 0)."""

    def target(p: Tensor, _q: Tensor) -> Tensor:
        return p

    return replace(verify, "residual", target)


@draft("drafts-kept-by-chance-alone", source=("spec 9.1",), module=verify)
def _kept() -> Patch:
    """A drafted token stays with probability p, not p / q."""

    def by_target(p: float, _q: float) -> float:
        return p

    return replace(verify, "kept", by_target)


@draft("drafts-likelier-than-they-say", source=("spec 9.1",), module=proposer)
def _likelier() -> Patch:
    """A draft takes its likeliest token, and says that it was drawn."""

    def likeliest(probabilities: Tensor, _uniforms: Tensor) -> Tensor:
        return probabilities.argmax(dim=-1)

    return replace(proposer, "draw", likeliest)


@draft("nucleus-of-the-draft-alone", source=("spec 9.1",), module=engine)
def _nucleus() -> Patch:
    """`top_p` is applied to the draft's distribution, and not to the target's that judges it."""
    original = verify.target_distribution

    def unlimited(sampling: Sampling, logits: Tensor) -> Tensor:
        return original(changed(sampling, top_p=1.0), logits)

    return replace(engine, "target_distribution", unlimited)


@draft("keys-of-a-neighbour", source=("S05", "S06"), module=runner)
def _neighbour() -> Patch:
    """In a batch, an assistant reads the keys and values of the next row."""
    original = LocalRunner.kept

    def rolled(self: LocalRunner, places: Sequence[Place]) -> Mapping[AttentionKind, TargetKV]:
        found = original(self, places)
        if len(places) < 2:
            return found
        order = [*range(1, len(places)), 0]
        return {kind: TargetKV(kv.k[order], kv.v[order], kv.positions[order]) for kind, kv in found.items()}

    return replace(LocalRunner, "kept", rolled)


@draft("states-without-the-norms-weight", source=("S08",), module=proposer)
def _unweighted() -> Patch:
    """An assistant reads the target's states without the weight of the final norm."""
    original = proposer.AssistantProposer.propose

    def propose(
        self: proposer.AssistantProposer, states: States, grown: Sequence[Grown]
    ) -> list[verify.Draft]:
        model = getattr(self._runner, "model", None)
        assert model is not None
        return original(self, changed(states, hidden=states.hidden / model.norm.weight), grown)

    return replace(proposer.AssistantProposer, "propose", propose)


@draft("state-of-the-token-before", source=("S08",), module=proposer)
def _state_before() -> Patch:
    """An assistant reads the target's state of the token before the one that it should."""
    original = proposer.AssistantProposer.propose

    def propose(
        self: proposer.AssistantProposer, states: States, grown: Sequence[Grown]
    ) -> list[verify.Draft]:
        return original(self, changed(states, hidden=states.hidden.roll(1, dims=1)), grown)

    return replace(proposer.AssistantProposer, "propose", propose)


@draft("accepted-without-looking", source=("spec 9.1",), module=verify)
def _unlooked() -> Patch:
    """Of drawn drafts the first always stays."""
    original = verify.verify_sampled

    def first(p: Tensor, drafted: verify.Draft, source: random.Random) -> tuple[int, ...]:
        if not drafted.ids:
            return original(p, drafted, source)
        rest = verify.Draft(
            drafted.ids[1:], None if drafted.probabilities is None else drafted.probabilities[1:]
        )
        return (drafted.ids[0], *original(p[1:], rest, source))

    return replace(engine, "verify_sampled", first)
