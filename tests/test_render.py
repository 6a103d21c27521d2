"""The renderer's own interface, and the chat format's rules by example."""

from __future__ import annotations

import json
from typing import Any, get_args

import jinja2
import pytest

from model_impl.chat.render import (
    FAMILIES,
    REVISION,
    UNSUPPORTED_REVISIONS,
    ConversationError,
    Family,
    FamilyError,
    RevisionError,
    environment,
    render,
    render_template,
    template_text,
)
from model_impl.errors import ModelError

USER = {"role": "user", "content": "Hi"}


def call(name: str, arguments: Any, call_id: str = "c1") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("family", "thinking", "tail"),
    [
        ("large", None, "<|turn>model\n<|channel>thought\n<channel|>"),
        ("large", False, "<|turn>model\n<|channel>thought\n<channel|>"),
        ("large", True, "<|turn>model\n"),
        ("e", None, "<|turn>model\n"),
        ("e", False, "<|turn>model\n"),
        ("e", True, "<|turn>model\n"),
    ],
)
def test_generation_prompt(family: Family, thinking: bool | None, tail: str) -> None:
    head = "<bos><|turn>system\n<|think|>\n<turn|>\n" if thinking else "<bos>"
    prompt = head + "<|turn>user\nHi<turn|>\n"
    assert render([USER], family=family, thinking=thinking) == prompt + tail
    assert render([USER], family=family, thinking=thinking, add_generation_prompt=False) == prompt


def test_a_call_its_result_and_the_rest_of_the_turn() -> None:
    arguments = {"city": "東京", "Days": 2, "opts": {"b": None, "a": [True, 1e-05]}}
    result = {"role": "tool", "tool_call_id": "c1", "content": '{"t": 9}'}
    messages = [USER, {**call("w", arguments), "reasoning": "Look."}, result]
    called = (
        "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\nLook.\n<channel|>"
        '<|tool_call>call:w{city:<|"|>東京<|"|>,Days:2,opts:{a:[true,1e-05],b:null}}<tool_call|>'
    )
    answered = called + '<|tool_response>response:w{value:<|"|>{"t": 9}<|"|>}<tool_response|>'
    assert render(messages[:2]) == called + "<|tool_response>"
    assert render(messages) == answered
    assert render(messages, family="e", thinking=False) == answered
    final = render([*messages, {"role": "assistant", "content": "Nine."}], add_generation_prompt=False)
    assert final == answered + "Nine.<turn|>\n"


def test_the_template_of_a_checkpoint_fixes_its_family() -> None:
    for family in FAMILIES:
        text = template_text(family)
        assert render_template(text, [USER]) == render([USER], family=family)
        # A caller's variable must not undo what the checkpoint is.
        other = next(name for name in FAMILIES if name != family)
        given = (
            environment()
            .from_string(text)
            .render(messages=[USER], bos_token="<bos>", add_generation_prompt=True, family=other)
        )
        assert given == render([USER], family=family)


def test_the_bare_template_takes_the_family_as_a_variable() -> None:
    bare = environment().from_string(template_text("e").partition("\n")[2])
    options = {"messages": [USER], "bos_token": "<bos>", "add_generation_prompt": True}
    assert bare.render(**options) == render([USER], family="large")
    for family in FAMILIES:
        assert bare.render(**options, family=family) == render([USER], family=family)
    with pytest.raises(jinja2.TemplateError, match="'medium'"):
        bare.render(**options, family="medium")


def test_families_are_named_once() -> None:
    assert get_args(Family) == FAMILIES
    with pytest.raises(FamilyError, match="large, e"):
        template_text("medium")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", UNSUPPORTED_REVISIONS)
def test_other_revisions_are_refused_by_name(name: str) -> None:
    with pytest.raises(RevisionError) as caught:
        render([USER], revision=name)
    assert UNSUPPORTED_REVISIONS[name].reason in str(caught.value)
    assert REVISION in str(caught.value)


def test_unknown_revisions_are_refused() -> None:
    with pytest.raises(RevisionError, match="'2019-01-01' is unknown"):
        render([USER], revision="2019-01-01")


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (
            [USER, call("f", '{"a": 1}')],
            None,
            "at message 1: The arguments of the call to f are not an object",
        ),
        ([USER, call("f", [1])], None, "at message 1: The arguments of the call to f are not an object"),
        ([USER, {"content": "no role"}, USER], None, "at message 1: UndefinedError"),
        ([USER, call("f", {}), {"role": "tool", "content": {"a": 1}}], None, "at message 2: UndefinedError"),
        ([USER], [{"name": "f"}], "in the tools: UndefinedError"),
    ],
)
def test_refusals_say_what_and_where(messages: list[Any], tools: list[Any] | None, message: str) -> None:
    with pytest.raises(ConversationError) as caught:
        render(messages, tools=tools)
    assert isinstance(caught.value, ModelError)
    assert message in str(caught.value)
    assert "OpenAI's form" in str(caught.value)


def test_a_cyclic_value_is_refused_not_fatal() -> None:
    arguments: dict[str, Any] = {}
    arguments["self"] = arguments
    with pytest.raises(ConversationError, match="RecursionError"):
        render([USER, call("f", arguments)])


def test_rendering_leaves_the_conversation_as_it_was() -> None:
    messages = [USER, call("f", {"b": [1, {"c": None}]}), {"role": "tool", "content": [{"type": "image"}]}]
    tools = [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "array", "items": {}}}}}}]
    before = json.dumps([messages, tools])
    assert render(messages, tools=tools) == render(tuple(messages), tools=tuple(tools))
    assert json.dumps([messages, tools]) == before


def test_a_foreign_template_stays_in_the_sandbox() -> None:
    escape = "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"
    with pytest.raises(ConversationError, match="SecurityError"):
        render_template(escape, [USER])


def test_the_sandbox_offers_what_transformers_offers() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}"
        "{{ m | tojson }}{{ strftime_now('%%') }}{% endfor %}"
    )
    message = {"role": "user", "content": "<ü>"}
    assert render_template(source, [message, {"role": "tool"}]) == '{"role": "user", "content": "<ü>"}%'
