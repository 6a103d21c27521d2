"""Drafted tokens: what comes out is the target's, token by token or in distribution; how many stay."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from scipy import stats
from torch import Tensor

from model_impl.errors import ConfigError
from model_impl.runtime.engine import Engine
from model_impl.runtime.generate import generate
from model_impl.runtime.request import Request
from model_impl.runtime.runner import LocalRunner
from model_impl.runtime.sampling import GenerationError, Sampling
from model_impl.runtime.scheduler import SequenceState
from model_impl.speculative import proposer as proposers
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.proposer import Eagle3Proposer, Grown
from model_impl.speculative.verify import Acceptance, Draft, kept, residual, verify_greedy, verify_sampled
from model_impl.text import States
from tests.engines import AUX, Knowing, asked, engine, proposer, said, sizes, unused
from tests.model_configs import distance, random_ids
from tests.test_engine import PLANS, assert_same, images_at
from tests.test_generate import MODELS, PROMPTS, WARM

STEPS = 14
PAIRS = [
    ("e2b", "eagle3"),
    ("dense", "eagle3"),
    ("moe", "eagle3"),
    ("e2b", "assistant"),
    ("dense", "assistant"),
]
DRAWS = 10_000
ALPHA = 0.001


# -------------------------------------------------------------------------------------------- rounds


def test_greedy_rounds_by_hand() -> None:
    assert verify_greedy([4, 5, 6, 7], [4, 5, 6]) == (4, 5, 6, 7)
    assert verify_greedy([4, 5, 6, 7], [4, 8, 6]) == (4, 5)
    assert verify_greedy([4, 5, 6, 7], [8, 5, 6]) == (4,)
    assert verify_greedy([4], []) == (4,)


def test_a_token_stays_and_its_place_is_filled_as_the_paper_says() -> None:
    p, q = (torch.tensor(row, dtype=torch.float64) for row in ([0.5, 0.3, 0.2, 0.0], [0.25, 0.6, 0.1, 0.05]))
    stay = [kept(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)]
    assert stay == pytest.approx([1, 0.5, 1, 0])
    torch.testing.assert_close(
        residual(p, q), torch.tensor([0.25, 0, 0.1, 0], dtype=torch.float64) / 0.35, rtol=0, atol=1e-15
    )
    assert torch.equal(residual(p, p), p)


def test_what_stays_and_what_fills_its_place_add_up_to_the_target_s_distribution() -> None:
    generator = torch.Generator().manual_seed(2)
    for p, q in zip(
        *(Sampling(top_k=6).distribution(x) for x in torch.randn(2, 20, 9, generator=generator)), strict=True
    ):
        total = torch.zeros_like(p)
        for token in q.nonzero()[:, 0].tolist():
            stays = kept(float(p[token]), float(q[token]))
            total[token] += q[token] * stays
            total += q[token] * (1 - stays) * residual(p, q)
        torch.testing.assert_close(total, p, rtol=0, atol=1e-12)


class Grid(random.Random):
    """Numbers that are laid out, not drawn."""

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__()
        self._left = iter(numbers)

    def random(self) -> float:
        return next(self._left)


def test_one_round_has_the_target_s_distribution_counted_exactly() -> None:
    """All outcomes of two uniform numbers on a grid that all probabilities are multiples of."""
    n = 20
    p = torch.tensor([[8, 6, 4, 2], [1, 1, 9, 9]], dtype=torch.float64) / n
    q = torch.tensor([[2, 9, 4, 5]], dtype=torch.float64) / n
    cells = [(k + 0.5) / n for k in range(n)]
    total: Counter[int] = Counter()
    for token in range(4):
        counts = Counter(
            verify_sampled(p, Draft((token,), q), Grid(pair))[0] for pair in itertools.product(cells, cells)
        )
        for made, count in counts.items():
            total[made] += float(q[0, token]) * count / n**2
    # Thresholds p / q are off the grid by up to half a cell.
    for token in range(4):
        assert total[token] == pytest.approx(float(p[0, token]), abs=0.5 / n)


def rounds(p: Tensor, q: Tensor | None, drafts: int, seed: int) -> list[tuple[int, ...]]:
    """First three tokens of many runs of rounds over a chain whose state is the token before."""
    found = []
    source, guess = random.Random(seed), random.Random(-seed)
    for _ in range(DRAWS):
        made: list[int] = [0]
        while len(made) < 4:
            ids: list[int] = []
            for _ in range(drafts):
                row = (p if q is None else q)[[*made, *ids][-1]]
                ids.append(
                    int(row.argmax()) if q is None else guess.choices(range(len(row)), row.tolist())[0]
                )
            before = [made[-1], *ids]
            draft = Draft(tuple(ids), None if q is None else q[before[:-1]])
            made += verify_sampled(p[before], draft, source)
        found.append(tuple(made[1:4]))
    return found


def assert_distribution(found: Sequence[tuple[int, ...]], p: Tensor) -> None:
    """Counts of the first three tokens against every probability of the chain."""
    chances, counts, seen = [], [], Counter(found)
    for path in itertools.product(range(len(p)), repeat=3):
        chances.append(float(p[0, path[0]] * p[path[0], path[1]] * p[path[1], path[2]]))
        counts.append(seen[path])
    small = [index for index, chance in enumerate(chances) if chance * len(found) < 5]
    assert all(counts[index] == 0 for index in small if chances[index] == 0)
    observed = [count for index, count in enumerate(counts) if index not in small]
    expected = [chance * len(found) for index, chance in enumerate(chances) if index not in small]
    if (rest := sum(chances[index] for index in small) * len(found)) > 0:
        observed.append(sum(counts[index] for index in small))
        expected.append(rest)
    assert stats.chisquare(observed, expected).pvalue > ALPHA


CHAIN = Sampling(temperature=1.2, top_k=4, top_p=0.9)


@pytest.mark.parametrize(
    ("drafts", "drawn"), [(1, True), (3, True), (3, False)], ids=["one", "three", "likeliest"]
)
def test_rounds_have_the_target_s_distribution(drafts: int, drawn: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 5, 5, generator=generator)
    p, q = (CHAIN.distribution(part) for part in logits)
    assert_distribution(rounds(p, q if drawn else None, drafts, seed=3), p)


def test_the_judge_of_distributions_sees_a_wrong_one() -> None:
    generator = torch.Generator().manual_seed(5)
    p, q = (CHAIN.distribution(part) for part in torch.randn(2, 5, 5, generator=generator))
    with (
        mock.patch("model_impl.speculative.verify.residual", lambda p, q: p),
        pytest.raises(AssertionError),
    ):
        assert_distribution(rounds(p, q, 3, seed=3), p)


# ------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("name", "drafter"), PAIRS)
def test_greedy_output_is_the_same_with_and_without_drafts(
    name: str, drafter: str, plan: dict[str, int]
) -> None:
    expected = generate(MODELS[name], PROMPTS, max_new_tokens=STEPS, logprobs=True, top_logprobs=2)
    made = engine(MODELS[name], drafter=drafter, **plan)
    free = unused(made)
    requests = asked(PROMPTS, STEPS, logprobs=True, top_logprobs=2)
    found = made.run(requests)
    assert_same(found, expected)
    assert_same(made.run(requests), expected)
    assert all(result.acceptance.drafted for result in found)
    assert unused(made) == free


@pytest.mark.parametrize(("name", "drafter"), PAIRS)
def test_what_is_drafted_does_not_depend_on_chunks_company_or_the_cache(name: str, drafter: str) -> None:
    requests = asked(PROMPTS, STEPS, sampling=WARM)
    base = engine(MODELS[name], drafter=drafter, prefix_caching=0).run(requests)
    assert sum(sum(result.acceptance.accepted) for result in base) > 0
    for plan in PLANS.values():
        made = engine(MODELS[name], drafter=drafter, **plan)
        for _ in range(2):
            found = made.run(requests)
            assert said(found) == said(base)
            assert [result.acceptance for result in found] == [result.acceptance for result in base]
    alone = [engine(MODELS[name], drafter=drafter).run([request])[0] for request in requests]
    assert [result.acceptance for result in alone] == [result.acceptance for result in base]


@pytest.mark.parametrize("drafter", ["eagle3", "assistant"])
def test_a_draft_outlives_preemption_and_a_prompt_in_pieces(drafter: str) -> None:
    requests = asked(PROMPTS, STEPS, sampling=WARM)
    base = engine(MODELS["dense"], drafter=drafter).run(requests)
    made = engine(MODELS["dense"], drafter=drafter, blocks=11, tokens=7, prefix_caching=0)
    real = made._scheduler._preempt
    pending: list[tuple[int, Draft]] = []

    def spy(sequence: SequenceState) -> None:
        pending.append((len(sequence.ids), sequence.draft))
        real(sequence)

    with mock.patch.object(made._scheduler, "_preempt", spy):
        found = made.run(requests)
    assert any(draft.ids for length, draft in pending if length > 7), "none had a draft and several pieces"
    assert said(found) == said(base)
    assert [result.acceptance for result in found] == [result.acceptance for result in base]


@pytest.mark.parametrize("keeps_cache", [False, True])
@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_perfect_drafts_all_stay(drafts: int, keeps_cache: bool) -> None:
    model = MODELS["dense"]
    expected = generate(model, PROMPTS, max_new_tokens=15, logprobs=True)
    known = {tuple(prompt): row.ids for prompt, row in zip(PROMPTS, expected, strict=True)}
    made = Engine(
        LocalRunner(model, sizes()),
        engine(model, draft_tokens=drafts).config,
        Knowing(known, keeps_cache=keeps_cache),
    )
    found = made.run(asked(PROMPTS, 15, logprobs=True))
    assert_same(found, expected)
    # One token comes from the prompt; each round gives all drafted ones and one more.
    whole = 14 // (1 + drafts)
    for result in found:
        assert result.acceptance.drafted == result.acceptance.accepted
        assert result.acceptance.accepted[:whole] == (drafts,) * whole
    if 14 % (1 + drafts) == 0:
        assert made.acceptance.mean_length == 1 + drafts


def test_a_stop_token_among_drafted_ones_ends_the_request() -> None:
    model = MODELS["dense"]
    free = generate(model, PROMPTS, max_new_tokens=15)
    # A round drafts three tokens and gives four, behind the first that comes from the prompt.
    row, place = next(
        (row, place)
        for row, made in enumerate(free)
        for place in (6, 5, 2, 1)
        if made.ids[place] not in made.ids[:place]
    )
    stop = frozenset({free[row].ids[place]})
    expected = generate(model, PROMPTS, max_new_tokens=15, stop_ids=stop)
    known = {tuple(prompt): row.ids for prompt, row in zip(PROMPTS, free, strict=True)}
    made = Engine(LocalRunner(model, sizes()), engine(model).config, Knowing(known))
    found = made.run(asked(PROMPTS, 15, stop_ids=stop))
    assert_same(found, expected)
    assert unused(made) == [80, 80]
    # What was drafted behind the stop token does not count as staying.
    assert len(found[row].ids) == place + 1
    rounds, rest = divmod(place - 1, 4)
    assert found[row].acceptance.accepted == (*[3] * rounds, rest + 1)


@pytest.mark.parametrize("drafter", ["eagle3", "assistant"])
def test_prompts_with_images_are_drafted_for(drafter: str) -> None:
    model, soft = MODELS["dense"], images_at(21, (3, 8), (8, 17))
    prompt = random_ids(1, 21, 2)[0].tolist()
    expected = generate(model, [prompt], max_new_tokens=STEPS, soft=soft, logprobs=True)
    request = Request(tuple(prompt), STEPS, soft=soft, logprobs=True)
    for tokens in (2048, 4):
        made = engine(model, drafter=drafter, tokens=tokens)
        for _ in range(2):
            assert_same(made.run([request]), expected)


def test_the_last_block_of_a_prefix_is_left_out_where_a_draft_model_keeps_a_cache() -> None:
    prompt = random_ids(1, 25, 8)[0].tolist()
    hits = []
    for drafter in (None, "assistant", "eagle3"):
        made = engine(MODELS["dense"], drafter=drafter)
        made.run(asked([prompt], 3))
        hits.append(made.run(asked([prompt], 3))[0].cached_tokens)
    assert hits == [24, 24, 12]


# -------------------------------------------------------------------------------- what a head is fed


@pytest.mark.parametrize("tokens", [2048, 4])
def test_a_head_sees_each_state_once_beside_the_next_token(tokens: int) -> None:
    """Drafts of the engine are those of one pass of the head over all that came before."""
    model = MODELS["dense"]
    made = engine(model, drafter="eagle3", tokens=tokens)
    drafter = made.proposer
    assert isinstance(drafter, Eagle3Proposer)
    seen: list[tuple[list[int], Draft]] = []
    real = Eagle3Proposer.propose

    def spy(self: Eagle3Proposer, states: States, grown: Sequence[Grown]) -> list[Draft]:
        drafts = real(self, states, grown)
        seen.extend((list(row.ids), draft) for row, draft in zip(grown, drafts, strict=True) if draft.ids)
        return drafts

    with mock.patch.object(Eagle3Proposer, "propose", spy):
        for _ in range(2):
            made.run(asked(PROMPTS, STEPS))
    assert len(seen) > 40
    for ids, draft in seen:
        assert draft.ids == expected_draft(drafter.head, ids, len(draft.ids))


def expected_draft(head: Eagle3, ids: list[int], count: int) -> tuple[int, ...]:
    model = MODELS["dense"]
    aux = model.states(torch.tensor([ids[:-1]]), aux_layers=AUX).aux
    features, fed, found = head.features(aux), ids[1:], []
    for _ in range(count):
        hidden, out = head(torch.tensor([fed]), features)
        logits = head.logits(hidden[0, -1])
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-4, "a near tie; choose another seed"
        found.append(int(head.target_ids(logits.argmax())))
        fed = [*fed, found[-1]]
        features = torch.cat([features, out[:, -1:]], dim=1)
    return tuple(found)


def test_an_assistant_reads_what_the_target_has_computed() -> None:
    """One step by hand, from a pass without any cache."""
    model = MODELS["e2b"]
    made = engine(model, drafter="assistant", draft_tokens=1)
    drafter = made.proposer
    assert isinstance(drafter, proposers.AssistantProposer)
    calls: list[tuple[Tensor, ...]] = []
    real = drafter.assistant.forward

    def spy(embedding: Tensor, hidden: Tensor, positions: Tensor, target: object) -> tuple[Tensor, Tensor]:
        calls.append((embedding, hidden, positions))
        made_: tuple[Tensor, Tensor] = real(embedding, hidden, positions, target)
        return made_

    prompt = PROMPTS[2]
    with mock.patch.object(drafter.assistant, "forward", spy):
        (result,) = made.run(asked([prompt], 5))
    ids = [*prompt, *result.ids]
    hidden = model(torch.tensor([ids]))
    for embedding, given, positions in calls:
        newest = int(positions[0, 0])
        assert distance(embedding[0, 0], model.embed_tokens(torch.tensor(ids[newest]))) < 1e-6
        assert distance(given[0, 0], hidden[0, newest - 1]) < 2e-5
    assert int(calls[0][2][0, 0]) == len(prompt)


# --------------------------------------------------------------------------------- statistics, refusals


def test_acceptance_counts_the_target_s_own_token() -> None:
    two = Acceptance((3, 3, 1), (3, 1, 0)) + Acceptance((2,), (2,))
    assert two.mean_length == 1 + 6 / 4
    assert two.by_position == (3 / 4, 2 / 3, 1 / 2)
    assert Acceptance().mean_length == 1


def test_tokens_that_are_suppressed_are_not_drafted() -> None:
    suppressed = Sampling(temperature=1.0, suppress=tuple(range(0, 96, 2)))
    made = engine(MODELS["dense"], drafter="eagle3")
    drafter = made.proposer
    assert isinstance(drafter, Eagle3Proposer)
    found = made.run(asked(PROMPTS, STEPS, sampling=suppressed))
    assert all(token % 2 for row in said(found) for token in row)
    everything = replace(suppressed, suppress=tuple(sorted(drafter._known)))
    quiet = made.run(asked(PROMPTS, STEPS, sampling=everything))
    assert all(result.acceptance == Acceptance() for result in quiet)


def test_a_draft_model_of_another_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers that states are taken after \(1, 2, 4\) against \(0,\)"):
        proposer("eagle3", LocalRunner(MODELS["dense"], sizes(), (0,)))
    fitting = LocalRunner(MODELS["dense"], sizes(), AUX)
    with pytest.raises(GenerationError, match=r"reads states after \[1, 2, 4\] layers"):
        Engine(LocalRunner(MODELS["dense"], sizes()), None, proposer("eagle3", fitting))
    with pytest.raises(ConfigError, match="does not fit this target"):
        proposer("assistant", LocalRunner(MODELS["moe"], sizes()))
