"""The published draft models beside transformers' own: draft steps, and whole answers with drafts."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from conformance.invariance.models import MODELS
from conformance.targets import reference_model
from model_impl.checkpoint import load_text_model
from model_impl.config import AttentionKind
from model_impl.random_weights import random_tensor
from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.runner import LocalRunner
from model_impl.speculative import guessing, proposer
from model_impl.speculative.assistant import Assistant, TargetKV, load_assistant
from model_impl.speculative.proposer import AssistantProposer, Grown
from tests import draft_models
from tests.draft_models import ASSISTANTS, assistant_on_meta, draft_inputs, random_weights, small_assistant
from tests.engines import asked, sizes
from tests.media_oracle import ask, assert_parity
from tests.model_configs import FULL, SLIDING, WINDOW, random_ids

KINDS: tuple[AttentionKind, ...] = (SLIDING, FULL)  # type: ignore[assignment]
ATTENTION = ("eager", "sdpa")
STEPS = 4
ROWS: dict[str, list[int]] = {
    "one": [1],
    "one-before-the-window": [WINDOW - 1],
    "the-window": [WINDOW],
    "one-beyond": [WINDOW + 1],
    "two-beyond": [WINDOW + 2],
    "far-beyond": [3 * WINDOW],
    "ragged": [WINDOW - 3, 2, WINDOW, 5],
    "ragged-beyond": [WINDOW - 3, WINDOW + 6, WINDOW + 1, WINDOW],
}
"""Tokens that the target has processed, for each row of a case."""
SHORT = tuple(case for case, rows in ROWS.items() if max(rows) <= WINDOW)
LONG = tuple(case for case in ROWS if case not in SHORT)
ORDERED = ("E2B", "E4B")

PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 15, 17)]
"""The target's window is 16."""
ANSWER = 22
DRAFTS = 3


# ------------------------------------------------------------------------------ both sides of the steps


@dataclass(frozen=True)
class Start:
    """What a round of draft steps starts from; each step drafts its likeliest token."""

    token: Tensor
    """[B, 1], the newest."""
    hidden: Tensor
    positions: Tensor
    target: Mapping[AttentionKind, TargetKV]


@functools.cache
def table() -> Tensor:
    """The target's embedding, scaled."""
    return torch.randn(96, 48, generator=torch.Generator().manual_seed(2))


def start(name: str, case: str) -> Start:
    """Keys stand in no order, with empty slots between them."""
    rows = ROWS[case]
    _, hidden, positions, target = draft_inputs(small_assistant(name), rows, seed=len(case))
    token = torch.randint(0, 96, (len(rows), 1), generator=torch.Generator().manual_seed(len(case)))
    return Start(token, hidden, positions, target)


def in_order(given: Start) -> dict[str, Tensor]:
    """As transformers has it: keys in order, padding on the left, and the newest token in the mask."""
    tensors = {"token": given.token, "hidden": given.hidden, "positions": given.positions}
    for kind, kv in given.target.items():
        counts = (kv.positions >= 0).sum(dim=-1, keepdim=True)
        held = int(counts.max())
        order = kv.positions.argsort(dim=-1)[:, None, -held:, None]
        for part, kept in (("k", kv.k), ("v", kv.v)):
            tensors[f"{kind}.{part}"] = kept.gather(2, order.expand(-1, kept.shape[1], -1, kept.shape[3]))
        tensors["mask"] = (torch.arange(held + 1) >= held - counts).long()
    return tensors


def drafted(
    model: Assistant, given: Start, *, feed: Callable[[Tensor], Tensor] = lambda state: state
) -> tuple[Tensor, Tensor]:
    """Logits [steps, B, V] and states [steps, B, H] of a round."""
    token, hidden = given.token, given.hidden
    logits, states = [], []
    for _ in range(STEPS):
        scores, state = model(table()[token], hidden, given.positions, given.target)
        token, hidden = scores.argmax(dim=-1), feed(state)
        logits.append(scores[:, 0])
        states.append(state[:, 0])
    return torch.stack(logits), torch.stack(states)


def written(name: str, folder: Path, *, window: int = WINDOW) -> Path:
    """A drawn draft model with nothing neutral; its clusters are a permutation."""
    config = small_assistant(name)
    weights = {
        part: like if part.endswith("token_ordering") else random_tensor(part, tuple(like.shape), 3)
        for part, like in random_weights(assistant_on_meta(config)).items()
    }
    config["text_config"]["sliding_window"] = window
    return draft_models.write(config, weights, folder)


