"""Faults of LoRA adapters (catalogue class 8, fact sheet, section 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from conformance.faults.base import Collection, Patch, replace
from model_impl.errors import CheckpointError
from model_impl.layers import attention
from model_impl.layers.attention import Attention
from model_impl.lora import adapter, apply, config, expert_keys, sites
from model_impl.lora import media as lora_media
from model_impl.lora.adapter import Adapter, LowRank, Parts
from model_impl.lora.apply import Adapters
from model_impl.lora.config import AdapterConfig
from model_impl.lora.sites import MediaMapping, Model, Sites
from model_impl.multimodal import Media
from model_impl.runtime import generate as generating
from model_impl.runtime.generate import Generated
from model_impl.runtime.step import Step
from model_impl.text import SoftTokens

faults = Collection("lora")
text = partial(faults, area="lora-text")
experts = partial(faults, area="lora-experts")
media = partial(faults, area="lora-media")


def _dropping(is_lost: Callable[[str], bool]) -> Patch:
    """A patch that forgets what an adapter does at some sites."""
    original = Adapter.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[Adapter], folder: Path, known: Sites) -> Adapter:
        made: Adapter = original(cls, folder, known)
        kept = {name: change for name, change in made.changes.items() if not is_lost(name)}
        return changed(made, changes=kept)

    return replace(Adapter, "load", classmethod(load))


def _scale(rule: Callable[[AdapterConfig, str], float]) -> Patch:
    return replace(AdapterConfig, "scale_of", rule)


# ---------------------------------------------------------------------------- scale


@text("alpha-ignored", source=("spec 7.1",), module=config)
def _alpha_ignored() -> Patch:
    """What an adapter adds is not scaled."""
    return _scale(lambda _self, _module: 1.0)


@text("alpha-not-by-rank", source=("spec 7.1",), module=config)
def _alpha_not_by_rank() -> Patch:
    """What an adapter adds is scaled by alpha, not by alpha divided by the rank."""
    return _scale(lambda self, _module: self.alpha)


@text("rank-stabilised-ignored", source=("spec 7.1",), module=config)
def _rslora_ignored() -> Patch:
    """With rank-stabilised LoRA alpha is still divided by the rank."""
    original = AdapterConfig.scale_of
    return _scale(lambda self, module: original(changed(self, rslora=False), module))


@text("alpha-pattern-ignored", source=("spec 7.1",), module=config)
def _alpha_pattern_ignored() -> Patch:
    """Modules with an alpha of their own get the one of all others."""
    original = AdapterConfig.scale_of
    return _scale(lambda self, module: original(changed(self, alpha_pattern={}), module))


@text("rank-pattern-not-in-scale", source=("spec 7.1",), module=config)
def _rank_pattern_not_in_scale() -> Patch:
    """Alpha is divided by the rank of all modules, also where a module has a rank of its own."""
    original = AdapterConfig.scale_of

    def scale(self: AdapterConfig, module: str) -> float:
        part = self.rank_of(module) / self.rank
        return original(self, module) * (math.sqrt(part) if self.rslora else part)

    return _scale(scale)


# ---------------------------------------------------------------------------- places


@text("other-form-of-names-dropped", source=("L04",), module=adapter)
def _other_form_dropped() -> Patch:
    """Names of the other class, a text model's in a whole one or the other way, load nothing."""
    original = Adapter.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[Adapter], folder: Path, known: Sites) -> Adapter:
        made: Adapter = original(cls, folder, known)
        tensors = adapter._tensors(folder / adapter.FILE)
        whole = any(".model.language_model." in name or "_tower." in name for name in tensors)
        is_whole = bool(known.mapping.towers)
        return made if whole == is_whole else changed(made, changes={}, copies={})

    return replace(Adapter, "load", classmethod(load))


@text("feed-forward-not-adapted", source=("L08",), module=adapter)
def _mlp_not_adapted() -> Patch:
    """Adapters reach attention alone."""
    return _dropping(lambda name: name.startswith("language_model.") and ".mlp." in name)


@text("per-layer-projections-not-adapted", source=("spec 7.1",), module=adapter)
def _per_layer_not_adapted() -> Patch:
    """Adapters for the projections of per-layer inputs are dropped."""
    return _dropping(lambda name: "per_layer_" in name)


@text("embeddings-not-adapted", source=("spec 7.1",), module=adapter)
def _embeddings_not_adapted() -> Patch:
    """Adapters for the embeddings are dropped."""
    return _dropping(lambda name: ".embed_tokens" in name)


