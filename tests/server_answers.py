"""What an honest server answers, whole and in chunks: the script of the scripted checkpoint.

The bundled parser reads it; tokens are pieces of up to three characters, and markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from model_impl.chat.parser import MessageBuilder, Parser, parse
from model_impl.nano.script import ADAPTER, ADAPTER_SAYS, load_script
from tests.server_pictures import BadPictureError, colour, opened, parts_of, soft_tokens

MODEL = "scripted"
_PIECE = re.compile(r"<\|?[a-z_\"|]+\|?>|.{1,3}", re.DOTALL)
_KEY = re.compile(r"#([a-z]+(?:-[a-z]+)*)")


@dataclass
class Exchange:
    """One request with its answer in both forms."""

    body: dict[str, Any]
    authorization: str
    whole: dict[str, Any] = field(default_factory=dict)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    done: bool = True
    content_type: str | None = None
    raw: str | None = None
    """Sent instead of the answer."""
    trailer: str | None = None
    """Sent as an event after the last one."""
    beside: tuple[Exchange, ...] = ()
    """Other requests that are answered at the same time."""
    earlier: tuple[int, ...] = ()
    """Statuses of the answers to earlier requests."""

    @property
    def streaming(self) -> bool:
        return self.body.get("stream") is True

    @property
    def choice(self) -> dict[str, Any]:
        return self.whole["choices"][0]

    @property
    def message(self) -> dict[str, Any]:
        return self.choice["message"]

    def deltas(self) -> Iterator[dict[str, Any]]:
        """The deltas of all chunks that have one."""
        for chunk in self.chunks:
            for choice in chunk["choices"]:
                yield choice["delta"]

    def calls(self) -> Iterator[dict[str, Any]]:
        """The parts of calls in all chunks."""
        for delta in self.deltas():
            yield from delta.get("tool_calls", ())

    def finish(self, reason: str, *, streamed: bool = True, whole: bool = True) -> None:
        """End the answer with another reason."""
        if whole:
            self.choice["finish_reason"] = reason
        for chunk in self.chunks if streamed else ():
            for choice in chunk["choices"]:
                if choice["finish_reason"]:
                    choice["finish_reason"] = reason

    def say(self, text: str, *, whole: bool = True, streamed: bool = True) -> None:
        """Put a text behind the content."""
        if whole:
            self.message["content"] = (self.message["content"] or "") + text
        if streamed:
            last = next(
                n for n, c in enumerate(self.chunks) if c["choices"] and c["choices"][0]["finish_reason"]
            )
            self.chunks.insert(last, chunk(self, {"content": text}))


def chunk(exchange: Exchange, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        "id": exchange.whole["id"],
        "object": "chat.completion.chunk",
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def words(message: dict[str, Any]) -> str:
    """The text of a message, without its pictures."""
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part["type"] == "text")
    return str(content)


def _said(body: dict[str, Any]) -> str:
    """What the model says by heart."""
    script = load_script()
    keys = _KEY.findall(words(body["messages"][-1]))
    about = {line.id: line for line in script.pictures.lines}
    if keys and keys[-1] in about:
        colours = [colour(opened(part)) for part in parts_of(body["messages"])]
        return script.pictures.output(about[keys[-1]], colours)
    if not keys and body.get("model") == ADAPTER:
        return ADAPTER_SAYS
    return script.line(keys[-1]).output if keys else script.default.output


def _output(body: dict[str, Any]) -> str:
    """What the model says by heart, or is made to say: calls without arguments, JSON of enums."""
    output = _said(body)
    choice = body.get("tool_choice")
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    if (named or choice == "required") and f"<|tool_call>call:{named or ''}" not in output:
        return f"<|tool_call>call:{named or body['tools'][0]['function']['name']}{{}}<tool_call|>"
    wanted = body.get("response_format", {})
    if wanted.get("type") == "json_schema":
        schema = wanted["json_schema"]["schema"]
        try:
            jsonschema.validate(json.loads(parse(output).content), schema)
        except (ValueError, jsonschema.ValidationError):
            return json.dumps({name: value["enum"][0] for name, value in schema["properties"].items()})
    return output


def _bad_request(body: Any) -> tuple[int, str] | None:
    if not isinstance(body, dict):
        return 400, "the body is no JSON object"
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return 400, "`messages` must be a list of messages"
    if body.get("model") not in (MODEL, ADAPTER):
        return 404, f"the model {body.get('model')!r} does not exist"
    if not isinstance(body.get("temperature", 0), int | float):
        return 400, "`temperature` must be a number"
    if type(body.get("max_tokens", 1)) is not int or body.get("max_tokens", 1) < 1:
        return 400, "`max_tokens` must be at least 1"
    choice = body.get("tool_choice")
    declared = [tool["function"]["name"] for tool in body.get("tools", [])]
    if isinstance(choice, dict) and choice["function"]["name"] not in declared:
        return 400, "`tool_choice` names a function that `tools` does not declare"
    try:
        for part in parts_of(messages):
            opened(part)
    except BadPictureError as error:
        return 400, str(error)
    if body.get("response_format", {"type": "text"})["type"] not in ("text", "json_object", "json_schema"):
        return 400, "unknown type of `response_format`"
    return None


def answer(exchange: Exchange, number: int) -> None:
    """Fill in the honest answer in both forms."""
    body = exchange.body
    bad = _bad_request(body)
    if bad is not None:
        exchange.status = bad[0]
        exchange.whole = {"error": {"message": bad[1], "type": "invalid_request_error", "code": bad[0]}}
        return
    pieces = [piece[0] for piece in _PIECE.finditer(_output(body))]
    text = "".join(pieces)
    for stop in body.get("stop", []):
        if stop in text:
            pieces = [piece[0] for piece in _PIECE.finditer(text[: text.index(stop)])]
    limit = body.get("max_tokens", 1000)
    cut = len(pieces) + 1 > limit
    pieces = pieces[:limit]
    parser = Parser(tools=body.get("tools", ()), calls_allowed=body.get("tool_choice") != "none")
    builder, parts = MessageBuilder(), []
    for piece in [*pieces, None]:
        delta = parser.finish() if piece is None else parser.feed(piece)
        builder.add(delta)
        parts.append(delta)
    message = builder.message(parser)
    finish = "length" if cut else "tool_calls" if message.tool_calls else "stop"
    taken = len(pieces) + (not cut)
    prompt = sum(len(words(message).split()) for message in body["messages"]) + 5
    prompt += sum(soft_tokens(opened(part)) + 2 for part in parts_of(body["messages"]))
    usage = {"prompt_tokens": prompt, "completion_tokens": taken, "total_tokens": prompt + taken}
    logprobs = {"content": [_logprob(piece) for piece in [*pieces, "<turn|>"][:taken]]}
    calls = [
        {
            "id": f"call-{number}-{index}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(message.tool_calls)
    ]
    exchange.whole = {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": message.content or None,
                    "reasoning": message.reasoning or None,
                    "tool_calls": calls,
                },
                "finish_reason": finish,
                "logprobs": logprobs if body.get("logprobs") else None,
            }
        ],
        "usage": usage,
    }
    exchange.chunks = [chunk(exchange, {"role": "assistant", "content": ""})]
    for delta in parts:
        if delta.reasoning:
            exchange.chunks.append(chunk(exchange, {"reasoning": delta.reasoning}))
        if delta.content:
            exchange.chunks.append(chunk(exchange, {"content": delta.content}))
        for part in delta.calls:
            exchange.chunks.append(chunk(exchange, {"tool_calls": [_call_part(part, calls)]}))
    exchange.chunks.append(chunk(exchange, {}, finish))
    if body.get("logprobs"):
        exchange.chunks[0]["choices"][0]["logprobs"] = json.loads(json.dumps(logprobs))
    if body.get("stream_options", {}).get("include_usage"):
        last = chunk(exchange, {})
        exchange.chunks.append(last | {"choices": [], "usage": dict(usage)})


def _logprob(piece: str) -> dict[str, Any]:
    others = [
        {"token": token, "logprob": value} for token, value in ((piece, -0.25), ("x", -2.0), ("y", -3.0))
    ]
    return {"token": piece, "logprob": -0.25, "bytes": list(piece.encode()), "top_logprobs": others}


def _call_part(part: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    head = {"id": calls[part.index]["id"], "type": "function", "index": part.index}
    return head | {"function": {"name": part.name, "arguments": part.arguments}}