Opened = Callable[..., Assistant]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Drawn draft models, read from their folders."""
    return lambda name, window=WINDOW: load_assistant(
        written(name, tmp_path_factory.mktemp(name), window=window)
    )


# ----------------------------------------------------------------------------------------------- the oracle

Answers = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Targets that say something, and draft models that guess part of it."""
    found = {}
    for name, config in MODELS.items():
        target, draft = (tmp_path_factory.mktemp(f"{name}-{part}") for part in ("target", "draft"))
        reference_model.write_speaking(config, target, seed=1)
        guessing.write_assistant(target, draft, guesses=True, seed=1)
        found[name] = target, draft
    return found


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, tuple[Path, Path]]) -> Answers:
    """What transformers makes of every draft model and case, and of every pair and prompt."""
    given = {"table": table()}
    steps = []
    for name in ASSISTANTS:
        folder = str(written(name, tmp_path_factory.mktemp(name)))
        cases = [f"{name}/{case}" for case in ROWS]
        steps += [
            {
                "key": f"{name}-{attention}",
                "checkpoint": folder,
                "attention": attention,
                "cases": cases,
                "count": STEPS,
            }
            for attention in ATTENTION
        ]
        for case in ROWS:
            given |= {f"{name}/{case}.{key}": t for key, t in in_order(start(name, case)).items()}
    generation = [
        {
            "key": name,
            "target": str(target),
            "assistant": str(draft),
            "window": MODELS[name]["sliding_window"],
            "drafts": DRAFTS,
            "count": ANSWER,
            "prompts": PROMPTS,
        }
        for name, (target, draft) in pairs.items()
    ]
    request = {"steps": steps, "generation": generation}
    return ask(tmp_path_factory, "assistant", "all", request, tensors=given)


# --------------------------------------------------------------------------------------------- draft steps

for_each_size = pytest.mark.parametrize("name", ASSISTANTS)
for_each_attention = pytest.mark.parametrize("attention", ATTENTION)


def spread(logits: Tensor) -> Tensor:
    """Logits [steps, B, V] in which what is not scored has one number in all rows of a step: the lowest.

    As in transformers; here each row has its own.
    """
    rest = logits.amin(dim=-1, keepdim=True)
    return torch.where(logits == rest, rest.amin(dim=1, keepdim=True), logits)


def assert_same_steps(found: tuple[Tensor, Tensor], made: Mapping[str, Tensor], key: str) -> None:
    """Logits, the likeliest tokens and the states fed back, row by row."""
    logits, states = (made[f"{key}.{part}"] for part in ("logits", "states"))
    assert torch.equal(found[0].argmax(dim=-1), logits.argmax(dim=-1))
    for row in range(logits.shape[1]):
        assert_parity(found[0][:, row], logits[:, row])
        assert_parity(found[1][:, row], states[:, row])


@for_each_size
@for_each_attention
def test_every_tensor_is_read(name: str, attention: str, transformers: Answers) -> None:
    answer = transformers[0]["steps"][f"{name}-{attention}"]
    assert [answer["class"]] == small_assistant(name)["architectures"]
    assert answer["unfit"] == {"missing_keys": [], "unexpected_keys": []}


@for_each_size
@for_each_attention
@pytest.mark.parametrize("case", SHORT)
def test_up_to_the_window_draft_steps_are_the_same(
    name: str, attention: str, case: str, transformers: Answers, opened: Opened
) -> None:
    logits, states = drafted(opened(name), start(name, case))
    found = (spread(logits) if name in ORDERED else logits), states
    assert_same_steps(found, transformers[1], f"{name}-{attention}.{name}/{case}")


