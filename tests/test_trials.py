"""Trials of the harness: varied runs without a fault raise no alarm, and killed runs lose nothing."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import grounds, runfile
from conformance.results import Result, Run, Verdict
from conformance.trials import clean as cleaning
from conformance.trials import kill as killing
from conformance.trials import record as records
from conformance.trials.clean import CleanPlan, CleanRun, clean, drawn
from conformance.trials.kill import Killed, KillPlan, KillTrial, shown_result
from conformance.trials.record import TrialsFile
from tests import run_fixtures as fixtures
from tests.conftest import Run as Command
from tests.conftest import Suites
from tests.test_cli import HONEST, SLOW, validated

# ------------------------------------------------------------------------------------------- clean runs


def test_circumstances_differ_and_can_be_had_again() -> None:
    one, two, other = (list(itertools.islice(drawn(seed), 12)) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert one[0].options[:2] == ("--shuffle", str(one[0].order))
    assert (one[0].threads, one[0].workers, one[0].sampling) == (1, 0, 0)
    for name in ("threads", "workers", "hash_seed", "order", "sampling"):
        assert len({getattr(found, name) for found in one}) > 1, name


def test_varied_runs_of_an_honest_target_are_quiet(
    run_conformance: Command, suites: Suites, tmp_path: Path
) -> None:
    suites.write("one", "two", "three")
    done = run_conformance("trial", "clean", "suites", "-t", HONEST, "--runs", 3, "--out", "t", "--json")
    assert done.returncode == 0, done.stderr
    runs = validated("trial-clean", done)["runs"]
    assert [run["counts"] for run in runs] == [{"pass": 3}] * 3
    hashes = set()
    for run in runs:
        header = runfile.read(tmp_path / run["run_file"]).header
        hashes.add(header.environment["env:PYTHONHASHSEED"])
        assert header.environment["env:OMP_NUM_THREADS"] == str(run["circumstances"]["threads"])
    assert len(hashes) == 3


def test_every_alarm_is_listed_with_a_line_that_repeats_it(run_conformance: Command, suites: Suites) -> None:
    suites.write("one", "two")
    done = run_conformance(
        "trial", "clean", "suites", "-t", HONEST, "--runs", 1, "--out", "t", env={"LIES": "two"}
    )
    assert done.returncode == 1
    assert f"parser/demo::case-two [{HONEST}]: fail" in done.stdout
    variables = "OMP_NUM_THREADS=1 CONFORMANCE_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONHASHSEED="
    assert f"repeat: env {variables}" in done.stdout
    assert done.stdout.count(": fail: ") == 1
    assert "1 runs, 1 of them with an alarm" in done.stdout


def written(folder: Path, name: str, verdicts: dict[str, Verdict], *, finished: bool = True) -> None:
    """A run file in which cases have these verdicts."""
    base = fixtures.wide_run(1)
    (plan, result), *_ = [
        (p, r) for p in base.header.manifest for r in base.results if (p.suite, p.case, p.target) == r.key
    ]
    header = base.header.model_copy(
        update={"manifest": tuple(plan.model_copy(update={"case": case}) for case in ("one", "two"))}
    )
    lines: list[object] = [header]
    for case, verdict in verdicts.items():
        lines.append(result.model_copy(update={"case": case, "verdict": verdict, "reason": "because"}))
    if finished:
        lines.append(base.footer)
    text = "".join(f"{line.model_dump_json()}\n" for line in lines)  # type: ignore[attr-defined]
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("second", "finished", "alarms", "reason"),
    [
        ({"one": "pass", "two": "skip"}, True, [], ""),
        ({"one": "pass", "two": "fail"}, True, [("two", "fail", "skip")], ""),
        ({"one": "skip", "two": "skip"}, True, [("one", "skip", "pass")], ""),  # no failure, and not the same
        ({"one": "pass"}, False, [("two", None, "skip")], "its process ended with exit code 1: last words"),
    ],
)
def test_what_is_an_alarm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    second: dict[str, Verdict],
    finished: bool,
    alarms: list[tuple[str, Verdict | None, Verdict]],
    reason: str,
) -> None:
    written(tmp_path, "clean-0-1.jsonl", {"one": "pass", "two": "skip"})
    written(tmp_path, "clean-0-2.jsonl", second, finished=finished)

    class Nothing:
        def run(self, jobs):  # type: ignore[no-untyped-def]
            yield cleaning.Ended(jobs[0], 1, 0.1, "last words")

    monkeypatch.setattr(cleaning, "LocalExecutor", Nothing)
    first, found = clean(CleanPlan((), ("engine-0@1.0.0",), tmp_path, runs=2))
    assert first.quiet
    assert [(alarm.address.split("::")[1], alarm.verdict, alarm.usual) for alarm in found.alarms] == alarms
    assert found.reason == reason
    assert found.quiet is not bool(alarms or reason)


# ------------------------------------------------------------------------------------------- the record


def test_a_trial_is_kept_with_what_it_rests_on(
    run_conformance: Command, suites: Suites, tmp_path: Path
) -> None:
    suites.write("one", "two")
    asked = ("trial", "clean", "suites", "-t", HONEST, "--runs", 2, "--out", "t", "--record", "r/trials.json")
    assert run_conformance(*asked).returncode == 0
    kept = records.read(tmp_path / "r" / "trials.json").clean
    assert kept is not None
    assert (kept.made.selection, kept.made.targets, kept.made.seed) == (("suites",), (HONEST,), 0)
    assert [run.run_file for run in kept.runs] == ["clean-0-1.jsonl", "clean-0-2.jsonl"], (
        "no path of a machine"
    )
    done = run_conformance("trial", "check", "r/trials.json")
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "clean: to be made again: has 2 of 10 runs",
        "kill: to be made again: was never made",
    ]
    rows = validated("trial-check", run_conformance("trial", "check", "r/trials.json", "--json"))["trials"]
    assert rows[1] == {"trial": "kill", "stale": "was never made", "bad": False}


def test_what_was_alarming_once_stays_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that is gone on with asks again what came to no verdict; that hides no earlier answer."""
    written(tmp_path, "clean-0-1.jsonl", {"one": "timeout", "two": "pass"})
    path = tmp_path / "clean-0-1.jsonl"
    (again,) = [r for r in runfile.read(path).results if r.case == "one"]
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    lines.insert(2, again.model_copy(update={"verdict": "pass"}).model_dump_json())
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    assert len(runfile.read(path).results) == 3

    class Nothing:
        def run(self, jobs):  # type: ignore[no-untyped-def]
            yield cleaning.Ended(jobs[0], 0, 0.1, "")

    monkeypatch.setattr(cleaning, "LocalExecutor", Nothing)
    (found,) = clean(CleanPlan((), ("engine-0@1.0.0",), tmp_path, runs=1))
    assert found.counts == {"pass": 2}
    assert [(alarm.address.split("::")[1], alarm.verdict) for alarm in found.alarms] == [("one", "timeout")]


