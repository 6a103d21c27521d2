"""The bundled text model, for the reference target, for making tiny checkpoints, and as an oracle.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.errors import EngineError
from conformance.targets import reference_forward
from conformance.targets.protocol import (
    ForwardRequest,
    ForwardResult,
    GenerateRequest,
    GenerateResult,
    Generation,
)
from conformance.targets.reference_forward import DTYPES, dtype_of
from model_impl import lora, random_weights
from model_impl.checkpoint import load_text_model
from model_impl.config import TextConfig
from model_impl.errors import ModelError
from model_impl.runtime import generate as runtime


def write_checkpoint(config: dict[str, Any], folder: Path, *, seed: int) -> None:
    """Write `config.json` and seeded `model.safetensors` under the published names.

    Raises:
        EngineError: the configuration is none of a Gemma 4 text model.
    """
    try:
        random_weights.write_checkpoint(config, folder, seed=seed)
    except ModelError as error:
        raise EngineError(f"{type(error).__name__}: {error}", traceback=traceback.format_exc()) from error


def forward(request: ForwardRequest) -> ForwardResult:
    """Answer a `ForwardRequest`; see `reference_forward.forward`.

    Raises:
        EngineError: the model refuses the request, or a computation in it fails.
    """
    with _engine():
        return reference_forward.forward(request)


def generate(request: GenerateRequest) -> GenerateResult:
    """Answer a `GenerateRequest`: all prompts as one ragged batch.

    Raises:
        EngineError: the model refuses the request or one of its options, or a computation in it fails.
    """
    with _engine():
        return _generate(request)


def logprobs(
    checkpoint: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], dtype: str
) -> list[Tensor]:
    """Log-probabilities of every token where the answers' tokens stand, by one pass without a cache.

    Returns:
        For each prompt, float32 [tokens of its answer, vocabulary].

    Raises:
        EngineError: as `forward`.
    """
    with _engine(), torch.inference_mode():
        model = load_text_model(checkpoint, dtype=DTYPES[dtype])
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            hidden = model(torch.tensor([[*prompt, *answer[:-1]]]))
            found.append(model.logits(hidden[0, len(prompt) - 1 :]).float().log_softmax(dim=-1))
        return found


def write_adapter(checkpoint: Path, folder: Path, **options: Any) -> None:
    """Write a random LoRA adapter; see `model_impl.lora.write_random_adapter`.

    Raises:
        EngineError: it does not fit the checkpoint.
    """
    with _engine():
        lora.write_random_adapter(checkpoint, folder, **options)


def merge_adapter(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Write the checkpoint that an adapter makes of another; see `model_impl.lora.merge_adapter`.

    Raises:
        EngineError: the two do not fit together.
    """
    with _engine():
        lora.merge_adapter(checkpoint, adapter, folder)


def write_draft(checkpoint: Path, folder: Path, *, seed: int, layers: Sequence[int]) -> None:
    """Write a random Eagle3 head; see `model_impl.random_weights.write_eagle3`.

    Raises:
        EngineError: it does not fit the checkpoint.
    """
    with _engine():
        config = TextConfig.from_file(checkpoint / "config.json")
        random_weights.write_eagle3(config, folder, seed=seed, layers=layers)


@contextlib.contextmanager
def _engine() -> Iterator[None]:
    """What runs here is an engine: its exceptions are its answers, and it has one thread.

    As in a worker: small models wait for threads more than they gain, and sums keep their order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    except (ModelError, RuntimeError, ValueError) as error:
        raise EngineError(f"{type(error).__name__}: {error}", traceback=traceback.format_exc()) from error
    finally:
        torch.set_num_threads(threads)


def _generate(request: GenerateRequest) -> GenerateResult:
    options = request.options
    asked = [
        *options.features,
        *(["lora"] if request.adapter is not None else []),
        *(["images"] if any(request.images) else []),
    ]
    if asked:
        raise EngineError(f"the bundled implementation cannot generate with {', '.join(asked)}")
    longest = max(map(len, request.prompts)) + request.max_new_tokens
    if longest > options.max_model_len:
        raise EngineError(f"prompt and answer take {longest} tokens, above max_model_len")
    model = load_text_model(
        Path(request.checkpoint), dtype=DTYPES[options.dtype], attention=options.attention
    )
    rows = runtime.generate(
        model,
        request.prompts,
        max_new_tokens=request.max_new_tokens,
        stop_ids=request.stop_ids,
        logprobs=True,
        top_logprobs=request.top_logprobs,
    )
    return GenerateResult(
        generations=tuple(
            Generation(
                token_ids=row.ids,
                finish_reason=row.finish_reason,
                logprobs=row.logprobs or (),
                top=row.top or (),
            )
            for row in rows
        ),
        effective={
            "attention": model.attention_backend,
            "dtype": dtype_of(model),
            "tensor_parallel": "1",
            "pipeline_parallel": "1",
            "speculation": "none",
            "adapter": "none",
        },
    )
