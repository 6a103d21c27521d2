"""The record of what gates, and suites of tensors, made of known faults, and whether it still holds.

1. Each cell, one fault on one gate, has what it was measured with: the sources that bear on a verdict, the
   case, and the fault's own patch. A later measurement replaces the cells that it asked, and no others.
2. `stale` compares digests, and runs nothing. Cells whose grounds are not known do not hold.
3. The file carries a digest of itself. The tables of docs/gates.md are written from it, by `docs/gates.py`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from conformance import fingerprint, grounds, resources, sealed
from conformance.faults import Fault
from conformance.faults.record import Basis, basis
from conformance.gates.decision import Decision, Reading, Sensitivity
from conformance.loading import LoadedCase, LoadedSuites
from conformance.records import Record
from conformance.sealed import RecordError, Sealed

TENSORS = "tensors"
"""Stands for all suites of tensors and masks where a gate's address would."""
UNKNOWN = Basis(sources="", cases="", fault="")
"""Of what was measured before there were records."""


class Made(Record):
    """With what something was measured."""

    at: str
    """ISO 8601, UTC."""
    commit: str | None
    basis: Basis


class Told(Record):
    """A decision, in a cell of a table."""

    verdict: Literal["pass", "fail", "inconclusive"]
    by_words_alone: bool = False
    """It failed for other words alone: the score says nothing against the target."""
    right: int
    items: int = Field(ge=1)
    lost: int
    gained: int
    texts_differ: int | None
    """Answers with other words; None where that was not kept."""

    @classmethod
    def of(cls, decision: Decision) -> Told:
        """Of a decision on answers."""
        return cls(
            verdict=decision.verdict,
            by_words_alone=decision.by_words_alone,
            right=decision.score.count,
            items=decision.items,
            lost=len(decision.lost),
            gained=len(decision.gained),
            texts_differ=decision.texts_differ,
        )

    def __str__(self) -> str:
        verdict = f"**{self.verdict}**" if self.verdict == "fail" else self.verdict
        alone = " by words alone" if self.by_words_alone else ""
        drop = 100 * (self.lost - self.gained) / self.items
        words = "" if self.texts_differ is None else f", {self.texts_differ} in other words"
        counts = f"({self.lost} lost, {self.gained} gained{words})"
        return f"{verdict}{alone}, {self.right / self.items:.1%}, drop {drop:.1f} {counts}"


class Cell(Record):
    """What one gate made of one fault."""

    fault: str
    case: str
    """Address of the gate."""
    told: Told
    made: Made


class TensorsCell(Record):
    """How many cases of suites of tensors and masks noticed one fault."""

    fault: str
    cases: int
    made: Made


class SensitivityFile(Sealed):
    """What `conformance gate sensitivity --record` writes."""

    schema_version: Literal[1] = 1
    tensors: tuple[TensorsCell, ...] = ()
    cells: tuple[Cell, ...] = ()

    def cell(self, fault: str, case: str) -> Cell | None:
        """One of them."""
        return next((cell for cell in self.cells if (cell.fault, cell.case) == (fault, case)), None)


def default_path() -> Path:
    """The record that is committed."""
    return resources.ci_dir() / "sensitivity.json"


def read(path: Path) -> SensitivityFile:
    """Read a record.

    Raises:
        RecordError: there is none, it is something else, or it was changed by hand.
    """
    return sealed.read(path, SensitivityFile, "`conformance gate sensitivity --record`")


class Grounds:
    """What measurements of today rest on; taken before they begin, as sources may change meanwhile.

    Args:
        faults: That are switched on.
        gates: Accuracy cases.
        suites: Of which those of tensors and masks are asked; None if they are not.

    Raises:
        RecordError: a fault's place is not written down.
    """

    def __init__(
        self, faults: Sequence[Fault], gates: Sequence[LoadedCase], suites: LoadedSuites | None
    ) -> None:
        self._at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self._commit = fingerprint.git_commit()
        self._faults = {fault.id: (fault.kind, basis(fault, ())) for fault in faults}
        self._cases = {gate.address: grounds.of_cases([gate]) for gate in gates}
        every = suites.cases if suites is not None else ()
        self._tensors = {
            kind: grounds.of_cases(case for case in every if case.suite.suite.kind == kind)
            for kind in {fault.kind for fault in faults}
        }

    def of(self, fault: str, asked: str) -> Basis:
        """Of a fault on a gate, by its address, or on `TENSORS`."""
        kind, own = self._faults[fault]
        cases = self._tensors[kind] if asked == TENSORS else self._cases[asked]
        return own.model_copy(update={"cases": cases})

    def made(self, fault: str, asked: str) -> Made:
        """The same, with the time and the commit."""
        return Made(at=self._at, commit=self._commit, basis=self.of(fault, asked))


