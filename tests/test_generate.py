"""Generation against full forward passes, and sampling against the definition of its distribution."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from model_impl.runtime.generate import Generated, GenerationConfig, generate, row_seeds, stream
from model_impl.runtime.sampling import GenerationError, Sampling, draw
from model_impl.text import TextModel
from tests.model_configs import DENSE, E2B, TINY, WINDOW, build, random_ids, tensors

LENGTHS = (5, 1, 2 * WINDOW + 3, WINDOW)
"""Of the prompts: below, at and past the window; the longest is not the first."""
PROMPTS = [random_ids(1, length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]
STEPS = 2 * WINDOW + 4
WARM = Sampling(temperature=1.3, top_k=20, top_p=0.9)
"""Hot enough that rows do not repeat themselves."""
CLEAR = 1e-3
"""Lead of a token over the next that no rounding of these float32 models takes away."""

ADDING = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
"""Norms whose scale says how much a layer adds to the stream."""


def talkative(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> TextModel:
    """A model whose layers add much to the stream: with tied embeddings, one whose layers add little repeats
    its last token for ever."""
    weights = tensors(config)
    louder = {name: 4 * tensor for name, tensor in weights.items() if name.endswith(ADDING)}
    return build(config, dtype=dtype, edits=louder)


MODELS = {name: talkative(config) for name, config in TINY.items()}
DENSE_MODEL = MODELS["dense"]


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> TextModel:
    return MODELS[request.param]


def following(model: TextModel, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Logits [steps, V] that each of `ids` was chosen from, by one pass without a cache."""
    hidden = model(torch.tensor([[*prompt, *ids[:-1]]]))
    return model.logits(hidden[0, len(prompt) - 1 :])


def tokens(found: Sequence[Generated]) -> list[tuple[int, ...]]:
    return [row.ids for row in found]


# ---------------------------------------------------------------------------------- against the model


