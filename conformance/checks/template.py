"""Judge the prompt that a target renders from a conversation.

1. The case's own rules: exact text or ids, texts that must or must not be there, counts, a refusal.
2. Hard rules on every prompt. It begins with the one `<bos>` there is; no turn opens inside another,
   and none ends that is not open. Text of the conversation that spells these markers is excused: the
   format cannot escape it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from conformance.checks.base import CheckOutcome
from conformance.errors import EngineError, NotRecordedError
from conformance.loading import resolve_tools
from conformance.results import Evidence, Problem
from conformance.suites import ExpectedPrompt, TemplateCase, TemplateSuite
from conformance.targets.protocol import RenderRequest, RenderResult, Target
from conformance.tokenization import EncodingError, encode

Family = Literal["large", "e"]

BOS = "<bos>"
BOS_ID = 2
TURN_OPEN = "<|turn>"
TURN_CLOSE = "<turn|>"

# A turn that stops for an unanswered call is left behind its bare `<|tool_response>`.
_TURN_MARKERS = re.compile(r"<\|turn>|<turn\|>|<\|tool_response>(?=<\|turn>)")


def judge(case: TemplateCase, suite: TemplateSuite, target: Target) -> CheckOutcome:
    """Render the case's conversation for each of its families and judge every prompt.

    Raises:
        WorkerDiedError, TargetTimeoutError: From the target.
    """
    if "render" not in target.describe().capabilities:
        return CheckOutcome("skip", reason=f"{target.spec} has no capability `render`")
    problems: list[Problem] = []
    expected: dict[str, Any] = {}
    got: dict[str, Any] = {}
    missing: NotRecordedError | None = None
    for family in case.families:
        rules = case.expect_e if family == "e" and case.expect_e is not None else case.expect
        expected[family] = rules.model_dump(mode="json", exclude_unset=True)
        request = build_request(case, suite, family)
        answer: RenderResult | EngineError
        try:
            answer = target.render(request)
        except EngineError as error:
            answer = error
            got[family] = {"error": str(error)}
        except NotRecordedError as error:
            missing = error
            continue
        else:
            got[family] = answer.model_dump(mode="json", exclude_none=True)
        found = _judge_answer(answer, rules, _conversation_text(request))
        problems += [
            problem.model_copy(update={"message": f"{family}: {problem.message}"}) for problem in found
        ]
    if missing is not None and not problems:
        raise missing
    evidence = Evidence(
        input=json.dumps(case.messages, ensure_ascii=False, indent=2),
        prompt=_prompts(got),
        expected=expected,
        got=got,
    )
    return CheckOutcome.from_problems(problems, evidence)


def build_request(case: TemplateCase, suite: TemplateSuite, family: Family) -> RenderRequest:
    """The request that a case makes for a family."""
    return RenderRequest(
        messages=case.messages,
        tools=resolve_tools(case, suite),
        thinking=case.thinking,
        add_generation_prompt=case.add_generation_prompt,
        preserve_thinking=case.preserve_thinking,
        family=family,
    )


def _conversation_text(request: RenderRequest) -> str:
    return json.dumps([request.messages, request.tools], ensure_ascii=False)


def _prompts(got: dict[str, Any]) -> str:
    """The prompt, once if all families have the same."""
    prompts = {family: answer["prompt"] for family, answer in got.items() if "prompt" in answer}
    if len(set(prompts.values())) == 1:
        return str(next(iter(prompts.values())))
    return "\n\n".join(f"[{family}]\n{prompt}" for family, prompt in prompts.items())


def _judge_answer(
    answer: RenderResult | EngineError, rules: ExpectedPrompt, conversation: str
) -> Iterator[Problem]:
    if isinstance(answer, EngineError):
        if not rules.error:
            yield Problem(rule="raised", message=f"rendering raised {answer}", got=str(answer))
    elif rules.error:
        yield Problem(
            rule="not-refused",
            message="the conversation has no prompt and must be refused, but a prompt came out",
            got=answer.prompt,
        )
    else:
        yield from _case_problems(answer, rules)
        yield from _bos_problems(answer, conversation)
        if TURN_OPEN not in conversation and TURN_CLOSE not in conversation:
            yield from turn_problems(answer.prompt)


def _case_problems(answer: RenderResult, rules: ExpectedPrompt) -> Iterator[Problem]:
    """Rules that the case states."""
    prompt = answer.prompt
    if rules.prompt is not None and prompt != rules.prompt:
        yield Problem(
            rule="prompt",
            message=f"the prompt differs from {_first_difference(rules.prompt, prompt)}",
            expected=rules.prompt,
            got=prompt,
        )
    if rules.ids is not None:
        yield from _id_problems(answer, rules.ids)
    for text in rules.contains:
        if text not in prompt:
            yield Problem(
                rule="prompt-contains", message=f"{text!r} is not in the prompt", expected=text, got=prompt
            )
    for text in rules.absent:
        if text in prompt:
            yield Problem(
                rule="prompt-absent",
                message=f"{text!r} is in the prompt at character {prompt.index(text)}",
                expected=f"no {text!r}",
                got=prompt,
            )
    if rules.endswith is not None and not prompt.endswith(rules.endswith):
        tail = prompt[-max(len(rules.endswith), 40) :]
        yield Problem(
            rule="prompt-tail",
            message=f"the prompt ends with {tail!r}, not with {rules.endswith!r}",
            expected=rules.endswith,
            got=tail,
        )
    for text, count in rules.counts.items():
        if prompt.count(text) != count:
            yield Problem(
                rule="prompt-counts",
                message=f"{text!r} is {prompt.count(text)} times in the prompt, not {count} times",
                expected=count,
                got=prompt.count(text),
            )


def _id_problems(answer: RenderResult, expected: tuple[int, ...]) -> Iterator[Problem]:
    """Ids as the target says, or, if it does not tokenise, as the harness's tokenizer makes them."""
    try:
        ids = encode(answer.prompt) if answer.token_ids is None else answer.token_ids
    except EncodingError as error:
        yield Problem(rule="prompt-ids", message=f"the prompt has no token ids: {error}", got=answer.prompt)
        return
    if ids != expected:
        yield Problem(
            rule="prompt-ids",
            message=f"the token ids differ from {_first_difference(expected, ids, unit='token')}",
            expected=list(expected),
            got=list(ids),
        )


