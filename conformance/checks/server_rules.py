"""Rules of the `server` check on one answer, and on two that should be the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing

from conformance.checks.parser import markers_in
from conformance.compare import json_equal, load_json, same_text
from conformance.replies import Call, Reply, broken_characters, strings
from conformance.results import Problem
from conformance.suites import Construct, ExactAnswer, ServerCase

_FINISH_REASONS = ("stop", "length", "tool_calls")
_CHOICES = ("auto", "none", "required")
_MANY_TOKENS = 8
"""An answer of so many tokens has text, whatever markers are in it."""

_ROUNDING = 1e-6
"""How far above zero rounding may lift a log-probability."""

_LOGPROB_TOLERANCE = 1e-3
"""How far the same log-probability may differ between two answers to one request."""


@dataclass(frozen=True)
class Asked:
    """What an answer answers."""

    case: ServerCase
    tools: tuple[dict[str, Any], ...]
    max_tokens: int
    way: str
    """`whole` or `streamed`, and what else tells the request from the others of the case."""


def reply_problems(reply: Reply, asked: Asked) -> Iterator[Problem]:
    """Every rule that one answer breaks."""
    for rule, message in _broken(reply, asked):
        yield Problem(rule=rule, message=f"{asked.way}: {message}", got=reply.shown())


def _broken(reply: Reply, asked: Asked) -> Iterator[tuple[str, str]]:
    yield from reply.faults
    if leaks := markers_in("\n".join([*reply.texts(), *_argument_strings(reply)])):
        yield "marker-leak", f"protocol markers reach the client: {' '.join(leaks)}"
    for text in [*reply.texts(), *_argument_strings(reply)]:
        if half := broken_characters(text):
            yield "unicode", f"half a character reaches the client: {half} in {text[:80]!r}"
            break
    yield from _finish_reason(reply, asked)
    yield from _calls(reply, asked)
    yield from _usage(reply, asked)
    if asked.case.top_logprobs is not None:
        yield from _logprobs(reply)
    if asked.case.response_schema is not None and reply.finish_reason != "length":
        yield from _schema(reply.content, asked.case.response_schema)


def _finish_reason(reply: Reply, asked: Asked) -> Iterator[tuple[str, str]]:
    reason = reply.finish_reason
    if reason is None:
        return  # a stream without one has broken `stream-end`; a whole answer says it below
    if reason not in _FINISH_REASONS:
        yield "finish-reason", f"{reason!r} is none of {', '.join(_FINISH_REASONS)}"
    if reason == "tool_calls" and not reply.calls:
        yield "finish-reason", "it is `tool_calls`, and there is no call"
    named = asked.case.tool_choice not in (None, *_CHOICES)
    if reason == "stop" and reply.calls and not named:
        yield "finish-reason", "it is `stop`, and the answer asks for a call"
    taken = completion_tokens(reply)
    if reason == "length" and taken is not None and taken < asked.max_tokens:
        yield (
            "finish-reason",
            f"it is `length` after {taken} tokens, and max_tokens is {asked.max_tokens}",
        )


def _calls(reply: Reply, asked: Asked) -> Iterator[tuple[str, str]]:
    ids = [call.id for call in reply.calls]
    if not all(ids) or len(set(ids)) < len(ids):
        yield "call-ids", f"every call needs an id of its own; they are {ids}"
    declared = {str(tool.get("function", {}).get("name")) for tool in asked.tools}
    for number, call in enumerate(reply.calls):
        last = number == len(reply.calls) - 1
        if not (last and reply.finish_reason == "length") and (why := _no_object(call)):
            yield "arguments-json", f"the arguments of call {number} ({call.name!r}) are {why}"
    choice = asked.case.tool_choice
    names = [call.name for call in reply.calls]
    if not asked.tools and names:
        yield "tool-choice", f"no tool was declared, and {names} are called"
    if choice == "none" and names:
        yield "tool-choice", f"`tool_choice: none` forbids calls, and {names} are called"
    if reply.finish_reason == "length" or choice in (None, "auto", "none"):
        return
    if not names:
        yield "tool-choice", f"`tool_choice: {choice}` asks for a call, and there is none"
    elif choice == "required" and not set(names) <= declared:
        yield "tool-choice", f"{names} are called, and only {sorted(declared)} are declared"
    elif choice != "required" and set(names) != {choice}:
        yield "tool-choice", f"{choice!r} must be called, and {names} are"


def _no_object(call: Call) -> str:
    try:
        value = load_json(call.arguments)
    except ValueError as error:
        return f"not JSON ({error})"
    return "" if isinstance(value, dict) else "not a JSON object"


def _usage(reply: Reply, asked: Asked) -> Iterator[tuple[str, str]]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    if reply.usage is None:
        yield "usage", "the answer does not say how many tokens it took"
        return
    counts = [reply.usage.get(name) for name in names]
    if not all(type(count) is int and count >= 0 for count in counts):
        yield "usage", f"{', '.join(names)} are {counts}"
        return
    prompt, completion, total = (int(count) for count in counts if count is not None)
    if total != prompt + completion or prompt == 0:
        yield "usage", f"{prompt} prompt tokens and {completion} of the answer are not {total}"
    if completion > asked.max_tokens:
        yield "usage", f"the answer took {completion} tokens, and max_tokens is {asked.max_tokens}"
    if completion == 0 and reply.texts():
        yield "usage", "the answer has text, and took no token"
    # With `none` it is contested whether the text of a call that the model writes comes out (X19).
    if completion >= _MANY_TOKENS and not reply.texts() and asked.case.tool_choice != "none":
        yield "nothing-lost", f"the answer took {completion} tokens, and every field is empty"


def _logprobs(reply: Reply) -> Iterator[tuple[str, str]]:
    if reply.logprobs is None:
        yield "logprobs", "they were asked for, and there are none"
        return
    taken = completion_tokens(reply)
    # The end-of-turn token counts among those taken; a server may leave it out here.
    if taken is not None and len(reply.logprobs) not in (taken, taken - 1):
        yield "logprobs", f"there are {len(reply.logprobs)} for {taken} tokens"
    for place, entry in enumerate(reply.logprobs):
        values = [entry, *(other for other in entry.get("top_logprobs") or [] if isinstance(other, dict))]
        numbers: list[float] = []
        for number in (value.get("logprob") for value in values):
            if not isinstance(number, int | float) or not math.isfinite(number) or number > _ROUNDING:
                yield "logprobs", f"token {place}: {number!r} is no finite number up to 0"
                return
            numbers.append(number)
        if not isinstance(entry.get("token"), str):
            yield "logprobs", f"token {place} has no text"
            return
        if len(numbers) < 2:
            yield "logprobs", f"token {place} has no alternatives, and they were asked for"
            return
        if numbers[0] < max(numbers[1:]) - _ROUNDING:
            yield "logprobs", f"token {place} was taken at temperature 0, and is not the likeliest"
            return
    yield from _tokens(reply, reply.logprobs)


def _tokens(reply: Reply, entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The tokens that have log-probabilities must be those of the content."""
    parts: list[bytes] = []
    for place, entry in enumerate(entries):
        given = entry.get("bytes")
        try:
            part = entry["token"].encode("utf-8", "replace") if given is None else bytes(given)
        except (TypeError, ValueError):
            yield "logprobs", f"token {place} has `bytes` that are none"
            return
        parts.append(part)
    if reply.calls:
        return  # what is around calls is put together without them
    text, content = b"".join(parts).decode("utf-8", "replace"), reply.content.strip()
    if "\ufffd" in text:  # part of a character is a token, and many servers have no bytes for it
        text, content = _ascii(text), _ascii(content)
    if content not in text:
        yield "logprobs", f"the tokens that have them are {text[:200]!r}, and not those of the content"


