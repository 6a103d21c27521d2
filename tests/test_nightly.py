"""A night: its steps, what is tolerated, and the text that says what broke and since when."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conformance import matrix as matrices
from conformance import runfile
from conformance.cli import invoke
from conformance.comparison import Compared, Comparison, Since
from conformance.errors import UsageError
from conformance.execute import Ended, Job
from conformance.faults import record, registry
from conformance.faults.record import FaultsFile
from conformance.history import Cell, Ladder, LadderRow, Rung
from conformance.nightly import plan as plans
from conformance.nightly import run as nights
from conformance.nightly.plan import Night, sample, steps, trial_steps
from conformance.nightly.run import NightResult, NotRun, StepResult
from conformance.nightly.text import told
from conformance.results import Verdict
from conformance.store.history import Store
from conformance.targets import registry as targets
from tests import run_fixtures as fixtures
from tests.conftest import Run as Command
from tests.conftest import Suites
from tests.test_cli import HONEST, validated
from tests.test_fault_records import QUICK, catch, outcome

DAY = dt.date(2026, 11, 22)
LONG = frozenset(
    {
        "ladder",
        "backtests",
        "matrix",
        "faults-check",
        "faults-sample",
        "gates-check",
        "trials-check",
        "checkpoints-check",
    }
)
"""Steps that a test of the others leaves out."""
PAIR = ("vllm@0.23.0", "vllm@0.24.0")


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(
        folder=tmp_path / "night",
        database=f"sqlite:///{tmp_path}/h.sqlite",
        record=tmp_path / "faults.json",
        cases=QUICK,
        today=DAY,
    )


def by_name(night: Night) -> dict[str, plans.Step]:
    return {step.name: step for step in (*steps(night), *trial_steps(night))}


# ------------------------------------------------------------------------------------------- the plan


def test_the_steps_are_commands_that_can_be_repeated(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "unavailable", lambda spec: "")
    found = by_name(replace(night, workers=4, targets=("reference",)))
    assert list(found) == [
        "suites", "matrix", "ladder-vllm", "ladder-sglang-parsers", "ladder-transformers", "backtests",
        "faults-check", "faults-sample", "gates-check", "trials-check", "checkpoints-check", "clean", "kill",
    ]  # fmt: skip
    suites = found["suites"].arguments
    assert suites[:4] == ("run", *QUICK, "--quick")
    assert suites[-2:] == ("--out", str(night.suites_file))
    assert found["ladder-vllm"].arguments[:9] == (
        "ladder", *QUICK, "--target", "vllm", "--release", "0.31.0", "--release", "0.32.0",
    )  # fmt: skip
    assert "--tier" in found["matrix"].arguments
    assert "-n" in found["faults-sample"].arguments


def test_cells_take_turns(night: Night) -> None:
    assert "--shard" not in by_name(night)["matrix"].arguments
    shares = []
    for days in range(4):
        wanted = replace(night, spread=3, today=DAY + dt.timedelta(days))
        arguments = by_name(wanted)["matrix"].arguments
        shares.append(arguments[arguments.index("--shard") + 1])
    assert sorted(shares[:3]) == ["1/3", "2/3", "3/3"]
    assert shares[3] == shares[0]


def test_a_missing_release_is_a_reason_and_only_the_newest_counts(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "unavailable", lambda spec: "is not installed" if "vllm" in spec else "")
    assert by_name(night)["ladder-vllm"].reason == "vllm@0.32.0: is not installed"
    monkeypatch.setattr(targets, "unavailable", lambda spec: "gone" if spec.endswith("0.31.0") else "")
    assert by_name(night)["ladder-vllm"].arguments[5:7] == ("--release", "0.32.0")
    assert (
        "no target with versions"
        in by_name(replace(night, ladders=("reference",)))["ladder-reference"].reason
    )


def test_backtests_are_of_what_is_installed(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "unavailable", lambda spec: "" if spec in PAIR else "is not installed")
    assert by_name(night)["backtests"].arguments == (
        "backtest", "--installed", "--out", str(night.backtests_file),
    )  # fmt: skip
    assert by_name(replace(night, backtests=("R01",)))["backtests"].reason.endswith("is not installed")
    assert by_name(replace(night, backtests=("R04",)))["backtests"].arguments[:2] == ("backtest", "R04")
    assert "'X99' has no backtest" in by_name(replace(night, backtests=("X99",)))["backtests"].wrong
    monkeypatch.setattr(targets, "unavailable", lambda spec: "is not installed")
    assert "is not installed" in by_name(night)["backtests"].reason


def test_backtests_of_other_releases_are_told_as_not_run(
    night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with nothing installed: all are in its file, and nothing is missed or open."""
    monkeypatch.setattr(targets, "unavailable", lambda spec: "is not installed")
    assert invoke(["backtest", "R04", "--installed", "--out", str(night.backtests_file)]) == 0
    assert "0 detected, 0 missed, 1 not reachable" in capsys.readouterr().out
    (reason,) = nights._unreached(night)
    assert reason.endswith("is not installed")
    assert invoke(["backtest", "R04"]) == 3


