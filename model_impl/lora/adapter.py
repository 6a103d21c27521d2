"""An adapter's tensors: every one of them gets its place in a model, or is named in an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model_impl.errors import CheckpointError
from model_impl.lora import expert_keys
from model_impl.lora.config import AdapterConfig
from model_impl.lora.sites import EMBEDDING, HEAD, TEXT, Site, Sites, in_class

FILE = "adapter_model.safetensors"
WRAPPED = "base_model.model."
"""What PEFT puts before the name that a module has in the model it was trained on."""
Form = Literal["text", "whole"]
"""Of names: `model.layers.0…`, as in a text model, or `model.language_model.layers.0…`, as in a whole one."""

_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?P<weight>\.weight)?")
_LISTED = 8


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight: B A, with the scale in B.

    `a` is [r, in] and `b` [out, r]; of experts [experts, r, in] and [experts, out, r]; of an embedding
    [r, rows] and [width, r].
    """

    a: Tensor
    b: Tensor

    def to(self, like: Tensor) -> LowRank:
        """In the dtype and on the device of a weight."""
        return LowRank(self.a.to(like), self.b.to(like))

    def product(self, *, embedding: bool = False) -> Tensor:
        """B A in float32, in the shape of the weight."""
        made = self.b.float() @ self.a.float()
        return made.mT if embedding else made


@dataclass(frozen=True)
class Parts:
    """What an adapter does at some sites: all of them, or those that a process holds."""

    where: str
    """The adapter's folder, for errors."""
    changes: Mapping[str, LowRank]
    """By the names of sites."""
    copies: Mapping[str, Mapping[str, Tensor]]
    """Whole parameters (`weight`, `bias`) that stand in the place of the model's own, by site."""

    def only(self, wanted: Callable[[str], bool]) -> Parts:
        """Those at the sites whose names are wanted."""
        return Parts(
            self.where,
            {name: change for name, change in self.changes.items() if wanted(name)},
            {name: copy for name, copy in self.copies.items() if wanted(name)},
        )


@dataclass(frozen=True)
class Adapter(Parts):
    """A LoRA adapter that fits a model."""

    config: AdapterConfig
    dead: tuple[str, ...] = ()
    """Tensors for keys and values of layers that share another's: the model has no such projection, and no
    computation reads them."""
    sites: Mapping[str, Site] = field(default_factory=dict)
    """Those of `changes` and `copies`."""

    @classmethod
    def load(cls, folder: Path, sites: Sites) -> Adapter:
        """Read an adapter and check it against a model; nothing is applied.

        Args:
            folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
            sites: Of the model.

        Raises:
            ConfigError: as `AdapterConfig.from_folder`.
            CheckpointError: the file is missing or broken; tensors are for modules that the model or the
                configuration does not have, have other shapes or ranks, or are not there.
        """
        config = AdapterConfig.from_folder(folder)
        return _Reader(folder, config, sites).read(_tensors(folder / FILE))


class _Pair(NamedTuple):
    """Both halves of a low-rank product, and the name of their module in the model they were trained on."""

    module: str
    a: Tensor
    b: Tensor
    embedding: bool


