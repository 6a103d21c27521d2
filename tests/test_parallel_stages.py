"""Stages and shards of a model: numbers, what crosses, what is held, and refusals. No processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_impl.config import TextConfig
from model_impl.errors import CheckpointError, ModelError
from model_impl.parallel.layout import Layout, LayoutError, Place
from model_impl.parallel.loading import Weights, check_folder, cut_all, load_stage, stage_of
from model_impl.parallel.payload import Payload
from model_impl.parallel.shards import kv_heads
from model_impl.parallel.stage import Pass
from model_impl.random_weights import write_checkpoint
from model_impl.runtime.masks import NO_BLOCK
from model_impl.text import SoftTokens, States, TextModel
from tests.model_configs import DENSE, E2B, MOE, TINY, build, distance, random_ids
from tests.ranks_in_threads import Divided

PIECES = (11, 1, 6)
"""New tokens of three passes: a window is 8."""


def passes(aux: tuple[int, ...], soft: SoftTokens | None = None) -> list[Pass]:
    """A prefill, a step and a longer piece, of two rows of different lengths."""
    ids, works, start = random_ids(2, sum(PIECES)), [], 0
    for width in PIECES:
        own = None if soft is None else soft.columns(start, start + width)
        works.append(Pass(ids[:, start : start + width], [width, max(1, width - 3)], own, aux))
        start += width
    return works


def one_process(model: TextModel, works: list[Pass]) -> list[States]:
    """What the whole model makes of the passes."""
    cache = model.new_cache(2)
    with torch.inference_mode():
        return [
            model.states(w.ids, cache=cache, lengths=w.lengths, soft=w.soft, aux_layers=w.aux_layers)
            for w in works
        ]


def valid(work: Pass, state: Tensor) -> Tensor:
    """Its tokens that are no padding, [n, H]."""
    assert work.lengths is not None
    return torch.cat([state[row, :count] for row, count in enumerate(work.lengths)])


def splits(raw: Mapping[str, Any]) -> list[Layout]:
    layers = raw["num_hidden_layers"]
    two = [Layout((first, layers - first)) for first in range(1, layers)]
    return [*two, Layout(3), Layout(4), Layout((1, layers - 3, 1, 1))]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, raw in TINY.items() for layout in splits(raw)],
    ids=str,
)
def test_any_split_gives_the_very_numbers_of_one_process(name: str, layout: Layout) -> None:
    model = build(TINY[name])
    layers = len(model.config.layers)
    works = passes((0, 1, layers // 2, layers))
    divided = Divided(model, layout)
    caches = divided.new_caches(2)
    for work, expected in zip(works, one_process(model, works), strict=True):
        _, (states,) = divided.run(work, caches)
        for state, wanted in zip((states.hidden, *states.aux), (expected.hidden, *expected.aux), strict=True):
            assert torch.equal(valid(work, state), valid(work, wanted))
        assert torch.equal(divided.logits(states.hidden)[0], model.logits(states.hidden))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("e2b", Layout(tensor=2)),
        ("e2b", Layout(tensor=4)),
        ("e2b", Layout((7, 3), tensor=2)),
        ("dense", Layout(tensor=2)),
        ("dense", Layout(tensor=4)),
        ("moe", Layout(tensor=2)),
        ("moe", Layout(tensor=4)),
        ("moe", Layout(tensor=2, expert=True)),
        ("moe", Layout(tensor=4, expert=True)),
        ("moe", Layout((3, 1), tensor=2, expert=True)),
    ],
    ids=str,
)
def test_shards_add_up_to_the_whole(name: str, layout: Layout) -> None:
    model = build(TINY[name], dtype=torch.float64)
    works = passes((2,))
    divided = Divided(model, layout)
    caches = divided.new_caches(2)
    for work, expected in zip(works, one_process(model, works), strict=True):
        _, shards = divided.run(work, caches)
        assert len(shards) == layout.tensor
        for states in shards:
            assert distance(valid(work, states.hidden), valid(work, expected.hidden)) < 1e-12
            assert distance(valid(work, states.aux[0]), valid(work, expected.aux[0])) < 1e-12
        for logits in divided.logits(expected.hidden):
            assert distance(logits, model.logits(expected.hidden)) < 1e-12


def test_tables_that_do_not_divide_are_shared_out_all_the_same() -> None:
    raw = {**E2B, "vocab_size": 97, "vocab_size_per_layer_input": 95, "hidden_size_per_layer_input": 7}
    model = build(raw, dtype=torch.float64)
    work = Pass(torch.tensor([[0, 5, 49, 94, 50, 24, 25, 75]]))
    _, shards = Divided(model, Layout(tensor=4)).run(work)
    with torch.inference_mode():
        expected = model(work.ids)
    assert all(distance(states.hidden, expected) < 1e-12 for states in shards)


@pytest.mark.parametrize("name", ["e2b", "dense"])
def test_images_reach_every_stage(name: str) -> None:
    model = build(TINY[name])
    shape = (2, sum(PIECES))
    where = torch.zeros(shape, dtype=torch.bool)
    where[0, 2:7] = where[1, 1:4] = True
    blocks = torch.full(shape, NO_BLOCK)
    blocks[0, 2:7], blocks[1, 1:4] = 0, 1
    features = torch.randn(8, 48, generator=torch.Generator().manual_seed(1))
    works = passes((), SoftTokens(where, features, blocks))
    plain = one_process(model, passes(()))
    divided = Divided(model, Layout(3))
    caches = divided.new_caches(2)
    for work, expected, other in zip(works, one_process(model, works), plain, strict=True):
        _, (states,) = divided.run(work, caches)
        assert torch.equal(valid(work, states.hidden), valid(work, expected.hidden))
        assert not torch.equal(valid(work, states.hidden), valid(work, other.hidden))
    first = works[0]
    assert first.soft is not None
    payloads, _ = divided.run(first)
    later = replace(first, soft=replace(first.soft, features=features[:0]))
    with torch.inference_mode():
        middle = divided.stages[1][0].run(later, payloads[0][0])
    assert isinstance(middle, Payload)
    assert torch.equal(middle.hidden, payloads[1][0].hidden), "later stages look at no features"


# ---------------------------------------------------------------------------- what crosses


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("dense", Layout((2, 4)), ["hidden"]),
        ("moe", Layout((1, 3), tensor=2), ["hidden"]),
        ("e2b", Layout((2, 8)), ["hidden", "per_layer_inputs"]),
        ("e2b", Layout((4, 6)), ["hidden", "per_layer_inputs", "keys.3", "values.3"]),
        (
            "e2b",
            Layout((5, 5)),
            ["hidden", "per_layer_inputs", "keys.3", "values.3", "keys.4", "values.4"],
        ),
        ("e2b", Layout((9, 1)), ["hidden", "per_layer_inputs", "keys.4", "values.4"]),
    ],
    ids=str,
)
def test_a_payload_holds_what_later_layers_need_and_nothing_else(
    name: str, layout: Layout, expected: list[str]
) -> None:
    config = TextConfig.from_dict(TINY[name])
    assert list(Payload.spec(config, layout, 1, rows=1, tokens=3)) == expected


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("e2b", Layout((3, 1, 2, 4))),
        ("e2b", Layout(2, tensor=2)),
        ("dense", Layout(2, tensor=2)),
        ("moe", Layout(4)),
    ],
    ids=str,
)
def test_real_and_empty_payloads_are_as_the_spec_says(name: str, layout: Layout, tokens: int) -> None:
    model = build(TINY[name], dtype=torch.bfloat16)
    aux = (0, 3, 4)
    payloads, _ = Divided(model, layout).run(Pass(random_ids(2, tokens), aux_layers=aux))
    for stage, shards in enumerate(payloads, start=1):
        sizes = {"dtype": torch.bfloat16, "aux_layers": aux}
        spec = Payload.spec(model.config, layout, stage, rows=2, tokens=tokens, **sizes)
        empty = Payload.empty(Payload.spec(model.config, layout, stage, rows=2, tokens=0, **sizes))
        for payload in shards:
            named = payload.named()
            assert list(named) == list(spec) == list(empty.named())
            assert {n: (tuple(t.shape), t.dtype) for n, t in named.items()} == {
                n: (slot.shape, slot.dtype) for n, slot in spec.items()
            }
            for tensor_name, tensor in named.items():
                other = empty.named()[tensor_name]
                assert other.numel() == 0
                assert other.dtype == tensor.dtype
                assert tensor.nbytes == spec[tensor_name].nbytes
                token_axis = 2 if tensor_name.startswith(("keys", "values")) else 1
                assert other.shape[:token_axis] == tensor.shape[:token_axis]
                assert other.shape[token_axis + 1 :] == tensor.shape[token_axis + 1 :]


def test_a_stage_runs_on_an_empty_payload() -> None:
    model = build(E2B)
    for place in (Place(1, 0), Place(2, 0)):
        stage = stage_of(model, Layout(3), place)
        with torch.inference_mode():
            result = stage.run(Pass(torch.zeros(1, 2, dtype=torch.int64)), stage.empty(1, 2))
        assert isinstance(result, States if stage.ends else Payload)


def test_states_cross_by_their_absolute_index() -> None:
    model = build(DENSE)
    work = Pass(random_ids(1, 5), aux_layers=(1, 2, 3, 5))
    payloads, (states,) = Divided(model, Layout((2, 1, 3))).run(work)
    with torch.inference_mode():
        expected = model.states(work.ids, aux_layers=work.aux_layers)
    assert [sorted(shards[0].aux) for shards in payloads] == [[1, 2], [1, 2, 3]]
    assert torch.equal(payloads[1][0].aux[3], expected.aux[2])
    assert all(torch.equal(a, b) for a, b in zip(states.aux, expected.aux, strict=True))


@pytest.mark.parametrize("asked", [(), (4,), (1, 4)], ids=len)
def test_one_state_comes_as_several_do(asked: tuple[int, ...]) -> None:
    _, (states,) = Divided(build(DENSE), Layout(2)).run(Pass(random_ids(1, 3), aux_layers=asked))
    assert isinstance(states.aux, tuple)
    assert len(states.aux) == len(asked)


def test_a_payload_of_another_form_is_refused() -> None:
    model = build(E2B)
    work = Pass(random_ids(1, 4))
    (shards,), _ = Divided(model, Layout(2)).run(work)
    payload, stage = shards[0], stage_of(model, Layout(2), Place(1, 0))
    assert payload.per_layer_inputs is not None
    wrong = {
        "the next stage expects": replace(payload, per_layer_inputs=None),
        "per_layer_inputs of a payload is": replace(
            payload, per_layer_inputs=payload.per_layer_inputs[:, :, 1:]
        ),
        r"hidden of a payload is .*float64": replace(payload, hidden=payload.hidden.double()),
    }
    for message, other in wrong.items():
        with pytest.raises(ModelError, match=message):
            stage.run(work, other)
    with pytest.raises(ModelError, match="stage 1 runs on what stage 0 hands over"):
        stage.run(work)


@pytest.mark.parametrize("asked", [(1, 1), (2, 1), (-1,), (7,)], ids=str)
def test_states_that_a_model_cannot_give_are_refused(asked: tuple[int, ...]) -> None:
    stage = stage_of(build(DENSE), Layout(2), Place(0, 0))
    with pytest.raises(ModelError, match="distinct, ascending numbers from 0 to 6"):
        stage.run(Pass(random_ids(1, 3), aux_layers=asked))


# ---------------------------------------------------------------------------- what a rank holds


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layout", [Layout(2), Layout((1, 3), tensor=2), Layout(tensor=4)], ids=str)
def test_a_rank_reads_its_own_part_from_the_files(name: str, layout: Layout, tmp_path: Path) -> None:
    raw = {**TINY[name], "num_hidden_layers": 4} | (
        {"layer_types": TINY[name]["layer_types"][:4], "num_kv_shared_layers": 1} if name == "e2b" else {}
    )
    raw["layer_types"] = raw["layer_types"][:4]
    write_checkpoint(raw, tmp_path, seed=3)
    model = build(raw, edits={})
    divided = Divided(model, layout)
    for rank in range(layout.ranks):
        place = layout.place(rank)
        held = divided.stages[place.stage][place.shard].state_dict()
        ranks = divided.stages[place.stage][place.shard]._ranks
        loaded = load_stage(Weights(str(tmp_path)), layout, place, ranks).state_dict()
        assert {n: t.shape for n, t in loaded.items()} == {n: t.shape for n, t in held.items()}
        layers = {int(n.split(".")[1]) for n in loaded if n.startswith("layers.")}
        assert layers == set(layout.spans(4)[place.stage])
        assert ("embed_tokens_per_layer.weight" in loaded) == (name == "e2b" and place.stage == 0)
        assert ("norm.weight" in loaded) == (place.stage == layout.stages - 1)


def test_parts_together_are_the_whole_and_replicas_are_equal() -> None:
    config = TextConfig.from_dict(DENSE)
    whole = build(DENSE).state_dict()
    parts = [cut_all(whole, config, Layout(tensor=4), shard) for shard in range(4)]
    for name, axis in (
        ("mlp.gate_proj", 0),
        ("mlp.down_proj", 1),
        ("self_attn.q_proj", 0),
        ("self_attn.o_proj", 1),
    ):
        key = f"layers.2.{name}.weight"
        assert torch.equal(torch.cat([part[key] for part in parts], dim=axis), whole[key])
    keys = [part["layers.2.self_attn.k_proj.weight"] for part in parts]
    assert torch.equal(keys[0], keys[1]), "two heads on four ranks: neighbours hold the same one"
    assert torch.equal(keys[2], keys[3])
    assert torch.equal(torch.cat([keys[0], keys[2]]), whole["layers.2.self_attn.k_proj.weight"])


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"),
    [(4, 2, [(0, 2), (2, 4)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]), (1, 3, [(0, 1)] * 3)],
)
def test_no_rank_has_fewer_than_one_key_value_head(
    heads: int, ranks: int, expected: list[tuple[int, int]]
) -> None:
    assert [kv_heads(heads, ranks, shard) for shard in range(ranks)] == expected


def test_a_checkpoint_that_does_not_fit_is_refused_before_ranks_start(tmp_path: Path) -> None:
    write_checkpoint(DENSE, tmp_path, seed=3)
    check_folder(Weights(str(tmp_path)))
    other = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 44}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="misshapen"):
        check_folder(Weights(str(tmp_path)))


# ---------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"), [(10, 4, [3, 3, 2, 2]), (6, 4, [2, 2, 1, 1]), (6, 1, [6]), (7, 2, [4, 3])]
)
def test_stages_are_as_even_as_can_be(layers: int, stages: int, sizes: list[int]) -> None:
    spans = Layout(stages).spans(layers)
    assert [len(span) for span in spans] == sizes
    assert [index for span in spans for index in span] == list(range(layers))


@pytest.mark.parametrize(
    ("raw", "layout", "message"),
    [
        (DENSE, Layout(7), "6 layers cannot be divided into 7 stages"),
        (DENSE, Layout((2, 3)), "stages of .2, 3. layers do not fit a model of 6"),
        (DENSE, Layout((6, 0)), "each needs one at least"),
        (DENSE, Layout(0), "name from 1 to 6"),
        (DENSE, Layout(tensor=0), "must be 1 or above"),
        (DENSE, Layout(3, tensor=2), "takes 6 processes; 4 at most"),
        (DENSE, Layout(tensor=3), "num_attention_heads is 4, which does not divide by tensor parallel 3"),
        ({**DENSE, "intermediate_size": 42}, Layout(tensor=4), "intermediate_size of layer 0 is 42"),
        (
            {**DENSE, "num_attention_heads": 12, "num_key_value_heads": 3, "num_global_key_value_heads": 3},
            Layout(tensor=2),
            "layer 0 has 3 key-value heads, which neither divide",
        ),
        (DENSE, Layout(tensor=2, expert=True), "the model has no experts"),
        (MOE, Layout(2, expert=True), "tensor parallel is 1"),
        ({**MOE, "num_experts": 6}, Layout(tensor=4, expert=True), "num_experts is 6"),
        ({**MOE, "moe_intermediate_size": 18}, Layout(tensor=4), "moe_intermediate_size is 18"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused(raw: dict[str, Any], layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout.check(TextConfig.from_dict(raw))