def test_steps_can_be_left_out(night: Night) -> None:
    found = by_name(replace(night, skip=frozenset({"ladder", "matrix", "kill", "faults-check"})))
    assert list(found) == [
        "suites",
        "backtests",
        "faults-sample",
        "gates-check",
        "trials-check",
        "checkpoints-check",
        "clean",
    ]


def test_faults_whose_record_does_not_hold_come_first_then_others_each_night(night: Night) -> None:
    faults = list(registry().values())
    assert sample(night) == [fault.id for fault in faults[:3]]
    cases = plans.select(QUICK, quick=True).cases
    current = []
    for fault in faults:
        found = outcome(fault.id, catch())
        basis = record.basis(fault, cases)
        current.append(found.model_copy(update={"last": found.last.model_copy(update={"basis": basis})}))
    record.write(FaultsFile(faults=tuple(current[:5] + current[6:])), night.record)
    chosen = sample(night)
    assert chosen[0] == faults[5].id, "it was never measured"
    tomorrow = sample(replace(night, today=DAY + dt.timedelta(days=1)))
    assert set(chosen[1:]).isdisjoint(tomorrow[1:])
    assert len({*chosen, *tomorrow}) == 5


def test_where_no_record_holds_the_oldest_come_first(night: Night) -> None:
    """So that nights after changes of the sources get round all faults, too."""
    first, *others = registry().values()
    known = []
    for minute, fault in enumerate([first, *reversed(others)]):
        found = outcome(fault.id, catch())
        at = f"2026-11-21T{minute // 60:02}:{minute % 60:02}:00+00:00"
        known.append(found.model_copy(update={"last": found.last.model_copy(update={"at": at})}))
    record.write(FaultsFile(faults=tuple(known)), night.record)
    assert sample(night) == [first.id, others[-1].id, others[-2].id]


def test_a_record_of_another_version_is_set_aside(night: Night) -> None:
    night.record.write_text('{"schema_version": 1}')
    assert by_name(night)["faults-check"].arguments == ("faults", "check", str(night.record))
    assert record.read(night.record) == record.read(record.default_path())
    assert night.record.with_name("faults.json.unreadable").read_text() == '{"schema_version": 1}'


# ------------------------------------------------------------------------------------------- running