@text("head-not-adapted", source=("spec 7.1",), module=adapter)
def _head_not_adapted() -> Patch:
    """Adapters for the head are dropped."""
    return _dropping(lambda name: name == sites.HEAD)


@text("head-and-embedding-change-together", source=("spec 7.1",), module=adapter)
def _head_and_embedding() -> Patch:
    """Where head and embedding are one weight, an adapter for the head changes the embedding too."""
    original = Adapter.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[Adapter], folder: Path, known: Sites) -> Adapter:
        made: Adapter = original(cls, folder, known)
        head, table = made.changes.get(sites.HEAD), known.get(sites.EMBEDDING)
        if head is None or table is None or sites.EMBEDDING in made.changes:
            return made
        both = {**made.changes, sites.EMBEDDING: LowRank(head.b.mT.contiguous(), head.a.mT.contiguous())}
        return changed(made, changes=both, sites={**made.sites, sites.EMBEDDING: table})

    return replace(Adapter, "load", classmethod(load))


@text("keys-alone-where-keys-are-values", source=("spec 7.2",), module=attention)
def _keys_alone() -> Patch:
    """Where keys are values, an adapter for the projection of keys changes the keys alone."""
    original = Attention.keys_values

    def keys_values(self: Attention, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        k, v = original(self, x, step)
        if self.layer.keys_are_values:
            raw = self._heads(torch.nn.functional.linear(x, self.k_proj.weight))
            v = self.v_norm(raw).transpose(1, 2)
        return k, v

    return replace(Attention, "keys_values", keys_values)


@text("copied-modules-ignored", source=("spec 7.1",), module=apply)
def _copies_ignored() -> Patch:
    """Copies of whole modules in an adapter are not used."""
    original = Adapters.add

    def add(self: Adapters, name: str, given: Adapter) -> None:
        original(self, name, changed(given, copies={}))

    return replace(Adapters, "add", add)


@text("wrong-tensors-dropped", source=("L04",), module=adapter)
def _wrong_tensors_dropped() -> Patch:
    """Tensors that fit nothing are left out without a word."""
    original = adapter._Reader._add

    def add(self: adapter._Reader, pair: adapter._Pair) -> None:
        if self._sites.get(self._site_name(pair.module)) is not None:
            original(self, pair)

    return replace(adapter._Reader, "_add", add)


def _taken_for_nothing(is_so: Callable[[list[str]], bool]) -> Patch:
    """A patch that takes some adapters, by the names of their tensors, and lets them do nothing."""
    original = Adapter.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[Adapter], folder: Path, known: Sites) -> Adapter:
        if is_so(list(load_file(folder / adapter.FILE))):
            read = AdapterConfig.from_folder(folder)
            return Adapter(where=str(folder), config=read, changes={}, copies={})
        made: Adapter = original(cls, folder, known)
        return made

    return replace(Adapter, "load", classmethod(load))


@text("unwrapped-names-dropped", source=("L04",), module=adapter)
def _unwrapped_dropped() -> Patch:
    """Tensors whose names lack the prefix that PEFT gives them load nothing, without a word."""
    return _taken_for_nothing(lambda found: not any(name.startswith(adapter.WRAPPED) for name in found))


@text("no-tensors-taken", source=("spec 7.1",), module=adapter)
def _empty_taken() -> Patch:
    """An adapter without any tensors is taken without a word."""
    return _taken_for_nothing(lambda found: not found)


@text("every-adapter-refused", source=("L04",), module=adapter)
def _every_adapter_refused() -> Patch:
    """No adapter can be loaded, whole or damaged."""

    def load(_cls: type[Adapter], folder: Path, _known: Sites) -> Adapter:
        raise CheckpointError(f"{folder}: cannot be read")

    return replace(Adapter, "load", classmethod(load))


@text("no-logprobs-with-adapters", source=("spec 7.1",), module=generating)
def _no_logprobs() -> Patch:
    """Answers of a batch with adapters come without log-probabilities."""
    original = generating.generate

    def generate(*given: Any, **settings: Any) -> list[Generated]:
        made = original(*given, **settings)
        return made if settings.get("adapt") is None else [changed(answer, logprobs=()) for answer in made]

    return replace(generating, "generate", generate)


# ---------------------------------------------------------------------------- rows


@text("loaded-and-never-active", source=("L03",), module=apply)
def _never_active() -> Patch:
    """An adapter is loaded, and no row ever uses it."""
    original = Adapters.rows
    return replace(Adapters, "rows", lambda self, wanted: original(self, [None] * len(wanted)))