@for_each_size
@for_each_attention
@pytest.mark.parametrize("case", LONG)
def test_beyond_the_window_transformers_shows_one_key_more(
    name: str, attention: str, case: str, transformers: Answers, opened: Opened
) -> None:
    """It is what a draft model here makes of a window that is larger by one."""
    key, ordered = f"{name}-{attention}.{name}/{case}", name in ORDERED
    logits, states = drafted(opened(name, WINDOW + 1), start(name, case))
    assert_same_steps((spread(logits) if ordered else logits, states), transformers[1], key)
    _, states = drafted(opened(name), start(name, case))
    for row, count in enumerate(ROWS[case]):
        expected = transformers[1][f"{key}.states"][0, row]
        if count > WINDOW:
            with pytest.raises(AssertionError):
                assert_parity(states[0, row], expected)
        else:
            assert_parity(states[0, row], expected)


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("case", [case for case in SHORT if len(ROWS[case]) > 1])
def test_what_is_not_scored_has_one_number_for_all_rows_there_and_one_for_each_here(
    name: str, case: str, transformers: Answers, opened: Opened
) -> None:
    theirs = transformers[1][f"{name}-sdpa.{name}/{case}.logits"]
    ours, _ = drafted(opened(name), start(name, case))
    scored = 3 * 96 // 12
    for step in range(STEPS):
        values = [row.sort(descending=True).values for row in ours[step]]
        lowest = [float(row[scored - 1]) for row in values]
        for row, own, low in zip(theirs[step], values, lowest, strict=True):
            assert own[scored:].unique().tolist() == pytest.approx([low - 1], abs=1e-5)
            assert row.sort().values[:-scored].unique().tolist() == pytest.approx([min(lowest) - 1], abs=1e-5)
    with pytest.raises(AssertionError):
        assert_parity(ours, theirs)


def edited(name: str) -> Callable[[Assistant], None]:
    """A change of one tensor."""

    def change(model: Assistant) -> None:
        tensor = model.state_dict()[name]
        half = tensor.shape[-1] // 2
        made = {
            "pre_projection.weight": lambda: tensor.roll(half, dims=-1),
            "masked_embedding.token_ordering": lambda: tensor.sort().values,
        }
        tensor.copy_(made.get(name, lambda: torch.ones_like(tensor))())

    return change


def with_model(change: Callable[[Assistant], None]) -> Callable[[Assistant, Start], tuple[Tensor, Tensor]]:
    def run(model: Assistant, given: Start) -> tuple[Tensor, Tensor]:
        change(model)
        return drafted(model, given)

    return run


def swapped(given: Start) -> Start:
    """With the values of each head at another's place."""
    target = {kind: TargetKV(kv.k, kv.v.flip(dims=(1,)), kv.positions) for kind, kv in given.target.items()}
    return replace(given, target=target)


