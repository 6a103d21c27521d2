"""Where an adapter for a published module has to stand in each engine: the mapping tables.

An engine may fuse modules: what is one matrix there has parts, and a part has its number behind it in
brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from conformance.targets.generation import Parts

_TEXT = "language_model."
_FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip

_RENAMED = {
    "vision_embedder.": "embed_vision.",
    "embed_vision.": "embed_vision.multimodal_embedder.",
}
"""Beginnings of published names, to those of transformers' class of the encoder-free model."""
_HEAD = "lm_head"

Table = Callable[[str, Mapping[str, Any]], tuple[str, ...]]
"""A module's published name below `model.` and the configuration, to the engine's names."""


def table(target: str) -> Table | None:
    """The table of a target by its registry name; None where there is none."""
    return _TABLES.get(target)


def in_class(name: str) -> str:
    """What transformers' class of the encoder-free model calls a module, by its published name."""
    for published, own in _RENAMED.items():
        if name.startswith(published):
            return own + name.removeprefix(published)
    return name


def parts(config: Mapping[str, Any]) -> Parts:
    """The connectors and towers that a model has, by their published names."""
    sees, hears = bool(config.get("vision_config")), bool(config.get("audio_config"))
    connectors = (*(["embed_vision"] if sees else []), *(["embed_audio"] if hears else []))
    if _is_unified(config):
        return Parts(connectors=connectors, towers=("vision_embedder",) if sees else ())
    towers = (*(["vision_tower"] if sees else []), *(["audio_tower"] if hears else []))
    return Parts(connectors=connectors, towers=towers)


def _reference(name: str, _config: Mapping[str, Any]) -> tuple[str, ...]:
    """Nothing is fused, and names are the published ones."""
    return (name,)


def _transformers(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The class for text alone has no level `language_model`; that of the encoder-free model renames."""
    if name == _HEAD:
        return (name,)
    if _is_unified(config):
        return (f"model.{in_class(name)}",)
    return (f"model.{name if _is_whole(config) else name.removeprefix(_TEXT)}",)


def _vllm(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the text model, attention's inputs are one matrix, and so are the two inputs of the MLP.

    In layers whose keys are values the projection of keys fills the part of the values too. Layers that share
    another's keys and values have their queries apart. Experts are one module.
    """
    if name == _HEAD:
        return (f"{_TEXT}{name}" if _is_whole(config) else name,)
    if not name.startswith(_TEXT):
        return (name,)
    inner = name.removeprefix(_TEXT)
    place = f"{'language_model.model.' if _is_whole(config) else 'model.'}"
    module, _, last = inner.rpartition(".")
    layer = int(inner.split(".")[1]) if inner.startswith("layers.") else -1
    text = config.get("text_config", config)
    if last in ("gate_up_proj", "down_proj") and module.endswith(".experts"):
        return (f"{place}{module}",)
    if last not in _FUSED or (last == "q_proj" and _shares(text, layer)):
        return (f"{place}{inner}",)
    fused, part = _FUSED[last]
    parts = (1, 2) if last == "k_proj" and _keys_are_values(text, layer) else (part,)
    return tuple(f"{place}{module}.{fused}[{part}]" for part in parts)


def _is_unified(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "gemma4_unified"


def _is_whole(config: Mapping[str, Any]) -> bool:
    return bool(config.get("vision_config") or config.get("audio_config"))


def _shares(text: Mapping[str, Any], layer: int) -> bool:
    first: int = text["num_hidden_layers"] - (text.get("num_kv_shared_layers") or 0)
    return layer >= first


def _keys_are_values(text: Mapping[str, Any], layer: int) -> bool:
    return bool(text.get("attention_k_eq_v")) and text["layer_types"][layer] == "full_attention"


_TABLES: dict[str, Table] = {"reference": _reference, "transformers": _transformers, "vllm": _vllm}
