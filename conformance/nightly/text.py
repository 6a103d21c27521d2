"""A night in a few lines: what broke and since when, what was mended, what did not run, and the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from conformance.comparison import Compared, Comparison, State
from conformance.nightly.run import NightResult
from conformance.verdicts import BAD

MOST = 20
"""Cases of one list; the dashboard has them all."""


def told(night: NightResult) -> str:
    """The text of a night, for a mail or a chat."""
    return "\n".join(_lines(night)) + "\n"


def told_of_changes(found: Comparison) -> str:
    """The same of what changed alone, for runs that are no night, such as those of cells."""
    return "\n".join((_counted(found), *_changes(found))) + "\n"


def _lines(night: NightResult) -> Iterator[str]:
    found = night.comparison
    yield f"{_headline(night)}: exit code {night.exit_code}"
    if not night.over:
        yield "The night is not over: this is what is known after the steps below."
    if found is not None:
        yield from _changes(found)
    elif night.over:
        failed = any(step.name == "compare" for step in night.steps)
        why = "could not be asked" if failed else "was not asked"
        yield f"The history {why}: nothing is told of earlier nights."
    bad = [step for step in night.steps if step.state in ("bad", "open")]
    if bad:
        yield "STEPS THAT ARE NOT GOOD"
        for step in bad:
            yield f"  {step.name} ({step.state}): {step.reason}"
            if step.repeat:
                yield f"    repeat: {step.repeat}"
    if night.gates:
        yield "GATES: " + ", ".join(f"{count} {verdict}" for verdict, count in night.gates.items())
    if night.not_run:
        yield f"NOT RUN: {sum(row.count for row in night.not_run)}"
        for row in night.not_run[:MOST]:
            yield f"  {row.count} of {row.what}: {row.reason}"
        if len(night.not_run) > MOST:
            yield f"  and {len(night.not_run) - MOST} more reasons"
    good = [step.name for step in night.steps if step.state == "good"]
    if good:
        yield f"good: {', '.join(good)}"


def _changes(found: Comparison) -> Iterator[str]:
    yield from _cases("BROKEN", found.of("broken"))
    yield from _cases("STILL BROKEN", found.of("still-broken"))
    yield from _cases("FAILED BEFORE, NOT JUDGED NOW", found.of("unjudged"))
    yield from _cases("FAILED BEFORE, IS GONE NOW", [e for e in found.of("gone") if e.before in BAD])
    yield from _cases("MENDED", found.of("mended"))
    if not found.before:
        yield "The history holds no earlier results of these cases: there is nothing to compare with."


def _headline(night: NightResult) -> str:
    found = night.comparison if night.comparison is not None else Comparison(runs=(), before=(), entries=())
    steps = Counter(step.state for step in night.steps)
    bad = f"; {steps['bad']} of {len(night.steps)} steps failed" if steps["bad"] else ""
    return _counted(found) + bad


def _counted(found: Comparison) -> str:
    told: tuple[State, ...] = ("broken", "still-broken", "mended", "new")
    return ", ".join(f"{found.counts.get(state, 0)} {state.replace('-', ' ')}" for state in told)


def _cases(title: str, entries: list[Compared]) -> Iterator[str]:
    if not entries:
        return
    yield f"{title}: {len(entries)}"
    for entry in entries[:MOST]:
        where = f"{entry.address} [{entry.cell or entry.target}]"
        reason = f": {entry.reason[:200]}" if entry.reason else ""
        edited = "; the case was edited" if entry.edited else ""
        yield f"  {where}: {entry.before or 'no result'} -> {entry.after or 'no result'}{edited}{reason}"
        if entry.since is not None:
            yield f"    {_since(entry)}"
    if len(entries) > MOST:
        yield f"  and {len(entries) - MOST} more"


def _since(entry: Compared) -> str:
    since = entry.since
    assert since is not None
    commit = f", commit {since.commit}" if since.commit else ""
    began = f"since {since.started[:16]} (run {since.run_id}{commit})"
    if since.last_good is None:
        return f"{began}; no earlier run in which it did not fail is known"
    commit = f", commit {since.good_commit}" if since.good_commit else ""
    return f"{began}; last good in run {since.last_good}{commit}"
