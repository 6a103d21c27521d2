"""Run files: written line by line, read back whole, resumed without a difference."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from conformance import __version__, runfile
from conformance.commands.schema import schemas
from conformance.errors import RunFileError
from conformance.results import Footer, Header, PlannedCase, Result
from conformance.targets.protocol import TargetInfo

INFO = TargetInfo(name="fake", version="1.0", capabilities=("parse",))


def header(**changes: object) -> Header:
    base = Header(run_id="run-1", started="2026-01-01T00:00:00Z", harness=__version__, targets={"fake": INFO})
    return base.model_copy(update=changes)


def result(case: str = "one", **changes: object) -> Result:
    base = Result(
        suite="parser/demo",
        case=case,
        target="fake",
        kind="parser",
        area="demo",
        verdict="pass",
        digest="d1",
        repeat="conformance run …",
    )
    return base.model_copy(update=changes)


FOOTER = Footer(finished="2026-01-01T00:01:00Z", duration=60.0, counts={"fake": {"pass": 1}}, exit_code=0)


def write(path: Path, *lines: Header | Result | Footer, resume: bool = False) -> Path:
    with runfile.RunWriter(path, resume=resume) as writer:
        for line in lines:
            writer.write(line)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    lines = (header(), result("one", reason="“ünïcode” \x85 \u2028 line"), result("two"), FOOTER)
    run = runfile.read(write(tmp_path / "deep" / "run.jsonl", *lines))
    assert (run.header, *run.results, run.footer) == lines
    assert run.torn == ""


def test_every_line_fits_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header(), result(), FOOTER)
    validator = jsonschema.Draft202012Validator(schemas()["run-file"]())
    for line in path.read_text(encoding="utf-8").splitlines():
        validator.validate(json.loads(line))
    assert not validator.is_valid({"type": "result"})


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_reported_and_ignored(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "run.jsonl", header(), result("one"), result("two"))
    path.write_bytes(path.read_bytes()[:-cut])
    run = runfile.read(path)
    assert [r.case for r in run.results] == ["one"]
    assert run.torn.startswith("line 3 was cut off after ")


def test_resuming_cuts_the_torn_line_off_and_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header(), result("one"), result("two"))
    path.write_bytes(path.read_bytes()[:-30])
    write(path, header(resumed_from="run-1"), result("two", verdict="fail"), FOOTER, resume=True)
    run = runfile.read(path)
    assert [(r.case, r.verdict) for r in run.results] == [("one", "pass"), ("two", "fail")]
    assert (run.torn, run.footer, run.header.resumed_from) == ("", FOOTER, "run-1")


def test_headers_are_merged(tmp_path: Path) -> None:
    entry = PlannedCase(
        suite="parser/demo",
        case="one",
        target="fake",
        kind="parser",
        area="demo",
        title="t",
        source=(),
        digest="d",
    )
    newer = INFO.model_copy(update={"version": "2.0"})
    path = write(
        tmp_path / "run.jsonl",
        header(targets={}, manifest=(entry,)),
        header(targets={"fake": INFO}),
        header(targets={"fake": newer, "other": INFO}, manifest=(entry.model_copy(update={"case": "two"}),)),
    )
    merged = runfile.read(path).header
    assert merged.targets == {"fake": newer, "other": INFO}
    assert [planned.case for planned in merged.manifest] == ["one", "two"]


BROKEN = {
    "no header": ([result()], r":1: a run file begins with its header"),
    "after the end": ([header(), FOOTER, result()], r":3: a line follows the run's last line"),
    "another run": ([header(), header(run_id="run-2")], r":2: run run-2 inside the file of run-1"),
    "another format": ([header(schema_version=99)], r":1: schema version 99; this harness reads 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_file_names_its_line(tmp_path: Path, name: str) -> None:
    lines, message = BROKEN[name]
    with pytest.raises(RunFileError, match=message):
        runfile.read(write(tmp_path / "run.jsonl", *lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no complete header"),
        ("{", "no complete header; line 1 was cut off"),
        ("{}\n", r":1: .*this is not a run file"),
        ("not json\n", r":1: .*this is not a run file"),
        ('{"type": "result"}\n', r":1: result\.suite: "),
    ],
)
def test_not_a_run_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(RunFileError, match=message):
        runfile.read(tmp_path / "run.jsonl")


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header(), result("one"), result("two"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-30] + b"\n" + lines[2])
    with pytest.raises(RunFileError, match=r":2: "):
        runfile.read(path)


def test_a_new_run_never_overwrites(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header())
    with pytest.raises(RunFileError, match=r"run\.jsonl exists; go on with it by --resume"):
        runfile.RunWriter(path)
    with pytest.raises(RunFileError, match="no such run to resume"):
        runfile.RunWriter(tmp_path / "other.jsonl", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunFileError, match="this folder cannot be made"):
        runfile.RunWriter(tmp_path / "file" / "run.jsonl")


def test_two_writers_cannot_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with runfile.RunWriter(path) as writer:
        writer.write(header())
        with pytest.raises(RunFileError, match="being written by another run"):
            runfile.RunWriter(path, resume=True)
    runfile.RunWriter(path, resume=True).close()


@pytest.mark.parametrize(
    ("changes", "digest", "version", "reusable"),
    [
        ({}, "d1", "1.0", True),
        ({"verdict": "fail"}, "d1", "1.0", True),
        ({"verdict": "skip"}, "d1", "1.0", True),
        ({"verdict": "error"}, "d1", "1.0", False),
        ({"verdict": "timeout"}, "d1", "1.0", False),
        ({}, "d2", "1.0", False),
        ({}, "d1", "1.1", False),
    ],
)
def test_what_is_reused(
    tmp_path: Path, changes: dict[str, str], digest: str, version: str, reusable: bool
) -> None:
    path = write(tmp_path / "run.jsonl", header(), result(**changes))
    stored = runfile.read_stored(path)["parser/demo", "one", "fake"]
    assert stored.reusable(digest, version) is reusable


def test_results_of_another_harness_are_not_reused(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header(harness="0.0.1"), result())
    assert not runfile.read_stored(path)["parser/demo", "one", "fake"].reusable("d1", "1.0")


def test_a_result_keeps_the_version_that_gave_it(tmp_path: Path) -> None:
    newer = INFO.model_copy(update={"version": "2.0"})
    lines = (header(), result("one"), header(targets={"fake": newer}), result("two"))
    stored = runfile.read_stored(write(tmp_path / "run.jsonl", *lines))
    assert stored["parser/demo", "one", "fake"].target_version == "1.0"
    assert stored["parser/demo", "two", "fake"].target_version == "2.0"
