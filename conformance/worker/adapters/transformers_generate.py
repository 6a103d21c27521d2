"""Greedy generation with Gemma 4's text model in Hugging Face transformers: its own `generate`.

All prompts are one batch, padded on the left as `generate` wants it. Log-probabilities are taken from the
scores that greedy search chooses by, before they are thrown away; no processor of the checkpoint's
`generation_config.json` changes them, because it is not used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor  # type: ignore[import-not-found]
from transformers.utils import logging  # type: ignore[import-not-found]

from conformance.worker.adapter import Json
from conformance.worker.adapters.transformers_model import effective, fresh_compiler, load

_PADDING = 0
"""Token in places that the attention mask hides, and behind the stop token of a row that has ended."""


class RequestError(Exception):
    """The request asks for what this adapter cannot do."""


def generate(request: Json) -> Json:
    """Answer a `GenerateRequest`."""
    _check(request)
    logging.disable_progress_bar()
    options = request["options"]
    attention = options["attention"] or "sdpa"
    fresh_compiler(attention)
    model = load(Path(request["checkpoint"]), options["dtype"], attention)
    model.generation_config = GenerationConfig()
    ids, mask = _padded(request["prompts"])
    chosen = _Chosen(request["top_logprobs"])
    with torch.inference_mode():
        sequences = model.generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=request["max_new_tokens"],
                eos_token_id=list(request["stop_ids"]) or None,
                pad_token_id=_PADDING,
            ),
            logits_processor=[chosen],
        )
    answers = sequences[:, ids.shape[1] :].tolist()
    stops = set(request["stop_ids"])
    return {
        "generations": [chosen.generation(row, tokens, stops) for row, tokens in enumerate(answers)],
        "effective": {
            **effective(model),
            "tensor_parallel": "1",
            "pipeline_parallel": "1",
            "speculation": "none",
            "adapter": "none",
        },
    }


def _check(request: Json) -> None:
    options = request["options"]
    asked = {
        "tensor parallelism": options["tensor_parallel"] > 1,
        "pipeline parallelism": options["pipeline_parallel"] > 1,
        "speculative decoding": options["speculation"] is not None,
        "a LoRA adapter": request["adapter"] is not None,
        "images": any(request["images"]),
    }
    if any(asked.values()):
        wanted = ", ".join(name for name, is_asked in asked.items() if is_asked)
        raise RequestError(f"the transformers adapter generates without {wanted}")
    longest = max(map(len, request["prompts"])) + request["max_new_tokens"]
    if longest > options["max_model_len"]:
        limit = options["max_model_len"]
        raise RequestError(f"prompt and answer take up to {longest} tokens, max_model_len is {limit}")


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [prompts, longest prompt]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[_PADDING] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


class _Chosen(LogitsProcessor):  # type: ignore[misc]  # transformers is not here when types are checked
    """Sees the scores of each step, leaves them as they are, and keeps what is asked of them."""

    def __init__(self, alternatives: int) -> None:
        self._alternatives = alternatives
        self._steps: list[tuple[list[int], list[float], list[dict[int, float]]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = scores.float().log_softmax(dim=-1)
        best = scores.argmax(dim=-1)  # as greedy search chooses
        values = logprobs.gather(1, best[:, None])[:, 0]
        top = logprobs.topk(self._alternatives, dim=-1)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        self._steps.append((best.tolist(), values.tolist(), [dict(zip(*row, strict=True)) for row in rows]))
        return scores

    def generation(self, row: int, tokens: list[int], stops: set[int]) -> Json:
        """The `Generation` of a row, from the tokens that came, padding included."""
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        answer = tokens if end is None else tokens[: end + 1]
        steps = self._steps[: len(answer)]
        if [best[row] for best, _, _ in steps] != answer:
            raise RuntimeError("the tokens are not those of the highest scores: this is no greedy search")
        return {
            "token_ids": answer,
            "finish_reason": "length" if end is None else "stop",
            "logprobs": [values[row] for _, values, _ in steps],
            "top": [top[row] for _, _, top in steps] if self._alternatives else [],
        }


__all__ = ["RequestError", "generate"]
