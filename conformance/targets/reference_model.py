"""The bundled text model, for the reference target and for making tiny checkpoints.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch

from conformance.errors import EngineError
from conformance.targets.protocol import LOGITS, ForwardRequest, ForwardResult
from conformance.worker.adapters.recording import Recorder, spans
from model_impl import random_weights
from model_impl.checkpoint import load_text_model
from model_impl.errors import ModelError
from model_impl.runtime.cache import KVCache
from model_impl.text import TextModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PADDING = 0


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
    """Answer a `ForwardRequest`: all rows as one batch, padded on the right.

    Raises:
        EngineError: the model refuses the request, or a computation in it fails.
    """
    threads = torch.get_num_threads()
    # As in a worker: small models wait for threads more than they gain, and sums keep their order.
    torch.set_num_threads(1)
    try:
        return _forward(request)
    except (ModelError, RuntimeError, ValueError) as error:
        raise EngineError(f"{type(error).__name__}: {error}", traceback=traceback.format_exc()) from error
    finally:
        torch.set_num_threads(threads)


def _forward(request: ForwardRequest) -> ForwardResult:
    model = load_text_model(
        Path(request.checkpoint), dtype=_DTYPES[request.dtype], attention=request.attention
    )
    with Recorder(model, request.capture, len(request.input_ids)) as recorder, torch.inference_mode():
        _run(model, recorder, request)
    recorder.save(Path(request.output))
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    return ForwardResult(
        path=request.output,
        order=tuple(recorder.order),
        effective={"attention": model.attention_backend, "dtype": dtype},
    )


def _run(model: TextModel, recorder: Recorder, request: ForwardRequest) -> None:
    """Feed the batch: the first call's tokens of every row, then one token of every row that has one left."""
    rows = request.input_ids
    calls = list(spans(max(map(len, rows)), request.prefill))
    cache = None
    if len(calls) > 1:
        cache = KVCache(model.config, len(rows), dtype=_DTYPES[request.dtype])
    for start, stop in calls:
        parts = [row[start:stop] for row in rows]
        lengths = [len(part) for part in parts]
        width = max(lengths)
        ids = torch.tensor([[*part, *[_PADDING] * (width - len(part))] for part in parts])
        ragged = min(lengths) < width
        recorder.call(range(len(rows)), lengths)
        hidden = model(ids, cache=cache, lengths=lengths if ragged else None)
        recorder.add(LOGITS, model.logits(hidden))
