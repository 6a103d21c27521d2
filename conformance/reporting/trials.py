"""What the dashboard shows of trials of the harness: runs without a fault, and a run that was killed."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.reporting.signs import SIGNS, Status
from conformance.reporting.view import Case, Site
from conformance.trials.clean import Alarm, CleanRun, alarming
from conformance.trials.record import TrialsFile


@dataclass(frozen=True)
class AlarmView:
    """A false alarm."""

    number: int
    """Of its run."""
    alarm: Alarm
    case: Case | None
    """The case in the run of this dashboard."""


@dataclass(frozen=True)
class CleanRow:
    """A run without a fault."""

    number: int
    run: CleanRun

    @property
    def counts(self) -> dict[Status, int]:
        """Its results by verdict."""
        found: dict[Status, int] = {name: count for name, count in self.run.counts.items() if count}
        return {status: found[status] for status in SIGNS if status in found}


class TrialsView:
    """A record of trials.

    Args:
        file: It.
        site: The run beside which it is shown, for links.
    """

    def __init__(self, file: TrialsFile, site: Site) -> None:
        cases = {case.address: case for case in site.cases}
        self.file = file
        clean = file.clean.runs if file.clean is not None else ()
        self.rows = [CleanRow(number, run) for number, run in enumerate(clean, 1)]
        self.alarming = len(alarming(clean))
        self.alarms = [
            AlarmView(row.number, alarm, cases.get(alarm.address))
            for row in self.rows
            for alarm in row.run.alarms
        ]
        self.kills = file.kill.trial.kills if file.kill is not None else ()
        self.torn = sum(kill.torn for kill in self.kills)
        lost = dict.fromkeys(name for kill in self.kills for name in kill.lost)
        trial = file.kill.trial if file.kill is not None else None
        self.wrong = [
            *(f"Lost: {name}" for name in lost),
            *(f"Another verdict: {name}" for name in (trial.differing if trial is not None else ())),
            *(f"Asked again: {name}" for name in (trial.twice if trial is not None else ())),
        ]
