"""Messages to prompt, by one Jinja template (`chat_template.jinja`) and nothing else.

The template is the whole renderer, because a checkpoint carries nothing but that file: what `render`
returns is what any engine renders from a checkpoint that holds `template_text(family)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model_impl.errors import ModelError

Family = Literal["large", "e"]
"""`large`: 12B, 26B-A4B, 31B. `e`: E2B, E4B. They differ only in the generation prompt without
thinking: a large model is given an empty thought channel, an E model is not."""

FAMILIES: tuple[Family, ...] = ("large", "e")

REVISION = "2026-07-09"
"""Date of the official templates whose rules this one follows."""


@dataclass(frozen=True)
class OtherRevision:
    """A published template that `render` does not follow."""

    sha256: str
    reason: str


_EARLY = (
    "it writes null as None, takes JSON text for arguments and copies it into the braces, and closes the "
    "model turn between two assistant messages that share one"
)
UNSUPPORTED_REVISIONS: dict[str, OtherRevision] = {
    "launch": OtherRevision(
        "94899c0f917d93f6fe81c95744d1e8ddab2d21d39228d2e4aec1fb2a25bff413", f"superseded: {_EARLY}"
    ),
    "2026-05-28": OtherRevision(
        "36e3a42e5cf14cd0020e72d92e1fdd9970f59b82170e421f0cbe1bb42bead3f0", f"superseded: {_EARLY}"
    ),
    "llama.cpp": OtherRevision(
        "85a08664d16d8f3be4416c92427b3ac10df1024ac566cc0b4bc3bab409393f98",
        f"an early copy for the 31B: {_EARLY}, and it drops parameters named like schema keywords",
    ),
    "interleaved": OtherRevision(
        "65f93a25708c952457106a30e185ba7beffddd726121c8d7e3f3e08b23c16c67",
        "an early variant: it gives tool messages turns of their own, writes null as None, takes JSON "
        "text for arguments, and drops parameters named like schema keywords",
    ),
    "diffusiongemma": OtherRevision(
        "9aeb7eac68ad87bba7567e9d4597ff203e5609f1b427d9e823437d0142cc61bf",
        "DiffusionGemma's own: it renders as the E family does, except that an assistant message after "
        "a tool message opens a second model turn inside the open one",
    ),
}
"""Published templates that differ from `REVISION` in more than layout, by the name under which they are
refused."""


class ConversationError(ModelError):
    """The conversation has no prompt: the template refuses it, or it is not in the form of a chat."""


class RevisionError(ModelError):
    """A template revision was asked for that `render` does not follow."""


class FamilyError(ModelError):
    """The model family is not one of `FAMILIES`."""


@cache
def _source() -> str:
    return files("model_impl.chat").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def template_text(family: Family) -> str:
    """The template as a checkpoint of this family carries it: one file, with the family fixed.

    Raises:
        FamilyError: The family is unknown.
    """
    if family not in FAMILIES:
        raise FamilyError(f"unknown model family {family!r}; give one of {', '.join(FAMILIES)}")
    return f"{{%- set family = '{family}' -%}}\n{_source()}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox in which chat templates render, with what `transformers` offers to them.

    It is fit for a checkpoint's template, which is untrusted.
    """
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


@cache
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


# What a template can raise on a conversation that is not in the expected form: its own refusals,
# and the errors of Python values that lack an operation. Anything else would be a fault of ours.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    AttributeError,
    LookupError,
    ValueError,
    OverflowError,
    RecursionError,
)


def render_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    preserve_thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Render a conversation with the given template text, such as a checkpoint's own.

    Args:
        source: Text of a Jinja chat template.
        messages: The conversation, in OpenAI's form.
        tools: Declared functions, in OpenAI's form.
        thinking: `enable_thinking`; None leaves the variable out.
        preserve_thinking: The variable of that name; None leaves it out.
        add_generation_prompt: End the prompt with the opening of the answer.

    Raises:
        ConversationError: The template refuses the conversation or cannot read it.
    """
    variables: dict[str, Any] = {"bos_token": "<bos>", "tools": list(tools) if tools else None}
    if thinking is not None:
        variables["enable_thinking"] = thinking
    if preserve_thinking is not None:
        variables["preserve_thinking"] = preserve_thinking

    def attempt(conversation: list[Mapping[str, Any]], *, generation_prompt: bool) -> str:
        return _compiled(source).render(
            messages=conversation, add_generation_prompt=generation_prompt, **variables
        )

    def failure(count: int) -> str | None:
        """How the first `count` messages fail; None if they render."""
        try:
            attempt(list(messages[:count]), generation_prompt=False)
        except _RENDER_ERRORS as error:
            return _cause(error)
        return None

    try:
        return attempt(list(messages), generation_prompt=add_generation_prompt)
    except _RENDER_ERRORS as error:
        cause = _cause(error)
        culprit = next((count for count in range(len(messages) + 1) if failure(count) == cause), None)
        where = "" if culprit is None else " in the tools" if culprit == 0 else f" at message {culprit - 1}"
        raise ConversationError(
            f"the chat template cannot render the conversation{where}: {cause}. Messages and tools "
            "must be in OpenAI's form, with the arguments of calls as objects"
        ) from error


def _cause(error: Exception) -> str:
    name = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
    return f"{name}{error}".rstrip(".")


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    preserve_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    family: Family = "large",
    revision: str = REVISION,
) -> str:
    """Render a conversation to the prompt of a Gemma 4 model.

    The prompt begins with `<bos>` as text, so it is tokenised without adding special tokens.

    Args:
        messages: The conversation, in OpenAI's form; arguments of tool calls are objects or null.
        tools: Declared functions, in OpenAI's form.
        thinking: Ask for a thought before the answer; None is the template's default, off.
        preserve_thinking: Keep the thoughts of tool calls made before the last user message; None is
            the template's default, off.
        add_generation_prompt: End the prompt with the opening of the answer.
        family: Which models the prompt is for.
        revision: Date of the official template to follow; only `REVISION` is supported.

    Raises:
        ConversationError: The conversation has no prompt, for example because the arguments of a call
            are given as JSON text.
        FamilyError: The family is unknown.
        RevisionError: The revision is unknown, or is one of `UNSUPPORTED_REVISIONS`.
    """
    if revision != REVISION:
        known = UNSUPPORTED_REVISIONS.get(revision)
        why = f"is not supported ({known.reason})" if known else "is unknown"
        raise RevisionError(f"template revision {revision!r} {why}; use {REVISION!r}")
    return render_template(
        template_text(family),
        messages,
        tools=tools,
        thinking=thinking,
        preserve_thinking=preserve_thinking,
        add_generation_prompt=add_generation_prompt,
    )
