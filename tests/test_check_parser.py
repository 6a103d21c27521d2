"""The parser check: it names every lie, with the smallest chunking that shows it, and no honest answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from conformance.checks import judge, streams
from conformance.checks.base import CheckOutcome
from conformance.checks.parser import build_request
from conformance.errors import EngineError
from conformance.suites import PROMPTS, ParserCase, ParserSuite
from conformance.targets.protocol import (
    Certificate,
    CertifyRequest,
    Delta,
    Outcome,
    ParseRequest,
    ParseResult,
    StreamRequest,
    StreamResult,
    ToolCall,
    ToolCallDelta,
)
from conformance.targets.reference import ReferenceTarget
from tests import lying_parsers as liars
from tests.lying_parsers import STREAM_LIARS, WHOLE_LIARS, Liar, StreamLiar, WholeLiar

Q = '<|"|>'
WEATHER = "<|channel>thought\nwhy<channel|>Let me see."
CALL = f"<|tool_call>call:get.time{{my key:{Q}a, b{Q},n:5,o:{{x:{Q}y{Q}}}}}<tool_call|>"
TOOLS = (
    {
        "type": "function",
        "function": {"name": "get.time",
            "parameters": {"type": "object", "properties": {"n": {"type": "string"}}}},
    },
)  # fmt: skip


def suite_of(case: ParserCase) -> ParserSuite:
    return ParserSuite(
        id="parser/made",
        title="Made",
        description="Made by a test.",
        area="made",
        kind="parser",
        cases=(case,),
    )


def case_of(output: Any, *, expect: Any = None, target: Any = None, **fields: Any) -> ParserCase:
    """A case that expects what the reference answers, unless told otherwise."""
    known = {"id": "made", "title": "Made by a test.", "source": ["check 7"], "output": output, **fields}
    if "policy" in fields:
        return ParserCase.model_validate(known)
    if expect is None:
        case = ParserCase.model_validate({**known, "expect": {}})
        answer = ReferenceTarget().parse(build_request(case, suite_of(case)))
        calls = [{"name": c.name, "arguments": liars.json.loads(c.arguments)} for c in answer.tool_calls]
        expect = {"reasoning": answer.reasoning or "", "content": answer.content or "", "tool_calls": calls}
    return ParserCase.model_validate({**known, "expect": expect})


def judged(case: ParserCase, target: Any, **options: Any) -> CheckOutcome:
    return judge(case, suite_of(case), target, **options)


def rules(outcome: CheckOutcome) -> list[str]:
    return [problem.rule for problem in outcome.problems]


# ------------------------------------------------------------------------------ lies about the whole

BOTH = WEATHER + CALL + "It is " + CALL + "late."
LIES: dict[type[WholeLiar], dict[str, Any]] = {
    **{liar: {"output": BOTH} for liar in WHOLE_LIARS},
    liars.IgnoresPrompt: {"output": "why<channel|>so", "prompt": "open-channel"},
    liars.IgnoresTools: {"output": CALL, "tools": TOOLS},
    liars.StringsOnly: {"output": CALL},
    liars.NotationOnly: {"output": f"<|tool_call>call:f{{a:x{Q}}}<tool_call|>"},
}


@pytest.mark.parametrize("liar", WHOLE_LIARS)
@pytest.mark.parametrize("searchable", [True, False])
def test_a_lie_about_the_whole_is_named(liar: type[WholeLiar], searchable: bool) -> None:
    case = case_of(**LIES[liar])
    outcome = judged(case, liar(searchable=searchable))
    assert outcome.verdict == "fail"
    assert liar.rule in rules(outcome)
    assert "stream-equals-whole" not in rules(outcome), "the stream tells the same lie"
    problem = next(p for p in outcome.problems if p.rule == liar.rule)
    assert problem.message
    assert problem.chunking is None, "the whole answer is wrong already"
    assert judged(case, ReferenceTarget()).verdict == "pass"


@pytest.mark.parametrize("liar", [liars.LeaksMarker, liars.ArgumentsNotJson, liars.Raises, liars.Silent])
def test_hard_rules_hold_for_contested_cases_too(liar: type[WholeLiar]) -> None:
    case = case_of(BOTH, policy=CONTESTED)
    outcome = judged(case, liar(streams=False))
    assert (outcome.verdict, rules(outcome)[0]) == ("fail", liar.rule)
    assert judged(case, ReferenceTarget()).verdict == "pass"


# ---------------------------------------------------------------------------------------- lies in streams

TWO_CALLS = "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|>"
CONTESTED: list[dict[str, Any]] = [
    {"name": "one", "who": "nobody", "content": "one"},
    {"name": "other", "who": "nobody", "reasoning": "other", "tool_calls": [{"name": "other"}]},
]
"""Accepted answers with nothing in common."""
DIGITS = "3141592653589793238462643"
"""More than 20 tokens, each of one character."""
STREAMED: dict[type[StreamLiar], tuple[str, tuple[str, ...]]] = {
    liars.SplitsDelimiter: (f"<|tool_call>call:f{{a:{Q}b{Q}}}",
        (f'<|tool_call>call:f{{a:{Q[:3]}', f"{Q[3:]}b{Q}}}")),
    liars.DropsLoneDigit: ("ab7cd", ("ab", "7", "cd")),
    liars.NeverFinishes: ("a <", ("a <",)),
    liars.CountsFromOne: (TWO_CALLS, (TWO_CALLS,)),
    liars.NumbersByChunk: (TWO_CALLS, ("<|tool_call>call:f{}", TWO_CALLS[20:])),
    liars.SameIds: (TWO_CALLS, (TWO_CALLS,)),
    liars.OmitsIds: (TWO_CALLS, (TWO_CALLS,)),
    liars.OmitsTypes: (TWO_CALLS, (TWO_CALLS,)),
    liars.NameLast: (TWO_CALLS, (TWO_CALLS,)),
    liars.WaitsForTheEnd: (DIGITS, tuple(DIGITS)),
    liars.RaisesAtBoundary: ("a<eos>b<|channel>c", ("a<eos>b<", "|channel>c")),
    liars.LeaksSplitMarker: ("a<tool_call|>b", ("a<", "tool_call|>b")),
    liars.TrustsIds: ("<|channel>abc def<channel|>so", ("<|channel>abc def", "<channel|>so")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def time_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certified here does not depend on how busy the machine is."""
    monkeypatch.setattr(streams, "MAX_SECONDS", 120.0)


