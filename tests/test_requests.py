"""`conformance requests`: what an engine elsewhere is asked, and the verdict on its answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conformance import runfile
from conformance.commands.requests import _copied
from conformance.commands.schema import schemas
from conformance.errors import EngineError, UsageError
from conformance.targets.openai import open_endpoint
from conformance.targets.protocol import (
    GenerateRequest,
    ParseRequest,
    RenderRequest,
    ServeRequest,
    StreamRequest,
)
from conformance.targets.reference import ReferenceTarget
from tests.conftest import Run
from tests.lying_server import LyingServer
from tests.recorded import HEADER, results, write
from tests.server_answers import MODEL


def answered(text: str, *, target: Any, name: str = "mine") -> list[dict[str, Any]]:
    """What an engine's team writes: the same lines with answers."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        if line["type"] == "header":
            line["target"] |= {"name": name, "version": "1.2"}
            continue
        request = line.pop("request")
        try:
            if line["type"] == "parse":
                line["result"] = target.parse(ParseRequest(**request)).model_dump()
            elif line["type"] == "parse_stream":
                streams = StreamRequest(request=request, chunkings=line["chunkings"])
                line["result"] = [stream.model_dump() for stream in target.parse_stream(streams)]
            elif line["type"] == "render":
                line["result"] = target.render(RenderRequest(**request)).model_dump()
            elif line["type"] == "generate":
                line["result"] = target.generate(GenerateRequest(**request)).model_dump()
            else:
                line["result"] = [answer.model_dump() for answer in target.serve(ServeRequest(**request))]
        except EngineError as error:
            line["error"] = {"message": str(error)}
    return lines


def test_requests_answered_elsewhere_are_judged(run_conformance: Run, tmp_path: Path) -> None:
    cases = ("parser/typing", "template/calls")
    printed = run_conformance("requests", *cases)
    assert printed.returncode == 0, printed
    validator = jsonschema.Draft202012Validator(schemas()["requests"]())
    for line in printed.stdout.splitlines():
        validator.validate(json.loads(line))
    write(tmp_path / "answers.jsonl", *answered(printed.stdout, target=ReferenceTarget()))
    done = run_conformance("run", *cases, "-t", "replay@answers.jsonl", "--no-report", "--out", "run.jsonl")
    assert done.returncode == 0, done
    found = results(tmp_path, "run.jsonl")
    assert {result.verdict for result in found.values()} == {"pass"}
    assert runfile.read(tmp_path / "run.jsonl").header.targets["replay@answers.jsonl"].name == "mine"
    assert run_conformance("requests", *cases, "--answered", "answers.jsonl").stdout == ""


def test_requests_in_characters(run_conformance: Run, tmp_path: Path) -> None:
    case = "parser/reasoning::label-dropped"
    tokens, characters = (
        [json.loads(x) for x in run_conformance("requests", case, *more).stdout.splitlines()]
        for more in ((), ("--stream-unit", "characters"))
    )
    assert {c["unit"] for line in tokens for c in line.get("chunkings", ())} == {"tokens"}
    assert {c["unit"] for line in characters for c in line.get("chunkings", ())} == {"tokens", "characters"}
    text = "\n".join(map(json.dumps, characters))
    write(tmp_path / "answers.jsonl", *answered(text, target=ReferenceTarget()))
    assert run_conformance("run", case, "-t", "replay@answers.jsonl", "--no-report").returncode == 0


def test_a_servers_requests_are_answered_in_rounds(run_conformance: Run, tmp_path: Path) -> None:
    cases = ("server/limits", "server/concurrency", "server/text::plain", "server/errors")
    path = tmp_path / "answers.jsonl"
    with LyingServer() as server:
        target = open_endpoint(f"openai@{server.url}#{MODEL}", timeout=20)
        text = run_conformance("requests", *cases, "-c", "serve").stdout
        rounds = 0
        while text:
            rounds += 1
            with path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in answered(text, target=target))
            text = run_conformance("requests", *cases, "--answered", path).stdout
    assert 3 <= rounds <= 12
    done = run_conformance("run", *cases, "-t", "replay@answers.jsonl", "--no-report")
    assert done.returncode == 0, done


def test_requests_to_generate_come_with_their_checkpoint(run_conformance: Run, tmp_path: Path) -> None:
    case = "generation/scripted::batch"
    refused = run_conformance("requests", case, "-c", "generate")
    assert refused.returncode == 2
    assert "name a folder for them with --files" in refused.stderr
    text = run_conformance("requests", case, "-c", "generate", "--files", "files").stdout
    header, line = (json.loads(x) for x in text.splitlines())
    assert (tmp_path / "files" / line["request"]["checkpoint"] / "config.json").is_file()
    line["request"]["checkpoint"] = str(tmp_path / "files" / line["request"]["checkpoint"])
    text = "\n".join(map(json.dumps, [header, line]))
    write(tmp_path / "answers.jsonl", *answered(text, target=ReferenceTarget()))
    done = run_conformance("run", case, "-t", "replay@answers.jsonl", "--no-report")
    assert done.returncode == 0, done


def test_files_of_requests_are_whole_copies(tmp_path: Path) -> None:
    source, files = tmp_path / "model", tmp_path / "files"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "config.json").write_text("{}")
    image = tmp_path / "image.png"
    image.write_bytes(b"png")
    for _ in range(2):
        assert [_copied(str(each), files) for each in (source, image)] == ["model", "image.png"]
    assert sorted(path.name for path in files.iterdir()) == ["image.png", "model"]
    (files / "model" / "inner" / "config.json").unlink()
    (files / "image.png").write_bytes(b"gnp")
    for each in (source, image):
        with pytest.raises(
            UsageError, match=rf"{each.name} is there and is no copy of .*name an empty folder"
        ):
            _copied(str(each), files)


def test_an_interrupted_copy_does_not_pass_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, files = tmp_path / "model", tmp_path / "files"
    source.mkdir()
    for name in ("one", "two"):
        (source / name).write_text(name)

    def interrupted(source: Path, target: Path) -> None:
        target.mkdir()
        shutil.copy(source / "one", target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _copied(str(source), files)
    assert list(files.iterdir()) == []
    assert _copied(str(source), files) == "model"
    assert sorted(path.name for path in (files / "model").iterdir()) == ["one", "two"]


def test_requests_do_not_mix_with_options_of_the_recording(run_conformance: Run, tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", HEADER)
    done = run_conformance("requests", "parser/typing", "--answered", "r.jsonl", "-c", "parse")
    assert done.returncode == 2
    assert "header names capabilities" in done.stderr
