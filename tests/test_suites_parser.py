"""Every parser suite fails the liars that its subject should expose, and passes the reference.

Contested cases fail liars too: by what their accepted answers have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from conformance import resources
from conformance.checks import judge
from conformance.checks.base import CheckOutcome
from conformance.loading import LoadedSuite, load_suites
from conformance.suites import ParserCase, ParserSuite
from conformance.targets.protocol import (
    Delta,
    ParseRequest,
    ParseResult,
    StreamRequest,
    StreamResult,
    ToolCall,
)
from tests import lying_parsers as liars
from tests.lying_parsers import WHOLE_LIARS, Liar, WholeLiar

SUITES = [suite for suite in load_suites([resources.suites_dir()]) if isinstance(suite.suite, ParserSuite)]

# Lies that a suite must notice by its subject; a new suite must be noticed by some lie at least.
SUITABLE: dict[str, set[type[WholeLiar]]] = defaultdict(
    set,
    {
        "parser/interleaving": {liars.DropsTextAfterCall, liars.ReasoningInContent, liars.FirstCallOnly},
        "parser/markers": {liars.LeaksMarker, liars.DropsTextAfterCall, liars.KeepsLabel},
        "parser/nesting": {liars.FlattensArguments},
        "parser/policies": {liars.LeaksMarker, liars.Silent},
        "parser/policies-calls": {liars.ArgumentsNotJson, liars.LeaksMarker, liars.Silent},
        "parser/policies-mentions": {liars.LeaksMarker, liars.Silent},
        "parser/prompt-state": {liars.IgnoresPrompt, liars.KeepsLabel},
        "parser/reasoning": {liars.ReasoningInContent, liars.KeepsLabel, liars.LosesLastCharacter},
        "parser/recovery": {liars.NotationOnly, liars.ArgumentsNotJson},
        "parser/recovery-cut": {liars.NotationOnly, liars.Silent},
        "parser/recovery-delimiters": {liars.NotationOnly, liars.CutsStrings},
        "parser/strings": {liars.CutsStrings},
        "parser/strings-keys": {liars.CutsKeys},
        "parser/tool-calls": {liars.FirstCallOnly, liars.DropsTextAfterCall},
        "parser/tool-calls-names": {liars.WordNamesOnly},
        "parser/typing": {liars.StringsOnly, liars.IgnoresTools},
        "parser/typing-composed": {liars.StringsOnly, liars.IgnoresTools, liars.FlattensArguments},
        "parser/typing-schema": {liars.StringsOnly, liars.IgnoresTools},
    },
)


def failing(suite: LoadedSuite, target: Any) -> list[str]:
    assert isinstance(suite.suite, ParserSuite)
    return [c.case.id for c in suite.cases if judge(c.case, suite.suite, target).verdict != "pass"]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.suite.id)
def test_every_suite_catches_liars(suite: LoadedSuite) -> None:
    caught = {liar for liar in WHOLE_LIARS if failing(suite, liar(streams=False))}
    assert caught, "no lie fails this suite, so it tests nothing"
    missed = SUITABLE[suite.suite.id] - caught
    assert not missed, "these lies should fail it"


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.suite.id)
def test_every_suite_catches_a_liar_in_streams(suite: LoadedSuite) -> None:
    """Streams are explored in every suite, whatever it is about."""
    target = liars.RaisesAtBoundary(searchable=False)
    assert isinstance(suite.suite, ParserSuite)
    with_markers = [
        c.case for c in suite.cases if isinstance(c.case, ParserCase) and "<|" in str(c.case.output)
    ]
    assert with_markers
    for case in with_markers[:2]:
        assert "raised" in [p.rule for p in judge(case, suite.suite, target).problems]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.suite.id)
def test_the_reference_passes_every_suite(suite: LoadedSuite) -> None:
    """Whole answers; `pytest suites/` checks its streams."""
    target = Liar(streams=False)
    assert failing(suite, target) == []


# ------------------------------------------------------------------------------ contested cases

POLICIES = [
    (loaded.address, loaded.case, suite.suite)
    for suite in SUITES
    for loaded in suite.cases
    if isinstance(loaded.case, ParserCase) and loaded.case.policy and isinstance(suite.suite, ParserSuite)
]


class SaysSomethingElse(WholeLiar):
    """Every answer is the same unrelated sentence."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return ParseResult(content="nothing of the sort")


