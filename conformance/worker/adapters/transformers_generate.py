"""Greedy generation with Gemma 4 in Hugging Face transformers, by its own `generate`, and likelihoods.

* Prompts without media are one batch, padded on the left as `generate` wants it. Where some have media, all
  run one by one. Images and sounds are prepared as the checkpoint's `processor_config.json` says.
* Log-probabilities are taken from the scores that greedy search chooses by, before they are thrown away. No
  processor of the checkpoint's `generation_config.json` changes them, because it is not used.
* Likelihoods are read from one pass without a cache.
* Adapters are PEFT's affair, which loads them into the model's modules. Prompts with different adapters run
  one group after the other: its batches of several adapters are for some kinds of modules only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
    model = _prepare(request)
    wanted = request["adapters"] or [request["adapter"]] * len(request["prompts"])
    generations: dict[int, Json] = {}
    modules: dict[str, list[str]] = {}
    for folder in dict.fromkeys(wanted):
        places = [place for place, own in enumerate(wanted) if own == folder]
        with ExitStack() as stack:
            if folder is not None:
                from conformance.worker.adapters.transformers_lora import adapted

                modules[folder] = stack.enter_context(adapted(model, folder))
            generations |= dict(zip(places, _answers(model, request, places), strict=True))
    names = sorted({name for own in modules.values() for name in own})
    return {
        "generations": [generations[place] for place in range(len(wanted))],
        "effective": {**_effective(model), "adapter": ", ".join(names) or "none"},
        "adapted": modules,
    }


def _answers(model: Any, request: Json, places: Sequence[int]) -> list[Json]:
    """The answers to some of the prompts: as one batch, or one by one where there are media."""
    prompts = [request["prompts"][place] for place in places]
    media = [
        [request[kind][place] if request[kind] else [] for place in places] for kind in ("images", "sounds")
    ]
    if any(map(any, media)):
        rows = [_with_media(model, request, ids, *files) for ids, *files in zip(prompts, *media, strict=True)]
        _check_length(max(len(ids) for ids, _ in rows) + request["max_new_tokens"], request["options"])
        return [
            _batch(model, request, ids[None], torch.ones_like(ids[None]), arguments)[0]
            for ids, arguments in rows
        ]
    _check_length(max(map(len, prompts)) + request["max_new_tokens"], request["options"])
    return _batch(model, request, *_padded(prompts), {})


def loglikelihood(request: Json) -> Json:
    """Answer a `LoglikelihoodRequest`."""
    model = _prepare(request)
    pairs = list(zip(request["contexts"], request["continuations"], strict=True))
    _check_length(max(len(context) + len(rest) for context, rest in pairs), request["options"])
    found = []
    for context, rest in pairs:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*context, *rest[:-1]]])).logits[0, len(context) - 1 :]
        values = logits.float().log_softmax(dim=-1)
        chosen = values.gather(1, torch.tensor(rest)[:, None])[:, 0]
        found.append(
            {"logprob": float(chosen.double().sum()), "greedy": values.argmax(dim=-1).tolist() == list(rest)}
        )
    return {"likelihoods": found, "effective": _effective(model)}


def _prepare(request: Json) -> Any:
    """The model, set up as asked.

    Raises:
        RequestError: it cannot be.
    """
    options = request["options"]
    asked = {
        "tensor parallelism": options["tensor_parallel"] > 1,
        "pipeline parallelism": options["pipeline_parallel"] > 1,
        "speculative decoding": options["speculation"] is not None,
    }
    if any(asked.values()):
        wanted = ", ".join(name for name, is_asked in asked.items() if is_asked)
        raise RequestError(f"the transformers adapter generates without {wanted}")
    logging.disable_progress_bar()
    attention = options["attention"] or "sdpa"
    fresh_compiler(attention)
    model = load(Path(request["checkpoint"]), options["dtype"], attention)
    model.generation_config = GenerationConfig()
    return model


def _check_length(longest: int, options: Json) -> None:
    if longest > options["max_model_len"]:
        limit = options["max_model_len"]
        raise RequestError(f"prompt and answer take up to {longest} tokens, max_model_len is {limit}")


def _effective(model: Any) -> Json:
    return {
        **effective(model),
        "tensor_parallel": "1",
        "pipeline_parallel": "1",
        "speculation": "none",
        "adapter": "none",
    }


def _batch(model: Any, request: Json, ids: torch.Tensor, mask: torch.Tensor, media: Json) -> list[Json]:
    """The answers to rows of one width."""
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
            **media,
        )
    answers = sequences[:, ids.shape[1] :].tolist()
    stops = set(request["stop_ids"])
    return [chosen.generation(row, tokens, stops) for row, tokens in enumerate(answers)]


def _with_media(
    model: Any, request: Json, prompt: list[int], images: list[str], sounds: list[str]
) -> tuple[torch.Tensor, Json]:
    """Token ids with a placeholder for each soft token, [tokens], and what `generate` takes besides."""
    from conformance.worker.adapters import transformers_media as media
    from conformance.worker.adapters.transformers_processor import prepare

    tensors = prepare(Path(request["checkpoint"]), images, sounds)
    row: list[int] = []
    config = model.config
    left = {kind: iter(media.soft_tokens(tensors, kind, config)) for kind in ("image", "audio")}
    around = {
        config.image_token_id: ("image", config.boi_token_id, config.eoi_token_id),
        config.audio_token_id: ("audio", config.boa_token_id, config.eoa_token_id),
    }
    for token in prompt:
        kind, begin, end = around.get(token, ("", 0, 0))
        if not kind:
            row.append(token)
            continue
        count = next(left[kind], None)
        if count is None:
            raise RequestError(f"a prompt has more placeholders of kind {kind!r} than media")
        row += [begin, *[token] * count, end]
    if any(next(counts, None) is not None for counts in left.values()):
        raise RequestError("a prompt has fewer placeholders than media")
    ids = torch.tensor(row)
    types = torch.zeros_like(ids)
    for number, kind in enumerate(media.KINDS, 1):
        types[media.is_placeholder(ids, config, kind)] = number
    return ids, {"mm_token_type_ids": types[None], **media.RowMedia(tensors, len(row)).arguments(model)}


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


__all__ = ["RequestError", "generate", "loglikelihood"]
