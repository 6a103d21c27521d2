"""The bundled engine: continuous batching over a paged cache, for whatever takes one.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from conformance.errors import EngineError
from conformance.targets import reference_lora
from conformance.targets.protocol import Feature, GenerateRequest, Generation, Parts, Sampling
from conformance.targets.reference_abilities import CACHES
from conformance.targets.reference_forward import DTYPES
from conformance.targets.reference_parallel import layout_of, spread
from conformance.targets.reference_reader import Reader
from model_impl.config import TextConfig
from model_impl.parallel.runner import ParallelRunner
from model_impl.runtime import generate as runtime
from model_impl.runtime import sampling
from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.paged import CacheSizes
from model_impl.runtime.request import Request
from model_impl.runtime.runner import LocalRunner, Runner
from model_impl.speculative.assistant import load_assistant
from model_impl.speculative.eagle3 import load_eagle3
from model_impl.speculative.eagle3_config import Eagle3Config
from model_impl.speculative.proposer import AssistantProposer, Eagle3Proposer, Proposer

PAGED: frozenset[Feature] = frozenset(
    ("eagle3", "assistant", "prefix-cache", "block-size", "kv-dtype", "max-sequences")
)
"""What takes a paged cache."""
_BLOCK_SIZE = 4
"""Small, so that short prompts have several."""
_MAX_SEQUENCES = 64
_MOST_WAITING = 1000
"""Requests given to the engine at a time: it looks through those that wait in every step."""


class Running(Protocol):
    """A model that is ready to answer."""

    def answers(self, request: GenerateRequest) -> list[Generation]:
        """All samples of the first prompt, then those of the next."""
        ...

    def effective(self) -> dict[str, str]:
        """What runs."""
        ...

    def adapted(self) -> dict[str, tuple[str, ...]]:
        """By adapter, the modules whose output it has changed."""
        ...

    def parts(self) -> Parts | None:
        """What is there besides the language model; None without adapters."""
        ...


class PagedEngine:
    """An engine that lasts for one request with all its repetitions; implements `Running`.

    Its model is in this process, or spread over several.

    Its pools hold as many sequences as run at once, each as long as the longest of the request, in sliding
    layers as far as a chunk and the window reach; what is cached beyond them has to go. Blocks of sliding
    layers have twice as many positions as those of full ones, as they have where layers of smaller heads have
    pages of the same number of bytes.

    Args:
        reader: The model.
        request: Its options say how the engine is set up.

    Raises:
        EngineError: a prompt and its answer are longer than `max_model_len`.
        ModelError: the draft, or an adapter, does not fit.
    """

    def __init__(self, reader: Reader, request: GenerateRequest) -> None:
        options = request.options
        self._reader = reader
        self._options = options
        size = options.block_size or _BLOCK_SIZE
        sequences = options.max_sequences or _MAX_SEQUENCES
        with torch.inference_mode():
            # How long they are, and whether there are pictures: adapters have no part in that.
            rows, soft = reader.read(request.prompts, request.images, request.sounds)
        longest = max(map(len, rows)) + request.max_new_tokens
        if longest > options.max_model_len:
            raise EngineError(f"prompt and answer take {longest} tokens, above max_model_len")
        drafted = options.speculation.tokens if options.speculation is not None else 0
        self._spread = spread(request)
        step = options.prefill_chunk if options.prefill_chunk is not None and soft is None else longest
        try:
            self._adapters = reference_lora.attached(
                reader.model, Path(request.checkpoint), request.adapter_of, self._spread
            )
            self._runner = self._make_runner(
                replace(
                    _sizes(reader.text.config, size, sequences, longest + drafted, step + 2 * drafted),
                    stored=options.kv_dtype,
                )
            )
            self._engine = Engine(
                self._runner,
                EngineConfig(
                    max_tokens_per_step=options.prefill_chunk or EngineConfig.max_tokens_per_step,
                    max_sequences=sequences,
                    prefix_caching=bool(options.prefix_cache),
                    draft_tokens=max(1, drafted),
                ),
                self._proposer(),
            )
        except BaseException:
            if self._spread is not None:
                self._spread.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()
        if self._spread is not None:
            self._spread.close()

    def answers(self, request: GenerateRequest) -> list[Generation]:
        """All samples of the first prompt, then those of the next."""
        count = len(request.prompts) * request.samples
        seeds = runtime.row_seeds(request.sampling.seed if request.sampling is not None else 0, count)
        asked: list[Request] = []
        for number, (prompt, adapter) in enumerate(zip(request.prompts, request.adapter_of, strict=True)):
            with torch.inference_mode():
                (row,), soft = self._reader.read(
                    [prompt],
                    request.images[number : number + 1],
                    request.sounds[number : number + 1],
                    encode=reference_lora.encoder(self._adapters, [adapter]),
                )
            asked += [
                Request(
                    tuple(row),
                    request.max_new_tokens,
                    soft=soft,
                    sampling=sampling_of(request.sampling),
                    seed=seed,
                    stop_ids=frozenset(request.stop_ids),
                    logprobs=True,
                    top_logprobs=request.top_logprobs,
                    adapter=adapter,
                )
                for seed in seeds[number * request.samples : (number + 1) * request.samples]
            ]
        return [
            Generation(
                token_ids=made.ids,
                finish_reason=made.finish_reason,
                logprobs=made.logprobs or (),
                top=made.top or (),
                accepted=made.acceptance.accepted if self._options.speculation is not None else None,
                drafted=made.acceptance.drafted,
                cached_tokens=made.cached_tokens,
            )
            for start in range(0, count, _MOST_WAITING)
            for made in self._engine.run(asked[start : start + _MOST_WAITING])
        ]

    def effective(self) -> dict[str, str]:
        """What runs."""
        engine = self._engine
        return {
            **self._reader.effective(),
            "threads": str(torch.get_num_threads()),
            **(layout_of(self._spread) if self._spread is not None else {}),
            "cache": CACHES[1],
            "prefill_chunk": str(engine.config.max_tokens_per_step),
            "prefix_cache": "on" if engine.blocks.caching else "off",
            "block_size": str(self._runner.sizes.block_size["full_attention"]),
            "kv_dtype": self._runner.stored,
            "max_sequences": str(engine.config.max_sequences),
            "speculation": _method(engine.proposer),
            "adapter": self._adapters.summary() if self._adapters is not None else "none",
        }

    def adapted(self) -> dict[str, tuple[str, ...]]:
        """By adapter, the modules whose output it has changed."""
        return self._adapters.acted() if self._adapters is not None else {}

    def parts(self) -> Parts | None:
        """What is there besides the language model; None without adapters."""
        return self._adapters.parts() if self._adapters is not None else None

    def _make_runner(self, sizes: CacheSizes) -> Runner:
        speculation = self._options.speculation
        aux: Sequence[int] = ()
        if speculation is not None and speculation.method == "eagle3":
            layers = len(self._reader.text.layers)
            path = Path(speculation.checkpoint) / "config.json"
            aux = Eagle3Config.from_file(path, target_layers=layers).aux_layers
        if self._spread is not None:
            return ParallelRunner(self._spread, sizes, aux)
        activate = self._adapters.rows if self._adapters is not None else None
        return LocalRunner(self._reader.text, sizes, aux, activate)

    def _proposer(self) -> Proposer | None:
        speculation = self._options.speculation
        if speculation is None:
            return None
        folder, dtype = Path(speculation.checkpoint), DTYPES[self._options.dtype]
        attention = self._options.attention
        if speculation.method == "assistant":
            return AssistantProposer(load_assistant(folder, dtype=dtype, attention=attention), self._runner)
        layers = len(self._runner.config.layers)
        head = load_eagle3(folder, target_layers=layers, dtype=dtype, attention=attention)
        return Eagle3Proposer(head, self._runner)


def _method(proposer: Proposer | None) -> str:
    """What drafts, as requests name it."""
    if isinstance(proposer, Eagle3Proposer):
        return "eagle3"
    return "none" if proposer is None else "assistant"


def _sizes(config: TextConfig, size: int, sequences: int, longest: int, step: int) -> CacheSizes:
    """Pools for sequences of up to so many tokens, of which a step adds up to so many."""
    sizes = {kind: size if kind == "full_attention" else 2 * size for kind in config.kinds}
    reach = {
        kind: longest if kind == "full_attention" else min(longest, config.sliding_window + step)
        for kind in config.kinds
    }
    # One block more for a sequence whose window begins inside of one.
    blocks = {kind: sequences * (math.ceil(reach[kind] / each) + 1) for kind, each in sizes.items()}
    return CacheSizes(sizes, blocks)


def sampling_of(asked: Sampling | None) -> sampling.Sampling:
    """How the bundled implementation chooses tokens."""
    if asked is None:
        return sampling.Sampling.greedy()
    return sampling.Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p)
