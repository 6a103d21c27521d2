"""Faults are measured once each; the record says what noticed them, and whether it still holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conformance import grounds
from conformance.commands.selection import select
from conformance.errors import UsageError
from conformance.execute import Ended, Job
from conformance.faults import measure as measuring
from conformance.faults import reach, record, registry, written
from conformance.faults.cleanly import Clean
from conformance.faults.measure import Found, Plan, measure, recorded
from conformance.faults.places import LEVEL_OF_KIND, Place
from conformance.faults.pointers import Pointer, Pointers
from conformance.faults.record import Basis, FaultRecord, FaultsFile
from conformance.faults.run import Catch
from conformance.loading import LoadedCase
from conformance.results import Verdict
from conformance.sealed import RecordError
from tests.conftest import Run
from tests.test_cli import validated

AT = "2026-11-22T02:00:00+00:00"
TODAY = Basis(sources="s", cases="c", fault="f")
QUICK = ("parser/reasoning::label-dropped", "template/turns::one-user-turn")


def catch(
    kind: str = "parser",
    area: str = "reasoning",
    verdict: Verdict = "fail",
    module: str = "",
    rule: str = "expected",
    case: str = "",
) -> Catch:
    address = case or f"{kind}/x::y"
    return Catch(case=address, kind=kind, area=area, verdict=verdict, rules=(rule,), module=module)


def outcome(fault: str, *caught: Catch, earlier: FaultRecord | None = None) -> FaultRecord:
    found = Found(fault=fault, basis=TODAY, cases=9, asked=7, seconds=1.0, at=AT, commit="c1", caught=caught)
    return recorded(registry()[fault], found, TODAY, earlier)


# ------------------------------------------------------------------------------------------- judging


def test_the_lowest_level_that_notices_decides_where_a_fault_is() -> None:
    found = outcome("label-kept", catch(), catch("generation", "generation"), catch("parity", "text-model"))
    assert found.last.level == "unit"
    assert (found.last.at, found.last.commit) == (AT, "c1")
    assert found.last.levels == {"unit": 1, "layer": 1, "model": 1}
    assert found.last.kinds == {"generation": 1, "parity": 1, "parser": 1}
    assert found.localised(found.last)
    # The same fault, if a unit of another area were first: what higher levels say does not mend that.
    astray = outcome("label-kept", catch("template", "template"), catch("generation", "reasoning"))
    assert astray.last.detected
    assert not astray.localised(astray.last)
    assert not astray.in_area(astray.last)


@pytest.mark.parametrize(
    ("fault", "module", "area", "points"),
    [
        ("no-value-norm", "layers.3.self_attn", "text-model", True),
        ("no-value-norm", "layers.3.mlp", "text-model", False),
        ("images-one-by-one", "", "media", True),  # no module differs, and the table points at it
        ("images-one-by-one", "vision_tower", "media", False),
        ("label-kept", "", "typing", False),
    ],
)
def test_a_parity_case_points_by_the_module_it_names(
    fault: str, module: str, area: str, points: bool
) -> None:
    found = outcome(fault, catch("parity", area, module=module))
    assert found.localised(found.last) is points
    assert found.in_area(found.last) is points


def test_more_than_half_of_the_lowest_cases_must_name_the_module() -> None:
    right, wrong = (
        catch("parser", "typing", case="parser/t::a"),
        catch("parser", "reasoning", case="parser/r::b"),
    )
    even = outcome("schema-ignored", right, wrong)
    assert even.pointing(even.last) == ("parser/t::a",)
    assert not even.localised(even.last)
    assert even.in_area(even.last), "which one case is enough for"
    most = outcome("schema-ignored", right, wrong, right.model_copy(update={"case": "parser/t::c"}))
    assert most.localised(most.last)
    nothing = outcome("schema-ignored")
    assert not nothing.localised(nothing.last)


def test_an_area_of_many_modules_localises_nothing() -> None:
    """As an adapter's fault that lines of a script notice, in an area to which half an engine belongs."""
    found = outcome(
        "media-of-another-request", catch("generation", "generation", case="generation/scripted::batch")
    )
    assert found.in_area(found.last)
    assert not found.localised(found.last)


def test_what_is_shown_follows_the_table_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome("label-kept", catch())
    assert found.localised(found.last)
    other = Pointers(title="demo", pointers=(Pointer(areas=("reasoning",), modules=("chat.schema",)),))
    monkeypatch.setattr(record, "pointers", lambda: other)
    assert not found.localised(found.last)
    assert record.stale(found, TODAY) == "", "no number of it is stored"


