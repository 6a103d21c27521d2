"""The table of backtests: which catalogued fault is looked for where, and by what it is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Self

from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, Field, model_validator

from conformance import yamlfile
from conformance.errors import UsageError
from conformance.suitebase import Strict
from conformance.targets.protocol import PieceUnit

TABLE = Path(__file__).with_name("table.yaml")
CatalogueId = Annotated[str, Field(pattern=r"^[A-Z][0-9]{2}$")]


def _version(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion:
        raise ValueError("expected the version of a release, such as 0.19.1") from None
    return text


Release = Annotated[str, AfterValidator(_version)]


class Cuts(Strict):
    """How the output was cut when the fault shows in a stream only; see `protocol.Chunking`."""

    unit: PieceUnit = "tokens"
    cuts: tuple[int, ...] = ()
    lag: int = 0


class Call(Strict):
    """A call as the client gets it."""

    name: str
    arguments: str
    """Verbatim, whether or not it is JSON."""


class Wrong(Strict):
    """What the last bad release answers, and nothing else will do."""

    streamed: Cuts | None = None
    """Absent: the output is parsed whole."""
    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[Call, ...] = ()
    raises: str | None = None
    """Name of the exception, where the parser raises."""
    hangs: bool = False
    """Whether no answer comes at all."""

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        answered = self.reasoning or self.content or self.tool_calls
        if ((self.raises or self.hangs) and answered) or (self.raises and self.hangs):
            raise ValueError("give an answer, `raises` or `hangs`, not several of them")
        return self


class Source(Strict):
    """A line of an engine's source."""

    file: str = Field(pattern=r"^[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*\.py$")
    """Path in the folder that packages are installed in."""
    line: str = Field(min_length=8)
    """The whole line, less the space around it."""
    times: int = Field(default=1, ge=1)
    """How often it stands there at least, where fewer times do not count."""


class Backtest(Strict):
    """One catalogued fault and where it was. One that was mended in steps has several."""

    id: CatalogueId
    title: str = Field(min_length=8)
    case: str = Field(pattern=r"^[^:]+::[^:]+$")
    """`suite-id::case-id`, of kind `parser`."""
    target: str
    last_bad: Release
    first_good: Release
    wrong: Wrong
    fix: Source
    """What the first good release has and the last bad one lacks."""
    fault: Source | None = None
    """What the last bad release has and the first good one lacks. Needed where the former has no file of the
    fix's name, since it would lack any other line of it as well."""
    besides: tuple[CatalogueId, ...] = ()
    """Other faults with a backtest, by which the first good release still fails the case in other streams."""
    remains: str = ""
    """What is left of the fault in the first good release and shows in other streams of the case."""
    elsewhere: str = ""
    """The engines that the catalogue names, where the target is none of them and had the same fault."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if Version(self.last_bad) >= Version(self.first_good):
            raise ValueError("`last_bad` is no release before `first_good`")
        return self


class Unreached(Strict):
    """Catalogued faults of a target that no release on the index can show, and why."""

    ids: tuple[CatalogueId, ...] = Field(min_length=1)
    reason: str = Field(min_length=20)


class Table(Strict):
    """The file."""

    backtests: tuple[Backtest, ...]
    not_reachable: tuple[Unreached, ...] = ()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        tested = Counter((entry.id, entry.target, entry.last_bad) for entry in self.backtests)
        unreached = Counter(i for reason in self.not_reachable for i in reason.ids)
        twice = {i for (i, _, _), times in tested.items() if times > 1 or i in unreached}
        twice |= {i for i, times in unreached.items() if times > 1}
        if twice:
            raise ValueError(f"named twice: {', '.join(sorted(twice))}")
        return self

    @model_validator(mode="after")
    def _besides_is_still_there(self) -> Self:
        for entry in self.backtests:
            others = [
                other for other in self.backtests if other is not entry and other.target == entry.target
            ]
            for name in entry.besides:
                if all(other.id != name for other in others):
                    raise ValueError(
                        f"{entry.id}: `besides` names {name}, which is no other backtest of {entry.target}"
                    )
                if not still_there(entry, name, others):
                    raise ValueError(
                        f"{entry.id}: `besides` names {name}, which is mended in {entry.first_good} already"
                    )
        return self


def still_there(entry: Backtest, name: str, among: Iterable[Backtest]) -> tuple[Backtest, ...]:
    """Backtests of a fault which say that the first good release of another still has it."""
    return tuple(
        other
        for other in among
        if (other.id, other.target) == (name, entry.target)
        and Version(other.last_bad) >= Version(entry.first_good)
    )


def with_besides(table: Table, chosen: Sequence[Backtest]) -> tuple[Backtest, ...]:
    """These backtests and those that they rest on, in the table's order."""
    needed: set[Backtest] = set()
    waiting = list(chosen)
    while waiting:
        entry = waiting.pop()
        if entry not in needed:
            needed.add(entry)
            waiting += [o for name in entry.besides for o in still_there(entry, name, table.backtests)]
    return tuple(entry for entry in table.backtests if entry in needed)


def load(path: Path = TABLE) -> Table:
    """Read the table.

    Raises:
        SuiteError: it is broken; names file, line and field.
    """
    return yamlfile.read(path).validate(Table)


def choose(table: Table, ids: Sequence[str]) -> tuple[Backtest, ...]:
    """Those with these ids; all without any.

    Raises:
        UsageError: an id has no backtest; with the reason, if one is known.
    """
    known = dict.fromkeys(entry.id for entry in table.backtests)
    reasons = {i: unreached.reason for unreached in table.not_reachable for i in unreached.ids}
    for wanted in ids:
        if wanted in reasons:
            raise UsageError(f"{wanted} has no backtest: {reasons[wanted]}")
        if wanted not in known:
            raise UsageError(f"{wanted!r} has no backtest; these have: {', '.join(known)}")
    return tuple(entry for entry in table.backtests if not ids or entry.id in ids)
