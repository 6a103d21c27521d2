"""Hugging Face transformers: parser of `transformers serve`, chat template, processors, models.

Driven as the server's chat completions are: `parse_assistant_message` for a whole answer,
`build_response_parser` and `response_events_to_chunks` for a stream. The parser follows a response
template. Published Gemma 4 tokenizers carry none in the form that this release reads, so what a user gets
is the server's own fallback for the model type `gemma4`; a tokenizer with a template of its own would win.

* Generated text is decoded with its stop token, which the response template knows as an end of content.
* The server passes no tools to the parser, so arguments keep the types that their text gives them;
  `tool_choice` is not supported by the server and plays no part.
* When `finalize` fails, the server logs it and ends the stream without what was left.

`render` is `apply_chat_template` with the bundled template, as a checkpoint carries one. `preprocess`,
`forward` and `generate` are in `transformers_processor`, `transformers_model` and `transformers_generate`,
which are imported when first asked for, because they need torch, and the first one what processes images too.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer  # type: ignore[import-not-found]
from transformers.cli.serving.utils import (  # type: ignore[import-not-found]
    ReasoningText,
    ToolCall,
    build_response_parser,
    parse_assistant_message,
    response_events_to_chunks,
)

from conformance.worker.adapter import Json, search, stream

_MODEL = SimpleNamespace(config=SimpleNamespace(model_type="gemma4"))
"""All that the parsing functions ask of the model."""
_GENERATION = ("assistant", "prefill-chunk", "threads", "sampling", "repeat", "states")
"""What `transformers_generate` can do besides."""
_CHOICES = {"attention": ["eager", "sdpa", "flex"], "cache": ["dynamic", "static"]}
_IMAGES = {"torchvision": "torchvision", "PIL": "pillow"}
"""Modules that processors need besides torch, and their packages."""


def create() -> TransformersAdapter:
    """Make the adapter."""
    return TransformersAdapter()


class TransformersAdapter:
    """Implements `conformance.worker.adapter.Adapter`."""

    def __init__(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(os.environ["CONFORMANCE_TOKENIZER"])
        self._template = Path(os.environ["CONFORMANCE_CHAT_TEMPLATE"]).read_text(encoding="utf-8")

    def describe(self) -> Json:
        """`TargetInfo`."""
        version = metadata.version("transformers")
        packages = ["jinja2", "regex", "tokenizers", "torch"]
        capabilities = ["parse", "parse_stream", "certify", "render", "forward", "generate", "loglikelihood"]
        features = ["media", *_GENERATION]
        unavailable = {}
        if importlib.util.find_spec("peft") is not None:
            features += ["lora", "mixed-adapters"]
            packages.append("peft")
        if reason := _without_images(version):
            unavailable["preprocess"] = reason
        else:
            capabilities.append("preprocess")
            features += ["images", "sounds"]
            packages += _IMAGES.values()
        return {
            "name": "transformers",
            "version": version,
            "capabilities": capabilities,
            "features": features,
            "choices": _CHOICES,
            "unavailable": unavailable,
            "stream_unit": "characters",
            "environment": {
                "python": platform.python_version(),
                **{f"package:{name}": metadata.version(name) for name in packages},
            },
            "note": "transformers.cli.serving.utils.parse_assistant_message with its gemma4 fallback; "
            "apply_chat_template; Gemma4Processor; Gemma4ForCausalLM, AutoModelForMultimodalLM",
        }

    def parse(self, request: Json) -> Json:
        """As `ChatCompletionHandler._non_streaming`."""
        content, reasoning, calls = parse_assistant_message(
            self._tokenizer, _MODEL, request["output"], input_ids=self._prompt_ids(request)
        )
        return {
            "reasoning": reasoning,
            "content": content,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in calls or ()],
        }

    def parse_stream(self, request: Json) -> Sequence[Json]:
        """As `DirectStreamer` and `ChatCompletionHandler._streaming`."""
        return stream(request, self._opener)

    def certify(self, request: Json) -> Json:
        """The same, over every chunking."""
        return search(request, self._opener)

    def render(self, request: Json) -> Json:
        """`apply_chat_template`, as text and as ids."""
        variables = {"family": request["family"]}
        for name, key in (("enable_thinking", "thinking"), ("preserve_thinking", "preserve_thinking")):
            if request[key] is not None:
                variables[name] = request[key]
        prompt, ids = (
            self._tokenizer.apply_chat_template(
                request["messages"],
                tools=request["tools"] or None,
                chat_template=self._template,
                add_generation_prompt=request["add_generation_prompt"],
                tokenize=tokenize,
                return_dict=False,
                **variables,
            )
            for tokenize in (False, True)
        )
        return {"prompt": prompt, "token_ids": ids}

    def preprocess(self, request: Json) -> Json:
        """`Gemma4Processor`, `Gemma4UnifiedProcessor`."""
        from conformance.worker.adapters import transformers_processor

        return transformers_processor.preprocess(request)

    def forward(self, request: Json) -> Json:
        """`Gemma4ForCausalLM`, or what `AutoModelForMultimodalLM` makes of a checkpoint with towers."""
        from conformance.worker.adapters import transformers_model

        return transformers_model.forward(request)

    def generate(self, request: Json) -> Json:
        """`generate` of `Gemma4ForCausalLM`, or of the whole model where the checkpoint has towers."""
        from conformance.worker.adapters import transformers_generate

        return transformers_generate.generate(request)

    def loglikelihood(self, request: Json) -> Json:
        """One pass of the same model."""
        from conformance.worker.adapters import transformers_generate

        return transformers_generate.loglikelihood(request)

    def _opener(self, request: Json) -> Callable[[], _Session]:
        prompt_ids = self._prompt_ids(request)
        return lambda: _Session(build_response_parser(self._tokenizer, _MODEL, prompt_ids))

    def _prompt_ids(self, request: Json) -> list[int]:
        ids = list(request["prompt_ids"])
        return ids or list(self._tokenizer.encode(request["prompt"], add_special_tokens=False))


def _without_images(version: str) -> str:
    """Why nothing can process images here, and what to do; empty if something can."""
    absent = [package for module, package in _IMAGES.items() if importlib.util.find_spec(module) is None]
    if not absent:
        return ""
    return (
        f"processors need {' and '.join(absent)}, the part `images` of an environment; where its lock file "
        f"has that part, `conformance targets install transformers@{version}` adds it"
    )


class _Session:
    """One stream."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._calls = 0
        self._started = False
        self.shared: tuple[object, ...] = (parser._spec,)

    def feed(self, text: str, ids: list[int], finished: bool) -> list[Json]:
        """The text that a decoding step adds."""
        del ids  # the parser takes text alone
        parser = self._parser
        items = [] if self._started else response_events_to_chunks(parser.initial_events)
        self._started = True
        items += response_events_to_chunks(parser.feed(text))
        if finished:
            try:
                _, events = parser.finalize()
            except (ValueError, RuntimeError):  # as the server does
                events = []
            items += response_events_to_chunks(events)
        return [self._delta(item) for item in items]

    def _delta(self, item: Any) -> Json:
        if isinstance(item, ToolCall):
            index = self._calls
            self._calls += 1
            call = {"index": index, "id": f"chatcmpl-1_tool_call_{index}", "type": "function"}
            return {"tool_calls": [{**call, "name": item.name, "arguments": item.arguments}]}
        if isinstance(item, ReasoningText):
            return {"reasoning": str(item)}
        return {"content": item}
