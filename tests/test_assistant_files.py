"""The published draft models: configurations, tensors, fit with a target, loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conformance.invariance.models import MODELS
from conformance.targets import reference_model
from model_impl.checkpoint import parameter_count
from model_impl.config import TextConfig
from model_impl.errors import CheckpointError, ConfigError
from model_impl.layers.backend_choice import BackendError
from model_impl.speculative import guessing
from model_impl.speculative.assistant import (
    AssistantConfig,
    CentroidConfig,
    kv_layers,
    load_assistant,
)
from tests import draft_models
from tests.data.published_configs import SIZES, text_config
from tests.draft_models import (
    ASSISTANTS,
    assistant_config,
    assistant_on_meta,
    draft_inputs,
    random_weights,
    tiny_assistant,
)
from tests.model_configs import (
    DENSE,
    E2B,
    FULL,
    SLIDING,
)

ORDERED, PLAIN = tiny_assistant(ordered=True), tiny_assistant(ordered=False)

# ------------------------------------------------------------------------------------------ published sizes

NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def published_shapes(name: str) -> dict[str, list[int]]:
    """Every tensor of a draft model's file."""
    size = ASSISTANTS[name]
    h, mlp = size.hidden, size.mlp
    shapes: dict[str, list[int]] = {
        "pre_projection.weight": [h, 2 * size.target_hidden],
        "post_projection.weight": [size.target_hidden, h],
        "model.embed_tokens.weight": [262_144, h],
        "model.norm.weight": [h],
    }
    for i, d in enumerate((256, 256, 256, 512)):
        layer = {
            "self_attn.q_proj.weight": [size.heads * d, h],
            "self_attn.q_norm.weight": [d],
            "self_attn.o_proj.weight": [h, size.heads * d],
            "mlp.gate_proj.weight": [mlp, h],
            "mlp.up_proj.weight": [mlp, h],
            "mlp.down_proj.weight": [h, mlp],
            "layer_scalar": [1],
            **{f"{norm}_layernorm.weight": [h] for norm in NORMS},
        }
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
    if name in ("E2B", "E4B"):
        shapes |= {
            "masked_embedding.centroids.weight": [2048, 256],
            "masked_embedding.token_ordering": [262_144],
        }
    return shapes


@pytest.mark.parametrize("name", ASSISTANTS)
def test_published_draft_models_have_the_published_tensors(name: str) -> None:
    model = assistant_on_meta(assistant_config(name))
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == published_shapes(name)
    assert {key for key, tensor in state.items() if not tensor.is_floating_point()} == {
        key for key in state if key.endswith("token_ordering")
    }
    assert parameter_count(model) == ASSISTANTS[name].parameters
    assert round(parameter_count(model) / 1e6, 1) == ASSISTANTS[name].millions


@pytest.mark.parametrize("name", ASSISTANTS)
def test_published_configurations_are_read(name: str) -> None:
    config = AssistantConfig.from_dict(assistant_config(name))
    assert [layer.kind for layer in config.text.layers] == [SLIDING] * 3 + [FULL]
    assert [layer.kv_source for layer in config.text.layers] == [None] * 4
    assert all(layer.shares_kv for layer in config.text.layers)
    assert {layer.intermediate_size for layer in config.text.layers} == {ASSISTANTS[name].mlp}
    assert config.text.final_logit_softcapping is None
    assert config.centroids == (CentroidConfig(2048, 32) if name in ("E2B", "E4B") else None)
    assert config.target_hidden_size == SIZES[name].hidden


def test_an_ordinary_model_s_layers_never_read_from_outside() -> None:
    """The same text configuration, read as a model of its own, gives every layer keys and values."""
    layers = TextConfig.from_dict(assistant_config("E2B")).layers
    assert [layer.kv_source for layer in layers] == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------- fit with a target

SOURCES = {"E2B": (13, 14), "E4B": (22, 23), "12B": (46, 47), "26B-A4B": (28, 29), "31B": (58, 59)}


