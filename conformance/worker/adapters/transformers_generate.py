"""Generation with Gemma 4 in Hugging Face transformers, by its own `generate`, and likelihoods.

* Prompts are batches, padded on the left as `generate` wants it. With media, those are together whose tensors
  can be: its towers take padded pieces of one size. Images and sounds are prepared as the checkpoint's
  `processor_config.json` says.
* Log-probabilities are taken from the scores that `generate` chooses by, before they are warped and thrown
  away. No processor of the checkpoint's `generation_config.json` changes them, because it is not used.
* Each repetition has a cache of its own: nothing is shared between requests, so that they must agree.
* Likelihoods are read from one pass without a cache.
* With an assistant, prompts run one by one, as its drafts are for one row. How many stayed is read from what
  `generate` streams, a round at a time. It takes no prefill in chunks then, whatever it is told.
* Adapters are PEFT's affair, which loads them into the model's modules. Prompts with different adapters run
  one group after the other, as most of its users let them. Where they have to share a batch, they do, if PEFT
  can: it takes several for linears and embeddings, and a row's adapter in a tower by the place of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor  # type: ignore[import-not-found]
from transformers.utils import logging  # type: ignore[import-not-found]

from conformance.worker.adapter import Json
from conformance.worker.adapters.transformers_model import (
    effective,
    fresh_compiler,
    load,
    load_assistant,
)

_PADDING = 0
"""Token in places that the attention mask hides, and behind the stop token of a row that has ended."""


_MOST_ROWS = 1000
"""Of one batch."""
_MOST_WITH_MEDIA = 64
"""Of one batch whose pieces all pass the towers together."""
_CACHES = {"DynamicCache": "dynamic", "StaticCache": "static"}
"""What classes of caches are called where they are asked for."""


class RequestError(Exception):
    """The request asks for what this adapter cannot do."""


def generate(request: Json) -> Json:
    """Answer a `GenerateRequest`."""
    model = _prepare(request)
    wanted = request["adapters"] or [request["adapter"]] * len(request["prompts"])
    threads = torch.get_num_threads()
    made: list[Json] = []
    modules: dict[str, list[str]] = {}
    batches = 1
    try:
        torch.set_num_threads(request["options"]["threads"] or threads)
        if request["states"]:
            _write_states(model, request)
        for _ in range(request["repeat"]):
            if request["mixed"] and len(set(wanted)) > 1:
                if model.conformance_assistant is not None:
                    raise RequestError("an assistant drafts for one row, and a batch of adapters has several")
                from conformance.worker.adapters.transformers_lora import Mixed

                mixed = Mixed(model, [folder for folder in dict.fromkeys(wanted) if folder is not None])
                modules, batches = mixed.modules, 1
                generations = dict(enumerate(_mixed_answers(model, mixed, request, wanted)))
                mixed.unload()
            else:
                modules, generations = _answers_in_turn(model, request, wanted)
                batches = len(set(wanted))
            made += [row for place in range(len(wanted)) for row in generations[place]]
        names = sorted({name for own in modules.values() for name in own})
        return {
            "generations": made,
            "effective": {**_effective(model, request["options"]), "adapter": ", ".join(names) or "none"},
            "adapted": modules,
            "batches": batches,
        }
    finally:
        torch.set_num_threads(threads)


def _answers_in_turn(
    model: Any, request: Json, wanted: Sequence[str | None]
) -> tuple[dict[str, list[str]], dict[int, list[Json]]]:
    """The modules of each adapter, and the answers by place: one adapter after the other."""
    modules: dict[str, list[str]] = {}
    generations: dict[int, list[Json]] = {}
    for folder in dict.fromkeys(wanted):
        places = [place for place, own in enumerate(wanted) if own == folder]
        with ExitStack() as stack:
            if folder is not None:
                from conformance.worker.adapters.transformers_lora import adapted

                modules[folder] = stack.enter_context(adapted(model, folder))
            generations |= dict(zip(places, _answers(model, request, places), strict=True))
    return modules, generations


def _mixed_answers(model: Any, mixed: Any, request: Json, wanted: Sequence[str | None]) -> list[list[Json]]:
    """All samples of all prompts, each with its adapter, in one batch.

    Raises:
        RequestError: they do not fit into one, or a piece of media cannot be told whose it is.
    """
    pieces = [
        sum(len(request[kind][place]) if request[kind] else 0 for kind in ("images", "sounds"))
        for place in range(len(wanted))
    ]
    if mixed.in_towers and set(pieces) != {1}:
        raise RequestError(
            "an adapter is for a tower or a connector, and PEFT tells whose a piece of media is by its "
            "place; give each prompt exactly one, or ask with one adapter at a time"
        )
    return _answers(
        model, request, range(len(wanted)), lambda rows: mixed.generate([wanted[row] for row in rows])
    )


def _answers(
    model: Any,
    request: Json,
    places: Sequence[int],
    generate: Callable[[Sequence[int]], Any] | None = None,
) -> list[list[Json]]:
    """All samples of some of the prompts.

    Args:
        model: It.
        request: As asked.
        places: Of the prompts.
        generate: For prompts that have to share a batch: what answers some of them, in the place of the
            model's own `generate`.

    Raises:
        RequestError: they have to, and their media do not.
    """
    if request["sampling"] is not None:
        torch.manual_seed(request["sampling"]["seed"])
    prompts = [request["prompts"][place] for place in places]
    media = [
        [request[kind][place] if request[kind] else [] for place in places] for kind in ("images", "sounds")
    ]
    if any(map(any, media)):
        rows = _with_media(model, request, prompts, *media)
    else:
        rows = [_Row(torch.tensor(prompt), {}) for prompt in prompts]
    _check_length(max(len(row.ids) for row in rows) + request["max_new_tokens"], request["options"])
    together: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        together.setdefault(row.form, []).extend([number] * request["samples"])
    if generate is not None and len(together) > 1:
        raise RequestError("prompts with media of different forms do not fit into one batch")
    made: list[list[Json]] = [[] for _ in rows]
    for form, numbers in together.items():
        most = _most_rows(request, with_media=bool(form))
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            run = model.generate if generate is None else generate(part)
            answers = _batch(model, run, request, *_stacked(model, [rows[number] for number in part]))
            for number, answer in zip(part, answers, strict=True):
                made[number].append(answer)
    return made


def _most_rows(request: Json, *, with_media: bool) -> int:
    """How many rows `generate` takes at a time."""
    if request["options"]["speculation"] is not None:
        return 1
    return _MOST_WITH_MEDIA if with_media else _MOST_ROWS


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
    return {"likelihoods": found, "effective": _effective(model, request["options"])}


def _prepare(request: Json) -> Any:
    """The model, set up as asked.

    Raises:
        RequestError: it cannot be.
    """
    options = request["options"]
    draft = options["speculation"]
    asked = {
        "tensor parallelism": options["tensor_parallel"] > 1,
        "pipeline parallelism": options["pipeline_parallel"] > 1,
        "expert parallelism": options["expert_parallel"],
        "speculative decoding by an Eagle3 head": draft is not None and draft["method"] == "eagle3",
        "a prefix cache": options["prefix_cache"] is not None,
        "blocks in its cache": options["block_size"] is not None,
        "a limit of sequences": options["max_sequences"] is not None,
    }
    if any(asked.values()):
        wanted = ", ".join(name for name, is_asked in asked.items() if is_asked)
        raise RequestError(f"the transformers adapter generates without {wanted}")
    logging.disable_progress_bar()
    attention = options["attention"] or "sdpa"
    fresh_compiler(attention)
    model = load(Path(request["checkpoint"]), options["dtype"], attention)
    model.generation_config = GenerationConfig()
    assistant = None
    if draft is not None:
        folder = Path(draft["checkpoint"])
        assistant = load_assistant(folder, options["dtype"], attention, tokens=draft["tokens"])
    # Beside the model's modules and not among them, where PEFT would adapt it too.
    vars(model)["conformance_assistant"] = assistant
    return model


def _check_length(longest: int, options: Json) -> None:
    if longest > options["max_model_len"]:
        limit = options["max_model_len"]
        raise RequestError(f"prompt and answer take up to {longest} tokens, max_model_len is {limit}")


def _effective(model: Any, options: Json) -> Json:
    """What ran. The chunk is an argument of `generate`, so that there is nothing to read it back from."""
    drafts = model.conformance_assistant is not None
    chunk = options["prefill_chunk"] if not drafts else None
    return {
        **effective(model),
        "threads": str(torch.get_num_threads()),
        **({"prefill_chunk": str(chunk)} if chunk is not None else {}),
        **({"cache": model.conformance_cache} if hasattr(model, "conformance_cache") else {}),
        "tensor_parallel": "1",
        "pipeline_parallel": "1",
        "speculation": "assistant" if drafts else "none",
        "adapter": "none",
    }


def _batch(
    model: Any, generate: Any, request: Json, ids: torch.Tensor, mask: torch.Tensor, media: Json
) -> list[Json]:
    """The answers to rows of one width, by a model's `generate`."""
    sampling, options = request["sampling"], request["options"]
    assistant = model.conformance_assistant
    chosen = _Chosen(request["top_logprobs"], greedy=sampling is None)
    warping: Json = {"do_sample": False}
    if sampling is not None:
        warping = {
            "do_sample": True,
            "temperature": sampling["temperature"],
            "top_k": sampling["top_k"] or 0,
            "top_p": sampling["top_p"],
        }
    with torch.inference_mode():
        output = generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                **warping,
                max_new_tokens=request["max_new_tokens"],
                eos_token_id=list(request["stop_ids"]) or None,
                pad_token_id=_PADDING,
                prefill_chunk_size=options["prefill_chunk"],
                cache_implementation=options["cache"],
                disable_compile=True,
                return_dict_in_generate=True,
            ),
            logits_processor=[chosen],
            **({"assistant_model": assistant, "streamer": chosen} if assistant is not None else {}),
            **media,
        )
    model.conformance_cache = _CACHES.get(type(output.past_key_values).__name__, "unknown")
    answers = output.sequences[:, ids.shape[1] :].tolist()
    stops = set(request["stop_ids"])
    return [chosen.generation(row, tokens, stops) for row, tokens in enumerate(answers)]


