"""Backtests: the committed table, and how a fault is told from what only looks like one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance import backtests
from conformance.backtests import Backtest, BacktestResult, Cuts, Source, Table, Wrong
from conformance.errors import SuiteError, TargetTimeoutError, UsageError
from conformance.history import Asked, Releases
from conformance.loading import LoadedCase, LoadedSuites, load_suites
from conformance.results import Verdict
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

pytestmark = pytest.mark.xdist_group("backtest")  # its fixtures take long: one process makes them

TABLE = backtests.load()
BAD, GOOD = "toy@0.9", SPEC
LINE = "VERSION = '1.0'"


class Toy:
    """Loses the last word at 0.9: whole, streamed, by an exception or by silence.

    The silence is that of a fault (`hangs`), of a slow machine (`hangs once`) or of a dead engine (`dead`).
    """

    def __init__(self, spec: str, how: str) -> None:
        self.spec = spec
        self.how = how if spec == BAD else ""
        self.asked = 0

    def describe(self) -> TargetInfo:
        return TargetInfo(name="toy", version="1.0", capabilities=("parse", "parse_stream"))

    def parse(self, request: ParseRequest) -> ParseResult:
        if request.output == "hello":
            self.asked += 1
        self.how = "" if self.how == "once" and self.asked > 1 else self.how
        silent = {"dead": True, "hangs": self.asked > 0, "hangs once": self.asked == 1}
        if silent.get(self.how) and (self.how == "dead" or request.output == "hello"):
            raise TargetTimeoutError("too late")
        lost = self.how in ("whole", "not streamed", "once")
        return ParseResult(content="lost" if lost else request.output)

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
        self.toys: dict[str, Toy] = {}

    def get(self, spec: str) -> OpenTarget:
        toy = self.toys.setdefault(spec, Toy(spec, self.how))
        return OpenTarget(toy, toy.describe())  # type: ignore[arg-type]


def entry(wrong: Wrong, line: str = LINE, **more: Any) -> Backtest:
    return Backtest(
        id="T99",
        title="The last word is lost.",
        case="parser/demo::case-hello",
        target="toy",
        last_bad="0.9",
        first_good="1.0",
        wrong=wrong,
        fix=Source(file="toy_engine.py", line=line),
        **more,
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


def run(how: str, wrong: Wrong, suites: LoadedSuites, line: str = LINE, **more: Any) -> BacktestResult:
    return backtests.run(entry(wrong, line, **more), suites, Releases(Pool(how)))


@pytest.mark.parametrize("how", WRONG)
def test_a_fault_is_detected(both: LoadedSuites, how: str) -> None:
    found = run(how, WRONG[how], both)
    assert found.state == "detected", found.proof
    assert found.proof[0] == f"{BAD}: toy_engine.py lacks the line `{LINE}`"
    assert f'{GOOD} answers {{"content":"hello","tool_calls":[]}}' in found.proof
    assert found.proof[-1] == f"{GOOD}: verdict pass over all sampled streams"


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
        ("hangs once", WRONG["hangs"], LINE, r"toy@0\.9 answers .*hello.*, and not nothing before its time"),
        ("dead", WRONG["hangs"], LINE, r"toy@0\.9 answers nothing at all, not even to the output"),
    ],
)
def test_what_is_no_detection(both: LoadedSuites, how: str, wrong: Wrong, line: str, lacking: str) -> None:
    found = run(how, wrong, both, line)
    assert found.state == "missed"
    assert re.search(lacking, found.proof[-1]), found.proof


def test_the_right_answer_is_no_detection(both: LoadedSuites) -> None:
    """Though the release breaks a rule elsewhere: on the whole output, where the right answer is streamed."""
    found = run("not streamed", Wrong(streamed=Cuts(), content="hello"), both)
    assert found.state == "missed"
    assert found.proof[-1].endswith(", and that is the right answer")


def test_an_answer_that_breaks_no_rule_is_no_detection(both: LoadedSuites) -> None:
    found = run("once", Wrong(content="lost"), both)
    assert (found.state, found.proof[-1]) == ("missed", f"{BAD} breaks no rule of the case on it")


def test_the_faults_own_line_is_looked_for_the_other_way_round(both: LoadedSuites) -> None:
    fault = Source(file="toy_engine.py", line="VERSION = '1.1'")
    found = run("whole", WRONG["whole"], both, fault=fault)
    assert found.state == "detected", found.proof
    assert found.proof[2:4] == (
        f"{GOOD}: toy_engine.py lacks the line `VERSION = '1.1'`",
        f"{BAD}: toy_engine.py has the line `VERSION = '1.1'`",
    )
    found = run("whole", WRONG["whole"], both, fault=Source(file="toy_engine.py", line=LINE))
    assert found.state == "missed"
    assert found.proof[-1] == f"{GOOD}: toy_engine.py has the line `{LINE}`, the fault"
    gone = Source(file="toy_gone.py", line="VERSION = '1.1'")
    found = run("whole", WRONG["whole"], both, fault=gone)
    assert found.state == "missed"
    assert found.proof[-1] == (
        f"{BAD}: has no such file: toy_gone.py, for the line `VERSION = '1.1'`, the fault"
    )


def test_a_file_that_the_bad_release_lacks_proves_nothing(both: LoadedSuites) -> None:
    package = environments.status(GOOD).path.glob("lib/python*/site-packages")
    (next(package) / "toy_new.py").write_text("def mended() -> None: ...\n")
    fix = Source(file="toy_new.py", line="def mended() -> None: ...")
    assert backtests.source_lines(BAD, fix.file) is None
    assert backtests.source_lines(GOOD, fix.file) == {fix.line: 1}
    one = entry(WRONG["whole"]).model_copy(update={"fix": fix})
    found = backtests.run(one, both, Releases(Pool("whole")))
    assert found.state == "missed"
    assert found.proof[0] == f"{BAD}: has no such file: toy_new.py, for the line `{fix.line}`"
    assert "add a `fault` to T99 in table.yaml: the line of toy@0.9 that is at fault" in found.proof[-1]
    proven = one.model_copy(update={"fault": Source(file="toy_engine.py", line="VERSION = '1.1'")})
    assert backtests.run(proven, both, Releases(Pool("whole"))).state == "detected"


@pytest.mark.parametrize("verdict", ["error", "inconclusive"])
def test_no_verdict_is_no_failure(
    both: LoadedSuites, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    """The rest of the evidence is complete, and then the whole case cannot be judged."""
    for spec, lacking in (
        (BAD, f"{BAD} does not fail the case"),
        (GOOD, f"{GOOD} comes to no verdict: out of memory"),
    ):
        releases = Releases(Pool("whole"))
        ask = releases.ask

        def broken(
            loaded: LoadedCase,
            asked: str,
            spec: str = spec,
            ask: Callable[[LoadedCase, str], Asked] = ask,
        ) -> Asked:
            result = ask(loaded, asked).result
            changed = {"verdict": verdict, "reason": "out of memory"} if asked == spec else {}
            return Asked(result.model_copy(update=changed), stored=False)

        monkeypatch.setattr(releases, "ask", broken)
        found = backtests.run(entry(WRONG["whole"], remains="All of it."), both, releases)
        assert (found.state, found.proof[-1]) == ("missed", lacking)


class StillWrong(Toy):
    """Its good release loses the last word too, where the output is streamed in several chunks."""

    def parse_stream(self, request: StreamRequest) -> list[StreamResult]:
        if self.how:
            return super().parse_stream(request)
        texts = ["lost" if chunking.cuts else request.request.output for chunking in request.chunkings]
        return [StreamResult(deltas=(Delta(content=text),)) for text in texts]


class StillWrongPool(Pool):
    def get(self, spec: str) -> OpenTarget:
        toy = StillWrong(spec, self.how)
        return OpenTarget(toy, toy.describe())  # type: ignore[arg-type]


def test_a_good_release_that_fails_in_other_streams(overlaid: Place, suites: Suites) -> None:
    environments.install(BAD)
    loaded = load_suites([suites.write("hello-there-you")])
    one = entry(WRONG["streamed"]).model_copy(update={"case": loaded.cases[0].address})
    found = backtests.run(one, loaded, Releases(StillWrongPool("streamed")))
    assert found.state == "missed"
    assert found.proof[-1] == (
        f"{GOOD} fails the case in other streams, and the table does not say by which other fault"
    )
    known = one.model_copy(update={"besides": ("T98",)})
    found = backtests.run(known, loaded, Releases(StillWrongPool("streamed")))
    assert found.state == "missed"
    assert "verdict fail over all sampled streams (rules broken: stream-equals-whole)" in found.proof[-2]
    assert found.proof[-1].endswith("that it still has T98 is not proven: it was not looked for")
    later = entry(WRONG["streamed"]).model_copy(update={"id": "T98", "last_bad": "1.0", "first_good": "2.0"})
    earlier = later.model_copy(update={"last_bad": "0.8", "first_good": "0.9"})
    for other, state, last in (
        (later, "detected", f"{GOOD} still has T98, which other backtests prove"),
        (later, "missed", "that it still has T98 is not proven: missed"),
        (later, "not reachable", "that it still has T98 is not proven: not reachable"),
        (earlier, "detected", "that it still has T98 is not proven: it was not looked for"),
    ):
        others = {other: found.model_copy(update={"id": "T98", "state": state})}
        again = backtests.run(known, loaded, Releases(StillWrongPool("streamed")), others)
        assert again.state == ("detected" if last.startswith(GOOD) else "missed")
        assert again.proof[-1].endswith(last)
    partly = one.model_copy(update={"remains": "Streams of several chunks."})
    found = backtests.run(partly, loaded, Releases(StillWrongPool("streamed")))
    assert (found.state, found.proof[-1]) == (
        "detected",
        f"in {GOOD} this is left of it: Streams of several chunks.",
    )
    cut = one.model_copy(update={"wrong": Wrong(streamed=Cuts(cuts=(1,)), content="lost")})
    found = backtests.run(cut, loaded, Releases(StillWrongPool("streamed")))
    assert (found.state, found.proof[-1]) == ("missed", f"{GOOD} does not answer as the case expects")


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
    cases = {loaded.address: loaded for loaded in load_suites().cases}
    for each in TABLE.backtests:
        assert not backtests.is_expected(each.wrong, cases[each.case]), each.id


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


def test_other_faults_must_be_proved_and_still_there() -> None:
    first = entry(WRONG["whole"], besides=("T98",)).model_dump()
    later = entry(WRONG["whole"]).model_dump() | {"id": "T98", "last_bad": "1.0", "first_good": "2.0"}
    assert Table.model_validate({"backtests": (first, later)})
    for wrong, message in (
        ((first,), "names T98, which is no other backtest of toy"),
        ((first, later | {"target": "other"}), "names T98, which is no other backtest of toy"),
        ((first, later | {"last_bad": "0.8"}), r"names T98, which is mended in 1\.0 already"),
        ((first | {"besides": ("T99",)}, later), "names T99, which is no other backtest of toy"),
    ):
        with pytest.raises(ValueError, match=message):
            Table.model_validate({"backtests": wrong})


def test_what_an_entry_rests_on_is_looked_for_too(both: LoadedSuites) -> None:
    one = entry(WRONG["whole"], besides=("T98",))
    more = {"last_bad": "1.0", "first_good": "2.0"}
    resting = entry(WRONG["whole"]).model_copy(update=more | {"id": "T98", "besides": ("T97",)})
    last = entry(WRONG["whole"]).model_copy(update={"id": "T97", "last_bad": "2.0", "first_good": "3.0"})
    former = entry(WRONG["whole"]).model_copy(update={"id": "T98", "last_bad": "0.8", "first_good": "0.9"})
    other = entry(WRONG["whole"]).model_copy(update={"id": "T96"})
    table = Table(backtests=(former, one, other, resting, last))
    assert backtests.with_besides(table, (one,)) == (one, resting, last)
    assert backtests.with_besides(table, (other,)) == (other,)
    whole = Table(backtests=(other, one.model_copy(update={"besides": ()})))
    seen: list[BacktestResult] = []
    found = backtests.run_all(whole.backtests, whole, both, Releases(Pool("whole")), seen.append)
    assert [(each.id, each.state) for each in found] == [("T96", "detected"), ("T99", "detected")]
    assert sorted(seen, key=lambda each: each.id) == list(found)


def test_what_rests_on_a_missed_one_is_missed(
    overlaid: Place, suites: Suites, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments.install(BAD)
    loaded = load_suites([suites.write("hello-there-you")])
    case = {"case": loaded.cases[0].address}
    one = entry(WRONG["streamed"], besides=("T98",)).model_copy(update=case)
    later = entry(WRONG["streamed"]).model_copy(
        update=case | {"id": "T98", "last_bad": "1.0", "first_good": "2.0"}
    )
    table = Table(backtests=(one, later))
    releases = Releases(StillWrongPool("streamed"))
    unusable = releases.unusable
    monkeypatch.setattr(
        releases, "unusable", lambda spec, cases=(): "" if spec == "toy@2.0" else unusable(spec, cases)
    )
    missed = backtests.run_all((one,), table, loaded, releases)
    assert [(each.id, each.state) for each in missed] == [("T99", "missed"), ("T98", "missed")]
    assert missed[0].proof[-1].endswith("that it still has T98 is not proven: missed")


def test_a_fault_that_was_mended_in_steps_has_several_entries() -> None:
    first = entry(WRONG["whole"]).model_dump()
    later = first | {"last_bad": "1.1", "first_good": "1.2"}
    table = Table.model_validate({"backtests": (first | {"besides": ("T99",)}, later)})
    assert backtests.choose(table, ["T99"]) == table.backtests
    unreached = {"ids": ("T99",), "reason": "It needs a server and a model."}
    for wrong in ({"backtests": (first, first)}, {"backtests": (first,), "not_reachable": (unreached,)}):
        with pytest.raises(ValueError, match="named twice: T99"):
            Table.model_validate(wrong)


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

IN_TESTS = {entry.id: entry for entry in TABLE.backtests if entry.id in ("R05", "R16", "R25", "R28")}
"""Few, on one pair of releases, since each release takes seconds to start; all: `conformance backtest`."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    releases = Releases(folder=tmp_path_factory.mktemp("ladder"))
    yield releases
    releases.close()


def test_few_releases_are_started_here() -> None:
    assert len(IN_TESTS) == 4
    assert len({(each.target, each.last_bad, each.first_good) for each in IN_TESTS.values()}) == 1
    assert backtests.with_besides(TABLE, tuple(IN_TESTS.values())) == tuple(IN_TESTS.values())


@pytest.mark.parametrize("each", IN_TESTS.values(), ids=IN_TESTS)
def test_the_fault_is_found_in_its_release(each: Backtest, real: Releases) -> None:
    found = backtests.run(each, load_suites(), real)
    if found.state == "not reachable" and "is not installed" in " ".join(found.proof):
        pytest.skip(found.proof[0])
    assert found.state == "detected", found.proof
