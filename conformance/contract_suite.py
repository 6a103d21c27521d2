"""Suites of kind `contract`: what crosses between the stages of a pipeline."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from conformance.suitebase import CaseBase, CaseId, SuiteBase, Words
from conformance.targets.protocol import DType


class ContractCase(CaseBase):
    """Judge a pipeline against the same model in one process, and what its stages are handed."""

    config: CaseId
    """A key of the suite's `configs`."""
    pipeline: tuple[int, ...] = Field(min_length=2)
    """Layers of each stage."""
    rows: int = Field(default=2, ge=1, le=16)
    tokens: int = Field(default=12, ge=1, le=256)
    """Of each row; drawn by `seed`."""
    seed: int = 0
    """Of the token ids, and of the weights."""
    prefill: int | None = Field(default=None, ge=1)
    """Tokens of the first pass; every later one has one. Absent: one pass."""
    aux_layers: tuple[int, ...] = ()
    """After how many layers of the whole model the states are wanted that a draft reads."""
    dtype: DType = "float32"
    tolerance: float = Field(default=1e-5, gt=0)
    """How far a tensor may be from that of one process, relative to its largest element; in bfloat16 so too,
    as a pipeline computes nothing in another order."""
    refused: Words | None = None
    """The target must refuse the request, in words that hold this pattern."""
    may_refuse: Words | None = None
    """The target may refuse the split in such words, as engines do whose stages must hold both a layer and
    the one whose keys and values it reads."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> ContractCase:
        if self.refused is not None and self.may_refuse is not None:
            raise ValueError("`refused` and `may_refuse` are two cases")
        if self.prefill is not None and self.prefill >= self.tokens:
            raise ValueError(
                f"`prefill` {self.prefill} leaves none of the {self.tokens} tokens for later passes"
            )
        return self


class ContractSuite(SuiteBase):
    """Suite of kind `contract`."""

    kind: Literal["contract"]
    configs: dict[CaseId, dict[str, Any]] = Field(min_length=1)
    """With the keys of a published `text_config`."""
    cases: tuple[ContractCase, ...] = Field(min_length=1)
