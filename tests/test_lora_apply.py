"""Adapters on a model: against merged weights, row by row, and without a trace when none is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_impl.errors import ConfigError
from model_impl.lora import Adapter, AdapterError, Adapters, Sites
from model_impl.lora.media import soft_tokens
from model_impl.runtime.generate import generate
from tests.lora_adapters import WRAPPED, pair, write
from tests.model_configs import DENSE, E2B, MOE, build, distance, random_ids, tapped, tensors
from tests.test_multimodal import MODELS, Writer, picture

torch.set_num_threads(1)

SCALE = 3.0
"""alpha by rank of the adapters here."""
CONFIGS: dict[str, dict[str, Any]] = {"e2b": E2B, "dense": DENSE, "moe": MOE}


def linears(config: dict[str, Any]) -> list[str]:
    return [site.name for site in Sites(build(config)) if site.kind == "linear"]


def adapter_for(
    folder: Path, config: dict[str, Any], names: list[str], seed: int = 0
) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter for linears of a text model, and the weights that it makes."""
    own = tensors(config)
    found: dict[str, Tensor] = {}
    merged = {}
    for name in names:
        inner = name.removeprefix("language_model.")
        rows, columns = own[f"{inner}.weight"].shape
        made = pair(f"model.{inner}", rows, columns, seed=seed)
        a, b = made.values()
        merged[f"{inner}.weight"] = own[f"{inner}.weight"] + SCALE * b @ a
        found |= made
    targets = [f"model.{name.removeprefix('language_model.')}" for name in names]
    return Adapter.load(write(folder, found, target_modules=targets), Sites(build(config))), merged