def test_outcomes_that_kept_no_cases_are_not_localised() -> None:
    found = outcome("label-kept", catch())
    older = found.last.model_copy(update={"lowest": None, "in_area": True})
    old = found.model_copy(update={"first": older})
    rates = record.rates([old])
    assert (rates.localised_first, rates.localised, rates.first_untold) == (0, 1, 1)
    assert (rates.in_area_first, rates.in_area) == (1, 1)


def test_a_crash_is_no_detection() -> None:
    crashed = outcome("label-kept", catch(verdict="error"), catch(rule="raised"))
    assert not crashed.last.detected
    assert crashed.last.crash_only
    assert crashed.noticed == {}
    assert crashed.crashed == ("parser/x::y", "parser/x::y")
    judged = outcome("label-kept", catch(verdict="error"), catch())
    assert judged.last.detected
    assert not judged.last.crash_only


def test_a_fault_that_nothing_notices_is_neither() -> None:
    found = outcome("label-kept")
    assert not found.last.detected
    assert not found.last.crash_only
    assert found.last.level is None


def test_a_process_that_dies_noticed_by_a_crash_only() -> None:
    found = recorded(registry()["label-kept"], None, TODAY, None, "its process was killed by SIGSEGV")
    assert found.last.crash_only
    assert not found.last.detected
    assert found.last.reason == "its process was killed by SIGSEGV"


def test_the_first_outcome_is_kept_and_rates_tell_both() -> None:
    missed = outcome("label-kept")
    caught = outcome("label-kept", catch(), earlier=missed)
    assert caught.first == missed.last
    assert caught.last.detected
    other = outcome("double-bos", catch("template", "template"))
    rates = record.rates_by_class([caught, other])
    assert list(rates) == ["reasoning-parser", "template"]
    assert rates["reasoning-parser"].model_dump() == {
        "faults": 1, "detected_first": 0, "detected": 1, "crash_only": 0,
        "localised_first": 0, "localised": 1, "in_area_first": 0, "in_area": 1, "first_untold": 0,
    }  # fmt: skip
    assert record.rates([caught, other]).detected_first == 1


# ------------------------------------------------------------------------------------------- staleness


@pytest.mark.parametrize(
    ("part", "says"),
    [("sources", "implementation"), ("cases", "cases have changed"), ("fault", "patch or its place")],
)
def test_a_record_is_stale_when_what_it_rests_on_has_changed(part: str, says: str) -> None:
    found = outcome("label-kept", catch())
    assert record.stale(found, TODAY) == ""
    assert says in record.stale(found, TODAY.model_copy(update={part: "other"}))
    assert record.stale(None, TODAY) == "was never measured"


def test_of_adapters_only_what_the_bundled_implementation_uses_counts() -> None:
    root = Path(grounds.__file__).parent
    adapters = root / "worker" / "adapters"
    others = [path for path in root.rglob("*.py") if adapters not in path.parents]
    used = {
        name for path in others for name in re.findall(r"worker\.adapters\.(\w+) import", path.read_text())
    }
    counted = {
        path.stem
        for path in adapters.glob("[a-z]*.py")
        if not f"conformance/worker/adapters/{path.name}".startswith(grounds.OF_ENGINES)
    }
    assert counted == used
    assert used


def test_what_an_outcome_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = registry()["label-kept"]
    one, two = select(QUICK[:1]).cases, select(QUICK).cases
    before = record.basis(fault, one)
    assert record.basis(fault, one) == before
    assert record.basis(fault, two).cases != before.cases
    assert record.basis(registry()["index-by-tool"], one).fault != before.fault  # another place
    assert record.basis(replace(fault, written_in="conformance.faults.lora"), one).fault != before.fault
    with pytest.raises(RecordError, match="no-such-fault has no entry"):
        record.basis(replace(fault, id="no-such-fault"), one)


def test_a_record_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "faults.json"
    record.write(FaultsFile(faults=(outcome("label-kept"),)), path)
    assert record.read(path).of("label-kept") is not None
    data = json.loads(path.read_text())
    data["faults"][0]["last"]["detected"] = True
    path.write_text(json.dumps(data))
    with pytest.raises(RecordError, match="was changed by hand"):
        record.read(path)
    for text in ("{}x", '{"schema_version": 1}'):
        path.write_text(text)
        with pytest.raises(RecordError, match=r"is not what .* writes; write another file"):
            record.read(path)
    with pytest.raises(RecordError, match="cannot be read"):
        record.read(tmp_path / "none.json")


def test_the_committed_record_is_one_of_faults_that_exist() -> None:
    """Whether it still holds is for `conformance faults check`, which the nightly run asks."""
    file = record.read(record.default_path())
    assert file.selection == ()
    assert {found.fault for found in file.faults} <= registry().keys()
    for found in file.faults:
        assert found.level == LEVEL_OF_KIND[registry()[found.fault].kind]


