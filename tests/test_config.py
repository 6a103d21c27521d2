"""Reading configurations: both ways of writing them, the rules between keys, refusals, parameter counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_impl.checkpoint import parameter_count
from model_impl.config import TextConfig
from model_impl.errors import ConfigError
from model_impl.text import TextModel
from tests.data.published_configs import SIZES, e2b_config, text_config
from tests.model_configs import DENSE, E2B, FULL, MOE, SLIDING, TINY


def load(**changes: Any) -> TextConfig:
    """The E2B-like configuration with changes; None removes a key."""
    merged = {**E2B, **changes}
    return TextConfig.from_dict({key: value for key, value in merged.items() if value is not None})


def new_form(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers saves it: heads by layer number, global keys gone."""
    gone = ("global_head_dim", "num_global_key_value_heads")
    own: dict[str, Any] = {"head_dim": config["global_head_dim"]}
    if config.get("attention_k_eq_v"):
        own["num_key_value_heads"] = config["num_global_key_value_heads"]
    full = [str(i) for i, kind in enumerate(config["layer_types"]) if kind == FULL]
    kept = {key: value for key, value in config.items() if key not in gone}
    written: dict[str, Any] = json.loads(json.dumps({**kept, "per_layer_config": dict.fromkeys(full, own)}))
    return written


# --------------------------------------------------------------------------------- two ways of writing it


@pytest.mark.parametrize("config", [*TINY.values(), *map(text_config, SIZES)], ids=[*TINY, *SIZES])
def test_both_serialisations_load_equal(config: dict[str, Any]) -> None:
    old, new = TextConfig.from_dict(config), TextConfig.from_dict(new_form(config))
    assert old == new
    assert {layer.head_dim for layer in new.layers if layer.kind == FULL} == {config["global_head_dim"]}
    assert {layer.head_dim for layer in new.layers if layer.kind == SLIDING} == {config["head_dim"]}


def test_per_layer_config_is_believed_without_attention_k_eq_v() -> None:
    own = {"4": {"head_dim": 32, "num_key_value_heads": 2}, "9": {"head_dim": 32, "num_key_value_heads": 2}}
    config = load(global_head_dim=None, per_layer_config=own)
    assert [layer.num_kv_heads for layer in config.layers] == [1, 1, 1, 1, 2] * 2
    assert [layer.head_dim for layer in config.layers] == [16, 16, 16, 16, 32] * 2


def test_layers_that_per_layer_config_leaves_out_have_the_common_heads() -> None:
    config = load(global_head_dim=64, per_layer_config={})
    assert set(config.head_dims) == {16}


def test_a_whole_model_s_file_is_read_by_its_text_part(tmp_path: Path) -> None:
    whole = e2b_config()
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    config = TextConfig.from_file(tmp_path / "config.json")
    assert config == TextConfig.from_dict(text_config("E2B"))
    assert (config.hidden_size, len(config.layers), config.rope[SLIDING].theta) == (1536, 35, 10_000.0)
    assert config.max_position_embeddings == 131_072


def test_tying_is_read_from_the_whole_file_where_the_text_part_is_silent() -> None:
    text = {key: value for key, value in E2B.items() if key != "tie_word_embeddings"}
    assert TextConfig.from_dict(text).tie_word_embeddings
    assert not TextConfig.from_dict({"text_config": text, "tie_word_embeddings": False}).tie_word_embeddings
    assert TextConfig.from_dict({"text_config": E2B, "tie_word_embeddings": False}).tie_word_embeddings


# ------------------------------------------------------------------------------------- rules between keys


def test_global_key_value_heads_count_only_where_keys_are_values() -> None:
    off = TextConfig.from_dict({**DENSE, "attention_k_eq_v": False})
    assert {layer.num_kv_heads for layer in off.layers} == {4}
    assert not any(layer.keys_are_values for layer in off.layers)
    on = TextConfig.from_dict(DENSE)
    assert [layer.num_kv_heads for layer in on.layers] == [4, 4, 2] * 2
    assert [layer.keys_are_values for layer in on.layers] == [False, False, True] * 2
    absent = TextConfig.from_dict({**DENSE, "num_global_key_value_heads": None})
    assert {layer.num_kv_heads for layer in absent.layers} == {4}


