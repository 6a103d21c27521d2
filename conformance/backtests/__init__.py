"""Backtests: catalogued faults, looked for in the releases that had them.

`table.yaml` names, for each catalogue id, a case, the last release with the fault and the first without,
what exactly the former answers, and a line of the latter's source that is the fix. A fault is

* `detected` if the last bad release gives exactly that wrong answer and fails the case, the first good one
  gives the answer that the case expects to the same input, cut in the same way, and the line stands in the
  installed source of the first good release and not of the last bad. (The good one may fail the case all the
  same, by another fault that shows in other chunkings; its verdict is part of the proof);
* `not reachable` if one of the two is not installed, or its engine does not start: that shows nothing;
* `missed` in every other case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from conformance import yamlfile
from conformance.checks.parser import build_request
from conformance.checks.streams import assemble
from conformance.compare import json_equal, load_json, same_text
from conformance.errors import ConformanceError, EngineError, TargetTimeoutError, UsageError
from conformance.history import BAD, Releases
from conformance.loading import LoadedCase, LoadedSuites
from conformance.suites import ExpectedParse, ParserCase, ParserSuite, Strict
from conformance.targets import environments
from conformance.targets.protocol import Chunking, ParseResult, PieceUnit, StreamRequest

TABLE = Path(__file__).with_name("table.yaml")
State = Literal["detected", "missed", "not reachable"]
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


class Fix(Strict):
    """A line by which the fix is known."""

    file: str = Field(pattern=r"^[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*\.py$")
    """Path in the folder that packages are installed in."""
    line: str = Field(min_length=8)
    """The whole line, less the space around it."""
    times: int = Field(default=1, ge=1)
    """How often it stands there at least, where fewer times is not the fix."""


class Backtest(Strict):
    """One catalogued fault and where it was."""

    id: CatalogueId
    title: str = Field(min_length=8)
    case: str = Field(pattern=r"^[^:]+::[^:]+$")
    """`suite-id::case-id`, of kind `parser`."""
    target: str
    last_bad: Release
    first_good: Release
    wrong: Wrong
    fix: Fix

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
        ids = [*(entry.id for entry in self.backtests), *(i for u in self.not_reachable for i in u.ids)]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return self


class BacktestResult(BaseModel):
    """What became of one backtest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    title: str
    case: str
    last_bad: str
    """Spec."""
    first_good: str
    state: State
    proof: tuple[str, ...]
    """What was seen; for anything but `detected`, the last says what is lacking."""


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
    known = {entry.id: entry for entry in table.backtests}
    reasons = {i: unreached.reason for unreached in table.not_reachable for i in unreached.ids}
    for wanted in ids:
        if wanted in reasons:
            raise UsageError(f"{wanted} has no backtest: {reasons[wanted]}")
        if wanted not in known:
            raise UsageError(f"{wanted!r} has no backtest; these have: {', '.join(known)}")
    return tuple(known[i] for i in dict.fromkeys(ids)) if ids else table.backtests


def run(entry: Backtest, suites: LoadedSuites, releases: Releases) -> BacktestResult:
    """Look for one fault.

    Raises:
        SuiteError: the case that the entry names is gone.
    """
    bad, good = f"{entry.target}@{entry.last_bad}", f"{entry.target}@{entry.first_good}"
    state: State = "not reachable"
    proof = [f"{spec}: {reason}" for spec in (bad, good) if (reason := releases.unusable(spec))]
    if not proof:
        proof, lacking = _evidence(entry, _case(entry, suites), bad, good, releases)
        proof += [lacking] if lacking else []
        state = "missed" if lacking else "detected"
    return BacktestResult(
        id=entry.id,
        title=entry.title,
        case=entry.case,
        last_bad=bad,
        first_good=good,
        state=state,
        proof=tuple(proof),
    )


def answer(loaded: LoadedCase, spec: str, cuts: Cuts | None, releases: Releases) -> Wrong:
    """What a release answers to a case's output, whole or cut in one way.

    Raises:
        ConformanceError: the engine's process died.
    """
    case, suite = loaded.case, loaded.suite.suite
    if not isinstance(case, ParserCase) or not isinstance(suite, ParserSuite):
        raise UsageError(f"{loaded.address}: backtests are cases of kind `parser`")
    target = releases.pool.get(spec).target
    request = build_request(case, suite)
    try:
        if cuts is None:
            result = target.parse(request)
        else:
            chunking = Chunking(name="backtest", **cuts.model_dump())
            streamed = assemble(target.parse_stream(StreamRequest(request=request, chunkings=(chunking,)))[0])
            if streamed.error is not None:
                return Wrong(streamed=cuts, raises=streamed.error.partition(":")[0])
            result = streamed.result
    except TargetTimeoutError:
        return Wrong(streamed=cuts, hangs=True)
    except EngineError as error:
        return Wrong(streamed=cuts, raises=str(error).partition(":")[0])
    return _wrong(cuts, result)


