"""Backtests: catalogued faults, looked for in the releases that had them.

`table.yaml` names, for each catalogue id, a case, the last release with the fault and the first without,
what exactly the former answers, and a line of the latter's source that is the fix. A fault is

* `detected` if
  1. the fix stands in the installed source of the first good release and not of the last bad one (and what
     is recorded of the fault, the other way round). Where the last bad one has no such file, only the
     line that is the fault tells the two apart;
  2. the last bad release gives exactly the recorded wrong answer, which is not the right one, and breaks a
     rule of the case on it. If it gives none, it does so twice, and answers something harmless each time;
  3. the first good release, with the same output cut in the same way, gives the answer that the case
     expects and breaks no rule of the case, on the whole output and on that stream;
  4. over all sampled streams the last bad release fails the case, and the first good one passes it. Where
     it does not, the table must say which other catalogued faults are still in it (`besides`), and a
     backtest of each must be `detected` in a later release, or what is left of this one (`remains`);
* `not reachable` if one of the two is not installed, or its engine does not start: that shows nothing;
* `missed` in every other case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, ValidationError

from conformance.backtests.table import (
    TABLE,
    Backtest,
    Call,
    Cuts,
    Source,
    Table,
    Unreached,
    Wrong,
    choose,
    load,
    still_there,
    with_besides,
)
from conformance.checks.parser import build_request, judge_cut
from conformance.checks.streams import assemble
from conformance.compare import json_equal, load_json, same_text
from conformance.errors import ConformanceError, EngineError, TargetTimeoutError, UsageError
from conformance.history import BAD, GOOD, Releases
from conformance.loading import LoadedCase, LoadedSuites
from conformance.results import Problem
from conformance.suites import ExpectedParse, ParserCase, ParserSuite
from conformance.targets import environments, registry
from conformance.targets.protocol import Chunking, ParseResult, StreamRequest

State = Literal["detected", "missed", "not reachable"]
STATES: tuple[State, ...] = get_args(State)
_HARMLESS = "Fine."
"""An output that every parser answers."""
_SILENCES = 2
"""How often a release must give no answer to count as hanging: one may be the machine's."""


class BacktestResult(BaseModel):
    """What became of one backtest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    title: str
    elsewhere: str
    """The engines that the catalogue names, where the target is none of them and had the same fault."""
    case: str
    last_bad: str
    """Spec."""
    first_good: str
    state: State
    proof: tuple[str, ...]
    """What was seen; for anything but `detected`, the last says what is lacking."""


class Findings(BaseModel):
    """What became of several backtests: the file that `conformance backtest` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backtests: tuple[BacktestResult, ...]
    not_reachable: dict[str, str]
    """Catalogue ids without a backtest, and why."""


