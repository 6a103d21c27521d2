"""The template check: each rule, and that targets which render wrongly fail the bundled suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from conformance.checks import CheckOutcome, judge
from conformance.errors import EngineError, TargetTimeoutError, WorkerDiedError
from conformance.loading import load_suites
from conformance.suites import TemplateCase, TemplateSuite
from conformance.targets.protocol import (
    Capability,
    Certificate,
    CertifyRequest,
    ParseRequest,
    ParseResult,
    RenderRequest,
    RenderResult,
    StreamRequest,
    StreamResult,
    TargetInfo,
)
from conformance.targets.reference import ReferenceTarget

SUITES = Path(__file__).parents[1] / "suites" / "template"
PROMPT = "<bos><|turn>user\nTokyo<turn|>\n"
IDS = (2, 105, 2364, 107, 89265, 106, 107)


class Fake:
    """Renders as it is told to."""

    spec = "fake"

    def __init__(
        self,
        answer: Callable[[RenderRequest], RenderResult] | str,
        capabilities: tuple[Capability, ...] = ("render",),
    ) -> None:
        self.answer = answer
        self.capabilities = capabilities
        self.requests: list[RenderRequest] = []

    def describe(self) -> TargetInfo:
        return TargetInfo(name="fake", version="1", capabilities=self.capabilities)

    def render(self, request: RenderRequest) -> RenderResult:
        self.requests.append(request)
        return RenderResult(prompt=self.answer) if isinstance(self.answer, str) else self.answer(request)

    def parse(self, request: ParseRequest) -> ParseResult:
        raise NotImplementedError

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        raise NotImplementedError

    def certify(self, request: CertifyRequest) -> Certificate:
        raise NotImplementedError

    def close(self) -> None:
        pass


def fails(error: Exception) -> Fake:
    def render(request: RenderRequest) -> RenderResult:
        raise error

    return Fake(render)


def run(target: Fake, expect: dict[str, Any], **changes: Any) -> CheckOutcome:
    case = TemplateCase.model_validate(
        {
            "id": "demo",
            "title": "A case of this test.",
            "source": ["spec 6.2"],
            "messages": [{"role": "user", "content": "Tokyo"}],
            "families": ["large"],
            "expect": expect,
        }
        | changes
    )
    suite = TemplateSuite(
        id="template/demo",
        kind="template",
        title="Demo",
        description="Made by a test.",
        area="template",
        toolsets={"one": ({"type": "function", "function": {"name": "f"}},)},
        cases=(case,),
    )
    return judge(case, suite, target)


def rules(outcome: CheckOutcome) -> list[str]:
    assert outcome.verdict == ("fail" if outcome.problems else "pass")
    return [problem.rule for problem in outcome.problems]


@pytest.mark.parametrize(
    ("expect", "broken"),
    [
        ({"prompt": PROMPT}, []),
        ({"prompt": PROMPT + " "}, ["prompt"]),
        ({"ids": IDS}, []),
        ({"ids": IDS[:-1]}, ["prompt-ids"]),
        ({"contains": ["Tokyo", "user"]}, []),
        ({"contains": ["Tokyo", "Oslo", "Rome"]}, ["prompt-contains", "prompt-contains"]),
        ({"absent": ["Oslo"]}, []),
        ({"absent": ["Oslo", "Tokyo"]}, ["prompt-absent"]),
        ({"endswith": "<turn|>\n"}, []),
        ({"endswith": "<turn|>"}, ["prompt-tail"]),
        ({"counts": {"<bos>": 1, "Oslo": 0}}, []),
        ({"counts": {"<bos>": 2, "Tokyo": 0}}, ["prompt-counts", "prompt-counts"]),
        ({"error": True}, ["not-refused"]),
    ],
)
def test_rules_of_the_case(expect: dict[str, Any], broken: list[str]) -> None:
    assert rules(run(Fake(PROMPT), expect)) == broken


@pytest.mark.parametrize(
    ("prompt", "broken"),
    [
        (PROMPT, []),
        (PROMPT.removeprefix("<bos>"), ["prompt-bos"]),
        ("<bos>" + PROMPT, ["prompt-bos"]),
        (PROMPT + "<bos>", ["prompt-bos"]),
        ("\n" + PROMPT, ["prompt-bos"]),
        ("", ["prompt-bos"]),
        (PROMPT + "<|turn>model\n", []),
        ("<bos><|turn>user\n<|turn>model\n", ["prompt-turns"]),
        (PROMPT + "<turn|>\n", ["prompt-turns"]),
        ("<bos><|turn>model\n<|tool_call>call:f{}<tool_call|><|tool_response><|turn>user\nHi<turn|>\n", []),
        ("<bos><|turn>model\n<|tool_response>response:f{}<tool_response|><|turn>model\n", ["prompt-turns"]),
    ],
)
def test_hard_rules(prompt: str, broken: list[str]) -> None:
    assert rules(run(Fake(prompt), {"absent": ["Oslo"]})) == broken


def test_hard_rules_excuse_what_the_conversation_says() -> None:
    message = {"role": "user", "content": "What do <bos> and <turn|> mean?"}
    right = f"<bos><|turn>user\n{message['content']}<turn|>\n"
    assert rules(run(Fake(right), {"contains": ["mean"]}, messages=[message])) == []
    doubled = Fake("<bos>" + right)
    assert rules(run(doubled, {"contains": ["mean"]}, messages=[message])) == ["prompt-bos"]


@pytest.mark.parametrize(
    ("ids", "broken"),
    [
        (IDS, []),
        (IDS[1:], ["prompt-ids", "prompt-bos"]),
        ((2, *IDS), ["prompt-ids", "prompt-bos"]),
        ((), ["prompt-ids", "prompt-bos"]),
        ((*IDS, 3), ["prompt-ids"]),
    ],
)
def test_ids_of_the_target_are_judged_where_it_gives_them(ids: tuple[int, ...], broken: list[str]) -> None:
    target = Fake(lambda request: RenderResult(prompt=PROMPT, token_ids=ids))
    assert rules(run(target, {"ids": IDS})) == broken


def test_a_prompt_that_has_no_ids_is_a_problem_not_a_crash() -> None:
    assert rules(run(Fake(PROMPT + "\ud800"), {"ids": IDS})) == ["prompt-ids"]


def test_errors_of_the_engine() -> None:
    target = fails(EngineError("TypeError: no"))
    outcome = run(target, {"prompt": PROMPT})
    assert rules(outcome) == ["raised"]
    assert "TypeError: no" in outcome.problems[0].message
    assert outcome.evidence.got == {"large": {"error": "TypeError: no"}}
    assert rules(run(target, {"error": True})) == []


@pytest.mark.parametrize("error", [WorkerDiedError("gone"), TargetTimeoutError("late")])
def test_errors_of_the_transport_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(fails(error), {"error": True})


def test_a_target_that_does_not_render_is_skipped_unasked() -> None:
    target = Fake(PROMPT, capabilities=("parse",))
    outcome = run(target, {"prompt": "wrong"})
    assert (outcome.verdict, outcome.problems, target.requests) == ("skip", (), [])
    assert outcome.reason == "fake has no capability `render`"


def test_each_family_is_judged_by_its_own_rules() -> None:
    target = Fake(lambda request: RenderResult(prompt=f"<bos>{request.family}"))
    both = {"families": ["large", "e"]}
    assert rules(run(target, {"endswith": "large"}, expect_e={"endswith": "e"}, **both)) == []
    outcome = run(target, {"endswith": "large"}, **both)
    assert rules(outcome) == ["prompt-tail"]
    assert outcome.problems[0].message.startswith("e: ")
    assert outcome.evidence.prompt == "[large]\n<bos>large\n\n[e]\n<bos>e"
    assert run(Fake(PROMPT), {"prompt": PROMPT}, **both).evidence.prompt == PROMPT


def test_the_request_is_the_case() -> None:
    target = Fake(PROMPT)
    options = {"thinking": False, "preserve_thinking": True, "add_generation_prompt": False}
    run(target, {"prompt": PROMPT}, tools="one", families=["e"], **options)
    expected = RenderRequest(
        messages=({"role": "user", "content": "Tokyo"},),
        tools=({"type": "function", "function": {"name": "f"}},),
        family="e",
        thinking=False,
        preserve_thinking=True,
        add_generation_prompt=False,
    )
    assert target.requests == [expected]


def test_a_difference_is_shown_where_it_begins() -> None:
    problem = run(Fake(PROMPT), {"prompt": PROMPT.replace("Tokyo", "Oslo")}).problems[0]
    assert "from character 17 on: expected 'Oslo<turn|>\\n', got 'Tokyo<turn|>\\n'" in problem.message
    problem = run(Fake(PROMPT), {"prompt": PROMPT + "more"}).problems[0]
    assert "expected 'more', got the end" in problem.message


def broken(change: Callable[[RenderRequest, str], str]) -> Fake:
    """The bundled renderer with a fault."""
    reference = ReferenceTarget()

    def render(request: RenderRequest) -> RenderResult:
        return RenderResult(prompt=change(request, reference.render(request).prompt))

    return Fake(render)


def silently(request: RenderRequest, prompt: str) -> str:
    return prompt


FAULTS: dict[str, Callable[[RenderRequest, str], str]] = {
    "drops bos": lambda request, prompt: prompt.removeprefix("<bos>"),
    "doubles bos": lambda request, prompt: "<bos>" + prompt,
    "leaves the channel open": lambda request, prompt: prompt.removesuffix("<channel|>"),
    "closes the channel with thinking on": lambda request, prompt: (
        prompt + "<|channel>thought\n<channel|>" if prompt.endswith("<|turn>model\n") else prompt
    ),
    "ignores the thinking flag": lambda request, prompt: prompt.replace("<|think|>\n", ""),
    "writes None": lambda request, prompt: prompt.replace("null", "None"),
    "keeps space before the end of a turn": lambda request, prompt: prompt.replace("<turn|>", " <turn|>"),
    "calls the model assistant": lambda request, prompt: prompt.replace("<|turn>model", "<|turn>assistant"),
    "puts results in user turns": lambda request, prompt: prompt.replace(
        "<tool_call|><|tool_response>", "<tool_call|><turn|>\n<|turn>user\n<|tool_response>"
    ),
    "quotes keys": lambda request, prompt: prompt.replace("{a:", '{<|"|>a<|"|>:'),
    "lower-case types": lambda request, prompt: prompt.replace("OBJECT", "object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_suites_notice_a_faulty_renderer(fault: str) -> None:
    assert "fail" in verdicts(broken(FAULTS[fault]))


def test_the_suites_notice_a_renderer_that_never_refuses() -> None:
    reference = ReferenceTarget()

    def render(request: RenderRequest) -> RenderResult:
        try:
            return reference.render(request)
        except EngineError:
            return RenderResult(prompt=PROMPT)

    failed = verdicts(Fake(render)).count("fail")
    assert failed == sum(loaded.case.expect.error for loaded in load_suites([SUITES]).cases)  # type: ignore[union-attr]


def test_the_suites_pass_the_faultless_renderer() -> None:
    assert set(verdicts(broken(silently))) == {"pass"}


def verdicts(target: Fake) -> list[str]:
    return [judge(loaded.case, loaded.suite.suite, target).verdict for loaded in load_suites([SUITES]).cases]