class Processes:
    """In place of an executor: steps end as they are told to."""

    def __init__(self, codes: dict[str, int | None], ended_at: str = "", *, merging: bool = True) -> None:
        self.codes = codes
        self.ended_at = ended_at
        self.merging = merging
        self.started: list[str] = []

    def __call__(self, workers: int = 1) -> Processes:
        return self

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        for job in jobs:
            if job.name == self.ended_at:
                raise KeyboardInterrupt
            self.started.append(job.name)
            if job.name == "merge" and self.merging:
                with Store(job.arguments[-1], create=True) as store:
                    store.merge_file(Path(job.arguments[2]))
            if job.name == "suites":
                stored = fixtures.wide_run(1)
                path = Path(job.arguments[-1])
                lines = [stored.header, *stored.results]
                path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
            yield Ended(job, self.codes.get(job.name, 0), 1.0, f"much\nthe last words of {job.name}\n")


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({}, 0),
        ({"faults-check": 3}, 3),
        ({"clean": 1, "faults-check": 3}, 1),
        ({"kill": None}, 1),
        ({"matrix": -9}, 1),
    ],
)
def test_the_worst_step_decides(
    night: Night, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int | None], code: int
) -> None:
    record.write(FaultsFile(), night.record)
    monkeypatch.setattr(targets, "unavailable", lambda spec: "is not installed")
    monkeypatch.setattr(nights, "LocalExecutor", Processes(codes))
    found = nights.run(night)
    assert found.exit_code == code
    states = {step.name: step for step in found.steps}
    assert states["ladder-vllm"].state == "not run"
    assert [row.what for row in found.not_run].count("ladder-vllm") == 1
    if "kill" in codes:
        assert states["kill"].reason == "not done within 21600 s"
    if "clean" in codes:
        assert states["clean"].reason == "the last words of clean"
        assert states["clean"].repeat.startswith("conformance trial clean ")


