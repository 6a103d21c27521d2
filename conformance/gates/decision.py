"""What a gate decided, and from what. These records stand in run files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conformance.records import Record

Reason = Literal[
    "drop",  # the lower limit of the drop is above the margin
    "alarm",  # the test of "no worse" alarms, and the drop is above the floor
    "stopped",  # the sequential test stopped early
    "truncated",  # too many answers broke off
    "refused",  # the target would not take too many items
    "texts",  # too many answers have other words than the reference's
    "transport-errors",  # too many items are missing or were lost on the way
    "within-margin",  # the upper limit of the drop is below the margin
    "between",  # neither worse nor as good can be told
]


class Interval(Record):
    """Two limits. `level` is the confidence that both hold, so each alone holds with (1 + level) / 2."""

    low: float
    high: float
    level: float
    method: str
    """`Wilson`, `Clopper-Pearson`, `Tango`, `Tango and clusters`, `Newcombe`."""


class Rate(Record):
    """A share of items, with its interval."""

    count: int
    of: int
    interval: Interval

    @property
    def share(self) -> float:
        """Zero where there is nothing."""
        return self.count / self.of if self.of else 0.0


class Limits(Record):
    """What the gate declares."""

    margin: float
    floor: float
    alpha: float
    max_truncated: float
    max_refused: float
    max_transport_errors: float
    stop_alpha: float | None = None
    max_texts_differ: float | None = None


class Stop(Record):
    """The sequential test: evidence against "no worse", after each item in the recorded order."""

    e_value: float
    """The largest that it became."""
    threshold: float
    stopped_at: int | None
    """Items after which it was above the threshold; None: never."""
    order_seed: int


class Decision(Record):
    """A gate's judgement of a sheet of scored answers. Scores and drops are shares, from 0 to 1."""

    kind: Literal["paired", "unpaired"]
    verdict: Literal["pass", "fail", "inconclusive"]
    reasons: tuple[Reason, ...] = Field(min_length=1)
    """What decided."""
    changed: bool = False
    """It passes, and yet the test of "no worse" alarms: there is a change, smaller than what matters."""
    sentence: str
    """For people."""
    limits: Limits
    items: int
    """Items that were judged: pairs, or answers."""
    score: Rate
    reference_score: Rate
    """Of the same items where they are paired; else the published figure."""
    drop: float
    """Reference score less score."""
    drop_interval: Interval | None = None
    """None where a run was stopped, or too much is missing for an interval to say what it seems to."""
    lost: tuple[str, ...] = ()
    """Items that the reference has right and the target has not (b)."""
    gained: tuple[str, ...] = ()
    """Items that the target has right and the reference has not (c)."""
    p_value: float | None = None
    """Of "no worse", one-sided; None where there is no interval either."""
    test: str = ""
    """`exact McNemar`, `mid-p McNemar`, the same `and clustered t`, or `two proportions`."""
    clusters: int | None = None
    """Groups of dependent items; None: items are independent."""
    design_effect: float | None = None
    """How many times they widen the variance of the drop, or of an unpaired score; None without them."""
    texts_differ: int | None = None
    """Pairs whose answers have other words, thoughts included; None where nothing is paired."""
    outcomes_differ: int | None = None
    """Pairs whose answers are of other outcome classes."""
    stop: Stop | None = None
    """Of a sequential gate."""
    outcomes: dict[str, int]
    """Outcome class to number of the target's items."""
    reference_outcomes: dict[str, int] = Field(default_factory=dict)
    missing: int = 0
    """Items of the reference without any answer here."""
    excluded: int = 0
    """Items left out because the answer of either side was lost, or the question refused."""
    truncated: Rate

    @property
    def discordant(self) -> tuple[int, int]:
        """The numbers of items lost and gained (b, c)."""
        return len(self.lost), len(self.gained)

    @property
    def by_words_alone(self) -> bool:
        """Whether it fails for other words alone, and the score says nothing against the target."""
        return self.verdict == "fail" and self.reasons == ("texts",)


class Reading(Record):
    """What one gate made of one fault."""

    case: str
    """Address."""
    verdict: Literal["pass", "fail", "xfail", "xpass", "skip", "inconclusive", "error", "timeout"]
    reason: str = ""
    """Why there is no decision."""
    decision: Decision | None = None


class Sensitivity(Record):
    """What became of one fault."""

    fault: str
    title: str
    tensors: tuple[str, ...] | None
    """Cases of suites of tensors and masks that notice it; None where they were not asked."""
    readings: tuple[Reading, ...]

    @property
    def caught(self) -> bool:
        """Whether some gate fails by its score. Words may change where no answer gets worse."""
        return any(
            reading.verdict == "fail" and (reading.decision is None or not reading.decision.by_words_alone)
            for reading in self.readings
        )
