"""Cases that only one target fails: most often the target is wrong, and seldom the case."""

from __future__ import annotations

from conformance.reporting.signs import Status
from conformance.reporting.view import Entry, Group, Site, Target

_FAILS: frozenset[Status] = frozenset({"fail", "xfail", "timeout", "error"})
"""What the target itself did wrong, known or not."""
_PASSES: frozenset[Status] = frozenset({"pass", "policy"})


class AloneView:
    """By target, the results in which it fails and all others that were judged, one at least, pass.

    Args:
        site: The run.
    """

    def __init__(self, site: Site) -> None:
        self.by_target: dict[Target, Group] = {}
        for case in site.cases:
            entry = _alone(case.entries)
            if entry is not None:
                self.by_target.setdefault(entry.target, Group()).entries.append(entry)
        self.by_target = {t: self.by_target[t] for t in site.targets if t in self.by_target}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.by_target)

    @property
    def total(self) -> int:
        """Number of such cases."""
        return sum(group.total for group in self.by_target.values())


def _alone(entries: list[Entry]) -> Entry | None:
    """The one failing result of a case that others pass; None if there is none, or nobody to compare with."""
    judged = [entry for entry in entries if entry.status in _FAILS | _PASSES]
    failing = [entry for entry in judged if entry.status in _FAILS]
    others = [entry for entry in entries if entry.status not in (*_FAILS, *_PASSES, "skip", "not-run")]
    return failing[0] if len(failing) == 1 and len(judged) > 1 and not others else None
