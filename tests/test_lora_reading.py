"""Reading adapters: every tensor gets its place or is named; what would compute something else is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model_impl.config import TextConfig
from model_impl.errors import CheckpointError, ConfigError, ModelError
from model_impl.lora import Adapter, AdapterConfig, MediaMapping, Sites
from model_impl.lora.patterns import Patterns
from model_impl.media_config import MultimodalConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration
from model_impl.text import TextModel
from tests.lora_adapters import WRAPPED, pair, write
from tests.model_configs import DENSE, E2B, MOE
from tests.test_multimodal import CONFIGS

Q = "model.layers.0.self_attn.q_proj"
DEAD = "model.layers.7.self_attn.k_proj"
"""Of a layer of E2B that shares another's keys."""


def sites(config: dict[str, Any]) -> Sites:
    with torch.device("meta"):
        if "text_config" in config:
            return Sites(Gemma4ForConditionalGeneration(MultimodalConfig.from_dict(config)))
        return Sites(TextModel(TextConfig.from_dict(config)))


def settings(**values: Any) -> AdapterConfig:
    return AdapterConfig.from_dict({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **values}, "here")


# ------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, 4.0),
        ({"rank_pattern": {"q_proj": 16}, "use_rslora": True}, 2.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1.0}}, 0.25),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1.0}}, 2.0),
        ({"alpha_pattern": {r".*\.self_attn\..*": 12.0}}, 3.0),
        ({"alpha_pattern": {"proj": 1.0}}, 2.0),
    ],
)
def test_the_scale_of_a_module(values: dict[str, Any], expected: float) -> None:
    assert settings(target_modules=["q_proj"], **values).scale_of(Q) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "module", "expected"),
    [
        ({"target_modules": ["q_proj"]}, Q, True),
        ({"target_modules": ["proj"]}, Q, False),
        ({"target_modules": [Q]}, Q, True),
        ({"target_modules": r".*\.(q|k)_proj"}, Q, True),
        ({"target_modules": r"(q|k)_proj"}, Q, False),
        ({"target_modules": "all-linear"}, Q, True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, Q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers"]}, Q, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, Q, False),
    ],
)
def test_which_modules_an_adapter_is_for(values: dict[str, Any], module: str, expected: bool) -> None:
    assert settings(**values).targets(module) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r: Input should be greater than 0"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "adds a bias"),
        ({"layer_replication": [[0, 4]]}, "layers are repeated"),
        ({"alora_invocation_tokens": [1]}, "behind certain tokens"),
        ({"trainable_token_indices": [5]}, "rows of an embedding"),
        ({"init_lora_weights": "pissa"}, "changes the model's own weights"),
        ({"some_new_method": {"on": True}}, "does not know"),
        ({"target_modules": []}, "would do nothing"),
        ({"target_modules": "x", "layers_to_transform": [0]}, "needs a list"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**{"target_modules": ["q_proj"], **values})


def test_how_first_weights_were_drawn_does_not_matter() -> None:
    """As PEFT writes it after EVA, which gives modules ranks of their own, and keeps the scale by alphas."""
    made = settings(
        target_modules=["q_proj", "o_proj"],
        init_lora_weights="eva",
        eva_config={
            "adjust_scaling_factors": True, "label_mask_value": -100, "rho": 2.0, "tau": 0.99,
            "use_label_mask": True, "whiten": False,
        },
        rank_pattern={Q: 7},
        alpha_pattern={Q: 14.0},
        corda_config=None, loftq_config={}, lora_ga_config=None, qalora_group_size=16, velora_config=None,
    )  # fmt: skip
    assert (made.rank_of(Q), made.scale_of(Q)) == (7, 2.0)
    assert made.rank_of(Q.replace(".0.", ".1.")) == 4


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_hostile_pattern_is_given_up(key: str) -> None:
    values: dict[str, Any] = {"target_modules": ["q_proj"], key: r"(?:a|a)+(?:a|a)+b"}
    made = settings(**values)
    started = time.thread_time()
    with pytest.raises(ConfigError, match=rf"{key}.*takes too long"):
        made.targets("a" * 60)
    assert time.thread_time() - started < 20


