"""`adapter_config.json` in PEFT's form: which modules an adapter is for, with which rank and scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from model_impl.config import Count, Published, read_config, validated
from model_impl.errors import ConfigError
from model_impl.lora.patterns import Patterns

FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
"""What PEFT takes for every linear but the head."""

Number = TypeVar("Number", int, float)
_LayerIndex = Annotated[int, Field(ge=0)]

_OF_NO_CONCERN = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout",
    "loftq_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
"""Keys that change nothing in what a trained adapter computes."""
_REFUSED = {
    "alora_invocation_tokens": "the adapter acts behind certain tokens only",
    "arrow_config": "adapters are routed",
    "fan_in_fan_out": "weights are stored transposed",
    "layer_replication": "layers are repeated",
    "lora_bias": "the adapter adds a bias",
    "trainable_token_indices": "rows of an embedding are replaced",
    "use_bdlora": "matrices are block-diagonal",
    "use_dora": "weights are normed anew (DoRA)",
    "use_qalora": "inputs are pooled (QA-LoRA)",
}
"""What changes the computation in a way that this implementation does not have."""
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to draw an adapter's first weights that leave the model's own alone."""


class _Published(Published):
    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[_LayerIndex] | _LayerIndex | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says. Names of modules are those of the model it was trained on."""

    where: str
    """The file, for errors."""
    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...] | str
    """Ends of names; or one regular expression of whole names, or `all-linear`."""
    target_parameters: tuple[str, ...]
    exclude_modules: tuple[str, ...] | str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    ties: bool
    """Whether what is said of the embedding is meant of the head too, where the two are one weight."""
    patterns: Patterns = field(compare=False)
    _ranks: dict[str, int] = field(init=False, default_factory=dict, compare=False, repr=False)
    """By module: found once, and asked for with shapes and with scales."""

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig:
        """Read the configuration in an adapter's folder.

        Raises:
            ConfigError: it cannot be read, is of no LoRA adapter, or asks for more than this implementation
                has.
        """
        path = folder / FILE
        return cls.from_dict(read_config(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> AdapterConfig:
        """Take over what decides the computation; what would change it in an unknown way is refused.

        Raises:
            ConfigError: as `from_folder`.
        """
        _check_keys(raw, where)
        try:
            form = validated(_Published, raw, "adapter configuration")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if form.init_lora_weights not in (*_INITIAL, None):
            raise ConfigError(
                f"{where}: init_lora_weights {form.init_lora_weights!r} changes the model's own weights; "
                "save the adapter as plain LoRA (PEFT: `path_initial_model_for_weight_conversion`)"
            )
        target_modules = form.target_modules or ()
        layers = form.layers_to_transform
        if not target_modules and not form.target_parameters and not form.modules_to_save:
            raise ConfigError(f"{where}: there are no target_modules: the adapter would do nothing")
        if layers not in (None, []) and isinstance(target_modules, str):
            raise ConfigError(f"{where}: layers_to_transform needs a list of target_modules, not a pattern")
        return cls(
            where=where,
            rank=form.r,
            alpha=form.lora_alpha,
            rslora=form.use_rslora,
            target_modules=_strings(target_modules),
            target_parameters=tuple(form.target_parameters or ()),
            exclude_modules=_strings(form.exclude_modules or ()),
            rank_pattern=form.rank_pattern or {},
            alpha_pattern=form.alpha_pattern or {},
            modules_to_save=tuple(form.modules_to_save or ()),
            layers_to_transform=None
            if layers in (None, [])
            else frozenset([layers] if isinstance(layers, int) else layers or ()),
            layers_pattern=tuple(_several(form.layers_pattern)),
            ties=form.ensure_weight_tying,
            patterns=Patterns(where),
        )

    def targets(self, module: str, *, linear: bool = True) -> bool:
        """Whether the adapter is for a module.

        Args:
            module: Its name in the model that the adapter was trained on.
            linear: Whether it is a linear and not the head, which is what `all-linear` asks.

        Raises:
            ConfigError: a pattern is broken or takes too long.
        """
        if self._in(self.exclude_modules, module, "exclude_modules") or self.saves(module):
            return False
        if self.target_modules == ALL_LINEAR:
            return linear
        if not self._in(self.target_modules, module, "target_modules"):
            return False
        return self.layers_to_transform is None or self._layer(module) in self.layers_to_transform

    def targets_parameter(self, parameter: str) -> bool:
        """Whether the adapter is for a parameter that is no module's `weight`, by its whole name."""
        return any(_ends(parameter, end) for end in self.target_parameters)

    def saves(self, module: str) -> bool:
        """Whether the adapter holds a copy of a module, or of what the module is a part of."""
        parts = module.split(".")
        names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(name.endswith(end) for name in names for end in self.modules_to_save)

    def rank_of(self, module: str) -> int:
        """The rank for a module or parameter, by its whole name.

        Raises:
            ConfigError: as `targets`.
        """
        if module not in self._ranks:
            self._ranks[module] = self._by_pattern(self.rank_pattern, "rank_pattern", module, self.rank)
        return self._ranks[module]

    def scale_of(self, module: str) -> float:
        """What B A is multiplied with: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.

        Raises:
            ConfigError: as `targets`.
        """
        alpha = self._by_pattern(self.alpha_pattern, "alpha_pattern", module, self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _by_pattern(self, table: Mapping[str, Number], key: str, module: str, default: Number) -> Number:
        """The first pattern's that matches the end of a name."""
        for pattern, value in table.items():
            if self.patterns.ends(pattern, module, key):
                return value
        return default

    def _in(self, wanted: tuple[str, ...] | str, module: str, key: str) -> bool:
        if isinstance(wanted, str):
            return self.patterns.matches(wanted, module, key)
        return any(_ends(module, end) for end in wanted)

    def _layer(self, module: str) -> int | None:
        """The number of the layer that a module is in."""
        for pattern in self._layer_patterns():
            found = self.patterns.first(pattern, module, "layers_pattern")
            if found is not None:
                return int(found)
        return None

    def _layer_patterns(self) -> Iterator[str]:
        if not self.layers_pattern:
            yield r".*?\.[^.]*\.(?P<idx>\d+)\."
        for pattern in self.layers_pattern:
            yield rf"(?:^|.*?\.)(?:{pattern})\.(?P<idx>\d+)\."


def _check_keys(raw: Mapping[str, Any], where: str) -> None:
    """Refuse what is set and would be left out of account."""
    for key, value in raw.items():
        if key in _REFUSED and value:
            raise ConfigError(f"{where}: {key} is set: {_REFUSED[key]}, which is not supported here")
        known = key in _OF_NO_CONCERN or key in _REFUSED or key in _Published.model_fields
        if not known and value:
            raise ConfigError(
                f"{where}: {key} is set to {str(value)[:60]}, which this implementation does not know; it "
                "may change what the adapter computes"
            )
    if raw.get("bias") not in (None, "none"):
        raise ConfigError(f"{where}: bias {raw['bias']!r}: adapters that train biases are not supported here")


def _strings(value: list[str] | tuple[str, ...] | str) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value)


def _several(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value or [])


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
