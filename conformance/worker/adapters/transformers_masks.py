"""Which keys each token sees in transformers: what its attention functions are handed.

These are the last to see a mask, and know what its absence means to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # type: ignore[import-not-found]

from conformance.worker.modules import MASK


class MaskRecorder:
    """Records the masks of named layers in passes over whole rows, one after the other.

    Args:
        root: The text model.
        names: Names of attentions, with `.mask` behind each.
        order: Names are added to it in the order in which the attentions first ran.
        longest: Tokens of the longest row.

    Raises:
        ValueError: the model has no module of such a name.
    """

    def __init__(self, root: nn.Module, names: Sequence[str], order: list[str], longest: int) -> None:
        modules = dict(root.named_modules())
        places = {name: name.removesuffix(MASK) for name in names}
        if unknown := [name for name, place in places.items() if place not in modules]:
            raise ValueError(f"{type(root).__name__} has no module for {', '.join(unknown)}")
        self._names = {id(modules[place]): name for name, place in places.items()}
        self._order = order
        self._longest = longest
        self._found: dict[str, list[Tensor]] = {}
        self._choose = ALL_ATTENTION_FUNCTIONS.get_interface
        self._patch = mock.patch.object(ALL_ATTENTION_FUNCTIONS, "get_interface", self._chosen)

    def __enter__(self) -> Self:
        if self._names:
            self._patch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._names:
            self._patch.stop()

    def tensors(self) -> dict[str, Tensor]:
        """float32 [tokens, longest row] of each attention that ran, all rows one after the other."""
        return {name: torch.cat(parts) for name, parts in self._found.items()}

    def _chosen(self, backend: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._attend, backend, self._choose(backend, default))

    def _attend(
        self,
        backend: str,
        attend: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **options: Any,
    ) -> Any:
        name = self._names.get(id(module))
        if name is not None:
            queries, keys = query.shape[2], key.shape[2]
            seen = torch.zeros(queries, self._longest)
            seen[:, :keys] = visible(mask, queries, keys, causal=backend == "sdpa")
            self._found.setdefault(name, []).append(seen)
            if name not in self._order:
                self._order.append(name)
        return attend(module, query, key, value, mask, **options)


def visible(mask: Any, queries: int, keys: int, *, causal: bool) -> Tensor:
    """What a mask lets through: [queries, keys].

    Args:
        mask: As attention functions are given it.
        queries: How many there are.
        keys: How many there are.
        causal: Whether the function hides the future where it is given no mask, as `sdpa` has PyTorch do it.
            It hides nothing else then, in sliding layers neither.
    """
    if mask is None:
        everything = torch.ones(queries, keys, dtype=torch.bool)
        return everything.tril() if causal else everything
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, 1, 1, queries, keys, device="cpu")[0, 0]
    own: Tensor = mask[0, 0, :, :keys]
    # Others than booleans are added to the scores.
    return own if own.dtype == torch.bool else own == 0
