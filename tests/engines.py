"""Engines on small models, and draft models for them: random ones, and ones that know what comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model_impl.checkpoint import assign_exactly
from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.paged import CacheSizes
from model_impl.runtime.request import Request, Result
from model_impl.runtime.runner import LocalRunner
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import Eagle3Config
from model_impl.speculative.proposer import AssistantProposer, Eagle3Proposer, Grown, Proposer
from model_impl.speculative.verify import Draft
from model_impl.text import States, TextModel
from tests.draft_models import assistant_on_meta, random_weights, tiny_assistant, tiny_eagle3
from tests.model_configs import FULL, SLIDING

AUX = (1, 2, 4)
BLOCK_SIZES = {FULL: 4, SLIDING: 3}
"""Not alike, so that prefixes meet at 12."""


def sizes(blocks: int = 80) -> CacheSizes:
    return CacheSizes(BLOCK_SIZES, {FULL: blocks, SLIDING: blocks})


def engine(
    model: TextModel, *, blocks: int = 80, drafter: str | None = None, tokens: int = 2048, **options: int
) -> Engine:
    """`drafter` is "eagle3", "assistant" (of E2B's or the dense family), or None."""
    runner = LocalRunner(model, sizes(blocks), AUX if drafter == "eagle3" else ())
    return Engine(runner, EngineConfig(max_tokens_per_step=tokens, **options), proposer(drafter, runner))


def proposer(drafter: str | None, runner: LocalRunner) -> Proposer | None:
    if drafter == "eagle3":
        raw = tiny_eagle3(
            target_hidden_size=runner.config.hidden_size,
            eagle_aux_hidden_state_layer_ids=list(AUX),
            draft_vocab_size=60,
        )
        with torch.device("meta"):
            head = Eagle3(Eagle3Config.from_dict(raw))
        assign_exactly(head, random_weights(head), "the test")
        return Eagle3Proposer(head.eval().requires_grad_(False), runner)
    if drafter == "assistant":
        assistant = assistant_on_meta(tiny_assistant(ordered=runner.config.per_layer_inputs is not None))
        assign_exactly(assistant, random_weights(assistant), "the test")
        return AssistantProposer(assistant.eval().requires_grad_(False), runner)
    return None


class Knowing:
    """Drafts what is known to come after each prompt."""

    aux_layers: tuple[int, ...] = ()

    def __init__(self, known: Mapping[tuple[int, ...], Sequence[int]], *, keeps_cache: bool = False) -> None:
        self.known = known
        self.keeps_cache = keeps_cache

    def propose(self, states: States, grown: Sequence[Grown]) -> list[Draft]:
        del states
        return [Draft(tuple(self.after(row.ids)[: row.wanted])) for row in grown]

    def after(self, ids: Sequence[int]) -> Sequence[int]:
        for prompt, rest in self.known.items():
            whole = (*prompt, *rest)
            if whole[: len(ids)] == tuple(ids) and len(ids) > len(prompt):
                return whole[len(ids) :]
        return ()


def unused(made: Engine) -> list[int]:
    """Blocks of each pool that nobody uses."""
    return [pool.unused for pool in made.blocks.pools.values()]


def asked(prompts: Sequence[Sequence[int]], tokens: int, **options: object) -> list[Request]:
    """A request for each prompt, seeded by its place."""
    return [
        Request(tuple(prompt), tokens, seed=index + 1, **options)  # type: ignore[arg-type]
        for index, prompt in enumerate(prompts)
    ]


def said(results: Sequence[Result]) -> list[tuple[int, ...]]:
    """Tokens of each result."""
    return [result.ids for result in results]