def read_findings(path: Path) -> Findings:
    """Read what `conformance backtest` wrote.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    try:
        return Findings.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: is not what `conformance backtest --out FILE` writes; write it again"
        ) from error


def not_installed(entry: Backtest, table: Table) -> str:
    """Why a backtest cannot be run here, nor those that it rests on; empty if all releases are installed."""
    needed = with_besides(table, [entry])
    versions = ((each.target, version) for each in needed for version in (each.last_bad, each.first_good))
    specs = dict.fromkeys(f"{target}@{version}" for target, version in versions)
    return next((f"{spec}: {reason}" for spec in specs if (reason := registry.unavailable(spec))), "")


def unreached(entry: Backtest, reason: str) -> BacktestResult:
    """A backtest that was not run.

    Args:
        entry: What was not looked for.
        reason: What is lacking.
    """
    return _result(entry, "not reachable", (reason,))


def run_all(
    chosen: Sequence[Backtest],
    table: Table,
    suites: LoadedSuites,
    releases: Releases,
    progress: Callable[[BacktestResult], None] = lambda result: None,
) -> tuple[BacktestResult, ...]:
    """Look for faults, and for those that their entries name as still there; in the table's order.

    Raises:
        UsageError: a case that an entry names is gone.
    """
    entries = with_besides(table, chosen)
    results: dict[Backtest, BacktestResult] = {}

    # Newest first: what is still there must be known by then. Those of one pair of releases follow each
    # other, since a release takes seconds to start.
    def age(entry: Backtest) -> tuple[str, Version, Version]:
        return entry.target, Version(entry.last_bad), Version(entry.first_good)

    for entry in sorted(entries, key=age, reverse=True):
        results[entry] = run(entry, suites, releases, results)
        progress(results[entry])
    return tuple(results[entry] for entry in entries)


def run(
    entry: Backtest,
    suites: LoadedSuites,
    releases: Releases,
    others: Mapping[Backtest, BacktestResult] | None = None,
) -> BacktestResult:
    """Look for one fault.

    Args:
        entry: What to look for.
        suites: Where its case is.
        releases: Asks them.
        others: What became of other backtests; those that `besides` names must be among them.

    Raises:
        UsageError: the case that the entry names is gone.
    """
    bad, good = f"{entry.target}@{entry.last_bad}", f"{entry.target}@{entry.first_good}"
    state: State = "not reachable"
    proof = [f"{spec}: {reason}" for spec in (bad, good) if (reason := releases.unusable(spec))]
    if not proof:
        loaded = _case(entry, suites)
        proof, lacking = _evidence(entry, loaded, bad, good, releases)
        if not lacking:
            lacking = _verdicts(entry, loaded, releases, others or {}, proof)
        proof += [lacking] if lacking else []
        state = "missed" if lacking else "detected"
    return _result(entry, state, tuple(proof))


def _result(entry: Backtest, state: State, proof: tuple[str, ...]) -> BacktestResult:
    return BacktestResult(
        id=entry.id,
        title=entry.title,
        elsewhere=entry.elsewhere,
        case=entry.case,
        last_bad=f"{entry.target}@{entry.last_bad}",
        first_good=f"{entry.target}@{entry.first_good}",
        state=state,
        proof=proof,
    )


def answer(loaded: LoadedCase, spec: str, cuts: Cuts | None, releases: Releases) -> Wrong:
    """What a release answers to a case's output, whole or cut in one way.

    Raises:
        ConformanceError: the engine's process died.
    """
    case, suite = _parser_case(loaded)
    target = releases.pool.get(spec).target
    request = build_request(case, suite)
    try:
        if cuts is None:
            result = target.parse(request)
        else:
            asked = StreamRequest(request=request, chunkings=(_chunking(cuts),))
            streamed = assemble(target.parse_stream(asked)[0])
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
    """What was seen of source and answers, and what is lacking; the latter is empty if nothing is."""
    try:
        proof, lacking = _in_source(entry, bad, good)
    except ConformanceError as error:
        return [], str(error)
    if lacking:
        return proof, lacking
    cuts = entry.wrong.streamed
    if lacking := _other_answer(entry, loaded, bad, releases):
        return proof, lacking
    given = _shown(entry.wrong)
    if is_expected(entry.wrong, loaded):
        return proof, f"{bad} answers {given}, and that is the right answer"
    broken = _problems(loaded, bad, cuts, releases)
    proof.append(f"{bad} answers {given}{_breaking(broken)}")
    if not broken and not entry.wrong.hangs:
        return proof, f"{bad} breaks no rule of the case on it"
    right = answer(loaded, good, cuts, releases)
    broken = () if right.hangs else _problems(loaded, good, cuts, releases)
    proof.append(f"{good} answers {_shown(right)}{_breaking(broken)}")
    if not is_expected(right, loaded) or broken:
        return proof, f"{good} does not answer as the case expects"
    return proof, ""


def _in_source(entry: Backtest, bad: str, good: str) -> tuple[list[str], str]:
    """What was seen in the installed sources, and what is lacking."""
    proof: list[str] = []
    looked_for = [(entry.fix, "fix", good, bad)]
    if entry.fault is not None:
        looked_for.append((entry.fault, "fault", bad, good))
    for source, name, holder, other in looked_for:
        for spec, there in ((other, False), (holder, True)):
            seen, found = _looked_for(source, spec)
            if found != there:
                return proof, f"{seen}, the {name}"
            proof.append(seen)
    if entry.fault is None and source_lines(bad, entry.fix.file) is None:
        return proof, (
            f"that a release without the file lacks the fix shows nothing; add a `fault` to {entry.id} in "
            f"{TABLE.name}: the line of {bad} that is at fault"
        )
    return proof, ""


def _looked_for(source: Source, spec: str) -> tuple[str, bool]:
    """A line looked for in a release: in words, and whether it is there often enough."""
    lines = source_lines(spec, source.file)
    if lines is None:
        return f"{spec}: has no such file: {source.file}, for the line `{source.line}`", False
    found = lines[source.line]
    there = f"has {found} times" if source.times > 1 else "has" if found else "lacks"
    return f"{spec}: {source.file} {there} the line `{source.line}`", found >= source.times


def _other_answer(entry: Backtest, loaded: LoadedCase, bad: str, releases: Releases) -> str:
    """How the last bad release answers, if not as recorded; empty if it does."""
    for _ in range(_SILENCES if entry.wrong.hangs else 1):
        if entry.wrong.hangs and not _answers_anything(loaded, bad, releases):
            return f"{bad} answers nothing at all, not even to the output {_HARMLESS!r}"
        given = answer(loaded, bad, entry.wrong.streamed, releases)
        if given != entry.wrong:
            return f"{bad} answers {_shown(given)}, and not {_shown(entry.wrong)}"
    return ""


def _answers_anything(loaded: LoadedCase, spec: str, releases: Releases) -> bool:
    """Whether a release answers to a harmless output, with the rest of the case's request."""
    case, suite = _parser_case(loaded)
    request = build_request(case.model_copy(update={"output": _HARMLESS}), suite)
    try:
        releases.pool.get(spec).target.parse(request)
    except (TargetTimeoutError, EngineError):
        return False
    return True


