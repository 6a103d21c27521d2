"""Random adapters in PEFT's form, and what they make of a checkpoint's weights.

Both are written from one draw: what an adapter has to do is known without reading it, so that a mistake in
reading shows. Needs torch, so it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance import lora_names
from conformance.errors import EngineError
from conformance.lora_suite import AdapterSpec, Damage, KeyForm

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_WRAPPED = "base_model.model."
_PREFIX = "model."
_TEXT = "language_model."
_TABLES = ("embed_tokens", "embed_tokens_per_layer")
_EMBEDDING = "model.language_model.embed_tokens.weight"
_HEAD = "lm_head"
_HALVES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_COPIED = 0.3
"""How far a copy of a module is from the original, relative to it."""


@dataclass(frozen=True)
class Module:
    """What an adapter can be for."""

    name: str
    """Published, below `model.`; of experts the parameter's."""
    shape: tuple[int, ...]
    stored: str
    """Name of its weight in the checkpoint; of a head that is the embedding, the name that it would have."""
    kind: Literal["linear", "experts", "table", "head"] = "linear"

    @property
    def experts(self) -> bool:
        """Whether there is a matrix for each expert."""
        return self.kind == "experts"

    @property
    def rare(self) -> bool:
        """Whether it is a table or the head, which nobody means who does not name them."""
        return self.kind in ("table", "head")

    @property
    def part(self) -> str:
        """`language_model`, or the name of a tower or connector."""
        return self.name.partition(".")[0]

    def named_by(self, ends: Sequence[str]) -> bool:
        """Whether one of these is the end of its name, or the part that it is in."""
        own = any(self.name == end or self.name.endswith(f".{end}") for end in ends)
        return own or (self.part in ends and not self.rare)

    def trained(self, keys: KeyForm | None) -> str:
        """Its name in the model that an adapter is trained on."""
        if self.kind == "head":
            return self.name
        if keys == "class":
            return f"model.{lora_names.in_class(self.name)}"
        return f"model.{self.name.removeprefix(_TEXT) if keys == 'text' else self.name}"


class Checkpoint:
    """The weights of a checkpoint, and the modules among them.

    Args:
        folder: With `config.json` and `model.safetensors`, under the published names of a whole model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = load_file(folder / "model.safetensors")
        self.modules = tuple(sorted(self._modules(), key=lambda module: module.name))

    @property
    def keys(self) -> KeyForm:
        """How modules are named in the model that the checkpoint is of."""
        return "whole" if self.config.get("vision_config") or self.config.get("audio_config") else "text"

    def select(self, ends: tuple[str, ...]) -> tuple[Module, ...]:
        """Modules by the ends of their names, or by the parts that they are in.

        Experts are not among them; tables and the head are by their own names alone.

        Raises:
            EngineError: nothing has such a name.
        """
        found: dict[str, Module] = {}
        for end in ends:
            own = [each for each in self.modules if not each.experts and each.named_by([end])]
            if not own:
                raise EngineError(f"the checkpoint has no module {end!r} that an adapter could be for")
            found |= {each.name: each for each in own}
        return tuple(found.values())

    def layer(self, module: Module) -> int | None:
        """The number of the text model's layer that a module is in."""
        parts = module.name.split(".")
        return int(parts[2]) if parts[:2] == ["language_model", "layers"] else None

    def weight(self, module: Module) -> Tensor:
        """A module's weight in float32; the head's is the embedding's, if the two are one."""
        stored = module.stored if module.stored in self.weights else _EMBEDDING
        return self.weights[stored].float()

    def _modules(self) -> Iterator[Module]:
        text = self.config.get("text_config", self.config)
        first_shared = text["num_hidden_layers"] - (text.get("num_kv_shared_layers") or 0)
        for stored, weight in self.weights.items():
            name = stored.removeprefix(_PREFIX).removesuffix(".weight")
            own = Module(name, tuple(weight.shape), stored)
            layer = self.layer(own)
            dead = layer is not None and layer >= first_shared and name.endswith((".k_proj", ".v_proj"))
            if weight.ndim == 3 and ".experts." in name:
                yield replace(own, kind="experts")
            elif stored.endswith(".weight") and weight.ndim == 2 and not dead:
                yield replace(own, kind="table") if name.split(".")[-1] in _TABLES else own
        yield Module(_HEAD, tuple(self.weights[_EMBEDDING].shape), f"{_HEAD}.weight", "head")


@dataclass(frozen=True)
class Drawn:
    """What an adapter makes of a checkpoint."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The adapter's own."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The checkpoint's that it changes, as they become, by their stored names."""
    modules: tuple[Module, ...] = ()
    """That it is for."""