@dataclass(frozen=True)
class _Row:
    """A prompt as the model reads it."""

    ids: torch.Tensor
    """Token ids with a placeholder for each soft token, [tokens]."""
    media: dict[str, torch.Tensor]
    """What `generate` takes besides, [pieces, ...]; without pieces nothing."""

    @property
    def form(self) -> tuple[Any, ...]:
        """Equal for rows whose media fit into one tensor each."""
        return tuple((name, tensor.dtype, *tensor.shape[1:]) for name, tensor in sorted(self.media.items()))


def _with_media(
    model: Any,
    request: Json,
    prompts: Sequence[Sequence[int]],
    images: Sequence[list[str]],
    sounds: Sequence[list[str]],
) -> list[_Row]:
    from conformance.worker.adapters import transformers_media as media
    from conformance.worker.adapters.transformers_processor import checkpoint_processor, prepare

    processor = checkpoint_processor(Path(request["checkpoint"]))
    rows = []
    for prompt, *files in zip(prompts, images, sounds, strict=True):
        tensors = prepare(processor, *files)
        ids = _expanded(prompt, tensors, model.config)
        rows.append(_Row(ids, media.RowMedia(tensors, len(ids)).arguments(model)))
    return rows


def _expanded(prompt: Sequence[int], tensors: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """A prompt's ids with as many placeholders for each of its media as they are soft tokens.

    Raises:
        RequestError: it has more or fewer places than media.
    """
    from conformance.worker.adapters import transformers_media as media

    row: list[int] = []
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
    return torch.tensor(row)


def _stacked(model: Any, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor, Json]:
    """Token ids and attention mask, [rows, longest row], and what `generate` takes besides."""
    width = max(len(row.ids) for row in rows)
    ids = torch.stack([F.pad(row.ids, (width - len(row.ids), 0), value=_PADDING) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row.ids), (width - len(row.ids), 0)) for row in rows])
    names = rows[0].media
    if not names:
        return ids, mask, {}
    from conformance.worker.adapters import transformers_media as media

    types = torch.zeros_like(ids)
    for number, kind in enumerate(media.KINDS, 1):
        types[media.is_placeholder(ids, model.config, kind)] = number
    pieces = {name: torch.cat([row.media[name] for row in rows]) for name in names}
    return ids, mask, {"mm_token_type_ids": types, **pieces}


