"""Gemma 4 in Hugging Face transformers, with and without media: the oracle of the parity suites.

A checkpoint of text alone is a `Gemma4ForCausalLM`. That names its parameters `model.*`, published ones
`model.language_model.*`; its own `key_mapping` bridges the two. A whole checkpoint is what
`AutoModelForMultimodalLM` makes of it. Towers run with `sdpa` whatever the text model is asked to run with,
because with `eager` audio attention sees what it should not (fact sheet, section 3.8).

transformers only warns of tensors that are missing or left over: here they are errors. It drops the dead K/V
tensors of layers that share another layer's by a rule of its own.

Rows run one by one: without padding there is no padding mask that could be wrong, so a target that runs
them as one batch is judged against rows that cannot have touched each other. A row in one call runs
without a cache, one in steps with `DynamicCache`, as `generate` makes it. How rows with media are fed is in
`transformers_media`.

FlexAttention is compiled. What was compiled for earlier passes changes how it is compiled: torch begins to
generalise over lengths once it has seen two. So each pass starts as in a fresh process.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import (  # type: ignore[import-not-found]
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    DynamicCache,
    Gemma4ForCausalLM,
)
from transformers.utils import logging  # type: ignore[import-not-found]

from conformance.worker.adapter import Json
from conformance.worker.adapters.recording import Recorder, spans
from conformance.worker.adapters.transformers_masks import MaskRecorder
from conformance.worker.adapters.transformers_media import MediaRows, RequestError, is_unified
from conformance.worker.modules import LOGITS, MASK, outside_text

_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXPERTS = "eager"
"""The other implementations add up in another order, which depends on the machine."""
_LONG_BLOCKS = "clamp_past"
"""What transformers does with images longer than the window."""


class CheckpointError(Exception):
    """A checkpoint's tensors do not fit the model."""


def forward(request: Json) -> Json:
    """Answer a `ForwardRequest`."""
    if request["long_blocks"] not in (None, _LONG_BLOCKS):
        raise RequestError(
            f"long_blocks {request['long_blocks']!r}: transformers does {_LONG_BLOCKS!r} and nothing else"
        )
    logging.disable_progress_bar()
    fresh_compiler(request["attention"])
    model = load(Path(request["checkpoint"]), request["dtype"], request["attention"] or "sdpa")
    order, calls = _run(model, request)
    effective_calls = {f"{kind}_calls": str(count) for kind, count in calls.items()}
    if effective_calls:
        effective_calls["rows"] = "one by one"
    return {"path": request["output"], "order": order, "effective": {**effective(model), **effective_calls}}


def load(folder: Path, dtype: str, attention: str) -> Any:
    """Load a checkpoint: of a text model, or a whole one with the towers that it has.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    config = AutoConfig.from_pretrained(folder)
    options: Json = {
        "dtype": _DTYPES[dtype],
        "attn_implementation": _ATTENTION[attention],
        "experts_implementation": _EXPERTS,
        "output_loading_info": True,
        "local_files_only": True,
        "use_safetensors": True,
    }
    if _is_whole(config):
        towers = {"": "sdpa", "vision_config": "sdpa", "audio_config": "sdpa"}
        options["attn_implementation"] = {**towers, "text_config": _ATTENTION[attention]}
        model, report = AutoModelForMultimodalLM.from_pretrained(folder, config=config, **options)
    else:
        model, report = Gemma4ForCausalLM.from_pretrained(
            folder,
            config=config.get_text_config(),
            key_mapping={r"^model\.language_model\.": "model."},
            **options,
        )
    _check_fit(folder, report)
    return model.eval()


def load_assistant(folder: Path, dtype: str, attention: str, *, tokens: int) -> Any:
    """Load a draft model that reads the target's keys and values.

    Args:
        folder: Of its checkpoint.
        dtype: Of the target.
        attention: Of the target.
        tokens: That it drafts a round.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=_DTYPES[dtype],
        attn_implementation=_ATTENTION[attention],
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
    )
    _check_fit(folder, report)
    model.generation_config.num_assistant_tokens = tokens
    return model.eval()


def _check_fit(folder: Path, report: Json) -> None:
    """Raise a `CheckpointError` for what `from_pretrained` only warns of."""
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found}
    if wrong:
        text = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in wrong.items())
        raise CheckpointError(f"{folder}: the tensors do not fit the configuration: {text}")


def _is_whole(config: Any) -> bool:
    """Whether a configuration is of more than a text model; one may name parts that it has not."""
    parts = ("vision_config", "audio_config")
    return is_unified(config) or any(getattr(config, part, None) is not None for part in parts)


def _run(model: Any, request: Json) -> tuple[list[str], dict[str, int]]:
    """Feed all rows and write what was recorded.

    Returns:
        The recorded names in order, and how many times towers ran for each kind of media.
    """
    whole = _is_whole(model.config)
    if request["media"] and not whole:
        raise RequestError(f"{request['checkpoint']} is a text model's checkpoint, and the rows have media")
    rows, names = request["input_ids"], request["capture"]
    text = model.model.language_model if whole else model.model
    outside = [name for name in names if whole and request["media"] and outside_text(name)]
    masks = [name for name in names if name.endswith(MASK)]
    inside = [name for name in names if name not in outside and name not in masks]
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(text, inside, len(rows)))
        seen = stack.enter_context(MaskRecorder(text, masks, recorder.order, max(map(len, rows))))
        media = None
        if request["media"]:
            media = MediaRows(model, Path(request["media"]), rows, outside, recorder.order)
            stack.enter_context(media)
        stack.callback(model.register_forward_hook(_keep_logits(recorder)).remove)
        stack.enter_context(torch.inference_mode())
        for number, row in enumerate(rows):
            _run_row(model, recorder, media, number, row, request["prefill"])
    recorder.save(Path(request["output"]), {**seen.tensors(), **(media.tensors() if media else {})})
    return recorder.order, media.calls if media else {}


def _keep_logits(recorder: Recorder) -> Any:
    return lambda _model, _inputs, output: recorder.ended(LOGITS, output.logits)


def _run_row(
    model: Any,
    recorder: Recorder,
    media: MediaRows | None,
    number: int,
    row: list[int],
    prefill: int | None,
) -> None:
    ids = torch.tensor([row])
    calls = list(spans(len(row), prefill))
    cache = DynamicCache(config=model.config) if len(calls) > 1 and media is None else None
    for start, stop in calls:
        recorder.call([number], [stop - start])
        if media is not None and start == 0:
            cache = media.prefill(number, ids[:, :stop])
        else:
            model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=cache is not None)


def fresh_compiler(attention: str | None) -> None:
    """Forget what was compiled, where the backend is one that is compiled."""
    if attention == "flex":
        torch._dynamo.reset()


def effective(model: Any) -> dict[str, str]:
    """What the model says it runs with."""
    config = model.config.get_text_config()
    names = {theirs: ours for ours, theirs in _ATTENTION.items()}
    effective = {
        "attention": names.get(config._attn_implementation, str(config._attn_implementation)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if getattr(config, "enable_moe_block", False):
        effective["experts"] = str(config._experts_implementation)
    return effective
