"""`conformance gate` through the front door: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conformance import fingerprint, runfile
from conformance.cli import invoke
from conformance.commands.schema import schemas
from conformance.gates import baseline
from conformance.scoring import Sheet
from tests.conftest import Run
from tests.gate_sheets import arms, changed, sheet
from tests.test_gates_cases import ITEMS, write_suite

SOLVER = "gate_targets:Solver"


def checked(text: str, schema: str) -> dict[str, Any]:
    """The JSON that a command printed, checked against its schema."""
    found: dict[str, Any] = json.loads(text)
    jsonschema.validate(found, schemas()[schema]())
    return found


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A suite with its reference, made by the command."""
    return write_suite(tmp_path)


def test_from_the_first_reference_to_a_verdict(reference: Path, run_conformance: Run, tmp_path: Path) -> None:
    """Plan, make a reference, pass, fail, refuse to replace it, and replace it."""
    case = f"{reference}::sums"

    plan = run_conformance("gate", "plan", case)
    assert plan.returncode == 0, plan.stderr
    assert "reaches its margin" in plan.stdout
    assert "least drop that fails with this power (MDE):" in plan.stdout

    early = run_conformance("gate", "run", reference, "-t", SOLVER)
    assert early.returncode == 2
    assert "there is no such reference; make it by `conformance gate rebaseline`" in early.stderr

    hasty = run_conformance("gate", "rebaseline", case, "-t", "no-such-target", "--reason", "new")
    assert hasty.returncode == 2
    assert "say why in 8 characters or more" in hasty.stderr

    # This tree may have changes that are not committed yet.
    made = run_conformance(
        *("gate", "rebaseline", case, "-t", SOLVER, "--reason", "The first one.", "--allow-dirty", "--json")
    )
    assert made.returncode == 0, made.stderr
    assert checked(made.stdout, "gate-rebaseline") == {
        "reference": str(reference.parent / "references" / "sums.jsonl"),
        "record": str(reference.parent / "references" / "sums.baseline.json"),
        "replaced": True,
        "decision": None,
        "total_drop": None,
    }

    sheets = tmp_path / "sheets"
    good = run_conformance("gate", "run", reference, "-t", SOLVER, "--sheets", sheets, "--out", "good.jsonl")
    assert good.returncode == 0, good.stderr
    assert "pass: 100.0% of 60 items are right, 100.0% of the reference's" in good.stdout
    assert f"{ITEMS} of {ITEMS} items" in good.stderr
    (written,) = sheets.iterdir()
    (result,) = runfile.read(tmp_path / "good.jsonl").results
    assert result.evidence.accuracy is not None
    assert Sheet.read(written) == result.evidence.accuracy.sheet

    worse = run_conformance(
        *("gate", "run", reference, "-t", SOLVER, "--json", "--sheets", sheets),
        env={"GATE_WRONG": "0.6"},
    )
    assert worse.returncode == 1, worse.stderr
    found = checked(worse.stdout, "gate-run")
    (gate,) = found["gates"]
    assert gate["verdict"] == "fail"
    assert gate["decision"]["reasons"] == ["drop", "alarm"]

    bad = Path(gate["sheet"])
    again = ("gate", "rebaseline", case, "--sheet", bad, "--allow-dirty", "--reason")
    refused = run_conformance(*again, "It fails, so there.")
    assert refused.returncode == 1
    assert "NOT replaced; look into it, or give --accept-drop" in refused.stdout
    path = reference.parent / "references" / "sums.jsonl"
    assert len(baseline.history(path).entries) == 1

    forced = run_conformance(*again, "Known and accepted.", "--accept-drop")
    assert forced.returncode == 0, forced.stderr
    entries = baseline.history(path).entries
    assert entries[1].comparison is not None
    assert entries[1].comparison.verdict == "fail"
    assert entries[1].accepted
    assert baseline.read(path) == Sheet.read(bad)


