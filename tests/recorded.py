"""Recordings for tests: made, written by hand, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance import runfile
from conformance.results import Result
from conformance.targets.protocol import ParseRequest, Piece
from conformance.targets.recordings import request_key
from tests.conftest import Run

REQUEST = ParseRequest(
    output="Hello.", pieces=(Piece(text="Hello", ids=(7,)), Piece(text=".", ids=(8,))), prompt=""
)
OTHER = REQUEST.model_copy(update={"thinking": True})
HEADER = {
    "type": "header",
    "version": 1,
    "target": {"name": "mine", "version": "1.2", "capabilities": ["parse"]},
}


def results(folder: Path, run_file: str) -> dict[str, Result]:
    """What the two runs must have in common, by case."""
    run = runfile.read(folder / run_file)
    own = {"target": "", "duration": 0.0, "repeat": "", "stderr": ""}
    return {f"{r.suite}::{r.case}": r.model_copy(update=own) for r in run.results}


def record_and_replay(
    run: Run, folder: Path, target: str, *cases: str, **variables: str
) -> tuple[dict[str, Result], dict[str, Result]]:
    """Results of a recorded run, and of its replay."""
    common = ("run", *cases, "--no-report")
    first = run(*common, "-t", target, "--record", "answers.jsonl", "--out", "live.jsonl", env=variables)
    again = run(*common, "-t", "replay@answers.jsonl", "--out", "replayed.jsonl")
    assert first.returncode == again.returncode != 2, (first, again)
    return results(folder, "live.jsonl"), results(folder, "replayed.jsonl")


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def parse_line(asked: ParseRequest = REQUEST, **fields: Any) -> dict[str, Any]:
    answer = fields or {"result": {"content": "Hello."}}
    return {"type": "parse", "key": request_key("parse", asked)} | answer