def draw(checkpoint: Checkpoint, spec: AdapterSpec, *, only: Module | None = None) -> Drawn:
    """Draw an adapter's tensors, and the weights that follow from them.

    Args:
        checkpoint: It fits.
        spec: What it is for, and how.
        only: For this module alone, whatever `spec` says.

    Raises:
        EngineError: the checkpoint lacks what the adapter is for.
    """
    if only is None:
        linear = [each for each in checkpoint.select(spec.modules) if _in_layers(checkpoint, each, spec)]
        experts = [each for each in checkpoint.modules if each.experts] if spec.experts else []
        if spec.experts and not experts:
            raise EngineError("the checkpoint has no experts")
    else:
        linear, experts = ([], [only]) if only.experts else ([only], [])
    drawn = Drawn(modules=(*linear, *experts))
    for module in linear:
        _draw_linear(drawn, checkpoint, spec, module)
    for module in experts:
        if spec.experts == "single":
            _draw_single(drawn, checkpoint, spec, module)
        else:
            _draw_stacked(drawn, checkpoint, spec, module, alone=only is not None)
    for end in spec.save if only is None else ():
        _draw_copies(drawn, checkpoint, spec, end)
    return drawn


def write(drawn: Drawn, spec: AdapterSpec, folder: Path, *, only: Module | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        drawn: From `draw`.
        spec: As there.
        folder: Must exist.
        only: As there.
    """
    save_file(drawn.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_configuration(drawn, spec, only), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def zeroed(drawn: Drawn) -> Drawn:
    """The same adapter, every B of it zero."""
    tensors = {
        name: torch.zeros_like(tensor) if ".lora_B." in name or name.endswith(".lora_embedding_B") else tensor
        for name, tensor in drawn.tensors.items()
    }
    return Drawn(tensors, {}, drawn.modules)


def _configuration(drawn: Drawn, spec: AdapterSpec, only: Module | None) -> dict[str, Any]:
    """`adapter_config.json`, as PEFT writes it."""
    targets: list[str] = []
    for end in spec.modules:
        whole = [module.trained(spec.keys) for module in drawn.modules if module.part == end != module.name]
        targets += whole or [end]
    parameters: list[str] | None = None
    if only is not None and not only.experts:
        targets = [only.trained(spec.keys)]
    elif only is not None:
        targets = []
    if spec.experts == "single":
        found = (re.search(r"experts\.\d+\.\w+", name) for name in drawn.tensors)
        targets = [*targets, *sorted({match[0] for match in found if match})]
    elif spec.experts == "stacked" and (only is None or only.experts):
        names = ("gate_up_proj", "down_proj")
        parameters = [
            f"experts.{name}" for name in names if only is None or only.name.endswith(f".experts.{name}")
        ]
        if only is not None:
            parameters = [only.trained(spec.keys)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": spec.rslora,
        "use_dora": False,
        "rank_pattern": spec.rank_pattern,
        "alpha_pattern": spec.alpha_pattern,
        "target_modules": (spec.pattern if only is None else "") or targets or None,
        "target_parameters": parameters,
        "modules_to_save": list(spec.save) or None,
        "layers_to_transform": list(spec.layers) or None,
        "layers_pattern": "layers" if spec.layers else None,
    }


def damage(folder: Path, how: Damage) -> None:
    """Damage an adapter's files."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    first = min(name for name in tensors if ".lora_A." in name)
    other = first.replace(".lora_A.", ".lora_B.")
    changed = dict(tensors)
    if how == "truncated":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        return
    if how == "half":
        del changed[other]
    elif how == "rank":
        changed[first] = torch.cat([tensors[first], tensors[first]])
        changed[other] = torch.cat([tensors[other], tensors[other]], dim=1)
    elif how == "shape":
        changed[first] = torch.cat([tensors[first], tensors[first]], dim=1)
    elif how == "no-prefix":
        changed = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    elif how == "empty":
        changed = {}
    else:
        new = _elsewhere(first, how)
        changed[new] = tensors[first].clone()
        changed[new.replace(".lora_A.", ".lora_B.")] = tensors[other].clone()
    save_file(changed, path, metadata={"format": "pt"})


def _elsewhere(name: str, how: Damage) -> str:
    """A tensor's name with another module, or another layer, in it."""
    parts = name.split(".")
    at = parts.index("lora_A")
    if how == "absent-layer":
        number = parts.index("layers") + 1
        parts[number] = "77"
    else:
        parts[at - 1] = "w_proj"
    return ".".join(parts)


# ------------------------------------------------------------------------------------------------ drawing


def _draw_linear(drawn: Drawn, checkpoint: Checkpoint, spec: AdapterSpec, module: Module) -> None:
    trained = module.trained(spec.keys)
    weight = checkpoint.weight(module)
    if module.kind == "table":
        a, b, change = _pair(spec, trained, weight.T)
        drawn.tensors[f"{_WRAPPED}{trained}.lora_embedding_A"] = a
        drawn.tensors[f"{_WRAPPED}{trained}.lora_embedding_B"] = b
        drawn.weights[module.stored] = weight + change.T
        return
    a, b, change = _pair(spec, trained, weight)
    drawn.tensors[f"{_WRAPPED}{trained}.lora_A.weight"] = a
    drawn.tensors[f"{_WRAPPED}{trained}.lora_B.weight"] = b
    drawn.weights[module.stored] = weight + change


def _draw_stacked(
    drawn: Drawn, checkpoint: Checkpoint, spec: AdapterSpec, module: Module, *, alone: bool
) -> None:
    trained = module.trained(spec.keys)
    weights = checkpoint.weights[module.stored].float()
    made = [_pair(spec, trained, weight, f"expert {number}") for number, weight in enumerate(weights)]
    outside, _, parameter = trained.rpartition(".")
    # Of two parameters the first one's matrices are inside.
    place = f"{outside}.base_layer" if parameter == "gate_up_proj" and not alone else outside
    drawn.tensors[f"{_WRAPPED}{place}.lora_A.weight"] = torch.cat([a for a, _, _ in made])
    b = torch.stack([b for _, b, _ in made], dim=-1)
    drawn.tensors[f"{_WRAPPED}{place}.lora_B.weight"] = b.flatten(1).contiguous()
    drawn.weights[module.stored] = weights + torch.stack([change for _, _, change in made])


def _draw_single(drawn: Drawn, checkpoint: Checkpoint, spec: AdapterSpec, module: Module) -> None:
    weights = checkpoint.weights[module.stored].float().clone()
    outside, _, parameter = module.trained(spec.keys).rpartition(".")
    numbers = range(len(weights)) if spec.expert is None else [spec.expert]
    for number in numbers:
        for projection, own in _HALVES.items():
            if own != parameter:
                continue
            part = weights[number]
            if parameter == "gate_up_proj":
                part = part.chunk(2)[projection == "up_proj"]
            name = f"{outside}.{number}.{projection}"
            a, b, change = _pair(spec, name, part)
            drawn.tensors[f"{_WRAPPED}{name}.lora_A.weight"] = a
            drawn.tensors[f"{_WRAPPED}{name}.lora_B.weight"] = b
            part += change
    drawn.weights[module.stored] = weights


def _draw_copies(drawn: Drawn, checkpoint: Checkpoint, spec: AdapterSpec, end: str) -> None:
    found = [name for name in checkpoint.weights if name.removesuffix(".weight").endswith(end)]
    if not found:
        raise EngineError(f"the checkpoint has no module {end!r} that an adapter could hold a copy of")
    for stored in found:
        weight = checkpoint.weights[stored].float()
        noise = torch.randn(weight.shape, generator=_generator(spec, stored))
        changed = weight * (1 + _COPIED * noise)
        module = Module(stored.removeprefix(_PREFIX).removesuffix(".weight"), tuple(weight.shape), stored)
        drawn.tensors[f"{_WRAPPED}{module.trained(spec.keys)}.weight"] = changed
        drawn.weights[stored] = changed


def _pair(spec: AdapterSpec, name: str, weight: Tensor, what: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """A, B, and what they add to a weight: all in float32."""
    rank = _by_end(spec.rank_pattern, name, spec.rank)
    alpha = _by_end(spec.alpha_pattern, name, spec.alpha)
    factor = alpha / (math.sqrt(rank) if spec.rslora else rank)
    rows, columns = weight.shape
    generator = _generator(spec, f"{name} {what}")
    a = torch.randn(rank, columns, generator=generator) * columns**-0.5
    b = torch.randn(rows, rank, generator=generator)
    b *= spec.scale * weight.norm() / (factor * (b @ a).norm())
    return a, b, factor * (b @ a)


def _by_end(table: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for end, value in table.items() if name == end or name.endswith(f".{end}")), default)


def _in_layers(checkpoint: Checkpoint, module: Module, spec: AdapterSpec) -> bool:
    return not spec.layers or checkpoint.layer(module) in spec.layers


def _generator(spec: AdapterSpec, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
