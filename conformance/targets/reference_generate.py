"""Generation by the bundled model, from text, pictures and sounds, and what it thinks of given answers.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conformance.errors import EngineError
from conformance.targets import reference_lora
from conformance.targets.protocol import (
    EngineOptions,
    GenerateRequest,
    GenerateResult,
    Generation,
    KVDType,
    Loglikelihood,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    Parts,
)
from conformance.targets.reference_abilities import CACHES, FEATURES
from conformance.targets.reference_engine import PAGED, PagedEngine, Running, sampling_of
from conformance.targets.reference_model import engine
from conformance.targets.reference_parallel import layout_of, spread
from conformance.targets.reference_reader import Files, Ids, Reader
from model_impl.runtime import generate as runtime
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import NO_BLOCK
from model_impl.text import SoftTokens

_MOST_ROWS = 1000
"""Of one batch: enough for any prompts that are not copies of each other."""


def generate(request: GenerateRequest) -> GenerateResult:
    """Answer a `GenerateRequest`: all prompts as one ragged batch, all pictures and all sounds as others.

    Raises:
        EngineError: the model refuses the request or one of its options, or a computation in it fails.
    """
    with engine(request.options.threads):
        return _generate(request)


def loglikelihood(request: LoglikelihoodRequest) -> LoglikelihoodResult:
    """Answer a `LoglikelihoodRequest`: each pair in one pass without a cache.

    Raises:
        EngineError: as `generate`.
    """
    options = request.options
    if asked := [feature for feature in options.features if feature != "threads"]:
        raise EngineError(
            f"the bundled implementation gives likelihoods without {', '.join(asked)}: by one pass of the "
            "whole model in one process; leave that out"
        )
    with engine(options.threads), torch.inference_mode():
        pairs = list(zip(request.contexts, request.continuations, strict=True))
        _check_length(max(len(context) + len(continuation) for context, continuation in pairs), options)
        reader = Reader(Path(request.checkpoint), options.dtype, options.attention)
        found = []
        for context, continuation in pairs:
            values = reader.logprobs(context, continuation)
            chosen = values.gather(1, torch.tensor(continuation)[:, None])[:, 0]
            found.append(
                Loglikelihood(
                    logprob=float(chosen.double().sum()),
                    greedy=values.argmax(dim=-1).tolist() == list(continuation),
                )
            )
        return LoglikelihoodResult(likelihoods=tuple(found), effective=reader.effective())


def logprobs(
    checkpoint: Path,
    prompts: Sequence[Ids],
    images: Sequence[Files],
    answers: Sequence[Ids],
    dtype: str,
    kv_dtype: KVDType | None = None,
) -> list[Tensor]:
    """Log-probabilities of every token where the answers' tokens stand, by one pass without a cache.

    Args:
        checkpoint: Folder of the model.
        prompts: Token ids, with one placeholder for each picture.
        images: Files of each prompt's pictures; empty: no prompt has any.
        answers: Token ids of each answer.
        dtype: Of weights and activations.
        kv_dtype: To which keys and values are rounded; None: to none.

    Returns:
        For each prompt, float32 [tokens of its answer, vocabulary].

    Raises:
        EngineError: as `generate`.
    """
    with engine(), torch.inference_mode():
        reader = Reader(checkpoint, dtype, None, media=any(images))
        rows = zip(prompts, images or [()] * len(prompts), answers, strict=True)
        return [reader.logprobs(prompt, answer, files, kv_dtype=kv_dtype) for prompt, files, answer in rows]


def _generate(request: GenerateRequest) -> GenerateResult:
    options = request.options
    _check_features(request.features)
    media = any(request.images) or any(request.sounds)
    reader = Reader(
        Path(request.checkpoint), options.dtype, options.attention, media=media or any(request.adapter_of)
    )
    with running(request, reader) as engine:
        if request.states:
            _write_states(request, reader, engine)
        made = [row for _ in range(request.repeat) for row in engine.answers(request)]
        return GenerateResult(
            generations=tuple(made),
            effective=engine.effective(),
            adapted=engine.adapted(),
            parts=engine.parts(),
        )


def running(request: GenerateRequest, reader: Reader) -> AbstractContextManager[Running]:
    """What answers: an engine with a paged cache where anything is asked for that takes one.

    Raises:
        EngineError: the cache that is asked for has not what else is asked for.
    """
    options = request.options
    paged = PAGED & set(options.features)
    cache = options.cache or (CACHES[1] if paged else CACHES[0])
    if cache not in CACHES:
        raise EngineError(f"cache {cache!r} is none of {', '.join(CACHES)}")
    if cache == CACHES[0]:
        if paged:
            raise EngineError(f"a {cache} cache has no {', '.join(sorted(paged))}; ask for {CACHES[1]!r}")
        return _Contiguous(reader, request)
    return PagedEngine(reader, request)


class _Contiguous:
    """One batch from beginning to end, some thousand rows at a time; implements `Running`.

    In this process, or spread over several.
    """

    def __init__(self, reader: Reader, request: GenerateRequest) -> None:
        self._reader = reader
        self._spread = spread(request)
        self._model = _Measured(self._spread or self._reader.text, request.options.prefill_chunk)
        try:
            self._adapters = reference_lora.attached(
                reader.model, Path(request.checkpoint), request.adapter_of, self._spread
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, if there are any."""
        if self._spread is not None:
            self._spread.close()

    def answers(self, request: GenerateRequest) -> list[Generation]:
        """All samples of the first prompt, then those of the next."""
        prompts = [number for number in range(len(request.prompts)) for _ in range(request.samples)]
        seeds = runtime.row_seeds(request.sampling.seed if request.sampling is not None else 0, len(prompts))
        found: list[Generation] = []
        for start in range(0, len(prompts), _MOST_ROWS):
            batch = prompts[start : start + _MOST_ROWS]
            wanted = [request.adapter_of[number] for number in batch]
            with torch.inference_mode():
                rows, soft = self._reader.read(
                    [request.prompts[number] for number in batch],
                    [request.images[number] for number in batch] if request.images else (),
                    [request.sounds[number] for number in batch] if request.sounds else (),
                    encode=reference_lora.encoder(self._adapters, wanted),
                )
            _check_length(max(map(len, rows)) + request.max_new_tokens, request.options)
            made = runtime.generate(
                self._model,
                rows,
                max_new_tokens=request.max_new_tokens,
                stop_ids=request.stop_ids,
                sampling=sampling_of(request.sampling),
                seed=seeds[start : start + _MOST_ROWS],
                logprobs=True,
                top_logprobs=request.top_logprobs,
                prefill_chunk=request.options.prefill_chunk,
                soft=soft,
                adapt=reference_lora.rows_of(self._adapters, wanted),
            )
            found += [
                Generation(
                    token_ids=row.ids,
                    finish_reason=row.finish_reason,
                    logprobs=row.logprobs or (),
                    top=row.top or (),
                )
                for row in made
            ]
        return found

    def effective(self) -> dict[str, str]:
        """What runs, or has run."""
        return {
            **self._reader.effective(),
            "threads": str(torch.get_num_threads()),
            **(layout_of(self._spread) if self._spread is not None else {}),
            "cache": CACHES[0],
            **({"prefill_chunk": str(self._model.most)} if self._model.most is not None else {}),
            "adapter": self._adapters.summary() if self._adapters is not None else "none",
        }

    def adapted(self) -> dict[str, tuple[str, ...]]:
        """By adapter, the modules whose output it has changed."""
        return self._adapters.acted() if self._adapters is not None else {}

    def parts(self) -> Parts | None:
        """What is there besides the language model; None without adapters."""
        return self._adapters.parts() if self._adapters is not None else None


