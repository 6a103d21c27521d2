"""Adapters beside layouts, drafts and a paged cache: each rank has its own part, each row its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model_impl.errors import CheckpointError
from model_impl.lora import Adapter, AdapterError, Adapters, LowRank, Parts, Sites, names
from model_impl.lora.apply import merged_weights
from model_impl.parallel.adapters import ParallelAdapters, cut_parts, holds, named, parts_of
from model_impl.parallel.layout import Layout
from model_impl.parallel.messages import packed
from model_impl.parallel.model import ParallelModel
from model_impl.parallel.runner import ParallelRunner
from model_impl.parallel.stage import Pass
from model_impl.random_weights import write_checkpoint
from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.generate import generate
from model_impl.runtime.runner import LocalRunner
from model_impl.text import TextModel
from tests.engines import AUX, asked, proposer, said, sizes
from tests.model_configs import DENSE, E2B, MOE, TINY, build, distance, random_ids, tensors
from tests.ranks_in_threads import Divided

torch.set_num_threads(1)

UNTIED: dict[str, Any] = {**DENSE, "tie_word_embeddings": False}
CONFIGS = {**TINY, "untied": UNTIED}
WANTED = ("one", None, "two", "one", None)


def everywhere(config: dict[str, Any], seed: int, *, also: Sequence[str] = ()) -> Adapter:
    """An adapter for every linear and every expert of a model, and for what is named besides."""
    sites = Sites(build(config))
    draw = torch.Generator().manual_seed(seed)
    changes: dict[str, LowRank] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        if site.kind == "copy" and site.name.endswith(tuple(also)):
            copies[site.name] = {"weight": torch.rand(site.shape, generator=draw) + 0.5}
        elif site.kind in ("linear", "experts") or site.name.endswith(tuple(also)):
            shape = tuple(reversed(site.shape)) if site.kind == "embedding" else site.shape
            *experts, rows, columns = shape
            a = torch.randn(*experts, 2, columns, generator=draw) * columns**-0.5
            changes[site.name] = LowRank(a, torch.randn(*experts, rows, 2, generator=draw) * 0.3)
    found = {site.name: site for site in sites if site.name in {*changes, *copies}}
    return Adapter("the test", changes, copies, None, (), found)  # type: ignore[arg-type]


def merged(config: dict[str, Any], adapter: Adapter) -> TextModel:
    """The model with the adapter in its weights."""
    own = tensors(config)
    edits = merged_weights(adapter, lambda key: own[key.removeprefix("language_model.")])
    return build(config, edits={name.removeprefix("language_model."): edit for name, edit in edits.items()})


class Ranks:
    """All ranks of a layout as threads, with adapters."""

    def __init__(self, model: TextModel, layout: Layout, adapters: dict[str, Adapter]) -> None:
        self.divided = Divided(model, layout)
        self.held: dict[tuple[int, int], set[str]] = {}
        self.adapters: list[Adapters] = []
        for stage in self.divided.stages:
            for shard in stage:
                own = Adapters(shard)
                for name, adapter in adapters.items():
                    held = set(shard.state_dict())
                    parts = adapter.only(lambda s, h=held, at=shard.place: holds(s, h, layout, at))  # type: ignore[misc]
                    parts = cut_parts(parts, model.config, layout, shard.place.shard)
                    own.add(name, parts_of("the test", packed(named(parts))))
                    self.held[shard.place.stage, shard.place.shard] = set(names(parts))
                self.adapters.append(own)

    @contextmanager
    def rows(self, wanted: Sequence[str | None]) -> Iterator[None]:
        with ExitStack() as stack:
            for own in self.adapters:
                stack.enter_context(own.rows(wanted))
            yield

    def logits(self, ids: Tensor) -> Tensor:
        """Of every token, from the first shard of the last stage; all of them agree."""
        _, states = self.divided.run(Pass(ids))
        found = self.divided.logits(states[0].hidden)
        assert all(torch.equal(other, found[0]) for other in found)
        return found[0]


LAYOUTS = [
    ("e2b", Layout((3, 4, 3))),
    ("e2b", Layout(tensor=2)),
    ("e2b", Layout((7, 3), tensor=2)),
    ("dense", Layout(tensor=4)),
    ("untied", Layout(2, tensor=2)),
    ("moe", Layout(2)),
    ("moe", Layout(tensor=2)),
    ("moe", Layout(2, tensor=2, expert=True)),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_rows_of_any_layout_are_those_of_merged_weights(name: str, layout: Layout) -> None:
    config = CONFIGS[name]
    one, two = everywhere(config, 1), everywhere(config, 2, also=["layernorm", "_norm"])
    ranks = Ranks(build(config), layout, {"one": one, "two": two})
    ids = random_ids(5, 12)
    plain = ranks.logits(ids)
    with ranks.rows(WANTED):
        mixed = ranks.logits(ids)
    models = {"one": merged(config, one), "two": merged(config, two)}
    for row, own in enumerate(WANTED):
        if own is None:
            assert torch.equal(mixed[row], plain[row]), "a row without one is the same bit by bit"
            continue
        model = models[own]
        expected = model.logits(model(ids[row : row + 1]))[0]
        assert distance(mixed[row], expected) < 1e-4 < 0.05 < distance(mixed[row], plain[row])
    with ranks.rows(["two"] * 5):
        assert distance(ranks.logits(ids)[2], mixed[2]) < 1e-4
    assert torch.equal(ranks.logits(ids), plain), "afterwards nothing is left"


@pytest.mark.parametrize("layout", [Layout(3), Layout(tensor=4), Layout(2, tensor=2)], ids=str)
@pytest.mark.parametrize("also", ["embed_tokens", "embed_tokens_per_layer", "lm_head"])
def test_tables_and_heads_are_adapted_in_their_parts(also: str, layout: Layout) -> None:
    config = {**E2B, "vocab_size": 97, "vocab_size_per_layer_input": 97}
    adapter = everywhere(config, 3, also=[also])
    whole = Adapters(build(config))
    whole.add("a", adapter)
    ids = random_ids(3, 9)
    wanted = ["a", None, "a"]
    with whole.rows(wanted):
        expected = whole.model.logits(whole.model(ids))  # type: ignore[operator, union-attr]
    ranks = Ranks(build(config), layout, {"a": adapter})
    with ranks.rows(wanted):
        assert distance(ranks.logits(ids), expected) < 1e-4
    site = also if also == "lm_head" else f"language_model.{also}"
    stages = {stage for (stage, _), held in ranks.held.items() if site in held}
    assert stages == {layout.stages - 1 if also == "lm_head" else 0}


def test_each_stage_has_the_pairs_of_its_own_layers() -> None:
    adapter = everywhere(E2B, 1, also=["lm_head", "embed_tokens", "layers.4.input_layernorm"])
    ranks = Ranks(build(E2B), Layout((3, 7)), {"a": adapter})
    first, last = ranks.held[0, 0], ranks.held[1, 0]
    assert not first & last
    assert first | last == set(names(adapter))
    assert {int(site.split(".")[2]) for site in first if ".layers." in site} == {0, 1, 2}
    assert "lm_head" in last
    assert "language_model.embed_tokens" in first


def test_shards_of_pairs_are_cut_as_the_weights_are() -> None:
    adapter = everywhere(MOE, 1)
    config = build(MOE).config
    shards = [cut_parts(adapter, config, Layout(tensor=2), shard).changes for shard in range(2)]
    layer = "language_model.layers.1"
    for site, half, axis in (
        ("self_attn.q_proj", "b", 0),
        ("self_attn.k_proj", "b", 0),
        ("mlp.gate_proj", "b", 0),
        ("self_attn.o_proj", "a", 1),
        ("mlp.down_proj", "a", 1),
        ("experts.down_proj", "a", 2),
    ):
        name = f"{layer}.{site}"
        whole = adapter.changes[name]
        other = "a" if half == "b" else "b"
        both = [getattr(shard[name], half) for shard in shards]
        assert torch.equal(torch.cat(both, dim=axis), getattr(whole, half)), site
        assert all(torch.equal(getattr(shard[name], other), getattr(whole, other)) for shard in shards)
    name = f"{layer}.experts.gate_up_proj"
    parts = [shard[name].b.chunk(2, dim=1) for shard in shards]
    together = torch.cat([parts[0][0], parts[1][0], parts[0][1], parts[1][1]], dim=1)
    assert torch.equal(together, adapter.changes[name].b), "the gate's rows, then those of up"
    own = cut_parts(adapter, config, Layout(tensor=2, expert=True), 1).changes[name]
    assert torch.equal(own.a, adapter.changes[name].a[4:])
    assert torch.equal(own.b, adapter.changes[name].b[4:])


# ---------------------------------------------------------------------------- over processes


@pytest.fixture(scope="module", params=[("dense", Layout((2, 4))), ("moe", Layout(tensor=2))], ids=str)
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ParallelModel]]:
    """A model in two processes."""
    name, layout = request.param
    folder = tmp_path_factory.mktemp(name)
    write_checkpoint(TINY[name], folder, seed=7)
    with ParallelModel(folder, layout) as model:
        yield name, model


def test_processes_hold_their_parts_and_rows_use_them(several: tuple[str, ParallelModel]) -> None:
    name, model = several
    config = TINY[name]
    adapters = model.adapters
    one, two = everywhere(config, 1, also=["lm_head"]), everywhere(config, 2)
    adapters.add("one", one)
    adapters.add("two", two)
    held = adapters.held["one"]
    assert {site for own in held.values() for site in own} == set(names(one))
    if model.layout.tensor == 1:
        assert not set(held[0]) & set(held[1]), "a stage has the pairs of its own layers alone"
    else:
        out = "language_model.layers.0.self_attn.o_proj"
        assert held[0][out] == held[1][out] == [[2, 32], [48, 2]]
    prompts = [[2, 5, 7, 11, 13], [2, 3], [2, 8, 9, 10], [2, 4, 6], [2, 1]]
    here = Adapters(build(config))
    here.add("one", one)
    here.add("two", two)
    expected, found = (
        generate(
            where,
            prompts,
            max_new_tokens=6,
            logprobs=True,
            adapt=lambda rows, own=own: own.rows([WANTED[row] for row in rows]),  # type: ignore[misc]
        )
        for where, own in ((here.model, here), (model, adapters))
    )
    for got, right in zip(found, expected, strict=True):
        assert got.ids == right.ids
        assert got.logprobs == pytest.approx(right.logprobs, abs=1e-4)
    assert adapters.acted("two") == tuple(names(two))
    assert adapters.acted("one") == tuple(names(one))
    # The same through an engine over a paged cache, which feeds them in other batches.
    with torch.inference_mode():
        runner = ParallelRunner(model, sizes())
        requests = [
            replace(request, adapter=own) for request, own in zip(asked(prompts, 6), WANTED, strict=True)
        ]
        assert said(Engine(runner).run(requests)) == [row.ids for row in expected]
    runner.close()
    adapters.remove("one")
    with pytest.raises(AdapterError, match="'one' was the name of an adapter that is gone"):
        adapters.add("one", two)


def test_what_ranks_would_refuse_is_refused_here_and_they_go_on(several: tuple[str, ParallelModel]) -> None:
    name, model = several
    adapters = model.adapters
    adapter = everywhere(TINY[name], 4)
    some = next(iter(adapter.changes.values()))
    with pytest.raises(AdapterError, match=r"hold the text model, and vision_tower\.a are not in it"):
        adapters.add("four", Parts("x", {"vision_tower.a": some}, {}))
    lost = {"language_model.layers.77.mlp.up_proj": some}
    with pytest.raises(
        CheckpointError, match=r"no rank of .* holds language_model\.layers\.77\.mlp\.up_proj"
    ):
        adapters.add("four", Parts("x", {**adapter.changes, **lost}, {}))
    adapters.add("four", adapter)
    with pytest.raises(AdapterError, match="there is an adapter 'four' already"):
        adapters.add("four", adapter)
    with pytest.raises(AdapterError, match="no adapter 'five'"), adapters.rows(["five"]):
        pass
    with adapters.rows(["four", None]):
        with pytest.raises(AdapterError, match="a pass has 3 rows, and 2 rows were announced"):
            model(random_ids(3, 4))
        with pytest.raises(AdapterError, match="a pass has 1 rows, and 2 rows were announced"):
            model.logits(torch.zeros(1, 48))
        with pytest.raises(AdapterError, match="'four' is in use"):
            adapters.remove("four")
    assert isinstance(adapters, ParallelAdapters)
    assert model.generate([[2]], max_new_tokens=1)[0].ids, "the ranks go on"


# ---------------------------------------------------------------------------- in an engine


@pytest.mark.parametrize("drafter", [None, "eagle3", "assistant"])
def test_requests_of_an_engine_use_their_own_adapters(drafter: str | None) -> None:
    """Also of those whose prompts begin alike, and whose tokens are drafted by a model without adapters."""
    one, two = everywhere(DENSE, 1, also=["lm_head"]), everywhere(DENSE, 2)
    adapters = Adapters(build(DENSE))
    adapters.add("one", one)
    adapters.add("two", two)
    assert isinstance(adapters.model, TextModel)
    runner = LocalRunner(adapters.model, sizes(), AUX if drafter == "eagle3" else (), adapters.rows)
    made = Engine(runner, EngineConfig(max_sequences=3), proposer(drafter, runner))
    start = random_ids(1, 25)[0].tolist()
    prompts = [[*start, row] for row in range(5)]
    requests = [replace(r, adapter=own) for r, own in zip(asked(prompts, 7), WANTED, strict=True)]
    expected = [
        row.ids
        for row in generate(
            adapters.model,
            prompts,
            max_new_tokens=7,
            adapt=lambda rows: adapters.rows([WANTED[row] for row in rows]),
        )
    ]
    assert len(set(expected[:3])) == 3, "adapters matter"
    for _ in range(2):
        results = made.run(requests)
        assert said(results) == expected
    prefix = 12 if drafter == "eagle3" else 24  # a head's own keys of the last block are not taken over
    assert all(result.cached_tokens == prefix for result in results), "each finds its own prefix"
    if drafter is not None:
        assert made.acceptance.drafted


def test_prefixes_are_found_under_the_same_adapter_alone() -> None:
    adapters = Adapters(build(DENSE))
    adapters.add("one", everywhere(DENSE, 1))
    adapters.add("two", everywhere(DENSE, 2))
    assert isinstance(adapters.model, TextModel)
    made = Engine(LocalRunner(adapters.model, sizes(), activate=adapters.rows))
    (request,) = asked([random_ids(1, 25)[0].tolist()], 2)
    found = [
        made.run([replace(request, adapter=own)])[0].cached_tokens
        for own in ("one", "two", None, "two", "one", None)
    ]
    assert found == [0, 0, 0, 24, 24, 24]


def test_a_name_stands_for_one_adapter_for_good() -> None:
    """A prefix cache knows what an adapter made by the adapter's name."""
    adapters = Adapters(build(DENSE))
    adapters.add("one", everywhere(DENSE, 1))
    adapters.remove("one")
    with pytest.raises(AdapterError, match="'one' was the name of an adapter that is gone"):
        adapters.add("one", everywhere(DENSE, 2))


def test_parts_of_an_adapter_are_not_merged() -> None:
    adapters = Adapters(build(DENSE))
    adapters.add("one", everywhere(DENSE, 1).only(lambda site: "layers.1." in site))
    with pytest.raises(AdapterError, match="of the adapter 'one' only parts are here"):
        adapters.merge("one")