class _Chosen(LogitsProcessor):  # type: ignore[misc]  # transformers is not here when types are checked
    """Sees the scores of each step, leaves them as they are, and keeps what is asked of them.

    With an assistant it is the streamer as well: a round has scores behind each drafted token, and then says
    how many tokens it brought. Scores behind the others are dropped.
    """

    def __init__(self, alternatives: int, *, greedy: bool) -> None:
        self._alternatives = alternatives
        self._greedy = greedy
        self._best: list[list[int]] = []
        self._logprobs: list[torch.Tensor] = []
        self._top: list[list[dict[int, float]]] = []
        self._brought: int | None = None
        """Tokens of all rounds so far; None before the prompt has come."""
        self._rounds: list[tuple[int, int]] = []
        """How many tokens of each round that had a draft were drafted, and how many of them stayed."""

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, or the tokens of a round: those of the draft that stayed, and the target's own."""
        if self._brought is None:
            self._brought = 0
            return
        brought = tokens.numel()
        if drafted := len(self._best) - self._brought - 1:
            self._rounds.append((drafted, brought - 1))
        self._brought += brought
        for kept in (self._best, self._logprobs, self._top):
            del kept[self._brought :]

    def end(self) -> None:
        """Nothing more comes."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = scores.float().log_softmax(dim=-1)
        top = logprobs.topk(self._alternatives, dim=-1)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        self._best.append(scores.argmax(dim=-1).tolist())  # as greedy search chooses
        self._logprobs.append(logprobs)
        self._top.append([dict(zip(*row, strict=True)) for row in rows])
        return scores

    def generation(self, row: int, tokens: list[int], stops: set[int]) -> Json:
        """The `Generation` of a row, from the tokens that came, padding included."""
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        answer = tokens if end is None else tokens[: end + 1]
        if self._greedy and [best[row] for best in self._best[: len(answer)]] != answer:
            raise RuntimeError("the tokens are not those of the highest scores: this is no greedy search")
        steps = zip(self._logprobs, answer, strict=False)
        return {
            "token_ids": answer,
            "finish_reason": "length" if end is None else "stop",
            "logprobs": [float(logprobs[row, token]) for logprobs, token in steps],
            "top": [top[row] for top in self._top[: len(answer)]] if self._alternatives else [],
            "drafted": [drafted for drafted, _ in self._rounds],
            "accepted": None if self._brought is None else [stayed for _, stayed in self._rounds],
        }


def _write_states(model: Any, request: Json) -> None:
    """What each layer gives for the last token of each prompt, asked for alone."""
    text = getattr(model.model, "language_model", model.model)
    rows = []
    for number in range(len(request["prompts"])):
        seen: dict[int, torch.Tensor] = {}
        hooks = [layer.register_forward_hook(_keep(seen, k)) for k, layer in enumerate(text.layers)]
        try:
            _answers(model, {**request, "max_new_tokens": 1, "samples": 1}, [number])
        finally:
            for hook in hooks:
                hook.remove()
        rows.append(torch.stack([seen[k] for k in range(len(text.layers))]))
    save_file({"states": torch.stack(rows)}, request["states"])


def _keep(seen: dict[int, torch.Tensor], layer: int) -> Any:
    """A hook that keeps what a layer gives for the last token of the only row."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen[layer] = hidden[0, -1].float()

    return hook


__all__ = ["RequestError", "generate", "loglikelihood"]
