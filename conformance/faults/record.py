"""The record of what the quick suites made of each fault, and whether it still holds.

1. A record has the outcome of the fault's first run and of its last one. The first is never replaced.
2. It holds for what it was measured with: the sources that bear on a verdict, the cases, and the fault's own
   patch and place. `stale` compares these by their digests, and runs nothing.
3. Whether a fault was found where it is, is told from the cases that noticed it and the tables of today
   (`pointers.yaml`), when a record is shown. Nothing of that is stored, so that it cannot be stale.
4. The file carries a digest of itself; one that was changed by hand is refused.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from conformance import grounds, resources, sealed
from conformance.faults.base import Fault
from conformance.faults.places import CLASSES, Class, Layer, Level, Place, misplaced, places
from conformance.faults.pointers import pointers
from conformance.loading import LoadedCase
from conformance.records import Record
from conformance.sealed import RecordError, Sealed


class Basis(Record):
    """What an outcome rests on, as digests."""

    sources: str
    """Of the harness and the bundled implementation, as far as they bear on a verdict."""
    cases: str
    """Of the cases that were chosen."""
    fault: str
    """Of the fault's patch and place."""


class Notice(Record):
    """A case that noticed a fault at the lowest level."""

    case: str
    """Its address."""
    area: str
    rules: tuple[str, ...] = ()
    """That it broke."""
    module: str = ""
    """First module that differs from the oracle's; for parity cases."""


class Outcome(Record):
    """What became of one run of the suites with a fault switched on."""

    at: str
    """ISO 8601, UTC."""
    commit: str | None
    basis: Basis
    cases: int
    """How many could notice it: those that pass without the fault."""
    asked: int
    """How many of them ran: those that run what it replaces, gates only where nothing else noticed it."""
    seconds: float
    detected: bool
    """Some case that passes without the fault failed by a rule; see `conformance.faults.run.notices`."""
    crash_only: bool
    """Cases came to no verdict, and none judged an answer."""
    level: Level | None = None
    """The lowest level at which a case noticed it."""
    lowest: tuple[Notice, ...] | None = None
    """Those that noticed it at that level; None for outcomes that are older than this field."""
    in_area: bool | None = None
    """Of such an outcome: whether a case of that level was of an area that points at the module."""
    levels: dict[Level, int] = Field(default_factory=dict)
    """Cases that noticed it, by level."""
    kinds: dict[str, int] = Field(default_factory=dict)
    """The same, by kind of suite."""
    reason: str = ""
    """Why there is less than a whole run: its process died, or was ended at its limit."""


class FaultRecord(Record):
    """A fault, where it is, and what became of its first and its last run."""

    fault: str
    title: str
    source: tuple[str, ...]
    kind: str
    fault_class: Class
    area: str
    layer: Layer
    level: Level
    """The lowest level at which it must be noticed."""
    module: str
    """The patched module's full name."""
    first: Outcome
    last: Outcome
    noticed: dict[str, tuple[str, ...]]
    """Addresses of the cases that noticed it in the last run, by area."""
    crashed: tuple[str, ...] = ()
    """Those that did not pass in the last run and have judged nothing."""
    where: str = ""
    """Pattern of what a parity case must name first; empty for other kinds."""

    def pointing(self, outcome: Outcome) -> tuple[str, ...]:
        """Addresses of the cases of the lowest level that name the patched module."""
        return tuple(notice.case for notice in outcome.lowest or () if self._names(notice))

    def localised(self, outcome: Outcome) -> bool:
        """Whether more than half of the cases of the lowest level name the patched module."""
        return 2 * len(self.pointing(outcome)) > len(outcome.lowest or ())

    def in_area(self, outcome: Outcome) -> bool:
        """Whether one case of the lowest level, at least, is of an area to which the module belongs.

        It says less: areas hold many modules, and one such case outweighs any others.
        """
        if outcome.lowest is None:
            return bool(outcome.in_area)
        return any(
            self._where(notice) if notice.module else places().points_to(notice.area, self.module)
            for notice in outcome.lowest
        )

    def _names(self, notice: Notice) -> bool:
        if notice.module:
            return self._where(notice)
        return self.module in pointers().modules(notice.area, notice.case, notice.rules)

    def _where(self, notice: Notice) -> bool:
        return bool(self.where) and re.fullmatch(self.where, notice.module) is not None


class Rates(Record):
    """How many faults of a group were noticed, in their first runs and in their last."""

    faults: int
    detected_first: int
    detected: int
    localised_first: int
    localised: int
    in_area_first: int
    in_area: int
    crash_only: int
    first_untold: int
    """First runs that noticed a fault and did not keep by which cases: they count as not localised."""