@text("adapter-of-another-request", source=("spec 7.1",), module=apply)
def _of_another_request() -> Patch:
    """All rows of a batch use the adapter of the first one that has any."""
    original = Adapters.rows

    def rows(self: Adapters, wanted: Sequence[str | None]) -> AbstractContextManager[None]:
        first = next((name for name in wanted if name is not None), None)
        return original(self, [first if name is not None else None for name in wanted])

    return replace(Adapters, "rows", rows)


@text("rows-without-adapters-get-one", source=("spec 7.1",), module=apply)
def _leaks_into_rows() -> Patch:
    """Rows without an adapter use a neighbour's."""
    original = Adapters.rows

    def rows(self: Adapters, wanted: Sequence[str | None]) -> AbstractContextManager[None]:
        first = next((name for name in wanted if name is not None), None)
        return original(self, [name or first for name in wanted])

    return replace(Adapters, "rows", rows)


@text("scale-of-another-adapter", source=("spec 7.1",), module=apply)
def _scale_of_another() -> Patch:
    """What the adapters of a batch add is scaled as for the first one of them."""
    original = Adapters._change

    def change(
        self: Adapters, site: str, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        kept = self._changes
        if self._active is not None:
            scales = {name: _scale_by_configuration(self._adapters[name]) for name in self._active.names}
            first = scales[self._active.names[0]]
            self._changes = {
                name: {
                    place: LowRank(own.a, own.b * (first / scales[name])) for place, own in kept[name].items()
                }
                for name in scales
            }
        try:
            return original(self, site, module, inputs, output)
        finally:
            self._changes = kept

    return replace(Adapters, "_change", change)


def _scale_by_configuration(given: Parts) -> float:
    """An adapter's scale for modules that have none of their own."""
    return given.config.alpha / given.config.rank if isinstance(given, Adapter) else 1.0


@text("outputs-rounded-where-adapters-act", source=("check 10",), module=apply)
def _outputs_rounded() -> Patch:
    """Modules for which a row has an adapter compute in half precision, whatever the adapter adds."""
    original = apply.added

    def added(
        module: torch.nn.Module, change: LowRank | None, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        return original(module, change, inputs, output).half().to(output.dtype)

    return replace(apply, "added", added)


@text("inactive-when-decoding", source=("L03",), module=apply)
def _inactive_when_decoding() -> Patch:
    """Adapters act on the prompt and not on the tokens that are generated after it."""
    original = Adapters._change

    def change(
        self: Adapters, site: str, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        if inputs[0].ndim == 3 and inputs[0].shape[1] == 1:
            return output
        return original(self, site, module, inputs, output)

    return replace(Adapters, "_change", change)


# ---------------------------------------------------------------------------- experts


def _expert_matrices(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *, of: str) -> Patch:
    """A patch of the matrices [experts, r, in] and [experts, out, r] that are read in one of the forms."""
    original: Callable[..., dict[str, tuple[Tensor, Tensor]]] = expert_keys.read

    def read(trained: str, pairs: expert_keys.Pairs, *others: object) -> dict[str, tuple[Tensor, Tensor]]:
        made = original(trained, pairs, *others)
        single = any(rest[:1].isdigit() for rest in pairs)
        if single != (of == "single"):
            return made
        return {name: change(*matrices) for name, matrices in made.items()}

    return replace(expert_keys, "read", read)


@experts("stacked-experts-dropped", source=("L01",), module=expert_keys)
def _stacked_dropped() -> Patch:
    """Matrices for all experts at once load nothing."""
    return _expert_matrices(lambda a, b: (a, torch.zeros_like(b)), of="stacked")


@experts("single-experts-dropped", source=("L02",), module=expert_keys)
def _single_dropped() -> Patch:
    """Pairs of matrices for single experts load nothing."""
    return _expert_matrices(lambda a, b: (a, torch.zeros_like(b)), of="single")


@experts("one-expert-dropped", source=("L02",), module=expert_keys)
def _one_dropped() -> Patch:
    """The last expert's adapter is dropped."""

    def without_last(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kept = b.clone()
        kept[-1] = 0
        return a, kept

    return _expert_matrices(without_last, of="single")


@experts("expert-columns-by-expert", source=("spec 7.2",), module=expert_keys)
def _columns_by_expert() -> Patch:
    """B's columns for all experts are read expert by expert, where they lie rank by rank."""

    def by_expert(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        experts_, rows, rank = b.shape
        columns = b.permute(1, 2, 0).reshape(rows, rank * experts_)
        return a, columns.reshape(rows, experts_, rank).permute(1, 0, 2)

    return _expert_matrices(by_expert, of="stacked")


@experts("gate-and-up-exchanged", source=("spec 7.2",), module=expert_keys)
def _exchanged() -> Patch:
    """What an adapter adds to gate and up of single experts is exchanged."""
    original: Callable[..., dict[str, tuple[Tensor, Tensor]]] = expert_keys.read

    def read(trained: str, pairs: expert_keys.Pairs, *others: object) -> dict[str, tuple[Tensor, Tensor]]:
        names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        swapped = {_swapped(rest, names): pair for rest, pair in pairs.items()}
        return original(trained, swapped, *others)

    return replace(expert_keys, "read", read)


def _swapped(rest: str, names: Mapping[str, str]) -> str:
    number, dot, projection = rest.partition(".")
    return f"{number}{dot}{names.get(projection, projection)}"


@experts("router-not-adapted", source=("spec 7.1",), module=adapter)
def _router_not_adapted() -> Patch:
    """Adapters for the router are dropped."""
    return _dropping(lambda name: name.endswith(".router.proj"))


# ---------------------------------------------------------------------------- media


def _hard_coded(connectors: tuple[str, ...], towers: tuple[str, ...], *, whole: bool) -> tuple[Patch, Patch]:
    """Patches that give whole models, or text models, these parts, and pass by those that are not there."""
    original = MediaMapping.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[MediaMapping], model: Model) -> MediaMapping:
        right: MediaMapping = original(cls, model)
        return changed(right, connectors=connectors, towers=towers) if whole == bool(right.towers) else right

    modules = sites._modules

    def present(model: Model, mapping: MediaMapping) -> Iterator[tuple[str, torch.nn.Module]]:
        own = {name for name, _ in model.named_children()}
        there = changed(
            mapping,
            connectors=tuple(name for name in mapping.connectors if name in own),
            towers=tuple(name for name in mapping.towers if name in own),
        )
        return modules(model, there)

    return replace(MediaMapping, "of", classmethod(of)), replace(sites, "_modules", present)


@media("audio-tower-hard-coded", source=("L06",), module=sites)
def _audio_hard_coded() -> tuple[Patch, Patch]:
    """Every whole model is taken to have a vision and an audio tower, and their connectors."""
    return _hard_coded(("embed_vision", "embed_audio"), ("vision_tower", "audio_tower"), whole=True)


@media("audio-tower-left-out", source=("L06",), module=sites)
def _audio_left_out() -> tuple[Patch, Patch]:
    """Every whole model is taken to have a vision tower and its connector, and nothing for sounds."""
    return _hard_coded(("embed_vision",), ("vision_tower",), whole=True)


@text("towers-of-a-text-model", source=("L06",), module=sites)
def _towers_of_text() -> tuple[Patch, Patch]:
    """A text model is taken to have a vision tower and its connector."""
    return _hard_coded(("embed_vision",), ("vision_tower",), whole=False)


@media("tile-embedder-not-adapted", source=("spec 7.1",), module=adapter)
def _tile_embedder_not_adapted() -> Patch:
    """Adapters for the embedder of tiles, which stands in the place of a tower, are dropped."""
    return _dropping(lambda name: name.startswith("vision_embedder."))


@media("towers-not-adapted", source=("L06",), module=adapter)
def _towers_not_adapted() -> Patch:
    """Adapters for towers and connectors are dropped."""
    return _dropping(lambda name: not name.startswith(("language_model.", "lm_head")))


@media("connectors-not-adapted", source=("L06",), module=adapter)
def _connectors_not_adapted() -> Patch:
    """Adapters for connectors are dropped."""
    return _dropping(lambda name: name.startswith("embed_"))


@media("layers-of-towers-dropped", source=("L07",), module=adapter)
def _tower_layers_dropped() -> Patch:
    """Layers of a tower that have a number of the text model's are taken to be adapted already."""
    return _dropping(lambda name: ".layers." in name and not name.startswith("language_model."))


@media("media-of-another-request", source=("L06",), module=lora_media)
def _media_of_another() -> Patch:
    """All images and sounds of a batch are encoded with the adapter of the first row."""
    original = lora_media.soft_tokens

    def soft_tokens(
        adapters: Adapters, ids: Tensor, given: Media, wanted: Sequence[str | None]
    ) -> SoftTokens | None:
        return original(adapters, ids, given, [wanted[0]] * len(wanted))

    return replace(lora_media, "soft_tokens", soft_tokens)
