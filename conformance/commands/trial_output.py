"""What the commands of faults, trials and nights print: the harness tried on what is known."""

from __future__ import annotations

from conformance.commands.output import Output
from conformance.faults.places import Class, Layer, Level
from conformance.faults.record import Outcome, Rates
from conformance.nightly.run import NightResult
from conformance.trials.clean import CleanRun
from conformance.trials.kill import KillTrial
from conformance.trials.record import Name


class FaultRow(Output):
    """A known bug that can be switched on in the bundled implementation."""

    id: str
    title: str
    source: tuple[str, ...]
    kind: str
    area: str
    detected: bool | None = None
    """Whether some case failed by a rule while it was on; null when it was not run."""
    localised: bool | None = None
    """Whether a case of the fault's own area was among them."""
    by_source: bool | None = None
    """Whether a case that cites the fault's source was among them."""
    caught_by: tuple[str, ...] = ()
    """Addresses of the cases that noticed it."""
    cases: int | None = None
    """How many cases ran."""


class FaultsOutput(Output):
    """Output of `conformance faults`."""

    faults: tuple[FaultRow, ...]


class RecordRow(Output):
    """What the quick suites made of a fault."""

    fault: str
    title: str
    fault_class: Class
    area: str
    layer: Layer
    level: Level
    """The lowest level at which it must be noticed."""
    module: str
    first: Outcome
    last: Outcome
    localised_first: bool
    localised: bool
    """Whether more than half of the cases of the lowest level that noticed it name its module."""
    in_area_first: bool
    in_area: bool
    """Whether one of them at least is of an area to which its module belongs."""


class FaultsMeasureOutput(Output):
    """Output of `conformance faults measure` and `conformance faults show`."""

    file: str
    digest: str
    faults: tuple[RecordRow, ...]
    rates: Rates
    classes: dict[Class, Rates]


class StaleRow(Output):
    """A fault whose record does not hold."""

    id: str
    reason: str


class FaultsCheckOutput(Output):
    """Output of `conformance faults check`."""

    file: str
    faults: int
    """How many were checked."""
    stale: tuple[StaleRow, ...]
    gone: tuple[str, ...]
    """Recorded faults that are there no more."""


class CleanOutput(Output):
    """Output of `conformance trial clean`."""

    runs: tuple[CleanRun, ...]
    alarming: int
    """How many of them had an alarm."""


class KillOutput(Output):
    """Output of `conformance trial kill`."""

    trial: KillTrial
    sound: bool
    """Nothing was lost or thrown away, and all verdicts are those of an undisturbed run."""


class TrialRow(Output):
    """A trial of a record."""

    trial: Name
    stale: str
    """Why it is to be made again; empty if it holds."""
    bad: bool
    """Whether it had an alarm, or lost something."""


class TrialCheckOutput(Output):
    """Output of `conformance trial check`."""

    file: str
    trials: tuple[TrialRow, ...]


class CheckpointRow(Output):
    """A bundled checkpoint, head or adapter."""

    checkpoint: str
    changed: tuple[str, ...]
    """Sources that were others when it was trained; empty if it holds."""
    train: str
    """The command that trains it again."""


class CheckpointsCheckOutput(Output):
    """Output of `conformance checkpoints check`."""

    checkpoints: tuple[CheckpointRow, ...]


class NightlyOutput(Output):
    """Output of `conformance nightly`, and its file `nightly.json`."""

    night: NightResult
    text: str
    """What `nightly.txt` holds."""
    exit_code: int
