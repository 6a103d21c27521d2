"""Run files: written line by line, read back whole, resumed without a difference."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from pathlib import Path

import jsonschema
import pytest

from conformance import __version__, explain, runfile
from conformance.commands.schema import schemas
from conformance.errors import RunFileError
from conformance.results import Evidence, Footer, Header, PlannedCase, Problem, Result
from conformance.shortening import shortened_result
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


ENVIRONMENT = {"python": "3.11.9", "env:GITHUB_RUN_ID": "1"}
TODAY = {"digest": "d1", "info": INFO, "environment": ENVIRONMENT | {"env:GITHUB_RUN_ID": "2"}}


def reusable(path: Path, target: str = "fake", **today: object) -> bool:
    return runfile.read_stored(path)["parser/demo", "one", target].reusable(**(TODAY | today))


@pytest.mark.parametrize(
    ("verdict", "today", "expected"),
    [
        ("pass", {}, True),
        ("fail", {}, True),
        ("skip", {}, True),
        ("error", {}, False),
        ("timeout", {}, False),
        ("pass", {"digest": "d2"}, False),
        ("pass", {"info": INFO.model_copy(update={"version": "1.1"})}, False),
        ("pass", {"info": INFO.model_copy(update={"environment": {"torch": "2.14"}})}, False),
        ("pass", {"environment": ENVIRONMENT | {"python": "3.12.1"}}, False),
    ],
)
def test_what_is_reused(tmp_path: Path, verdict: str, today: dict[str, object], expected: bool) -> None:
    head = header(sources=runfile.harness_digest(), environment=ENVIRONMENT)
    path = write(tmp_path / "run.jsonl", head, result(verdict=verdict))
    assert reusable(path, **today) is expected


def test_results_of_other_sources_are_not_reused(tmp_path: Path) -> None:
    path = write(tmp_path / "old.jsonl", header(environment=ENVIRONMENT), result())
    assert not reusable(path)
    path = write(tmp_path / "other.jsonl", header(sources="0" * 64, environment=ENVIRONMENT), result())
    assert not reusable(path)


def test_results_of_factories_are_not_reused(tmp_path: Path) -> None:
    spec = "my_package.my_module:Target"
    head = header(sources=runfile.harness_digest(), environment=ENVIRONMENT, targets={spec: INFO})
    assert not reusable(write(tmp_path / "run.jsonl", head, result(target=spec)), spec)


def test_the_digest_of_the_sources_changes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {}
    for name in ("conformance", "model_impl"):
        (tmp_path / name / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
        packages[name] = importlib.util.spec_from_file_location(name, tmp_path / name / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", packages.get)
    digest = runfile.harness_digest.__wrapped__
    before = digest()
    (tmp_path / "conformance" / "__pycache__" / "x.pyc").write_bytes(b"compiled")
    assert digest() == before
    (tmp_path / "model_impl" / "chat.py").write_text("one = 1\n")
    added = digest()
    assert digest(("model_impl/chat",)) == before
    (tmp_path / "model_impl" / "chat.py").write_text("one = 2\n")
    assert len({before, added, digest()}) == 3


def test_a_result_keeps_the_target_that_gave_it(tmp_path: Path) -> None:
    newer = INFO.model_copy(update={"version": "2.0"})
    lines = (header(), result("one"), header(targets={"fake": newer}), result("two"))
    stored = runfile.read_stored(write(tmp_path / "run.jsonl", *lines))
    assert stored["parser/demo", "one", "fake"].info == INFO
    assert stored["parser/demo", "two", "fake"].info == newer


def test_a_target_that_ran_later_is_no_longer_unavailable() -> None:
    missing = header(targets={}, unavailable={"fake": "not installed", "other": "not installed"})
    ran = header(targets={"fake": INFO})
    assert runfile.merge([missing, ran]).unavailable == {"other": "not installed"}
    assert runfile.merge([missing, ran, missing]).unavailable == missing.unavailable


def test_a_result_of_a_case_that_changed_since_does_not_count(tmp_path: Path) -> None:
    planned = PlannedCase(
        **result().model_dump(include={"suite", "case", "target", "kind", "area"}),
        title="t",
        source=(),
        digest="d2",
    )
    path = write(tmp_path / "run.jsonl", header(), result(), header(manifest=(planned,)))
    assert runfile.read(path).latest() == {}


def test_a_line_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfile, "MAX_LINE", 2000)
    with runfile.RunWriter(tmp_path / "run.jsonl") as writer:
        writer.write(header())
        with pytest.raises(RunFileError, match="too long to be written"):
            writer.write(result(reason="x" * 2000))
    assert runfile.read(tmp_path / "run.jsonl").results == ()


def test_where_a_run_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in [
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "file", "exists; go on with it by --resume"),
        (tmp_path / "file" / "deep" / "run.jsonl", "is no folder; name another path"),
    ]:
        with pytest.raises(RunFileError, match=message):
            runfile.check_new(path)
    runfile.check_new(tmp_path / "deep" / "er" / "run.jsonl")
    with pytest.raises(RunFileError, match="cannot be written"):
        runfile.RunWriter(Path("/proc/no-such-file.jsonl"))


# ---------------------------------------------------------------------------- long answers


def test_long_texts_are_shortened_and_say_so() -> None:
    long = "x" * 300_000 + "tail"
    problem = Problem(
        rule="expected", message="m" * 9000, expected={"a": "short"}, got={"a": long}, chunks=(long,)
    )
    evidence = Evidence(input=long, spans=[{"start": 0}], got=[long])
    whole = result(problems=(problem,), evidence=evidence, reason="r" * 9000)
    small = shortened_result(whole)
    assert len(small.model_dump_json()) < 450_000
    assert small.problems[0].expected == {"a": "short"}
    text = small.problems[0].got["a"]
    digest = hashlib.sha256(long.encode()).hexdigest()
    assert f"[… shortened: 300004 characters in all, sha256 {digest} …]" in text
    assert text.startswith("xxx")
    assert text.endswith("tail")
    assert small.evidence.spans is None
    assert {s.where: s.length for s in small.shortened} == {
        "reason": 9000,
        "problems.0.message": 9000,
        "problems.0.got.a": 300_004,
        "problems.0.chunks.0": 300_004,
        "evidence.input": 300_004,
        "evidence.got.0": 300_004,
    }
    assert {s.sha256 for s in small.shortened if s.length > 9000} == {digest}
    assert shortened_result(result()) == result()


@pytest.mark.parametrize("many", [["ab"] * 3_000_000, {str(n): "ab" for n in range(1_000_000)}])
def test_many_items_are_shortened(many: object) -> None:
    small = shortened_result(result(evidence=Evidence(got=many)))
    assert len(small.model_dump_json()) < 5_000_000
    assert [(s.where, s.length) for s in small.shortened] == [("evidence.got", len(many))]


def test_two_long_texts_that_differ_in_the_middle_stay_different() -> None:
    a, b = ("x" * 200_000 + middle + "x" * 200_000 for middle in "ab")
    small = shortened_result(result(evidence=Evidence(expected=a, got=b)))
    assert small.evidence.expected != small.evidence.got


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x" * 100_000, "y" * 100_000),
        ("x " * 3_000_000 + "a", "x " * 3_000_000 + "b"),
        ({"a": ["word " * 40] * 2000}, {"a": ["ward " * 40] * 2000}),
        (list(range(100_000)), list(range(1, 100_000))),
    ],
)
def test_the_difference_of_long_texts_is_short_and_quick(left: object, right: object) -> None:
    started = time.process_time()
    lines = explain.diff(left, right)
    assert time.process_time() - started < 5
    assert len(lines) <= 61
    assert sum(map(len, lines)) < 30_000


def test_the_first_difference_of_long_texts_is_shown() -> None:
    same = "same " * 10_000
    lines = explain.diff({"content": f"{same}left"}, {"content": f"{same}right"})
    assert any(line.lstrip().startswith("-") and line.endswith('left"') for line in lines)
    assert any(line.lstrip().startswith("+") and line.endswith('right"') for line in lines)
    assert "[49800 characters …]" in lines[3]
