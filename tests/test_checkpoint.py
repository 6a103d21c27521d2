"""Loading checkpoints: names, shapes, files, and the rule for tensors that shared layers do not use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl import text
from model_impl.checkpoint import PREFIX, assign, is_dead, load_text_model, parameter_count
from model_impl.config import TextConfig
from model_impl.errors import CheckpointError, ConfigError
from model_impl.layers import backend_choice
from model_impl.layers.backend_choice import BackendError
from model_impl.layers.backend_table import CAPABILITY_TABLE
from model_impl.random_weights import shapes, write_checkpoint
from model_impl.text import TextModel
from tests.model_configs import DENSE, E2B, MOE, TINY, random_ids, tensors

Weights = dict[str, Tensor]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def e2b(tmp_path: Path) -> Path:
    return written(E2B, tmp_path)


def written(config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_checkpoint(config, folder, seed=7)
    return folder


def edit(folder: Path, change: Callable[[Weights], object]) -> None:
    """Load the folder's tensors, change the dictionary, and save it."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_text_model(folder)
    message = str(caught.value)
    assert str(folder) in message
    return message


# --------------------------------------------------------------------------------------------- whole ones


@pytest.mark.parametrize("kind", TINY)
def test_what_was_written_is_loaded_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = load_text_model(written(TINY[kind], tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert {PREFIX + name for name in state} <= set(stored)
    for name, tensor in state.items():
        assert torch.equal(tensor, stored[PREFIX + name])
        assert tensor.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config == TextConfig.from_dict(TINY[kind])
    assert parameter_count(model) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_everything_has_the_dtype_asked_for(e2b: Path, dtype: torch.dtype) -> None:
    model = load_text_model(e2b, dtype=dtype, attention="eager")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert model(random_ids(1, 5)).dtype == dtype
    assert model.attention_backend == "eager"


def test_unasked_the_first_backend_that_serves_is_taken(e2b: Path) -> None:
    assert load_text_model(e2b).attention_backend == "sdpa"


def test_a_backend_that_cannot_serve_is_refused_with_those_that_can(e2b: Path) -> None:
    with pytest.raises(BackendError, match=r"no attention backend 'FLASH_ATTN'; known: sdpa, eager, flex"):
        load_text_model(e2b, attention="FLASH_ATTN")


def test_a_row_of_the_table_decides_what_a_model_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model asks the rule: with a table whose sdpa cannot mix head sizes, it takes or names another."""
    narrow = tuple(
        replace(row, reach=replace(row.reach, mixed_head_sizes=False)) if row.name == "sdpa" else row
        for row in CAPABILITY_TABLE
        if row.engine == "reference"
    )
    rule = backend_choice.resolve_backend
    monkeypatch.setattr(text, "resolve_backend", lambda config, request: rule(config, request, narrow))
    config = TextConfig.from_dict(TINY["e2b"])
    assert len(set(config.head_dims)) == 2
    with torch.device("meta"), pytest.raises(BackendError, match=r"sdpa cannot mix .*can serve: eager, flex"):
        TextModel(config, "sdpa")


def test_the_backend_is_read_from_the_layers(e2b: Path) -> None:
    model = load_text_model(e2b, attention="eager")
    model.layers[1].self_attn.backend = "flex"
    assert model.attention_backend == "eager, flex"


@pytest.mark.parametrize("kind", TINY)
def test_nothing_is_left_unfilled(kind: str, tmp_path: Path) -> None:
    """No parameter or buffer stays on the meta device or as allocated, in the loader and over poison."""
    loaded = load_text_model(written(TINY[kind], tmp_path))
    poisoned = TextModel(TextConfig.from_dict(TINY[kind]))
    for tensor in [*poisoned.parameters(), *poisoned.buffers()]:
        tensor.data.fill_(torch.nan)
    assign(poisoned, tensors(TINY[kind]), "the test")
    for model in (loaded, poisoned):
        everything = dict([*model.named_parameters(), *model.named_buffers()])
        # Whatever is not in the state dictionary could not have been loaded.
        assert set(everything) == set(model.state_dict())
        for tensor in everything.values():
            assert tensor.device.type == "cpu"
            assert tensor.isfinite().all()
        assert model(random_ids(1, 30)).isfinite().all()


def test_random_checkpoints_are_seeded_by_name_and_off_neutral(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 1), (again, 1), (other, 2)):
        folder.mkdir()
        write_checkpoint(MOE, folder, seed=seed)
    one, same, different = (load_file(folder / "model.safetensors") for folder in (first, again, other))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], different[name]) for name in one)
    for tensor in one.values():
        # Neither of the values that leave a computation as it is.
        assert not (tensor == 1).all()
        assert not (tensor == 0).any()
    assert json.loads((first / "config.json").read_text(encoding="utf-8")) == MOE
    assert {PREFIX + name: shape for name, shape in shapes(TextConfig.from_dict(MOE))} == {
        name: tuple(tensor.shape) for name, tensor in one.items()
    }


# ------------------------------------------------------------------------------------------- other names


def test_a_text_only_checkpoint_has_a_shorter_prefix(e2b: Path) -> None:
    expected = load_text_model(e2b).state_dict()

    def rename(stored: Weights) -> None:
        for name in list(stored):
            stored["model." + name.removeprefix(PREFIX)] = stored.pop(name)

    edit(e2b, rename)
    state = load_text_model(e2b).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_an_untied_head_is_needed_and_a_tied_one_refused(tmp_path: Path) -> None:
    untied = {**DENSE, "tie_word_embeddings": False}
    head = torch.randn(96, 48, generator=torch.Generator().manual_seed(9))
    folder = written(DENSE, tmp_path)
    (folder / "config.json").write_text(json.dumps(untied), encoding="utf-8")
    assert "1 missing: lm_head.weight" in refusal(folder)
    edit(folder, lambda stored: stored.update({"lm_head.weight": head}))
    model = load_text_model(folder)
    hidden = model(random_ids(1, 4))
    raw = hidden @ head.T
    assert torch.allclose(model.logits(hidden), 30 * torch.tanh(raw / 30), atol=1e-5)
    (folder / "config.json").write_text(json.dumps(DENSE), encoding="utf-8")
    assert "1 unused: lm_head.weight" in refusal(folder)


TOWERS = (
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
    "model.vision_tower.std_bias",
    "model.audio_tower.layers.0.norm_out.weight",
    "model.embed_vision.embedding_projection.weight",
    "model.embed_audio.embedding_projection.weight",
    "model.vision_embedder.patch_dense.weight",
)


def test_towers_and_projectors_are_passed_over(e2b: Path) -> None:
    edit(e2b, lambda stored: stored.update({name: torch.ones(3) for name in TOWERS}))
    state = load_text_model(e2b).state_dict()
    assert all(torch.equal(tensor, tensors(E2B)[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    "name", ["model.vision_towers.std_bias", "model.embed_video.weight", "model.depth_tower.weight", "weird"]
)
def test_other_parts_are_not_passed_over(e2b: Path, name: str) -> None:
    edit(e2b, lambda stored: stored.update({name: torch.ones(3)}))
    assert f"1 unused: {name}" in refusal(e2b)


# ---------------------------------------------------------------------------------- tensors that do not fit


def test_all_that_does_not_fit_is_named_at_once(e2b: Path) -> None:
    def break_it(stored: Weights) -> None:
        del stored[PREFIX + "layers.2.layer_scalar"]
        stored[PREFIX + "layers.2.mlp.extra.weight"] = torch.ones(2)
        stored[PREFIX + "norm.weight"] = torch.ones(47)

    edit(e2b, break_it)
    message = refusal(e2b)
    assert "1 missing: layers.2.layer_scalar" in message
    assert "1 unused: layers.2.mlp.extra.weight" in message
    assert "1 misshapen: norm.weight is [47], the configuration asks for [48]" in message


@pytest.mark.parametrize("kind", TINY)
def test_any_one_missing_tensor_is_named(kind: str) -> None:
    config = TextConfig.from_dict(TINY[kind])
    with torch.device("meta"):
        model = TextModel(config)
    for name in model.state_dict():
        weights = tensors(TINY[kind])
        del weights[name]
        with pytest.raises(CheckpointError, match=f"1 missing: {name}$"):
            assign(model, weights, "the test")


def test_many_names_are_cut_short(e2b: Path) -> None:
    edit(e2b, lambda stored: [stored.pop(name) for name in list(stored) if "layernorm" in name])
    message = refusal(e2b)
    assert "40 missing: layers.0.input_layernorm.weight, " in message
    assert message.endswith("and 32 more")


def test_a_transposed_matrix_is_misshapen(e2b: Path) -> None:
    name = "layers.0.mlp.gate_proj.weight"
    edit(e2b, lambda stored: stored.update({PREFIX + name: stored[PREFIX + name].T.contiguous()}))
    assert f"1 misshapen: {name} is [48, 40], the configuration asks for [40, 48]" in refusal(e2b)


def test_a_doubled_tensor_is_refused(e2b: Path) -> None:
    """With and without prefix: one of the two would be dropped in silence."""
    edit(e2b, lambda stored: stored.update({"norm.weight": torch.ones(48)}))
    assert "norm.weight" in refusal(e2b)


# -------------------------------------------------------------------------------------------- dead tensors


def test_dead_tensors_are_those_of_shared_layers() -> None:
    config = TextConfig.from_dict(E2B)
    for part in ("k_proj", "v_proj", "k_norm"):
        name = f"self_attn.{part}.weight"
        assert [i for i in range(12) if is_dead(f"layers.{i}.{name}", config)] == [5, 6, 7, 8, 9]
        assert not is_dead(f"xlayers.5.{name}", config)
        assert not is_dead(f"layers.5.{name}.scale", config)
    for part in ("q_proj", "o_proj", "q_norm", "v_norm"):
        assert not is_dead(f"layers.5.self_attn.{part}.weight", config)
    assert not is_dead("layers.5.k_proj.weight", config)


def test_a_checkpoint_with_and_without_dead_tensors_loads(e2b: Path) -> None:
    stored = load_file(e2b / "model.safetensors")
    config = TextConfig.from_dict(E2B)
    dead = [name for name in stored if is_dead(name.removeprefix(PREFIX), config)]
    assert len(dead) == 15
    before = load_text_model(e2b)(random_ids(1, 9))
    edit(e2b, lambda weights: [weights.pop(name) for name in dead])
    assert torch.equal(load_text_model(e2b)(random_ids(1, 9)), before)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (E2B, "layers.10.self_attn.k_proj.weight"),
        (E2B, "layers.7.self_attn.v_norm.weight"),
        (E2B, "layers.7.mlp.k_proj.weight"),
        (DENSE, "layers.2.self_attn.v_proj.weight"),
        ({**E2B, "num_kv_shared_layers": 0}, "layers.5.self_attn.v_proj.bias"),
    ],
    ids=["no-such-layer", "no-weight-at-all", "elsewhere", "keys-are-values", "bias"],
)
def test_the_same_names_elsewhere_are_refused(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    folder = written(config, tmp_path)
    edit(folder, lambda stored: stored.update({PREFIX + name: torch.ones(4)}))
    assert f"1 unused: {name}" in refusal(folder)


# -------------------------------------------------------------------------------------------------- files


def shard(folder: Path, parts: int) -> None:
    """Split the tensors over several files with an index, as large checkpoints are."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(stored)}
    for part in set(places.values()):
        save_file({name: stored[name] for name in stored if places[name] == part}, folder / part)
    write_index(folder, places)


def write_index(folder: Path, places: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def test_shards_load_as_one_file_does(e2b: Path) -> None:
    expected = load_text_model(e2b).state_dict()
    shard(e2b, 3)
    state = load_text_model(e2b).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_missing_shard_is_named(e2b: Path) -> None:
    shard(e2b, 3)
    (e2b / "model-00002-of-00003.safetensors").unlink()
    assert "weights are missing" in (message := refusal(e2b))
    assert "model-00002-of-00003.safetensors" in message
    assert "model-00001-of-00003.safetensors" not in message


def test_a_tensor_in_two_shards_is_refused(e2b: Path) -> None:
    """Which of the two counts would depend on the order of files."""
    shard(e2b, 2)
    file = e2b / "model-00002-of-00002.safetensors"
    both = {**load_file(file), PREFIX + "norm.weight": torch.ones(48)}
    first = load_file(e2b / "model-00001-of-00002.safetensors")
    both.update({name: tensor * 2 for name, tensor in list(first.items())[:1]})
    save_file(both, file)
    refusal(e2b)


@pytest.mark.parametrize("where", ["../elsewhere", "deeper", "absolute"])
def test_an_index_cannot_name_files_outside_its_folder(where: str, tmp_path: Path) -> None:
    folder = written(E2B, tmp_path / "folder")
    other = (tmp_path / "elsewhere") if where != "deeper" else folder / "deeper"
    written(E2B, other)
    place = str(other) if where == "absolute" else where
    names = list(load_file(other / "model.safetensors"))
    write_index(folder, dict.fromkeys(names, f"{place}/model.safetensors"))
    assert "model.safetensors" in refusal(folder)


INDEXES: dict[str, Callable[[Path], object]] = {
    "no-json": lambda path: path.write_text("{", encoding="utf-8"),
    "no-utf-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "a-list": lambda path: path.write_text("[]", encoding="utf-8"),
    "no-map": lambda path: path.write_text("{}", encoding="utf-8"),
    "map-of-lists": lambda path: path.write_text('{"weight_map": {"a": []}}', encoding="utf-8"),
    "map-no-mapping": lambda path: path.write_text('{"weight_map": [1]}', encoding="utf-8"),
    "a-folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("write", INDEXES.values(), ids=INDEXES)
def test_a_broken_index_is_named(write: Callable[[Path], object], e2b: Path) -> None:
    write(e2b / INDEX)
    message = refusal(e2b)
    assert INDEX in message
    assert "is no index of safetensors files" in message


def test_an_empty_index_loads_nothing(e2b: Path) -> None:
    write_index(e2b, {})
    assert "missing: " in refusal(e2b)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64], ids=["empty", "text", "length"])
def test_a_broken_file_is_named(content: bytes, e2b: Path) -> None:
    (e2b / "model.safetensors").write_bytes(content)
    message = refusal(e2b)
    assert "model.safetensors: cannot be read as safetensors" in message


def test_a_truncated_file_is_named(e2b: Path) -> None:
    file = e2b / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    assert "cannot be read as safetensors" in refusal(e2b)


def test_a_folder_without_weights_or_configuration_is_refused(e2b: Path) -> None:
    (e2b / "model.safetensors").unlink()
    assert "weights are missing" in refusal(e2b)
    (e2b / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        load_text_model(e2b)


def test_integer_weights_are_refused(e2b: Path) -> None:
    """Quantised weights without their scales would load as numbers that mean something else."""
    name = PREFIX + "layers.0.mlp.up_proj.weight"
    edit(e2b, lambda stored: stored.update({name: (stored[name] * 100).to(torch.int8)}))
    assert "up_proj" in refusal(e2b)
