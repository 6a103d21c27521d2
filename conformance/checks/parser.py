"""Check of kind `parser`: one output, parsed whole and streamed.

Rules, by the names that problems carry:

* `expected`: the whole answer is the agreed one (contested cases record which accepted one it is);
* `stream-equals-whole`: streamed deltas, put together, equal the whole answer under every chunking;
* `marker-leak`, `arguments-json`, `nothing-lost`, `forbidden-call`, `agreed-part`: hard rules; they hold for
  contested cases too, on the whole answer and on every streamed one. The agreed part of a contested case is
  what all its accepted answers have in common;
* `indices`, `call-ids`, `call-start`, `not-streamed`: hard rules on the deltas of a stream;
* `raised`: the parser raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from conformance.checks.base import CheckOutcome, Search
from conformance.checks.streams import Streamed, assemble, explore
from conformance.compare import complete_json, json_equal, load_json, same_text
from conformance.errors import EngineError, NotRecordedError
from conformance.loading import resolve_prompt, resolve_tools
from conformance.results import Evidence, Problem
from conformance.suites import ExpectedCall, ExpectedParse, ParserCase, ParserSuite
from conformance.targets.protocol import (
    Chunking,
    ParseRequest,
    ParseResult,
    StreamRequest,
    Target,
    ToolCall,
)
from conformance.tokenization import encode, load_tokenizer, pieces

MAX_UNSTREAMED = 20
"""Tokens of text that may come in one delta although they were fed one by one."""

_LABEL = re.compile(r"\A\s*thought\s*\Z")


@cache
def _markers() -> re.Pattern[str]:
    """Matches the text of every control token of the vocabulary."""
    added = load_tokenizer().get_added_tokens_decoder().values()
    texts = sorted(re.escape(token.content) for token in added if token.special)
    return re.compile("|".join([*texts, r"<unused\d+>"]))


def markers_in(text: str) -> list[str]:
    """The control tokens whose text is in a text."""
    return sorted(set(_markers().findall(text)))


def judge(case: ParserCase, suite: ParserSuite, target: Target, *, seed: int, search: Search) -> CheckOutcome:
    """Judge one parser case; see `conformance.checks.judge`."""
    info = target.describe()
    if "parse" not in info.capabilities:
        return CheckOutcome("skip", reason=f"{target.spec} has no capability `parse`")
    request = build_request(case, suite)
    evidence = Evidence(
        input=request.output,
        prompt=request.prompt,
        expected=_expectation(case),
    )
    rules = _Rules(case, request)
    try:
        whole = target.parse(request)
    except EngineError as error:
        problem = Problem(rule="raised", message=f"the parser raised on the whole output: {error}")
        return CheckOutcome.from_problems([problem], evidence)
    problems, policy = rules.judge_whole(whole)
    try:
        streamed = explore(
            request,
            target,
            info,
            seed=seed,
            search=search,
            judge=lambda s: rules.judge_streamed(s, whole),
        )
    except NotRecordedError:
        if not problems:
            raise
        return CheckOutcome.from_problems(problems, evidence.model_copy(update={"got": _shown(whole)}))
    evidence = evidence.model_copy(
        update={
            "got": _shown(whole),
            "stream": streamed.evidence,
            "policy": policy,
            "spans": [s.model_dump() for s in whole.spans] if whole.spans is not None else None,
        }
    )
    return CheckOutcome.from_problems([*problems, *streamed.problems], evidence)


def judge_cut(
    case: ParserCase, suite: ParserSuite, target: Target, chunking: Chunking | None
) -> tuple[Problem, ...]:
    """The rules that an answer breaks when the output comes whole and, unless None, cut in one way.

    Raises:
        ConformanceError: the target does not answer.
    """
    request = build_request(case, suite)
    rules = _Rules(case, request)
    try:
        whole = target.parse(request)
    except EngineError as error:
        return (Problem(rule="raised", message=f"the parser raised on the whole output: {error}"),)
    problems = rules.judge_whole(whole)[0]
    if chunking is not None:
        stream = target.parse_stream(StreamRequest(request=request, chunkings=(chunking,)))[0]
        problems += rules.judge_streamed(assemble(stream), whole)
    return tuple(problems)


def build_request(case: ParserCase, suite: ParserSuite) -> ParseRequest:
    """The request that a case makes."""
    prompt = resolve_prompt(case)
    cut = pieces(case.output)
    return ParseRequest(
        output="".join(p.text for p in cut),
        pieces=cut,
        prompt=prompt,
        prompt_ids=encode(prompt),
        tools=resolve_tools(case, suite),
        thinking=case.thinking,
        tool_choice=case.tool_choice,
    )


def _expectation(case: ParserCase) -> Any:
    if case.expect is not None:
        return case.expect.model_dump()
    return [answer.model_dump() for answer in case.policy or ()]


def _shown(result: ParseResult) -> dict[str, Any]:
    return result.model_dump(exclude={"spans"})


@dataclass(frozen=True)
class _Rules:
    """What must hold for a case, on whole and streamed answers alike."""

    case: ParserCase
    request: ParseRequest

    # ------------------------------------------------------------------ whole

    def judge_whole(self, whole: ParseResult) -> tuple[list[Problem], str | None]:
        problems = self._hard_rules(whole)
        if self.case.expect is not None:
            mismatch = _mismatch(whole, self.case.expect)
            if mismatch:
                problems.insert(
                    0,
                    Problem(
                        rule="expected",
                        message=mismatch,
                        expected=self.case.expect.model_dump(),
                        got=_shown(whole),
                    ),
                )
            return problems, None
        matching = (a.name for a in self.case.policy or () if not _mismatch(whole, a))
        return problems, next(matching, "unlisted")

    # ------------------------------------------------------------------ streamed

    def judge_streamed(self, streamed: Streamed, whole: ParseResult) -> list[Problem]:
        """Problems of one streamed answer; chunking and chunks are filled in by the caller."""
        if streamed.error is not None:
            return [Problem(rule="raised", message=f"the parser raised while streaming: {streamed.error}")]
        problems = []
        if not self.case.stream_exempt:
            mismatch = _difference(streamed.result, whole)
            if mismatch:
                problems.append(
                    Problem(
                        rule="stream-equals-whole",
                        message=f"streamed differs from whole: {mismatch}",
                        expected=_shown(whole),
                        got=_shown(streamed.result),
                    )
                )
        if streamed.ragged:
            problems.append(
                Problem(
                    rule="indices",
                    message="call indices in the stream are not 0, 1, 2, … in order of appearance",
                    expected=list(range(len(streamed.indices))) if streamed.indices else None,
                    got=list(streamed.indices),
                )
            )
        if streamed.ids and len(set(streamed.ids)) < len(streamed.ids):
            problems.append(Problem(rule="call-ids", message="two calls share an id", got=list(streamed.ids)))
        if streamed.starts:
            problems.append(
                Problem(rule="call-start", message="; ".join(streamed.starts), got=_shown(streamed.result))
            )
        if streamed.finest and streamed.texts == 1 and self._is_prose(streamed.result):
            problems.append(
                Problem(
                    rule="not-streamed",
                    message="all text came in one delta, although it was fed piece by piece",
                    got=_shown(streamed.result),
                )
            )
        return problems + self._hard_rules(streamed.result)

    def _is_prose(self, result: ParseResult) -> bool:
        """Whether the answer is long and has no call, nor text that was held back as one."""
        words = [piece for piece in self.request.pieces if not piece.special]
        return (
            len(words) > MAX_UNSTREAMED and not result.tool_calls and "<|tool_call" not in self.request.output
        )

    # ------------------------------------------------------------------ hard rules

    def _hard_rules(self, result: ParseResult) -> list[Problem]:
        problems = []
        leaks = markers_in(_all_text(result))
        if leaks and not self._markers_allowed(result):
            problems.append(
                Problem(
                    rule="marker-leak",
                    message=f"protocol markers reach the client: {' '.join(leaks)}",
                    got=_shown(result),
                )
            )
        for index, call in enumerate(result.tool_calls):
            broken = _broken_arguments(
                call.arguments, cut=self._is_cut(result, index), repeats=self.case.repeats_keys
            )
            if broken:
                problems.append(
                    Problem(
                        rule="arguments-json",
                        message=f"arguments of call {index} ({call.name!r}) are {broken}",
                        got=call.arguments,
                    )
                )
        if self.case.tool_choice == "none" and result.tool_calls:
            message = "`tool_choice: none` forbids calls, and one came out"
            problems.append(Problem(rule="forbidden-call", message=message, got=_shown(result)))
        lost = self._lost(result)
        if lost:
            problems.append(Problem(rule="nothing-lost", message=lost, got=_shown(result)))
        if self.case.policy:
            broken = "; ".join(_agreed_part_broken(result, self.case.policy))
            if broken:
                problems.append(
                    Problem(
                        rule="agreed-part",
                        message=f"what all accepted answers have in common does not hold: {broken}",
                        expected=_expectation(self.case),
                        got=_shown(result),
                    )
                )
        return problems

    def _markers_allowed(self, result: ParseResult) -> bool:
        """Marker text is right where the case says so, or where an accepted answer holds it."""
        answers = (self.case.expect,) if self.case.expect is not None else self.case.policy or ()
        return self.case.allow_markers or any(
            _markers().search(str(answer.model_dump())) and not _mismatch(result, answer)
            for answer in answers
        )

    def _is_cut(self, result: ParseResult, index: int) -> bool:
        """Whether the output ended inside this call, so that cut JSON is what servers send."""
        if index != len(result.tool_calls) - 1:
            return False
        marks = [p.text for p in self.request.pieces if p.special]
        opened = max((k for k, mark in enumerate(marks) if mark == "<|tool_call>"), default=-1)
        return opened >= 0 and not {"<tool_call|>", "<turn|>"} & set(marks[opened:])

    def _lost(self, result: ParseResult) -> str:
        text = _all_text(result)
        missing = [kept for kept in self.case.keep if kept not in text]
        if missing:
            return f"text of the output is in no field: {', '.join(map(repr, missing))}"
        ordinary = "".join(p.text for p in self.request.pieces if not p.special)
        if ordinary.strip() and not _LABEL.match(ordinary) and not text and not self._may_be_empty():
            return "the output has text, and every field is empty"
        return ""

    def _may_be_empty(self) -> bool:
        empty = ExpectedParse()
        if self.case.expect is not None:
            return self.case.expect == empty
        return any(not (a.reasoning or a.content or a.tool_calls) for a in self.case.policy or ())


def _all_text(result: ParseResult) -> str:
    """Every text a client can see: fields, names, argument JSON and the strings inside it."""
    parts = [result.reasoning or "", result.content or ""]
    for call in result.tool_calls:
        parts += [call.name, call.arguments]
        try:
            parts += _strings(load_json(complete_json(call.arguments), repeats=True))
        except ValueError:
            parts.append(call.arguments.replace('\\"', '"'))
    return "\n".join(p for p in parts if p)


def _strings(value: Any) -> list[str]:
    found, stack = [], [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item
    return found


def _broken_arguments(arguments: str, *, cut: bool, repeats: bool) -> str:
    try:
        value = load_json(complete_json(arguments) if cut else arguments, repeats=repeats)
    except ValueError as error:
        return f"not JSON ({error})"
    return "" if isinstance(value, dict) else "not a JSON object"


def _mismatch(result: ParseResult, expected: ExpectedParse) -> str:
    """How an answer differs from an expected one; empty if it does not."""
    if not same_text(result.reasoning, expected.reasoning):
        return "reasoning differs"
    if not same_text(result.content, expected.content):
        return "content differs"
    names = [c.name for c in result.tool_calls]
    wanted = [c.name for c in expected.tool_calls]
    if names != wanted:
        return f"calls are {names}, expected {wanted}"
    for index, (got, want) in enumerate(zip(result.tool_calls, expected.tool_calls, strict=True)):
        try:
            value = load_json(complete_json(got.arguments), repeats=True)
        except ValueError:
            return f"arguments of call {index} are not JSON"
        if not json_equal(value, want.arguments):
            return f"arguments of call {index} ({got.name}) differ"
    return ""


def _agreed_part_broken(result: ParseResult, answers: Sequence[ExpectedParse]) -> Iterator[str]:
    """How an answer breaks what all accepted ones have in common."""
    for field, got, accepted in (
        ("reasoning", result.reasoning, [a.reasoning for a in answers]),
        ("content", result.content, [a.content for a in answers]),
    ):
        if all(same_text(text, accepted[0]) for text in accepted) and not same_text(got, accepted[0]):
            yield f"{field} differs"
    calls = result.tool_calls
    number = len(answers[0].tool_calls)
    if any(len(a.tool_calls) != number for a in answers):
        yield from _common_calls_missing(calls, [a.tool_calls for a in answers])
    elif len(calls) != number:
        yield f"there are {len(calls)} calls, not {number}"
    else:
        for index, call in enumerate(calls):
            faults = _common_members_broken(call, [a.tool_calls[index] for a in answers])
            yield from (f"call {index}: {fault}" for fault in faults)


def _arguments(call: ToolCall) -> dict[str, Any] | None:
    """The arguments as values; None if they are no object."""
    try:
        value = load_json(complete_json(call.arguments), repeats=True)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _common_members_broken(call: ToolCall, accepted: Sequence[ExpectedCall]) -> Iterator[str]:
    """How one call breaks what it is in all accepted answers."""
    names = {a.name for a in accepted}
    if len(names) == 1 and call.name not in names:
        yield f"the name is {call.name!r}, not {accepted[0].name!r}"
    arguments = _arguments(call)
    if arguments is None:
        return  # what they hold cannot be told; `arguments-json` names the fault
    keys = [set(a.arguments) for a in accepted]
    common = set.intersection(*keys)
    if missing := sorted(common - arguments.keys()):
        yield f"no argument {', '.join(map(repr, missing))}"
    if all(k == common for k in keys) and (more := sorted(arguments.keys() - common)):
        yield f"another argument {', '.join(map(repr, more))}"
    for key in sorted(common & arguments.keys()):
        values = [a.arguments[key] for a in accepted]
        agreed = all(json_equal(value, values[0]) for value in values)
        if agreed and not json_equal(arguments[key], values[0]):
            yield f"the argument {key!r} differs"


def _common_calls_missing(
    got: Sequence[ToolCall], accepted: Sequence[Sequence[ExpectedCall]]
) -> Iterator[str]:
    """Calls, and names of calls, that every accepted answer has, and this one has fewer times.

    For accepted answers with unequal numbers of calls, whose places say nothing.
    """
    given = [(call.name, _arguments(call)) for call in got]
    listed = [[(call.name, call.arguments) for call in answer] for answer in accepted]
    fewest = min(listed, key=len)

    def count(calls: Sequence[tuple[str, Any]], name: str, arguments: Any) -> int:
        return sum(n == name and json_equal(a, arguments) for n, a in calls)

    for call in fewest:
        if count(given, *call) < min(count(answer, *call) for answer in listed):
            yield f"a call of {call[0]!r} with the arguments of all accepted answers is missing"
    for name in dict.fromkeys(name for name, _ in fewest):
        least = min(sum(call.name == name for call in answer) for answer in accepted)
        if sum(call.name == name for call in got) < least:
            yield f"a call of {name!r} is missing"


def _difference(streamed: ParseResult, whole: ParseResult) -> str:
    """How a streamed answer differs from the whole one; empty if it does not."""
    if not same_text(streamed.reasoning, whole.reasoning):
        return "reasoning"
    if not same_text(streamed.content, whole.content):
        return "content"
    if [c.name for c in streamed.tool_calls] != [c.name for c in whole.tool_calls]:
        return "the calls"
    for index, (a, b) in enumerate(zip(streamed.tool_calls, whole.tool_calls, strict=True)):
        if a.arguments == b.arguments:
            continue
        try:
            left, right = (load_json(complete_json(c.arguments), repeats=True) for c in (a, b))
            same = json_equal(left, right)
        except ValueError:
            same = False
        if not same:
            return f"arguments of call {index}"
    return ""


__all__ = ["build_request", "judge"]
