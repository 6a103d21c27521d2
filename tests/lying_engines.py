"""An engine whose model is a function of the last three tokens; each lie changes one thing about it.

It needs no weights: of a checkpoint only the path counts, and a perturbed one is slightly another model.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from conformance.errors import EngineError
from conformance.targets.protocol import (
    Capability,
    Choice,
    EngineOptions,
    Feature,
    GenerateRequest,
    GenerateResult,
    Generation,
    TargetInfo,
)

VOCABULARY = 24
LAYERS = 5
FEATURES: tuple[Feature, ...] = (
    *("tensor-parallel", "pipeline-parallel", "eagle3", "assistant", "prefill-chunk", "prefix-cache"),
    *("block-size", "kv-dtype", "max-sequences", "threads", "sampling", "repeat", "states"),
)
Logits = tuple[float, ...]


@dataclass(frozen=True)
class Asked:
    """What is known when a token is chosen."""

    context: tuple[int, ...]
    options: EngineOptions
    together: int
    """Prompts of the request."""
    turn: int
    """How many times they were asked before."""
    place: int
    """Of the token in its answer."""
    prompt: int


Change = Callable[[Asked, Logits], Logits]


@dataclass
class Engine:
    """Implements the target protocol; a lie sets one field."""

    change: Change = lambda _asked, logits: logits
    features: tuple[Feature, ...] = FEATURES
    capabilities: tuple[Capability, ...] = ("generate",)
    choices: dict[Choice, tuple[str, ...]] = field(
        default_factory=lambda: {"attention": ("eager", "sdpa"), "cache": ("dynamic", "static")}
    )
    effective: Callable[[dict[str, str]], dict[str, str]] = lambda said: said
    refuses: Callable[[GenerateRequest], str] = lambda _request: ""
    perturbable: bool = True
    cached: int | None = 4
    accepted: Callable[[Asked], tuple[int, ...] | None] = lambda _asked: (2, 1, 2, 1)
    alternatives: int = 20
    wrong_layer: int | None = None
    """From this layer on, states of prompts that come in chunks are others."""
    drawn: Callable[[list[int], list[float], GenerateRequest], list[float]] = (
        lambda _tokens, weights, _request: weights
    )
    spec: str = "lying"
    requests: list[GenerateRequest] = field(default_factory=list)

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name="lying",
            version="1",
            capabilities=self.capabilities,
            features=self.features,
            choices=self.choices,
            unavailable={} if "generate" in self.capabilities else {"generate": "run `install lying`"},
        )

    def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        if why := self.refuses(request):
            raise EngineError(why)
        if request.states:
            self._write_states(request)
        generations = tuple(
            self._answer(request, turn, number, sample)
            for turn in range(request.repeat)
            for number in range(len(request.prompts))
            for sample in range(request.samples)
        )
        options = request.options
        said = options.asked | {
            "attention": options.attention or "sdpa",
            "cache": options.cache or "dynamic",
            "threads": str(options.threads or 1),
        }
        return GenerateResult(generations=generations, effective=self.effective(said))

    def close(self) -> None:
        pass

    def _answer(self, request: GenerateRequest, turn: int, number: int, sample: int) -> Generation:
        context = request.prompts[number]
        source = random.Random(f"{request.sampling and request.sampling.seed} {number} {sample}")
        tokens: list[int] = []
        logprobs: list[float] = []
        top: list[dict[int, float]] = []
        asked = Asked(context, request.options, len(request.prompts), turn, 0, number)
        for place in range(request.max_new_tokens):
            asked = replace(asked, context=(*context, *tokens), place=place)
            logits = self.change(asked, self._logits(request, asked.context))
            values = log_softmax(logits)
            ranked = sorted(range(VOCABULARY), key=lambda token: -values[token])
            token = ranked[0]
            if request.sampling is not None:
                assert request.sampling.top_k is not None
                kept = ranked[: request.sampling.top_k]
                weights = [math.exp(values[each] / request.sampling.temperature) for each in kept]
                token = source.choices(kept, self.drawn(kept, weights, request))[0]
            tokens.append(token)
            logprobs.append(values[token])
            most = min(request.top_logprobs, self.alternatives)
            top.append({each: values[each] for each in ranked[:most]})
            if token in request.stop_ids:
                break
        draft = request.options.speculation is not None
        return Generation(
            token_ids=tuple(tokens),
            finish_reason="stop" if tokens[-1] in request.stop_ids else "length",
            logprobs=tuple(logprobs),
            top=tuple(top) if request.top_logprobs else (),
            accepted=self.accepted(asked) if draft else None,
            drafted=tuple(3 for _ in self.accepted(asked) or ()) if draft else (),
            cached_tokens=self.cached,
        )

    def _logits(self, request: GenerateRequest, context: tuple[int, ...]) -> Logits:
        logits = random_logits(context[-3:])
        if self.perturbable and "perturbed" in Path(request.checkpoint).name:
            wobble = random.Random(f"perturbed {context[-3:]}")
            far = 0.02 if request.options.dtype == "float32" else 0.5
            return tuple(value + wobble.gauss(0, far) for value in logits)
        return logits

    def _write_states(self, request: GenerateRequest) -> None:
        states = torch.ones(len(request.prompts), LAYERS, 8)
        if self.wrong_layer is not None and request.options.prefill_chunk is not None:
            states[:, self.wrong_layer :] *= 1.01
        save_file({"states": states}, request.states)


@functools.cache
def random_logits(context: tuple[int, ...]) -> Logits:
    """What the model says after some tokens."""
    source = random.Random(f"{context}")
    return tuple(source.gauss(0, 1.5) for _ in range(VOCABULARY))


def log_softmax(logits: Sequence[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(value) for value in logits))
    return [value - total for value in logits]


def raised(logits: Logits, token: int, by: float) -> Logits:
    """One token's logit is the highest, by so much."""
    highest = max(value for each, value in enumerate(logits) if each != token)
    return tuple(highest + by if each == token else value for each, value in enumerate(logits))