class FaultsFile(Sealed):
    """What `conformance faults measure` writes."""

    schema_version: Literal[3] = 3
    selection: tuple[str, ...] = ()
    """Cases that were asked for; empty for all quick ones."""
    left_out: dict[str, int] = Field(default_factory=dict)
    """Chosen cases that say nothing about faults here, by their verdict without any fault."""
    faults: tuple[FaultRecord, ...] = ()

    def of(self, fault: str) -> FaultRecord | None:
        """The record of one fault."""
        return next((record for record in self.faults if record.fault == fault), None)


# --------------------------------------------------------------------------------------------- files


def default_path() -> Path:
    """The record that is committed."""
    return resources.ci_dir() / "faults.json"


def read(path: Path) -> FaultsFile:
    """Read a record.

    Raises:
        RecordError: there is none, it is something else, or it was changed by hand.
    """
    return sealed.read(path, FaultsFile, "`conformance faults measure` (`--out`)")


def write(file: FaultsFile, path: Path) -> None:
    """Write a record: readers see the old one or the new one."""
    sealed.write(file, path)


def newest(one: FaultsFile, other: FaultsFile) -> FaultsFile:
    """Both records: of each fault the newer last run, and the older first one.

    Such as the record of nights and the committed one, after either has gone on.
    """
    known: dict[str, FaultRecord] = {}
    for entry in (*one.faults, *other.faults):
        have = known.get(entry.fault, entry)
        last, first = (
            max((have, entry), key=lambda e: e.last.at),
            min((have, entry), key=lambda e: e.first.at),
        )
        known[entry.fault] = last.model_copy(update={"first": first.first})
    newer = max((one, other), key=lambda file: max((entry.last.at for entry in file.faults), default=""))
    return newer.model_copy(
        update={"digest": "", "faults": tuple(known[name] for name in places().by_fault if name in known)}
    )


# --------------------------------------------------------------------------------- what outcomes rest on


def basis(fault: Fault, cases: Sequence[LoadedCase]) -> Basis:
    """What an outcome of today would rest on.

    Raises:
        RecordError: the fault's place is not written down, or disagrees with it.
    """
    wrong = misplaced(fault)
    if wrong:
        raise RecordError(f"the fault {fault.id} {wrong}")
    place = place_of(fault).model_dump_json(exclude={"faults"})
    return Basis(
        sources=grounds.sources(*grounds.OF_TRIALS, *grounds.OF_ENGINES),
        cases=grounds.of_cases(cases),
        fault=grounds.of_text(f"{_source_of(fault)}\n{place}"),
    )


def place_of(fault: Fault) -> Place:
    """Where a fault is."""
    return places().by_fault[fault.id]


def stale(record: FaultRecord | None, today: Basis) -> str:
    """Why a record says nothing about today; empty if it does."""
    if record is None:
        return "was never measured"
    last = record.last.basis
    if record.last.reason:
        return f"its last run came to no end: {record.last.reason}"
    if last.fault != today.fault:
        return "its patch or its place has changed since"
    if last.cases != today.cases:
        return "the cases have changed since"
    return "the implementation or the harness has changed since" if last.sources != today.sources else ""


def _source_of(fault: Fault) -> str:
    spec = importlib.util.find_spec(fault.written_in)
    assert spec is not None  # the fault came from there
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------- rates


def rates(records: Iterable[FaultRecord]) -> Rates:
    """How many of some faults were noticed."""
    chosen = tuple(records)
    return Rates(
        faults=len(chosen),
        detected_first=sum(record.first.detected for record in chosen),
        detected=sum(record.last.detected for record in chosen),
        localised_first=sum(record.localised(record.first) for record in chosen),
        localised=sum(record.localised(record.last) for record in chosen),
        in_area_first=sum(record.in_area(record.first) for record in chosen),
        in_area=sum(record.in_area(record.last) for record in chosen),
        crash_only=sum(record.last.crash_only for record in chosen),
        first_untold=sum(record.first.detected and record.first.lowest is None for record in chosen),
    )


def rates_by_class(records: Sequence[FaultRecord]) -> Mapping[Class, Rates]:
    """The same by class, in the catalogue's order; classes without a record are left out."""
    by_class = {name: [record for record in records if record.fault_class == name] for name in CLASSES}
    return {name: rates(chosen) for name, chosen in by_class.items() if chosen}
