"""A whole night of tiny selections, no process replaced: every page of its dashboard is of that night."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from lxml import html

from conformance import backtests, runfile
from conformance.faults import record, registry
from conformance.faults.record import FaultsFile
from conformance.gates import baseline
from conformance.targets import registry as targets
from conformance.trials import record as trials
from tests.conftest import ROOT, TESTS
from tests.test_fault_records import catch, outcome
from tests.test_gates_cases import asked, write_suite
from tests.test_gates_cli import SOLVER

pytestmark = pytest.mark.xdist_group("real-night")  # one process makes the night for all tests

CASES = "parser/reasoning::label-*"
FAULT = "label-kept"
"""One that these cases notice."""
PARSERS = "sglang-parsers"
BACKTEST = "R16"
ID = "//*[@data-item]//*[@class='id']"
"""Where an entry of a list says what it is."""
MATRIX = """
title: One cheap cell, and one that needs what is not here
targets: {reference: {}}
checkpoints:
  scripted: {cases: ["generation/scripted::one-alone"]}
axes:
  attention: {own: {}, cuda-attn: {attention: FLASH_ATTN, needs: cuda}}
  layout: {single: {}}
tiers: {one: {}}
"""


def lacking(target: str) -> str:
    return targets.unavailable(targets.releases(target)[-1])


@dataclass
class Made:
    """A night and its dashboard."""

    folder: Path
    began: dt.datetime
    told: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def steps(self) -> dict[str, dict[str, Any]]:
        return {step["name"]: step for step in self.told["night"]["steps"]}

    def page(self, path: str) -> html.HtmlElement:
        return html.fromstring((self.folder / "site" / path).read_text(encoding="utf-8"))

    def rows(self, path: str, where: str = "//main//tbody/tr") -> list[str]:
        """The text of all elements that an XPath finds."""
        return [" ".join(row.text_content().split()) for row in self.page(path).xpath(where)]


def night(cwd: Path, *options: str) -> Made:
    made = Made(cwd / "night", dt.datetime.now(dt.UTC))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_"))}
    # Where the engines are is no setting of the test.
    kept |= {k: v for k, v in os.environ.items() if k == "CONFORMANCE_HOME"}
    database = ("--database", f"sqlite:///{cwd}/h.sqlite")
    done = subprocess.run(
        [sys.executable, "-m", "conformance", "nightly", *options, *database, "--out", "night", "--json"],
        cwd=cwd,
        env=kept | {"PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.stdout, done.stderr
    made.told = json.loads(done.stdout)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    cwd = tmp_path_factory.mktemp("night")
    (cwd / "matrix.yaml").write_text(MATRIX)
    # All others were measured later than it: the sample of one is this fault.
    others = []
    for name in registry():
        if name != FAULT:
            found = outcome(name, catch())
            last = found.last.model_copy(update={"at": "2199-01-01T00:00:00+00:00"})
            others.append(found.model_copy(update={"last": last}))
    record.write(FaultsFile(faults=tuple(others)), cwd / "faults.json")
    parsers = ["-t", targets.releases(PARSERS)[-1]] if not lacking(PARSERS) else []
    options = ["--ladder", PARSERS, "--backtest", BACKTEST, "--matrix", "matrix.yaml", "--tier", "one"]
    options += ["--sample", "1", "--runs", "1", "--kills", "1", "--record", "faults.json"]
    return night(cwd, CASES, "-t", "reference", *parsers, *options)


def test_every_step_ran_and_none_is_bad(made: Made) -> None:
    states = {name: step["state"] for name, step in made.steps.items()}
    for name in ("suites", "matrix", "merge", "faults-sample", "clean", "kill", "report"):
        assert states.pop(name) == "good", (name, made.steps[name]["reason"])
    assert states.pop(f"ladder-{PARSERS}") == ("not run" if lacking(PARSERS) else "good")
    reasons = [
        backtests.not_installed(entry, backtests.load())
        for entry in backtests.choose(backtests.load(), [BACKTEST])
    ]
    assert states.pop("backtests") == ("not run" if all(reasons) else "good")
    assert set(states) == {"faults-check", "gates-check", "trials-check", "checkpoints-check"}
    assert set(states.values()) <= {"good", "open"}, made.steps
    assert made.told["exit_code"] in (0, 3)


def test_the_overview_and_the_cases_are_of_the_run(made: Made) -> None:
    run = runfile.read(made.folder / "suites.jsonl")
    assert run.header.run_id in made.page("index.html").text_content()
    cases = {entry.case for entry in run.header.manifest}
    totals = made.rows("index.html", "//*[@id='results']//a[@class='total']")
    assert {int(total) for total in totals} == {len(cases)}
    assert len(cases) >= 4
    assert {page.stem for page in (made.folder / "site/cases").rglob("*.html")} == cases


def test_the_matrix_shows_the_cells(made: Made) -> None:
    assert sorted(made.rows("matrix.html", f"//*[@id='cells']{ID}")) == [
        "reference+scripted",
        "reference+scripted+cuda-attn",
    ]
    assert made.rows("cells/reference-scripted.html", ID) == ["generation/scripted::one-alone"]
    (lacking,) = (row for row in made.told["night"]["not_run"] if row["what"] == "matrix")
    assert lacking["reason"].startswith("needs CUDA")


def test_the_fault_was_measured_in_this_night(made: Made) -> None:
    known = record.read(made.folder.parent / "faults.json").of(FAULT)
    assert known is not None
    assert dt.datetime.fromisoformat(known.last.at) >= made.began.replace(microsecond=0)
    assert known.last.detected
    assert any(row.startswith(FAULT) for row in made.rows("faults.html", "//tr[@data-item]"))
    noticed = made.rows(f"faults/{FAULT}.html", ID)
    assert noticed
    assert all(row.startswith("parser/reasoning::label-") for row in noticed)


def test_trials_are_those_of_the_night(made: Made) -> None:
    found = trials.read(made.folder / "trials.json")
    assert found.clean is not None
    assert found.kill is not None
    assert (len(found.clean.runs), len(found.kill.trial.kills)) == (1, 1)
    assert len(made.rows("trials.html", "//*[@id='clean']//tbody/tr")) == 1
    assert len(made.rows("trials.html", "//*[@id='kill']//tbody/tr")) == 1


def test_changes_and_runs_are_of_the_night(made: Made) -> None:
    entries = made.told["night"]["comparison"]["entries"]
    assert {entry["state"] for entry in entries} == {"new"}
    assert len(made.rows("comparison.html", "//*[@id='new']//*[@data-item]")) == len(entries)
    shown = " ".join(made.rows("runs.html"))
    for path in (made.folder / "suites.jsonl", made.folder / "cells/reference+scripted.jsonl"):
        assert runfile.read(path).header.run_id in shown


def test_the_ladder_has_a_page(made: Made) -> None:
    if reason := lacking(PARSERS):
        pytest.skip(reason)
    version = targets.releases(PARSERS)[-1].partition("@")[2]
    page = f"ladders/{PARSERS}.html"
    assert any(row.startswith(version) for row in made.rows(page, "//*[@id='releases']//tbody/tr"))
    cases = made.rows(f"ladders/{PARSERS}/{version.replace('.', '-')}.html", ID)
    assert cases
    assert all(case.startswith("parser/reasoning::label-") for case in cases)
    # The run asked it too, so that there is something that one target alone fails.
    assert made.rows("alone.html", "//*[@data-item]")


def test_the_backtests_have_a_page(made: Made) -> None:
    step = made.steps["backtests"]
    if step["state"] == "not run":
        pytest.skip(step["reason"])
    (row,) = made.rows("backtests.html", "//*[@id='detected']//*[@data-item]")
    assert row.startswith(BACKTEST)


def test_gates_of_a_night_have_a_page(tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    answers = suite.parent / "references" / "sums.jsonl"
    baseline.store(answers, asked(suite), reason="For this test.", comparison=None)
    skipped = (
        *("ladder", "backtests", "matrix", "faults-check", "faults-sample", "gates-check", "trials-check"),
        *("checkpoints-check", "clean", "kill"),
    )
    found = night(tmp_path, str(suite), "-t", SOLVER, *(w for name in skipped for w in ("--skip", name)))
    assert found.told["exit_code"] == 0, found.told["text"]
    assert found.told["night"]["gates"] == {"pass": 1}
    assert len(found.rows("accuracy.html", "//tr[@data-item]")) == 1
