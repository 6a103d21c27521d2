"""Which keys a query sees (fact sheet, section 2.4)."""

from __future__ import annotations

from torch import Tensor


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Causal visibility, within a sliding window if there is one.

    Args:
        query_positions: int [B, T].
        key_positions: int [B, S]; negative where there is no key.
        window: A query at q sees keys q - window + 1 .. q.

    Returns:
        bool [B, 1, T, S].
    """
    q, k = query_positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (k <= q) & (k >= 0)
    return seen if window is None else seen & (q - k < window)
