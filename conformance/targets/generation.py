"""Requests and answers of targets that generate; `conformance.targets.protocol` gives them on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conformance.targets.base import DType, Feature, KVDType, Model


class Speculation(Model):
    """A draft model that proposes tokens."""

    method: Literal["eagle3", "assistant"]
    """A head that reads the target's states, or an assistant that reads its keys and values (MTP)."""
    checkpoint: str
    """Folder of the draft model."""
    tokens: int = Field(default=3, ge=1)
    """Proposed at a time."""


class Sampling(Model):
    """How tokens are drawn: at a temperature, of the `top_k` likeliest, of which `top_p` is kept.

    Each answer is drawn by itself.
    """

    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)
    """None: no limit."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0


class EngineOptions(Model):
    """How an engine is to be set up. What really ran is in `GenerateResult.effective`.

    None always means the target's own choice.
    """

    dtype: DType = "float32"
    """Of weights and activations."""
    attention: str | None = None
    """Attention backend by the target's own name for it."""
    cache: str | None = None
    """Form of the key-value cache likewise."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    pipeline_split: tuple[int, ...] | None = None
    """Layers of each stage, of the first stage first."""
    expert_parallel: bool = False
    """Whole experts on each tensor-parallel rank, in place of a part of every expert."""
    speculation: Speculation | None = None
    prefill_chunk: int | None = Field(default=None, ge=1)
    """Most tokens of one step."""
    prefix_cache: bool | None = None
    """Keep blocks of prompts for others that begin alike."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens of a block of the cache."""
    kv_dtype: KVDType | None = None
    """In which keys and values are stored; None: in `dtype`."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Most answers under way at a time."""
    threads: int | None = Field(default=None, ge=1)
    """Of each rank."""
    max_model_len: int = Field(default=1024, ge=1)
    """Tokens of the longest sequence, prompt and answer."""

    @model_validator(mode="after")
    def _stages_are_split(self) -> EngineOptions:
        if self.pipeline_split is not None and len(self.pipeline_split) != self.pipeline_parallel:
            raise ValueError(
                f"pipeline_split has {len(self.pipeline_split)} stages, and pipeline_parallel is "
                f"{self.pipeline_parallel}"
            )
        return self

    @property
    def features(self) -> tuple[Feature, ...]:
        """What a target must be able to do to be set up like this."""
        asked: dict[Feature, bool] = {
            "tensor-parallel": self.tensor_parallel > 1,
            "pipeline-parallel": self.pipeline_parallel > 1,
            "pipeline-split": self.pipeline_split is not None,
            "expert-parallel": self.expert_parallel,
            "prefill-chunk": self.prefill_chunk is not None,
            "prefix-cache": self.prefix_cache is not None,
            "block-size": self.block_size is not None,
            "kv-dtype": self.kv_dtype is not None,
            "max-sequences": self.max_sequences is not None,
            "threads": self.threads is not None,
        }
        method: tuple[Feature, ...] = () if self.speculation is None else (self.speculation.method,)
        return (*(name for name, is_asked in asked.items() if is_asked), *method)

    @property
    def asked(self) -> dict[str, str]:
        """What `GenerateResult.effective` must say, as far as this leaves the target no choice."""
        asked = {
            "dtype": self.dtype,
            "tensor_parallel": str(self.tensor_parallel),
            "pipeline_parallel": str(self.pipeline_parallel),
            "speculation": self.speculation.method if self.speculation is not None else "none",
        }
        if self.expert_parallel:
            asked["expert_parallel"] = "on"
        if self.pipeline_split is not None:
            asked["pipeline_split"] = ",".join(map(str, self.pipeline_split))
        if self.prefix_cache is not None:
            asked["prefix_cache"] = "on" if self.prefix_cache else "off"
        chosen = ("attention", "cache", "prefill_chunk", "block_size", "kv_dtype", "max_sequences", "threads")
        for name in chosen:
            if (value := getattr(self, name)) is not None:
                asked[name] = str(value)
        return asked