@pytest.mark.parametrize("liar", STREAM_LIARS)
@pytest.mark.parametrize("searchable", [True, False])
def test_a_lie_in_streams_is_named_with_its_smallest_chunking(
    liar: type[StreamLiar], searchable: bool
) -> None:
    output, chunks = STREAMED[liar]
    case = case_of(output)
    outcome = judged(case, liar(searchable=searchable), search="full")
    assert outcome.verdict == "fail"
    problem = next(p for p in outcome.problems if p.rule == liar.rule)
    assert problem.chunking is not None
    assert problem.chunks is not None
    assert "".join(problem.chunks) == output
    assert len(problem.chunking.cuts) == len(problem.chunks) - 1
    if liar is liars.TrustsIds:
        # The closer and one character of the thought, or one token more, must lag behind.
        assert len("<channel|>") < problem.chunking.lag <= len("<channel|>") + 2
        assert len(problem.chunks) == 2
    else:
        assert problem.chunks == chunks
        assert problem.chunking.lag == 0
    assert outcome.evidence.stream is not None
    assert (outcome.evidence.stream.kind == "certified") is searchable
    assert judged(case, ReferenceTarget(), search="full").verdict == "pass"


@pytest.mark.parametrize("searchable", [True, False])
def test_smallest_chunkings_are_small_in_long_outputs_too(searchable: bool) -> None:
    case = case_of(
        "A long answer, number by number: "
        + ", ".join(map(str, range(100, 130)))
        + f" and 7 more. {TWO_CALLS}"
    )
    outcome = judged(case, liars.DropsLoneDigit(searchable=searchable))
    (problem,) = outcome.problems
    assert problem.rule == "stream-equals-whole"
    assert problem.chunks is not None
    assert len(problem.chunks) == 3
    assert problem.chunks[1].isdigit()
    assert outcome.evidence.stream is not None
    assert outcome.evidence.stream.kind == "sampled"
    assert outcome.evidence.stream.reason