def test_the_last_layer_is_full_whatever_the_pattern_says() -> None:
    config = load(num_hidden_layers=4, layer_types=[SLIDING] * 4, num_kv_shared_layers=0)
    assert [layer.kind for layer in config.layers] == [SLIDING] * 3 + [FULL]
    assert config.layers[-1].head_dim == 32


@pytest.mark.parametrize(("count", "full"), [(12, {5, 11}), (13, {5, 11, 12}), (4, {3})])
def test_without_layer_types_every_sixth_layer_is_full(count: int, full: set[int]) -> None:
    config = load(layer_types=None, num_hidden_layers=count, num_kv_shared_layers=0)
    assert {layer.index for layer in config.layers if layer.kind == FULL} == full


def test_defaults_of_absent_keys() -> None:
    config = load(global_head_dim=None, rope_parameters=None, rms_norm_eps=None, final_logit_softcapping=None)
    assert {layer.head_dim for layer in config.layers if layer.kind == FULL} == {512}
    assert (config.rope[SLIDING].theta, config.rope[SLIDING].rotated) == (10_000.0, 1.0)
    assert (config.rope[FULL].theta, config.rope[FULL].rotated) == (1_000_000.0, 0.25)
    assert config.rms_norm_eps == 1e-6
    assert config.final_logit_softcapping is None


def test_the_caller_s_dictionary_is_left_alone() -> None:
    raw = {**E2B, "layer_types": [SLIDING] * 10}
    before = json.dumps(raw)
    TextConfig.from_dict(raw)
    assert json.dumps(raw) == before


def test_optional_parts_are_there_only_where_asked_for() -> None:
    e2b, dense, moe = map(TextConfig.from_dict, (E2B, DENSE, MOE))
    assert e2b.per_layer_inputs is not None
    assert (e2b.per_layer_inputs.width, e2b.per_layer_inputs.vocab_size) == (12, 96)
    # The table has a row for every token where its size is left out.
    assert load(vocab_size_per_layer_input=None).per_layer_inputs == e2b.per_layer_inputs
    assert dense.per_layer_inputs is None
    assert e2b.moe is None
    assert moe.moe is not None
    assert (moe.moe.num_experts, moe.moe.top_k, moe.moe.intermediate_size) == (8, 3, 20)
    assert dense.bidirectional_images
    assert not e2b.bidirectional_images


# -------------------------------------------------------------------------------------- sharing and width


@pytest.mark.parametrize(
    ("name", "first", "sliding", "full"), [("E2B", 15, 13, 14), ("E4B", 24, 22, 23)], ids=["E2B", "E4B"]
)
def test_shared_layers_read_the_last_owner_of_their_kind(
    name: str, first: int, sliding: int, full: int
) -> None:
    layers = TextConfig.from_dict(text_config(name)).layers
    assert [layer.index for layer in layers if layer.shares_kv] == list(range(first, len(layers)))
    for layer in layers:
        expected = layer.index if layer.index < first else {SLIDING: sliding, FULL: full}[layer.kind]
        assert layer.kv_source == expected


@pytest.mark.parametrize("name", ["12B", "26B-A4B", "31B"])
def test_large_models_share_nothing(name: str) -> None:
    layers = TextConfig.from_dict(text_config(name)).layers
    assert not any(layer.shares_kv for layer in layers)
    assert {layer.kind for layer in layers if layer.keys_are_values} == {FULL}