def _verdicts(
    entry: Backtest,
    loaded: LoadedCase,
    releases: Releases,
    others: Mapping[Backtest, BacktestResult],
    proof: list[str],
) -> str:
    """Add the verdicts over all sampled streams to the proof; return what is lacking."""
    bad, good = f"{entry.target}@{entry.last_bad}", f"{entry.target}@{entry.first_good}"
    verdicts = {spec: releases.ask(loaded, spec).result for spec in (bad, good)}
    for spec, result in verdicts.items():
        proof.append(f"{spec}: verdict {result.verdict} over all sampled streams{_breaking(result.problems)}")
    if verdicts[bad].verdict not in BAD:
        return f"{bad} does not fail the case"
    if verdicts[good].verdict in GOOD:
        return ""
    if verdicts[good].verdict not in BAD:
        return f"{good} comes to no verdict: {verdicts[good].reason}"
    for name in entry.besides:
        states = [others[other].state for other in still_there(entry, name, others)]
        if "detected" not in states:
            known = ", ".join(states) or "it was not looked for"
            return (
                f"{good} fails the case in other streams, and that it still has {name} is not proven: {known}"
            )
    if entry.besides:
        proof.append(f"{good} still has {', '.join(entry.besides)}, which other backtests prove")
    if entry.remains:
        proof.append(f"in {good} this is left of it: {entry.remains}")
    if entry.besides or entry.remains:
        return ""
    return f"{good} fails the case in other streams, and the table does not say by which other fault"


def _problems(loaded: LoadedCase, spec: str, cuts: Cuts | None, releases: Releases) -> tuple[Problem, ...]:
    """The rules of a case that a release breaks on the whole output and, if it is cut, on that stream.

    None where no answer comes at all.
    """
    case, suite = _parser_case(loaded)
    target = releases.pool.get(spec).target
    try:
        return judge_cut(case, suite, target, _chunking(cuts) if cuts is not None else None)
    except TargetTimeoutError:
        return ()


def _breaking(problems: Sequence[Problem]) -> str:
    rules = ", ".join(dict.fromkeys(problem.rule for problem in problems))
    return f" (rules broken: {rules})" if rules else ""


def _parser_case(loaded: LoadedCase) -> tuple[ParserCase, ParserSuite]:
    case, suite = loaded.case, loaded.suite.suite
    if not isinstance(case, ParserCase) or not isinstance(suite, ParserSuite):
        raise UsageError(f"{loaded.address}: backtests are cases of kind `parser`")
    return case, suite


def _chunking(cuts: Cuts) -> Chunking:
    return Chunking(name="backtest", **cuts.model_dump())


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


def source_lines(spec: str, file: str) -> Counter[str] | None:
    """How often each line stands in an installed source file; None if there is none. Indentation is left off.

    Raises:
        TargetError: there is no such release.
    """
    found = environments.status(spec)
    folders = (*found.import_paths, *found.path.glob("lib/python*/site-packages"))
    files = [folder / file for folder in folders if (folder / file).is_file()]
    if not files:
        return None
    # The first folder is what is imported from; a file of the same name behind it is never read.
    return Counter(line.strip() for line in files[0].read_text(encoding="utf-8").splitlines())


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


__all__ = [
    "STATES",
    "TABLE",
    "Backtest",
    "BacktestResult",
    "Cuts",
    "Findings",
    "Source",
    "Table",
    "Unreached",
    "Wrong",
    "answer",
    "choose",
    "is_expected",
    "load",
    "not_installed",
    "read_findings",
    "run",
    "run_all",
    "source_lines",
    "unreached",
    "with_besides",
]