class GenerateRequest(Model):
    """Prompts, all given to the engine at once, to the tokens that follow: greedy ones, or drawn ones."""

    checkpoint: str
    """Folder with `config.json` and `model.safetensors`, under the published names."""
    prompts: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """Token ids; none is empty."""
    images: tuple[tuple[str, ...], ...] = ()
    """Image files of each prompt, in order: the prompt holds one unexpanded `<|image|>` for each. Empty: no
    prompt has any."""
    sounds: tuple[tuple[str, ...], ...] = ()
    """Sound files of each prompt likewise, with one unexpanded `<|audio|>` for each."""
    adapter: str | None = None
    """Folder of a LoRA adapter in PEFT's form, for every prompt."""
    adapters: tuple[str | None, ...] = ()
    """The same for each prompt, None for a prompt without; empty: `adapter` says it. If all are None, the
    engine is set up for adapters all the same."""
    mixed: bool = False
    """Prompts with different adapters have to share a batch: a target that cannot do it for these raises.
    Otherwise it may answer them one after the other."""
    max_new_tokens: int = Field(ge=1)
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer; nothing else but `max_new_tokens` does."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Alternatives wanted at each position, besides the chosen token's own log-probability."""
    sampling: Sampling | None = None
    """None: greedy."""
    samples: int = Field(default=1, ge=1)
    """Answers to each prompt."""
    repeat: int = Field(default=1, ge=1)
    """How many times all prompts are asked, one time after the other in one engine, which forgets what it has
    cached before the first alone."""
    states: str = ""
    """Path of a safetensors file to write: `states`, float32 [prompts, layers, hidden size], what each layer
    of the text model gives for the last token of each prompt. Empty: none."""
    options: EngineOptions = EngineOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        if not all(self.prompts):
            raise ValueError("a prompt is empty")
        if self.samples > 1 and self.sampling is None:
            raise ValueError("several `samples` of a greedy answer are one")
        if self.adapters and self.adapter is not None:
            raise ValueError("`adapter` is for every prompt; name the same one in `adapters`")
        if self.adapters and len(self.adapters) != len(self.prompts):
            raise ValueError(f"adapters for {len(self.adapters)} prompts, and {len(self.prompts)} prompts")
        for kind, files in (("images", self.images), ("sounds", self.sounds)):
            if files and len(files) != len(self.prompts):
                raise ValueError(f"{kind} for {len(files)} prompts, and {len(self.prompts)} prompts")
        return self

    @property
    def adapter_of(self) -> tuple[str | None, ...]:
        """The adapter of each prompt."""
        return self.adapters or (self.adapter,) * len(self.prompts)

    @property
    def features(self) -> tuple[Feature, ...]:
        """What a target must be able to do to answer."""
        asked: dict[Feature, bool] = {
            "lora": self.adapter is not None or bool(self.adapters),
            "images": any(self.images),
            "sounds": any(self.sounds),
            "sampling": self.sampling is not None,
            "repeat": self.repeat > 1,
            "states": bool(self.states),
            "mixed-adapters": self.mixed,
        }
        return (*self.options.features, *(name for name, is_asked in asked.items() if is_asked))


class Generation(Model):
    """One answer."""

    token_ids: tuple[int, ...]
    """The stop token that ended it is the last one."""
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...]
    """Natural logarithm of each token's probability at temperature 1, nothing filtered."""
    top: tuple[dict[int, float], ...] = ()
    """The likeliest tokens at each position with their log-probabilities, as many as were asked for or one
    more; empty where none were."""
    accepted: tuple[int, ...] | None = None
    """Tokens of the draft that were accepted, in each round that had one; empty where none had. None where
    the target does not tell."""
    drafted: tuple[int, ...] = ()
    """Tokens that were drafted, in each of these rounds."""
    cached_tokens: int | None = None
    """Tokens of the prompt that were found in the prefix cache; None where the target does not tell."""


class Parts(Model):
    """Modules besides the language model: beginnings of the target's own names, without the dot behind."""

    connectors: tuple[str, ...] = ()
    """From what towers give to the language model's width."""
    towers: tuple[str, ...] = ()
    """What reads images and sounds."""


class GenerateResult(Model):
    """Answers, and what really ran."""

    generations: tuple[Generation, ...]
    """All `samples` of the first prompt, then those of the next; then the same of each repetition."""
    effective: dict[str, str] = Field(default_factory=dict)
    """Read back from the running engine: `attention`, `dtype`, `tensor_parallel`, `pipeline_parallel`,
    `speculation` (its method, or `none`), `adapter` (modules it is applied to, or `none`). Where the target
    has such options also `cache`, `pipeline_split` (`3,3`), `expert_parallel` and `prefix_cache` (`on`,
    `off`), `prefill_chunk`, `block_size`, `kv_dtype`, `max_sequences`, `threads`."""
    adapted: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By folder of each adapter that was asked for: the modules that it changes, by the target's own names
    for them, read back from the running engine. Parts of a fused module are numbered: `qkv_proj[1]`."""
    batches: int = Field(default=1, ge=1)
    """In how many batches prompts with different adapters were answered, one after the other."""
    parts: Parts | None = None
    """What the target takes to be there besides the language model, where adapters are asked for. None where
    it does not tell."""


class LoglikelihoodRequest(Model):
    """Pairs of token ids: how likely is the second to follow the first?"""

    checkpoint: str
    """As in `GenerateRequest`."""
    contexts: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """None is empty: a model says nothing of its first token."""
    continuations: tuple[tuple[int, ...], ...]
    """One for each context; none is empty."""
    options: EngineOptions = EngineOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> LoglikelihoodRequest:
        if len(self.contexts) != len(self.continuations):
            raise ValueError(f"{len(self.contexts)} contexts and {len(self.continuations)} continuations")
        if not all(self.contexts) or not all(self.continuations):
            raise ValueError("a context or a continuation is empty")
        return self


class Loglikelihood(Model):
    """Of one continuation."""

    logprob: float
    """Sum over its tokens of the natural logarithm of each one's probability at temperature 1."""
    greedy: bool
    """Each of its tokens is the likeliest at its place."""


class LoglikelihoodResult(Model):
    """One entry for each pair, and what really ran, as in `GenerateResult`."""

    likelihoods: tuple[Loglikelihood, ...]
    effective: dict[str, str] = Field(default_factory=dict)
