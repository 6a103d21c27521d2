"""The release ladder and its bisection, over releases that are made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance import history, runfile
from conformance.commands import ladder as ladder_command
from conformance.errors import TargetError
from conformance.history import Cell, Ladder, LadderRow, Releases, Rung, bisect, climb
from conformance.loading import LoadedCase, load_suites
from conformance.results import Problem, Result, Verdict
from conformance.runner import OpenTarget, TargetPool
from conformance.targets import environments, registry
from conformance.targets.protocol import Chunking, ParseRequest, ParseResult, TargetInfo
from tests.conftest import Run, Suites

VERSIONS = tuple(f"{k}.0" for k in range(1, 10))


class Toy:
    """Answers rightly at the versions that are good for an output."""

    def __init__(self, spec: str, good: Callable[[str, int], bool], log: list[tuple[str, str]]) -> None:
        self.spec = spec
        self._good = good
        self._log = log
        self._major = int(spec.partition("@")[2].partition(".")[0])

    def describe(self) -> TargetInfo:
        return TargetInfo(name="toy", version=f"{self._major}.0", capabilities=("parse",))

    def parse(self, request: ParseRequest) -> ParseResult:
        self._log.append((self.spec, request.output))
        if self._good(request.output, self._major):
            return ParseResult(content=request.output)
        return ParseResult(content="wrong\u2028\x85and long")  # with what some take for ends of lines

    def close(self) -> None:
        pass


class Pool(TargetPool):
    """Opens toys."""

    def __init__(self, good: Callable[[str, int], bool]) -> None:
        super().__init__()
        self.log: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self._good = good

    def get(self, spec: str) -> OpenTarget:
        if spec in self.broken:
            raise TargetError("ImportError: no module named gguf")
        toy = Toy(spec, self._good, self.log)
        return OpenTarget(toy, toy.describe())  # type: ignore[arg-type]


@pytest.fixture
def releases_of_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Lock files for nine releases; the set names those that are not installed."""
    folder = tmp_path / "locks"
    folder.mkdir()
    for version in VERSIONS:
        (folder / f"toy-{version}.txt").write_text(f"toy=={version}\n")
    monkeypatch.setattr(environments, "LOCKS", folder)
    monkeypatch.setenv("CONFORMANCE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(registry, "_ENGINES", {"toy": registry.Engine("toy", "A toy.")})
    absent: set[str] = set()
    monkeypatch.setattr(registry, "unavailable", lambda spec: "not installed" if spec in absent else "")
    return absent


def cases_of(suites: Suites, *outputs: str) -> tuple[LoadedCase, ...]:
    return load_suites([suites.write(*outputs)]).cases


# ------------------------------------------------------------------------------------------------ ladder


def good(output: str, major: int) -> bool:
    return {"always": True, "never": False, "mended": major >= 4, "broken": major < 7}[output]


def test_a_ladder(releases_of_toy: set[str], suites: Suites) -> None:
    releases_of_toy |= {"toy@2.0"}
    pool = Pool(good)
    pool.broken = {"toy@3.0"}
    lines: list[str] = []
    ladder = climb(
        "toy",
        cases_of(suites, "always", "never", "mended", "broken"),
        Releases(pool),
        known=lambda loaded, version: loaded.case.id == "case-never" and version == "9.0",
        progress=lines.append,
    )
    reasons = {rung.version: rung.reason for rung in ladder.releases}
    assert tuple(reasons) == VERSIONS
    assert reasons["2.0"] == "not installed"
    assert reasons["3.0"] == "it does not start here: ImportError: no module named gguf"
    assert not any(reasons[version] for version in VERSIONS if version not in ("2.0", "3.0"))
    rows = {row.case.partition("::")[2]: row for row in ladder.rows}
    verdicts = {name: "".join(cell.verdict[0] for cell in row.cells.values()) for name, row in rows.items()}
    assert verdicts == {
        "case-always": "ppppppp",
        "case-never": "fffffff",
        "case-mended": "fpppppp",
        "case-broken": "ppppfff",
    }
    assert [name for name, row in rows.items() if row.changes] == ["case-mended", "case-broken"]
    assert rows["case-mended"].cells["toy@1.0"].rules == ("expected",)
    known = {spec for spec, cell in rows["case-never"].cells.items() if cell.known}
    assert known == {"toy@9.0"}
    assert "toy@1.0: 4 cases, 4 of them run now; 2 fail" in lines


@pytest.mark.parametrize(
    ("verdict", "chunkings", "whole"),
    [
        ("pass", [], True),
        ("fail", [Chunking(name="one chunk")], True),
        ("fail", [None, Chunking(name="one chunk")], False),
        ("timeout", [], None),
        ("skip", [], None),
    ],
)
def test_failures_in_streams_only_are_told_apart(
    verdict: Verdict, chunkings: list[Chunking | None], whole: bool | None
) -> None:
    problems = tuple(Problem(rule="marker-leak", message="leak", chunking=chunking) for chunking in chunkings)
    result = Result.model_construct(verdict=verdict, problems=problems, reason="")
    assert history._cell(result, known=False).whole is whole


def test_nothing_is_asked_twice(releases_of_toy: set[str], suites: Suites) -> None:
    cases = cases_of(suites, "always", "mended")
    first, second = Pool(good), Pool(good)
    ladder = climb("toy", cases, Releases(first))
    assert len(first.log) == 2 * len(VERSIONS)
    second.broken = {f"toy@{version}" for version in VERSIONS}
    assert climb("toy", cases, Releases(second)) == ladder, "no release is even started"
    assert second.log == []


def test_what_changed_is_asked_again(
    releases_of_toy: set[str], suites: Suites, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = cases_of(suites, "always")
    climb("toy", cases, Releases(Pool(good)))

    def asked(cases: tuple[LoadedCase, ...]) -> int:
        pool = Pool(good)
        climb("toy", cases, Releases(pool))
        return len(pool.log)

    changed = cases_of(suites, "always", "never")
    assert asked(changed) == 2 * len(VERSIONS), "the suite's file is another"
    assert asked(changed) == 0
    (environments.LOCKS / "toy-5.0.txt").write_text("toy==5.0\nhelper==1\n")
    assert asked(changed) == 2, "one release is another"
    (environments.LOCKS / "toy-10.0.txt").write_text("toy==10.0\n")
    assert asked(changed) == 2, "one release is new"
    overlay = "# overlay-of: toy@4.0\n# adapter: {}\n\ntoy==6.0\n"
    for adapter in ("one", "other"):
        (environments.LOCKS / "toy-6.0.txt").write_text(overlay.format(adapter))
        assert asked(changed) == 2, "one release is driven by another adapter"
    for pin in ("1", "2"):
        (environments.LOCKS / "toy-7.0.txt").write_text(f"toy==7.0\n\n# part: extra\nextra=={pin}\n")
        (part,) = environments.find_lock("toy@7.0").parts
        folder = environments.status("toy@7.0").path / "parts" / part.name
        folder.mkdir(parents=True, exist_ok=True)
        stamp = {"digest": part.digest, "megabytes": 1, "seconds": 1}
        (folder / "conformance-environment.json").write_text(json.dumps(stamp))
        assert environments.status("toy@7.0").parts == ("extra",)
        assert asked(changed) == 2, "one release has a part of another version"
    assert asked(changed) == 0
    monkeypatch.setattr(runfile, "harness_digest", lambda without: "other")
    assert asked(changed) == 2 * (len(VERSIONS) + 1), "the harness is another"


def test_errors_and_torn_lines_are_not_kept(releases_of_toy: set[str], suites: Suites) -> None:
    def raises(output: str, major: int) -> bool:
        raise RuntimeError("boom")

    (case,) = cases_of(suites, "always")
    broken = Releases(Pool(raises))
    assert broken.ask(case, "toy@1.0").result.verdict == "error"
    assert broken.stored(case, "toy@1.0") is None
    sound = Releases(Pool(good))
    assert not sound.ask(case, "toy@1.0").stored
    (kept,) = (environments.home() / "ladder" / "toy@1.0").iterdir()
    kept.write_bytes(kept.read_bytes()[:-20])
    assert Releases(Pool(good)).stored(case, "toy@1.0") is None
    kept.write_bytes(kept.read_bytes() + "é".encode()[:1])
    assert Releases(Pool(good)).stored(case, "toy@1.0") is None
    assert not Releases(Pool(good)).ask(case, "toy@1.0").stored
    assert Releases(Pool(good)).stored(case, "toy@1.0") is not None, "it does not stand behind the torn line"


# ------------------------------------------------------------------------------------------------ bisect


@pytest.mark.parametrize("change", range(2, 10))
@pytest.mark.parametrize("mends", [True, False])
def test_bisect_finds_every_change_in_few_runs(
    releases_of_toy: set[str], suites: Suites, change: int, mends: bool
) -> None:
    pool = Pool(lambda output, major: (major >= change) == mends)
    (case,) = cases_of(suites, "any")
    found = bisect("toy", case, Releases(pool))
    assert (found.before, found.after) == (f"toy@{change - 1}.0", f"toy@{change}.0")
    assert found.kind == ("mended" if mends else "broke")
    assert found.monotonic
    assert len(pool.log) <= 5, "two ends, and three halvings of what is between"


def test_bisect_passes_over_what_cannot_be_asked(releases_of_toy: set[str], suites: Suites) -> None:
    releases_of_toy |= {"toy@1.0", "toy@5.0", "toy@9.0"}
    pool = Pool(lambda output, major: major >= 6)
    pool.broken = {"toy@4.0"}
    (case,) = cases_of(suites, "any")
    found = bisect("toy", case, Releases(pool))
    assert (found.before, found.after) == ("toy@3.0", "toy@6.0")
    reasons = {rung.spec: rung.reason for rung in found.unusable}
    assert reasons["toy@5.0"] == "not installed"
    assert "does not start" in reasons["toy@4.0"]


def test_bisect_of_one_rule(releases_of_toy: set[str], suites: Suites) -> None:
    """A case that fails on every release, by rules that come and go."""

    def rules(output: str, major: int) -> bool:
        return major >= 4

    (case,) = cases_of(suites, "any")
    found = bisect("toy", case, Releases(Pool(rules)), "expected")
    assert (found.rule, found.kind, found.before, found.after) == ("expected", "mended", "toy@3.0", "toy@4.0")
    assert [(seen.spec, seen.good) for seen in found.seen] == sorted(
        (seen.spec, seen.spec >= "toy@4.0") for seen in found.seen
    )
    other = bisect("toy", case, Releases(Pool(rules)), "marker-leak")
    assert other.kind == "none", "no release breaks it"
    assert all(seen.good for seen in other.seen)


def test_an_error_is_neither_good_nor_bad() -> None:
    result = Result.model_construct(verdict="error", problems=())
    assert history._is_good(result, None) is None
    assert history._is_good(result, "expected") is None


def test_bisect_passes_over_an_error(releases_of_toy: set[str], suites: Suites) -> None:
    def rules(output: str, major: int) -> bool:
        if major == 9:
            raise RuntimeError("out of memory")
        return major < 5

    (case,) = cases_of(suites, "any")
    found = bisect("toy", case, Releases(Pool(rules)))
    assert (found.before, found.after, found.kind) == ("toy@4.0", "toy@5.0", "broke")
    (left_out,) = found.unusable
    assert (left_out.spec, "its verdict is error" in left_out.reason) == ("toy@9.0", True)
    lines: list[str] = []
    climb("toy", [case], Releases(Pool(rules)), specs=["toy@9.0"], progress=lines.append)
    assert lines == ["toy@9.0: 1 cases, 1 of them run now; 0 fail, 1 come to no verdict (error)"]


def test_a_timeout_says_nothing_about_a_rule() -> None:
    result = Result.model_construct(verdict="timeout", problems=())
    assert history._is_good(result, None) is False
    assert history._is_good(result, "expected") is None


def test_bisect_of_a_case_that_does_not_change(releases_of_toy: set[str], suites: Suites) -> None:
    pool = Pool(good)
    (case,) = cases_of(suites, "always")
    found = bisect("toy", case, Releases(pool))
    assert (found.kind, found.before, found.after, found.monotonic) == ("none", None, None, True)
    assert [spec for spec, _ in pool.log] == ["toy@1.0", "toy@9.0"]


def test_bisect_says_when_the_verdicts_are_not_monotonic(releases_of_toy: set[str], suites: Suites) -> None:
    def twice(output: str, major: int) -> bool:
        return major in (1, 2, 3, 7)

    cases = cases_of(suites, "any")
    assert bisect("toy", cases[0], Releases(Pool(twice))).monotonic, "it saw one change only"
    climb("toy", cases, Releases(Pool(twice)))
    pool = Pool(twice)
    found = bisect("toy", cases[0], Releases(pool))
    assert pool.log == []
    assert not found.monotonic
    assert (found.kind, found.before, found.after) == ("broke", "toy@7.0", "toy@8.0")
    assert all(seen.stored for seen in found.seen)


def test_bisect_without_any_release(releases_of_toy: set[str], suites: Suites) -> None:
    releases_of_toy |= {f"toy@{version}" for version in VERSIONS}
    (case,) = cases_of(suites, "any")
    found = bisect("toy", case, Releases(Pool(good)))
    assert (found.kind, found.seen) == ("none", ())
    assert len(found.unusable) == len(VERSIONS)


def test_a_skip_is_neither_good_nor_bad() -> None:
    assert not {"skip", "inconclusive", "error", "xpass", "xfail"} & {*history.GOOD, *history.BAD}


# ------------------------------------------------------------------------------------------ command line


def test_the_terminal_names_changes(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts: dict[str, list[tuple[Verdict, bool | None, bool]]] = {
        "parser/demo::mended": [("fail", False, False), ("fail", True, True), ("pass", True, False)],
        "parser/demo::steady": [("fail", False, False)] * 3,
    }
    rungs = tuple(Rung(spec=f"toy@{k}.0", version=f"{k}.0") for k in (1, 2, 3))
    ladder = Ladder(
        target="toy",
        sources="",
        releases=rungs,
        rows=tuple(
            LadderRow(
                case=case,
                source=(),
                cells={
                    rung.spec: Cell(verdict=verdict, whole=whole, known=known)
                    for rung, (verdict, whole, known) in zip(rungs, row, strict=True)
                },
            )
            for case, row in verdicts.items()
        ),
    )
    ladder_command._print(ladder, Path("ladder.json"))
    shown = capsys.readouterr().out
    assert re.search(r"parser/demo::mended +│ Fs\. +│ mended in 3\.0", shown)
    assert "releases: 1.0 2.0 3.0" in shown
    assert "parser/demo::steady" not in shown
    assert "cases that differ: 1; that do not: 1, of which 0 pass on every release" in shown


def test_ladder_without_any_release(run_conformance: Run, tmp_path: Path) -> None:
    home = {"CONFORMANCE_HOME": str(tmp_path / "home")}
    done = run_conformance("ladder", "parser/typing", "--target", "vllm", env=home)
    assert done.returncode == 2
    assert "no release of vllm can be asked; install some, or give --install" in done.stderr
    assert "conformance targets install vllm@0.32.0" in done.stderr
    done = run_conformance("ladder", "--target", "reference", env=home)
    assert (done.returncode, "'reference' is no target with versions" in done.stderr) == (2, True)


def test_bisect_without_any_release_on_the_command_line(run_conformance: Run, tmp_path: Path) -> None:
    home = {"CONFORMANCE_HOME": str(tmp_path / "home")}
    done = run_conformance("bisect", "parser/typing::*", "--target", "vllm", env=home)
    assert done.returncode == 2
    assert "name one as suite-id::case-id" in done.stderr