def test_a_failing_stream_names_what_it_gave() -> None:
    (problem,) = judged(case_of("ab7cd"), liars.DropsLoneDigit()).problems
    assert problem.expected == {"reasoning": None, "content": "ab7cd", "tool_calls": ()}
    assert problem.got == {"reasoning": None, "content": "abcd", "tool_calls": ()}


def test_recorded_exemptions_hold_for_equality_only() -> None:
    case = case_of("ab7cd", stream_exempt="A recorded exception.")
    assert judged(case, liars.DropsLoneDigit()).verdict == "pass"
    leak = case_of("a<tool_call|>b", stream_exempt="A recorded exception.")
    assert rules(judged(leak, liars.LeaksSplitMarker())) == ["marker-leak"]


# ---------------------------------------------------------------------------------------- evidence


class Scripted(Liar):
    """Answers what it is told."""

    rule = ""

    def __init__(self, whole: ParseResult, streamed: Sequence[Delta] | None = None, **options: Any) -> None:
        super().__init__(searchable=False, streams=streamed is not None)
        self.whole = whole
        self.streamed = tuple(streamed or ())

    def parse(self, request: ParseRequest) -> ParseResult:
        return self.whole

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        return [StreamResult(deltas=self.streamed) for _ in request.chunkings]


def test_evidence_of_a_certificate() -> None:
    case = case_of("a<eos>b")
    stream = judged(case, ReferenceTarget()).evidence.stream
    assert stream is not None
    assert (stream.kind, stream.unit, stream.pieces, stream.chunkings) == (
        "certified",
        "characters",
        7,
        str(2**6),
    )
    assert stream.states >= 7
    assert stream.reason == ""


def test_evidence_of_a_search_that_was_not_wanted_or_too_long() -> None:
    def reason(output: str, search: Any, target: Any) -> tuple[str, str]:
        stream = judged(case_of(output), target, search=search).evidence.stream
        assert stream is not None
        assert int(stream.chunkings) > 1
        return stream.kind, stream.reason

    assert reason("a<eos>b", "none", ReferenceTarget()) == ("sampled", "no search was asked for")
    kind, why = reason("word " * 8, "bounded", ReferenceTarget())
    assert kind == "sampled"
    assert why.startswith("a search takes ")
    assert reason("word " * 8, "full", ReferenceTarget()) == ("certified", "")
    kind, why = reason("abc", "full", liars.LeaksMarker(searchable=False))
    assert (kind, why) == ("sampled", "the target's parser state cannot be copied")


def test_evidence_of_a_target_that_does_not_stream() -> None:
    outcome = judged(case_of("abc"), Scripted(ParseResult(content="abc")))
    assert outcome.evidence.stream is not None
    assert (outcome.verdict, outcome.evidence.stream.kind) == ("pass", "unsupported")


def test_a_target_that_cannot_parse_is_skipped() -> None:
    target = Liar()
    target._capabilities = ("render",)
    outcome = judged(case_of("abc"), target)
    assert (outcome.verdict, outcome.problems) == ("skip", ())
    assert "parse" in outcome.reason


class BrokenSearch(liars.NeverFinishes):
    """Fails in the search itself."""

    def certify(self, request: CertifyRequest) -> Certificate:
        raise EngineError("no memory")


class InventedOutcome(liars.NeverFinishes):
    """Claims an outcome that streaming does not show."""

    def open(self, request: ParseRequest) -> Any:
        return liars._Wrapped(request)

    def certify(self, request: CertifyRequest) -> Certificate:
        found = super().certify(request)
        (right,) = found.outcomes
        invented = {"result": ParseResult(content="invented"), "cuts": (1,), "chunkings": "1"}
        fewer = {"chunkings": str(int(right.chunkings) - 1)}
        outcomes = (right.model_copy(update=fewer), right.model_copy(update=invented))
        return found.model_copy(update={"outcomes": outcomes})