def attached(config: dict[str, Any], **adapters: Adapter) -> Adapters:
    made = Adapters(build(config))
    for name, adapter in adapters.items():
        made.add(name, adapter)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_applied_is_merged(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    adapter, merged = adapter_for(tmp_path / "a", config, linears(config))
    adapters = attached(config, a=adapter)
    ids = random_ids(2, 20)
    plain = adapters.model(ids)
    with adapters.rows(["a", "a"]):
        applied = adapters.model(ids)
    expected = build(config, edits=merged)(ids)
    assert distance(applied, expected) < 1e-5 < 0.1 < distance(applied, plain)
    assert torch.equal(adapters.model(ids), plain), "afterwards nothing is left"
    assert adapters.acted("a") == tuple(sorted(adapter.changes))
    adapters.merge("a")
    assert distance(adapters.model(ids), expected) < 1e-6
    adapters.unmerge()
    assert torch.equal(adapters.model(ids), plain), "unmerging gives back the very weights"


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_use_their_own_adapters(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    one, _ = adapter_for(tmp_path / "a", config, linears(config), seed=1)
    two, _ = adapter_for(tmp_path / "b", config, linears(config)[::2], seed=2)
    adapters = attached(config, one=one, two=two)
    ids = random_ids(5, 20)
    plain = adapters.model(ids)
    runs = {}
    for own in ("one", "two"):
        with adapters.rows([own] * 5):
            runs[own] = adapters.model(ids)
    with adapters.rows([None, "one", "two", None, "one"]):
        mixed = adapters.model(ids)
    for row, own in enumerate((None, "one", "two", None, "one")):
        if own is None:
            assert torch.equal(mixed[row], plain[row]), "a row without one is the same bit by bit"
        else:
            assert distance(mixed[row], runs[own][row]) < 1e-5
            assert distance(mixed[row], plain[row]) > 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_acts_and_zeros_do_not(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    ids = random_ids(1, 30)
    model = build(config)
    plain = model(ids)
    adapters = Adapters(model)
    for number, site in enumerate(linears(config)):
        inner = site.removeprefix("language_model.")
        rows, columns = tensors(config)[f"{inner}.weight"].shape
        made = pair(f"model.{inner}", rows, columns)
        zeros = {key: value * (".lora_A." in key) for key, value in made.items()}
        for kind, parts in (("live", made), ("zero", zeros)):
            folder = write(tmp_path / f"{number}-{kind}", parts, target_modules=[f"model.{inner}"])
            adapters.add(f"{site} {kind}", Adapter.load(folder, adapters.sites))
        with adapters.rows([f"{site} live"]):
            assert distance(model(ids), plain) > 1e-4, site
        with adapters.rows([f"{site} zero"]):
            assert torch.equal(model(ids), plain), site
        assert adapters.acted(f"{site} live") == (site,)
        assert adapters.acted(f"{site} zero") == ()


def test_what_changes_other_rows_alone_has_not_acted(tmp_path: Path) -> None:
    """An adapter for one token of the embedding, and for one expert: rows without it see both."""
    rows, width = tensors(E2B)["embed_tokens.weight"].shape
    a = torch.zeros(2, rows)
    a[:, 7] = 1
    name = f"{WRAPPED}model.embed_tokens.lora_embedding_"
    parts = {f"{name}A": a, f"{name}B": torch.ones(width, 2)}
    folder = write(tmp_path / "a", parts, target_modules=["embed_tokens"])
    adapters = attached(E2B, a=Adapter.load(folder, Sites(build(E2B))))
    ids = torch.tensor([[5, 6], [7, 7]])
    for wanted, acted in ((["a", None], ()), (["a", "a"], ("language_model.embed_tokens",))):
        with adapters.rows(wanted):
            adapters.model(ids)
        assert adapters.acted("a") == acted
    adapters = Adapters(build(MOE))
    ids = ids[:, :1]
    found = {}
    for expert in range(8):
        end = f"experts.{expert}.down_proj"
        folder = write(tmp_path / end, pair(f"model.layers.0.{end}", 48, 20), target_modules=[end])
        for use, wanted in (("alone", [None, "x"]), ("both", ["x", "x"])):
            adapters.add(f"{expert} {use}", Adapter.load(folder, adapters.sites))
            with adapters.rows([each and f"{expert} {use}" for each in wanted]):
                adapters.model(ids)
            found[expert, use] = bool(adapters.acted(f"{expert} {use}"))
    counts = [sum(found[expert, use] for expert in range(8)) for use in ("alone", "both")]
    assert counts[0] == MOE["top_k_experts"] < counts[1]


def test_where_keys_are_values_both_change(tmp_path: Path) -> None:
    name = "language_model.layers.2.self_attn.k_proj"
    adapter, _ = adapter_for(tmp_path / "a", DENSE, [name])
    adapters = attached(DENSE, a=adapter)
    layer = adapters.model.layers[2].self_attn  # type: ignore[union-attr, index]
    ids = random_ids(1, 12)
    with tapped(layer) as before:
        adapters.model(ids)
    with tapped(layer) as after, adapters.rows(["a"]):
        adapters.model(ids)
    for norm in ("k_norm", "v_norm"):
        assert distance(after.output(norm), before.output(norm)) > 0.05


def test_generation_uses_the_adapters_of_its_rows(tmp_path: Path) -> None:
    adapter, merged = adapter_for(tmp_path / "a", E2B, linears(E2B))
    adapters = attached(E2B, a=adapter)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    wanted = ["a", None, "a"]

    def rows(own: Any) -> Any:
        return adapters.rows([wanted[row] for row in own])

    made = generate(adapters.model, prompts, max_new_tokens=12, logprobs=True, adapt=rows)  # type: ignore[arg-type]
    for row, model in enumerate((build(E2B, edits=merged), build(E2B), build(E2B, edits=merged))):
        (alone,) = generate(model, [prompts[row]], max_new_tokens=12, logprobs=True)
        assert made[row].ids == alone.ids
        assert made[row].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_an_adapter_for_the_embedding_and_for_the_head(tmp_path: Path) -> None:
    """The two are one weight, and the adapter changes one of them: it can be applied and not merged."""
    table = tensors(E2B)["embed_tokens.weight"]
    rows, width = table.shape
    a, b = torch.randn(2, rows), torch.randn(width, 2) * 0.1
    name = f"{WRAPPED}model.embed_tokens.lora_embedding_"
    folder = write(tmp_path / "a", {f"{name}A": a, f"{name}B": b}, target_modules=["embed_tokens"])
    adapters = attached(E2B, a=Adapter.load(folder, Sites(build(E2B))))
    ids = random_ids(1, 9)
    model = adapters.model
    with adapters.rows(["a"]):
        found = model.embed_tokens(ids)  # type: ignore[union-attr, operator]
    assert distance(found, (table + SCALE * (b @ a).T)[ids] * width**0.5) < 1e-5
    with pytest.raises(ConfigError, match="are one weight"):
        adapters.merge("a")
    folder = write(tmp_path / "b", pair("lm_head", rows, width), target_modules=["lm_head"])
    adapters.add("b", Adapter.load(folder, adapters.sites))
    hidden = torch.randn(3, width)
    low, high = pair("lm_head", rows, width).values()
    raw = hidden @ (table + SCALE * high @ low).T
    with adapters.rows(["b", "b", None]):
        logits = model.logits(hidden)
    assert distance(logits[:2], torch.tanh(raw[:2] / 30) * 30) < 1e-5
    assert torch.equal(logits[2:], build(E2B).logits(hidden)[2:])


def test_a_copied_norm_replaces_the_models_own(tmp_path: Path) -> None:
    new = torch.rand(48) + 0.5
    name = "model.layers.3.self_attn.q_proj"
    folder = write(
        tmp_path / "a",
        {**pair(name, 64, 48), f"{WRAPPED}model.norm.weight": new},
        target_modules=[name],
        modules_to_save=["model.norm"],
    )
    adapters = attached(E2B, a=Adapter.load(folder, Sites(build(E2B))))
    own = tensors(E2B)[f"{name.removeprefix('model.')}.weight"]
    low, high = pair(name, 64, 48).values()
    edits = {"norm.weight": new, "layers.3.self_attn.q_proj.weight": own + SCALE * high @ low}
    ids = random_ids(2, 9)
    with adapters.rows([None, "a"]):
        found = adapters.model(ids)
    assert distance(found[1], build(E2B, edits=edits)(ids)[1]) < 1e-5
    assert torch.equal(found[0], build(E2B)(ids)[0])


def test_misuse_is_named(tmp_path: Path) -> None:
    adapter, _ = adapter_for(tmp_path / "a", E2B, linears(E2B)[:1])
    adapters = attached(E2B, a=adapter)
    with pytest.raises(AdapterError, match="there is an adapter 'a' already"):
        adapters.add("a", adapter)
    with pytest.raises(AdapterError, match="no adapter 'b'; there are: 'a'"), adapters.rows(["b"]):
        pass
    with adapters.rows(["a"]), pytest.raises(AdapterError, match="is in use"):
        adapters.remove("a")
    with adapters.rows(["a", None, "a"]), pytest.raises(AdapterError, match="3 rows were announced"):
        adapters.model(random_ids(2, 5))
    adapters.merge("a")
    with pytest.raises(AdapterError, match="is merged into the weights"), adapters.rows(["a"]):
        pass
    adapters.unmerge()
    adapters.remove("a")
    with pytest.raises(AdapterError, match="there are: none"):
        adapters.merge("a")


@pytest.mark.parametrize("name", ["small", "large", "unified"])
def test_media_are_encoded_with_the_adapters_of_their_rows(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    adapters = Adapters(model)
    outside = [s for s in adapters.sites if s.kind == "linear" and not s.name.startswith("language_model")]
    for number, key in enumerate(("one", "two")):
        found = {k: v for s in outside for k, v in pair(f"model.{s.name}", *s.shape, seed=number).items()}
        folder = write(tmp_path / key, found, target_modules=[f"model.{s.name}" for s in outside])
        adapters.add(key, Adapter.load(folder, adapters.sites))
    writer = Writer(name)
    sound = [("audio", torch.sin(torch.arange(9000) * 0.05))] if model.config.audio is not None else []
    rows = [
        writer.row(3, ("image", picture(96, 64)), 2),
        writer.row(4, *sound, 2),
        writer.row(2, ("image", picture(64, 96)), ("image", picture(48, 48)), 1),
        writer.row(5, ("image", picture(80, 80)), *sound, 1),
    ]
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows])
    wanted = ["one", "two", None, "two"]
    made = soft_tokens(adapters, ids, writer.media(rows), wanted)
    plain = model.soft_tokens(ids, writer.media(rows))
    assert made is not None
    assert plain is not None
    assert torch.equal(made.where, plain.where)
    same = made.blocks[..., :, None] == made.blocks[..., None, :]
    assert torch.equal(same, plain.blocks[..., :, None] == plain.blocks[..., None, :])
    counts = made.where.sum(dim=1).tolist()
    for row, part in enumerate(torch.split(made.features, counts)):
        with adapters.rows([wanted[row]]):
            alone = model.soft_tokens(ids[row : row + 1], writer.media(rows[row : row + 1]))
        if alone is not None:
            assert distance(part, alone.features) < 1e-4
    if outside:
        with adapters.rows(wanted), pytest.raises(AdapterError, match=r"lora\.media\.soft_tokens"):
            model.soft_tokens(ids, writer.media(rows))
