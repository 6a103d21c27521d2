"""Both published forms of adapters for experts (fact sheet, section 7.2).

1. PEFT's `target_parameters`: matrices for all experts at once. The first of the two parameters is named
   `experts.base_layer.lora_A`, or `experts.lora_A` if it is the only one; the second `experts.lora_A`. A is
   [r · experts, in], expert by expert; B is [out, r · experts], its columns rank by rank.
2. One pair of matrices for each expert and projection: `experts.7.gate_proj.lora_A`. Experts may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model_impl.errors import CheckpointError
from model_impl.lora.config import AdapterConfig
from model_impl.lora.sites import Site

_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
"""One way to write each, so that an expert has one name."""
_EXPERTS = re.compile(rf"(?P<module>.+\.experts)(?:\.(?P<rest>base_layer|{_NUMBER}\.[a-z_]+))?")
_ONE = re.compile(rf"(?P<expert>{_NUMBER})\.(?P<projection>gate_proj|up_proj|down_proj)")
Pairs = Mapping[str, tuple[Tensor, Tensor]]


class Place(NamedTuple):
    """A name below an experts module."""

    module: str
    rest: str
    """Empty, `base_layer`, or an expert's number with a projection."""


def split(name: str) -> Place | None:
    """The experts module that a name belongs to, and what follows; None if there is none."""
    match = _EXPERTS.fullmatch(name)
    return None if match is None else Place(match["module"], match["rest"] or "")


def read(
    trained: str, pairs: Pairs, parameters: Mapping[str, Site], config: AdapterConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices of one experts module, by parameter: [experts, r, in] and [experts, out, r], scaled.

    Args:
        trained: Name of the module in the model that the adapter was trained on.
        pairs: A and B by what follows the module's name.
        parameters: Of the module, by their own names.
        config: The adapter's.

    Raises:
        CheckpointError: the two forms are mixed, or a matrix fits no parameter, expert or rank.
    """
    together = {rest: pair for rest, pair in pairs.items() if not _ONE.fullmatch(rest)}
    single = {rest: pair for rest, pair in pairs.items() if rest not in together}
    if together and single:
        raise CheckpointError(
            f"{config.where}: {trained} has matrices for all experts at once and for single ones: "
            f"{', '.join(sorted(pairs)[:4])}"
        )
    if single:
        return _from_single(trained, single, parameters, config)
    nested = "base_layer" in together
    return dict(_from_stacked(trained, *pair, parameters, config, nested) for pair in together.items())


def _from_stacked(
    trained: str,
    rest: str,
    pair: tuple[Tensor, Tensor],
    parameters: Mapping[str, Site],
    config: AdapterConfig,
    nested: bool,
) -> tuple[str, tuple[Tensor, Tensor]]:
    """The parameter that a pair is for, and its matrices; `nested` if there are pairs for both parameters."""
    a, b = pair
    allowed = {("", False): parameters, ("", True): ("down_proj",), ("base_layer", True): ("gate_up_proj",)}
    fitting = [
        name
        for name in allowed.get((rest, nested), ())
        if (b.shape[0], a.shape[1]) == parameters[name].shape[1:]
        and config.targets_parameter(f"{trained}.{name}")
    ]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{config.where}: {trained}{rest and f'.{rest}'} with matrices {list(a.shape)} and "
            f"{list(b.shape)} fits no parameter of the experts that target_parameters names"
        )
    name = fitting[0]
    experts = parameters[name].shape[0]
    rank = config.rank_of(f"{trained}.{name}")
    if a.shape[0] != rank * experts or b.shape[1] != rank * experts:
        raise CheckpointError(
            f"{config.where}: {trained}.{name} has matrices {list(a.shape)} and {list(b.shape)}; {experts} "
            f"experts of rank {rank} take {rank * experts} rows and columns"
        )
    stacked_a = a.reshape(experts, rank, -1)
    stacked_b = b.float().reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    return name, (stacked_a, stacked_b * config.scale_of(f"{trained}.{name}"))


def _from_single(
    trained: str, pairs: Pairs, parameters: Mapping[str, Site], config: AdapterConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Stacked, with zeros for what an adapter leaves alone; of gate and up, each has ranks of its own."""
    ranks: dict[str, int] = {}
    for rest, (a, _) in pairs.items():
        ranks[_projection(rest)] = max(ranks.get(_projection(rest), 0), a.shape[0])
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for rest, (a, b) in pairs.items():
        projection = _projection(rest)
        expert = int(rest.partition(".")[0])
        parameter = "down_proj" if projection == "down_proj" else "gate_up_proj"
        experts, rows, columns = parameters[parameter].shape
        height = rows if projection == "down_proj" else rows // 2
        module = f"{trained}.{rest}"
        rank = config.rank_of(module)
        if expert >= experts or not config.targets(module):
            why = f"there are {experts} experts" if expert >= experts else "target_modules does not name it"
            raise CheckpointError(f"{config.where}: {module} has matrices, and {why}")
        if tuple(a.shape) != (rank, columns) or tuple(b.shape) != (height, rank):
            raise CheckpointError(
                f"{config.where}: {module} has matrices {list(a.shape)} and {list(b.shape)}; with the rank "
                f"{rank} of the configuration they must be {[rank, columns]} and {[height, rank]}"
            )
        if parameter not in made:
            parts = ("down_proj",) if parameter == "down_proj" else ("gate_proj", "up_proj")
            total = sum(ranks.get(part, 0) for part in parts)
            made[parameter] = torch.zeros(experts, total, columns), torch.zeros(experts, rows, total)
        is_up = projection == "up_proj"
        first = ranks.get("gate_proj", 0) if is_up else 0
        top = height if is_up else 0
        all_a, all_b = made[parameter]
        all_a[expert, first : first + rank] = a.float()
        all_b[expert, top : top + height, first : first + rank] = b.float() * config.scale_of(module)
    return made


def _projection(rest: str) -> str:
    return rest.rpartition(".")[2]
