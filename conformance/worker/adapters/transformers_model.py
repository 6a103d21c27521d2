"""Gemma 4's text model in Hugging Face transformers: the oracle of the parity suites.

`Gemma4ForCausalLM` names its parameters `model.*`, published checkpoints `model.language_model.*`; its own
`key_mapping` bridges the two. transformers only warns of tensors that are missing or left over: here they
are errors. It drops the dead K/V tensors of layers that share another layer's by a rule of its own.

Rows run one by one: without padding there is no padding mask that could be wrong, so a target that runs
them as one batch is judged against rows that cannot have touched each other. A row in one call runs
without a cache, one in steps with `DynamicCache`, as `generate` makes it.

FlexAttention is compiled. What was compiled for earlier passes changes how it is compiled: torch begins to
generalise over lengths once it has seen two. So each pass starts as in a fresh process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (  # type: ignore[import-not-found]
    AutoConfig,
    DynamicCache,
    Gemma4ForCausalLM,
)
from transformers.utils import logging  # type: ignore[import-not-found]

from conformance.worker.adapter import Json
from conformance.worker.adapters.recording import LOGITS, Recorder, spans

_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXPERTS = "eager"
"""The other implementations add up in another order, which depends on the machine."""


class CheckpointError(Exception):
    """A checkpoint's tensors do not fit the model."""


def forward(request: Json) -> Json:
    """Answer a `ForwardRequest`."""
    logging.disable_progress_bar()
    fresh_compiler(request["attention"])
    model = load(Path(request["checkpoint"]), request["dtype"], request["attention"] or "sdpa")
    rows = request["input_ids"]
    with Recorder(model.model, request["capture"], len(rows)) as recorder, torch.inference_mode():
        for number, row in enumerate(rows):
            _run_row(model, recorder, number, row, request["prefill"])
    recorder.save(Path(request["output"]))
    return {"path": request["output"], "order": recorder.order, "effective": effective(model)}


def load(folder: Path, dtype: str, attention: str) -> Any:
    """Load a text checkpoint.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    config = AutoConfig.from_pretrained(folder).get_text_config()
    model, report = Gemma4ForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=_DTYPES[dtype],
        attn_implementation=_ATTENTION[attention],
        experts_implementation=_EXPERTS,
        key_mapping={r"^model\.language_model\.": "model."},
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
    )
    wrong = {kind: sorted(map(str, found)) for kind, found in report.items() if found}
    if wrong:
        text = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in wrong.items())
        raise CheckpointError(f"{folder}: the tensors do not fit the configuration: {text}")
    return model.eval()


def _run_row(model: Any, recorder: Recorder, number: int, row: list[int], prefill: int | None) -> None:
    ids = torch.tensor([row])
    calls = list(spans(len(row), prefill))
    cache = DynamicCache(config=model.config) if len(calls) > 1 else None
    for start, stop in calls:
        recorder.call([number], [stop - start])
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=cache is not None)
        recorder.add(LOGITS, output.logits)


def fresh_compiler(attention: str | None) -> None:
    """Forget what was compiled, where the backend is one that is compiled."""
    if attention == "flex":
        torch._dynamo.reset()


def effective(model: Any) -> dict[str, str]:
    """What the model says it runs with."""
    config = model.model.config
    names = {theirs: ours for ours, theirs in _ATTENTION.items()}
    effective = {
        "attention": names.get(config._attn_implementation, str(config._attn_implementation)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if config.enable_moe_block:
        effective["experts"] = str(config._experts_implementation)
    return effective
