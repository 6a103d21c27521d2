"""SGLang: the reasoning and tool-call parsers of its chat server, as `llm-router-utils` carries them.

The package holds SGLang's own modules, among them the part of `OpenAIServingChat` that turns text into
tool calls and their stream chunks, which is called here as it stands. The package leaves out the two
methods around it, `_build_chat_response` and `_generate_stream_content`; their chain is repeated here:

* Reasoning first: `ReasoningParser` with `force_reasoning` when the template or the request says so (for
  Gemma 4: `enable_thinking` is true), then its normal text goes to the tool-call parser.
* The tool-call parser runs only if the request has tools and did not choose `none`; otherwise the text
  is content as it is.
* At the end of a stream `parse_stream_end` of both parsers, then arguments not yet streamed.
* The server keeps special tokens in the text for Gemma 4, and takes the stop token (1, 106, 50) off the
  end before it decodes (`no_stop_trim` is off by default), so a final `<turn|>` is not seen.

The parsers take text alone; a stream may be cut anywhere. Releases before 0.8 (and 0.4) lack parameters of
what is called here, which are then left out.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from llm_router_utils.sglang.srt.entrypoints.openai.protocol import (  # type: ignore[import-not-found]
    ChatCompletionRequest,
)
from llm_router_utils.sglang.srt.entrypoints.openai.serving_chat import (  # type: ignore[import-not-found]
    OpenAIServingChat,
)
from llm_router_utils.sglang.srt.parser.reasoning_parser import (  # type: ignore[import-not-found]
    ReasoningParser,
)
from llm_router_utils.sglang.srt.parser.template_manager import (  # type: ignore[import-not-found]
    TemplateManager,
)
from llm_router_utils.sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]
from transformers import AutoTokenizer  # type: ignore[import-not-found]

from conformance.worker.adapter import Json, accepted, delta_json, search, stream, without_stop_text

_MODEL = "gemma-4"
_PARSER = "gemma4"


def create() -> SGLangAdapter:
    """Make the adapter."""
    return SGLangAdapter()


class SGLangAdapter:
    """Implements `conformance.worker.adapter.Adapter`."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(os.environ["CONFORMANCE_TOKENIZER"])
        arguments = ServerArgs(model_path=_MODEL, tool_call_parser=_PARSER, reasoning_parser=_PARSER)
        # The server's tokenizer manager, less its scheduler and its model.
        manager = SimpleNamespace(
            server_args=arguments,
            model_path=_MODEL,
            tokenizer=tokenizer,
            processor=None,
            model_config=SimpleNamespace(
                hf_config=SimpleNamespace(
                    model_type=_PARSER, architectures=["Gemma4ForConditionalGeneration"]
                ),
                get_default_sampling_params=dict,
            ),
        )
        templates = TemplateManager()
        templates.initialize_templates(
            manager, model_path=_MODEL, chat_template=os.environ["CONFORMANCE_CHAT_TEMPLATE"]
        )
        self._serving = OpenAIServingChat(manager, templates)

    def describe(self) -> Json:
        """`TargetInfo`."""
        return {
            "name": "sglang-parsers",
            "version": metadata.version("llm-router-utils"),
            "capabilities": ["parse", "parse_stream", "certify"],
            "stream_unit": "characters",
            "environment": {
                "python": platform.python_version(),
                "package:transformers": metadata.version("transformers"),
            },
            "note": "ReasoningParser(gemma4), FunctionCallParser(gemma4), as OpenAIServingChat uses them",
        }

    def parse(self, request: Json) -> Json:
        """As `OpenAIServingChat._build_chat_response`."""
        request = without_stop_text(request)
        chat = _chat_request(request, streamed=False)
        reasoning, text = self._reasoning_parser(chat).parse_non_stream(request["output"])
        calls: Sequence[Any] = ()
        if self._calls_active(chat):
            found, text, _ = self._serving._process_tool_calls(
                text, self._serving._effective_tools(chat), {"type": "stop"}, chat.tool_choice, 0
            )
            calls = found or ()
        return {
            "reasoning": reasoning or None,
            "content": text or "",
            "tool_calls": [
                {"name": call.function.name, "arguments": call.function.arguments} for call in calls
            ],
        }

    def parse_stream(self, request: Json) -> Sequence[Json]:
        """As `OpenAIServingChat._generate_stream_content`."""
        return stream({**request, "request": without_stop_text(request["request"])}, self._opener)

    def certify(self, request: Json) -> Json:
        """The same, over every chunking."""
        return search({**request, "request": without_stop_text(request["request"])}, self._opener)

    def _opener(self, request: Json) -> Callable[[], _Session]:
        chat = _chat_request(request, streamed=True)
        calls = self._calls_active(chat)

        def open_session() -> _Session:
            own = chat.model_copy()
            return _Session(self._serving, own, self._reasoning_parser(own), calls=calls)

        return open_session

    def _reasoning_parser(self, chat: Any) -> Any:
        serving = self._serving
        return ReasoningParser(
            model_type=serving.reasoning_parser,
            stream_reasoning=chat.stream and chat.stream_reasoning,
            force_reasoning=(
                serving.template_manager.force_reasoning or serving._get_reasoning_from_request(chat)
            ),
            request=chat,
            tokenizer=serving.tokenizer_manager.tokenizer,
            **accepted(ReasoningParser, {"tool_call_parser_active": self._calls_active(chat)}),
        )

    def _calls_active(self, chat: Any) -> bool:
        return bool(chat.tool_choice != "none" and self._serving._effective_tools(chat))


