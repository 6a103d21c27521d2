"""Adapters on a running model: which of them each row of a batch uses, and merging one into the weights.

1. Modules get hooks that add to what they give; the model's own weights stay as they are.
2. Rows without an adapter keep the very numbers that they have without any: only rows that use one are added
   to.
3. Where keys are values, `k_proj` is one module whose output becomes both, so an adapter on it changes both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from model_impl.errors import ConfigError, ModelError
from model_impl.layers.moe import Experts, Rows, grouped_linear
from model_impl.layout import along_longer_side
from model_impl.lora.adapter import Adapter, LowRank, Parts, names
from model_impl.lora.sites import EMBEDDING, HEAD, Model, Sites
from model_impl.multimodal import Gemma4ForConditionalGeneration


@runtime_checkable
class LowRankModule(Protocol):
    """A module that knows what is added to its output when B A is added to its weight.

    Layers that several ranks hold parts of are such modules: each has its part of A or of B.
    """

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Inputs as of `forward`, A [r, in] and B [out, r], to what is added."""
        ...


class AdapterError(ModelError):
    """Adapters are used in a way that they cannot be: says which one, and what to do."""


@dataclass(frozen=True)
class Active:
    """Which adapter each row of the batch uses."""

    names: tuple[str, ...]
    """Those in use."""
    rows: Tensor
    """int64 [rows]: place in `names`, or -1."""

    @property
    def uniform(self) -> bool:
        """Whether all rows use the same one."""
        return bool((self.rows == self.rows[0]).all())

    def select(self, name: str, places: int) -> Tensor:
        """Which of so many places, row by row, use an adapter: bool [places].

        Raises:
            AdapterError: the places are not as many for each row.
        """
        if places % len(self.rows):
            raise AdapterError(f"a pass has {places} places, and {len(self.rows)} rows were announced")
        return (self.rows == self.names.index(name)).repeat_interleave(places // len(self.rows))


class Adapters:
    """The adapters of one model.

    Args:
        model: On one device. Its modules get hooks as adapters are added.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sites = Sites(model)
        self._adapters: dict[str, Parts] = {}
        self._used: set[str] = set()
        self._changes: dict[str, dict[str, LowRank]] = {}
        self._active: Active | None = None
        self._hooked: dict[str, RemovableHandle | None] = {}
        self._copying = False
        self._kept: dict[str, Tensor] = {}
        self._merged: str | None = None
        self._acted: dict[str, set[str]] = {}

    def add(self, name: str, adapter: Parts) -> None:
        """Make an adapter ready for use; nothing changes until rows ask for it.

        Args:
            name: By which rows ask for it. It stands for this adapter for good, as a prefix cache knows
                blocks by it.
            adapter: Checked against this model, or against a whole model of which this is the text model; or
                the parts of one that a rank holds.

        Raises:
            AdapterError: there is or was one of this name, or this model lacks a module that it is for.
        """
        check_new(name, self._adapters, self._used)
        absent = [site for site in names(adapter) if self.sites.get(site) is None]
        if absent:
            raise AdapterError(
                f"{adapter.where}: this model has no {', '.join(absent[:4])}; load the whole one"
            )
        like = self._text_weight()
        self._changes[name] = {site: change.to(like) for site, change in adapter.changes.items()}
        self._adapters[name] = adapter
        self._used.add(name)
        for site in names(adapter):
            self._hook(site)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterError: there is none of this name, or it is in use or merged.
        """
        self._get(name)
        if name == self._merged or (self._active is not None and name in self._active.names):
            raise AdapterError(f"the adapter {name!r} is in use; unmerge it, or wait until the pass is over")
        del self._adapters[name], self._changes[name]
        self._acted.pop(name, None)

    @contextmanager
    def rows(self, wanted: Sequence[str | None]) -> Iterator[None]:
        """Let rows of the passes inside use adapters.

        Args:
            wanted: For each row the name of its adapter, or None.

        Raises:
            AdapterError: there is no adapter of that name, or one is merged.
        """
        used = tuple(dict.fromkeys(name for name in wanted if name is not None))
        for name in used:
            self._get(name)
        if used and self._merged is not None:
            raise AdapterError(f"the adapter {self._merged!r} is merged into the weights; unmerge it first")
        places = [-1 if name is None else used.index(name) for name in wanted]
        before = self._active
        device = self._text_weight().device
        self._active = Active(used, torch.tensor(places, device=device)) if used else None
        try:
            yield
        finally:
            self._active = before

    def acted(self, name: str) -> tuple[str, ...]:
        """The sites at which an adapter has changed what a pass computed, since it was added.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        self._get(name)
        return tuple(sorted(self._acted.get(name, ())))

    def merge(self, name: str) -> None:
        """Put an adapter into the weights, for all rows; the weights that were there are kept.

        Raises:
            AdapterError: one is merged already, rows use one, or this is a part of a model.
            ConfigError: as `check_head`.
        """
        adapter = self._get(name)
        if not isinstance(adapter, Adapter):
            raise AdapterError(f"of the adapter {name!r} only parts are here; merge it into the checkpoint")
        if self._merged is not None or self._active is not None:
            raise AdapterError(
                f"the adapter {name!r} cannot be merged: another one is merged, or rows use one"
            )
        check_head(adapter, tied=self._tied())
        for key, merged in merged_weights(adapter, self._parameter).items():
            holder, parameter = self._holder(key)
            own = getattr(holder, parameter)
            self._kept[key] = own.data
            data = merged.to(own.dtype)
            own.data = along_longer_side(data) if isinstance(holder, nn.Linear) else data
        self._merged = name

    def unmerge(self) -> None:
        """Give the model its own weights back, bit by bit."""
        for key, own in self._kept.items():
            holder, parameter = self._holder(key)
            getattr(holder, parameter).data = own
        self._kept.clear()
        self._merged = None

    # -------------------------------------------------------------------------------------------- hooks

    def _hook(self, site: str) -> None:
        if site in self._hooked:
            return
        kept = self.sites.get(site)
        assert kept is not None
        if kept.kind == "experts":
            module = self.sites.modules[kept.experts_module]
            assert isinstance(module, Experts)
            module.change = partial(self._change_experts, kept.experts_module)
            self._hooked[site] = None
        else:
            module = self.sites.modules[site]
            self._hooked[site] = module.register_forward_hook(partial(self._change, site))

    def _change(self, site: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """What a module gives, with what the adapters of the rows make of it."""
        active = self._active
        if active is None or self._copying:
            return output
        for name in active.names:
            low_rank = self._changes[name].get(site)
            copy = self._adapters[name].copies.get(site)
            if low_rank is None and copy is None:
                continue
            changed = self._copied(module, copy, inputs) if copy else added(module, low_rank, inputs, output)
            output = self._chosen(site, name, changed, output, inputs[0])
        return output

    def _change_experts(self, site: str, parameter: str, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        active = self._active
        if active is None:
            return y
        for name in active.names:
            low_rank = self._changes[name].get(f"{site}.{parameter}")
            if low_rank is None:
                continue
            inner = grouped_linear(x, low_rank.a, rows.hit, rows.counts)
            before, y = y, y + grouped_linear(inner, low_rank.b, rows.hit, rows.counts)
            if not active.uniform:
                mine = active.select(name, rows.total)[rows.tokens]
                y = torch.where(mine[:, None], y, before)
            self._note(name, f"{site}.{parameter}", y, before)
        return y

    def _chosen(self, site: str, name: str, changed: Tensor, output: Tensor, given: Tensor) -> Tensor:
        """Changed output for the rows that use an adapter, the output as it was for the others."""
        active = self._active
        assert active is not None
        if active.uniform:
            self._note(name, site, changed, output)
            return changed
        if self.sites.mapping.part(site) != "language_model":
            raise AdapterError(
                f"{site} works on media of several rows at once, and the rows use different adapters; encode "
                "them with `lora.media.soft_tokens`"
            )
        width = 1 if given.dtype in (torch.int32, torch.int64) else given.shape[-1]
        mine = active.select(name, given.numel() // width)
        chosen = torch.where(mine.view(*output.shape[:-1], 1), changed, output)
        self._note(name, site, chosen, output)
        return chosen

    def _copied(self, module: nn.Module, parameters: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """What a module gives with other parameters."""
        like = self._text_weight()
        own = {name: tensor.to(like) for name, tensor in parameters.items()}
        if list(module.parameters(recurse=False)) == []:  # the tied head, whose weight is an argument
            return F.linear(inputs[0], own["weight"])
        self._copying = True
        try:
            result: Tensor = functional_call(module, own, inputs)
        finally:
            self._copying = False
        return result

    def _note(self, name: str, site: str, after: Tensor, before: Tensor) -> None:
        """Remember where an adapter has changed its own rows; compares until it has."""
        if site not in self._acted.get(name, ()) and bool((after != before).any()):
            self._acted.setdefault(name, set()).add(site)

    # -------------------------------------------------------------------------------------------- parts

    def _get(self, name: str) -> Parts:
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise AdapterError(f"there is no adapter {name!r}; there are: {known}")
        return self._adapters[name]

    def _text_weight(self) -> Tensor:
        model = self.model
        text = model.language_model if isinstance(model, Gemma4ForConditionalGeneration) else model
        return next(text.parameters())

    def _tied(self) -> bool:
        return self.sites.config.tie_word_embeddings

    def _holder(self, key: str) -> tuple[nn.Module, str]:
        """The module that a merged parameter belongs to, and its own name."""
        module, _, parameter = key.rpartition(".")
        return self.sites.modules[module], parameter

    def _parameter(self, key: str) -> Tensor:
        holder, parameter = self._holder(key)
        tensor: Tensor = getattr(holder, parameter).data
        return tensor


def added(module: nn.Module, change: LowRank | None, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A module's output and what a low-rank change of its weight adds to it."""
    assert change is not None
    if isinstance(module, LowRankModule):
        return output + module.low_rank(inputs[0], change.a, change.b)
    if isinstance(module, nn.Embedding):
        return output + F.linear(F.embedding(inputs[0], change.a.T), change.b)
    return output + F.linear(F.linear(inputs[0], change.a), change.b)


def check_new(name: str, known: Collection[str], used: Collection[str]) -> None:
    """Refuse a name that stands, or stood, for another adapter.

    Raises:
        AdapterError: it does.
    """
    if name in known:
        raise AdapterError(f"there is an adapter {name!r} already; choose another name")
    if name in used:
        raise AdapterError(
            f"{name!r} was the name of an adapter that is gone, and caches may hold what that one made; "
            "choose another name"
        )


def merged_weights(adapter: Adapter, weight_of: Any) -> dict[str, Tensor]:
    """The weights that an adapter makes of a model's, in float32, by the names of parameters.

    Args:
        adapter: It.
        weight_of: Gives a parameter by its name: a site's name with `.weight`, or an expert parameter's name.
    """
    made: dict[str, Tensor] = {}
    for name, change in adapter.changes.items():
        site = adapter.sites[name]
        key = name if site.kind == "experts" else f"{name}.weight"
        own: Tensor = weight_of(key)
        made[key] = own.float() + change.product(embedding=site.kind == "embedding").to(own.device)
    for name, parameters in adapter.copies.items():
        made |= {f"{name}.{parameter}": tensor.float() for parameter, tensor in parameters.items()}
    return made


def check_head(adapter: Adapter, *, tied: bool) -> None:
    """Refuse to merge what would change the head with the embedding, or the embedding with the head.

    Raises:
        ConfigError: the two are one weight, and the adapter changes one of them.
    """
    apart = {EMBEDDING, HEAD} & set(names(adapter))
    if tied and apart:
        raise ConfigError(
            f"{adapter.where}: {min(apart)} cannot be merged: the head and the embedding are one weight, and "
            "the adapter changes one of the two; apply it instead"
        )


__all__ = [
    "Active",
    "AdapterError",
    "Adapters",
    "LowRankModule",
    "check_head",
    "check_new",
    "merged_weights",
]