class RenamesCalls(WholeLiar):
    """Every call has another name, and no arguments."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        calls = tuple(ToolCall(name="wrong_name", arguments="{}") for _ in message.tool_calls)
        return message.model_copy(update={"tool_calls": calls})


UNNOTICED: dict[type[WholeLiar], dict[str, str]] = {
    SaysSomethingElse: {
        "parser/policies::bare-label-only": "the word is content, or nothing at all",
        "parser/policies-calls::forbidden-call": "the call is text, or nothing at all",
    },
    RenamesCalls: {
        "parser/tool-calls-names::unknown": "the one call may be dropped, so nothing of it is agreed",
        "parser/typing::unknown-function": "the one call may be dropped, so nothing of it is agreed",
    },
}
"""Contested cases whose accepted answers have nothing in common that the lie would break."""


@pytest.mark.parametrize("liar", UNNOTICED)
def test_contested_cases_fail_answers_that_nobody_holds(liar: type[WholeLiar]) -> None:
    target, honest = liar(streams=False), Liar(streams=False)
    concerned = [
        (address, case, suite)
        for address, case, suite in POLICIES
        if liar is SaysSomethingElse or judge(case, suite, honest).evidence.got["tool_calls"]
    ]
    assert len(concerned) > 100
    passed = {address for address, case, suite in concerned if judge(case, suite, target).verdict == "pass"}
    assert passed == UNNOTICED[liar].keys()


class Scripted(Liar):
    """Answers what it is told, and streams something else."""

    def __init__(self, whole: ParseResult, streamed: Sequence[Delta] = ()) -> None:
        super().__init__(searchable=False, streams=bool(streamed))
        self.whole, self.streamed = whole, tuple(streamed)

    def parse(self, request: ParseRequest) -> ParseResult:
        return self.whole

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        return [StreamResult(deltas=self.streamed) for _ in request.chunkings]


def judged(output: str, accepted: Sequence[dict[str, Any]], target: Liar, **fields: Any) -> CheckOutcome:
    """Judge a case with these accepted answers."""
    policy = [{"name": f"answer-{k}", "who": "nobody", **answer} for k, answer in enumerate(accepted)]
    case = {
        "id": "made",
        "title": "Made by a test.",
        "source": ["check 7"],
        "output": output,
        "policy": policy,
    }
    head = {"id": "parser/made", "title": "Made", "description": "Made.", "area": "made", "kind": "parser"}
    suite = ParserSuite.model_validate({**head, "cases": [{**case, **fields}]})
    return judge(suite.cases[0], suite, target)


def said(
    content: str | None = None, *, reasoning: str | None = None, calls: Sequence[tuple[str, str]] = ()
) -> ParseResult:
    made = tuple(ToolCall(name=name, arguments=arguments) for name, arguments in calls)
    return ParseResult(content=content, reasoning=reasoning, tool_calls=made)


def call_of(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


AGREED: list[tuple[list[dict[str, Any]], list[tuple[ParseResult, str]]]] = [
    (
        [{"content": "a", "reasoning": "1"}, {"content": "a"}],
        [
            (said(" a\n"), ""), (said("a", reasoning="2"), ""), (said("b"), "content differs"),
            (said("a", calls=[("f", "{}")]), "there are 1 calls, not 0"),
        ],
    ),
    (
        [{"tool_calls": [call_of("f", a=1, b=2)]}, {"tool_calls": [call_of("f", a=1, b="2")]}],
        [
            (said(calls=[("f", '{"a":1.0,"b":2}')]), ""), (said(calls=[("f", '{"a":1,"b":null}')]), ""),
            (said(calls=[("g", '{"a":1,"b":2}')]), "call 0: the name is 'g', not 'f'"),
            (said(calls=[("f", '{"a":"1","b":2}')]), "call 0: the argument 'a' differs"),
            (said(calls=[("f", '{"b":2}')]), "call 0: no argument 'a'"),
            (said(calls=[("f", '{"a":1,"b":2,"c":3}')]), "call 0: another argument 'c'"),
            (said("x", calls=[("f", '{"a":1,"b":2}')]), "content differs"),
            (said("f a b"), "content differs; there are 0 calls, not 1"),
            (said(calls=[("f", '{"a":1,"b":2}')] * 2), "there are 2 calls, not 1"),
        ],
    ),
    (
        [{"tool_calls": [call_of("f", a=1)]}, {"tool_calls": [call_of("g", a=1, b=2)]}],
        [
            (said(calls=[("h", '{"a":1,"c":3}')]), ""),
            (said(calls=[("f", '{"b":2}')]), "call 0: no argument 'a'"),
            (said(calls=[("f", '{"a":2}')]), "call 0: the argument 'a' differs"),
        ],
    ),
    (
        [
            {"tool_calls": [call_of("f", a=1), call_of("g", b=2), call_of("f", a=3)]},
            {"tool_calls": [call_of("f", a=3), call_of("f", a=1)]},
            {"tool_calls": [call_of("f", a=3), call_of("f", a=4)]},
        ],
        [
            (said(calls=[("f", '{"a":9}'), ("f", '{"a":3}')]), ""),
            (said(calls=[("f", '{"a":9}'), ("f", '{"a":8}')]), "a call of 'f' with the arguments of all "),
            (said(calls=[("f", '{"a":3}')]), "a call of 'f' is missing"),
            (said(calls=[("f", '{"a":3}'), ("g", '{"b":2}')]), "a call of 'f' is missing"),
        ],
    ),
    (
        [{"tool_calls": [call_of("f", a=1)]}, {"content": "f a 1"}],
        [(said("b"), ""), (said("b", reasoning="x"), "reasoning differs")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("accepted", "given"), AGREED)
def test_what_accepted_answers_have_in_common_holds_for_every_answer(
    accepted: list[dict[str, Any]], given: list[tuple[ParseResult, str]]
) -> None:
    for answer, message in given:
        problems = judged("f a b 1 2 g", accepted, Scripted(answer)).problems
        assert [p.rule for p in problems] == (["agreed-part"] if message else []), answer
        assert message in "".join(p.message for p in problems)


def test_what_accepted_answers_have_in_common_holds_in_streams_too() -> None:
    target = Scripted(said("a"), [Delta(content="b")])
    accepted = [{"content": "a", "reasoning": "1"}, {"content": "a"}]
    (problem,) = judged("a", accepted, target, stream_exempt="A recorded exception.").problems
    assert (problem.rule, problem.chunks) == ("agreed-part", ("a",))