def test_a_run_that_never_began_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the making of its file and its header."""
    (tmp_path / "clean-0-1.jsonl").touch()
    asked = []

    class Noting:
        def run(self, jobs):  # type: ignore[no-untyped-def]
            asked.append(jobs[0].arguments)
            written(tmp_path, "clean-0-1.jsonl", {"one": "pass", "two": "pass"})
            yield cleaning.Ended(jobs[0], 0, 0.1, "")

    monkeypatch.setattr(cleaning, "LocalExecutor", Noting)
    (found,) = clean(CleanPlan((), ("engine-0@1.0.0",), tmp_path, runs=1))
    assert found.quiet
    assert "--out" in asked[0]
    assert "--resume" not in asked[0]


def test_threads_of_a_trial_reach_the_model(tmp_path: Path) -> None:
    circumstances = next(found for found in drawn(0) if found.threads == 4)
    code = "import torch\nfrom conformance.targets.reference_model import engine\n"
    code += "with engine(): print(torch.get_num_threads())\nwith engine(2): print(torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | dict(circumstances.environment),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["4", "2"]


def trials(*, alarms: bool = False, lost: tuple[str, ...] = ()) -> TrialsFile:
    """A record of both trials, long enough, of today's sources and of no case."""
    made = records.begun(CleanPlan((), ("reference",), Path(), 10), ())
    circumstances = itertools.islice(drawn(0), records.CLEAN_RUNS)
    runs = tuple(
        CleanRun(
            circumstances=found,
            run_file="clean.jsonl",
            repeat="conformance run",
            seconds=1.0,
            counts={"pass": 1},
            alarms=(),
            reason="it hung" if alarms else "",
        )
        for found in circumstances
    )
    killed = Killed(after=1, shown=1, stored=1, lost=lost, torn=False)
    trial = KillTrial(
        planned=60, kills=(killed,) * records.KILLS, differing=(), twice=(), run_file="k", undisturbed="u"
    )
    return TrialsFile(
        clean=records.CleanTrial(made=made, runs=runs), kill=records.Kills(made=made, trial=trial)
    )


