"""The check of kind `server`: an honest server passes every case; every lie breaks the rule that names it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from conformance import checks
from conformance.checks import CheckOutcome, pictures
from conformance.checks.server_rules import Asked, reply_problems
from conformance.errors import EngineError, TargetTimeoutError
from conformance.http import Limits
from conformance.loading import LoadedCase, load_suites, resolve_tools
from conformance.media import Picture
from conformance.replies import Reply
from conformance.suites import ServerCase, ServerSuite
from conformance.targets.endpoint import Endpoint
from conformance.targets.openai import OpenAITarget
from conformance.targets.protocol import TargetInfo
from conformance.targets.reference import ReferenceTarget
from model_impl.chat.parser import parse
from model_impl.nano.script import ADAPTER_SAYS, load_script
from model_impl.preprocess.images import target_size
from tests.lying_server import LyingServer
from tests.server_answers import MODEL, words
from tests.server_lies import LIES, TRANSPORT_LIES
from tests.server_pictures import BadPictureError, opened

KEY = "sk-test-0123456789"
PATIENT = Limits(connect=10, idle=5, total=20, max_bytes=2_000_000)
SUITES = [suite for suite in load_suites() if isinstance(suite.suite, ServerSuite)]
CASES = {case.address.removeprefix("server/"): case for suite in SUITES for case in suite.cases}


class Adapted(OpenAITarget):
    """A server that is known to have the adapter."""

    def describe(self) -> TargetInfo:
        return super().describe().model_copy(update={"features": ("lora",)})


def server_case(loaded: LoadedCase) -> ServerCase:
    assert isinstance(loaded.case, ServerCase)
    return loaded.case


CAUGHT: dict[str, tuple[str, str]] = {
    # lie: the case that is asked, and the rule that it must break
    "marker-leaked": ("text::plain", "marker-leak"),
    "adapter-not-used": ("tuned::by-name", "adapter-ignored"),
    "requests-given-the-adapter": ("tuned::side-by-side", "requests-mixed"),
    "marker-leaked-streamed": ("text::plain", "marker-leak"),
    "marker-in-arguments": ("tools::call", "marker-leak"),
    "streamed-differs": ("text::plain", "stream-equals-whole"),
    "thought-streamed-as-content": ("thinking::thought", "stream-equals-whole"),
    "arguments-streamed-otherwise": ("tools::call", "stream-equals-whole"),
    "call-lost-in-the-stream": ("tools::two-calls", "stream-equals-whole"),
    "finish-reason-streamed-otherwise": ("text::plain", "stream-equals-whole"),
    "usage-streamed-otherwise": ("text::plain", "stream-equals-whole"),
    "stop-with-calls": ("tools::call", "finish-reason"),
    "tool-calls-without-calls": ("text::plain", "finish-reason"),
    "length-without-limit": ("text::plain", "finish-reason"),
    "unknown-finish-reason": ("text::plain", "finish-reason"),
    "no-finish-reason": ("text::plain", "finish-reason"),
    "truncation-hidden": ("limits::cut-call", "truncation-hidden"),
    "truncation-hidden-streamed": ("limits::cut-text", "truncation-hidden"),
    "requests-mixed": ("concurrency::three-users", "requests-mixed"),
    "requests-interleaved": ("concurrency::three-users", "requests-mixed"),
    "usage-missing": ("text::plain", "usage"),
    "usage-does-not-add-up": ("text::plain", "usage"),
    "everything-lost": ("text::layout", "nothing-lost"),
    "logprobs-above-zero": ("logprobs::text", "logprobs"),
    "logprobs-not-finite": ("logprobs::text", "logprobs"),
    "logprobs-not-the-likeliest": ("logprobs::text", "logprobs"),
    "logprobs-too-few": ("logprobs::text", "logprobs"),
    "logprobs-missing": ("logprobs::text", "logprobs"),
    "logprobs-of-other-tokens": ("logprobs::text", "logprobs"),
    "logprobs-without-bytes-of-other-tokens": ("logprobs::text", "logprobs"),
    "logprobs-with-broken-bytes": ("logprobs::text", "logprobs"),
    "logprobs-streamed-otherwise": ("logprobs::text", "logprobs"),
    "tokens-streamed-otherwise": ("logprobs::call", "logprobs"),
    "bad-request-500": ("errors::no-messages", "bad-request-status"),
    "bad-request-accepted": ("errors::negative-limit", "bad-request-accepted"),
    "error-without-object": ("errors::unknown-model", "error-object"),
    "half-characters": ("text::unicode", "unicode"),
    "half-surrogates": ("text::unicode", "unicode"),
    "indices-all-zero": ("tools::two-calls", "call-start"),
    "indices-by-tool": ("tools::call", "indices"),
    "ids-missing": ("tools::call", "call-ids"),
    "ids-all-the-same": ("tools::two-calls", "call-ids"),
    "name-in-every-part": ("tools::nested", "call-start"),
    "arguments-no-json": ("tools::call", "arguments-json"),
    "stop-string-kept": ("limits::stop-string", "stop-string"),
    "stop-string-ignored": ("limits::stop-string", "stop-string"),
    "schema-ignored": ("json::without-thinking", "json-schema"),
    "other-schema": ("json::with-thinking", "json-schema"),
    "format-ignored": ("json::against-the-model", "json-schema"),
    "json-scalar": ("json::any-object", "json-schema"),
    "call-without-leave": ("tools::choice-none", "tool-choice"),
    "another-function": ("tools::choice-named", "tool-choice"),
    "never-calls": ("tools::choice-required", "tool-choice"),
    "choice-ignored": ("tools::choice-required-against-the-model", "tool-choice"),
    "no-done": ("text::plain", "stream-end"),
    "text-after-the-end": ("text::plain", "stream-end"),
    "second-end": ("text::plain", "stream-end"),
    "error-in-the-stream": ("text::plain", "stream-end"),
    "two-stream-ids": ("text::plain", "stream-id"),
    "whole-for-a-stream": ("text::plain", "malformed-response"),
    "html": ("text::plain", "malformed-response"),
    "no-choice": ("text::plain", "malformed-response"),
    "broken": ("text::plain", "http-status"),
    "key-echoed": ("text::plain", "key-echoed"),
    "key-echoed-in-parts": ("text::plain", "key-echoed"),
    "key-echoed-in-a-broken-stream": ("text::plain", "key-echoed"),
    "key-echoed-beyond-an-excerpt": ("text::plain", "key-echoed"),
    "key-echoed-in-broken-json": ("text::plain", "key-echoed"),
    "key-echoed-in-escapes": ("text::plain", "key-echoed"),
    "key-echoed-after-the-end": ("text::plain", "key-echoed"),
    "key-echoed-in-an-error": ("text::plain", "key-echoed"),
    "pictures-swapped": ("images::two-in-order", "expected"),
    "first-picture-for-all": ("images::later-turn", "stale-picture"),
    "pictures-ignored": ("images::another-picture", "picture-ignored"),
    "pictures-not-counted": ("images::soft-tokens", "picture-tokens"),
    "pictures-refused": ("images::colour", "http-status"),
    "png-alone": ("images::formats", "http-status"),
    "broken-by-a-bad-request": ("images::truncated", "next-request"),
    "redirect": ("text::plain", "redirect"),
    "flood": ("text::plain", "response-size"),
    "compressed": ("text::plain", "malformed-response"),
}
NO_RULE = {
    "unrepeatable",
    "too-many-requests",
    "same-for-everybody",
    "tools-refused",
    "endless-stream",
    "stalled-stream",
    "drip",
    "cut-off",
}
"""Lies that leave no rule to break: the case is inconclusive, out of time or in error."""


def judge(server: LyingServer, name: str, limits: Limits = PATIENT) -> CheckOutcome:
    loaded = CASES[name]
    target = Adapted(Endpoint(server.url, MODEL), limits=limits, key=KEY)
    return checks.judge(loaded.case, loaded.suite.suite, target)


def test_a_server_without_the_adapter_is_not_asked_for_it(honest: LyingServer) -> None:
    loaded = CASES["tuned::by-name"]
    target = OpenAITarget(Endpoint(honest.url, MODEL), limits=PATIENT, key=KEY)
    outcome = checks.judge(loaded.case, loaded.suite.suite, target)
    assert outcome.verdict == "skip"
    assert "no adapter 'another-line' is served" in outcome.reason


def rules(outcome: CheckOutcome) -> set[str]:
    return {problem.rule for problem in outcome.problems}


@pytest.fixture(scope="module")
def honest() -> Iterator[LyingServer]:
    with LyingServer() as server:
        yield server


@pytest.mark.parametrize("name", CASES)
def test_an_honest_server_passes(honest: LyingServer, name: str) -> None:
    outcome = judge(honest, name)
    assert (outcome.verdict, outcome.problems, outcome.reason) == ("pass", (), "")


def test_every_lie_has_a_test() -> None:
    assert set(CAUGHT) | NO_RULE == {*LIES, *TRANSPORT_LIES}


@pytest.mark.parametrize(("lie", "name", "rule"), [(lie, *case) for lie, case in CAUGHT.items()])
def test_a_lie_breaks_the_rule_that_names_it(lie: str, name: str, rule: str) -> None:
    with LyingServer() as elsewhere, LyingServer(lie, elsewhere=elsewhere.url) as server:
        outcome = judge(server, name)
        assert not elsewhere.seen
    assert outcome.verdict == "fail"
    assert rule in rules(outcome)
    assert KEY not in json.dumps([problem.model_dump() for problem in outcome.problems])
    assert KEY not in outcome.evidence.model_dump_json()


@pytest.mark.parametrize(
    ("lie", "name", "rule"),
    [
        ("pictures-swapped", "two-the-other-way-round", "expected"),
        ("pictures-swapped", "soft-tokens", "expected"),
        ("pictures-swapped", "words-between", "expected"),
        ("first-picture-for-all", "later-turn", "expected"),
        ("first-picture-for-all", "formats", "expected"),
        ("pictures-ignored", "colour", "expected"),
        ("pictures-ignored", "soft-tokens", "picture-ignored"),
        ("pictures-ignored", "both-ways", "expected"),
        ("pictures-ignored", "earlier-picture", "expected"),
        ("requests-mixed", "three-users", "requests-mixed"),
        ("bad-request-500", "empty", "bad-request-status"),
        ("bad-request-500", "claimed-pixels", "bad-request-status"),
        ("bad-request-accepted", "other-format", "bad-request-accepted"),
        ("error-without-object", "no-base64", "error-object"),
    ],
)
def test_lies_about_pictures_break_rules(lie: str, name: str, rule: str) -> None:
    with LyingServer(lie) as server:
        outcome = judge(server, f"images::{name}")
    assert outcome.verdict == "fail"
    assert rule in rules(outcome)
    assert len(outcome.evidence.input) < 2000, "no bytes of pictures"


class Elsewhere(OpenAITarget):
    """An endpoint whose model nobody knows by heart, though it is asked for by that name."""

    def describe(self) -> TargetInfo:
        info = super().describe()
        return info.model_copy(update={"environment": {**info.environment, "model": "gemma"}})


def judge_elsewhere(server: LyingServer, name: str) -> CheckOutcome:
    loaded = CASES[name]
    return checks.judge(
        loaded.case, loaded.suite.suite, Elsewhere(Endpoint(server.url, MODEL), limits=PATIENT)
    )


PICTURE_CASES = [name for name, loaded in CASES.items() if pictures.in_case(server_case(loaded))]


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_a_server_that_takes_no_pictures_is_inconclusive(name: str) -> None:
    with LyingServer("pictures-refused") as server:
        outcome = judge_elsewhere(server, name)
    assert outcome.verdict == "inconclusive"
    if server_case(CASES[name]).refused:
        assert "without its fault is refused too" in outcome.reason
    else:
        assert "takes no such pictures: HTTP 400: this model reads text only" in outcome.reason


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_an_honest_server_passes_whatever_its_name(name: str) -> None:
    with LyingServer() as server:
        outcome = judge_elsewhere(server, name)
    assert (outcome.verdict, outcome.problems, outcome.reason) == ("pass", (), "")


@pytest.mark.parametrize(
    ("lie", "name", "rule"),
    [
        ("png-alone", "images::formats", "http-status"),
        ("pictures-ignored", "images::another-picture", "picture-ignored"),
        ("first-picture-for-all", "images::later-turn", "stale-picture"),
        ("pictures-not-counted", "images::soft-tokens", "picture-tokens"),
    ],
)
def test_some_rules_need_no_known_answer(lie: str, name: str, rule: str) -> None:
    with LyingServer(lie) as server:
        assert rules(judge_elsewhere(server, name)) == {rule}


@pytest.mark.parametrize("choice", ["none", "required", "named"])
def test_a_choice_that_is_ignored_shows_where_the_model_wants_the_opposite(choice: str) -> None:
    with LyingServer("choice-ignored") as server:
        outcome = judge(server, f"tools::choice-{choice}-against-the-model")
        assert judge(server, f"tools::choice-{choice}").verdict == "pass"
    assert outcome.verdict == "fail"
    assert "tool-choice" in rules(outcome)


@pytest.mark.parametrize("lie", ["endless-stream", "stalled-stream", "drip"])
def test_a_stream_that_does_not_end_is_out_of_time(lie: str) -> None:
    with LyingServer(lie) as server, pytest.raises(TargetTimeoutError):
        judge(server, "text::plain", Limits(connect=1, idle=0.3, total=0.6))


def test_a_connection_that_breaks_is_an_error() -> None:
    with LyingServer("cut-off") as server, pytest.raises(EngineError):
        judge(server, "text::plain")


@pytest.mark.parametrize("name", ["tools::call", "tools::two-calls", "limits::cut-call"])
def test_a_model_that_never_calls_proves_nothing_about_calls(name: str) -> None:
    with LyingServer("never-calls") as server:
        loaded = CASES[name]
        target = OpenAITarget(Endpoint(server.url, MODEL), limits=PATIENT)
        case = loaded.case.model_copy(update={"exact": None})
        outcome = checks.judge(case, loaded.suite.suite, target)
    assert outcome.verdict == "inconclusive"
    assert "never produced" in outcome.reason


def test_a_server_that_does_not_repeat_itself_is_inconclusive() -> None:
    with LyingServer("unrepeatable") as server:
        outcome = judge(server, "text::code")
    assert outcome.verdict == "inconclusive"
    assert "answers otherwise" in outcome.reason


def test_equal_answers_for_everybody_prove_nothing_about_a_mix_up() -> None:
    with LyingServer("same-for-everybody") as server:
        outcome = judge(server, "concurrency::three-users")
    assert outcome.verdict == "inconclusive"
    assert "no word of its own" in outcome.reason


def test_a_server_that_refuses_the_sound_request_too_proves_nothing_about_the_fault() -> None:
    with LyingServer("tools-refused") as server:
        outcome = judge(server, "errors::undeclared-choice")
        assert judge(server, "errors::no-messages").verdict == "pass"
    assert outcome.verdict == "inconclusive"
    assert "refused too" in outcome.reason


@pytest.mark.parametrize(
    ("tokens", "content", "problems"),
    [
        ([{"token": "Ein "}, {"token": "M\ufffd"}, {"token": "\ufffdr"}], "Ein Mär", 0),
        ([{"token": "Ein "}, {"token": "M\ufffd"}, {"token": "\ufffd"}], "Ein Mär", 1),
        ([{"token": "?", "bytes": [77, 195]}, {"token": "?", "bytes": [164, 114]}], "Mär", 0),
        ([{"token": "?", "bytes": [77, 195]}, {"token": "?", "bytes": [165, 114]}], "Mär", 1),
        ([{"token": "a"}, {"token": " "}, {"token": "<turn|>"}], " a", 0),
    ],
)
def test_characters_of_several_tokens_are_those_of_the_content(
    tokens: list[dict[str, Any]], content: str, problems: int
) -> None:
    scores = {"logprob": -0.5, "top_logprobs": [{"token": "x", "logprob": -0.5}]}
    reply = Reply(content=content, finish_reason="stop", logprobs=[token | scores for token in tokens])
    reply.usage = {"prompt_tokens": 1, "completion_tokens": len(tokens), "total_tokens": 1 + len(tokens)}
    asked = Asked(server_case(CASES["logprobs::text"]), (), 256, "whole")
    assert [problem.rule for problem in reply_problems(reply, asked)] == ["logprobs"] * problems


def test_429_is_recorded_and_not_asked_again() -> None:
    with LyingServer("too-many-requests") as server:
        outcome = judge(server, "text::plain")
        assert len(server.seen) == 1
    assert outcome.verdict == "inconclusive"
    assert "429" in outcome.reason


def test_the_script_is_asserted_of_the_scripted_model_alone() -> None:
    loaded = CASES["text::plain"]
    case = loaded.case.model_copy(update={"exact": loaded.case.exact.model_copy(update={"content": "Else."})})  # type: ignore[union-attr]
    with LyingServer() as server:
        target = OpenAITarget(Endpoint(server.url, MODEL), limits=PATIENT)
        outcome = checks.judge(case, loaded.suite.suite, target)
    assert rules(outcome) == {"expected"}


@pytest.mark.parametrize("name", ["thinking::open-thought", "limits::second-call-breaks-off"])
def test_a_contested_answer_may_not_lose_its_text(name: str) -> None:
    with LyingServer() as server:
        assert judge(server, name).verdict == "pass"
    with LyingServer("everything-lost") as server:
        outcome = judge(server, name)
    lost = [p.message for p in outcome.problems if p.rule == "nothing-lost" and "in no field" in p.message]
    assert len(lost) == 2
    assert all(server_case(CASES[name]).keep[-1] in message for message in lost)


def test_a_target_that_does_not_serve_is_skipped() -> None:
    loaded = CASES["text::plain"]
    outcome = checks.judge(loaded.case, loaded.suite.suite, ReferenceTarget())
    assert (outcome.verdict, outcome.reason) == ("skip", "reference has no capability `serve`")


# ---------------------------------------------------------------------------- the suites


@pytest.mark.parametrize("name", CASES)
def test_a_case_asks_for_a_line_of_the_script_and_expects_it(name: str) -> None:
    case = server_case(CASES[name])
    script = load_script()
    asked = words(case.messages[-1])
    beside = [
        said if isinstance(said, str) else words({"content": list(said.content)}) for said in case.beside
    ]
    if "#" not in asked:
        assert asked == "Hello!"
        says = ADAPTER_SAYS if case.adapter else script.default.output
        assert case.exact is None or case.exact.content == says
        return
    for text in [asked, *beside]:
        assert sum(f"{key}." in text for key in script.keys) == 1, text
    if case.exact is None:
        return
    about = [line for line in script.pictures.lines if f"{line.key}." in asked]
    if about:
        colours = [picture.colour for picture in pictures.pictures_of(case.messages)]
        assert script.pictures.output(about[0], colours) == case.exact.content
        return
    line = next(line for line in script.lines if f"{line.key}." in asked)
    message = parse(line.output, tools=resolve_tools(case, CASES[name].suite.suite))
    assert message.content.strip() == case.exact.content.strip()
    assert message.reasoning.strip() == case.exact.reasoning.strip()
    found = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
    assert found == [(call.name, call.arguments) for call in case.exact.tool_calls]


def test_tools_are_those_of_the_script() -> None:
    declared = {tool["function"]["name"]: tool for tool in load_script().tools}
    for case in CASES.values():
        for tool in resolve_tools(case.case, case.suite.suite):
            assert tool == declared[tool["function"]["name"]], case.address


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (48, 48), (512, 512), (1920, 1080), (3, 900), (900, 12), (1000, 1), (1, 20_000), (20_000, 100)],
)
def test_soft_tokens_are_those_of_the_bundled_processor(width: int, height: int) -> None:
    picture = Picture(width=width, height=height)
    for budget in pictures.BUDGETS:
        rows, columns = target_size(height, width, budget)
        assert pictures.soft_tokens(picture, budget) == rows * columns // 48**2


def test_pictures_are_sent_as_data_urls_and_damage_can_be_mended() -> None:
    case = server_case(CASES["images::truncated"])
    broken, whole = (
        pictures.sendable(messages)[0]["content"][0]["image_url"]["url"]
        for messages in (case.messages, pictures.mended(case.messages))
    )
    assert whole.startswith("data:image/png;base64,")
    assert whole != broken
    data = {url: base64.b64decode(url.partition(",")[2]) for url in (whole, broken)}
    assert data[whole].startswith(data[broken])
    assert opened({"image_url": {"url": whole}}).size == (96, 96)
    with pytest.raises(BadPictureError):
        opened({"image_url": {"url": broken}})


def test_a_case_without_pictures_sends_what_it_says() -> None:
    messages = server_case(CASES["tools::nested"]).messages
    assert pictures.sendable(messages) == [*messages]
    assert not pictures.in_case(server_case(CASES["tools::nested"]))


IMAGE = {"type": "image", "image": {"width": 9, "height": 9}}
BROKEN = {"type": "image", "image": {"width": 9, "height": 9, "damage": "empty"}}


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ([{"type": "image", "image": {"width": 0, "height": 9}}], {}, "width"),
        ([{"type": "image", "image": {"width": 9, "height": 9, "color": "red"}}], {}, "color"),
        ([BROKEN], {"produces": ["content"]}, "a damaged picture must be `refused: true`"),
        ([IMAGE], {"refused": True}, "`refused` needs an `override`, or a damaged picture"),
        ([IMAGE], {"instead": [IMAGE["image"]] * 2}, "`instead` has 2 pictures for 1"),
        ([IMAGE], {"instead": [IMAGE["image"]], "turn_by_turn": True}, "`instead` and `turn_by_turn`"),
    ],
)
def test_a_bad_case_with_pictures_is_refused(
    content: list[Any], fields: dict[str, Any], message: str
) -> None:
    case = {"id": "one", "title": "A case of the tests.", "source": ["spec 3.1"], "produces": ["content"]}
    with pytest.raises(ValidationError, match=message):
        ServerCase.model_validate({**case, "messages": [{"role": "user", "content": content}], **fields})