# ------------------------------------------------------------------------------------------- measuring


class Processes:
    """In place of an executor: writes what the process of a fault would, or nothing."""

    def __init__(self, dead: Sequence[str] = (), basis: Basis | None = None) -> None:
        self.dead = dead
        self.basis = basis
        self.started: list[str] = []

    def __call__(self, workers: int = 1) -> Processes:
        return self

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        for job in jobs:
            self.started.append(job.name)
            if job.name not in self.dead:
                fault = registry()[job.name]
                found = Found(
                    fault=fault.id,
                    basis=self.basis or record.basis(fault, select(QUICK).cases),
                    cases=2,
                    asked=2,
                    seconds=1.0,
                    at=AT,
                    commit="c1",
                    caught=(catch(fault.kind, fault.area),),
                )
                job.run_file.parent.mkdir(parents=True, exist_ok=True)
                job.run_file.write_text(found.model_dump_json())
            yield Ended(job, 0 if job.name not in self.dead else -11, 1.0, "the last words")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    cases = select(QUICK).cases
    clean = Clean(left_out={}, functions=(), passed={case.address: () for case in cases})
    monkeypatch.setattr(measuring, "clean_run", lambda plan, today: (clean, tmp_path / "clean.json"))
    monkeypatch.setattr(written, "unwritten", lambda faults: [])
    faults = [registry()[name] for name in ("label-kept", "double-bos")]
    return Plan(faults, QUICK, cases, tmp_path / "faults.json", tmp_path / "work")


def test_a_fault_is_measured_once_and_again_when_asked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    monkeypatch.setattr(measuring, "LocalExecutor", processes)
    told: list[str] = []
    file = measure(plan, progress=lambda found: told.append(found.fault))
    assert processes.started == told == ["label-kept", "double-bos"]
    assert [found.fault for found in file.faults] == ["label-kept", "double-bos"]
    assert measure(plan).digest == file.digest
    assert processes.started == told
    measure(replace(plan, faults=plan.faults[:1], again=True))
    assert processes.started == [*told, "label-kept"]
    assert len(record.read(plan.out).faults) == 2