def test_greedy_is_the_argmax_of_the_full_forward(model: TextModel) -> None:
    found = generate(model, PROMPTS, max_new_tokens=STEPS, logprobs=True)
    assert len({token for row in found for token in row.ids}) > 8, "the models say too little to judge"
    for prompt, row in zip(PROMPTS, found, strict=True):
        logits = following(model, prompt, row.ids)
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > CLEAR, "a near tie; choose other prompts"
        assert row.ids == tuple(logits.argmax(dim=-1).tolist())
        assert (len(row.ids), row.finish_reason) == (STEPS, "length")
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        assert row.logprobs is not None
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampling", [Sampling.greedy(), WARM], ids=["greedy", "sampled"])
def test_a_row_depends_on_no_other(model: TextModel, sampling: Sampling) -> None:
    seeds = row_seeds(5, len(PROMPTS))
    batch = generate(model, PROMPTS, max_new_tokens=STEPS, sampling=sampling, seed=5)
    single = [
        generate(model, [prompt], max_new_tokens=STEPS, sampling=sampling, seed=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    back = generate(model, PROMPTS[::-1], max_new_tokens=STEPS, sampling=sampling, seed=seeds[::-1])
    assert batch == single == back[::-1]
    assert len(set(tokens(batch))) == len(PROMPTS)


@pytest.mark.parametrize("chunk", [1, 3, WINDOW, WINDOW + 1, 100])
def test_chunked_prefill_is_the_same(model: TextModel, chunk: int) -> None:
    whole = generate(model, PROMPTS, max_new_tokens=6, logprobs=True)
    chunked = generate(model, PROMPTS, max_new_tokens=6, logprobs=True, prefill_chunk=chunk)
    assert tokens(chunked) == tokens(whole)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(torch.tensor(b.logprobs), torch.tensor(a.logprobs), rtol=0, atol=2e-5)


def test_a_chunk_bounds_the_passes_of_a_prefill() -> None:
    with mock.patch.object(DENSE_MODEL, "forward", wraps=DENSE_MODEL.forward) as forward:
        generate(DENSE_MODEL, PROMPTS, max_new_tokens=2, prefill_chunk=WINDOW)
    assert [call.args[0].shape[1] for call in forward.call_args_list] == [WINDOW, WINDOW, 3, 1]


def test_bfloat16_is_nearer_the_full_forward_than_its_rounding() -> None:
    model = talkative(E2B, torch.bfloat16)
    found = generate(model, PROMPTS, max_new_tokens=STEPS)
    equal = 0
    for prompt, row in zip(PROMPTS, found, strict=True):
        logits = following(model, prompt, row.ids).float()
        rounding = (logits - following(MODELS["e2b"], prompt, row.ids)).abs().max()
        chosen = logits.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        lost = logits.amax(dim=-1) - chosen
        assert lost.max() < rounding
        equal += int((lost == 0).sum())
    assert equal > 0.8 * STEPS * len(PROMPTS)


def test_a_model_in_training_generates_without_gradients_and_trains_on() -> None:
    model = build(E2B).requires_grad_(True)
    made: list[bool] = []
    handle = model.register_forward_hook(lambda *call: made.append(call[-1].requires_grad))
    generate(model, PROMPTS, max_new_tokens=2)
    handle.remove()
    assert made == [False, False]
    model.logits(model(random_ids(2, 12))).logsumexp(dim=-1).sum().backward()
    assert model.embed_tokens.weight.grad is not None
    assert model.embed_tokens.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------- where rows end


@pytest.mark.parametrize("sampling", [Sampling.greedy(), WARM], ids=["greedy", "sampled"])
def test_stop_tokens_end_their_row_and_no_other(model: TextModel, sampling: Sampling) -> None:
    free = generate(model, PROMPTS, max_new_tokens=STEPS, sampling=sampling)

    def ends(stop_ids: set[int]) -> list[int | None]:
        return [next((k for k, token in enumerate(row.ids, 1) if token in stop_ids), None) for row in free]

    # Two stop tokens such that one row ends at once, one at another step, and one not at all.
    stop_ids = next(
        {first, later}
        for first, later in itertools.product({row.ids[0] for row in free}, {row.ids[6] for row in free})
        if {1, None} < set(ends({first, later}))
    )
    stopped = generate(model, PROMPTS, max_new_tokens=STEPS, sampling=sampling, stop_ids=stop_ids)
    for row, end, whole in zip(stopped, ends(stop_ids), free, strict=True):
        assert row.ids == whole.ids[:end]
        assert row.finish_reason == ("length" if end is None else "stop")


def test_the_batch_ends_with_its_last_row_and_the_head_sees_live_rows_only() -> None:
    free = generate(DENSE_MODEL, PROMPTS, max_new_tokens=STEPS)
    stop_ids = {token for row in free for token in row.ids[3:5]}
    found = None
    with (
        mock.patch.object(DENSE_MODEL, "forward", wraps=DENSE_MODEL.forward) as forward,
        mock.patch.object(DENSE_MODEL, "logits", wraps=DENSE_MODEL.logits) as head,
    ):
        found = generate(DENSE_MODEL, PROMPTS, max_new_tokens=STEPS, stop_ids=stop_ids)
    lengths = [len(row.ids) for row in found]
    assert len(set(lengths)) > 1
    assert max(lengths) <= 4
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert [call.args[0].shape for call in head.call_args_list] == [
        (rows, DENSE_MODEL.config.hidden_size) for rows in live
    ]
    assert forward.call_count == max(lengths)
    assert [sum(call.kwargs["lengths"]) for call in forward.call_args_list] == [sum(LENGTHS), *live[1:]]


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    first = generate(DENSE_MODEL, PROMPTS[:1], max_new_tokens=1)[0]
    again = generate(DENSE_MODEL, PROMPTS[:1], max_new_tokens=1, stop_ids=first.ids)[0]
    assert (first.ids, first.finish_reason) == (again.ids, "length")
    assert again.finish_reason == "stop"


def test_limits_of_none_and_one() -> None:
    with mock.patch.object(DENSE_MODEL, "forward", wraps=DENSE_MODEL.forward) as forward:
        none = generate(DENSE_MODEL, PROMPTS, max_new_tokens=0, logprobs=True)
        assert none == [Generated((), "length", ())] * len(PROMPTS)
        assert generate(DENSE_MODEL, [], max_new_tokens=3) == []
        assert forward.call_count == 0
        one = generate(DENSE_MODEL, PROMPTS, max_new_tokens=1)
        assert forward.call_count == 1
    free = generate(DENSE_MODEL, PROMPTS, max_new_tokens=3)
    assert tokens(one) == [row.ids[:1] for row in free]
    assert one[0].logprobs is None


def test_the_last_position_of_the_model_is_used_and_none_beyond() -> None:
    model = build({**DENSE, "max_position_embeddings": 10})
    assert len(generate(model, [[5] * 7], max_new_tokens=3)[0].ids) == 3
    with pytest.raises(
        GenerationError, match=r"row 1: 8 prompt tokens and 3 new ones exceed .* 10 positions"
    ):
        generate(model, [[5], [5] * 8], max_new_tokens=3)


# ---------------------------------------------------------------------------------- streaming


def test_a_stream_brings_one_token_of_each_live_row_a_step() -> None:
    free = generate(DENSE_MODEL, PROMPTS, max_new_tokens=4)
    stop_ids = {free[1].ids[0]}
    request: dict[str, Any] = {"max_new_tokens": 4, "stop_ids": stop_ids, "logprobs": True}
    found = generate(DENSE_MODEL, PROMPTS, **request)
    expected = [
        (row, found[row].ids[step], found[row].logprobs[step])  # type: ignore[index]
        for step in range(4)
        for row in range(len(PROMPTS))
        if step < len(found[row].ids)
    ]
    streamed = list(stream(DENSE_MODEL, PROMPTS, **request))
    assert [(token.row, token.id, token.logprob) for token in streamed] == expected
    last = {token.row: token for token in streamed}
    for row, generated in enumerate(found):
        assert last[row].finish_reason == generated.finish_reason
    assert sum(token.finish_reason is not None for token in streamed) == len(PROMPTS)


def test_a_stream_computes_no_more_than_is_asked_for() -> None:
    with mock.patch.object(DENSE_MODEL, "forward", wraps=DENSE_MODEL.forward) as forward:
        streaming = stream(DENSE_MODEL, PROMPTS, max_new_tokens=9)
        assert forward.call_count == 0
        first = list(itertools.islice(streaming, len(PROMPTS)))
        assert forward.call_count == 1
        assert torch.is_grad_enabled()
        next(streaming)
        assert forward.call_count == 2
    assert [token.row for token in first] == list(range(len(PROMPTS)))


def test_a_stream_refuses_when_it_is_asked_for() -> None:
    with pytest.raises(GenerationError, match="row 0: the prompt is empty"):
        stream(DENSE_MODEL, [[]], max_new_tokens=9)


# ---------------------------------------------------------------------------------- the distribution


def by_definition(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """Probabilities by the definition, one token after the other."""
    top = max(logit for token, logit in enumerate(logits) if token not in sampling.suppress)
    mass = {
        token: math.exp((logit - top) / sampling.temperature)
        for token, logit in enumerate(logits)
        if token not in sampling.suppress
    }
    if sampling.top_k is not None:
        last = sorted(mass.values(), reverse=True)[: sampling.top_k][-1]
        mass = {token: value for token, value in mass.items() if value >= last}
    kept: dict[int, float] = {}
    for token in sorted(mass, key=lambda token: (mass[token], token), reverse=True):
        if kept and sum(kept.values()) >= sampling.top_p * sum(mass.values()):
            break
        kept[token] = mass[token]
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 11, 40, 99])
@pytest.mark.parametrize("top_p", [0.01, 0.513, 0.951, 1.0])
def test_the_distribution_is_the_definitions(temperature: float, top_k: int | None, top_p: float) -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(12, 40, generator=generator) * 2
    logits[6:] = (logits[6:] * 2).round() / 2  # rows with ties
    sampling = Sampling(temperature, top_k, top_p, suppress=(int(logits[0].argmax()), 3))
    expected = torch.tensor([by_definition(row, sampling) for row in logits.tolist()], dtype=torch.float64)
    found = sampling.distribution(logits)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


HALVING = [0.5, 0.25, 0.125, 0.0625, 0.0625]


@pytest.mark.parametrize(
    ("probabilities", "sampling", "support"),
    [
        (HALVING, Sampling(), {0, 1, 2, 3, 4}),
        (HALVING, Sampling(top_k=1), {0}),
        (HALVING, Sampling(top_k=3), {0, 1, 2}),
        (HALVING, Sampling(top_k=4), {0, 1, 2, 3, 4}),  # the fourth ties with the fifth
        (HALVING, Sampling(top_k=50), {0, 1, 2, 3, 4}),
        (HALVING, Sampling(top_p=1e-17), {0}),
        (HALVING, Sampling(top_p=0.49), {0}),
        (HALVING, Sampling(top_p=0.51), {0, 1}),
        (HALVING, Sampling(top_p=0.76), {0, 1, 2}),
        (HALVING, Sampling(top_p=0.9), {0, 1, 2, 4}),  # of a tie at the edge the higher id
        (HALVING, Sampling(top_k=2, top_p=0.66), {0}),  # two thirds, once top_k has renormalised
        (HALVING, Sampling(top_k=2, top_p=0.67), {0, 1}),
        (HALVING, Sampling(temperature=0.5, top_p=0.7), {0}),  # squared: 0.73 is the first
        (HALVING, Sampling(temperature=2.0, top_p=0.51), {0, 1}),
        (HALVING, Sampling(suppress=(0, 3)), {1, 2, 4}),
        (HALVING, Sampling(top_k=1, suppress=(0,)), {1}),
        ([0.25] * 4, Sampling(top_k=1), {0, 1, 2, 3}),
        ([0.25] * 4, Sampling(top_p=0.5), {2, 3}),
        ([0.25] * 4, Sampling(top_p=0.1), {3}),
        ([1.0], Sampling(top_k=3, top_p=0.5), {0}),
    ],
)
def test_exactly_these_tokens_can_be_chosen(
    probabilities: list[float], sampling: Sampling, support: set[int]
) -> None:
    logits = torch.tensor([probabilities]).log()
    assert set(sampling.distribution(logits)[0].nonzero()[:, 0].tolist()) == support
    uniforms = [(k + 0.5) / 2000 for k in range(2000)]
    chosen = sampling.choose(logits.expand(len(uniforms), -1), uniforms)
    assert set(chosen.tolist()) == support


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=0.7, top_p=0.8)])
def test_evenly_spread_numbers_choose_by_the_distribution(sampling: Sampling) -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    count = 20_000
    uniforms = [(k + 0.5) / count for k in range(count)]
    for row in logits.split(1):
        chosen = sampling.choose(row.expand(count, -1), uniforms)
        shares = torch.bincount(chosen, minlength=30) / count
        assert (shares - sampling.distribution(row)[0]).abs().max() < 1.01 / count