def test_a_record_holds_while_sources_and_cases_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    file = trials()
    assert records.stale(file, lambda _selection: ()) == {}
    assert records.bad(file) == frozenset()
    monkeypatch.setattr(grounds, "sources", lambda: "others")
    changed = "the implementation or the harness has changed since"
    assert records.stale(file, lambda _selection: ()) == {"clean": changed, "kill": changed}
    monkeypatch.setattr(grounds, "of_cases", lambda _cases: "others")
    changed = "the cases have changed since"
    assert records.stale(file, lambda _selection: ()) == {"clean": changed, "kill": changed}


def test_a_record_of_few_cases_or_of_another_target_does_not_hold() -> None:
    file = trials()
    assert file.clean is not None
    assert file.kill is not None
    of_few = file.clean.made.model_copy(update={"selection": ("parser/one",)})
    of_another = file.kill.made.model_copy(update={"targets": ("vllm@0.32.0",)})
    file = TrialsFile(
        clean=file.clean.model_copy(update={"made": of_few}),
        kill=file.kill.model_copy(update={"made": of_another}),
    )
    assert records.stale(file, lambda _selection: ()) == {
        "clean": "is of some cases and not of all quick ones",
        "kill": "is not of the target `reference`",
    }


FOLDER = "model_impl/nano/checkpoints/scripted"


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("conformance/commands/run.py", True),
        ("conformance/commands/selection.py", True),
        ("conformance/commands/serve.py", False),
        ("conformance/commands/targets.py", False),
        *((f"{FOLDER}/{name}", True) for name in ("config.json", "model.safetensors", "tokenizer.json")),
        (f"{FOLDER}/manifest.json", False),
    ],
)
def test_what_computes_counts_and_what_tells_of_it_does_not(
    file: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[tuple[str, ...]] = []

    def note(without: tuple[str, ...]) -> str:
        left_out.append(without)
        return "x" * 64

    monkeypatch.setattr(runfile, "harness_digest", note)
    grounds.sources()
    assert file.startswith(left_out[0]) is not counts


def test_a_record_of_a_trial_that_went_wrong_is_bad() -> None:
    assert records.bad(trials(alarms=True)) == {"clean"}
    assert records.bad(trials(lost=("parser/a::b [reference]",))) == {"kill"}


def test_a_trial_with_a_file_that_is_no_record_does_not_begin(
    run_conformance: Command, suites: Suites, tmp_path: Path
) -> None:
    suites.write("one")
    (tmp_path / "trials.json").write_text("[]")
    asked = ("suites", "-t", HONEST, "--out", "t", "--record", "trials.json")
    done = run_conformance("trial", "clean", *asked)
    assert done.returncode == 2
    assert (
        "trials.json: is not what this version's `conformance trial clean|kill --record` writes"
        in done.stderr
    )
    assert not (tmp_path / "t").exists()


def test_the_committed_record_is_sound() -> None:
    """Whether it is complete and still holds, `conformance trial check` says, every night."""
    file = records.read(records.default_path())
    assert records.bad(file) == frozenset()
    assert file.kill is not None
    assert len(file.kill.trial.kills) >= records.KILLS
    assert file.clean is not None
    assert len(file.clean.runs) >= records.CLEAN_RUNS
    assert file.clean.made.selection == (), "all quick cases"


# ------------------------------------------------------------------------------------------- killed runs


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("pass parser/a-b::case-1 [reference]", ("parser/a-b", "case-1", "reference")),
        ("skip parser/a::b [vllm@0.32.0]: is not installed", ("parser/a", "b", "vllm@0.32.0")),
        ("parser/a::b on lying_targets:Lying failed: expected", ("parser/a", "b", "lying_targets:Lying")),
        ("14 cases on reference", None),
        ("  expected: pass parser/a::b [x]", None),
    ],
)
def test_results_are_read_from_what_a_run_shows(line: str, key: tuple[str, str, str] | None) -> None:
    assert shown_result(line + " ") == key


def test_a_run_that_is_killed_five_times_loses_nothing(
    run_conformance: Command, suites: Suites, tmp_path: Path
) -> None:
    suites.write(*(f"out{n}" for n in range(12)))
    common = ["suites", "-t", "reference", "-t", SLOW, "--times", 5, "--seed", 3, "--out", "t", "--json"]
    done = run_conformance("trial", "kill", *common, env={"FAKE_SECONDS": "0.1"})
    assert done.returncode == 0, done.stdout + done.stderr
    trial = validated("trial-kill", done)["trial"]
    assert trial["planned"] == 24
    assert len(trial["kills"]) == 5
    assert trial["kills"][-1]["shown"] > 0
    assert all(kill["lost"] == [] for kill in trial["kills"])
    whole = runfile.read(tmp_path / trial["undisturbed"])
    cut = runfile.read(tmp_path / trial["run_file"])
    verdicts = [{key: result.verdict for key, result in run.latest().items()} for run in (whole, cut)]
    assert verdicts[0] == verdicts[1]


