"""Measure faults: run the quick suites with each of them switched on, each in a process of its own.

1. First the suites run with no fault switched on. A case counts if it passes then.
2. Each fault has a process, so that one that crashes, hangs or leaves something behind costs itself only.
3. A case that runs nothing of what the fault replaces is not asked again (`conformance.faults.reach`), and
   gates are asked only about a fault that nothing else notices: they ask hundreds of questions each.
4. What a process found is kept in the working folder under what it rests on; a measurement that was ended
   goes on from there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from conformance import expectations, fingerprint
from conformance.errors import UsageError
from conformance.execute import Ended, Job, LocalExecutor
from conformance.faults import written
from conformance.faults.base import Fault
from conformance.faults.cleanly import Clean
from conformance.faults.places import LEVEL_OF_KIND, LEVELS, Level, misplaced, places
from conformance.faults.record import (
    Basis,
    FaultRecord,
    FaultsFile,
    Notice,
    Outcome,
    basis,
    place_of,
    read,
    stale,
    write,
)
from conformance.faults.run import REQUEST_SECONDS, Catch, failures, notices
from conformance.loading import LoadedCase
from conformance.records import Record
from conformance.runner import TargetPool
from conformance.sealed import RecordError
from conformance.targets.guarded import ending

FAULT_LIMIT = 3600.0
"""Seconds that the suites may take with one fault."""
CLEAN_LIMIT = 4 * FAULT_LIMIT
"""Seconds that they may take without any, when every case is asked, watched, and by itself."""


class Found(Record):
    """What the process of one fault writes."""

    fault: str
    basis: Basis
    cases: int
    asked: int
    seconds: float
    at: str
    """When it ended; ISO 8601, UTC."""
    commit: str | None
    caught: tuple[Catch, ...]


@dataclass(frozen=True)
class Plan:
    """What to measure, and where things are kept."""

    faults: Sequence[Fault]
    arguments: tuple[str, ...]
    """Cases, as on the command line; empty for all."""
    cases: tuple[LoadedCase, ...]
    """The quick ones among them."""
    out: Path
    """The record."""
    work: Path
    """Folder for what a measurement that was ended goes on from."""
    workers: int = 1
    limit: float = FAULT_LIMIT
    again: bool = False
    """Measure faults whose record holds, too."""


def measure(plan: Plan, progress: Callable[[FaultRecord], None] = lambda record: None) -> FaultsFile:
    """Measure faults whose record does not hold, and write each down as it comes.

    Raises:
        UsageError: no case passes without a fault.
        RecordError: the record cannot be read, a fault's place is not written down (where it was never
            measured: in the commit that is checked out), or the suites could not be run without a fault.
    """
    file = read(plan.out) if plan.out.exists() else FaultsFile()
    placed = [fault for fault in plan.faults if file.of(fault.id) is None and not misplaced(fault)]
    missing = written.unwritten({fault.id: place_of(fault) for fault in placed})
    if missing:
        raise RecordError(
            f"conformance/faults/places.yaml places {', '.join(missing)} otherwise than the commit that is "
            "checked out, or that has no such entry: commit it before the first measurement, so that it is "
            "not fitted to what is found"
        )
    today = {fault.id: basis(fault, plan.cases) for fault in plan.faults}
    wanted = {
        fault.id: fault for fault in plan.faults if plan.again or stale(file.of(fault.id), today[fault.id])
    }
    if not wanted:
        return file
    clean, clean_file = clean_run(plan, next(iter(today.values())))
    if not clean.passed:
        raise UsageError(f"no case passes without a fault, so none can notice one; see {clean_file}")
    file = file.model_copy(update={"selection": plan.arguments, "left_out": clean.left_out})
    for fault, found, reason in _found(plan, wanted, today, clean_file):
        record = recorded(fault, found, today[fault.id], file.of(fault.id), reason)
        known = {entry.fault: entry for entry in file.faults} | {fault.id: record}
        order = [name for name in places().by_fault if name in known]
        file = file.model_copy(update={"faults": tuple(known[name] for name in order)})
        write(file, plan.out)
        progress(record)
    return read(plan.out)


def clean_run(plan: Plan, today: Basis) -> tuple[Clean, Path]:
    """What the chosen cases do with no fault switched on, and its file; made if it is not there.

    Raises:
        RecordError: the run did not come to its end.
    """
    path = plan.work / f"clean-{today.sources}-{today.cases}.json"
    clean = Clean.read(path)
    if clean is not None:
        return clean, path
    arguments = ("faults", "run-cleanly", *plan.arguments, "--out", "{}")
    (ended,) = LocalExecutor().run([Job("no fault", arguments, path, CLEAN_LIMIT)])
    clean = Clean.read(path)
    if clean is None:
        raise RecordError(f"{path}: the suites did not come to their end without a fault: {_why(ended)}")
    return clean, path


def look_for(fault: Fault, cases: Sequence[LoadedCase], clean: Clean) -> Found:
    """Run cases with a fault switched on; this is what its process does.

    Args:
        fault: It.
        cases: All that were chosen.
        clean: What they do without it.
    """
    started = time.monotonic()
    known = expectations.beside(case.suite for case in cases)
    counted = [case for case in cases if case.address in clean.passed]
    asked = clean.reaching(fault, counted)
    gates = [case for case in asked if case.suite.suite.kind == "accuracy"]
    others = [case for case in asked if case not in gates]
    with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as pool, fault.applied():
        caught = failures(others, known, pool)
        if any(notices(catch) for catch in caught):
            gates = []
        caught += failures(gates, known, pool)
    return Found(
        fault=fault.id,
        basis=basis(fault, cases),
        cases=len(counted),
        asked=len(others) + len(gates),
        seconds=round(time.monotonic() - started, 1),
        at=_now(),
        commit=fingerprint.git_commit(),
        caught=tuple(caught),
    )


def _found(
    plan: Plan, wanted: dict[str, Fault], today: dict[str, Basis], clean: Path
) -> Iterator[tuple[Fault, Found | None, str]]:
    """What is known of each fault, as it becomes known; else why it is not."""
    jobs = []
    for name, fault in wanted.items():
        path = plan.work / f"{name}-{'-'.join(today[name].model_dump().values())}.json"
        known = None if plan.again else _read_found(path)
        if known is not None:
            yield fault, known, ""
            continue
        path.unlink(missing_ok=True)
        arguments = ("faults", "look-for", name, *plan.arguments, "--clean", str(clean), "--out", "{}")
        jobs.append(Job(name, arguments, path, plan.limit))
    for ended in LocalExecutor(plan.workers).run(jobs):
        found, name = _read_found(ended.job.run_file), ended.job.name
        if found is not None and found.basis != today[name]:
            ended.job.run_file.unlink()
            yield wanted[name], None, "sources or cases were changed while it was measured"
        else:
            yield wanted[name], found, "" if found is not None else _why(ended)


def _read_found(path: Path) -> Found | None:
    try:
        return Found.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def _why(ended: Ended) -> str:
    if ended.code is None:
        return f"not done within {ended.job.limit:g} s"
    last = " ".join(ended.tail.split())[-300:]
    return f"its process {ending(ended.code)}" + (f": {last}" if last else "")


# ------------------------------------------------------------------------------------------- judging


def recorded(
    fault: Fault, found: Found | None, today: Basis, earlier: FaultRecord | None, reason: str = ""
) -> FaultRecord:
    """The record of a fault after one more run.

    Args:
        fault: It.
        found: What its process found; None if it died.
        today: What the run rests on.
        earlier: The record so far.
        reason: Why nothing was found.
    """
    place = place_of(fault)
    caught = found.caught if found is not None else ()
    noticed = [catch for catch in caught if notices(catch)]
    levels = Counter(LEVEL_OF_KIND[catch.kind] for catch in noticed)
    lowest: Level | None = next((level for level in LEVELS if levels[level]), None)
    judged = any(c.verdict == "fail" and set(c.rules) - {"raised"} for c in caught)
    outcome = Outcome(
        at=found.at if found is not None else _now(),
        commit=found.commit if found is not None else fingerprint.git_commit(),
        basis=today,
        cases=found.cases if found is not None else 0,
        asked=found.asked if found is not None else 0,
        seconds=found.seconds if found is not None else 0.0,
        detected=bool(noticed),
        crash_only=not judged and (bool(caught) or found is None),
        level=lowest,
        lowest=tuple(
            Notice(case=catch.case, area=catch.area, rules=catch.rules, module=catch.module)
            for catch in noticed
            if LEVEL_OF_KIND[catch.kind] == lowest
        ),
        levels={level: levels[level] for level in LEVELS if levels[level]},
        kinds=dict(sorted(Counter(catch.kind for catch in noticed).items())),
        reason=reason,
    )
    by_area: dict[str, list[str]] = {}
    for catch in noticed:
        by_area.setdefault(catch.area, []).append(catch.case)
    return FaultRecord(
        fault=fault.id,
        title=fault.title,
        source=fault.source,
        kind=fault.kind,
        fault_class=place.class_,
        area=place.area,
        layer=place.layer,
        level=place.level,
        module=place.full_module,
        first=earlier.first if earlier is not None else outcome,
        last=outcome,
        noticed={area: tuple(cases) for area, cases in sorted(by_area.items())},
        crashed=tuple(catch.case for catch in caught if catch not in noticed),
        where=fault.where,
    )


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
