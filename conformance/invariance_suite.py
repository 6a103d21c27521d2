"""Suite files of kind `invariance`: pairs of configurations under which a request has the same output."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from conformance.invariance.models import HEADED, DrawnModel, TrainedModel
from conformance.media import PicturePrompt
from conformance.suitebase import CaseBase, CaseId, Strict, SuiteBase, Words
from conformance.targets.protocol import DType, EngineOptions, KVDType, Sampling, Speculation

DRAWS = 10_000
"""Answers from which a distribution is judged, unless a case says otherwise."""
SHIFT = 0.03
"""Of probability, that the control moves, unless a case says otherwise."""


class Draft(Strict):
    """A draft model for the case's model. A trained head is as it is: only `tokens` can be chosen."""

    guesses: bool = True
    """It knows which token follows which, as far as nothing but the last one counts; else its weights are
    random, and it is right by chance alone."""
    tokens: int = Field(default=3, ge=1)
    """Proposed at a time."""
    layers: tuple[int, ...] = (1, 2, 3)
    """Of an Eagle3 head: after how many of the model's layers the states are taken that it reads."""
    seed: int = 0


class Way(Strict):
    """How an engine is set up, and how it is given the prompts."""

    dtype: DType = "float32"
    attention: str | None = None
    """Attention backend, by the target's own name for it."""
    cache: str | None = None
    """Form of the key-value cache likewise."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    pipeline_split: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Layers of each stage."""
    expert_parallel: bool = False
    prefill_chunk: int | None = Field(default=None, ge=1)
    prefix_cache: bool | None = None
    block_size: int | None = Field(default=None, ge=1)
    kv_dtype: KVDType | None = None
    """In which keys and values are stored; absent: in `dtype`."""
    max_sequences: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    eagle3: Draft | None = None
    assistant: Draft | None = None
    given: Literal["together", "alone", "reversed", "twice"] = "together"
    """All prompts in one request; each in one of its own; all, last one first; all, each two times."""
    repeat: int = Field(default=1, ge=1, le=8)
    """How many times they are asked in one engine, which keeps its prefix cache."""

    @model_validator(mode="after")
    def _fits_together(self) -> Way:
        if self.eagle3 is not None and self.assistant is not None:
            raise ValueError("an engine has one draft model: `eagle3` or `assistant`")
        if self.pipeline_split is not None and len(self.pipeline_split) != self.pipeline_parallel:
            raise ValueError("`pipeline_split` needs as many numbers as `pipeline_parallel` says")
        return self

    @property
    def draft(self) -> Draft | None:
        """The draft model of either kind."""
        return self.eagle3 or self.assistant

    @property
    def rounded_to(self) -> DType:
        """How coarse the numbers are that two ways to compute the same may come to.

        Where keys and values are stored narrower than they are computed, the last place of a sum decides to
        which of two neighbours one is rounded. That counts as bfloat16, whichever narrower dtype it is.
        """
        return self.dtype if self.kv_dtype is None else "bfloat16"

    def options(self, draft: str | None = None) -> EngineOptions:
        """How the target is set up.

        Args:
            draft: Folder of the draft model, where there is one.
        """
        speculation = None
        if self.draft is not None:
            speculation = Speculation(
                method="eagle3" if self.eagle3 is not None else "assistant",
                checkpoint=draft or "",
                tokens=self.draft.tokens,
            )
        mine = {name for name in EngineOptions.model_fields if name in Way.model_fields}
        return EngineOptions(speculation=speculation, **{name: getattr(self, name) for name in mine})


class DrawnPrompts(Strict):
    """Seeded random prompts for a drawn model."""

    lengths: tuple[Annotated[int, Field(ge=1, le=512)], ...] = (3, 9, 16, 17, 31, 40)
    """In tokens. The models' window is 16."""
    shared: int = Field(default=0, ge=0, le=256)
    """All begin with the same tokens, so many of them."""
    carried: int = Field(default=0, ge=0, le=256)
    """Each begins with the last tokens of the one before it, so many of them."""
    stops: int = Field(default=0, ge=0, le=64)
    """So many of the 128 tokens, drawn too, end an answer."""
    seed: int = 0


class ScriptedPrompts(Strict):
    """Lines that the scripted checkpoint knows by heart."""

    lines: tuple[CaseId, ...] = ()
    pictures: tuple[PicturePrompt, ...] = ()
    asked: Literal["alone", "thinking", "tools", "system", "all"] = "alone"
    """What stands around the message."""

    @model_validator(mode="after")
    def _something(self) -> ScriptedPrompts:
        if not self.lines and not self.pictures:
            raise ValueError("name `lines` or `pictures` to ask for")
        return self


class ExamPrompts(Strict):
    """Questions of an examination that a trained model has not learned, as its accuracy gate asks them."""

    task: Literal["nano_gsm8k", "nano_mmmu", "nano_sounds"]
    items: int = Field(ge=1, le=500)
    """How many, in the gate's order."""


