"""Backtests: the committed table, and how a fault is told from what only looks like one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import backtests
from conformance.backtests import Backtest, BacktestResult, Cuts, Fix, Wrong
from conformance.errors import SuiteError, TargetTimeoutError, UsageError
from conformance.history import Releases
from conformance.loading import LoadedSuites, load_suites
from conformance.runner import OpenTarget, TargetPool
from conformance.suites import ParserCase
from conformance.targets import environments, registry
from conformance.targets.protocol import (
    Delta,
    ParseRequest,
    ParseResult,
    StreamRequest,
    StreamResult,
    TargetInfo,
)
from tests.conftest import Run, Suites
from tests.test_environments import (  # noqa: F401 - fixtures
    Place,
    installed,
    installed_once,
    place,
    wheels,
)
from tests.test_overlays import SPEC
from tests.test_overlays import overlaid as overlaid  # fixtures

TABLE = backtests.load()
BAD, GOOD = "toy@0.9", SPEC
LINE = "VERSION = '1.0'"


class Toy:
    """Loses the last word at 0.9: whole, streamed, by an exception or by silence."""

    def __init__(self, spec: str, how: str) -> None:
        self.spec = spec
        self.how = how if spec == BAD else ""

    def describe(self) -> TargetInfo:
        return TargetInfo(name="toy", version="1.0", capabilities=("parse", "parse_stream"))

    def parse(self, request: ParseRequest) -> ParseResult:
        if self.how == "hangs":
            raise TargetTimeoutError("too late")
        return ParseResult(content="lost" if self.how == "whole" else request.output)

    def parse_stream(self, request: StreamRequest) -> list[StreamResult]:
        if self.how == "raises":
            return [StreamResult(error="IndexError: boom") for _ in request.chunkings]
        content = "lost" if self.how in ("whole", "streamed") else request.request.output
        return [StreamResult(deltas=(Delta(content=content),)) for _ in request.chunkings]

    def close(self) -> None:
        pass


class Pool(TargetPool):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def get(self, spec: str) -> OpenTarget:
        toy = Toy(spec, self.how)
        return OpenTarget(toy, toy.describe())  # type: ignore[arg-type]


def entry(wrong: Wrong, line: str = LINE) -> Backtest:
    return Backtest(
        id="T99",
        title="The last word is lost.",
        case="parser/demo::case-hello",
        target="toy",
        last_bad="0.9",
        first_good="1.0",
        wrong=wrong,
        fix=Fix(file="toy_engine.py", line=line),
    )


@pytest.fixture
def both(overlaid: Place, suites: Suites) -> LoadedSuites:
    environments.install(BAD)
    return load_suites([suites.write("hello")])


WRONG = {
    "whole": Wrong(content="lost"),
    "streamed": Wrong(streamed=Cuts(), content="lost"),
    "raises": Wrong(streamed=Cuts(), raises="IndexError"),
    "hangs": Wrong(hangs=True),
}


def run(how: str, wrong: Wrong, suites: LoadedSuites, line: str = LINE) -> BacktestResult:
    return backtests.run(entry(wrong, line), suites, Releases(Pool(how)))


@pytest.mark.parametrize("how", WRONG)
def test_a_fault_is_detected(both: LoadedSuites, how: str) -> None:
    found = run(how, WRONG[how], both)
    assert found.state == "detected", found.proof
    assert found.proof[0] == f"{BAD}: toy_engine.py lacks the line `{LINE}`"
    assert found.proof[-1] == f'{GOOD} answers {{"content":"hello","tool_calls":[]}}'


@pytest.mark.parametrize(
    ("how", "wrong", "line", "lacking"),
    [
        ("", WRONG["whole"], LINE, r'toy@0\.9 answers .*"hello".* and not .*"lost"'),
        ("whole", Wrong(content="lots"), LINE, r'toy@0\.9 answers .*"lost".* and not .*"lots"'),
        ("raises", WRONG["streamed"], LINE, r"toy@0\.9 answers with IndexError, and not"),
        (
            "streamed",
            Wrong(content="hello"),
            "no such line",
            r"toy@1\.0: .* lacks the line .*, the fix",
        ),
        ("whole", WRONG["whole"], "VERSION = '1.1'", r"toy@0\.9: .* has the line .*, the fix"),
    ],
)
def test_what_is_no_detection(both: LoadedSuites, how: str, wrong: Wrong, line: str, lacking: str) -> None:
    found = run(how, wrong, both, line)
    assert found.state == "missed"
    assert re.search(lacking, found.proof[-1]), found.proof


def test_a_case_that_does_not_fail_is_no_detection(both: LoadedSuites) -> None:
    found = run("", Wrong(content="hello"), both)
    assert (found.state, found.proof[-1]) == ("missed", f"{BAD} does not fail the case")


def test_an_absent_release_is_not_reachable(overlaid: Place, suites: Suites) -> None:
    found = run("whole", WRONG["whole"], load_suites([suites.write("hello")]))
    assert found.state == "not reachable"
    assert f"conformance targets install {BAD}" in found.proof[0]


def test_an_import_error_is_not_reachable(overlaid: Place, suites: Suites) -> None:
    environments.install(BAD)
    # The adapters of this made-up engine do not exist, so its worker cannot start.
    found = backtests.run(entry(WRONG["whole"]), load_suites([suites.write("hello")]), Releases())
    assert found.state == "not reachable"
    assert "it does not start here" in found.proof[0]
    assert "ModuleNotFoundError" in found.proof[0]


# ------------------------------------------------------------------------------------------- the table


def test_the_table_names_cases_that_cite_the_fault() -> None:
    cases = {loaded.address: loaded for loaded in load_suites().cases}
    for each in TABLE.backtests:
        case = cases[each.case].case
        assert isinstance(case, ParserCase)
        assert each.id in case.source, f"{each.case} does not cite {each.id}"


def test_the_table_names_releases_that_are_locked() -> None:
    for each in TABLE.backtests:
        known = registry.releases(each.target)
        assert {f"{each.target}@{each.last_bad}", f"{each.target}@{each.first_good}"} <= set(known)


def test_the_wrong_answer_is_not_the_right_one() -> None:
    cases = {loaded.address: loaded.case for loaded in load_suites().cases}
    for each in TABLE.backtests:
        case = cases[each.case]
        assert isinstance(case, ParserCase)
        expect = case.expect
        if expect is None or each.wrong.raises or each.wrong.hangs:
            continue
        given = (each.wrong.reasoning, each.wrong.content, [c.name for c in each.wrong.tool_calls])
        right = (expect.reasoning, expect.content, [c.name for c in expect.tool_calls])
        assert given != right or each.wrong.tool_calls, each.id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backtests: [{id: T99}]\n", r"backtests\[0\]|backtests\.0|backtests"),
        ("backtests: []\nmore: 1\n", "more"),
        (
            "backtests: []\nnot_reachable: [{ids: [T01, T01], reason: It needs a server and a model.}]\n",
            "T01",
        ),
    ],
)
def test_a_broken_table(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(SuiteError, match=message):
        backtests.load(path)


def test_wrong_answers_that_contradict_themselves() -> None:
    for bad in ({"content": "x", "hangs": True}, {"raises": "E", "hangs": True}):
        with pytest.raises(ValueError, match="not several of them"):
            Wrong.model_validate(bad)


def test_releases_in_order() -> None:
    with pytest.raises(ValueError, match="no release before"):
        Backtest.model_validate(entry(WRONG["whole"]).model_dump() | {"last_bad": "1.0"})


def test_choosing() -> None:
    assert backtests.choose(TABLE, ()) == TABLE.backtests
    first = TABLE.backtests[0]
    assert backtests.choose(TABLE, [first.id, first.id]) == (first,)
    with pytest.raises(UsageError, match="'Q99' has no backtest"):
        backtests.choose(TABLE, ["Q99"])
    unreached = TABLE.not_reachable[0]
    with pytest.raises(UsageError, match=f"{unreached.ids[0]} has no backtest: "):
        backtests.choose(TABLE, [unreached.ids[0]])


def test_command_line(run_conformance: Run, tmp_path: Path) -> None:
    first = TABLE.backtests[0]
    done = run_conformance("backtest", first.id, env={"CONFORMANCE_HOME": str(tmp_path / "home")})
    assert done.returncode == 3, done.stderr
    assert f"{first.id} not reachable" in done.stdout
    assert f"conformance targets install {first.target}@{first.last_bad}" in done.stdout
    assert run_conformance("backtest", "Q99").returncode == 2


# --------------------------------------------------------------------------------------- real releases


@pytest.fixture(scope="module")
def real() -> Iterator[Releases]:
    releases = Releases()
    yield releases
    releases.close()


@pytest.mark.parametrize("each", TABLE.backtests, ids=lambda each: each.id)
def test_the_fault_is_found_in_its_release(each: Backtest, real: Releases) -> None:
    found = backtests.run(each, load_suites(), real)
    if found.state == "not reachable" and "is not installed" in " ".join(found.proof):
        pytest.skip(found.proof[0])
    assert found.state == "detected", found.proof