def _ascii(text: str) -> str:
    return "".join(char for char in text if char.isascii())


def _schema(content: str, schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    try:
        load_json(content)  # refuses what is none to the letter, such as a key given twice
        value = json.loads(content)
    except ValueError as error:
        yield "json-schema", f"the content is not JSON ({error})"
        return
    # An empty registry: a reference to another document is not fetched.
    validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    broken = jsonschema.exceptions.best_match(validator.iter_errors(value))
    if broken is not None:
        yield "json-schema", f"the content does not follow the schema: {broken.message}"


def difference(streamed: Reply, whole: Reply) -> str:
    """How two answers to one request differ, for a client; empty if they do not."""
    for name in ("reasoning", "content"):
        if not same_text(getattr(streamed, name), getattr(whole, name)):
            return f"{name} differs"
    return _calls_difference(streamed.calls, whole.calls) or _end_difference(streamed, whole)


def _calls_difference(streamed: Sequence[Call], whole: Sequence[Call]) -> str:
    names = [call.name for call in streamed], [call.name for call in whole]
    if names[0] != names[1]:
        return f"calls are {names[0]}, not {names[1]}"
    for number, (left, right) in enumerate(zip(streamed, whole, strict=True)):
        if not _same_arguments(left.arguments, right.arguments):
            return f"arguments of call {number} ({left.name!r}) differ"
    return ""


def _same_arguments(left: str, right: str) -> bool:
    try:
        return json_equal(load_json(left, repeats=True), load_json(right, repeats=True))
    except ValueError:
        return left.strip() == right.strip()


def _end_difference(streamed: Reply, whole: Reply) -> str:
    if streamed.finish_reason != whole.finish_reason:
        return f"finish_reason is {streamed.finish_reason!r}, not {whole.finish_reason!r}"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        counts = [None if reply.usage is None else reply.usage.get(name) for reply in (streamed, whole)]
        if None not in counts and counts[0] != counts[1]:
            return f"usage.{name} is {counts[0]}, not {counts[1]}"
    return ""


def logprobs_difference(streamed: Reply, whole: Reply) -> str:
    """How the log-probabilities of two answers to one request differ; empty if they do not.

    Entries that break a rule by themselves are not compared.
    """
    if streamed.logprobs is None or whole.logprobs is None:
        return ""
    tokens = [[entry.get("token") for entry in reply.logprobs or ()] for reply in (streamed, whole)]
    if tokens[0] != tokens[1]:
        return f"the tokens with log-probabilities are {tokens[0]}, not {tokens[1]}"
    for place, (left, right) in enumerate(zip(streamed.logprobs, whole.logprobs, strict=True)):
        values = left.get("logprob"), right.get("logprob")
        numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        if len(numbers) == 2 and abs(numbers[0] - numbers[1]) > _LOGPROB_TOLERANCE:
            return f"the log-probability of token {place} is {numbers[0]}, not {numbers[1]}"
    return ""


def exact_problem(reply: Reply, exact: ExactAnswer) -> str:
    """How an answer differs from the scripted one; empty if it does not."""
    wanted = Reply(
        content=exact.content,
        reasoning=exact.reasoning,
        finish_reason=exact.finish_reason or reply.finish_reason,
    )
    for name in ("reasoning", "content"):
        if not same_text(getattr(reply, name), getattr(wanted, name)):
            return f"{name} is {getattr(reply, name)!r}, not {getattr(wanted, name)!r}"
    names = [call.name for call in reply.calls], [call.name for call in exact.tool_calls]
    if names[0] != names[1]:
        return f"calls are {names[0]}, not {names[1]}"
    for number, (call, expected) in enumerate(zip(reply.calls, exact.tool_calls, strict=True)):
        try:
            same = json_equal(load_json(call.arguments, repeats=True), expected.arguments)
        except ValueError:
            same = False
        if not same:
            return f"arguments of call {number} are {call.arguments!r}, not {expected.arguments}"
    return _end_difference(reply, wanted)


def lost(reply: Reply, keep: Sequence[str]) -> list[str]:
    """Those of some texts that are in no field of an answer."""
    fields = [*reply.texts(), *_argument_strings(reply)]
    return [text for text in keep if not any(text in field for field in fields)]


def constructs(replies: Sequence[Reply]) -> set[Construct]:
    """What appears in at least one of some answers."""
    found: set[Construct] = set()
    for reply in replies:
        if completion_tokens(reply):
            found.add("tokens")
        if reply.texts():
            found.add("answer")
        if reply.content.strip():
            found.add("content")
        if reply.reasoning.strip():
            found.add("reasoning")
        if reply.calls:
            found.add("tool-call")
        if len(reply.calls) > 1:
            found.add("parallel-calls")
        if any(isinstance(value, dict | list) for call in reply.calls for value in _values(call)):
            found.add("nested-arguments")
        if not all(text.isascii() for text in [*reply.texts(), *_argument_strings(reply)]):
            found.add("non-ascii")
        try:
            load_json(reply.content)
        except ValueError:
            continue
        found.add("json")
    return found


def completion_tokens(reply: Reply) -> int | None:
    """How many tokens an answer took, if it says so."""
    return _count(reply, "completion_tokens")


def prompt_tokens(reply: Reply) -> int | None:
    """How many tokens a prompt has, if the answer says so."""
    return _count(reply, "prompt_tokens")


def _count(reply: Reply, name: str) -> int | None:
    count = None if reply.usage is None else reply.usage.get(name)
    return count if type(count) is int else None


def _values(call: Call) -> list[Any]:
    try:
        value = load_json(call.arguments, repeats=True)
    except ValueError:
        return []
    return list(value.values()) if isinstance(value, dict) else []


def _argument_strings(reply: Reply) -> list[str]:
    return [text for call in reply.calls for value in _values(call) for text in strings(value)]