def _wrong(cuts: Cuts | None, result: ParseResult) -> Wrong:
    return Wrong(
        streamed=cuts,
        reasoning=result.reasoning or None,
        content=result.content or None,
        tool_calls=tuple(Call(name=call.name, arguments=call.arguments) for call in result.tool_calls),
    )


def _evidence(
    entry: Backtest, loaded: LoadedCase, bad: str, good: str, releases: Releases
) -> tuple[list[str], str]:
    """What was seen, and what is lacking; the latter is empty if nothing is."""
    proof: list[str] = []
    for spec, expected in ((bad, False), (good, True)):
        try:
            found = source_lines(spec, entry.fix.file)[entry.fix.line]
        except ConformanceError as error:
            return proof, str(error)
        there = f"has {found} times" if entry.fix.times > 1 else "has" if found else "lacks"
        seen = f"{spec}: {entry.fix.file} {there} the line `{entry.fix.line}`"
        if (found >= entry.fix.times) != expected:
            return proof, f"{seen}, the fix"
        proof.append(seen)
    given = answer(loaded, bad, entry.wrong.streamed, releases)
    if given != entry.wrong:
        return proof, f"{bad} answers {_shown(given)}, and not {_shown(entry.wrong)}"
    proof.append(f"{bad} answers {_shown(given)}")
    verdicts = {spec: releases.ask(loaded, spec).result for spec in (bad, good)}
    for spec, result in verdicts.items():
        rules = ", ".join(dict.fromkeys(problem.rule for problem in result.problems))
        proof.append(f"{spec}: verdict {result.verdict}{f' ({rules})' if rules else ''}")
    if verdicts[bad].verdict not in BAD:
        return proof, f"{bad} does not fail the case"
    right = answer(loaded, good, entry.wrong.streamed, releases)
    proof.append(f"{good} answers {_shown(right)}")
    return proof, "" if is_expected(right, loaded) else f"{good} does not answer as the case expects"


def is_expected(given: Wrong, loaded: LoadedCase) -> bool:
    """Whether an answer is the one that its case expects, or one that it accepts."""
    case = loaded.case
    if not isinstance(case, ParserCase) or given.raises or given.hangs:
        return False
    answers = (case.expect,) if case.expect is not None else case.policy or ()
    return any(_equal(given, expect) for expect in answers)


def _equal(given: Wrong, expect: ExpectedParse) -> bool:
    if [call.name for call in given.tool_calls] != [call.name for call in expect.tool_calls]:
        return False
    try:
        arguments = [load_json(call.arguments) for call in given.tool_calls]
    except ValueError:
        return False
    return (
        same_text(given.reasoning, expect.reasoning)
        and same_text(given.content, expect.content)
        and all(
            json_equal(got, want.arguments) for got, want in zip(arguments, expect.tool_calls, strict=True)
        )
    )


def source_lines(spec: str, file: str) -> Counter[str]:
    """How often each line stands in an installed source file, which may be absent. Indentation is left off.

    Raises:
        TargetError: there is no such release.
    """
    found = environments.status(spec)
    folders = found.import_paths or tuple(found.path.glob("lib/python*/site-packages"))
    lines: Counter[str] = Counter()
    for folder in folders:
        path = folder / file
        if path.is_file():
            lines.update(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return lines


def _case(entry: Backtest, suites: LoadedSuites) -> LoadedCase:
    for loaded in suites.cases:
        if loaded.address == entry.case:
            return loaded
    raise UsageError(f"{TABLE.name}: {entry.id} names the case {entry.case!r}, which no suite has")


def _shown(given: Wrong) -> str:
    if given.hangs:
        return "nothing before its time is up"
    if given.raises:
        return f"with {given.raises}"
    return given.model_dump_json(include={"reasoning", "content", "tool_calls"}, exclude_none=True)