def capped(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return 30 * torch.tanh(found[0] / 30), found[1]


WRONG: dict[str, tuple[str, Callable[[Assistant, Start], tuple[Tensor, Tensor]]]] = {
    "position of the token before": (
        "31B",
        lambda model, given: drafted(model, replace(given, positions=given.positions - 1)),
    ),
    "hidden state before the embedding": ("12B", with_model(edited("pre_projection.weight"))),
    "no layer scalar": ("26B-A4B", with_model(edited("model.layers.2.layer_scalar"))),
    "no query norm": ("E4B", with_model(edited("model.layers.3.self_attn.q_norm.weight"))),
    "no norm after attention": ("E2B", with_model(edited("model.layers.0.post_attention_layernorm.weight"))),
    "clusters in the order of ids": ("E2B", with_model(edited("masked_embedding.token_ordering"))),
    "the target's state again": (
        "E2B",
        lambda model, given: drafted(model, given, feed=lambda state: given.hidden),
    ),
    "another head's values": ("31B", lambda model, given: drafted(model, swapped(given))),
    "capped logits": ("31B", lambda model, given: capped(drafted(model, given))),
}


@pytest.mark.parametrize(("name", "run"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_step_is_noticed(
    name: str,
    run: Callable[[Assistant, Start], tuple[Tensor, Tensor]],
    transformers: Answers,
    opened: Opened,
) -> None:
    key = f"{name}-sdpa.{name}/the-window"
    given = start(name, "the-window")
    assert_same_steps(drafted(opened(name), given), transformers[1], key)
    with pytest.raises(AssertionError):
        assert_same_steps(run(opened(name), given), transformers[1], key)


# ------------------------------------------------------------------------------------ answers with drafts

for_each_pair = pytest.mark.parametrize("name", MODELS)


@dataclass(frozen=True)
class Call:
    """A step of a draft model at work; a round is the calls at one position."""

    position: int
    token: int
    keys: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    """`input`, `logits`, `state`, and keys and values as transformers holds them."""


@dataclass(frozen=True)
class Answer:
    """Tokens, the calls of the draft model, and how many drafted tokens of each round stayed."""

    tokens: list[int]
    calls: list[Call]
    accepted: list[int]


def theirs(transformers: Answers, name: str, way: str, prompt: int) -> Answer:
    """An answer of transformers with drafts, and the calls of its draft model."""
    answers, made = transformers
    found = answers["generation"][name][way][prompt]
    parts = ("input", "logits", "state", *(f"{kind}.{part}" for kind in KINDS for part in "kv"))
    calls = [
        Call(
            call["position"],
            call["token"],
            call["keys"],
            {part: made[f"{call['name']}.{part}"] for part in parts},
        )
        for call in found["calls"]
    ]
    return Answer(found["tokens"], calls, stayed(PROMPTS[prompt], found["tokens"], calls))


@functools.cache
def loaded(target: Path, draft: Path) -> tuple[LocalRunner, Assistant]:
    return LocalRunner(load_text_model(target), sizes()), load_assistant(draft)


def ours(pair: tuple[Path, Path], prompt: Sequence[int]) -> Answer:
    """An answer of the bundled engine with drafts, and the calls of its draft model."""
    runner, assistant = loaded(*pair)
    calls: list[Call] = []
    usual = Assistant.forward

    def forward(
        model: Assistant, embedding: Tensor, hidden: Tensor, positions: Tensor, target: draft_models.Target
    ) -> tuple[Tensor, Tensor]:
        logits, state = usual(model, embedding, hidden, positions, target)
        keys = {kind: int((kv.positions >= 0).sum()) for kind, kv in target.items()}
        given = torch.cat([embedding, hidden], dim=-1)
        calls.append(
            Call(
                int(positions),
                int(logits.argmax()),
                keys,
                {"input": given, "logits": logits, "state": state},
            )
        )
        return logits, state

    engine = Engine(
        runner,
        EngineConfig(draft_tokens=DRAFTS, prefix_caching=False),
        AssistantProposer(assistant, runner),
    )
    with mock.patch.object(Assistant, "forward", forward):
        (result,) = engine.run(asked([prompt], ANSWER))
    return Answer(list(result.ids), calls, list(result.acceptance.accepted))


def rounds(calls: Sequence[Call]) -> list[list[Call]]:
    return [list(group) for _, group in itertools.groupby(calls, key=lambda call: call.position)]


def stayed(prompt: Sequence[int], made: Sequence[int], calls: Sequence[Call]) -> list[int]:
    """How many drafted tokens of each round are in the answer."""
    whole = [*prompt, *made]
    found = []
    for steps in rounds(calls):
        after = whole[steps[0].position + 1 :]
        agrees = [step.token == token for step, token in zip(steps, after, strict=False)]
        found.append(agrees.index(False) if False in agrees else len(agrees))
    return found


def assert_same_rounds(found: Answer, expected: Answer) -> None:
    """Tokens, what was drafted from where with how many keys, what stayed, and the numbers."""
    assert found.tokens == expected.tokens
    assert found.accepted == expected.accepted
    for mine, other in zip(found.calls, expected.calls, strict=True):
        assert (mine.position, mine.token, mine.keys) == (other.position, other.token, other.keys)
        for part in ("input", "logits", "state"):
            assert_parity(mine.tensors[part], other.tensors[part])


@for_each_pair
def test_generate_does_not_start_a_draft_model(name: str, transformers: Answers) -> None:
    """If this fails, it has been mended: tell findings.md, and drop `startable` from the oracle."""
    answer = transformers[0]["generation"][name]
    assert answer["unfit"] == {"missing_keys": [], "unexpected_keys": []}
    assert "missing 2 required positional arguments: 'input_ids' and 'model_kwargs'" in answer["as_it_is"]


@for_each_pair
def test_answers_are_the_same_with_and_without_drafts(
    name: str, transformers: Answers, pairs: dict[str, tuple[Path, Path]]
) -> None:
    found = transformers[0]["generation"][name]
    for number, prompt in enumerate(PROMPTS):
        made = ours(pairs[name], prompt).tokens
        assert len(set(made)) > 5
        assert made == found["alone"][number]
        assert made == found["usual"][number]["tokens"] == found["mended"][number]["tokens"]


@for_each_pair
def test_where_transformers_reads_only_what_stayed_every_round_is_the_same(
    name: str, transformers: Answers, pairs: dict[str, tuple[Path, Path]]
) -> None:
    kept = 0
    for number, prompt in enumerate(PROMPTS):
        expected = theirs(transformers, name, "mended", number)
        assert_same_rounds(ours(pairs[name], prompt), expected)
        kept += sum(expected.accepted)
    assert kept > 0


def positions_read(
    calls: Sequence[Call], prompt: Sequence[int], window: int
) -> Iterator[dict[str, list[int]]]:
    """Which of the target's positions transformers hands to its draft model in each round (docs/findings.md).

    All that the latest pass returned, rejected tokens included: of full layers everything, of sliding ones
    `window - 1` beside the pass's own. Of that, as many from the first on as there are tokens.
    """
    computed, width = 0, len(prompt)
    for steps in rounds(calls):
        newest = steps[0].position
        held = {FULL: 0, SLIDING: max(0, computed - window + 1)}
        yield {kind: [*range(first, computed + width)][: newest + 1] for kind, first in held.items()}
        computed, width = newest, len(steps) + 1


def replayed(
    model: nn.Module, call: Call, read: Mapping[str, list[int]], below: int
) -> tuple[Tensor, Tensor]:
    """A call of transformers' draft model, done again by one of ours with the keys of positions `below`."""
    target = {
        kind: TargetKV(
            call.tensors[f"{kind}.k"],
            call.tensors[f"{kind}.v"],
            torch.tensor([[position if position < below else -1 for position in read[kind]]]),
        )
        for kind in KINDS
    }
    embedding, hidden = call.tensors["input"].chunk(2, dim=-1)
    found = model(embedding, hidden, torch.tensor([[call.position]]), target)
    return cast("tuple[Tensor, Tensor]", found)


@for_each_pair
def test_transformers_reads_the_keys_of_rejected_tokens(
    name: str, transformers: Answers, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Nothing else differs: with its keys and its window the numbers are the same, and else they are not."""
    window = MODELS[name]["sliding_window"]
    _, own = loaded(*pairs[name])
    larger = wider(pairs[name][1], window + 1, tmp_path)
    seen = {"alike": 0, "rejected": 0, "beyond": 0}
    for number, prompt in enumerate(PROMPTS):
        calls = theirs(transformers, name, "usual", number).calls
        for steps, read in zip(rounds(calls), positions_read(calls, prompt, window), strict=True):
            newest = steps[0].position
            assert steps[0].keys == {kind: len(places) for kind, places in read.items()}
            rejected = read[FULL][-1] >= newest
            beyond = len(read[SLIDING]) > window
            for call in steps:
                for got, part in zip(
                    replayed(larger, call, read, newest + DRAFTS), ("logits", "state"), strict=True
                ):
                    assert_parity(got, call.tensors[part])
                _, state = replayed(own, call, read, newest)
                if rejected or beyond:
                    with pytest.raises(AssertionError):
                        assert_parity(state, call.tensors["state"])
                else:
                    assert_parity(state, call.tensors["state"])
            seen["rejected" if rejected else "beyond" if beyond else "alike"] += 1
    assert min(seen.values()) > 0


def wider(folder: Path, window: int, place: Path) -> Assistant:
    """The same draft model with another window."""
    shutil.copytree(folder, place, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["sliding_window"] = window
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_assistant(place)


def one_before(grown: Grown) -> int:
    """As vLLM has it."""
    return grown.computed - 1


def test_the_position_of_the_token_before_is_noticed_and_changes_no_answer(
    transformers: Answers, pairs: dict[str, tuple[Path, Path]]
) -> None:
    expected = theirs(transformers, "dense", "mended", 0)
    assert_same_rounds(ours(pairs["dense"], PROMPTS[0]), expected)
    with mock.patch.object(proposer, "assistant_position", one_before):
        made = ours(pairs["dense"], PROMPTS[0])
    assert made.tokens == expected.tokens
    with pytest.raises(AssertionError):
        assert_same_rounds(made, expected)


def test_an_embedding_without_its_scale_is_noticed(
    transformers: Answers, pairs: dict[str, tuple[Path, Path]]
) -> None:
    expected = theirs(transformers, "dense", "mended", 0)
    usual = LocalRunner.embed
    width = MODELS["dense"]["hidden_size"]
    with mock.patch.object(LocalRunner, "embed", lambda runner, ids: usual(runner, ids) / width**0.5):
        made = ours(pairs["dense"], PROMPTS[0])
    assert made.tokens == expected.tokens
    with pytest.raises(AssertionError):
        assert_same_rounds(made, expected)