@pytest.mark.parametrize("total", [1.0, 0.1, 1 + 2**-52, 1.5, 3.0])
def test_the_ends_of_the_unit_interval_choose_possible_tokens(total: float) -> None:
    row = torch.tensor([[0, 0, 0.25, 0, 0.75, 0, 0]], dtype=torch.float64) * total
    uniforms = torch.tensor([0.0, 5e-324, 0.2, 0.3, 1 - 2**-53], dtype=torch.float64)
    assert draw(row.expand(5, -1), uniforms).tolist() == [2, 2, 2, 4, 4]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, top_k=5, top_p=0.5),
        Sampling(temperature=5e-324),
        Sampling(temperature=1e-3, top_k=64, top_p=0.95),
        Sampling(top_k=1),
        Sampling(top_p=1e-12),
    ],
)
def test_what_is_as_good_as_greedy(sampling: Sampling) -> None:
    greedy = generate(DENSE_MODEL, PROMPTS, max_new_tokens=8)
    assert generate(DENSE_MODEL, PROMPTS, max_new_tokens=8, sampling=sampling, seed=3) == greedy
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.one_hot(logits.argmax(dim=-1), 50).double()
    torch.testing.assert_close(sampling.distribution(logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling.greedy, Sampling.published])
def test_suppressed_tokens_never_come_but_count_in_log_probabilities(sampling: Any) -> None:
    free = generate(DENSE_MODEL, PROMPTS, max_new_tokens=6, sampling=sampling())
    suppress = tuple({token for row in free for token in row.ids})
    found = generate(DENSE_MODEL, PROMPTS, max_new_tokens=6, sampling=sampling(suppress), logprobs=True)
    assert not {token for row in found for token in row.ids} & set(suppress)
    for prompt, row in zip(PROMPTS, found, strict=True):
        logits = following(DENSE_MODEL, prompt, row.ids)
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, rtol=0, atol=2e-5)
        if sampling == Sampling.greedy:
            logits[:, list(suppress)] = float("-inf")
            assert row.ids == tuple(logits.argmax(dim=-1).tolist())