def test_a_search_that_fails_falls_back_to_samples() -> None:
    outcome = judged(case_of("a <"), BrokenSearch())
    assert rules(outcome) == ["stream-equals-whole"]
    assert outcome.evidence.stream is not None
    assert (outcome.evidence.stream.kind, outcome.evidence.stream.reason) == (
        "sampled",
        "the search failed: no memory",
    )


def test_a_certificate_that_streaming_contradicts_is_none() -> None:
    outcome = judged(case_of("abc"), InventedOutcome())
    assert outcome.evidence.stream is not None
    assert (outcome.verdict, outcome.evidence.stream.kind) == ("pass", "sampled")
    assert "streaming does not show" in outcome.evidence.stream.reason


def forged(request: CertifyRequest, **changes: Any) -> Certificate:
    """A certificate that says that every chunking gives the right answer."""
    pieces = changes.pop("pieces", len(request.request.output))
    answer = ReferenceTarget().parse(request.request).model_copy(update={"spans": None})
    outcome = Outcome(result=answer, cuts=changes.pop("cuts", ()), chunkings=str(1 << max(pieces - 1, 0)))
    outcomes = [outcome.model_copy(update=change) for change in changes.pop("outcomes", [{}])]
    made = Certificate(unit=request.unit, pieces=pieces, states=1, complete=True, outcomes=tuple(outcomes))
    return made.model_copy(update=changes)


class HonestAtTheExtremes(Liar):
    """Streams wrongly unless all is one chunk or every piece its own; its certificate is a forgery."""

    def __init__(self, changes: dict[str, Any]) -> None:
        super().__init__()
        self.changes = changes

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        lie = StreamResult(deltas=(Delta(content="WRONG"),))
        honest = self._honest.parse_stream(request)
        most = {"tokens": len(request.request.pieces) - 1, "characters": len(request.request.output) - 1}
        return [
            stream if len(chunking.cuts) in (0, most[chunking.unit]) else lie
            for chunking, stream in zip(request.chunkings, honest, strict=True)
        ]

    def certify(self, request: CertifyRequest) -> Certificate:
        return forged(request, **self.changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "streaming shows what the search did not find"),
        ({"outcomes": [{"chunkings": "2"}, {"chunkings": str(2**14 - 2), "cuts": (1,)}]}, "streaming shows"),
        ({"pieces": 0, "outcomes": []}, "the search was over 0 characters, the output has 15 characters"),
        ({"pieces": 14}, "the search was over 14 characters"),
        ({"unit": "tokens"}, "the search was over 15 tokens, the output has 15 characters"),
        ({"outcomes": []}, "do not add up to 2^14"),
        ({"outcomes": [{"chunkings": "16383"}]}, "do not add up to 2^14"),
        ({"outcomes": [{}, {}]}, "do not add up to 2^14"),
        ({"outcomes": [{"chunkings": "all"}]}, "do not add up to 2^14"),
        ({"outcomes": [{"chunkings": "16385"}, {"chunkings": "-1"}]}, "do not add up to 2^14"),
        ({"cuts": (15,)}, "an outcome's cuts [15] are none of this output"),
        ({"cuts": (3, 2)}, "an outcome's cuts [3, 2] are none of this output"),
    ],
)
def test_a_certificate_is_not_taken_on_trust(changes: dict[str, Any], reason: str) -> None:
    outcome = judged(case_of("abc def ghi jkl"), HonestAtTheExtremes(dict(changes)))
    stream = outcome.evidence.stream
    assert stream is not None
    assert stream.kind == "sampled"
    assert reason in stream.reason
    assert int(stream.chunkings) < 2**14
    assert "stream-equals-whole" in rules(outcome), "the samples show the lie"