@pytest.mark.parametrize(
    ("shared", "sources"),
    [
        (0, [0, 1, 2, 3]),
        (2, [0, 1, 0, 1]),
        (3, [0, 1, 0, 3]),  # no full layer owns anything: the last keeps its own
        (4, [0, 1, 2, 3]),  # nothing is left to share from
    ],
)
def test_sharing_falls_back_to_own_keys_and_values(shared: int, sources: list[int]) -> None:
    config = load(
        num_hidden_layers=4, layer_types=[SLIDING, FULL, SLIDING, FULL], num_kv_shared_layers=shared
    )
    assert [layer.kv_source for layer in config.layers] == sources
    with torch.device("meta"):
        model = TextModel(config)
    has_own = [hasattr(layer.self_attn, "k_proj") for layer in model.layers]
    assert has_own == [source == index for index, source in enumerate(sources)]


def test_doubled_mlps_are_those_of_shared_layers_with_the_flag() -> None:
    assert [layer.intermediate_size for layer in load().layers] == [40] * 5 + [80] * 5
    assert {layer.intermediate_size for layer in load(use_double_wide_mlp=False).layers} == {40}
    assert {layer.intermediate_size for layer in load(num_kv_shared_layers=0).layers} == {40}
    real = TextConfig.from_dict(text_config("E2B")).layers
    assert [layer.intermediate_size for layer in real] == [6144] * 15 + [12_288] * 20
    with torch.device("meta"):
        model = TextModel(load())
    assert [model.layers[i].mlp.up_proj.weight.shape[0] for i in (4, 5)] == [40, 80]


# ---------------------------------------------------------------------------------------- parameter counts


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = TextModel(TextConfig.from_dict(text_config(name)))
    assert round(parameter_count(model) / 1e9, 3) == SIZES[name].text_parameters


def test_a_published_model_has_the_published_shapes() -> None:
    shapes: dict[str, dict[str, list[int]]] = {
        "E2B": {
            "embed_tokens_per_layer.weight": [262_144, 8960],
            "per_layer_model_projection.weight": [8960, 1536],
            "layers.0.self_attn.q_proj.weight": [2048, 1536],
            "layers.4.self_attn.q_proj.weight": [4096, 1536],
            "layers.0.self_attn.v_proj.weight": [256, 1536],
            "layers.4.self_attn.k_proj.weight": [512, 1536],
            "layers.15.mlp.down_proj.weight": [1536, 12_288],
        },
        "26B-A4B": {
            "layers.5.self_attn.q_proj.weight": [8192, 2816],
            "layers.0.self_attn.k_proj.weight": [2048, 2816],
            "layers.5.self_attn.k_proj.weight": [1024, 2816],
            "layers.0.experts.gate_up_proj": [128, 1408, 2816],
            "layers.0.experts.down_proj": [128, 2816, 704],
            "layers.0.router.per_expert_scale": [128],
        },
    }
    for name, expected in shapes.items():
        with torch.device("meta"):
            state = TextModel(TextConfig.from_dict(text_config(name))).state_dict()
        assert {key: list(state[key].shape) for key in expected} == expected
        assert "lm_head.weight" not in state
    assert "layers.5.self_attn.v_proj.weight" not in state


