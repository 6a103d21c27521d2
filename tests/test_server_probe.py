"""`conformance probe` through its front door: verdicts, exit codes, and files without the key."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest

from conformance import runfile
from conformance.commands.output import AreaCounts, RunOutput
from conformance.commands.probe import _area_verdicts
from conformance.commands.schema import schemas
from conformance.results import Verdict
from tests.conftest import Run
from tests.lying_server import LyingServer
from tests.server_answers import MODEL

KEY = "sk-probe-0123456789"
AREAS = {
    "server-concurrency",
    "server-errors",
    "server-images",
    "server-json",
    "server-limits",
    "server-logprobs",
    "server-text",
    "server-thinking",
    "server-tools",
}


def probe(run: Run, server: LyingServer, *more: str, key: str = KEY, **variables: str) -> dict[str, object]:
    done = run(
        "probe", server.url, "--model", MODEL, "--json", *more, env={"OPENAI_API_KEY": key} | variables
    )
    value = json.loads(done.stdout)
    jsonschema.Draft202012Validator(schemas()["probe"]()).validate(value)
    assert done.returncode == value["exit_code"], done
    assert KEY not in done.stdout + done.stderr
    return value


def verdicts(found: dict[str, object]) -> dict[str, str]:
    areas = found["areas"]
    assert isinstance(areas, list)
    return {row["area"]: row["verdict"] for row in areas}


def assert_no_key(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_an_honest_server_passes_in_every_area(run_conformance: Run, tmp_path: Path) -> None:
    with LyingServer(key=KEY) as server:
        found = probe(run_conformance, server)
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.seen)
    assert found["exit_code"] == 0
    assert verdicts(found) == dict.fromkeys(AREAS, "pass") | {"server-tuned": "not run"}  # it has no adapter
    rows = found["preflight"]
    assert isinstance(rows, list)
    assert [row["ok"] for row in rows] == [True, True, True]
    summary = found["run"]
    assert isinstance(summary, dict)
    run = runfile.read(tmp_path / summary["run_file"])
    spec = f"openai@{server.url}#{MODEL}"
    assert set(run.header.targets) == {spec}
    assert [row.model_dump() for row in run.header.preflight] == rows
    index = (tmp_path / str(summary["site"])).read_text(encoding="utf-8")
    assert all(area in index for area in AREAS)
    assert all(row["name"] in index for row in rows)
    assert_no_key(tmp_path)


def test_lies_fail_and_the_key_stays_out_of_every_file(run_conformance: Run, tmp_path: Path) -> None:
    with LyingServer("marker-leaked", key=KEY) as server:
        cases = ("--suites", "server/text", "--suites", "server/errors::no-messages")
        found = probe(run_conformance, server, *cases)
    assert found["exit_code"] == 1
    assert verdicts(found) == {"server-text": "fail", "server-errors": "pass"}
    assert_no_key(tmp_path)


def test_a_model_without_calls_is_inconclusive(run_conformance: Run) -> None:
    with LyingServer("never-calls") as server:
        found = probe(run_conformance, server, "--suites", "server/limits::cut-call", "--no-report")
    assert found["exit_code"] == 3
    assert verdicts(found) == {"server-limits": "inconclusive"}


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({"pass": 2}, "pass"),
        ({"pass": 1, "xfail": 2}, "pass"),
        ({"xfail": 2}, "not run"),
        ({"skip": 1}, "not run"),
        ({"pass": 1, "inconclusive": 1}, "inconclusive"),
        ({"pass": 1, "fail": 1}, "fail"),
    ],
)
def test_an_area_passes_only_if_a_case_of_it_does(counts: dict[Verdict, int], verdict: str) -> None:
    summary = RunOutput(
        run_file="run.jsonl",
        site=None,
        exit_code=0,
        complete=True,
        planned=sum(counts.values()),
        areas=(AreaCounts(target="t", area="server-text", counts=counts),),
        problems=(),
        unavailable={},
    )
    assert [row.verdict for row in _area_verdicts(summary)] == [verdict]


def test_a_chat_that_does_not_work_ends_the_probe(run_conformance: Run, tmp_path: Path) -> None:
    with LyingServer("key-echoed-in-an-error") as server:
        found = probe(run_conformance, server)
        assert len(server.seen) == 2
    assert found["exit_code"] == 1
    assert found["run"] is None
    assert not list(tmp_path.iterdir())


def assert_wrong_use(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr


def test_what_cannot_be_probed_is_wrong_use(run_conformance: Run) -> None:
    with LyingServer(key=KEY) as server:
        key = {"OPENAI_API_KEY": KEY}
        done = run_conformance("probe", server.url, "--model", "other", env=key)
        assert_wrong_use(done, "does not list the model 'other'; it lists scripted")
        done = run_conformance("probe", server.url, "--model", MODEL, env={"OPENAI_API_KEY": "sk-wrong-key"})
        assert_wrong_use(done, "answers HTTP 401")
        done = run_conformance("probe", server.url, "--model", MODEL, "--key-variable", "NO_SUCH", env=key)
        assert_wrong_use(done, "NO_SUCH is not set")
        done = run_conformance("probe", server.url, "--model", MODEL, "--suites", "parser/reasoning", env=key)
        assert_wrong_use(done, "is of kind parser")
    done = run_conformance("probe", server.url, "--model", MODEL, env=key)
    assert_wrong_use(done, "cannot be reached")


@pytest.mark.parametrize("words", [("preflight", "the model is listed", "server-text", "pass", "dashboard:")])
def test_for_people(run_conformance: Run, words: tuple[str, ...]) -> None:
    with LyingServer(key=KEY) as server:
        arguments = ("probe", server.url, "--model", MODEL, "--key-variable", "SECRET_OF_MINE")
        done = run_conformance(*arguments, "--suites", "server/text", env={"SECRET_OF_MINE": KEY})
    assert done.returncode == 0, done
    assert all(word in done.stdout for word in words)
    assert KEY not in done.stdout + done.stderr


def test_a_server_can_be_run_beside_other_targets(run_conformance: Run) -> None:
    with LyingServer(key=KEY) as server:
        spec = f"openai@{server.url}#{MODEL}"
        arguments = ("run", "server/json", "--target", spec, "--target", "reference", "--no-report", "--json")
        done = run_conformance(*arguments, env={"OPENAI_API_KEY": KEY})
    assert done.returncode == 0, done
    counts = {row["target"]: row["counts"] for row in json.loads(done.stdout)["areas"]}
    assert counts == {spec: {"pass": 4}, "reference": {"skip": 4}}