class _Measured:
    """A model that looks how many prompt tokens its passes have; implements `runtime.Generating`.

    Args:
        model: That computes.
        chunk: Most that were asked for in a pass.
    """

    def __init__(self, model: runtime.Generating, chunk: int | None) -> None:
        self._model = model
        self._chunk = chunk
        self.config = model.config
        self.new_cache, self.logits = model.new_cache, model.logits
        self.most = chunk
        """Most in a pass: what was asked for, or more if there were more; an image may end behind it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.device

    def __call__(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
        soft: SoftTokens | None = None,
    ) -> Tensor:
        """As the model's."""
        width = input_ids.shape[1]
        if self.most is not None and width > self.most and not _inside_image(soft, self._chunk):
            self.most = width
        return self._model(input_ids, cache=cache, lengths=lengths, soft=soft)


def _inside_image(soft: SoftTokens | None, column: int | None) -> bool:
    """Whether a pass that ended before a column would tear an image of some row."""
    if soft is None or column is None:
        return False
    before, behind = soft.blocks[:, column - 1], soft.blocks[:, column]
    return bool(((before == behind) & (behind != NO_BLOCK)).any())


def _write_states(request: GenerateRequest, reader: Reader, engine: Running) -> None:
    """What each layer gives for the last token of each prompt, asked for alone."""
    if request.options.tensor_parallel > 1 or request.options.pipeline_parallel > 1:
        raise EngineError("the bundled implementation shows states of layers in this process alone")
    rows = []
    for number in range(len(request.prompts)):
        seen: dict[int, Tensor] = {}
        hooks = [layer.register_forward_hook(_keep(seen, k)) for k, layer in enumerate(reader.text.layers)]
        one = request.model_copy(
            update={
                "prompts": request.prompts[number : number + 1],
                "images": request.images[number : number + 1],
                "sounds": request.sounds[number : number + 1],
                "adapters": request.adapters[number : number + 1],
                "max_new_tokens": 1,
                "samples": 1,
            }
        )
        try:
            engine.answers(one)
        finally:
            for hook in hooks:
                hook.remove()
        rows.append(torch.stack([seen[k] for k in range(len(reader.text.layers))]))
    save_file({"states": torch.stack(rows)}, request.states)


def _keep(seen: dict[int, Tensor], layer: int) -> Callable[..., None]:
    """A hook that keeps what a layer gives for the last token of the only row."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[layer] = output[0, -1].float()

    return hook


def _check_features(asked: Sequence[str]) -> None:
    lacking = [feature for feature in asked if feature not in FEATURES]
    if lacking:
        raise EngineError(f"the bundled implementation cannot generate with {', '.join(lacking)}")


def _check_length(longest: int, options: EngineOptions) -> None:
    if longest > options.max_model_len:
        raise EngineError(f"prompt and answer take {longest} tokens, above max_model_len")