@pytest.mark.parametrize("pattern", ["q_proj", "0.self_attn.q_proj", "q.proj", "proj", "0", Q, f"x.{Q}", "."])
def test_plain_patterns_match_as_regular_expressions(pattern: str) -> None:
    patterns = Patterns("here")
    for name in (Q, "q_proj", "xq_proj", "model.q-proj", "layers_0.self_attn.q_proj", "model.0", ""):
        expected = patterns.matches(rf"(?:.*\.)?(?:{pattern})", name, "rank_pattern")
        assert patterns.ends(pattern, name, "rank_pattern") == expected, name


def test_many_honest_patterns_take_nothing_of_the_limit() -> None:
    """As EVA writes them, one for each module, and others that need a regular expression."""
    patterns = Patterns("here", seconds=0.05)
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(40) for part in "qkvo"]
    for pattern in [*names, *(rf"layers\.{layer}\..*" for layer in range(40))]:
        found = [name for name in names if patterns.ends(pattern, name, "rank_pattern")]
        assert len(found) == (1 if pattern in names else 4), pattern


def test_patterns_share_one_limit_and_broken_ones_are_named() -> None:
    patterns = Patterns("here", seconds=0.05)
    with pytest.raises(ConfigError, match="no regular expression"):
        patterns.matches("(", Q, "rank_pattern")
    with pytest.raises(ConfigError, match="10000 are the most"):
        patterns.matches("a" * 10_001, Q, "rank_pattern")
    with pytest.raises(ConfigError, match=r"rank_pattern.*takes too long"):
        patterns.matches(r"(?:a|a)+(?:a|a)+b", "a" * 60, "rank_pattern")


# ------------------------------------------------------------------------------------------ tensors


def test_both_forms_of_names_reach_the_same_site(tmp_path: Path) -> None:
    for number, name in enumerate((Q, Q.replace("model.", "model.language_model."))):
        folder = write(tmp_path / str(number), pair(name, 64, 48), target_modules=[name])
        made = Adapter.load(folder, sites(E2B))
        assert list(made.changes) == ["language_model.layers.0.self_attn.q_proj"]
        assert made.changes["language_model.layers.0.self_attn.q_proj"].b.shape == (64, 2)


def test_what_shared_layers_do_not_read_is_told_and_nothing_else_is_an_adapter(tmp_path: Path) -> None:
    dead = pair("model.layers.7.self_attn.k_proj", 16, 48)
    folder = write(
        tmp_path / "a", {**pair(Q, 64, 48), **dead}, target_modules=[Q, "layers.7.self_attn.k_proj"]
    )
    assert Adapter.load(folder, sites(E2B)).dead == ("model.layers.7.self_attn.k_proj",)
    folder = write(tmp_path / "b", dead, target_modules=["layers.7.self_attn.k_proj"])
    with pytest.raises(CheckpointError, match="no tensor changes anything; 1 are for projections"):
        Adapter.load(folder, sites(E2B))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (pair(Q, 64, 48, rank=3), {}, "must be .2, 48. and .64, 2."),
        (pair(Q, 63, 48), {}, "must be"),
        (pair(Q, 64, 48), {"target_modules": ["k_proj"]}, "target_modules does not name"),
        (pair(Q, 64, 48), {"target_modules": ["q_proj"]}, "have no tensors; the file is not whole"),
        (pair("model.layers.0.w_proj", 64, 48), {"target_modules": ["w_proj"]}, "no module of this model"),
        (pair("model.audio_tower.x", 8, 8), {"target_modules": ["x"]}, "no module of this model"),
        (pair("model.layers.0.input_layernorm", 48, 48), {"target_modules": ["input_layernorm"]}, "'copy'"),
        ({f"{WRAPPED}{Q}.lora_A.weight": torch.zeros(2, 48)}, {}, "expected lora_A and lora_B"),
        ({f"{WRAPPED}{Q}.weight.lora_A": torch.zeros(2, 48)}, {}, "are no matrices named"),
        ({f"{WRAPPED}{Q}.lora_magnitude_vector": torch.ones(64)}, {}, "are no matrices named"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 48)}, {}, "do not begin with"),
        ({f"{WRAPPED}model.norm.weight": torch.ones(48)}, {}, "modules_to_save does not name"),
        ({f"{WRAPPED}{Q}.lora_A.weight": torch.zeros(2, 48, dtype=torch.int8)}, {}, "quantised"),
        ({f"{WRAPPED}{Q}.lora_A.weight": torch.full((2, 48), torch.inf)}, {}, "is not finite"),
        ({}, {}, "there are no tensors"),
        (pair(Q, 64, 48) | pair(Q.removeprefix("model."), 64, 48), {"target_modules": ["q_proj"]},
         "two names of one module"),
        ({f"{WRAPPED}{name}.weight": torch.ones(48) for name in ("norm", "model.norm")},
         {"modules_to_save": ["norm"]}, "two names of one module"),
        (pair(DEAD, 17, 48), {"target_modules": [DEAD]}, "must be .2, 48. and .16, 2."),
        (pair(DEAD, 16, 48, rank=3), {"target_modules": [DEAD]}, "with the rank 2"),
        (pair(DEAD, 16, 48), {}, "target_modules does not name"),
        (pair(DEAD.replace("7", "07"), 16, 48), {"target_modules": ["k_proj"]}, "no module of this model"),
        (pair(DEAD.replace("proj", "norm"), 16, 16), {"target_modules": ["k_norm"]}, "no module of this"),
    ],
)  # fmt: skip
def test_tensors_without_a_place(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "a", tensors, **{"target_modules": [Q], **config})
    with pytest.raises(CheckpointError, match=message):
        Adapter.load(folder, sites(E2B))


