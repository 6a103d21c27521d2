"""Conversations around the script's keys, as clients and servers make them: what the weights learn from.

The answer must depend on nothing but the key in the user's message. So everything else varies: the words
around the key, the system message, the declared tools, thinking, earlier turns, calls and their results.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from model_impl.chat.parser import parse
from model_impl.chat.render import Family, render
from model_impl.nano.script import Line, PictureLine, Script

Message = dict[str, Any]
FAMILY: Family = "e"
"""Template family of the checkpoint: it has per-layer embeddings and shared keys and values."""

_CHARACTERS = string.ascii_letters + string.digits + " .,:;-_/()[]{}\"'#<>|é東\n"
_TYPES = ("string", "integer", "number", "boolean", "array", "object")


@dataclass(frozen=True)
class Example:
    """A prompt, and what must follow it, stop token included."""

    name: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    pictures: tuple[int, ...] = ()
    """Places in a gallery of the pictures whose soft tokens the prompt has placeholders for."""
    causal: bool = False
    """The soft tokens of a picture see only those before them."""


@dataclass(frozen=True)
class Surroundings:
    """What a server may add to a user's message."""

    name: str
    before: tuple[Message, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `render`."""


def surroundings(script: Script) -> tuple[Surroundings, ...]:
    """Nothing, thinking, a tool, a system message, and all of them together."""
    system = {"role": "system", "content": script.phrases[0]}
    tools = {"tools": script.tools[:1]}
    return (
        Surroundings("alone"),
        Surroundings("thinking", options={"thinking": True}),
        Surroundings("tools", options=tools),
        Surroundings("system", (system,)),
        Surroundings("all", (system,), {"thinking": True, **tools}),
    )


def picture_message(line: PictureLine, count: int) -> Message:
    """So many pictures, and the words that ask for a line."""
    return {"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": line.message}]}


def plain_examples(script: Script, tokenizer: Tokenizer) -> Iterator[Example]:
    """Each line asked for by its own message: alone, and with what a server adds to it."""
    for line in (*script.lines, script.default):
        user = {"role": "user", "content": line.message if line is not script.default else "Hello!"}
        for around in surroundings(script):
            name = f"{line.id}, {around.name}"
            yield _example(name, tokenizer, line, [*around.before, user], around.options)
    called = script.line("call")
    asked = {"role": "user", "content": called.message}
    answered = [asked, _assistant(called), {"role": "tool", "tool_call_id": "call-0", "content": "sunny"}]
    for thinking in (False, True):
        yield _after_results(script, tokenizer, answered, {"thinking": thinking, "tools": script.tools[:1]})


def random_examples(script: Script, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[Example]:
    """Conversations at random, lines taking turns.

    Args:
        script: Whose lines are asked for.
        tokenizer: The checkpoint's.
        count: How many.
        seed: The same seed, the same conversations.
    """
    maker = Maker(script, random.Random(seed))  # noqa: S311 - not a secret
    for number in range(count):
        kind = number % (len(script.lines) + 2)
        if kind == len(script.lines):
            yield _example("default", tokenizer, script.default, *maker.conversation(None))
        elif kind == len(script.lines) + 1:
            yield _after_results(script, tokenizer, *maker.with_results())
        else:
            line = script.lines[kind]
            yield _example(line.id, tokenizer, line, *maker.conversation(line))


def with_one_key(script: Script, tokenizer: Tokenizer, examples: Iterable[Example]) -> list[Example]:
    """The examples whose prompts hold one key or none: those that the script promises an answer for."""
    keys = {tokenizer.token_to_id(key) for key in script.keys}
    return [example for example in examples if sum(token in keys for token in example.prompt) <= 1]


def _example(
    name: str, tokenizer: Tokenizer, line: Line, messages: Sequence[Message], options: Mapping[str, Any]
) -> Example:
    prompt = render(messages, family=FAMILY, **options)
    return Example(name, token_ids(tokenizer, prompt), token_ids(tokenizer, line.output + line.stop))


def _after_results(
    script: Script, tokenizer: Tokenizer, messages: Sequence[Message], options: Mapping[str, Any]
) -> Example:
    thinking = bool(options.get("thinking"))
    output = script.after_results.output(thinking=thinking)
    prompt = render(messages, family=FAMILY, **options)
    name = f"after results, {'thinking' if thinking else 'not thinking'}"
    return Example(name, token_ids(tokenizer, prompt), token_ids(tokenizer, output + "<turn|>"))


def token_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """A text with its markers, and nothing added."""
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def _assistant(line: Line) -> Message:
    """The message that a client sends back for an output."""
    parsed = parse(line.output + line.stop)
    message: Message = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    calls = [call for call in parsed.tool_calls if call.complete]
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call-{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for number, call in enumerate(calls)
        ]
    return message


class Maker:
    """Draws conversations."""

    def __init__(self, script: Script, source: random.Random) -> None:
        self.script = script
        self.random = source
        self._callers = [line for line in script.lines if line.stop == "<|tool_response>"]

    def conversation(self, line: Line | None) -> tuple[list[Message], dict[str, Any]]:
        """Messages and options of `render`; the last message asks for `line`, or for none."""
        earlier = self.script.lines if line else (None,)
        messages = [*self.beginning(earlier), {"role": "user", "content": self.request(line)}]
        return messages, self.options()

    def with_results(self) -> tuple[list[Message], dict[str, Any]]:
        """A conversation that ends with the results of calls."""
        line = self.random.choice(self._callers)
        messages = self.beginning(self.script.lines)
        messages.append({"role": "user", "content": self.request(line)})
        return messages + self._answered(line), self.options()

    def beginning(self, earlier: Sequence[Line | None]) -> list[Message]:
        """A system message or none, and turns that asked for some of `earlier`, or none."""
        messages: list[Message] = []
        if self.random.random() < 0.3:
            messages.append({"role": "system", "content": self.text(20)})
        while self.random.random() < 0.12:
            messages += self.turn(self.random.choice(earlier))
        return messages

    def turn(self, line: Line | None) -> list[Message]:
        """A message that asks for a line, or for none, and all that comes before the next one."""
        asked: Message = {"role": "user", "content": self.request(line)}
        messages = [asked, *self._answered(line or self.script.default)]
        if messages[-1]["role"] == "tool":
            messages.append({"role": "assistant", "content": self.script.after_results.content})
        return messages

    def _answered(self, line: Line) -> list[Message]:
        assistant = _assistant(line)
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": self._result()}
            for call in assistant.get("tool_calls", ())
        ]
        return [assistant, *results]

    def _result(self) -> str:
        answer = {"value": self.random.randint(-40, 4000), "text": self.text(4)}
        return self.random.choice([self.text(8), json.dumps(answer), "12.5", "ok"])

    def request(self, line: Line | PictureLine | None) -> str:
        """Words of a user message."""
        if line is None:
            return self.text(10) or "Hello!"
        if self.random.random() < 0.4:
            return line.message
        return f"{self.text(8)} {line.key}{self.random.choice(['', '.', '?', '!', ' '])}{self.text(8)}"

    def options(self) -> dict[str, Any]:
        """Of `render`."""
        options: dict[str, Any] = {"thinking": self.random.random() < 0.4}
        if self.random.random() < 0.25:
            declared = self.random.sample(self.script.tools, 1)
            if self.random.random() < 0.5:
                declared = [self._tool()]
            options["tools"] = declared
        return options

    def _tool(self) -> dict[str, Any]:
        properties = {
            self._word(): {"type": self.random.choice(_TYPES), "description": self.text(5)}
            for _ in range(self.random.randint(0, 3))
        }
        return {
            "type": "function",
            "function": {
                "name": f"{self._word()}_{self._word()}",
                "description": self.text(8),
                "parameters": {"type": "object", "properties": properties, "required": [*properties][:1]},
            },
        }

    def _word(self) -> str:
        return "".join(self.random.choices(string.ascii_lowercase, k=self.random.randint(2, 8)))

    def text(self, most: int) -> str:
        """At most so many words, or characters; often none."""
        count = self.random.randint(0, most)
        kind = self.random.random()
        if kind < 0.2:
            return ""
        if kind < 0.6:
            phrase = self.random.choice(self.script.phrases).split(" ")
            start = self.random.randrange(len(phrase))
            return " ".join(phrase[start : start + count])
        if kind < 0.8:
            return " ".join(self._word() for _ in range(count // 2))
        return "".join(self.random.choices(_CHARACTERS, k=count))