# ---------------------------------------------------------------------------------- randomness


def test_sampled_pairs_follow_the_exact_distribution() -> None:
    """Chi-square of two tokens of each of many rows: each step's marginal, and their independence."""
    sampling, prompt, count = Sampling(temperature=1.5, top_k=4, top_p=0.97), PROMPTS[0], 2000
    first = sampling.distribution(DENSE_MODEL.logits(DENSE_MODEL(torch.tensor([prompt]))[:, -1]))[0]
    support = first.nonzero()[:, 0].tolist()
    assert 3 <= len(support) <= 4
    continued = torch.tensor([[*prompt, token] for token in support])
    second = sampling.distribution(DENSE_MODEL.logits(DENSE_MODEL(continued)[:, -1]))
    expected = {
        (a, b): float(first[a] * second[k, b]) * count
        for k, a in enumerate(support)
        for b in second[k].nonzero()[:, 0].tolist()
    }
    assert min(expected.values()) > 10, "cells too small for the statistic"
    found = tokens(generate(DENSE_MODEL, [prompt] * count, max_new_tokens=2, sampling=sampling, seed=1))
    assert set(found) <= set(expected)
    statistic = sum((found.count(pair) - n) ** 2 / n for pair, n in expected.items())
    freedom = len(expected) - 1
    p = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)).item()
    assert 1e-3 < p < 0.999  # too good a fit is no chance either