# --------------------------------------------------------------------------------------------- refusals

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "sliding_window",
)  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    config = {name: value for name, value in E2B.items() if name != key}
    with pytest.raises(ConfigError, match=f"does not fit: {key}: Field required$"):
        TextConfig.from_dict(config)


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=": Field required.*".join(REQUIRED)):
        TextConfig.from_dict({})


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = E2B["rope_parameters"]
    return {**parameters, kind: {**parameters[kind], **changes}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_activation": "gelu"}, r"hidden_activation: .*'gelu_pytorch_tanh', found gelu"),
    "bias": ({"attention_bias": True}, r"attention_bias: .*False.*, found True"),
    "all-bidirectional": (
        {"use_bidirectional_attention": "all"},
        r"use_bidirectional_attention: .*'vision'.*, found all",
    ),
    "attention-softcap": ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping: .*None, found 50\.0"),
    "too-many-shared": ({"num_kv_shared_layers": 11}, r"num_kv_shared_layers is 11, above .* 10"),
    "odd-head-dim": ({"head_dim": 15}, r"layer 0: head_dim 15 must be even"),
    "odd-global-head-dim": ({"global_head_dim": 33}, r"layer 4: head_dim 33 must be even"),
    "heads-not-multiple": ({"num_key_value_heads": 3}, r"num_attention_heads 4 a multiple of its 3"),
    "too-few-types": (
        {"layer_types": [SLIDING, FULL]},
        r"must name 10 layers.*names 2",
    ),
    "unknown-type": (
        {"layer_types": ["chunked_attention"] * 10},
        r"layer_types\.0: .*'full_attention', found chunked_attention",
    ),
    "per-layer-key": (
        {"per_layer_config": {"4": {"sliding_window": 4}}},
        r"per_layer_config\.4\.sliding_window: Extra",
    ),
    "rope-type": (
        {"rope_parameters": rope(FULL, rope_type="yarn")},
        r"full_attention\.rope_type: .*'proportional', found yarn",
    ),
    "rope-factor": (
        {"rope_parameters": rope(SLIDING, factor=8.0)},
        r"sliding_attention\.factor: .*1 or None, found 8\.0",
    ),
    "moe-incomplete": (
        {"enable_moe_block": True, "num_experts": 8},
        r"lacks top_k_experts, moe_intermediate_size",
    ),
    "moe-top-k": (
        {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 9, "moe_intermediate_size": 4},
        r"top_k_experts 9 is above num_experts 8",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**changes)


MALFORMED: dict[str, dict[str, Any]] = {
    "no-kv-heads": {"num_key_value_heads": 0},
    "no-layers": {"num_hidden_layers": 0, "layer_types": None, "num_kv_shared_layers": 0},
    "negative-shared": {"num_kv_shared_layers": -1},
    "no-window": {"sliding_window": 0},
    "text-for-number": {"hidden_size": "48"},
    "types-no-list": {"layer_types": 7},
    "per-layer-no-mapping": {"per_layer_config": [{"head_dim": 32}]},
    "per-layer-mixes-a-kind": {"per_layer_config": {"4": {"head_dim": 32}, "9": {"head_dim": 16}}},
    "per-layer-out-of-range": {"per_layer_config": {"4": {"head_dim": 32}, "10": {"head_dim": 32}}},
    "rope-without-a-kind": {"rope_parameters": {SLIDING: E2B["rope_parameters"][SLIDING]}},
    "rope-without-theta": {"rope_parameters": {**E2B["rope_parameters"], FULL: {"rope_type": "default"}}},
    "rope-flat": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_malformed_values_are_configuration_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load(**changes)


def test_a_text_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError):
        TextConfig.from_dict({"text_config": [1]})


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "cannot be read as JSON"),
    "a-folder": (lambda path: path.mkdir(), "cannot be read as JSON"),
    "no-json": (lambda path: path.write_text("{", encoding="utf-8"), "cannot be read as JSON"),
    "no-utf-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "cannot be read as JSON"),
    "a-list": (lambda path: path.write_text("[]", encoding="utf-8"), "expected a JSON object, found list"),
}


@pytest.mark.parametrize(("write", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files_are_named(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write(path)
    with pytest.raises(ConfigError, match=message) as caught:
        TextConfig.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "said", "opened"),
    [
        ("gemma4_text", {}, False),
        ("gemma4_unified_text", {}, True),  # the default of its class in transformers
        ("gemma4_unified_text", {"use_bidirectional_attention": None}, False),
        ("gemma4_text", {"use_bidirectional_attention": "vision"}, True),
    ],
)
def test_where_image_attention_is_left_out_the_models_class_says(
    model_type: str, said: dict[str, str | None], opened: bool
) -> None:
    raw = {key: value for key, value in DENSE.items() if key != "use_bidirectional_attention"}
    assert TextConfig.from_dict(raw | said | {"model_type": model_type}).bidirectional_images is opened
