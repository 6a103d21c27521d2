"""Draft models at work: after each pass of the target they say which tokens may come next.

A proposer is told of every position that the target has computed and that stays, in order, prompts included;
it may keep keys and values of its own for them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from model_impl.config import AttentionKind
from model_impl.errors import ConfigError
from model_impl.runtime.paged import CacheSizes, PagedCache, Place
from model_impl.runtime.runner import Runner
from model_impl.runtime.sampling import Sampling, draw
from model_impl.speculative.assistant import Assistant, TargetKV
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import KIND
from model_impl.speculative.verify import Draft, draft_distribution
from model_impl.text import States


@dataclass(frozen=True)
class Grown:
    """A sequence after a pass of the target."""

    ids: Sequence[int]
    """All its tokens, at least one more than the target has computed."""
    start: int
    """Position of the first token of the pass."""
    count: int
    """Tokens of the pass that stay, at least one."""
    tables: Mapping[AttentionKind, Sequence[int]]
    """Its blocks, which reach over `wanted` more positions."""
    wanted: int
    """Most tokens to draft; 0 while the prompt is not done, or at the end."""
    sampling: Sampling
    source: random.Random
    """Of randomness for this request's drafted tokens alone."""

    @property
    def computed(self) -> int:
        """Tokens that the target has in its cache."""
        return self.start + self.count


class Proposer(Protocol):
    """A draft model for all sequences of an engine."""

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Which states of the target it reads; the runner must give these."""
        ...

    @property
    def keeps_cache(self) -> bool:
        """Whether it keeps keys and values of its own, in the blocks of the full layers' tables.

        It then writes behind the tokens of a pass, and the last block of a prefix that is found is of no use
        to it.
        """
        ...

    def propose(self, states: States, grown: Sequence[Grown]) -> list[Draft]:
        """Draft for the rows of a pass.

        Args:
            states: Of the pass; row by row, those of the sequence's positions from `start` on.
            grown: One for each row.

        Returns:
            Up to `wanted` tokens for each.
        """
        ...


def next_ids(grown: Grown) -> Sequence[int]:
    """The tokens that stand beside a sequence's states in a draft head: each one behind its state's."""
    return grown.ids[grown.start + 1 : grown.computed + 1]


def draft_position(position: int) -> int:
    """Where a draft head processes the state of one of the target's positions."""
    return position


def assistant_position(grown: Grown) -> int:
    """Where an assistant drafts from: the newest token's position, as transformers has it."""
    return grown.computed


def drawn_tokens(
    logits: Tensor, rows: Sequence[Grown], *, sample: bool
) -> tuple[list[int], list[Tensor | None]]:
    """One drafted token for each row, and what it was drawn from.

    Args:
        logits: float [N, V], over the target's vocabulary.
        rows: Of the sequences.
        sample: Draw the tokens of requests that sample; else take the likeliest.

    Returns:
        Tokens, and distributions float64 [V]; None where the token is the likeliest.
    """
    tokens = [0] * len(rows)
    found: list[Tensor | None] = [None] * len(rows)
    for sampling in {row.sampling for row in rows}:
        own = [index for index, row in enumerate(rows) if row.sampling == sampling]
        part = logits if len(own) == len(rows) else logits[torch.tensor(own, device=logits.device)]
        if sampling.temperature == 0 or not sample:
            likeliest = replace(sampling, temperature=0.0).choose(part, ()).tolist()
            for index, token in zip(own, likeliest, strict=True):
                tokens[index] = token
            continue
        q = draft_distribution(sampling, part)
        uniforms = [rows[index].source.random() for index in own]
        chosen = draw(q, torch.tensor(uniforms, dtype=torch.float64, device=q.device)).tolist()
        for index, token, distribution in zip(own, chosen, q, strict=True):
            tokens[index], found[index] = token, distribution
    return tokens, found


class _Drafts:
    """Drafts of several sequences as they grow."""

    def __init__(self, rows: Sequence[Grown], *, sample: bool) -> None:
        self.rows = list(rows)
        self.ids: list[list[int]] = [[] for _ in rows]
        self._sources: list[list[Tensor]] = [[] for _ in rows]
        self._sample = sample

    def add(self, logits: Tensor, live: Sequence[int]) -> None:
        """A token for each of some rows, from logits [N, V]."""
        tokens, sources = drawn_tokens(logits, [self.rows[row] for row in live], sample=self._sample)
        for row, token, source in zip(live, tokens, sources, strict=True):
            self.ids[row].append(token)
            if source is not None:
                self._sources[row].append(source)

    def done(self) -> list[Draft]:
        """The drafts."""
        return [
            Draft(tuple(ids), torch.stack(sources) if sources else None)
            for ids, sources in zip(self.ids, self._sources, strict=True)
        ]


