"""Muon for the matrices of the layers, AdamW for all else.

Muon replaces a matrix's momentum by the nearest matrix whose singular values are one, so that rare
directions learn as fast as common ones. PyTorch's own computes in bfloat16, which processors without such
units emulate, and takes one matrix at a time; here all of one shape go together, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that pulls singular values towards one: steepest at zero."""
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised.

    Args:
        parameters: Matrices, or stacks of them: the last two axes count.
        lr: Root mean square of an update's entries, times the root of the matrix's larger side.
        momentum: Of the running sum of gradients; Nesterov's form.
        weight_decay: Part of a weight that a step at `lr` one would take away.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; a closure is not called."""
        del closure
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                running = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(running, group["momentum"])
                stacks[parameter.shape[-2:]].append((parameter, update.view(-1, *parameter.shape[-2:])))
            for shape, entries in stacks.items():
                straight = orthogonal(torch.cat([update for _, update in entries]))
                straight *= max(1.0, shape[0] / shape[1]) ** 0.5
                pieces = torch.split(straight, [len(update) for _, update in entries])
                for (parameter, _), piece in zip(entries, pieces, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(piece.view_as(parameter), alpha=-group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the nearest matrices [n, rows, columns] whose singular values are one: they come near it."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    straight: Tensor = x.mT if tall else x
    return straight.contiguous()


def optimisers(
    model: nn.Module, matrix_rate: float, other_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Both, for all parameters that require gradients.

    Tables and all convolutions are AdamW's, and so is the router: its gradients are too sparse.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = "layers." in name and parameter.ndim in (2, 3) and min(parameter.shape[-2:]) > 1
        foreign = "router" in name or "embed_tokens" in name or "conv" in name
        (matrices if hidden and not foreign else others).append(parameter)
    return [
        Muon(matrices, matrix_rate, weight_decay=weight_decay),
        torch.optim.AdamW(others, other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
