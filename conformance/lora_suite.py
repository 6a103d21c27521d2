"""Cases and suites of kind `lora`: does an adapter act, where it should, with the right numbers?"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from conformance.invariance_suite import Way
from conformance.media import Piece, TextPiece, VideoPiece, what
from conformance.suitebase import CaseBase, CaseId, Strict, SuiteBase, Words

ExpertForm = Literal["stacked", "single"]
"""Matrices for all experts at once, or a pair for each expert."""
KeyForm = Literal["whole", "text", "class"]
"""Names as in a whole model (`model.language_model.layers.0…`), as in a text model (`model.layers.0…`), or as
in transformers' class of the encoder-free model, which renames some."""
Judged = Literal["mapping", "numbers", "liveness", "isolation", "refusal"]
Damage = Literal["half", "truncated", "rank", "shape", "unknown-module", "absent-layer", "no-prefix", "empty"]
"""What is done to an adapter: a `lora_B` missing, the file's second half missing, a rank that is not the
configuration's, a matrix for a wider module, a module that no Gemma 4 has, a layer beyond the last one, names
without `base_model.model.` (which may also be taken, if the adapter then acts), no tensors."""


class AdapterSpec(Strict):
    """A LoRA adapter with seeded random weights, none of them zero."""

    seed: int = 0
    modules: tuple[str, ...] = ()
    """Ends of the published names of modules, such as `self_attn.q_proj`, or `vision_tower` for all in it."""
    pattern: str = ""
    """Written as `target_modules` in place of a list; it has to match the same modules."""
    experts: ExpertForm | None = None
    """Also for the experts, in this form."""
    expert: int | None = Field(default=None, ge=0)
    """In the form `single`: for this expert alone."""
    save: tuple[str, ...] = ()
    """Ends of names of modules of which it holds whole copies (`modules_to_save`)."""
    rank: int = Field(default=4, ge=1)
    alpha: float = Field(default=12.0, gt=0)
    rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """By ends of names."""
    layers: tuple[int, ...] = ()
    """Layers of the text model alone (`layers_to_transform`); empty: all."""
    scale: float = Field(default=0.5, gt=0)
    """Of what it adds to each weight, relative to the weight's own norm."""
    keys: KeyForm | None = None
    """Form of its names; absent: that of the checkpoint's own model."""

    @model_validator(mode="after")
    def _for_something(self) -> AdapterSpec:
        if not (self.modules or self.experts or self.save):
            raise ValueError("an adapter needs `modules`, `experts` or `save`")
        if self.expert is not None and self.experts != "single":
            raise ValueError("`expert` needs `experts: single`")
        return self


class LoraCase(CaseBase):
    """Judge a target with adapters."""

    config: CaseId
    """A key of the suite's `configs`."""
    weights: int = 0
    """Seed of the checkpoint's weights."""
    judge: Judged
    """`mapping`: each module's own adapter stands in the right places of the engine. `numbers`: adapters give
    what the merged weights give. `liveness`: each module's own adapter changes the answers as the merged
    weight does, and one of zeros changes nothing. `isolation`: rows with different adapters, and with none,
    in one batch answer as they do alone. `refusal`: an adapter works, and the same one damaged is refused."""
    rows: tuple[tuple[Piece, ...], ...] = ((TextPiece(text=24),),)
    """Prompts. `numbers` and `isolation` give the adapters to them in turn."""
    seed: int = 0
    """Of the rows."""
    shared: int = Field(default=0, ge=0, le=256)
    """The texts that rows begin with have so many tokens in common."""
    way: Way = Way()
    """How the engine is set up beside the adapters: spread over ranks, with a draft model, with shared
    prefixes. The draft has none of the adapters."""
    or_refused: Words | None = None
    """The target may refuse to be set up so, in words that hold this pattern."""
    adapters: tuple[AdapterSpec, ...] = ()
    plain: bool = False
    """In `numbers`, rows without any adapter take their turn too; in `isolation` they always do."""
    probes: tuple[str, ...] = ()
    """For `mapping` and `liveness`: ends of names, or first parts, of the modules that are probed; empty: all
    linears and experts that have a place in the rows. Tables and the head are probed where they are named."""
    experts: ExpertForm = "stacked"
    """Form of the probes for experts; as `probes`, for `mapping` and `liveness`."""
    keys: KeyForm | None = None
    """Form of the probes' names; absent: that of the checkpoint's own model. As `probes`."""
    damage: Damage | None = None
    max_new_tokens: int = Field(default=3, ge=1)
    """Of each answer; `mapping` and `liveness` ask for one token."""
    tolerance: float = Field(default=2e-4, gt=0)
    """How far a log-probability may be from the merged weights'."""

    @model_validator(mode="after")
    def _fits_together(self) -> LoraCase:
        if not self.rows or not all(self.rows):
            raise ValueError("`rows` needs at least one row, and every row a piece")
        for piece in (piece for row in self.rows for piece in row):
            if isinstance(piece, VideoPiece) or (not isinstance(piece, TextPiece) and not what(piece).whole):
                raise ValueError("rows hold text, whole images and whole sounds")
        probing = self.judge in ("mapping", "liveness")
        if probing == bool(self.adapters):
            raise ValueError("`mapping` and `liveness` make their own adapters; the others need `adapters`")
        idle = {"max_new_tokens"} if probing else {"probes", "experts", "keys"}
        fields = type(self).model_fields
        in_vain = sorted(name for name in idle if getattr(self, name) != fields[name].default)
        if in_vain:
            raise ValueError(f"`{in_vain[0]}` does nothing for `{self.judge}`; leave it out")
        if (self.damage is not None) != (self.judge == "refusal"):
            raise ValueError("`damage` is for `refusal`, which needs it")
        if self.judge == "refusal" and (len(self.adapters) != 1 or len(self.rows) != 1):
            raise ValueError("`refusal` damages one adapter and asks one row")
        if self.way.given != "together":
            raise ValueError("the prompts of a case with adapters are given together")
        if self.way.repeat > 1 and self.judge not in ("numbers", "isolation"):
            raise ValueError("`repeat` is for `numbers` and `isolation`")
        if self.way.dtype != "float32":
            raise ValueError("the merged weights are computed in float32; leave `dtype` out")
        short = [row for row in self.rows if not _begins(row, self.shared)]
        if self.shared and short:
            raise ValueError(f"every row has to begin with a text of more than {self.shared} tokens")
        if self.plain and self.judge != "numbers":
            raise ValueError("`plain` is for `numbers`")
        if self.judge == "isolation" and (len(self.adapters) < 2 or len(self.rows) < 3):
            raise ValueError("`isolation` needs two adapters and three rows")
        return self


def _begins(row: tuple[Piece, ...], shared: int) -> bool:
    return isinstance(row[0], TextPiece) and row[0].text > shared


class LoraSuite(SuiteBase):
    """Suite of kind `lora`."""

    kind: Literal["lora"]
    configs: dict[CaseId, dict[str, Any]] = Field(min_length=1)
    """With the keys of a published `text_config`; for rows with media, of a published `config.json`, with the
    token ids of the scripted checkpoint's tokenizer, which the checkpoints come with."""
    cases: tuple[LoraCase, ...] = Field(min_length=1)