def test_a_fault_is_first_measured_when_its_place_is_committed(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def only_the_other(faults: dict[str, Place]) -> list[str]:
        asked.extend(faults)
        return [name for name in faults if name == "label-kept"]

    processes = Processes()
    monkeypatch.setattr(measuring, "LocalExecutor", processes)
    monkeypatch.setattr(written, "unwritten", only_the_other)
    with pytest.raises(RecordError, match=r"places label-kept otherwise.*commit it before the first"):
        measure(plan)
    assert processes.started == []
    measure(replace(plan, faults=plan.faults[1:]))
    assert processes.started == ["double-bos"]
    asked.clear()
    measure(replace(plan, faults=plan.faults[1:], again=True))
    assert asked == [], "what was measured once is not asked about again"


def test_a_measurement_that_was_ended_goes_on_from_what_processes_found(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Processes()
    monkeypatch.setattr(measuring, "LocalExecutor", first)
    measure(plan)
    plan.out.unlink()  # as if the record had not been written yet
    second = Processes()
    monkeypatch.setattr(measuring, "LocalExecutor", second)
    file = measure(plan)
    assert second.started == []
    assert all(found.last.detected for found in file.faults)


def test_a_process_that_dies_costs_its_own_fault(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LocalExecutor", Processes(dead=("label-kept",)))
    dead, alive = measure(plan).faults
    assert dead.last.reason == "its process was killed by SIGSEGV: the last words"
    assert dead.last.crash_only
    assert alive.last.detected


def test_what_was_found_in_edited_sources_does_not_count(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LocalExecutor", Processes(basis=TODAY))
    for found in measure(plan).faults:
        assert found.last.reason == "sources or cases were changed while it was measured"
        assert not found.last.detected
        today = record.basis(registry()[found.fault], plan.cases)
        assert record.stale(found, today) == f"its last run came to no end: {found.last.reason}"
    assert list(plan.work.iterdir()) == [], "nothing that the next measurement would take for today's"


def test_two_records_become_one() -> None:
    """Of nights, and the committed one, whichever has gone on."""

    def of(fault: str, at: str, first: str) -> FaultRecord:
        found = outcome(fault, catch())
        times = {
            "last": found.last.model_copy(update={"at": at}),
            "first": found.first.model_copy(update={"at": first}),
        }
        return found.model_copy(update=times)

    one = FaultsFile(
        faults=(of("double-bos", "2026-11-21", "2026-11-20"), of("label-kept", "2026-11-21", "2026-11-21"))
    )
    other = FaultsFile(
        selection=("parser/*",),
        faults=(
            of("label-kept", "2026-11-22", "2026-11-22"),
            of("erf-gelu-in-mlp", "2026-11-19", "2026-11-19"),
        ),
    )
    for found in (record.newest(one, other), record.newest(other, one)):
        assert found.selection == ("parser/*",), "of the newer one"
        times = {entry.fault: (entry.last.at, entry.first.at) for entry in found.faults}
        assert times == {
            "double-bos": ("2026-11-21", "2026-11-20"),
            "label-kept": ("2026-11-22", "2026-11-21"),
            "erf-gelu-in-mlp": ("2026-11-19", "2026-11-19"),
        }


def test_without_a_case_that_passes_nothing_is_measured(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Clean(left_out={"skip": 2}, functions=(), passed={})
    monkeypatch.setattr(measuring, "clean_run", lambda plan, today: (nothing, Path("clean.json")))
    with pytest.raises(UsageError, match=r"no case passes without a fault.*clean.json"):
        measure(plan)


def test_a_clean_run_is_made_once_and_again_when_it_was_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Executor:
        started = 0

        def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
            for job in jobs:
                Executor.started += 1
                clean = Clean(left_out={}, functions=(), passed={"parser/x::y": ()})
                job.run_file.parent.mkdir(parents=True, exist_ok=True)
                job.run_file.write_text(clean.model_dump_json() if Executor.started != 2 else "{")
                yield Ended(job, 0, 1.0, "the last words")

    monkeypatch.setattr(measuring, "LocalExecutor", Executor)
    plan = Plan([], (), (), tmp_path / "faults.json", tmp_path / "work")
    clean, path = measuring.clean_run(plan, TODAY)
    assert measuring.clean_run(plan, TODAY) == (clean, path)
    assert Executor.started == 1
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RecordError, match=r"did not come to their end.*the last words"):
        measuring.clean_run(plan, TODAY)
    assert measuring.clean_run(plan, TODAY)[0] == clean


def test_gates_are_asked_about_what_nothing_else_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no case is that runs nothing of what the fault replaces."""
    gate, word, turn = "accuracy/nano::gsm8k-nano-d", *QUICK
    cases = select((gate, *QUICK)).cases
    (parsing,) = reach.replaced(registry()["label-flushed-at-end"]) or ()
    clean = Clean(left_out={}, functions=(parsing,), passed={gate: (0,), word: (0,), turn: ()})
    asked: list[str] = []

    def failures(chosen: Sequence[LoadedCase], known: object, pool: object) -> list[Catch]:
        asked.extend(case.address for case in chosen)
        return [catch()] if noticing and chosen else []

    monkeypatch.setattr(measuring, "failures", failures)
    noticing = True
    found = measuring.look_for(registry()["label-flushed-at-end"], cases, clean)
    assert asked == [word]
    assert (found.cases, found.asked) == (3, 1)
    noticing = False
    found = measuring.look_for(registry()["label-flushed-at-end"], cases, clean)
    assert asked == [word, word, gate]
    assert found.asked == 2


def test_command_line(run_conformance: Run, tmp_path: Path) -> None:
    """Two real faults and one that these cases cannot notice, in processes, then checked and shown."""
    common = ["--fault", "label-kept", "--fault", "no-soft-cap"]
    done = run_conformance("faults", "measure", QUICK[0], *common, "--out", "f.json", "--json")
    assert done.returncode == 1, done.stderr
    rows = {row["fault"]: row for row in validated("faults-measure", done)["faults"]}
    assert rows["label-kept"]["last"]["detected"]
    assert rows["label-kept"]["localised"]
    assert rows["label-kept"]["last"]["kinds"] == {"parser": 1}
    assert not rows["no-soft-cap"]["last"]["detected"]
    assert "no-soft-cap: NOT NOTICED by 1 cases, of which 0 were asked" in done.stderr
    assert validated("faults-check", run_conformance("faults", "check", "f.json", *common, "--json")) == {
        "file": "f.json", "faults": 2, "stale": [], "gone": [],
    }  # fmt: skip
    rest = run_conformance("faults", "check", "f.json", "--class", "reasoning-parser")
    assert rest.returncode == 3
    assert "6 to be measured, as each was never measured: label-flushed-at-end" in rest.stdout
    shown = run_conformance("faults", "show", "f.json")
    assert shown.returncode == 0
    assert "no-soft-cap: NOT NOTICED" in shown.stdout
    wrong = run_conformance("faults", "check", "f.json", "--fault", "label-kept", "--class", "lora")
    assert wrong.returncode == 2