class Eagle3Proposer:
    """An Eagle3 head with a paged cache of its own, in the blocks of the full layers' tables.

    Where the token beside a state is a soft token, the head sees the embedding of its placeholder.

    Args:
        head: The draft head.
        runner: The target's.
        sample: Draw drafted tokens of requests that sample; else draft the likeliest.

    Raises:
        ConfigError: the head was not made for this target, or the runner gives other states.
    """

    keeps_cache = True

    def __init__(self, head: Eagle3, runner: Runner, *, sample: bool = True) -> None:
        config, target = head.config, runner.config
        pairs = [
            ("vocabulary", config.decoder.vocab_size, target.vocab_size),
            ("target's hidden size", config.target_hidden_size, target.hidden_size),
            ("layers that states are taken after", config.aux_layers, runner.aux_layers),
        ]
        differ = [f"{what} {mine} against {other}" for what, mine, other in pairs if mine != other]
        if differ:
            raise ConfigError(f"the draft head does not fit this runner: {'; '.join(differ)}")
        weight = head.fc.weight
        sizes = CacheSizes({KIND: runner.sizes.block_size[KIND]}, {KIND: runner.sizes.blocks[KIND]})
        self.head = head
        self.aux_layers = config.aux_layers
        self.cache = PagedCache(config.decoder, sizes, dtype=weight.dtype, device=weight.device)
        self._known = frozenset(head.target_ids(torch.arange(len(head.d2t), device=weight.device)).tolist())
        self._sample = sample

    @torch.inference_mode()
    def propose(self, states: States, grown: Sequence[Grown]) -> list[Draft]:
        """As `Proposer.propose`."""
        weight = self.head.fc.weight
        counts = [row.count for row in grown]
        width = max(counts)
        features = self.head.features([state[:, :width].to(weight) for state in states.aux])
        ids = [[*next_ids(row), *[0] * (width - row.count)] for row in grown]
        hidden, out = self._pass(ids, features, [self._place(row, row.start, row.count) for row in grown])
        last = torch.tensor(counts, device=weight.device) - 1
        every = torch.arange(len(grown), device=weight.device)
        hidden, out = hidden[every, last], out[every, last]
        drafts = _Drafts(grown, sample=self._sample)
        live = list(range(len(grown)))
        wanted = [row.wanted if self._says(row.sampling) else 0 for row in grown]
        for step in range(max(wanted)):
            going = [at for at, row in enumerate(live) if wanted[row] > step]
            live = [live[at] for at in going]
            hidden, out = hidden[going], out[going]
            if step:
                # One position on, with the features that the pass before returned.
                places = [self._place(grown[row], grown[row].computed + step - 1, 1) for row in live]
                newest = [[drafts.ids[row][-1]] for row in live]
                hidden, out = (x[:, 0] for x in self._pass(newest, out[:, None], places))
            drafts.add(self.head.target_logits(self.head.logits(hidden)), live)
        return drafts.done()

    def _says(self, sampling: Sampling) -> bool:
        """Whether the head knows a token that is not suppressed."""
        return not (sampling.suppress and self._known <= set(sampling.suppress))

    def _place(self, row: Grown, start: int, count: int) -> Place:
        return Place(draft_position(start), count, row.tables)

    def _pass(
        self, ids: Sequence[Sequence[int]], features: Tensor, places: Sequence[Place]
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.head(
            torch.tensor(ids, device=features.device),
            features,
            cache=self.cache.view(places),
            lengths=[place.count for place in places],
        )
        return found


class AssistantProposer:
    """A published draft model, which reads the target's keys and values and keeps none.

    Args:
        assistant: The draft model.
        runner: The target's.
        sample: Draw drafted tokens of requests that sample; else draft the likeliest.

    Raises:
        ConfigError: the draft model was not made for this target.
    """

    aux_layers: tuple[int, ...] = ()
    keeps_cache = False

    def __init__(self, assistant: Assistant, runner: Runner, *, sample: bool = True) -> None:
        assistant.config.check_target(runner.config)
        self.assistant = assistant
        self._runner = runner
        self._sample = sample

    @torch.inference_mode()
    def propose(self, states: States, grown: Sequence[Grown]) -> list[Draft]:
        """As `Proposer.propose`."""
        drafts = _Drafts(grown, sample=self._sample)
        live = [row for row in range(len(grown)) if grown[row].wanted > 0]
        if not live:
            return drafts.done()
        weight = self.assistant.pre_projection.weight
        last = [grown[row].count - 1 for row in live]
        hidden = states.hidden[live, last][:, None].to(weight)
        tokens = [grown[row].ids[grown[row].computed] for row in live]
        # All steps of a round have the same positions, keys and values.
        positions = torch.tensor([[assistant_position(grown[row])] for row in live], device=weight.device)
        places = [Place(grown[row].start, grown[row].count, grown[row].tables) for row in live]
        target = {kind: _to(kv, weight) for kind, kv in self._runner.kept(places).items()}
        for step in range(max(row.wanted for row in grown)):
            going = [at for at, row in enumerate(live) if grown[row].wanted > step]
            if len(going) < len(live):
                live = [live[at] for at in going]
                hidden, positions = hidden[going], positions[going]
                tokens = [tokens[at] for at in going]
                target = {
                    kind: TargetKV(kv.k[going], kv.v[going], kv.positions[going])
                    for kind, kv in target.items()
                }
            embedding = self._runner.embed(torch.tensor(tokens)[:, None]).to(weight)
            logits, hidden = self.assistant(embedding, hidden, positions, target)
            drafts.add(logits[:, 0], live)
            tokens = [drafts.ids[row][-1] for row in live]
        return drafts.done()


def _to(kv: TargetKV, weight: Tensor) -> TargetKV:
    return TargetKV(kv.k.to(weight), kv.v.to(weight), kv.positions.to(weight.device))
