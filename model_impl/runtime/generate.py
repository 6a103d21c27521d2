"""Generation: a ragged batch of prompts to tokens, one a step.

A row's tokens depend on its own prompt and seed only, never on the rows beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from model_impl.config import TextConfig
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import NO_BLOCK
from model_impl.runtime.sampling import GenerationError, Sampling
from model_impl.text import SoftTokens

FinishReason = Literal["stop", "length"]
Adapt = Callable[[Sequence[int]], AbstractContextManager[object]]

_GREEDY = Sampling.greedy()
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "bad_words_ids": (None,),
    "forced_eos_token_id": (None,),
}
"""Settings that change what is generated and that no published file has, with the values that do not."""
_DEFAULT_TOP_K = 50
"""Of transformers, where a file that samples says nothing."""


class Generating(Protocol):
    """What tokens are generated with: a text model, in this process or spread over several."""

    config: TextConfig

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        ...

    @property
    def device(self) -> torch.device:
        """Where token ids are wanted, and hidden states come from."""
        ...

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache of so many rows."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
        soft: SoftTokens | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary]."""
        ...


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint's `generation_config.json` says (fact sheet, section 1.6)."""

    stop_ids: frozenset[int]
    sampling: Sampling

    @classmethod
    def from_file(cls, path: Path) -> GenerationConfig:
        """Read a `generation_config.json`.

        Raises:
            GenerationError: it cannot be read, or as in `from_dict`.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GenerationError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise GenerationError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GenerationConfig:
        """Take over stop ids (`eos_token_id`, one or a list), suppressed ids, and how to sample.

        As in transformers, a file samples only if it sets `do_sample`; `top_k` 0 is no limit.

        Raises:
            GenerationError: a value has the wrong type or range, or a setting is not supported.
        """
        for key, values in _NEUTRAL.items():
            if raw.get(key) not in values:
                raise GenerationError(f"{key} is {raw[key]!r}; this implementation does not have it")
        suppress = _ids(raw, "suppress_tokens")
        sampling = Sampling.greedy(suppress)
        if raw.get("do_sample"):
            sampling = Sampling(
                temperature=_number(raw, "temperature", 1.0),
                top_k=int(_number(raw, "top_k", _DEFAULT_TOP_K)) or None,
                top_p=_number(raw, "top_p", 1.0),
                suppress=suppress,
            )
        return cls(stop_ids=frozenset(_ids(raw, "eos_token_id")), sampling=sampling)


@dataclass(frozen=True)
class Token:
    """One generated token."""

    row: int
    id: int
    logprob: float | None
    """Under the model's own distribution, before suppression, temperature, top-k and top-p; None unless
    asked for."""
    finish_reason: FinishReason | None
    """Why this is the row's last token; None if it is not."""
    top: dict[int, float] | None = None
    """The likeliest tokens, likeliest first, with their log-probabilities; None unless asked for."""


@dataclass(frozen=True)
class Generated:
    """All that was generated for one row."""

    ids: tuple[int, ...]
    """With the stop token, if there is one."""
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    """As `Token.logprob`, one for each id."""
    top: tuple[dict[int, float], ...] | None = None
    """As `Token.top`, one for each id."""


