"""Suites of kind `accuracy`: an lm-eval task, a checkpoint, and the gate that the score has to pass."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from conformance.gates.spec import PairedGate, UnpairedGate
from conformance.suitebase import CaseBase, SuiteBase
from conformance.targets.protocol import DType, EngineOptions

CheckpointName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", max_length=120)
]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w-]{1,79}$")]


class AccuracyCase(CaseBase):
    """Judge how many items of a task a target answers right."""

    task: TaskName
    """As lm-eval or `conformance/tasks/` names it."""
    checkpoint: CheckpointName
    """One that comes with the harness (`nano-e`), or the name of a published one (`google/gemma-4-31B-it`),
    which is then looked for under the folder that `CONFORMANCE_CHECKPOINTS` names."""
    gate: Annotated[PairedGate | UnpairedGate, Field(discriminator="kind")]
    filter: str | None = None
    """lm-eval's filter that reads the answers; absent: the task's first."""
    thinking: bool = False
    shots: int | None = Field(default=None, ge=0)
    """Solved examples before each question; absent: as the task has it."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Absent: as the task says."""
    chat_template: bool = True
    """Questions are put in the checkpoint's chat template, examples as turns; else they are bare text."""
    seed: int = 0
    """Of the choice of solved examples."""
    order_seed: int = 0
    """Of the order in which items are drawn, which decides which ones are asked of a larger task."""
    dtype: DType = "float32"
    """Of weights and activations."""
    attention: str | None = None
    """By the target's own name for it; absent: its choice."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    max_model_len: int = Field(default=1024, ge=16)
    """Tokens of the longest prompt with its answer."""

    def options(self) -> EngineOptions:
        """How the target is set up."""
        return EngineOptions(
            dtype=self.dtype,
            attention=self.attention,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            max_model_len=self.max_model_len,
        )


class AccuracySuite(SuiteBase):
    """Suite of kind `accuracy`."""

    kind: Literal["accuracy"]
    cases: tuple[AccuracyCase, ...] = Field(min_length=1)