def test_what_is_lost_differs_or_was_thrown_away_is_told() -> None:
    run = fixtures.wide_run(1)
    first, second = (result for result in list(run.latest().values())[:2])
    results: list[Result] = [r.model_copy(update={"verdict": "pass"}) for r in run.results]
    whole = run.model_copy(update={"results": tuple(results)})
    changed = [r.model_copy(update={"verdict": "fail"}) if r.key == first.key else r for r in results]
    again = [r for r in results if r.key == second.key]
    ended: Run = run.model_copy(update={"results": (*changed, *again)})
    found = killing._compared(whole, ended, {second.key}, [], Path("a"), Path("b"))
    assert [name.split(": ")[1] for name in found.differing] == ["fail, undisturbed pass"]
    assert found.twice == (f"{second.suite}::{second.case} [{second.target}]",)
    assert not found.sound
    same = killing._compared(whole, whole, set(), [], Path("a"), Path("b"))
    assert same.sound
    lost = killing.Killed(after=1, shown=2, stored=1, lost=("x",), torn=False)
    assert not same.model_copy(update={"kills": (lost,)}).sound


def test_a_result_that_was_shown_and_is_not_in_the_file_is_lost(tmp_path: Path) -> None:
    written(tmp_path, "cut.jsonl", {"one": "pass"}, finished=False)
    (stored,) = runfile.read(tmp_path / "cut.jsonl").results
    missing = (stored.suite, "two", stored.target)
    assert killing._look(tmp_path / "cut.jsonl", 1, {stored.key}).lost == ()
    found = killing._look(tmp_path / "cut.jsonl", 2, {stored.key, missing})
    assert found.lost == (f"{stored.suite}::two [{stored.target}]",)


class Session:
    """In place of a process: what it prints, and how it ends."""

    def __init__(self, lines: list[str], code: int | None) -> None:
        self.stdout = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
        self.pid, self.code = 0, code

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left running."""

    def poll(self) -> int | None:
        return self.code

    def communicate(self) -> tuple[bytes, None]:
        return self.stdout.read(), None


def test_a_session_that_ends_by_itself_is_no_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that a wrong refusal ended: the fault that the trial is to find."""
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)
    plan = KillPlan(("a",), ("b",), tmp_path, 1)
    refused = Session(["error: t.jsonl is being written by another run"], 2)
    monkeypatch.setattr(killing, "guarded", lambda command: refused)
    with pytest.raises(killing.KillError, match=r"after 0 results: error: t\.jsonl is being written"):
        killing._kill_one(plan, tmp_path / "t.jsonl", 1, 0.0)
    shown = ["pass parser/x::one [reference]", "pass parser/x::two [reference]"]
    written(tmp_path, "begun.jsonl", {"one": "pass"}, finished=False)
    monkeypatch.setattr(killing, "guarded", lambda command: Session(shown, None))
    keys = killing._kill_one(plan, tmp_path / "begun.jsonl", 1, 0.0)
    assert keys == {("parser/x", name, "reference") for name in ("one", "two")}, "what the pipe held, too"
    written(tmp_path, "ended.jsonl", {"one": "pass"})
    monkeypatch.setattr(killing, "guarded", lambda command: Session(shown, 0))
    assert killing._kill_one(plan, tmp_path / "ended.jsonl", 1, 0.0) is None


def test_a_session_that_hangs_ends_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    monkeypatch.setattr(killing.Job, "command", lambda self, run_file=None: command)
    plan = KillPlan(("a",), ("b",), tmp_path, 1, limit=1.0)
    with pytest.raises(killing.KillError, match="showed fewer than 1 results within 1 s: begun"):
        killing._kill_one(plan, tmp_path / "t.jsonl", 1, 0.0)


def test_a_run_too_short_to_be_killed_so_often_is_refused(run_conformance: Command, suites: Suites) -> None:
    suites.write("one", "two")
    done = run_conformance("trial", "kill", "suites", "-t", HONEST, "--times", 2, "--out", "t")
    assert done.returncode == 2
    assert "a run of 2 cases cannot be killed 2 times" in done.stderr
    assert KillPlan(("a",), ("b",), Path(), 1, workers=2).asked[-4:] == ("-n", "2", "--no-report", "-v")
