"""What a gate declares: how much worse is too much, with what error rates, and what is expected of the noise.

Scores, drops and shares are numbers from 0 to 1; a margin of 0.02 is two points.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from conformance.suitebase import SourceRef, Strict


class Rule(Strict):
    """What every gate declares."""

    items: int = Field(ge=1)
    """How many are asked. A number that cannot reach the margin with this alpha and power is refused."""
    margin: float = Field(gt=0, lt=1)
    """A drop of the score that must not pass."""
    floor: float = Field(ge=0, lt=1)
    """A drop up to which nothing fails by the alarm alone, however sure it is."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance, at most, of a false alarm where nothing is worse, and of a pass at a drop of the margin: where
    items are independent. Few clusters whose drops are very unequal pass more often (docs/gates.md)."""
    power: float = Field(default=0.8, ge=0.5, lt=1)
    """Chance, at least, of failing a drop of the margin, and of passing a target without any drop."""
    design_effect: float = Field(default=1.0, ge=1)
    """How many times dependence inside clusters widens the variance, as expected; planning divides by it."""
    max_truncated: float = Field(default=0.02, ge=0, lt=1)
    """Share of answers that may break off at the token limit; more fails. They also count as not correct."""
    max_refused: float = Field(default=0.0, ge=0, lt=1)
    """Share of items that the target may refuse to take; they are left out. More fails."""
    max_transport_errors: float = Field(default=0.0, ge=0, lt=1)
    """Share of items that may be missing, or lost on the way; they are left out. More is inconclusive."""

    @model_validator(mode="after")
    def _fits_together(self) -> Rule:
        if self.floor >= self.margin:
            raise ValueError(f"`floor` {self.floor:g} must be below `margin` {self.margin:g}")
        if self.max_transport_errors + self.max_refused >= self.margin:
            raise ValueError(
                "`max_transport_errors` and `max_refused` together must be below `margin`: what is left out "
                "could hide it"
            )
        return self

    @property
    def final_alpha(self) -> float:
        """What the test at the end has."""
        return self.alpha


class PairedRule(Rule):
    """A rule for answers to the same items by a reference and a target."""

    clusters: Annotated[int, Field(ge=2)] | Literal["all"] | None = None
    """Of items that name one, as MMMU's name their subject: how many there are. They are some of many, so
    items of one depend on each other, and `design_effect` has to be measured. `all`: there are no others, so
    they are no sample, and items count as independent. Absent: items name none."""
    discordance: float = Field(gt=0, le=1)
    """Share of items expected to be right in one arm and wrong in the other where there is no drop, half of
    them each way. What a drop loses comes on top."""
    mid_p: bool = False
    """McNemar's mid-p: more power, and a false-alarm rate that may exceed alpha by a little."""
    stop_alpha: float | None = Field(default=None, gt=0)
    """The part of alpha that is spent on a test that is looked at after every item, and may stop the run to
    fail it, never to pass it. The test at the end has the rest. Absent: there is no such test."""
    other_checkpoint: bool = False
    """The arms may have other weights, such as quantised ones; else they must be the same files."""
    max_texts_differ: float | None = Field(default=None, ge=0, lt=1)
    """Share of pairs whose answers may have other words, thoughts included, whether right or not; more fails.
    For targets that must say the same up to near ties: two tokens as likely but for rounding. Absent: any."""

    @model_validator(mode="after")
    def _clusters_are_planned_for(self) -> PairedRule:
        if not isinstance(self.clusters, int):
            return self
        if "design_effect" not in self.model_fields_set:
            raise ValueError(
                "`clusters` widen what can be told, and `design_effect` has to say by how much: `conformance "
                "gate compare` measures it on two sheets (1 is an answer too)"
            )
        if self.stop_alpha is not None:
            raise ValueError(
                "`stop_alpha` does not go with `clusters`: a test that is looked at after every item takes "
                "items to be independent, and would alarm too often"
            )
        return self

    @model_validator(mode="after")
    def _stop_leaves_something(self) -> PairedRule:
        if self.stop_alpha is not None and self.stop_alpha >= self.alpha:
            raise ValueError(
                f"`stop_alpha` {self.stop_alpha:g} must be below `alpha` {self.alpha:g}: two tests share it"
            )
        return self

    @property
    def final_alpha(self) -> float:
        """What the test at the end has: alpha, less what the sequential test may spend."""
        return self.alpha - (self.stop_alpha or 0.0)


class PairedGate(PairedRule):
    """A gate against a stored reference."""

    kind: Literal["paired"]
    reference: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*\.jsonl$")
    """Sheet of the reference's own answers, from the folder of the suite. `conformance gate rebaseline`
    writes it."""


class UnpairedGate(Rule):
    """A gate against a published figure without items. It takes far more of them to detect far less."""

    kind: Literal["unpaired"]
    score: float = Field(gt=0, lt=1)
    """The published figure."""
    of: int = Field(ge=1)
    """Items behind it."""
    published: SourceRef
    """Where it stands."""
    method: str = Field(min_length=20)
    """All that is known of how it was measured: engine, dtype, shots, filter, template, limits, sampling."""


Gate = PairedGate | UnpairedGate