def test_a_certificate_may_leave_out_the_text_of_the_stop_token() -> None:
    class WithoutStopText(Liar):
        def certify(self, request: CertifyRequest) -> Certificate:
            inner = request.request
            cut = {"output": inner.output.removesuffix("<turn|>"), "pieces": inner.pieces[:-1]}
            return forged(request.model_copy(update={"request": inner.model_copy(update=cut)}))

        def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
            return self._honest.parse_stream(request)

    def kind(output: Any) -> str:
        stream = judged(case_of(output), WithoutStopText()).evidence.stream
        assert stream is not None
        return stream.kind

    assert kind("abc def<turn|>") == "certified"
    assert kind(["abc def", {"plain": "<turn|>"}]) == "sampled", "plain text stops nothing"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (DIGITS, ["not-streamed"]), ("<|channel>thought\n" + DIGITS + "<channel|>", ["not-streamed"]),
        (DIGITS[:20], []), (DIGITS + TWO_CALLS, []), (DIGITS + "<|tool_call>so", []), ("1<eos>" * 20, []),
    ],
)  # fmt: skip
def test_long_text_is_streamed(output: str, expected: list[str]) -> None:
    """A call may come as a whole, and so may text that might have been one."""
    for searchable in (True, False):
        assert rules(judged(case_of(output), liars.WaitsForTheEnd(searchable=searchable))) == expected


def test_the_same_seed_gives_the_same_samples() -> None:
    class Log(liars.DropsLoneDigit):
        def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
            seen.append(request.chunkings)
            return super().parse_stream(request)

    runs = []
    for seed in (1, 1, 2):
        seen: list[Any] = []
        judged(case_of("abc def ghi jkl"), Log(searchable=False), seed=seed)
        runs.append(seen)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# ---------------------------------------------------------------------------------------- single rules


def part(index: int, name: str | None = None, arguments: str | None = None, id_: str | None = None) -> Delta:
    kind = "function" if id_ else None
    return Delta(tool_calls=(ToolCallDelta(index=index, id=id_, type=kind, name=name, arguments=arguments),))


UNTYPED = Delta(tool_calls=(ToolCallDelta(index=0, id="a", name="f", arguments="{}"),))


F = ParseResult(tool_calls=(ToolCall(name="f", arguments="{}"),))
FG = ParseResult(tool_calls=(ToolCall(name="f", arguments="{}"), ToolCall(name="g", arguments="{}")))