@pytest.mark.parametrize("name", ASSISTANTS)
def test_each_fits_its_own_target_and_no_other(name: str) -> None:
    config = AssistantConfig.from_dict(assistant_config(name))
    for other in SIZES:
        target = TextConfig.from_dict(text_config(other))
        if other == name:
            config.check_target(target)
            sources = kv_layers(target)
            assert (sources[SLIDING].index, sources[FULL].index) == SOURCES[name]
        else:
            with pytest.raises(ConfigError, match="take the one made for it"):
                config.check_target(target)


def test_all_that_does_not_fit_a_target_is_named() -> None:
    config = AssistantConfig.from_dict(PLAIN)
    config.check_target(TextConfig.from_dict(DENSE))
    ropes = {kind: {**made, "rope_theta": 5.0} for kind, made in DENSE["rope_parameters"].items()}
    other = TextConfig.from_dict(
        {**E2B, "vocab_size": 97, "hidden_size": 50, "sliding_window": 9, "rope_parameters": ropes}
    )
    with pytest.raises(ConfigError) as caught:
        config.check_target(other)
    for part in (
        "vocabulary 96 against 97",
        "hidden size 48 against 50",
        "head dimension in sliding_attention (4, 16) against (1, 16)",
        "head dimension in full_attention (2, 32) against (1, 32)",
        "rotary embedding in full_attention",
        "sliding window 8 against 9",
    ):
        assert part in str(caught.value)


# ----------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another-model": ({"model_type": "gemma4"}, {}, r"model_type: .*'gemma4_assistant'.*, found gemma4$"),
    "no-text": ({"text_config": None}, {}, r"assistant configuration does not fit: text_config: "),
    "no-target-size": ({"backbone_hidden_size": None}, {}, r"backbone_hidden_size: .*, found None"),
    "untied": ({"tie_word_embeddings": False}, {}, r"tie_word_embeddings: .*True.*, found False"),
    "untied-text": ({}, {"tie_word_embeddings": False}, r"text_config\.tie_word_embeddings: .*found False"),
    "per-layer": ({}, {"hidden_size_per_layer_input": 12}, r"hidden_size_per_layer_input: .*found 12"),
    "experts": ({}, {"enable_moe_block": True}, r"text_config\.enable_moe_block: .*found True"),
    "double-wide": ({}, {"use_double_wide_mlp": True}, r"text_config\.use_double_wide_mlp: .*found True"),
    "capped": ({}, {"final_logit_softcapping": 30.0}, r"final_logit_softcapping: .*found 30\.0"),
    "own-keys": ({}, {"num_kv_shared_layers": 3}, r"num_kv_shared_layers is 3; all 4 layers"),
    "text-s-own-rules": ({}, {"head_dim": 15}, r"layer 0: head_dim 15 must be even"),
    "uneven-clusters": ({"num_centroids": 13}, {}, r"vocab_size 96 must be a multiple of num_centroids 13"),
    "too-many-clusters": (
        {"centroid_intermediate_top_k": 13},
        {},
        r"centroid_intermediate_top_k 13 is above num_centroids 12",
    ),
}