def test_seeds_decide() -> None:
    def sampled(seed: int | list[int]) -> list[tuple[int, ...]]:
        rows = [PROMPTS[0]] * 3
        return tokens(generate(DENSE_MODEL, rows, max_new_tokens=12, sampling=WARM, seed=seed))

    assert sampled(4) == sampled(4) == sampled(row_seeds(4, 3))
    assert len({*sampled(4), *sampled(5), *sampled(6)}) == 9
    same = sampled([7, 7, 8])
    assert same[0] == same[1] != same[2]


def test_row_seeds_differ_and_do_not_depend_on_the_number_of_rows() -> None:
    seeds = {seed for batch in range(50) for seed in row_seeds(batch, 50)}
    assert len(seeds) == 2500
    assert row_seeds(9, 3) == row_seeds(9, 8)[:3]


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"suppress": (4, -1)}, "suppress holds -1"),
    ],
)
def test_sampling_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, "row 1: the prompt is empty"),
        ({"prompts": [[1], [2, 96]]}, "row 1: token id 96 is outside the vocabulary of 96"),
        ({"prompts": [[-1]]}, "row 0: token id -1"),
        ({"prompts": ["text"]}, "row 0: a prompt is a sequence of token ids"),
        ({"prompts": [1, 2]}, "row 0: a prompt is a sequence of token ids"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        (
            {"sampling": Sampling.published((258883, 258882))},
            "suppress holds 258883; the vocabulary has only 96",
        ),
        ({"sampling": Sampling.greedy(range(96))}, "suppress holds all 96 tokens"),
    ],
)
def test_generation_refuses(changes: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"prompts": [[1]], "max_new_tokens": 2} | changes
    with pytest.raises(GenerationError, match=message):
        generate(DENSE_MODEL, **request)


def test_logits_that_are_not_finite_are_refused_with_their_row() -> None:
    """One token's per-layer input is broken: only rows that hold the token are."""
    model = build(E2B)
    model.embed_tokens_per_layer.weight[17] = float("nan")
    with pytest.raises(GenerationError, match="row 1: the logits after 2 tokens are not finite"):
        generate(model, [[5, 6, 7], [5, 17]], max_new_tokens=2)


# ---------------------------------------------------------------------------------- generation_config.json

PUBLISHED = {
    "bos_token_id": 2,
    "do_sample": True,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "5.5.0",
}


def test_published_defaults(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(PUBLISHED), encoding="utf-8")
    found = GenerationConfig.from_file(path)
    assert found == GenerationConfig(frozenset({1, 106, 50}), Sampling.published())
    suppressing = GenerationConfig.from_dict({**PUBLISHED, "suppress_tokens": [258883, 258882]})
    assert suppressing.sampling == Sampling.published((258883, 258882))
    assert suppressing.sampling == Sampling(1.0, 64, 0.95, (258883, 258882))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"eos_token_id": 1}, GenerationConfig(frozenset({1}), Sampling.greedy())),
        ({}, GenerationConfig(frozenset(), Sampling.greedy())),
        ({"suppress_tokens": [7], "top_k": 64}, GenerationConfig(frozenset(), Sampling.greedy((7,)))),
        ({"do_sample": True}, GenerationConfig(frozenset(), Sampling(1.0, 50, 1.0))),
        ({"do_sample": True, "top_k": 0, "temperature": 2}, GenerationConfig(frozenset(), Sampling(2.0))),
        ({"eos_token_id": None, "num_beams": 1}, GenerationConfig(frozenset(), Sampling.greedy())),
    ],
)
def test_other_generation_configs(raw: dict[str, Any], expected: GenerationConfig) -> None:
    assert GenerationConfig.from_dict(raw) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": "1"}, "eos_token_id is '1'; it must be a token id"),
        ({"eos_token_id": [1, True]}, "eos_token_id is"),
        ({"suppress_tokens": [-5]}, "suppress_tokens is"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be of type float"),
        ({"top_k": 3.5}, "top_k is 3.5; it must be of type int"),
        ({"top_p": 2}, "top_p is 2"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1; this implementation does not have it"),
        ({"num_beams": 4}, "num_beams is 4"),
    ],
)
def test_a_generation_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        GenerationConfig.from_dict({**PUBLISHED, **changes})


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("{", "JSON"), ("[]", "found list")])
def test_an_unreadable_generation_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "generation_config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(GenerationError, match=message) as refused:
        GenerationConfig.from_file(path)
    assert str(path) in str(refused.value)