@pytest.mark.parametrize(
    ("whole", "deltas", "expected"),
    [
        (F, [part(0, "f", "{}", "a")], []),
        (F, [part(0, "f", None, "a"), part(0, None, "{"), part(0, None, "}")], []),
        (F, [part(0, "f", "{}", "a"), part(0, None, None, "a")], []),
        (F, [part(3, "f", "{}", "a")], ["indices"]),
        (F, [part(0, "f", "{}")], ["call-start"]),
        (F, [UNTYPED], ["call-start"]),
        (F, [part(0, None, None, "a"), part(0, "f", "{}")], ["call-start"]),
        (F, [part(0, "", "", "a"), part(0, "f", "{}")], ["call-start"]),
        (F, [part(0, None, "{", "a"), part(0, "f", "}")], ["call-start"]),
        (FG, [part(0, "f", "{}", "a"), part(1, "g", "{}", "b")], []),
        (FG, [part(0, "f", "{}", "a"), part(1, "g", "{}")], ["call-start"]),
        (FG, [part(0, "f", "{}", "a"), part(1, "g", "{}", "a")], ["call-ids"]),
        (FG, [part(1, "f", "{}", "a"), part(0, "g", "{}", "b")], ["indices"]),
        (FG, [part(0, "f", "{}", "a"), part(2, "g", "{}", "b")], ["indices"]),
        (FG, [part(0, "f", "{}", "a"), part(0, "g", "{}", "b")], ["stream-equals-whole", "arguments-json"]),
        (FG, [part(0, "f", "{}", "a"), part(1, "g", '{"a":1}', "b")], ["stream-equals-whole"]),
        (F, [part(0, "f", " { } ", "a")], []),
        (F, [part(0, "f", "", "a")], ["stream-equals-whole", "arguments-json"]),
        (F, [], ["stream-equals-whole", "nothing-lost"]),
    ],
)
def test_rules_of_streamed_calls(whole: ParseResult, deltas: list[Delta], expected: list[str]) -> None:
    calls = [{"name": c.name} for c in whole.tool_calls]
    case = case_of(TWO_CALLS, expect={"tool_calls": calls})
    assert rules(judged(case, Scripted(whole, deltas))) == expected


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("content", "a<eos>", ["marker-leak"]), ("reasoning", "<unused12>", ["marker-leak"]),
        ("content", f"a{Q}", ["marker-leak"]),
        ("content", "<|turn>", ["marker-leak"]), ("content", "<|turn", []), ("content", "a < b |> c", []),
        ("content", "<b>x</b>", []),
        ("content", "<|image>", ["marker-leak"]), ("content", "<image|>", ["marker-leak"]),
        ("content", "<|image|>", ["marker-leak"]), ("content", "<|audio>", ["marker-leak"]),
        ("content", "<audio|>", ["marker-leak"]), ("content", "<|audio|>", ["marker-leak"]),
        ("content", "<|video|>", ["marker-leak"]), ("content", "<|tool>", ["marker-leak"]),
        ("content", "<tool|>", ["marker-leak"]), ("content", "<|think|>", ["marker-leak"]),
        ("content", "<mask>", ["marker-leak"]), ("content", "<unk>", ["marker-leak"]),
        ("content", "<|tool|>", []), ("content", "<video>", []), ("content", "<unused>", []),
    ],
)  # fmt: skip
def test_markers_leak_from_any_field(field: str, text: str, expected: list[str]) -> None:
    case = case_of("abc", policy=CONTESTED)
    assert rules(judged(case, Scripted(ParseResult(**{field: text})))) == expected
    allowed = case.model_copy(update={"allow_markers": True})
    assert rules(judged(allowed, Scripted(ParseResult(**{field: text})))) == []


@pytest.mark.parametrize(
    "call",
    [
        ("f<eos>", "{}"),
        ("f", '{"a":"<eos>"}'),
        ("f", '{"<eos>":1}'),
        ("f", '{"a":["\\u003ceos>"]}'),
        ("f", "{'<eos>"),
    ],
)
def test_markers_leak_from_calls(call: tuple[str, str]) -> None:
    case = case_of("abc", policy=CONTESTED)
    answer = ParseResult(tool_calls=(ToolCall(name=call[0], arguments=call[1]),))
    assert "marker-leak" in rules(judged(case, Scripted(answer)))


def test_an_expected_marker_is_no_leak() -> None:
    case = case_of([{"plain": "the <eos> token"}], expect={"content": "the <eos> token"})
    assert judged(case, ReferenceTarget()).verdict == "pass"


@pytest.mark.parametrize(
    ("output", "arguments", "expected"),
    [
        (CALL, '{"a":1', ["arguments-json"]), (CALL, "[1]", ["arguments-json"]),
        (CALL, "", ["arguments-json"]), (CALL, "{'a':1}", ["arguments-json"]),
        (CALL, '{"a":NaN}', ["arguments-json"]), (CALL, "null", ["arguments-json"]),
        (CALL, '"{}"', ["arguments-json"]),
        (CALL, '{"a":1e99999999999999999999}', ["arguments-json"]),
        (CALL, '{"a":' + "[" * 9999, ["arguments-json"]), (CALL, '{"a":1}', []),
        (CALL, '{"a":2,"a":1}', ["arguments-json"]), (CALL, '{"o":{"a":2,"a":1}}', ["arguments-json"]),
        (CALL, '{"a":{"a":1},"b":{"a":1}}', []), (CALL[:-13], '{"a":2,"a":1', ["arguments-json"]),
        # A call that the output cuts off may be cut JSON too, as servers send it.
        (CALL[:-13], '{"a":1', []), (CALL[:-13], '{"a":"x', []), (CALL[:-13], '{"a', []),
        (CALL[:-13], "{'a", ["arguments-json"]),
        (CALL + CALL[:-13], '{"a":1', ["arguments-json"]),
    ],
)  # fmt: skip
def test_arguments_are_json_objects(output: str, arguments: str, expected: list[str]) -> None:
    case = case_of(output, policy=CONTESTED)
    calls = tuple(ToolCall(name="f", arguments=arguments) for _ in range(output.count("call:")))
    assert sorted(set(rules(judged(case, Scripted(ParseResult(tool_calls=calls)))))) == expected