@pytest.mark.parametrize(("changes", "text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrong_is_refused(
    changes: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    config = {**ORDERED, "text_config": {**ORDERED["text_config"], **text}, **changes}
    with pytest.raises(ConfigError, match=message):
        AssistantConfig.from_dict(config)


@pytest.mark.parametrize("shared", [None, 0])
def test_no_number_of_shared_layers_means_all(shared: int | None) -> None:
    config = {**PLAIN, "text_config": {**PLAIN["text_config"], "num_kv_shared_layers": shared}}
    assert AssistantConfig.from_dict(config) == AssistantConfig.from_dict(PLAIN)


def test_clusters_do_not_matter_without_ordered_embeddings() -> None:
    assert AssistantConfig.from_dict({**PLAIN, "num_centroids": 13}).centroids is None


# --------------------------------------------------------------------------------------------------- loading


def written(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda weights: None) -> Path:
    """The folder of a draft model with a centroid head."""
    weights = random_weights(assistant_on_meta(ORDERED))
    change(weights)
    return draft_models.write(ORDERED, weights, folder)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_assistant(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_written_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_assistant(written(tmp_path), dtype=dtype, attention="eager")
    for name, tensor in random_weights(assistant_on_meta(ORDERED)).items():
        kept = dtype if tensor.is_floating_point() else torch.int64
        assert torch.equal(model.state_dict()[name], tensor.to(kept))
        assert model.state_dict()[name].dtype == kept
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[0].self_attn.backend == "eager"
    embedding, hidden, positions, target = draft_inputs(ORDERED, [7])
    kv = {kind: replace(held, k=held.k.to(dtype), v=held.v.to(dtype)) for kind, held in target.items()}
    logits, _ = model(embedding.to(dtype), hidden.to(dtype), positions, kv)
    assert logits.dtype == dtype


def test_tables_of_narrower_integers_load(tmp_path: Path) -> None:
    name = "masked_embedding.token_ordering"
    model = load_assistant(written(tmp_path, lambda w: w.update({name: w[name].int()})))
    assert torch.equal(
        model.masked_embedding.token_ordering, random_weights(assistant_on_meta(ORDERED))[name]
    )


def test_any_one_missing_tensor_is_named(tmp_path: Path) -> None:
    for name in random_weights(assistant_on_meta(ORDERED)):
        assert f"1 missing: {name}" in refusal(written(tmp_path, lambda w, name=name: w.pop(name)))  # type: ignore[misc]


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        # Keys and values of its own, even ones that nothing would read, are not what was published.
        weights["model.layers.0.self_attn.k_proj.weight"] = torch.ones(16, 24)
        weights["post_projection.weight"] = weights["post_projection.weight"].T.contiguous()
        del weights["masked_embedding.token_ordering"]

    message = refusal(written(tmp_path, change))
    assert "1 missing: masked_embedding.token_ordering" in message
    assert "1 unused: model.layers.0.self_attn.k_proj.weight" in message
    assert "1 misshapen: post_projection.weight is [24, 48], the configuration asks for [48, 24]" in message


WRONG_NUMBERS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "quantised": (
        lambda w: w.update({"pre_projection.weight": w["pre_projection.weight"].to(torch.int8)}),
        "pre_projection.weight is torch.int8; quantised weights are not supported",
    ),
    "float-ids": (
        lambda w: w.update({"masked_embedding.token_ordering": torch.arange(96.0)}),
        "token_ordering is torch.float32, which cannot hold every token id; store it as torch.int64",
    ),
    "beyond": (
        lambda w: w.update({"masked_embedding.token_ordering": torch.arange(1, 97)}),
        "token_ordering has ids beyond the vocabulary of 96 tokens",
    ),
    "negative": (
        lambda w: w.update({"masked_embedding.token_ordering": torch.arange(-1, 95)}),
        "token_ordering has ids beyond the vocabulary of 96 tokens",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_wrong_numbers_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    assert message in refusal(written(tmp_path, change))


def test_backends_are_chosen_by_the_rule(tmp_path: Path) -> None:
    model = load_assistant(written(tmp_path))
    assert {layer.self_attn.backend for layer in model.model.layers} == {"sdpa"}
    with pytest.raises(BackendError, match="no attention backend 'FLASH_ATTN'; known: sdpa"):
        load_assistant(tmp_path, attention="FLASH_ATTN")


def test_folders_without_weights_or_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        load_assistant(tmp_path)
    (written(tmp_path) / "model.safetensors").unlink()
    assert "weights are missing" in refusal(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    assert "missing: " in refusal(tmp_path)


def test_a_drawn_assistant_s_configuration_has_the_published_keys(tmp_path: Path) -> None:
    """Engines check some that this implementation need not read."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    for folder in (target, draft):
        folder.mkdir()
    reference_model.write_speaking(MODELS["moe"], target, seed=1)
    guessing.write_assistant(target, draft, guesses=False, seed=1)
    written_text = json.loads((draft / "config.json").read_text())["text_config"]
    for name in ASSISTANTS:
        published = assistant_config(name)["text_config"]
        assert published.keys() <= written_text.keys()
        for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            assert written_text[key] == published[key] == 0