def test_broken_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", pair(Q, 64, 48), target_modules=[Q])
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            Adapter.load(folder, sites(E2B))
    file.unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        Adapter.load(folder, sites(E2B))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        Adapter.load(folder, sites(E2B))


def test_names_of_two_models_in_one_file(tmp_path: Path) -> None:
    other = pair("model.language_model.layers.1.self_attn.q_proj", 64, 48)
    folder = write(tmp_path / "a", {**pair(Q, 64, 48), **other}, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="an adapter is trained on one of them"):
        Adapter.load(folder, sites(E2B))


def test_a_copy_of_the_models_own_table_is_named(tmp_path: Path) -> None:
    tensors = {**pair(Q, 64, 48), f"{WRAPPED}model.embed_tokens.base_layer.weight": torch.zeros(96, 48)}
    folder = write(tmp_path / "a", tensors, target_modules=[Q])
    with pytest.raises(CheckpointError, match="save_embedding_layers=False"):
        Adapter.load(folder, sites(E2B))


@pytest.mark.parametrize("form", ["copy", "embedding", "head"])
def test_the_embedding_and_the_head_are_not_changed_as_one(tmp_path: Path, form: str) -> None:
    """Where they are one weight; in a model in which they are two, PEFT ties nothing either."""
    embedding = f"{WRAPPED}model.embed_tokens"
    rows = E2B["vocab_size"]
    tensors: dict[str, torch.Tensor] = {
        "copy": {f"{embedding}.weight": torch.ones(rows, 48)},
        "embedding": {
            f"{embedding}.lora_embedding_A": torch.ones(2, rows),
            f"{embedding}.lora_embedding_B": torch.ones(48, 2),
        },
        "head": pair("lm_head", rows, 48),
    }[form]
    name = "lm_head" if form == "head" else "embed_tokens"
    named = {"modules_to_save" if form == "copy" else "target_modules": [name]}
    apart = E2B | {"tie_word_embeddings": False}
    for number, (ties, config, message) in enumerate(
        [(True, E2B, "ensure_weight_tying"), (False, E2B, ""), (True, apart, "")]
    ):
        folder = write(tmp_path / str(number), tensors, ensure_weight_tying=ties, **named)
        if message:
            with pytest.raises(CheckpointError, match=message):
                Adapter.load(folder, sites(config))
        else:
            made = Adapter.load(folder, sites(config))
            assert len(made.changes) + len(made.copies) == 1
    other = write(tmp_path / "other", pair(Q, 64, 48), target_modules=[Q], ensure_weight_tying=True)
    assert len(Adapter.load(other, sites(E2B)).changes) == 1


# ------------------------------------------------------------------------------------------ experts

EXPERTS = "model.layers.0.experts"


