"""Adapters for what reads media: how many tokens its parts see, and their names in transformers' class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_impl.errors import CheckpointError
from model_impl.lora import Adapter, Sites, token_counts
from model_impl.lora.sites import in_class
from model_impl.multimodal import Gemma4ForConditionalGeneration
from tests.lora_adapters import pair, write
from tests.media_oracle import noise as sound
from tests.test_multimodal import CLIP, MODELS, Writer, picture

torch.set_num_threads(1)

TOWERS = {
    ("small", "image"): "vision_tower.encoder.layers.1",
    ("small", "audio"): "audio_tower.subsample_conv_projection",
    ("large", "image"): "vision_tower.encoder.layers.0",
    ("unified", "image"): "vision_embedder.patch_dense",
}
"""A module inside of what reads a kind of media, by model; the unified one has none for sounds. Of the audio
tower the one that gives frames to the layers, and says which are padding."""


@contextmanager
def counted(model: nn.Module, *names: str) -> Iterator[dict[str, int]]:
    """Tokens of all inputs of modules, [..., width], by name; of outputs with a mask, the valid ones."""
    counts = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            masked = isinstance(output, tuple)
            counts[name] += int(output[1].sum()) if masked else inputs[0].numel() // inputs[0].shape[-1]

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(count(name)).remove)
        yield counts


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("name", ["small", "large", "unified"])
def test_parts_see_as_many_tokens_as_the_configuration_says(name: str, kind: Any) -> None:
    model, writer = MODELS[name], Writer(name)
    if kind == "audio" and model.config.audio is None:
        assert not hasattr(model, "embed_audio")
        return
    for data in {
        "image": [picture(96, 64), picture(600, 20), picture(48, 300)],
        "video": [CLIP, CLIP[:1]],
        "audio": [sound(7_000), sound(20_000)],
    }[kind]:
        row = writer.row(3, (kind, data), 2)
        own = "audio" if kind == "audio" else "image"
        connector = f"embed_{'audio' if kind == 'audio' else 'vision'}.embedding_projection"
        tower = TOWERS.get((name, own))
        with counted(model, connector, *([tower] if tower else [])) as seen:
            soft = model.soft_tokens(torch.tensor([row.ids]), writer.media([row]))
        assert soft is not None
        expected = token_counts(model.config, kind, int(soft.where.sum()))
        assert expected.connector == seen[connector] > 0
        assert expected.tower == (seen[tower] if tower else 0)


# ------------------------------------------------------------------------------------------ names


def of_class(model: Gemma4ForConditionalGeneration) -> list[str]:
    """The linears outside the text model, as transformers' class names them."""
    sites = Sites(model)
    return [in_class(s.name) for s in sites if s.kind == "linear" and not s.name.startswith("language_model")]


def test_names_of_transformers_own_class_lead_to_the_published_ones(tmp_path: Path) -> None:
    sites = Sites(MODELS["unified"])
    names = of_class(MODELS["unified"])
    assert "embed_vision.patch_dense" in names
    assert "embed_vision.multimodal_embedder.embedding_projection" in names
    shapes = {in_class(site.name): site.shape for site in sites}
    tensors = {k: v for name in names for k, v in pair(f"model.{name}", *shapes[name]).items()}
    folder = write(tmp_path / "a", tensors, target_modules=[f"model.{name}" for name in names])
    made = Adapter.load(folder, sites)
    assert sorted(made.changes) == [
        "embed_audio.embedding_projection", "embed_vision.embedding_projection", "vision_embedder.patch_dense"
    ]  # fmt: skip


def test_a_tensor_that_is_missing_is_named_as_the_file_would(tmp_path: Path) -> None:
    sites = Sites(MODELS["unified"])
    site = sites.get("vision_embedder.patch_dense")
    assert site is not None
    name = "embed_vision.multimodal_embedder.embedding_projection"
    folder = write(
        tmp_path / "a",
        pair("model.embed_vision.patch_dense", *site.shape),
        target_modules=["model.embed_vision.patch_dense", f"model.{name}"],
    )
    with pytest.raises(CheckpointError, match=f"model.{name} are named by the configuration"):
        Adapter.load(folder, sites)


def test_a_module_named_in_both_ways_is_refused(tmp_path: Path) -> None:
    sites = Sites(MODELS["unified"])
    site = sites.get("vision_embedder.patch_dense")
    assert site is not None
    tensors = {
        key: value
        for part in ("embed_vision", "vision_embedder")
        for key, value in pair(f"model.{part}.patch_dense", *site.shape).items()
    }
    folder = write(tmp_path / "a", tensors, target_modules=["patch_dense"])
    with pytest.raises(CheckpointError, match="two names of one module"):
        Adapter.load(folder, sites)


def test_models_with_towers_have_published_names_alone() -> None:
    assert Sites(MODELS["small"]).renamed == Sites(MODELS["large"]).renamed == {}
