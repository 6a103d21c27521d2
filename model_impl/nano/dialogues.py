"""Tool dialogues: calls with the right tool and arguments, answers from results, and small talk."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from model_impl.nano.lesson import Lesson, Message, Split
from model_impl.nano.phrases import NAMES, THINGS
from model_impl.nano.problems import split_of

CITIES = ("Paris", "Rome", "Cairo", "Lima", "Oslo", "Tokyo", "Delhi", "Boston", "Madrid", "Berlin")
SKIES = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy")


@dataclass(frozen=True)
class Tool:
    """A tool, how people ask for it, and what is said of its result.

    Slots: `{thing}`, `{city}`, `{name}` and `{number}` are arguments, `{result}` is what the tool found.
    """

    name: str
    description: str
    arguments: tuple[str, ...]
    requests: tuple[str, ...]
    reply: str
    result: str
    """What it finds: `number` or `sky`."""

    def declaration(self) -> Message:
        """In OpenAI's form."""
        properties = {name: {"type": "integer" if name == "number" else "string"} for name in self.arguments}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": list(self.arguments),
                },
            },
        }


TOOLS: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "The weather in a city.",
        ("city",),
        ("What is the weather in {city}?", "Is it wet in {city} today?", "Tell me about the sky in {city}."),
        "It is {result} in {city}.",
        "sky",
    ),
    Tool(
        "get_price",
        "The price of a thing.",
        ("thing",),
        ("What is the price of {thing}?", "How much are {thing}?", "Look up what {thing} cost."),
        "The price of {thing} is {result}.",
        "number",
    ),
    Tool(
        "order_things",
        "Order a number of things.",
        ("number", "thing"),
        ("Order {number} {thing}, please.", "I want {number} {thing}.", "Buy {number} {thing} for me."),
        "The order has number {result}.",
        "number",
    ),
    Tool(
        "call_person",
        "Call a person by name.",
        ("name",),
        ("Call {name}, please.", "I want to talk to {name}.", "Ring {name} for me."),
        "{name} waits in room {result}.",
        "number",
    ),
    Tool(
        "count_people",
        "The number of people in a city.",
        ("city",),
        ("How many people are in {city}?", "Is {city} large?", "Count the people of {city}."),
        "There are {result} people in {city}.",
        "number",
    ),
)
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hello, who are you?", "Good day!"), "Hello! I am a very small model."),
    (("Thank you!", "Many thanks.", "That is all, thank you."), "You are welcome."),
    (("What can you do?", "How can you help me?", "Tell me what you know."), "I solve small problems."),
)
"""What people say, and what is said back."""


def lesson(rng: random.Random, split: Split) -> Lesson:
    """Draw a dialogue of a split: a request that takes a call, a result to be told, or small talk."""
    while True:
        kind = rng.choice(("call", "call", "result", "result", "talk"))
        drawn = _talk(rng) if kind == "talk" else _tool(rng, told=kind == "result")
        identities = (drawn.key, repr(drawn.numbers)) if drawn.numbers else (drawn.key,)
        if {split_of(identity) for identity in identities} == {split}:
            return drawn


def _talk(rng: random.Random) -> Lesson:
    said, answer = rng.choice(TALK)
    words, tools, thinking = rng.choice(said), _declared(rng, ()), rng.random() < 0.5
    return Lesson(
        messages=({"role": "user", "content": words},),
        answer=_thought(thinking, "No tool is needed.") + answer,
        key=f"{words} {_names(tools)} {thinking}",
        thinking=thinking,
        tools=tuple(tool.declaration() for tool in tools),
    )


def _tool(rng: random.Random, *, told: bool) -> Lesson:
    """A request that a tool is needed for: the call, or what to say once its result is there."""
    tool = rng.choice(TOOLS)
    tools, thinking, request = _declared(rng, (tool,)), rng.random() < 0.5, rng.choice(tool.requests)
    values: dict[str, Any] = {
        "thing": rng.choice(THINGS),
        "city": rng.choice(CITIES),
        "name": rng.choice(NAMES)[0],
        "number": rng.randint(2, 99),
    }
    result: Any = rng.choice(SKIES) if tool.result == "sky" else rng.randint(1, 999)
    arguments = {name: values[name] for name in tool.arguments}
    numbers = tuple(v for v in (*arguments.values(), *((result,) if told else ())) if isinstance(v, int))
    messages: list[Message] = [{"role": "user", "content": request.format(**values)}]
    if told:
        call = {"id": "call-0", "type": "function", "function": {"name": tool.name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": "call-0", "content": str(result)})
        thought = "The result is there.<channel|>" if thinking else ""  # the prompt has opened the channel
        answer = thought + tool.reply.format(result=result, **values)
    else:
        answer = _thought(thinking, f"I need {tool.name}.") + _call(tool.name, arguments)
    return Lesson(
        messages=tuple(messages),
        answer=answer,
        key=f"{request} {_names(tools)} {thinking} {told}",
        numbers=numbers,
        thinking=thinking,
        tools=tuple(tool.declaration() for tool in tools),
        stop="<turn|>" if told else "<|tool_response>",
    )


def _declared(rng: random.Random, needed: tuple[Tool, ...]) -> list[Tool]:
    """One or two tools, those needed among them, in any order."""
    others = [tool for tool in TOOLS if tool not in needed]
    tools = [*needed, *rng.sample(others, rng.randint(1, 2) - len(needed))]
    rng.shuffle(tools)
    return tools


def _names(tools: list[Tool]) -> str:
    return " ".join(tool.name for tool in tools)


def _thought(thinking: bool, text: str) -> str:
    return f"<|channel>thought\n{text}<channel|>" if thinking else ""


def _call(name: str, arguments: dict[str, Any]) -> str:
    """A call as the chat format writes it, arguments by name."""
    written = ",".join(
        f"{key}:{value}" if isinstance(value, int) else f'{key}:<|"|>{value}<|"|>'
        for key, value in sorted(arguments.items())
    )
    return f"<|tool_call>call:{name}{{{written}}}<tool_call|>"