def test_the_two_forms_of_experts_are_one(tmp_path: Path) -> None:
    """Eight experts, each with a pair for gate, up and down; and the same stacked."""
    gate, up, down = (
        [pair(f"{EXPERTS}.{e}.{name}", rows, columns) for e in range(8)]
        for name, rows, columns in (("gate_proj", 20, 48), ("up_proj", 20, 48), ("down_proj", 48, 20))
    )
    tensors = {key: value for own in (*gate, *up, *down) for key, value in own.items()}
    single = write(tmp_path / "single", tensors, target_modules=r".*experts\.\d+\..*")
    made = Adapter.load(single, sites(MOE)).changes
    halves = [[list(own.values()) for own in part] for part in (gate, up, down)]
    name = "language_model.layers.0.experts"
    for e in range(8):
        (ga, gb), (ua, ub), (da, db) = (part[e] for part in halves)
        both = torch.cat([3 * gb @ ga, 3 * ub @ ua])
        torch.testing.assert_close(made[f"{name}.gate_up_proj"].product()[e], both)
        torch.testing.assert_close(made[f"{name}.down_proj"].product()[e], 3 * db @ da)
    a = torch.cat([own[0] for own in halves[2]])
    b = torch.stack([own[1] for own in halves[2]], dim=-1).flatten(1)
    stacked = write(
        tmp_path / "stacked",
        {f"{WRAPPED}{EXPERTS}.lora_A.weight": a, f"{WRAPPED}{EXPERTS}.lora_B.weight": b},
        target_parameters=["layers.0.experts.down_proj"],
    )
    again = Adapter.load(stacked, sites(MOE)).changes
    assert list(again) == [f"{name}.down_proj"]
    torch.testing.assert_close(again[f"{name}.down_proj"].product(), made[f"{name}.down_proj"].product())


@pytest.mark.parametrize(
    ("places", "parameters", "message"),
    [
        (["", "base_layer"], ["layers.0.experts.down_proj"], "fits no parameter"),
        (["base_layer"], ["layers.0.experts.down_proj"], "fits no parameter"),
        ([""], ["layers.0.experts.gate_up_proj"], "fits no parameter"),
        (["", "3.down_proj"], ["layers.0.experts.down_proj"], "for all experts at once and for single ones"),
    ],
)
def test_expert_matrices_without_a_place(
    tmp_path: Path, places: list[str], parameters: list[str], message: str
) -> None:
    """All of them have the shape of matrices for `down_proj`."""
    tensors = {}
    for place in places:
        tensors |= pair(f"{EXPERTS}{place and f'.{place}'}", 48, 20, rank=16)
    folder = write(tmp_path / "a", tensors, target_modules=["down_proj"], target_parameters=parameters)
    with pytest.raises(CheckpointError, match=message):
        Adapter.load(folder, sites(MOE))


@pytest.mark.parametrize(
    ("names", "form", "message"),
    [
        (["8.down_proj"], "", "there are 8 experts"),
        (["7.down_proj", "07.down_proj"], "", "no module of this model"),
        (["7.down_proj"], "embedding_", "does not suit experts"),
        (["7.down_proj", "layers.0.experts.7.down_proj"], "", "two names of one module"),
    ],
)
def test_pairs_for_no_expert(tmp_path: Path, names: list[str], form: str, message: str) -> None:
    tensors = {}
    for name in names:
        made = pair(name if name.startswith("layers") else f"{EXPERTS}.{name}", 48, 20)
        tensors |= {key.replace(".lora_", f".lora_{form}"): value for key, value in made.items()}
    tensors = {key.removesuffix(".weight") if form else key: value for key, value in tensors.items()}
    folder = write(tmp_path / "a", tensors, target_modules=r".*experts\.\d+\.down_proj")
    with pytest.raises(CheckpointError, match=message):
        Adapter.load(folder, sites(MOE))


# ------------------------------------------------------------------------------------------ parts


def test_the_mapping_has_the_parts_that_a_model_has() -> None:
    with torch.device("meta"):
        text = TextModel(TextConfig.from_dict(DENSE))
    assert MediaMapping.of(text).towers == MediaMapping.of(text).connectors == ()
    for config in CONFIGS.values():
        with torch.device("meta"):
            model = Gemma4ForConditionalGeneration(MultimodalConfig.from_dict(config))
        mapping = MediaMapping.of(model)
        parts = {name for name, child in model.named_children() if list(child.parameters())}
        assert {*mapping.towers, *mapping.connectors} == parts - {"language_model"}
        hears = config.get("audio_config") is not None
        assert ("embed_audio" in mapping.connectors) == hears


def test_errors_are_the_models_own() -> None:
    assert issubclass(CheckpointError, ModelError)
    assert issubclass(ConfigError, ModelError)