class Acceptance(Strict):
    """What is known of a draft that guesses."""

    at_least: float = Field(gt=1)
    """Tokens a round, the target's own one included, in the mean; its interval is told beside it."""
    by_place: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Of the tokens drafted at the first, second, ... place of a round: the least part that is accepted."""


class InvarianceCase(CaseBase):
    """Judge whether a change of configuration changes the output."""

    model: DrawnModel | Literal["scripted"] | TrainedModel
    """Drawn at random, the bundled scripted checkpoint, or a trained one."""
    weights: int = 1
    """Seed of a drawn model's weights."""
    prompts: DrawnPrompts | ScriptedPrompts | ExamPrompts = DrawnPrompts()
    base: Way = Way()
    """Of both sides, but for what is changed."""
    change: Way
    """What is another in the second."""
    max_new_tokens: int = Field(default=20, ge=1, le=200)
    sampling: Sampling | None = None
    """Answers are drawn, and it is their distribution that must not change. Needs a `top_k` of 2 to 8."""
    draws: int = Field(default=DRAWS, ge=1_000, le=100_000)
    """Of each prompt, where there is `sampling`."""
    shift: float = Field(default=SHIFT, ge=SHIFT, le=0.2)
    """Of probability, that the control moves from the likeliest token to the least likely, and the draws must
    notice. Fewer draws need a larger one."""
    or_refused: Words | None = None
    """The target may refuse the change, in words that hold this pattern: what it must not do is to give
    another answer, or to break."""
    finds: bool = False
    """The changed side must find tokens of prompts in its prefix cache."""
    acceptance: Acceptance | None = None
    """Of the changed side's draft."""
    factor: float = Field(default=10.0, ge=1)
    """How many times the noise floor two log-probabilities may be apart."""

    @property
    def changed(self) -> Way:
        """How the second side is set up.

        Raises:
            ValueError: what comes out contradicts itself.
        """
        values = {name: getattr(self.base, name) for name in Way.model_fields}
        values |= {name: getattr(self.change, name) for name in self.change.model_fields_set}
        return Way(**values)

    @model_validator(mode="after")
    def _fits_together(self) -> InvarianceCase:
        if self.changed == self.base:
            raise ValueError("`change` changes nothing")
        for name in ("dtype", "kv_dtype"):
            if getattr(self.changed, name) != getattr(self.base, name):
                raise ValueError(f"two dtypes differ by right; set `{name}` in `base`, for both sides")
        if (self.model == "scripted") != isinstance(self.prompts, ScriptedPrompts):
            raise ValueError("`lines` and `pictures` are for the scripted checkpoint, and for it alone")
        if (self.model in get_args(TrainedModel)) != isinstance(self.prompts, ExamPrompts):
            raise ValueError("`task` and `items` are for trained models, and for them alone")
        self._check_trained()
        self._check_drawn()
        if self.acceptance is not None and self.changed.draft is None:
            raise ValueError("`acceptance` is of a draft; change `eagle3` or `assistant`")
        if self.acceptance is not None and self.changed.draft is not None:
            drafted = self.changed.draft.tokens
            if len(self.acceptance.by_place) > drafted:
                raise ValueError(
                    f"`by_place` has {len(self.acceptance.by_place)} places, and {drafted} are drafted"
                )
        if self.finds and not self.changed.prefix_cache:
            raise ValueError("`finds` needs `prefix_cache: true` in `change`")
        return self

    def _check_trained(self) -> None:
        """Refuse what a trained model's own weights and head decide."""
        if self.model not in get_args(TrainedModel):
            return
        if "weights" in self.model_fields_set:
            raise ValueError("`weights` is the seed of a drawn model; leave it out")
        for way in (self.base, self.changed):
            if way.assistant is not None:
                raise ValueError("trained models have no `assistant`; use `eagle3`")
            if way.eagle3 is None:
                continue
            if self.model not in HEADED:
                if way.eagle3.guesses:
                    raise ValueError(
                        f"no head of {self.model} is trained; `guesses: false` takes one with random weights"
                    )
            elif ignored := way.eagle3.model_fields_set - {"tokens"}:
                names = ", ".join(f"`{name}`" for name in sorted(ignored))
                raise ValueError(f"a trained head has its own {names}; leave it out")

    def _check_drawn(self) -> None:
        """Refuse what would be ignored: with `sampling` what is of greedy answers, without it `draws`."""
        if self.sampling is None:
            for name in sorted({"draws", "shift"} & self.model_fields_set):
                raise ValueError(f"`{name}` is of what `sampling` draws; add that, or leave it out")
            return
        # What n draws can tell goes with the square root of n.
        if self.draws * self.shift**2 < DRAWS * SHIFT**2 * (1 - 1e-9):
            raise ValueError(
                f"{self.draws} draws do not tell a shift of {self.shift:g}; take more draws, or a `shift` of "
                f"{SHIFT * math.sqrt(DRAWS / self.draws):.3f}"
            )
        if self.sampling.top_k is None or not 2 <= self.sampling.top_k <= 8:
            raise ValueError("`sampling` needs a `top_k` of 2 to 8, so that all that can be drawn is known")
        ways = (self.base, self.changed)
        ignored = {
            "given": any(way.given != "together" for way in ways),
            "repeat": any(way.repeat > 1 for way in ways),
            "max_new_tokens": "max_new_tokens" in self.model_fields_set,
            "factor": "factor" in self.model_fields_set,
            "stops": isinstance(self.prompts, DrawnPrompts) and self.prompts.stops > 0,
        }
        if names := [name for name, is_asked in ignored.items() if is_asked]:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in names)} would be ignored where answers are drawn: they "
                "are asked for once, all together, and their first three tokens are judged; leave it out"
            )


class InvarianceSuite(SuiteBase):
    """Suite of kind `invariance`."""

    kind: Literal["invariance"]
    cases: tuple[InvarianceCase, ...] = Field(min_length=1)