@pytest.fixture
def gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`conformance gate …` in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = invoke(["gate", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


Gate = Callable[..., tuple[int, str, str]]


def test_compare(tmp_path: Path, gate: Gate) -> None:
    for name, each in zip(("a", "b"), arms(888, 12, 2, 98), strict=True):
        each.write(tmp_path / f"{name}.jsonl")
    code, out, _ = gate("compare", "a.jsonl", "b.jsonl", "--margin", "0.02", "--json")
    assert code == 1
    found = checked(out, "gate-compare")
    assert found["decision"]["verdict"] == "fail"
    assert found["plan"]["reaches"] is True

    code, out, _ = gate("compare", "b.jsonl", "a.jsonl", "--margin", "0.02")
    assert code == 0
    assert "gained: doc-888, doc-889" in out

    code, out, _ = gate("compare", "a.jsonl", "b.jsonl", "--margin", "0.012", "--floor", "0.011")
    assert code == 3
    assert "CANNOT reach its margin" in out


def worse(whole: Sheet, count: int) -> Sheet:
    """The sheet with so many more right answers changed to wrong ones."""
    numbers = [number for number, each in enumerate(whole.items) if each.outcome == "correct"][:count]
    for number in numbers:
        whole = changed(whole, number, outcome="wrong", extracted="7")
    return whole


def test_small_drops_do_not_add_up_unnoticed(reference: Path, gate: Gate, tmp_path: Path) -> None:
    """Three times four points of a margin of ten: each passes, and the third is refused."""
    case = f"{write_suite(tmp_path, max_new_tokens=None, gate={'margin': 0.1, 'floor': 0.09, 'items': 500})}"
    answers = sheet([True] * 500, task="nano_gsm8k", thinking=False, checkpoint="scripted", commit="abc")
    for number in range(4):
        worse(answers, 20 * number).write(tmp_path / f"{number}.jsonl")

    def replace(number: int, *more: str) -> tuple[int, str, str]:
        name = str(tmp_path / f"{number}.jsonl")
        return gate("rebaseline", f"{case}::sums", "--sheet", name, "--reason", "A little worse.", *more)

    assert replace(0)[0] == 0
    assert replace(1)[0] == 0
    code, out, _ = replace(2, "--json")
    assert code == 0
    assert checked(out, "gate-rebaseline")["total_drop"] == pytest.approx(0.08)
    code, out, _ = replace(3)
    assert code == 1
    assert "drops of its history add up to 12 points (margin 10 points): together they must not pass" in out
    assert replace(3, "--accept-drop")[0] == 0
    entries = baseline.history(reference.parent / "references" / "sums.jsonl").entries
    assert [entry.accepted for entry in entries] == [False, False, False, True]


def test_a_new_reference_may_have_other_words(reference: Path, gate: Gate, tmp_path: Path) -> None:
    """It is made because answers have changed; how much worse they are is what is judged."""
    rule = {"margin": 0.1, "floor": 0.09, "items": 500, "max_texts_differ": 0.0}
    case = f"{write_suite(tmp_path, max_new_tokens=None, gate=rule)}::sums"
    old = sheet([True] * 500, task="nano_gsm8k", thinking=False, checkpoint="scripted", commit="abc")
    changed(old, 0, answer="Let me see. 1").write(tmp_path / "new.jsonl")
    old.write(tmp_path / "old.jsonl")
    for name in ("old", "new"):
        code, out, err = gate(
            "rebaseline", case, "--sheet", str(tmp_path / f"{name}.jsonl"), "--reason", "For this test."
        )
        assert code == 0, err
    assert "1 answers have other words" in out
    code, out, _ = gate("compare", str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl"), "--case", case)
    assert code == 1
    assert "More answers than declared have other words" in out


def test_references_are_made_of_committed_sources(
    reference: Path, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = reference.parent / "references" / "sums.jsonl"
    monkeypatch.setattr(fingerprint, "git_commit", lambda **_options: "abc+dirty")
    for more in ((), ("--sheet", "a.jsonl")):
        answers = sheet([True] * 60, task="nano_gsm8k", thinking=False, commit="abc+dirty")
        answers.write(tmp_path / "a.jsonl")
        code, _, err = gate("rebaseline", f"{reference}::sums", "--reason", "From a change.", *more)
        assert code == 2
        assert "(abc+dirty), so nobody could make this reference again; commit first" in err
        assert not path.exists()


def test_clusters_that_are_not_declared_are_measured(tmp_path: Path, gate: Gate) -> None:
    names = [f"kind-{n // 100}" for n in range(1000)]
    sheet([True] * 1000, clusters=names).write(tmp_path / "a.jsonl")
    sheet([n >= 10 for n in range(1000)], clusters=names).write(tmp_path / "b.jsonl")
    code, out, _ = gate("compare", "a.jsonl", "b.jsonl", "--margin", "0.02")
    assert code == 3
    assert "design effect of 10 clusters: " in out
    code, out, _ = gate("compare", "a.jsonl", "b.jsonl", "--margin", "0.02", "--clusters", "all")
    assert code == 1
    assert "exact McNemar). " in out


def test_wrong_use(tmp_path: Path, gate: Gate) -> None:
    sheet([True] * 5).write(tmp_path / "a.jsonl")
    sheet([True] * 5, task="products").write(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("{}\n")
    for arguments, says in [
        (("compare", "a.jsonl", "b.jsonl"), "give --margin, or the gate of a case by --case"),
        (("compare", "a.jsonl", "b.jsonl", "--margin", "0.5"), "they are answers to different questions"),
        (("compare", "a.jsonl", "c.jsonl", "--margin", "0.5"), "c.jsonl:1: "),
        (("compare", "a.jsonl", "none.jsonl", "--margin", "0.5"), "none.jsonl: cannot be read"),
        (("compare", "a.jsonl", "a.jsonl", "--margin", "2"), "--margin: Input should be less than 1"),
        (("run", "parser/reasoning"), "no accuracy cases are named"),
        (("plan", "accuracy/published::none"), "no case 'none'"),
        (("plan", "accuracy/published::gsm8k-31b", "--discordance", "0.1"), "an unpaired gate has no"),
        (("plan", "accuracy/published::gsm8k-31b", "--items", "0"), "--items: Input should be greater"),
        (("rebaseline", "accuracy/published::gsm8k-31b", "--reason", "Never."), "has no reference"),
    ]:
        code, out, err = gate(*arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert says in err


def test_plan_of_a_gate_that_cannot_reach_its_margin(gate: Gate) -> None:
    code, out, _ = gate("plan", "accuracy/published::gsm8k-31b", "--items", "200", "--json")
    assert code == 1
    (plan,) = checked(out, "gate-plan")["plans"]
    assert plan["reaches"] is False
    assert plan["needed"] > 700
    assert plan["detectable"] > 0.04