def keep(path: Path, found: Sequence[Sensitivity], rest_on: Grounds) -> SensitivityFile:
    """Put measurements into a record, in place of those of the same faults and gates.

    Args:
        path: Of the record; there may be none yet.
        found: What was measured.
        rest_on: Taken before.

    Returns:
        What stands there now.

    Raises:
        RecordError: the file at this path is no record, or a gate came to no decision.
    """
    old = read(path) if path.exists() else SensitivityFile()
    cells = {(cell.fault, cell.case): cell for cell in old.cells}
    tensors = {cell.fault: cell for cell in old.tensors}
    for row in found:
        if row.tensors is not None:
            made = rest_on.made(row.fault, TENSORS)
            tensors[row.fault] = TensorsCell(fault=row.fault, cases=len(row.tensors), made=made)
        for reading in row.readings:
            key = row.fault, reading.case
            told, made = _told(row.fault, reading), rest_on.made(*key)
            cells[key] = Cell(fault=row.fault, case=reading.case, told=told, made=made)
    file = SensitivityFile(tensors=tuple(tensors.values()), cells=tuple(cells.values()))
    sealed.write(file, path)
    return file


def _told(fault: str, reading: Reading) -> Told:
    if reading.decision is None:
        raise RecordError(f"{reading.case} came to no decision with {fault}: {reading.reason}")
    return Told.of(reading.decision)


def stale(made: Made | None, today: Basis) -> str:
    """Why a measurement says nothing about today; empty if it does.

    Args:
        made: With what it was made; None if it never was.
        today: What it would rest on now.
    """
    if made is None:
        return "was never measured"
    if made.basis == UNKNOWN:
        return "was measured before there were records"
    if made.basis.fault != today.fault:
        return "its patch or its place has changed since"
    if made.basis.cases != today.cases:
        return "the cases have changed since"
    return (
        "the implementation or the harness has changed since" if made.basis.sources != today.sources else ""
    )


def check(
    file: SensitivityFile,
    usual: Sequence[str],
    known: Mapping[str, Fault],
    gates: Sequence[LoadedCase],
    suites: LoadedSuites,
) -> dict[tuple[str, str], str]:
    """Why each cell of a record does not hold any more; empty where it does.

    Args:
        file: The record.
        usual: Faults that each gate, and suites of tensors, must have been asked about.
        known: All faults of today.
        gates: Those that must have been asked.
        suites: All of them.

    Returns:
        By fault and gate (its address, or `TENSORS`).
    """
    made = {(cell.fault, cell.case): cell.made for cell in file.cells}
    made |= {(cell.fault, TENSORS): cell.made for cell in file.tensors}
    asked = [*(gate.address for gate in gates), TENSORS]
    wanted = dict.fromkeys([*((fault, case) for fault in usual for case in asked), *made])
    faults = [known[name] for name in dict.fromkeys(fault for fault, _ in wanted) if name in known]
    today = Grounds(faults, gates, suites)
    return {
        (fault, case): stale(made.get((fault, case)), today.of(fault, case))
        if fault in known and case in asked
        else "is of a fault or a gate that there is no more"
        for fault, case in wanted
    }


# --------------------------------------------------------------------------------------------- tables


def table(file: SensitivityFile, faults: Sequence[str], gates: Sequence[str], *, tensors: bool = True) -> str:
    """What some gates made of some faults, in Markdown.

    Args:
        file: The record.
        faults: A row each.
        gates: Addresses; a column each.
        tensors: Whether there is a column of how many cases of suites of tensors noticed the fault.

    Raises:
        RecordError: something of it was never measured.
    """
    noticed = {cell.fault: f"{cell.cases} cases" for cell in file.tensors}
    columns = ["fault", *(["tensors"] if tensors else []), *(gate.partition("::")[2] for gate in gates)]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for fault in faults:
        cells = [f"`{fault}`", *([noticed.get(fault, "not asked")] if tensors else [])]
        for gate in gates:
            cell = file.cell(fault, gate)
            if cell is None:
                raise RecordError(
                    f"{gate} with {fault} was never measured; run `conformance gate sensitivity`"
                )
            cells.append(str(cell.told))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def where_from(file: SensitivityFile) -> str:
    """A sentence: with which commits the cells of a record were measured, and which of them have grounds."""
    each: list[Cell | TensorsCell] = [*file.cells, *file.tensors]
    commits = dict.fromkeys((one.made.commit or "an installed version")[:10] for one in each)
    unknown = sum(one.made.basis == UNKNOWN for one in each)
    said = f"{len(each)} cells, measured at {', '.join(commits)}."
    return (
        f"{said} Of {unknown} it was not kept with which sources, so they count as stale."
        if unknown
        else said
    )