def _bos_problems(answer: RenderResult, conversation: str) -> Iterator[Problem]:
    """Exactly one beginning of sequence, at the beginning: in the text, and in the ids if there are any."""
    most = 1 + conversation.count(BOS)
    if not answer.prompt.startswith(BOS) or answer.prompt.count(BOS) > most:
        yield Problem(
            rule="prompt-bos",
            message=f"the prompt must begin with its only {BOS}; it has {answer.prompt.count(BOS)} "
            f"and begins with {answer.prompt[:20]!r}",
            got=answer.prompt,
        )
    ids = answer.token_ids
    if ids is not None and (ids[:1] != (BOS_ID,) or ids.count(BOS_ID) > most):
        yield Problem(
            rule="prompt-bos",
            message=f"the token ids must begin with their only {BOS_ID} ({BOS}); they have "
            f"{ids.count(BOS_ID)} and begin with {list(ids[:3])}",
            got=list(ids),
        )


def turn_problems(prompt: str) -> Iterator[Problem]:
    """Turns open and close by turns. Only the first fault is told: others follow from it."""
    is_open = False
    for marker in _TURN_MARKERS.finditer(prompt):
        opens = marker[0] == TURN_OPEN
        if opens == is_open:
            state = "inside an open turn" if is_open else "where no turn is open"
            yield Problem(
                rule="prompt-turns",
                message=f"{marker[0]} stands {state}, at character {marker.start()}",
                got=prompt,
            )
            return
        is_open = opens


def _first_difference(
    expected: str | tuple[int, ...], got: str | tuple[int, ...], unit: str = "character"
) -> str:
    shared = next(
        (place for place, (left, right) in enumerate(zip(expected, got, strict=False)) if left != right),
        min(len(expected), len(got)),
    )
    return f"{unit} {shared} on: expected {_excerpt(expected, shared)}, got {_excerpt(got, shared)}"


def _excerpt(value: str | tuple[int, ...], start: int) -> str:
    part = value[start : start + 30]
    if not part:
        return "the end"
    return repr(part if isinstance(part, str) else list(part))
