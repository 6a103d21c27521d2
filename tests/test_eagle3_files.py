"""Eagle3 draft heads: configuration, tensors, loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_impl.checkpoint import parameter_count
from model_impl.errors import CheckpointError, ConfigError
from model_impl.layers.backend_choice import BackendError
from model_impl.speculative.eagle3 import Eagle3, load_eagle3
from model_impl.speculative.eagle3_config import Eagle3Config, default_aux_layers
from tests import draft_models
from tests.draft_models import (
    EAGLE3_31B,
    TINY_EAGLE3,
    eagle3_on_meta,
    random_weights,
    target_states,
    tiny_eagle3,
)
from tests.model_configs import random_ids

AUX = "eagle_aux_hidden_state_layer_ids"


# --------------------------------------------------------------------------------------------- published one


def test_the_published_draft_head_has_the_published_tensors() -> None:
    model = eagle3_on_meta(EAGLE3_31B)
    state = model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        "embed_tokens.weight": [262_144, 5376],
        "fc.weight": [5376, 16_128],
        "layers.0.input_layernorm.weight": [5376],
        "layers.0.hidden_norm.weight": [5376],
        "layers.0.post_attention_layernorm.weight": [5376],
        "layers.0.self_attn.q_proj.weight": [8192, 10_752],
        "layers.0.self_attn.k_proj.weight": [4096, 10_752],
        "layers.0.self_attn.v_proj.weight": [4096, 10_752],
        "layers.0.self_attn.o_proj.weight": [5376, 8192],
        "layers.0.mlp.gate_proj.weight": [21_504, 5376],
        "layers.0.mlp.up_proj.weight": [21_504, 5376],
        "layers.0.mlp.down_proj.weight": [5376, 21_504],
        "norm.weight": [5376],
        "lm_head.weight": [32_000, 5376],
        "d2t": [32_000],
        "t2d": [262_144],
    }
    assert (state["d2t"].dtype, state["t2d"].dtype) == (torch.int64, torch.bool)
    # Worked out by hand: 1,409,286,144 embedding, 86,704,128 fc, 220,200,960 attention, 346,816,512 MLP,
    # 4 x 5376 norms, 172,032,000 head.
    assert parameter_count(model) == 2_235_061_248


def test_the_published_configuration_is_read() -> None:
    config = Eagle3Config.from_dict(EAGLE3_31B, target_layers=60)
    assert config.aux_layers == (2, 30, 57)
    assert config.target_hidden_size == 5376
    assert config.norm_before_residual
    assert not config.norm_before_fc
    (layer,) = config.decoder.layers
    assert (layer.head_dim, layer.num_kv_heads, layer.kv_source) == (256, 16, 0)
    assert config.decoder.rope["full_attention"].theta == 10_000.0


# ---------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(("layers", "expected"), [(60, (2, 30, 57)), (30, (2, 15, 27)), (7, (2, 3, 4))])
def test_the_default_layers_follow_the_target(layers: int, expected: tuple[int, ...]) -> None:
    for config in (tiny_eagle3(**{AUX: None}), tiny_eagle3(**{AUX: "absent"})):
        assert Eagle3Config.from_dict(config, target_layers=layers).aux_layers == expected
    assert default_aux_layers(layers) == expected


@pytest.mark.parametrize("layers", [None, 4, 60])
def test_named_layers_are_taken_and_may_reach_from_the_first_to_the_last_state(layers: int | None) -> None:
    config = Eagle3Config.from_dict(tiny_eagle3(**{AUX: [0, 2, 3, 4]}), target_layers=layers)
    assert config.aux_layers == (0, 2, 3, 4)
    with torch.device("meta"):
        assert Eagle3(config).fc.weight.shape == (24, 40)


def test_older_and_sparser_forms_are_read() -> None:
    config = Eagle3Config.from_dict(tiny_eagle3())
    assert Eagle3Config.from_dict(tiny_eagle3(rope_parameters="absent", rope_theta=10_000.0)) == config
    assert Eagle3Config.from_dict(tiny_eagle3(head_dim="absent")).decoder.head_dims == (6,)
    assert Eagle3Config.from_dict(tiny_eagle3(target_hidden_size=None)).target_hidden_size == 24


REFUSED: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "duplicate-ids": ({AUX: [1, 1, 2]}, None, r"\[1, 1, 2\] must be distinct and ascending"),
    "descending-ids": ({AUX: [4, 3, 1]}, None, r"\[4, 3, 1\] must be distinct and ascending"),
    "no-ids": ({AUX: []}, None, r"\[\] must be distinct"),
    "negative-id": ({AUX: [-1, 3]}, None, r"\[-1, 3\] must lie from 0;"),
    "id-beyond": (
        {AUX: [1, 3, 5]},
        4,
        r"\[1, 3, 5\] must lie from 0 to 4, the number of the target's layers",
    ),
    "ids-no-numbers": ({AUX: [1, "3"]}, None, rf"{AUX}\.1: .*, found 3"),
    "no-default": ({AUX: None}, None, rf"{AUX} is missing; name the layers"),
    "default-collapses": ({AUX: None}, 6, r"\[2, 3, 3\], the default for 6 layers, must be distinct"),
    "activation": ({"hidden_act": "gelu"}, None, r"hidden_act: .*'silu', found gelu"),
    "another-kind": ({"speculators_model_type": "dflash"}, None, r"speculators_model_type: .*found dflash"),
    "another-layer": ({"model_type": "qwen3"}, None, r"model_type: .*'llama', found qwen3"),
    "two-layers": ({"num_hidden_layers": 2}, None, r"num_hidden_layers: .*found 2"),
    "bias": ({"attention_bias": True}, None, r"attention_bias: .*found True"),
    "mlp-bias": ({"mlp_bias": True}, None, r"mlp_bias: .*found True"),
    "norm-of-chunks": ({"fc_norm": True}, None, r"fc_norm: .*found True"),
    "normed-output": ({"norm_output": True}, None, r"norm_output: .*found True"),
    "tied": ({"tie_word_embeddings": True}, None, r"tie_word_embeddings: .*found True"),
    "no-residual-rule": ({"norm_before_residual": "absent"}, None, r"norm_before_residual: Field required"),
    "draft-vocabulary": ({"draft_vocab_size": 97}, None, r"draft_vocab_size 97 is above vocab_size 96"),
    "rope-type": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        None,
        r"rope_type: .*'default', found llama3",
    ),
    "rope-scaling": ({"rope_scaling": {"factor": 2.0}}, None, r"rope_scaling: "),
    "no-rope": ({"rope_parameters": "absent"}, None, r"neither rope_parameters nor rope_theta"),
    "heads-not-multiple": ({"num_key_value_heads": 3}, None, r"num_attention_heads 4 a multiple of .* 3"),
    "odd-head-dim": ({"head_dim": 7}, None, r"head_dim 7 must be even"),
}


@pytest.mark.parametrize(("changes", "layers", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrong_is_refused(
    changes: dict[str, Any], layers: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Eagle3Config.from_dict(tiny_eagle3(**changes), target_layers=layers)


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"Eagle3 configuration does not fit: .*required.*required.*required"
    ):
        Eagle3Config.from_dict({})


# --------------------------------------------------------------------------------------------------- loading


def written(
    folder: Path,
    change: Callable[[dict[str, Tensor]], object] = lambda weights: None,
    config: Mapping[str, Any] = TINY_EAGLE3,
) -> Path:
    weights = random_weights(eagle3_on_meta(TINY_EAGLE3))
    change(weights)
    return draft_models.write(config, weights, folder)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_eagle3(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_written_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_eagle3(written(tmp_path), dtype=dtype, attention="eager")
    for name, tensor in random_weights(eagle3_on_meta(TINY_EAGLE3)).items():
        loaded = model.state_dict()[name]
        assert loaded.dtype == {"d2t": torch.int64, "t2d": torch.bool}.get(name, dtype)
        assert torch.equal(loaded, tensor.to(loaded.dtype))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.layers[0].self_attn.backend == "eager"
    features = model.features([state.to(dtype) for state in target_states(1, 3)])
    hidden, _ = model(random_ids(1, 3), features, cache=model.make_cache(1))
    assert model.logits(hidden).dtype == dtype


def test_backends_are_chosen_by_the_rule(tmp_path: Path) -> None:
    assert load_eagle3(written(tmp_path)).layers[0].self_attn.backend == "sdpa"
    with pytest.raises(BackendError, match="no attention backend 'FLASH_ATTN'; known: sdpa"):
        load_eagle3(tmp_path, attention="FLASH_ATTN")


def test_older_names_of_the_layer_load(tmp_path: Path) -> None:
    def rename(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.startswith("layers.0.")]:
            weights[name.replace("layers.0.", "midlayer.")] = weights.pop(name)

    assert not any(name.startswith("layers") for name in _names(written(tmp_path / "old", rename)))
    old, new = load_eagle3(tmp_path / "old"), load_eagle3(written(tmp_path / "new"))
    assert all(torch.equal(old.state_dict()[name], tensor) for name, tensor in new.state_dict().items())


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return list(opened.keys())


def test_the_layer_under_both_names_is_refused(tmp_path: Path) -> None:
    name = "mlp.up_proj.weight"
    folder = written(tmp_path, lambda w: w.update({f"midlayer.{name}": w[f"layers.0.{name}"].clone()}))
    assert "is there twice" in refusal(folder)


def test_the_default_layers_need_the_target_when_loading(tmp_path: Path) -> None:
    folder = written(tmp_path, config=tiny_eagle3(**{AUX: None}))
    with pytest.raises(ConfigError, match="tell how many the target has"):
        load_eagle3(folder)
    assert load_eagle3(folder, target_layers=30).config.aux_layers == (2, 15, 27)


def test_any_one_missing_tensor_is_named(tmp_path: Path) -> None:
    for name in random_weights(eagle3_on_meta(TINY_EAGLE3)):
        assert f"1 missing: {name}" in refusal(written(tmp_path, lambda w, name=name: w.pop(name)))  # type: ignore[misc]


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["input_norm.weight"] = torch.ones(30)
        weights["fc.weight"] = torch.ones(24, 20)
        del weights["d2t"]

    message = refusal(written(tmp_path, change))
    assert "1 missing: d2t" in message
    assert "1 unused: input_norm.weight" in message
    assert "1 misshapen: fc.weight is [24, 20], the configuration asks for [24, 30]" in message


MAPPINGS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "absolute-ids": (
        lambda w: w.update({"d2t": w["d2t"] + torch.arange(20)}),
        "d2t leads beyond the vocabulary of 96 tokens|t2d does not mark the tokens that d2t leads to",
    ),
    "beyond": (
        lambda w: w.update({"d2t": torch.full((20,), 77)}),
        "d2t leads beyond the vocabulary of 96 tokens",
    ),
    "negative": (
        lambda w: w.update({"d2t": torch.full((20,), -1)}),
        "d2t leads beyond the vocabulary of 96 tokens",
    ),
    "no-marks": (
        lambda w: w.update({"t2d": torch.zeros(96, dtype=torch.bool)}),
        "t2d does not mark the tokens that d2t leads to",
    ),
    "same-token": (
        lambda w: w.update({"d2t": -torch.arange(20), "t2d": torch.arange(96) == 0}),
        "d2t leads to the same token twice",
    ),
    "float-offsets": (
        lambda w: w.update({"d2t": w["d2t"].float()}),
        "d2t is torch.float32, which cannot hold every token id; store it as torch.int64",
    ),
    "quantised": (
        lambda w: w.update({"fc.weight": w["fc.weight"].to(torch.int8)}),
        "fc.weight is torch.int8; quantised weights are not supported",
    ),
}


@pytest.mark.parametrize(("change", "message"), MAPPINGS.values(), ids=MAPPINGS)
def test_wrong_numbers_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    refused = refusal(written(tmp_path, change))
    assert any(part in refused for part in message.split("|"))


def test_marks_as_bytes_load(tmp_path: Path) -> None:
    model = load_eagle3(written(tmp_path, lambda w: w.update({"t2d": w["t2d"].to(torch.uint8)})))
    assert torch.equal(model.t2d, random_weights(eagle3_on_meta(TINY_EAGLE3))["t2d"])