class _Session:
    """One stream."""

    def __init__(self, serving: Any, chat: Any, reasoning_parser: Any, *, calls: bool) -> None:
        self._serving = serving
        self._chat = chat
        self._reasoning_parser = reasoning_parser
        self._calls = calls
        self._call_parsers: dict[int, Any] = {}
        self._has_calls: dict[int, bool] = {}
        self.shared = (serving, chat, *(chat.tools or ()))

    def feed(self, text: str, ids: list[int], finished: bool) -> list[Json]:
        """The text that one output of the detokeniser adds."""
        del ids  # the parsers take text alone
        reasoning, text = self._reasoning_parser.parse_stream_chunk(text)
        if finished:
            end_reasoning, end_text = self._reasoning_parser.parse_stream_end()
            reasoning, text = (reasoning or "") + (end_reasoning or ""), (text or "") + (end_text or "")
        deltas: list[Json] = [{"reasoning": reasoning}] if reasoning else []
        if self._calls:
            return deltas + self._feed_calls(text, finished=finished)
        return [*deltas, {"content": text}] if text else deltas

    def _feed_calls(self, text: str, *, finished: bool) -> list[Json]:
        content = {"meta_info": {"id": "chatcmpl-1"}}
        step, last = self._serving._process_tool_call_stream, self._serving._check_for_unstreamed_tool_args
        events = _collect(
            step(
                *(0, text, self._call_parsers, content, self._chat, self._has_calls),
                **accepted(step, {"created": 0, "flush": finished}),
            )
        )
        if finished and 0 in self._call_parsers:
            rest = last(self._call_parsers[0], content, self._chat, 0, **accepted(last, {"created": 0}))
            events += [rest] if rest else []
        return [_delta(event) for event in events]


def _chat_request(request: Json, *, streamed: bool) -> Any:
    fields: Json = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": streamed,
    }
    if request["tools"]:
        fields["tools"] = request["tools"]
    if request["tool_choice"] == "none":
        fields["tool_choice"] = "none"
    if request["thinking"] is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": request["thinking"]}
    return ChatCompletionRequest.model_validate(fields)


def _collect(events: AsyncIterator[str]) -> list[str]:
    """Run an asynchronous generator that never waits for anything."""
    found = []
    while True:
        step = events.__anext__().__await__()
        try:
            next(step)
        except StopIteration as event:
            found.append(event.value)
        except StopAsyncIteration:
            return found
        else:
            raise RuntimeError("the generator waits for something; it cannot be run to its end here")


def _delta(event: str) -> Json:
    """A server-sent chunk in the JSON form of `Delta`."""
    chunk = json.loads(event.removeprefix("data: "), object_hook=lambda fields: SimpleNamespace(**fields))
    message = chunk.choices[0].delta
    return delta_json(None, getattr(message, "content", None), getattr(message, "tool_calls", None))
