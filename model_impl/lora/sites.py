"""Where an adapter can act: the modules that a model has, by their published names below `model.`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from model_impl.checkpoint import is_dead
from model_impl.config import TextConfig, read_config
from model_impl.layers.moe import Experts
from model_impl.media_config import FrameConfig, MultimodalConfig, VisionConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration
from model_impl.text import TextModel, TextPart

Model = TextPart | Gemma4ForConditionalGeneration
SiteKind = Literal["linear", "embedding", "head", "experts", "copy"]
"""What stands there. `experts` is a parameter that holds a matrix for each expert; of `copy`, norms for
example, an adapter can hold a whole copy and nothing else."""

TEXT = "language_model."
HEAD = "lm_head"
EMBEDDING = f"{TEXT}embed_tokens"
_DEAD = re.compile(re.escape(TEXT) + r"layers\.(0|[1-9][0-9]{0,5})\.self_attn\.[kv]_proj")
_IN_CLASS = {"vision_embedder.": "embed_vision.", "embed_vision.": "embed_vision.multimodal_embedder."}
"""Beginnings of published names, to those of transformers' class of the encoder-free model: adapters that are
trained on it have the class's."""
_TOWERS = ("vision_tower", "audio_tower", "vision_embedder")
_CONNECTORS = ("embed_vision", "embed_audio")


@dataclass(frozen=True)
class Site:
    """A module or parameter."""

    name: str
    kind: SiteKind
    shape: tuple[int, ...]
    """Of its weight: [out, in]; of experts [experts, out, in]; of an embedding [rows, width]."""

    @property
    def experts_module(self) -> str:
        """The module that a parameter of experts belongs to."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class MediaMapping:
    """Which prefixes of names belong to which part of a model; a part that it has not is not there."""

    language_model: tuple[str, ...]
    connectors: tuple[str, ...]
    towers: tuple[str, ...]

    @classmethod
    def of(cls, model: Model) -> MediaMapping:
        """The parts that a model has."""
        children = dict(model.named_children()) if isinstance(model, Gemma4ForConditionalGeneration) else {}
        return cls(
            language_model=(TEXT.rstrip("."), HEAD),
            connectors=tuple(name for name in _CONNECTORS if name in children),
            towers=tuple(name for name in _TOWERS if name in children),
        )

    def part(self, name: str) -> Literal["language_model", "connector", "tower"]:
        """The part that a site belongs to."""
        first = name.partition(".")[0]
        if first in self.language_model:
            return "language_model"
        return "connector" if first in self.connectors else "tower"


class TokenCounts(NamedTuple):
    """How many tokens of a piece of media the parts work on, padding left out."""

    tower: int
    """What its layers see; of the encoder-free model, its embedder. 0 where a kind has none."""
    connector: int


def token_counts(
    config: MultimodalConfig, kind: Literal["image", "video", "audio"], soft_tokens: int
) -> TokenCounts:
    """How many tokens tower and connector see for so many soft tokens, by the configuration.

    A vision tower sees every patch that is pooled into a soft token; tiles of the encoder-free model and
    frames of the audio tower are soft tokens already. Stretches of sound of the encoder-free model go to the
    connector as they are.
    """
    if kind == "audio":
        return TokenCounts(0 if isinstance(config.audio, FrameConfig) else soft_tokens, soft_tokens)
    if isinstance(config.vision, VisionConfig):
        return TokenCounts(soft_tokens * config.vision.pooling**2, soft_tokens)
    return TokenCounts(soft_tokens, soft_tokens)


class Sites:
    """All sites of a model.

    Args:
        model: May be on the meta device.
    """

    def __init__(self, model: Model) -> None:
        self.mapping = MediaMapping.of(model)
        self.modules: dict[str, nn.Module] = {}
        """By the names of their sites; of experts, by the name of their module."""
        self._sites: dict[str, Site] = {}
        self.renamed: dict[str, str] = {}
        """By the name in transformers' own class, a published name that is another."""
        self.config = model.config if isinstance(model, TextPart) else model.config.text
        for site, module in _walk(model, self.mapping):
            self._sites[site.name] = site
            self.modules[site.experts_module if site.kind == "experts" else site.name] = module
        if "vision_embedder" in self.mapping.towers:
            pairs = ((in_class(name), name) for name in self._sites)
            self.renamed = {own: name for own, name in pairs if own != name}

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Sites:
        """Of the model that a checkpoint's `config.json` describes.

        Raises:
            ConfigError: as `TextConfig.from_file` and `MultimodalConfig.from_file`.
        """
        raw = read_config(folder / "config.json")
        with torch.device("meta"):
            if raw.get("vision_config") or raw.get("audio_config"):
                return cls(Gemma4ForConditionalGeneration(MultimodalConfig.from_dict(raw)))
            return cls(TextModel(TextConfig.from_dict(raw)))

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def get(self, name: str) -> Site | None:
        """The site of that name."""
        return self._sites.get(name)

    def experts(self, module: str) -> Mapping[str, Site]:
        """The parameters of an experts module by their own names; empty if there is none of that name."""
        return {
            site.name.rpartition(".")[2]: site
            for site in self
            if site.kind == "experts" and site.experts_module == module
        }

    def dead(self, name: str) -> Site | None:
        """A key or value projection of a layer that shares another's; the model has none, and needs none."""
        match = _DEAD.fullmatch(name)
        if match is None or not is_dead(f"{name.removeprefix(TEXT)}.weight", self.config):
            return None
        layer = self.config.layers[int(match[1])]
        return Site(name, "linear", (layer.num_kv_heads * layer.head_dim, self.config.hidden_size))


def in_class(name: str) -> str:
    """What transformers' class of the encoder-free model calls a module, by its published name."""
    for published, own in _IN_CLASS.items():
        if name.startswith(published):
            return own + name.removeprefix(published)
    return name


def is_text(site: str) -> bool:
    """Whether a site of this name is in the text model."""
    return site == HEAD or site.startswith(TEXT)


def _modules(model: Model, mapping: MediaMapping) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the parts that a model has."""
    if isinstance(model, TextPart):
        yield from model.named_modules(prefix=TEXT.rstrip("."))
        return
    for part in (TEXT.rstrip("."), *mapping.connectors, *mapping.towers):
        yield from model.get_submodule(part).named_modules(prefix=part)


def _walk(model: Model, mapping: MediaMapping) -> Iterator[tuple[Site, nn.Module]]:
    for name, module in _modules(model, mapping):
        if isinstance(module, Experts):
            for parameter in ("gate_up_proj", "down_proj"):
                shape = tuple(getattr(module, parameter).shape)
                yield Site(f"{name}.{parameter}", "experts", shape), module
        elif name == f"{TEXT}{HEAD}":
            yield Site(HEAD, "head", _head_shape(model)), module
        elif isinstance(module, nn.Linear):
            yield Site(name, "linear", tuple(module.weight.shape)), module
        elif isinstance(module, nn.Embedding):
            yield Site(name, "embedding", tuple(module.weight.shape)), module
        elif not list(module.children()):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor):
                yield Site(name, "copy", tuple(weight.shape)), module


def _head_shape(model: Model) -> tuple[int, ...]:
    text = model if isinstance(model, TextPart) else model.language_model
    return text.config.vocab_size, text.config.hidden_size


__all__ = [
    "EMBEDDING",
    "HEAD",
    "TEXT",
    "MediaMapping",
    "Site",
    "SiteKind",
    "Sites",
    "TokenCounts",
    "in_class",
    "is_text",
    "token_counts",
]
