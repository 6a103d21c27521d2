"""Records what the towers of a PyTorch model give; `recording` does it for the modules of the text model.

Outside the text model there are no rows: what is recorded is `[patches, ...]`, `[frames, ...]` or
`[soft tokens, ...]` of all pieces, one after the other, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conformance.worker.adapters.recording import ModuleHooks

_STRIDES = (1, 2, 4)
"""How many places of the input become one: a tower of sound has two convolutions that halve them."""


class MediaRecorder(ModuleHooks):
    """Records named modules outside the text model.

    Args:
        root: As in `ModuleHooks`.
        names: Modules to record.
        order: Names are added to it in the order in which the modules first ended.
    """

    def __init__(self, root: nn.Module, names: Sequence[str], order: list[str]) -> None:
        super().__init__(root, names)
        self._order = order
        self._found: dict[str, list[Tensor]] = {}
        self._valid: Tensor | None = None

    def call(self, valid: Tensor | None) -> None:
        """Announce a call of a tower: bool [pieces, places], false at padding; None where there is none."""
        self._valid = valid

    def tensors(self) -> dict[str, Tensor]:
        """What each module gave in all its calls."""
        return {name: torch.cat(parts) for name, parts in self._found.items()}

    def ended(self, name: str, output: Tensor) -> None:
        """Keep an output of the call that is under way."""
        if name not in self._order:
            self._order.append(name)
        self._found.setdefault(name, []).append(self._stripped(output).detach().float().clone())

    def _stripped(self, output: Tensor) -> Tensor:
        """Without padding. A tower of sound makes one place of several, of which the first one decides."""
        if output.ndim < 3 or self._valid is None:
            return output
        for stride in _STRIDES:
            valid = self._valid[:, ::stride]
            if valid.shape == output.shape[:2]:
                return output[valid]
        raise ValueError(f"an output {list(output.shape)} does not fit {list(self._valid.shape)} places")