class _Reader:
    """Gives each tensor of a file its place."""

    def __init__(self, folder: Path, config: AdapterConfig, sites: Sites) -> None:
        self._folder = folder
        self._config = config
        self._sites = sites
        self._form: Form = "whole"
        self._renames = False
        """Names are those of transformers' own class, where that has others than the published ones."""
        self._changes: dict[str, LowRank] = {}
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._dead: list[str] = []
        self._named: dict[str, str] = {}
        """By site or expert, the name in the file that led there."""

    def read(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """The adapter that the tensors make."""
        names = self._unwrapped(tensors)
        self._form = self._form_of(names)
        self._renames = any(_module_of(name) in self._sites.renamed for name in names)
        pairs, others = self._pairs(names)
        self._check_tied({*(pair.module for pair in pairs), *(name.rpartition(".")[0] for name in others)})
        expert_pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            at = expert_keys.split(self._site_name(pair.module))
            if at is not None and self._sites.experts(at.module):
                if pair.embedding:
                    self._refuse("are of a form that does not suit experts", [pair.module])
                self._once(f"{at.module}.{at.rest}", pair.module)
                expert_pairs.setdefault(at.module, {})[at.rest] = (pair.a, pair.b)
            else:
                self._add(pair)
        for module, own in expert_pairs.items():
            self._add_experts(module, own)
        for name, tensor in others.items():
            self._copy(name, tensor)
        self._check_complete()
        if not self._changes and not self._copies:
            raise CheckpointError(f"{self._folder}: no tensor changes anything; {self._dead_note()}")
        found = {site.name: site for site in self._sites if site.name in {*self._changes, *self._copies}}
        return Adapter(str(self._folder), self._changes, self._copies, self._config, tuple(self._dead), found)

    # -------------------------------------------------------------------------------------------- names

    def _unwrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        foreign = [key for key in tensors if not key.startswith(WRAPPED)]
        if foreign:
            self._refuse("do not begin with `base_model.model.`, as PEFT saves them", foreign)
        return {key.removeprefix(WRAPPED): tensor for key, tensor in tensors.items()}

    def _form_of(self, names: Mapping[str, Tensor]) -> Form:
        """Whether the adapter was trained on a text model or a whole one."""
        parts = {name.split(".")[1] for name in names if name.startswith("model.")}
        whole = {TEXT.rstrip("."), *self._sites.mapping.towers, *self._sites.mapping.connectors} & parts
        if "layers" in parts and whole:
            raise CheckpointError(
                f"{self._folder}: some tensors are named as in a text model (model.layers…), others as in a "
                f"whole one (model.{min(whole)}…); an adapter is trained on one of them"
            )
        return "whole" if whole else "text"

    def _site_name(self, module: str) -> str:
        """The site's name of a module's name in the model that the adapter was trained on."""
        if module == HEAD:
            return HEAD
        inner = module.removeprefix("model.")
        return self._sites.renamed.get(inner, inner) if self._form == "whole" else f"{TEXT}{inner}"

    def _trained_name(self, site: Site) -> str | None:
        """The other way; None where that model had no such site."""
        if site.name == HEAD:
            return HEAD
        if self._form == "whole":
            return f"model.{in_class(site.name) if self._renames else site.name}"
        return f"model.{site.name.removeprefix(TEXT)}" if site.name.startswith(TEXT) else None

    # -------------------------------------------------------------------------------------------- tensors

    def _pairs(self, names: Mapping[str, Tensor]) -> tuple[list[_Pair], dict[str, Tensor]]:
        """Low-rank products, and the tensors that belong to none."""
        halves: dict[tuple[str, bool], dict[str, Tensor]] = {}
        others = {}
        odd = []
        for name, tensor in names.items():
            match = _LOW_RANK.fullmatch(name)
            if match is None:
                others[name] = tensor
            elif bool(match["embedding"]) == bool(match["weight"]) or tensor.ndim != 2:
                odd.append(name)
            else:
                halves.setdefault((match["module"], bool(match["embedding"])), {})[match["half"]] = tensor
        odd += [name for name in others if "lora_" in name]
        if odd:
            self._refuse(
                "are no matrices named `….lora_A.weight`, `….lora_B.weight`, `….lora_embedding_A` or "
                "`….lora_embedding_B`",
                odd,
            )
        single = [module for (module, _), own in halves.items() if set(own) != {"A", "B"}]
        if single:
            self._refuse("have one of lora_A and lora_B; expected lora_A and lora_B for every module", single)
        return [
            _Pair(module, own["A"], own["B"], embedding) for (module, embedding), own in halves.items()
        ], others

    def _add(self, pair: _Pair) -> None:
        name = self._site_name(pair.module)
        dead = self._sites.dead(name)
        site = dead or self._sites.get(name)
        if site is None:
            self._refuse(self._unknown(name), [pair.module])
            return
        self._once(name, pair.module)
        if site.kind not in ("linear", "head", "embedding") or (site.kind == "embedding") != pair.embedding:
            self._refuse(f"are of a form that does not suit a module of kind {site.kind!r}", [pair.module])
        if not self._config.targets(pair.module, linear=site.kind == "linear"):
            self._refuse("are for modules that target_modules does not name", [pair.module])
        rows, columns = reversed(site.shape) if pair.embedding else site.shape
        rank = self._config.rank_of(pair.module)
        self._check_shapes(pair, (rank, columns), (rows, rank), rank)
        if dead is not None:
            self._dead.append(pair.module)
            return
        self._changes[name] = LowRank(pair.a, pair.b.float() * self._config.scale_of(pair.module))

    def _add_experts(self, module: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        parameters = self._sites.experts(module)
        trained = str(self._trained_name(next(iter(parameters.values())))).rpartition(".")[0]
        for parameter, made in expert_keys.read(trained, pairs, parameters, self._config).items():
            self._changes[parameters[parameter].name] = LowRank(*made)

    def _copy(self, name: str, tensor: Tensor) -> None:
        module, _, parameter = name.rpartition(".")
        if module.endswith(".base_layer"):
            self._refuse(
                "are copies of the model's own weights; save the adapter with save_embedding_layers=False",
                [name],
            )
        site = self._sites.get(self._site_name(module))
        own = None if site is None else getattr(self._sites.modules.get(site.name), parameter, None)
        if site is not None and site.kind == "head" and parameter == "weight":
            own = torch.empty(site.shape, device="meta")
        if site is None or not isinstance(own, Tensor):
            self._refuse(self._unknown(self._site_name(module)), [name])
            return
        self._once(site.name, module)
        if not self._config.saves(module):
            self._refuse("are whole weights of modules that modules_to_save does not name", [name])
        if tensor.shape != own.shape:
            self._refuse(f"have the shape {list(tensor.shape)}, the model has {list(own.shape)}", [name])
        self._copies.setdefault(site.name, {})[parameter] = tensor

    # -------------------------------------------------------------------------------------------- checks

    def _once(self, place: str, module: str) -> None:
        """Refuse a second name that leads to the same place: one of the two would be lost."""
        first = self._named.setdefault(place, module)
        if first != module:
            self._refuse("are two names of one module; an adapter has one for each", [first, module])

    def _check_shapes(self, pair: _Pair, a: tuple[int, int], b: tuple[int, int], rank: int) -> None:
        if tuple(pair.a.shape) != a or tuple(pair.b.shape) != b:
            self._refuse(
                f"are {list(pair.a.shape)} and {list(pair.b.shape)}; with the rank {rank} of the "
                f"configuration and the shape of the module they must be {list(a)} and {list(b)}",
                [pair.module],
            )

    def _check_tied(self, modules: Collection[str]) -> None:
        """Refuse what changes the embedding and the head as the one weight that they are."""
        tied = [module for module in modules if self._site_name(module) in (EMBEDDING, HEAD)]
        if tied and self._config.ties and self._sites.config.tie_word_embeddings:
            self._refuse(
                "are adapted with ensure_weight_tying: embedding and head change together, which is not "
                "supported here; train with it off, or leave them alone",
                tied,
            )

    def _check_complete(self) -> None:
        """Refuse an adapter that lacks tensors for what its configuration names."""
        absent = []
        for site in self._sites:
            trained = self._trained_name(site)
            if trained is None or site.name in self._changes or site.name in self._copies:
                continue
            wanted = (
                self._config.targets_parameter(trained)
                if site.kind == "experts"
                else site.kind != "copy" and self._config.targets(trained, linear=site.kind == "linear")
            )
            if wanted or (site.kind != "experts" and self._config.saves(trained)):
                absent.append(trained)
        if absent:
            self._refuse("are named by the configuration and have no tensors; the file is not whole", absent)

    def _unknown(self, name: str) -> str:
        first = name.partition(".")[0]
        mapping = self._sites.mapping
        parts = (*mapping.language_model, *mapping.towers, *mapping.connectors)
        if first not in parts:
            return f"are for a part {first!r} that this model does not have; it has {', '.join(parts)}"
        inner = self._sites.get(f"{name}.linear")
        return f"are for no module of this model{'; name the linear inside' if inner else ''}"

    def _refuse(self, what: str, names: list[str]) -> None:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise CheckpointError(f"{self._folder}: {', '.join(sorted(names)[:_LISTED])}{more} {what}")

    def _dead_note(self) -> str:
        return f"{len(self._dead)} are for projections of layers that share another's keys and values"


def _module_of(name: str) -> str:
    """The module that a tensor is for, by its name below `model.` in the model it was trained on."""
    match = _LOW_RANK.fullmatch(name)
    return (match["module"] if match else name.rpartition(".")[0]).removeprefix("model.")


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, checked for numbers.

    Raises:
        CheckpointError: it is missing or broken, or holds something else than finite floating-point numbers.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; adapters are read from safetensors and nothing else"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    if not tensors:
        raise CheckpointError(f"{path}: there are no tensors")
    for what, wrong in _WRONG_NUMBERS.items():
        found = sorted(key for key, tensor in tensors.items() if wrong(tensor))
        if found:
            raise CheckpointError(f"{path}: {', '.join(found[:_LISTED])} {what}")
    return tensors


_WRONG_NUMBERS: dict[str, Callable[[Tensor], bool]] = {
    "holds no floating-point numbers; quantised adapters are not supported": lambda tensor: (
        not tensor.is_floating_point() or tensor.element_size() < 2
    ),
    "is not finite": lambda tensor: not bool(tensor.isfinite().all()),
}


def names(adapter: Parts) -> Iterator[str]:
    """The sites on which an adapter acts."""
    yield from sorted({*adapter.changes, *adapter.copies})


__all__ = ["FILE", "WRAPPED", "Adapter", "LowRank", "Parts", "names"]