def test_kept_texts_survive_in_some_field() -> None:
    case = case_of(
        "abc def",
        keep=["abc", "def"],
        policy=CONTESTED,
    )
    assert rules(judged(case, Scripted(ParseResult(content="def", reasoning="abc")))) == []
    (problem,) = judged(case, Scripted(ParseResult(content="abc"))).problems
    assert problem.rule == "nothing-lost"
    assert "'def'" in problem.message
    in_call = ParseResult(tool_calls=(ToolCall(name="abc", arguments='{"x":"\\u0064ef"}'),))
    assert rules(judged(case, Scripted(in_call))) == []


@pytest.mark.parametrize(
    "output",
    ["", "<|channel>thought\n<channel|>", "<|channel>thought", "<eos>", "<|tool_call><tool_call|>", " \n"],
)
def test_some_outputs_have_nothing_to_lose(output: str) -> None:
    case = case_of(output, policy=CONTESTED)
    assert judged(case, Scripted(ParseResult())).verdict == "pass"


def test_policies_name_the_answer_given() -> None:
    answers = [{"name": "one", "who": "a", "content": "1"}, {"name": "other", "who": "b", "reasoning": "1"}]
    case = case_of("1", policy=answers)
    for answer, name in (
        ({"content": " 1\n"}, "one"),
        ({"reasoning": "1"}, "other"),
        ({"content": "2"}, "unlisted"),
    ):
        outcome = judged(case, Scripted(ParseResult(**answer)))
        assert (outcome.verdict, outcome.evidence.policy) == ("pass", name)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": "a"}, ""), ({"content": " a\n", "reasoning": ""}, ""),
        ({"content": "b"}, "content differs"), ({}, "content differs"),
        ({"content": "a", "reasoning": "b"}, "reasoning differs"),
    ],
)  # fmt: skip
def test_expected_text_is_compared_trimmed(answer: dict[str, str], message: str) -> None:
    case = case_of("a", expect={"content": "a"})
    problems = judged(case, Scripted(ParseResult(**answer))).problems
    assert [p.message for p in problems if p.rule == "expected"] == ([message] if message else [])


def test_expected_calls_are_compared_by_value() -> None:
    case = case_of(CALL, expect={"tool_calls": [{"name": "f", "arguments": {"a": 5, "b": [True, None]}}]})

    def answered(name: str, arguments: str) -> list[str]:
        return rules(
            judged(case, Scripted(ParseResult(tool_calls=(ToolCall(name=name, arguments=arguments),))))
        )

    assert answered("f", '{"b": [true, null], "a": 5.0}') == []
    assert answered("g", '{"a":5,"b":[true,null]}') == ["expected"]
    assert answered("f", '{"a":"5","b":[true,null]}') == ["expected"]
    assert answered("f", '{"a":5,"b":[1,null]}') == ["expected"]
    assert answered("f", '{"a":5}') == ["expected"]
    assert answered("f", '{"a":5,"b":[true,null],"c":0}') == ["expected"]


def test_the_request_carries_what_the_case_says() -> None:
    case = case_of(
        ["a", {"plain": "<eos>"}, "<eos>"],
        prompt="closed-channel",
        thinking=False,
        tools=list(TOOLS),
        tool_choice="none",
        expect={},
    )
    request = build_request(case, suite_of(case))
    assert request.output == "a<eos><eos>"
    assert [p.text for p in request.pieces if p.special] == ["<eos>"]
    assert (request.prompt, request.thinking, request.tool_choice) == (
        PROMPTS["closed-channel"],
        False,
        "none",
    )
    assert request.tools == TOOLS
    assert request.prompt_ids