def test_a_night_that_was_ended_goes_on_behind_its_last_step(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.write(FaultsFile(), night.record)
    night = replace(night, skip=frozenset({"ladder"}))
    first = Processes({"clean": 1, "matrix": 137}, ended_at="kill")
    monkeypatch.setattr(nights, "LocalExecutor", first)
    kept: list[NightResult] = []
    with pytest.raises(KeyboardInterrupt):
        nights.run(night, keep=kept.append)
    assert [step.name for step in kept[-1].steps][-1] == "clean", "all that was known is kept"
    assert kept[-1].comparison is not None
    assert kept[-1].comparison.counts
    assert not kept[-1].over
    assert "The night is not over" in told(kept[-1])
    second = Processes({})
    monkeypatch.setattr(nights, "LocalExecutor", second)
    again = nights.run(replace(night, workers=2), keep=kept.append)
    assert second.started == ["matrix", "merge", "kill", "report"], "what was killed is run again"
    assert [step.state for step in again.steps if step.name == "clean"] == ["bad"]
    assert again.exit_code == 1
    assert kept[-1] == again
    assert again.over
    with pytest.raises(UsageError, match="holds a night that is over; name a new folder"):
        nights.run(night)


def test_a_folder_goes_on_with_its_own_night_only(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nights, "LocalExecutor", Processes({}, ended_at="merge"))
    night = replace(night, skip=LONG | {"clean", "kill"})
    with pytest.raises(KeyboardInterrupt):
        nights.run(night)
    for other in (replace(night, targets=("reference",)), replace(night, today=DAY + dt.timedelta(days=1))):
        with pytest.raises(UsageError, match="was begun with other options"):
            nights.run(other)
    (night.folder / "steps.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"steps\.json: cannot be read"):
        nights.run(night)


def test_a_merge_that_failed_in_part_leaves_the_comparison(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nights, "LocalExecutor", Processes({"merge": 2}))
    found = nights.run(replace(night, skip=LONG | {"clean", "kill"}))
    assert found.comparison is not None
    assert found.comparison.counts
    assert {step.name: step.state for step in found.steps}["merge"] == "bad"


def test_a_history_that_cannot_be_asked_fails_the_night(
    night: Night, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nights, "LocalExecutor", Processes({}, merging=False))
    (tmp_path / "none.sqlite").write_text("this is no database, whatever it is called", encoding="utf-8")
    night = replace(night, skip=LONG | {"clean", "kill"}, database=f"sqlite:///{tmp_path}/none.sqlite")
    found = nights.run(night)
    assert found.exit_code == 1
    assert [step.state for step in found.steps if step.name == "compare"] == ["bad"]
    assert "The history could not be asked" in told(found)


def test_a_broken_record_of_faults_costs_its_own_steps(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = night.record.with_name("committed.json")
    broken.write_text("<<<<<<< HEAD", encoding="utf-8")
    monkeypatch.setattr(record, "default_path", lambda: broken)
    monkeypatch.setattr(nights, "LocalExecutor", Processes({}))
    found = nights.run(replace(night, skip=frozenset({"ladder", "clean", "kill"})))
    states = {step.name: step.state for step in found.steps}
    assert (states["suites"], states["faults-check"], states["faults-sample"]) == ("good", "bad", "bad")
    (check,) = [step for step in found.steps if step.name == "faults-check"]
    assert "committed.json" in check.reason


def test_suites_that_never_began_are_begun_anew(night: Night) -> None:
    night.folder.mkdir()
    night.suites_file.touch()
    assert by_name(night)["suites"].arguments[-2:] == ("--out", str(night.suites_file))


@pytest.mark.parametrize(
    ("before", "newest", "reason", "known", "says"),
    [
        ("pass", "pass", "", False, ""),
        ("pass", "fail", "", True, ""),
        ("pass", "fail", "", False, "x@2 fails what x@1 passes: parser/a::b"),
        ("fail", "fail", "", False, ""),
        ("skip", "fail", "", False, "x@2 fails what no release before it was judged by: parser/a::b"),
        (None, "fail", "", False, "x@2 fails what no release before it was judged by: parser/a::b"),
        (None, "fail", "", True, ""),
        (None, "pass", "", False, ""),
        ("pass", "pass", "its worker died", False, "x@2: its worker died"),
    ],
)
def test_the_newest_release_is_judged(
    tmp_path: Path, before: Verdict | None, newest: Verdict, reason: str, known: bool, says: str
) -> None:
    """Also where no other is installed: what it fails must then be known."""
    cells = {"x@1": Cell(verdict=before)} if before is not None else {}
    cells |= {} if reason else {"x@2": Cell(verdict=newest, known=known)}
    older = (Rung(spec="x@1", version="1"),) if before is not None else ()
    ladder = Ladder(
        target="x",
        sources="s",
        releases=(*older, Rung(spec="x@2", version="2", reason=reason)),
        rows=(LadderRow(case="parser/a::b", source=(), cells=cells),),
    )
    (tmp_path / "ladder.json").write_text(ladder.model_dump_json(), encoding="utf-8")
    assert nights._of_newest(tmp_path / "ladder.json") == says


def test_what_could_not_run_is_counted_with_its_reason(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nights, "LocalExecutor", Processes({}))
    night.folder.mkdir()
    found = nights.run(replace(night, skip=LONG))
    skipped = [r for r in fixtures.wide_run(1).results if r.verdict == "skip"]
    rows = [row for row in found.not_run if row.what == "suites"]
    assert sum(row.count for row in rows) == len(skipped)
    assert runfile.read(night.suites_file).header.manifest


def test_cells_that_wait_for_their_turn_are_counted(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nights, "LocalExecutor", Processes({}))
    cells = matrices.load().select(("reference+masks*",), "nightly")
    rows = {}
    for spread in (1, 2):
        wanted = replace(night, folder=night.folder / str(spread), cells=("reference+masks*",), spread=spread)
        wanted.cells_folder.mkdir(parents=True)
        (wanted.cells_folder / cells[0].file_name).touch()
        found = nights.run(replace(wanted, skip=LONG))
        rows[spread] = [(row.count, row.reason) for row in found.not_run if row.what == "matrix"]
    ((count, reason),) = rows[2]
    assert rows[1] == []
    assert count == len(cells) - 1 > 0
    assert reason.endswith("this one has shard 1/2")


# ------------------------------------------------------------------------------------------- the text


def compared(state: str, **changes: object) -> Compared:
    base = Compared(
        suite="parser/x", case="one", target="vllm@0.32.0", cell=None, area="reasoning", state="broken",
        before="pass", after="fail", before_run="run-1", run="run-2", edited=False,
        reason="expected: differs",
    )  # fmt: skip
    return base.model_copy(update={"state": state, **changes})


def text_of(*entries: Compared, steps: Sequence[StepResult] = (), **changes: object) -> str:
    comparison = Comparison(runs=("run-2",), before=("run-1",), entries=entries)
    night = NightResult(folder="f", steps=tuple(steps), not_run=(), comparison=comparison, gates={})
    return told(night.model_copy(update=changes))


def test_the_text_says_what_broke_and_since_when() -> None:
    since = Since(
        run_id="run-0", started="2026-11-20T02:00:00+00:00", commit="c0", last_good="run-a", good_commit="ca"
    )
    text = text_of(
        compared("broken", since=since.model_copy(update={"last_good": None})),
        compared("still-broken", case="two", cell="vllm@0.32.0+pp2", since=since),
        compared("mended", case="three", before="fail", after="pass"),
        compared("new", case="four"),
    )
    assert text.splitlines()[0] == "1 broken, 1 still broken, 1 mended, 1 new: exit code 0"
    assert "  parser/x::one [vllm@0.32.0]: pass -> fail: expected: differs\n" in text
    assert "since 2026-11-20T02:00 (run run-0, commit c0); no earlier run" in text
    assert "two [vllm@0.32.0+pp2]" in text
    assert "since 2026-11-20T02:00 (run run-0, commit c0); last good in run run-a, commit ca" in text
    assert "MENDED: 1" in text


def test_the_text_is_short_whatever_happened() -> None:
    many = [compared("broken", case=f"case-{n}", reason="x" * 5000) for n in range(500)]
    reasons = tuple(NotRun(what="matrix", count=2, reason=f"reason {n}") for n in range(100))
    text = text_of(*many, not_run=reasons, gates={"not run": 4})
    assert "  and 480 more" in text
    assert "NOT RUN: 200" in text
    assert "  and 80 more reasons" in text
    assert "GATES: 4 not run" in text
    assert len(text) < 10_000


def test_the_text_tells_failed_steps_and_a_history_that_was_not_asked() -> None:
    step = StepResult(name="kill", state="bad", reason="LOST", exit_code=1, repeat="conformance trial kill")
    text = text_of(steps=[step], comparison=None)
    assert text.splitlines()[0].endswith("1 of 1 steps failed: exit code 1")
    assert "kill (bad): LOST\n    repeat: conformance trial kill" in text
    assert "The history was not asked: nothing is told of earlier nights." in text


# ------------------------------------------------------------------------------------------- command


def test_two_nights_of_one_small_suite(run_conformance: Command, suites: Suites, tmp_path: Path) -> None:
    """Real processes: suites, merge, comparison and dashboard; the second night breaks a case."""
    suites.write("one", "two")
    skipped = [*LONG, "clean", "kill"]
    common = ["nightly", "suites", "-t", HONEST, "--database", f"sqlite:///{tmp_path}/h.sqlite", "--json"]
    common += [word for name in skipped for word in ("--skip", name)]
    first = run_conformance(*common, "--out", "n1")
    assert first.returncode == 0, first.stderr
    assert validated("nightly", first)["night"]["comparison"]["entries"][0]["state"] == "new"
    second = run_conformance(*common, "--out", "n2", env={"LIES": "two"})
    assert second.returncode == 1, second.stderr
    night = validated("nightly", second)
    states = {entry["case"]: entry["state"] for entry in night["night"]["comparison"]["entries"]}
    assert states == {"case-one": "same", "case-two": "broken"}
    assert "1 broken, 0 still broken, 0 mended, 0 new; 1 of 3 steps failed: exit code 1" in night["text"]
    assert (tmp_path / "n2/nightly.txt").read_text() == night["text"]
    assert (tmp_path / "n2/site/comparison.html").is_file()
    assert (tmp_path / "n2/site/runs.html").is_file()
