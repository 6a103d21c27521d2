"""Runs beside what the history had before them: what broke, what was mended, what is new, and since when.

1. Every case on a target, in a cell of the matrix or outside it, is compared with its newest verdict of an
   earlier run, whichever run that is. So a night that lost some of its runs hides nothing from the next one.
2. A result is bad if it fails a run. `skip`, `inconclusive` and no result at all are neither good nor bad:
   they mend nothing, and what was bad before them is compared with what comes after them.
3. A case that was bad and has no verdict now is told, as one that is not judged, until it has one.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from conformance.records import Record
from conformance.results import Run, Verdict
from conformance.store import StoredVerdict
from conformance.verdicts import BAD

if TYPE_CHECKING:
    from conformance.store.history import Store

State = Literal["broken", "still-broken", "unjudged", "mended", "new", "gone", "changed", "same"]
"""What became of a case since the run before."""
STATES: dict[State, str] = {
    "broken": "Fails, and did not before.",
    "still-broken": "Fails as it did before.",
    "unjudged": "Failed when it was last judged, and was not judged this time.",
    "mended": "Failed before, and does not any more.",
    "new": "Has no earlier result, and does not fail.",
    "gone": "Had a result before, in a suite and on a target of this run, and is not in it.",
    "changed": "Has another verdict; neither of the two fails.",
    "same": "Has the verdict it had.",
}
_JUDGED: frozenset[Verdict] = frozenset({"pass", "xfail", *BAD})


class Since(Record):
    """The run with which a case began to fail."""

    run_id: str
    started: str
    commit: str | None
    last_good: str | None
    """The last run in which it did not fail; None if the history has none."""
    good_commit: str | None = None


class Compared(Record):
    """One case on one target."""

    suite: str
    case: str
    target: str
    cell: str | None
    area: str
    state: State
    before: Verdict | None
    after: Verdict | None
    before_run: str | None
    """The run of the earlier result."""
    run: str
    """The run of this one; for a case that is gone, the one that it is not in."""
    edited: bool
    """Both judged it, and the case was edited in between."""
    reason: str = ""
    """Of this result; else its first problem."""
    since: Since | None = None
    """For cases that fail."""

    @property
    def address(self) -> str:
        """`suite-id::case-id`."""
        return f"{self.suite}::{self.case}"


class Comparison(Record):
    """Runs of one night, or of one command, beside the history."""

    runs: tuple[str, ...]
    before: tuple[str, ...]
    """The runs that the earlier results are of, newest first."""
    entries: tuple[Compared, ...]

    def of(self, state: State) -> list[Compared]:
        """The cases with one state."""
        return [entry for entry in self.entries if entry.state == state]

    @property
    def counts(self) -> dict[State, int]:
        """Cases by state, without zeros."""
        tally = Counter(entry.state for entry in self.entries)
        return {state: tally[state] for state in STATES if tally[state]}


def compare(store: Store, runs: Sequence[Run]) -> Comparison:
    """Compare runs, which the database need not hold, with the results that came before them.

    Args:
        store: The history.
        runs: Of one night; each is compared with what started before the first of them.

    Raises:
        StoreError: the database cannot be read, or a run has no time at which it started.
    """
    if not runs:
        return Comparison(runs=(), before=(), entries=())
    first = min(runs, key=lambda run: run.header.started)
    earlier = {(*found.key, found.cell): found for found in store.latest(before=first)}
    judged = store.latest(before=first, verdicts=_JUDGED)
    earlier.update({(*found.key, found.cell): found for found in judged if found.verdict in BAD})
    entries: list[Compared] = []
    used: dict[str, str] = {}
    for run in runs:
        for entry in _compared(run, earlier):
            failing = entry.state in ("broken", "still-broken")
            since = _since(store, entry, run) if failing else None
            entries.append(entry.model_copy(update={"since": since}))
            if entry.before_run is not None:
                found = earlier[entry.suite, entry.case, entry.target, entry.cell]
                used[found.run_id] = found.started
    return Comparison(
        runs=tuple(run.header.run_id for run in runs),
        before=tuple(sorted(used, key=lambda run_id: used[run_id], reverse=True)),
        entries=tuple(entries),
    )


def _compared(run: Run, earlier: dict[tuple[str, str, str, str | None], StoredVerdict]) -> Iterable[Compared]:
    cell = run.header.cell.id if run.header.cell is not None else None
    latest = run.latest()
    planned = {(entry.suite, entry.case, entry.target): entry for entry in run.header.manifest}
    for key, entry in planned.items():
        result, before = latest.get(key), earlier.get((*key, cell))
        after = result.verdict if result is not None else None
        if after is None and before is None:
            continue
        edited = before is not None and before.digest != entry.digest and after is not None
        reason = ""
        if result is not None:
            reason = result.reason or next((f"{p.rule}: {p.message}" for p in result.problems), "")
        yield Compared(
            **entry.model_dump(include={"suite", "case", "target", "area"}),
            cell=cell,
            state=_state(before.verdict if before is not None else None, after),
            before=before.verdict if before is not None else None,
            after=after,
            before_run=before.run_id if before is not None else None,
            run=run.header.run_id,
            edited=edited,
            reason=reason,
        )
    # Only what this run could have held is missed: whole suites on the targets that it asked.
    asked = {(suite, target) for suite, _, target in planned}
    for found in earlier.values():
        if found.cell == cell and found.key not in planned and (found.suite, found.target) in asked:
            yield Compared(
                **found.model_dump(include={"suite", "case", "target", "area", "cell"}),
                state="gone",
                before=found.verdict,
                after=None,
                before_run=found.run_id,
                run=run.header.run_id,
                edited=False,
            )


def _state(before: Verdict | None, after: Verdict | None) -> State:
    if after in BAD:
        return "still-broken" if before in BAD else "broken"
    if before in BAD:
        return "mended" if after in _JUDGED else "unjudged"
    if before is None:
        return "new"
    return "same" if before == after else "changed"


def _since(store: Store, entry: Compared, run: Run) -> Since:
    """With which run a case began to fail: the first of its bad results behind the last that was not bad."""
    past = [
        found
        for found in store.series(entry.suite, entry.case, entry.target, entry.cell or "")
        if found.run_id != entry.run and found.verdict in _JUDGED and _older(found, run)
    ]
    first_run, first_at, first_commit = entry.run, run.header.started, run.header.commit
    good: StoredVerdict | None = None
    for found in reversed(past):
        if found.verdict not in BAD:
            good = found
            break
        first_run, first_at, first_commit = found.run_id, found.started, found.commit
    return Since(
        run_id=first_run,
        started=first_at,
        commit=first_commit,
        last_good=good.run_id if good is not None else None,
        good_commit=good.commit if good is not None else None,
    )


def _older(found: StoredVerdict, run: Run) -> bool:
    return dt.datetime.fromisoformat(found.started) < dt.datetime.fromisoformat(run.header.started)