def generate(
    model: Generating,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = _GREEDY,
    seed: int | Sequence[int] = 0,
    logprobs: bool = False,
    top_logprobs: int = 0,
    prefill_chunk: int | None = None,
    soft: SoftTokens | None = None,
    adapt: Adapt | None = None,
) -> list[Generated]:
    """Generate for all rows, until each has met a stop token or the limit.

    Args:
        model: In any dtype, on any device.
        prompts: Token ids of each row; rows may differ in length.
        max_new_tokens: Most tokens of a row; 0 is allowed.
        stop_ids: Tokens that end a row.
        sampling: Greedy unless given.
        seed: One for the batch, from which `row_seeds` makes the rows' own, or one for each row.
        logprobs: Compute log-probabilities of the chosen tokens.
        top_logprobs: How many of the likeliest tokens to give with theirs at each position.
        prefill_chunk: Most prompt tokens in one pass, to bound memory; the result is the same up to
            rounding. All at once unless given. A pass ends later where it would tear an image.
        soft: What stands in the place of tokens of the prompts, padded on the right to the longest.
        adapt: Called with the rows of a pass; the pass is computed inside the context that it gives.

    Returns:
        One entry for each prompt, in their order.

    Raises:
        GenerationError: an argument is out of range or does not fit the model, or the logits are not finite.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    values: list[list[float]] = [[] for _ in prompts]
    tops: list[list[dict[int, float]]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length" for _ in prompts]
    for token in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        seed=seed,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        prefill_chunk=prefill_chunk,
        soft=soft,
        adapt=adapt,
    ):
        ids[token.row].append(token.id)
        if token.logprob is not None:
            values[token.row].append(token.logprob)
        if token.top is not None:
            tops[token.row].append(token.top)
        reasons[token.row] = token.finish_reason or reasons[token.row]
    return [
        Generated(tuple(row), reason, tuple(own) if logprobs else None, tuple(top) if top_logprobs else None)
        for row, reason, own, top in zip(ids, reasons, values, tops, strict=True)
    ]


def stream(
    model: Generating,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = _GREEDY,
    seed: int | Sequence[int] = 0,
    logprobs: bool = False,
    top_logprobs: int = 0,
    prefill_chunk: int | None = None,
    soft: SoftTokens | None = None,
    adapt: Adapt | None = None,
) -> Iterator[Token]:
    """As `generate`, token by token: in each step one for every unfinished row, by row.

    Arguments are judged when this is called, not when the first token is asked for.
    """
    check_options(model.config, sampling, max_new_tokens, top_logprobs)
    rows = []
    for index, prompt in enumerate(prompts):
        try:
            rows.append(checked_prompt(model.config, prompt, max_new_tokens))
        except GenerationError as error:
            raise GenerationError(f"row {index}: {error}") from error
    if prefill_chunk is not None and prefill_chunk < 1:
        raise GenerationError(f"prefill_chunk is {prefill_chunk}; it must be 1 or above, or None")
    seeds = row_seeds(seed, len(rows)) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(rows):
        raise GenerationError(f"there are {len(seeds)} seeds for {len(rows)} rows; give one for each row")
    if not rows or max_new_tokens == 0:
        return iter(())
    longest = max(map(len, rows))
    if soft is not None and soft.where.shape != (len(rows), longest):
        raise GenerationError(
            f"soft tokens for {list(soft.where.shape)} rows and columns do not fit {len(rows)} prompts of up "
            f"to {longest} tokens"
        )
    batch = _Batch(model, rows, sampling, seeds, logprobs, top_logprobs, soft, adapt)
    return _tokens(batch, max_new_tokens, frozenset(stop_ids), prefill_chunk)


def row_seeds(seed: int, rows: int) -> list[int]:
    """The seeds that the rows of a batch get from the batch's one.

    Row r alone, with the r-th of these as `seed=[...]`, has the tokens that it has in the batch.
    """
    digests = (hashlib.sha256(f"{seed}:{row}".encode()).digest() for row in range(rows))
    return [int.from_bytes(digest[:8], "little") for digest in digests]


def _tokens(batch: _Batch, limit: int, stop_ids: frozenset[int], chunk: int | None) -> Iterator[Token]:
    hidden = batch.prefill(chunk)
    live = list(range(len(batch.prompts)))
    for count in range(1, limit + 1):
        fed: list[list[int]] = [[] for _ in batch.prompts]
        for row, (token, logprob, top) in zip(live, batch.choose(hidden, live), strict=True):
            reason: FinishReason | None = "length" if count == limit else None
            if token in stop_ids:
                reason = "stop"
            if reason is None:
                fed[row] = [token]
            yield Token(row, token, logprob, reason, top)
        live = [row for row in live if fed[row]]
        if not live:
            return
        hidden = batch.feed(fed)


_Choice = tuple[int, float | None, dict[int, float] | None]
"""A token, its log-probability, and the likeliest tokens with theirs."""


class _Batch:
    """Rows under way: their cache and their sources of randomness."""

    def __init__(
        self,
        model: Generating,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        logprobs: bool,
        top_logprobs: int,
        soft: SoftTokens | None,
        adapt: Adapt | None,
    ) -> None:
        self.prompts = prompts
        self._model = model
        self._sampling = sampling
        self._random = [random.Random(seed) for seed in seeds]  # noqa: S311 - sampling, not a secret
        self._logprobs = logprobs
        self._top_logprobs = top_logprobs
        self._soft = soft
        self._adapt = adapt or (lambda _rows: nullcontext())
        self._device = model.device
        self._cache = model.new_cache(len(prompts))

    def prefill(self, chunk: int | None) -> Tensor:
        """Feed the prompts; hidden states of their last tokens, [B, H]."""
        cuts = self._cuts(chunk)
        last = self.feed([row[: cuts[1]] for row in self.prompts], self._columns(0, cuts[1]))
        for start, stop in itertools.pairwise(cuts[1:]):
            pieces = [row[start:stop] for row in self.prompts]
            fed = self.feed(pieces, self._columns(start, stop))
            goes_on = torch.tensor([bool(piece) for piece in pieces], device=self._device)
            last = torch.where(goes_on[:, None], fed, last)
        return last

    def _cuts(self, chunk: int | None) -> list[int]:
        """Columns at which the passes of a prefill begin, and where the last one ends."""
        longest = max(map(len, self.prompts))
        whole = [True] * (longest + 1)
        if self._soft is not None:
            blocks = self._soft.blocks
            torn = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] != NO_BLOCK)
            whole[1:longest] = (~torn.any(dim=0)).tolist()
        cuts = [0]
        while cuts[-1] < longest:
            cut = min(cuts[-1] + (chunk or longest), longest)
            cuts.append(next(at for at in range(cut, longest + 1) if whole[at]))
        return cuts

    def _columns(self, start: int, stop: int) -> SoftTokens | None:
        return None if self._soft is None else self._soft.columns(start, stop)

    @torch.inference_mode()
    def feed(self, pieces: Sequence[Sequence[int]], soft: SoftTokens | None = None) -> Tensor:
        """Feed new tokens to the rows; hidden states of the last ones, [B, H].

        What stands in a row that got none means nothing.
        """
        width = max(map(len, pieces))
        padding = self._model.config.pad_token_id
        ids = [[*piece, *[padding] * (width - len(piece))] for piece in pieces]
        counts = [len(piece) for piece in pieces]
        with self._adapt(range(len(pieces))):
            hidden = self._model(
                torch.tensor(ids, device=self._device), cache=self._cache, lengths=counts, soft=soft
            )
        last = torch.tensor([max(count - 1, 0) for count in counts], device=self._device)
        return hidden[torch.arange(len(pieces), device=self._device), last]

    @torch.inference_mode()
    def choose(self, hidden: Tensor, rows: Sequence[int]) -> list[_Choice]:
        """The next token of each of `rows`, from the states of all [B, H].

        The head, a model's largest matrix, sees only these rows and only their last tokens.
        """
        with self._adapt(rows):
            logits = self._model.logits(hidden[torch.tensor(rows, device=self._device)]).float()
        finite = logits.isfinite().all(dim=-1).tolist()
        if not all(finite):
            row = rows[finite.index(False)]
            raise GenerationError(
                f"row {row}: the logits after {self._cache.lengths[row]} tokens are not finite; "
                f"look for broken weights, or for overflow in {self._model.dtype}"
            )
        greedy = self._sampling.temperature == 0
        uniforms = [] if greedy else [self._random[row].random() for row in rows]
        tokens = self._sampling.choose(logits, uniforms)
        chosen: list[int] = tokens.tolist()
        if not (self._logprobs or self._top_logprobs):
            return [(token, None, None) for token in chosen]
        all_values = logits.log_softmax(dim=-1)
        values: list[float | None] = [None] * len(chosen)
        if self._logprobs:
            values = all_values.gather(1, tokens[:, None])[:, 0].tolist()
        tops: list[dict[int, float] | None] = [None] * len(chosen)
        if self._top_logprobs:
            best = all_values.topk(self._top_logprobs, dim=-1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops = [dict(zip(ids, own, strict=True)) for ids, own in pairs]
        return list(zip(chosen, values, tops, strict=True))


def check_options(
    config: TextConfig, sampling: Sampling, max_new_tokens: int, top_logprobs: int, *, least: int = 0
) -> None:
    """Refuse what a request asks for beside its prompt, if it does not fit the model.

    Args:
        config: The model's.
        sampling: How tokens are chosen.
        max_new_tokens: Most tokens that are generated.
        top_logprobs: How many of the likeliest tokens are given at each position.
        least: That `max_new_tokens` may be.

    Raises:
        GenerationError: a number is out of range, or `sampling` leaves no token.
    """
    sampling.check(config.vocab_size)
    if max_new_tokens < least:
        raise GenerationError(f"max_new_tokens is {max_new_tokens}; it must be {least} or above")
    if not 0 <= top_logprobs <= config.vocab_size:
        raise GenerationError(
            f"top_logprobs is {top_logprobs}; it must lie from 0 to {config.vocab_size}, the size of the "
            "vocabulary"
        )


def checked_prompt(config: TextConfig, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """A prompt as a list of ints, if it and as many new tokens fit the model.

    Raises:
        GenerationError: they do not.
    """
    try:
        row = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise GenerationError(f"a prompt is a sequence of token ids: {error}") from error
    if not row:
        raise GenerationError("the prompt is empty; begin with the token <bos>")
    foreign = [token for token in row if not 0 <= token < config.vocab_size]
    if foreign:
        raise GenerationError(f"token id {foreign[0]} is outside the vocabulary of {config.vocab_size}")
    if len(row) + max_new_tokens > config.max_position_embeddings:
        raise GenerationError(
            f"{len(row)} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_position_embeddings} positions"
        )
    return row


def _ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A setting that is one token id, a list of them, or absent."""
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise GenerationError(f"{key} is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    """A setting that is a number; the default if it is absent."""
    value = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or (type(default) is int and type(value) is not int):
        raise GenerationError(f"{key} is {value!r}; it must be of type {type(default).__name__}")
    return value if isinstance(value, int) else float(value)
