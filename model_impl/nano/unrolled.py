"""An Eagle3 head's passes one after the other, for all places of a text at once, so that they can be trained.

When it drafts, a head reads the target's states only once: its second token comes from what its own first
pass left, its third from the second's. Trained on the target's states alone it would never have seen those.
So each place p of a text begins a draft of its own: pass j of it stands at position p + j, reads token
p + j + 1 of the text, and sees the target's states up to p and the passes before it of the same draft. That
is what a cache holds once a draft of before was verified (EAGLE-3, arXiv:2503.01840, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model_impl.config import LayerConfig
from model_impl.layers import rope
from model_impl.layers.backends import Mask
from model_impl.runtime.step import Step
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import KIND


class _Passes:
    """Keys and values of all passes so far, side by side: T places of each."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, Tensor] | None = None

    def extend(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of a pass, each [B, g, T, d]."""
        del layer
        if self._seen is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self._seen, (k, v), strict=True))
        self._seen = k, v
        return self._seen


def unrolled(head: Eagle3, tokens: Tensor, features: Tensor, passes: int) -> Iterator[Tensor]:
    """Logits of every pass at every place.

    Args:
        head: In training or not; its own backend runs, `eager` or `sdpa`.
        tokens: int [B, T + passes - 1]: at column p the token p + 1 of the text.
        features: [B, T, H]: what `Eagle3.features` made of the target's states.
        passes: How many tokens each draft has.

    Yields:
        [B, T, draft vocabulary]: of pass j at column p for the token p + j + 2 of the text.
    """
    width = features.shape[1]
    decoder, device = head.config.decoder, features.device
    frequencies = rope.inverse_frequencies(decoder.rope[KIND], decoder.head_dims[0]).to(device)
    place = torch.arange(width, device=device)
    same = place[:, None] == place
    seen = place[:, None] >= place
    store = _Passes()
    for number in range(passes):
        positions = (place + number).expand(len(tokens), width)
        angles = rope.angles(positions, frequencies, features.dtype)
        step = Step({KIND: angles}, {KIND: Mask(seen[None, None])}, store)
        embedding = head.embed_tokens(tokens[:, number : number + width])
        features = head.layers[0](embedding, features, step)
        yield head.logits(head.norm(features))
        seen = torch.cat([seen, same], dim=1)
