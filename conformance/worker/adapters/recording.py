"""Records what modules of a PyTorch model give, for `forward`: shared by the targets that run such models.

Needs torch and safetensors, so it is imported at the first forward pass and not before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from conformance.worker.modules import LOGITS


def spans(length: int, prefill: int | None) -> Iterator[tuple[int, int]]:
    """The calls that feed a row: `prefill` tokens at once, then one by one."""
    first = length if prefill is None else min(prefill, length)
    yield 0, first
    for start in range(first, length):
        yield start, start + 1


class ModuleHooks(ABC):
    """Calls `ended` with the output of each named module whenever it ends. A context manager.

    Args:
        root: The module that the names are relative to.
        names: The modules.

    Raises:
        ValueError: the model has no module of such a name.
    """

    def __init__(self, root: nn.Module, names: Sequence[str]) -> None:
        modules = dict(root.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise ValueError(f"{type(root).__name__} has no module {', '.join(unknown)}")
        self._modules = {name: modules[name] for name in names}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(partial(self._hook, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @abstractmethod
    def ended(self, name: str, output: Tensor) -> None:
        """A module gave its output: of several tensors the first, of a router the weight of each expert."""

    def _hook(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if name.endswith(".router"):
            output = expert_weights(*output)
        # transformers' outputs are no tuples, but give their first tensor as these do.
        elif not isinstance(output, Tensor):
            output = output[0]
        self.ended(name, output)


class Recorder(ModuleHooks):
    """Records named modules. Each output is cut into the tokens of each row, without padding.

    Args:
        root: As in `ModuleHooks`.
        names: Modules to record; `logits` is left to `ended`.
        rows: How many rows there are.
    """

    def __init__(self, root: nn.Module, names: Sequence[str], rows: int) -> None:
        super().__init__(root, [name for name in names if name != LOGITS])
        self.order: list[str] = []
        self._parts: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(rows)] for name in names}
        self._rows: Sequence[int] = ()
        self._lengths: Sequence[int] = ()

    def call(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Announce a call of the model: which rows stand in the batch, with how many tokens that count."""
        self._rows, self._lengths = rows, lengths

    def ended(self, name: str, output: Tensor) -> None:
        """Keep an output [batch, time, ...] or [batch * time, ...] of the call that is under way."""
        if name not in self._parts:
            return
        if name not in self.order:
            self.order.append(name)
        batch = len(self._rows)
        width = max(self._lengths)
        if output.shape[:2] != (batch, width):
            output = output.reshape(batch, width, *output.shape[1:])
        for place, (row, length) in enumerate(zip(self._rows, self._lengths, strict=True)):
            self._parts[name][row].append(output[place, :length].detach().float().clone())

    def save(self, path: Path, others: Mapping[str, Tensor] | None = None) -> None:
        """Write `[tokens, ...]` for each module that ran, all rows one after the other, and other tensors."""
        tensors = {
            name: torch.cat([part for row in self._parts[name] for part in row])
            for name in self.order
            if name in self._parts
        }
        tensors |= others or {}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def expert_weights(probabilities: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Weight of every expert, [tokens, experts]: it does not depend on the order of the chosen ones."""
    dense = torch.zeros(probabilities.shape, dtype=torch.float32)
    return dense.scatter_add_(-1, experts, weights.float())
