"""A test that may be looked at after every item: an e-process on discordant pairs.

Where the target is no worse, a discordant pair is lost with a probability of at most one half. A bet on a
higher one, s, multiplies a stake by 2 s for each lost item and by 2 (1 - s) for each gained one; no such bet
can expect to win. `e_value` is the stake of a gambler who spreads one unit evenly over all s from one half to
one. The chance that it ever reaches 1 / alpha is at most alpha, however often one looks (Ville's inequality;
Ramdas et al. 2023, Turner & Grünwald 2023).

It says when to stop and fail, and nothing else. A p-value that was made for a fixed number of items must not
be looked at on the way, so none can be had here, and `decide` gives none for a sheet that is not whole.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


def e_value(lost: ArrayLike, gained: ArrayLike) -> NDArray[np.float64]:
    """The stake after so many lost and gained items, in any order, as arrays.

    The integral of (2 s)^b (2 (1 - s))^c over s from one half to one, times two.
    """
    b, c = np.asarray(lost, dtype=np.float64), np.asarray(gained, dtype=np.float64)
    upper_half = special.betainc(c + 1, b + 1, 0.5)  # of Beta(b + 1, c + 1), by symmetry
    with np.errstate(divide="ignore", over="ignore"):
        logarithm = (b + c + 1) * np.log(2) + special.betaln(b + 1, c + 1) + np.log(upper_half)
        return np.asarray(np.exp(logarithm))


class SequentialTest:
    """Watches the pairs of one run as they come.

    Args:
        alpha: Chance, at most, that it ever stops a target that is no worse.
        floor: It does not stop at an observed drop up to this.
    """

    def __init__(self, alpha: float, floor: float) -> None:
        self.threshold = 1 / alpha
        self.largest = 1.0
        """The largest e-value so far."""
        self.stopped_at: int | None = None
        """Items seen when it stopped."""
        self._floor = floor
        self._seen = self._lost = self._gained = 0

    def see(self, difference: int) -> bool:
        """Take the next pair: 1 lost, -1 gained, 0 neither. Whether the run is to stop, and to fail."""
        self._seen += 1
        if difference and self.stopped_at is None:
            self._lost += difference > 0
            self._gained += difference < 0
            now = float(e_value(self._lost, self._gained))
            self.largest = max(self.largest, now)
            drop = (self._lost - self._gained) / self._seen
            if now >= self.threshold and drop > self._floor:
                self.stopped_at = self._seen
        return self.stopped_at is not None

    def see_all(self, differences: Iterable[int]) -> bool:
        """Take pairs until it stops."""
        return any(self.see(difference) for difference in differences)
