"""What suites of every kind have: ids, sources, and the heads of a case and of a suite."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

CaseId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{1,79}$")]
SuiteId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*(/[a-z0-9][a-z0-9-]*)+$")]
OracleSpec = Annotated[str, StringConstraints(pattern=r"^([a-z][a-z0-9-]*@\d[\w.]*|[A-Za-z_][\w.]*:\w+)$")]
"""Spec of the target that the others are compared with, with its version: `transformers@5.19.0`."""
SourceRef = Annotated[
    str,
    StringConstraints(
        pattern=r"^([RTCAMPSLBNX]\d{2}|spec [0-9.]+|check \d+|[\w.-]+/[\w.-]+#\d+|https://\S+)$"
    ),
]
"""Where a case comes from: a catalogue id (`R05`, `X11`), a section of the fact sheet (`spec 6.5`),
a cross-cutting check (`check 7`), an issue (`vllm-project/vllm#38855`) or a URL."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


Words = Annotated[str, StringConstraints(min_length=3), AfterValidator(_compiles)]
"""Regular expression that the message of a refusal must hold, so that a crash is told from it."""


class Strict(BaseModel):
    """Base: unknown keys are errors."""

    # Validators are built where one is first used, as a command needs few of them.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class CaseBase(Strict):
    """What every case has, whatever its kind."""

    id: CaseId
    title: str = Field(min_length=8)
    """One sentence: the rule that the case checks."""
    source: tuple[SourceRef, ...] = Field(min_length=1)
    control_of: CaseId | None = None
    """This case is the negative control of that one: nearly the same input, the rule must not fire."""
    tags: tuple[CaseId, ...] = ()
    """Words to choose cases by; `conformance run --quick` leaves out those with `slow`."""


class SuiteBase(Strict):
    """Head of a suite file."""

    id: SuiteId
    """The file's path below `suites/` without extension, such as `parser/reasoning`."""
    title: str
    description: str
    area: CaseId
    """Row of the dashboard: `reasoning`, `tool-calls`, `recovery`, `typing`, `template`, `text-model`, …"""
