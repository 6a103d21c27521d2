"""Recordings: what is recorded is judged as it was live; what is missing or damaged is never a pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conformance.commands.schema import schemas
from conformance.errors import (
    ConformanceError,
    EngineError,
    NotRecordedError,
    TargetError,
    TargetTimeoutError,
    WorkerDiedError,
)
from conformance.targets import recorder as recorder_module
from conformance.targets import registry
from conformance.targets.protocol import (
    Chunking,
    Delta,
    EngineOptions,
    GenerateRequest,
    ParseRequest,
    ParseResult,
    ServeAnswer,
    ServeRequest,
    Speculation,
    StreamRequest,
    StreamResult,
    TargetInfo,
)
from conformance.targets.recorder import Recorder, RecordingTarget
from conformance.targets.recordings import request_key
from conformance.targets.reference import ReferenceTarget
from conformance.targets.replay import ReplayTarget, open_replay
from tests.conftest import Run, Suites
from tests.lying_server import LyingServer
from tests.recorded import HEADER, OTHER, REQUEST, parse_line, record_and_replay, results, write
from tests.server_answers import MODEL

KEY = "sk-replay-0123456789"


# ---------------------------------------------------------------------------- round trips


def test_the_reference_replays_to_the_same_results(run_conformance: Run, tmp_path: Path) -> None:
    cases = ("parser/typing", "parser/reasoning", "template/calls")
    live, replayed = record_and_replay(run_conformance, tmp_path, "reference", *cases)
    assert live == replayed
    assert len(live) > 50
    assert {result.verdict for result in live.values()} == {"pass"}
    kinds = {r.evidence.stream.kind for r in live.values() if r.evidence.stream is not None}
    assert kinds == {"sampled"}  # a certificate cannot be recorded, so none is asked for


@pytest.mark.parametrize("liar", ["SplitsDelimiter", "LeaksSplitMarker", "Raises", "RaisesAtBoundary"])
def test_a_liar_fails_in_the_same_way(run_conformance: Run, tmp_path: Path, liar: str) -> None:
    live, replayed = record_and_replay(run_conformance, tmp_path, f"lying_parsers:{liar}", "parser/strings")
    assert live == replayed
    failures = [result for result in live.values() if result.verdict == "fail"]
    assert failures
    if liar == "SplitsDelimiter":  # shrinking asks for more; that is recorded too
        assert any(len(p.chunking.cuts) == 1 for r in failures for p in r.problems if p.chunking)


def test_errors_and_timeouts_are_recorded(run_conformance: Run, tmp_path: Path, suites: Suites) -> None:
    suites.write("hello")
    live, replayed = record_and_replay(run_conformance, tmp_path, "lying_targets:Gone", "suites")
    assert {result.verdict for result in live.values()} == {"error"}
    assert live == replayed


def test_a_recording_fits_its_schema(run_conformance: Run, tmp_path: Path) -> None:
    record_and_replay(run_conformance, tmp_path, "reference", "parser/reasoning", "template/calls")
    validator = jsonschema.Draft202012Validator(schemas()["replay"]())
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    for line in lines:
        validator.validate(json.loads(line))
    assert {json.loads(line)["type"] for line in lines} == {"header", "parse", "parse_stream", "render"}


def test_a_server_replays_to_the_same_verdicts_without_it(run_conformance: Run, tmp_path: Path) -> None:
    with LyingServer(key=KEY) as server:
        spec = f"openai@{server.url}#{MODEL}"
        arguments = ("run", "server/*", "--no-report", "-t", spec, "--record", "answers.jsonl")
        done = run_conformance(*arguments, "--out", "live.jsonl", env={"OPENAI_API_KEY": KEY})
    assert done.returncode == 0, done
    again = run_conformance(
        "run", "server/*", "--no-report", "-t", "replay@answers.jsonl", "--out", "two.jsonl"
    )
    assert again.returncode == 0, again
    assert results(tmp_path, "live.jsonl") == results(tmp_path, "two.jsonl")
    recording = (tmp_path / "answers.jsonl").read_text()
    assert KEY not in recording
    assert "Bearer" not in recording


@pytest.mark.parametrize(
    ("lie", "case", "verdict"),
    [
        ("marker-leaked", "server/text::plain", "fail"),
        ("half-surrogates", "server/text::unicode", "fail"),
        ("logprobs-not-finite", "server/logprobs::text", "fail"),
        ("key-echoed", "server/text::plain", "fail"),
        ("unrepeatable", "server/text::plain", "inconclusive"),
        ("too-many-requests", "server/text::plain", "inconclusive"),
        ("cut-off", "server/text::plain", "error"),
    ],
)
def test_a_lying_server_replays_to_the_same_verdict(
    run_conformance: Run, tmp_path: Path, lie: str, case: str, verdict: str
) -> None:
    with LyingServer(lie, key=KEY) as server:
        target = f"openai@{server.url}#{MODEL}"
        live, replayed = record_and_replay(run_conformance, tmp_path, target, case, OPENAI_API_KEY=KEY)
    assert [result.verdict for result in live.values()] == [verdict]
    assert live == replayed
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


def test_a_case_alone_is_judged_by_what_it_got(run_conformance: Run, tmp_path: Path) -> None:
    """Repeated requests count within a case, so that cases can be chosen."""
    with LyingServer("unrepeatable") as server:
        target = f"openai@{server.url}#{MODEL}"
        live, _ = record_and_replay(run_conformance, tmp_path, target, "server/text")
    run_conformance(
        "run", "server/text::unicode", "-t", "replay@answers.jsonl", "--no-report", "--out", "one.jsonl"
    )
    (one,) = results(tmp_path, "one.jsonl").values()
    assert one == live["server/text::unicode"]


# ---------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--record", "new.jsonl"), "name it with --target"),
        (("--record", "new.jsonl", "-t", "reference", "-t", "lying_targets:Honest"), "name it with --target"),
        (("--record", "new.jsonl", "-t", "reference", "-n", "2"), "leave out -n"),
        (("--record", "suites/parser/demo.yaml", "-t", "reference"), "exists; name a new file"),
        (("-t", "replay"), "names no recording"),
        (("-t", "replay@nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("-t", "replay@suites"), "suites is no file"),
        (("-t", "replay@suites/parser/demo.yaml"), "demo.yaml:1: this line is no JSON"),
    ],
)
def test_wrong_use_is_one_message(
    run_conformance: Run, suites: Suites, arguments: Sequence[str], message: str
) -> None:
    suites.write("hello")
    done = run_conformance("run", "suites", "--no-report", *arguments)
    assert done.returncode == 2, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_pytest_records_too_but_in_one_process(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello")
    arguments = ("suites", "--target", "lying_targets:Honest", "--conformance-record", "new.jsonl")
    done = run_pytest(*arguments, "-n", "2")
    assert (done.returncode, (tmp_path / "new.jsonl").exists()) == (2, False)
    assert run_pytest(*arguments).returncode == 0
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------- hostile files

STREAM = {
    "type": "parse_stream",
    "key": "0" * 64,
    "chunkings": [{"name": "a", "cuts": [1]}, {"name": "b"}],
    "result": [{}, {}],
}
STREAMING = HEADER | {"target": {"name": "mine", "version": "1", "capabilities": ["parse", "parse_stream"]}}

HOSTILE: dict[str, tuple[Callable[[], Sequence[object]], str]] = {
    "empty": (list, r"the file is empty; a recording begins with a header"),
    "no header": (lambda: [parse_line()], r":1: a recording begins with a line of type header"),
    "two headers": (lambda: [HEADER, HEADER], r":2: a second header"),
    "another format": (lambda: [HEADER | {"version": 2}], r":1: format version 2; this harness reads 1"),
    "no version": (lambda: [{"type": "header", "target": HEADER["target"]}], r":1: format version None"),
    "a certificate": (
        lambda: [HEADER | {"target": {"name": "m", "version": "1", "capabilities": ["certify"]}}],
        r":1: .*cannot hold answers of certify",
    ),
    "no JSON": (lambda: [HEADER, "{"], r":2: this line is no JSON .*correct or remove it"),
    "a blank line": (lambda: [HEADER, ""], r":2: this line is no JSON"),
    "a list": (lambda: [HEADER, []], r":2: this line is no JSON object"),
    "too deep": (lambda: [HEADER, "[" * 200_000], r":2: this line is no JSON"),
    "unknown type": (lambda: [HEADER, {"type": "forward"}], r":2: .*forward"),
    "unknown field": (
        lambda: [HEADER, parse_line(result={"answer": 1})],
        r":2: parse\.result\.answer: Extra",
    ),
    "no answer": (lambda: [HEADER, parse_line(case="a")], r":2: .*exactly one of `result` and `error`"),
    "two answers": (
        lambda: [HEADER, parse_line(result={}, error={"message": "no"})],
        r":2: .*exactly one of",
    ),
    "no key": (lambda: [HEADER, parse_line(key="abc", result={})], r":2: parse\.key: .*pattern"),
    "twice": (
        lambda: [HEADER, parse_line(), parse_line(OTHER), parse_line()],
        r":4: line 2 answers the same",
    ),
    "a chunking twice": (
        lambda: [STREAMING, STREAM, STREAM | {"chunkings": [{"name": "c", "cuts": [1]}], "result": [{}]}],
        r":3: line 2 answers the same request \(cuts \[1\] in tokens, lag 0\)",
    ),
    "too few streams": (lambda: [STREAMING, STREAM | {"result": [{}]}], r":2: .*1 results for 2 chunkings"),
    "not in the header": (lambda: [HEADER, STREAM], r":2: .*parse_stream.*does not name that capability"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    lines, message = HOSTILE[name]
    path = write(tmp_path / "r.jsonl", *lines())
    with pytest.raises(TargetError, match=message) as caught:
        registry.open_target(f"replay@{path}")
    assert str(caught.value).startswith(str(path))
    assert registry.unavailable(f"replay@{path}") == str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps(HEADER).encode(), r":1: the line was cut off after \d+ bytes; remove it"),
        (json.dumps(HEADER).encode() + b"\n\xff\xfe\n", r":2: this line is no JSON"),
        (b"\x00" * 100 + b"\n", r":1: this line is no JSON"),
    ],
)
def test_bytes_that_are_no_lines(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(data)
    with pytest.raises(TargetError, match=message):
        registry.open_target(f"replay@{tmp_path / 'r.jsonl'}")


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.targets.recordings.MAX_LINE", 200)
    path = write(tmp_path / "r.jsonl", HEADER, "x" * 300)
    with pytest.raises(TargetError, match=r":2: the line is longer than 200 bytes"):
        registry.open_target(f"replay@{path}")


# ---------------------------------------------------------------------------- what is not recorded


def test_what_is_not_recorded_is_inconclusive(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "world")
    honest = ("-t", "lying_targets:Honest", "--record", "answers.jsonl")
    assert run_conformance("run", "suites/parser/demo.yaml::case-hello", *honest).returncode == 0
    done = run_conformance("run", "suites", "-t", "replay@answers.jsonl", "--no-report", "--out", "r.jsonl")
    assert done.returncode == 3, done
    found = results(tmp_path, "r.jsonl")
    assert {address: result.verdict for address, result in found.items()} == {
        "parser/demo::case-hello": "pass",
        "parser/demo::case-world": "inconclusive",
    }
    assert "not recorded: answers.jsonl has no answer" in found["parser/demo::case-world"].reason


def test_a_wrong_answer_fails_even_if_its_streams_are_missing(run_conformance: Run, tmp_path: Path) -> None:
    """And a right one without streams passes nothing."""
    record_and_replay(run_conformance, tmp_path, "lying_parsers:LeaksMarker", "parser/markers")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["type"] != "parse_stream"]
    kept[0]["target"]["capabilities"] = ["parse", "parse_stream"]
    write(tmp_path / "cut.jsonl", *kept)
    run_conformance(
        "run", "parser/markers", "-t", "replay@cut.jsonl", "--no-report", "--out", "cut-run.jsonl"
    )
    verdicts = {result.verdict for result in results(tmp_path, "cut-run.jsonl").values()}
    assert verdicts == {"fail", "inconclusive"}


def test_a_family_that_is_missing_makes_a_template_case_inconclusive(
    run_conformance: Run, tmp_path: Path
) -> None:
    case = "template/calls::one-call"
    live, _ = record_and_replay(run_conformance, tmp_path, "reference", case)
    (good,) = live.values()
    assert good.verdict == "pass"
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    write(tmp_path / "cut.jsonl", *lines[:-1])
    done = run_conformance("run", case, "-t", "replay@cut.jsonl", "--no-report")
    assert done.returncode == 3, done


def test_known_failures_are_those_of_the_recorded_target(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello")
    suites.expect(
        "  - {cases: ['parser/demo::case-hello'], versions: '<2', rules: [expected],\n"
        "     reason: It always lies., source: R02, repeat: see the test, review: 2099-01-01}\n",
        target="fake",
    )
    run_conformance("run", "suites", "-t", "lying_targets:Lying", "--record", "a.jsonl", "--no-report")
    for version, verdict in (("1.0", "xfail"), ("2.0", "fail")):
        text = (tmp_path / "a.jsonl").read_text().replace('"version":"1.0"', f'"version":"{version}"')
        (tmp_path / f"{version}.jsonl").write_text(text)
        out = f"run-{version}.jsonl"
        run_conformance("run", "suites", "-t", f"replay@{version}.jsonl", "--no-report", "--out", out)
        (result,) = results(tmp_path, out).values()
        assert result.verdict == verdict, result


# ---------------------------------------------------------------------------- single requests


def test_a_target_that_is_asked_directly(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl", HEADER, parse_line(case="x", request={"anything": 1}, result={"content": "a"})
    )
    with open_replay(f"replay@{path}") as target:
        info = registry.describe(target)  # type: ignore[arg-type]
        assert (info.name, info.version, info.capabilities) == ("mine", "1.2", ("parse",))
        assert info.environment["recording"].startswith("sha256:")
        assert target.parse(REQUEST) == ParseResult(content="a")
        with pytest.raises(NotRecordedError, match=r"no answer to the `parse` request [0-9a-f]{12}"):
            target.parse(OTHER)


@pytest.mark.parametrize(
    ("kind", "error"), [("engine", EngineError), ("died", WorkerDiedError), ("timeout", TargetTimeoutError)]
)
def test_recorded_errors_are_raised(tmp_path: Path, kind: str, error: type[ConformanceError]) -> None:
    path = write(tmp_path / "r.jsonl", HEADER, parse_line(error={"kind": kind, "message": "so it went"}))
    with open_replay(f"replay@{path}") as target, pytest.raises(error, match=r"^so it went$"):
        target.parse(REQUEST)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", HEADER, parse_line(result={"content": "one"}))
    first = open_replay(f"replay@{path}")
    write(path, HEADER, parse_line(result={"content": "another"}))
    second = open_replay(f"replay@{path}")
    assert first.describe() != second.describe()  # so that --resume asks again
    assert second.parse(REQUEST) == ParseResult(content="another")


def test_a_file_that_changes_behind_an_open_target_answers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for changed in (
        lambda: [HEADER, parse_line(OTHER, result={"content": "two"})],
        lambda: [HEADER, parse_line(result={"content": "longer than it was"})],
        lambda: [parse_line(result={"content": "one"}), HEADER],
        lambda: [HEADER],
    ):
        write(path, HEADER, parse_line(result={"content": "one"}))
        with open_replay(f"replay@{path}") as target:
            write(path, *changed())
            with pytest.raises(TargetError, match=r"r\.jsonl was changed while it was read; run again$"):
                target.parse(REQUEST)


def test_a_line_that_loses_a_chunking_behind_an_open_target_answers_nothing(tmp_path: Path) -> None:
    chunkings = [Chunking(name="a", cuts=(1,)), Chunking(name="b", cuts=())]
    request = StreamRequest(request=REQUEST, chunkings=tuple(chunkings))
    line = {
        "type": "parse_stream",
        "key": request_key("parse_stream", REQUEST),
        "chunkings": [chunking.model_dump() for chunking in chunkings],
        "result": [{}, {}],
    }
    path = write(tmp_path / "r.jsonl", STREAMING, line)
    size = path.stat().st_size
    with open_replay(f"replay@{path}") as target:
        write(path, STREAMING, line | {"chunkings": line["chunkings"][:1], "result": [{}]})
        path.write_bytes(path.read_bytes().rstrip().ljust(size - 1) + b"\n")
        with pytest.raises(TargetError, match="was changed while it was read"):
            target.parse_stream(request)


def test_chunkings_are_found_whatever_they_were_asked_with(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.jsonl")
    target = RecordingTarget(ReferenceTarget(), recorder)
    one, two, three = (Chunking(name=str(k), cuts=cuts) for k, cuts in enumerate([(), (1,), (1,)]))
    target.parse_stream(StreamRequest(request=REQUEST, chunkings=(one,)))
    live = target.parse_stream(StreamRequest(request=REQUEST, chunkings=(one, two, three)))
    assert list(live[1:]) == [live[1]] * 2
    recorder.close()
    with open_replay(f"replay@{tmp_path / 'r.jsonl'}") as replay:
        assert list(replay.parse_stream(StreamRequest(request=REQUEST, chunkings=(two, one, two)))) == [
            live[1],
            live[0],
            live[1],
        ]
        assert list(replay.parse_stream(StreamRequest(request=REQUEST, chunkings=(three,)))) == [live[1]]
        lagging = two.model_copy(update={"lag": 1})
        with pytest.raises(NotRecordedError, match=r"in 1 chunkings"):
            replay.parse_stream(StreamRequest(request=REQUEST, chunkings=(two, lagging)))


class Odd:
    """Answers with what JSON libraries stumble over."""

    spec = "odd"

    def __init__(self) -> None:
        self.asked = 0

    def describe(self) -> TargetInfo:
        return TargetInfo(name="odd", version="1", capabilities=("parse", "parse_stream", "certify", "serve"))

    def parse(self, request: ParseRequest) -> ParseResult:
        self.asked += 1
        return ParseResult(content="half \ud83d, \x00, \u2028, 😀")

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        self.asked += 1
        return [StreamResult(deltas=(Delta(content=""), Delta()), error="é") for _ in request.chunkings]

    def certify(self, request: object) -> None:
        raise AssertionError("a certificate cannot be recorded")

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        self.asked += 1
        return [ServeAnswer(status=200, body={"n": math.inf, "asked": self.asked}) for _ in request.bodies]

    def close(self) -> None:
        pass


def test_odd_answers_survive(tmp_path: Path) -> None:
    odd, recorder = Odd(), Recorder(tmp_path / "new" / "r.jsonl")
    target = RecordingTarget(odd, recorder)  # type: ignore[arg-type]
    assert target.describe().capabilities == ("parse", "parse_stream", "serve")
    stream = StreamRequest(request=REQUEST, chunkings=(Chunking(name="a"), Chunking(name="b", cuts=(1,))))
    serve = ServeRequest(bodies=({"messages": []}, "no JSON"))
    live = [target.parse(REQUEST), target.parse_stream(stream), target.serve(serve), target.serve(serve)]
    assert odd.asked == 4
    target.begin_case()
    assert [target.parse(REQUEST), target.parse_stream(stream), target.serve(serve)] == live[:3]
    assert odd.asked == 4  # what is recorded is not asked again
    target.close()
    recorder.close()
    assert recorder.path.read_bytes().isascii()
    with open_replay(f"replay@{recorder.path}") as replay:
        again = [replay.parse(REQUEST), replay.parse_stream(stream), replay.serve(serve), replay.serve(serve)]
        assert [list(a) if isinstance(a, list) else a for a in again] == live
        with pytest.raises(NotRecordedError, match=r"asked 2 times before in this case"):
            replay.serve(serve)
        replay.begin_case()
        assert replay.serve(serve) == live[2]


def test_answers_that_do_not_fit_their_request(tmp_path: Path) -> None:
    request = ServeRequest(bodies=({"a": 1}, {"b": 1}))
    header = HEADER | {"target": {"name": "m", "version": "1", "capabilities": ["serve"]}}
    line = {"type": "serve", "key": request_key("serve", request), "result": [{"status": 200}]}
    with (
        open_replay(f"replay@{write(tmp_path / 'r.jsonl', header, line)}") as target,
        pytest.raises(TargetError, match="1 answers to the 2 bodies"),
    ):
        target.serve(request)


def test_an_interrupted_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(recorder_module.FileIO):
        stop = False

        def write(self, data: Any) -> int:
            if self.stop:
                super().write(bytes(data)[:10])
                raise KeyboardInterrupt
            return super().write(data) or 0

    monkeypatch.setattr(recorder_module, "FileIO", Interrupted)
    recorder = Recorder(tmp_path / "r.jsonl")
    target = RecordingTarget(ReferenceTarget(), recorder)
    monkeypatch.setattr(Interrupted, "stop", True)
    with pytest.raises(KeyboardInterrupt):
        target.parse(REQUEST)
    monkeypatch.setattr(Interrupted, "stop", False)
    answer = target.parse(OTHER)
    recorder.close()
    with open_replay(f"replay@{tmp_path / 'r.jsonl'}") as replay:
        assert replay.parse(OTHER) == answer
        with pytest.raises(NotRecordedError):
            replay.parse(REQUEST)


# ---------------------------------------------------------------------------- keys


def test_keys_depend_on_what_is_asked_alone() -> None:
    key = request_key("parse", REQUEST)
    # Recordings that exist depend on this value.
    assert key == "8c604476fafe7f60e2f238cb0d85dc20ab0ab58e63c5f277b1fa1480130171d9"
    explicit = ParseRequest.model_validate(REQUEST.model_dump())
    assert request_key("parse", explicit) == key
    assert request_key("parse_stream", REQUEST) != key
    assert request_key("parse", OTHER) != key


def test_files_count_by_content(tmp_path: Path) -> None:
    def request(name: str, weights: bytes = b"abc", **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        image = tmp_path / f"{name}.png"
        image.write_bytes(weights)
        made = GenerateRequest(
            checkpoint=str(folder),
            prompts=((1, 2),),
            images=((str(image),),),
            adapter=str(folder),
            max_new_tokens=3,
            options=EngineOptions(speculation=Speculation(method="eagle3", checkpoint=str(folder))),
        )
        return request_key("generate", made.model_copy(update=changes))

    assert request("one") == request("another")
    assert request("one") != request("third", weights=b"abd")
    assert request("one") != request("one", max_new_tokens=4)
    with pytest.raises(TargetError, match="cannot be read"):
        request("one", checkpoint=str(tmp_path / "nowhere"))


def test_replay_is_a_target_like_others(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", HEADER)
    spec = registry.resolve(f"replay@{path}")
    assert registry.summary(spec).description == "recorded answers"
    (check,) = registry.doctor(spec)
    assert (check.ok, check.detail) == (True, "mine 1.2: parse")
    assert isinstance(registry.open_target(spec), ReplayTarget)
