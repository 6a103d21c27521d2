"""What a cell of the matrix sets, how that is imposed on a case, and what becomes of what was not used.

Settings have the names of the fields of the cases that take them, so a kind takes what its cases have. Of a
case that compares two ways to ask, a cell sets the second one, and dtypes in both: they differ by right. A
case that sets one of the fields itself is left out of the matrix: it is there to be judged with its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from conformance.checks.base import CheckOutcome
from conformance.invariance_suite import Draft, InvarianceCase
from conformance.loading import LoadedCase, case_digest
from conformance.suitebase import Strict
from conformance.suites import Case, RandomAdapter, RandomDraft
from conformance.targets.protocol import DType, EngineOptions, Feature, KVDType, Speculation

_NOT_USED = frozenset(
    {"wrong-attention", "wrong-backend", "wrong-dtype", "wrong-tensor-parallel", "wrong-pipeline-parallel"}
    | {"wrong-expert-parallel", "wrong-kv-dtype", "wrong-speculation", "wrong-adapter"}
)
"""Rules by which checks compare what ran with what was asked for."""

_OF_BOTH = frozenset({"dtype", "kv_dtype"})
"""What a comparison has on both sides."""


class Settings(Strict):
    """What a cell sets; what is as usual is left to the case."""

    attention: str | None = None
    """Backend, by the target's own name for it."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    expert_parallel: bool = False
    """Whole experts on each tensor-parallel rank."""
    dtype: DType = "float32"
    kv_dtype: KVDType | None = None
    """In which keys and values are stored."""
    eagle3: RandomDraft | None = None
    assistant: Draft | None = None
    """A draft model that reads the keys and values of the case's own; only comparisons have one."""
    adapter: RandomAdapter | None = None

    @property
    def imposed(self) -> dict[str, Any]:
        """What is not as usual, as JSON."""
        values = self.model_dump(mode="json", include=set(Settings.model_fields))
        usual = Settings().model_dump(mode="json")
        return {name: value for name, value in values.items() if value != usual[name]}

    @property
    def features(self) -> tuple[Feature, ...]:
        """What a target must be able to do for it."""
        draft = None
        if self.eagle3 is not None or self.assistant is not None:
            method: Literal["eagle3", "assistant"] = "assistant" if self.eagle3 is None else "eagle3"
            draft = Speculation(method=method, checkpoint="")
        options = EngineOptions(
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            expert_parallel=self.expert_parallel,
            kv_dtype=self.kv_dtype,
            speculation=draft,
        )
        adapter: tuple[Feature, ...] = () if self.adapter is None else ("lora",)
        return (*options.features, *adapter)


def place(loaded: LoadedCase, settings: Settings, cell: str, matrix: Path | None = None) -> LoadedCase | str:
    """A case with the settings of a cell, under a digest of its own, or why it is not applicable.

    Args:
        loaded: As its suite has it.
        settings: The cell's.
        cell: Its id.
        matrix: The file that has the cell; None for the bundled one.
    """
    changed = _changed(loaded, settings)
    if isinstance(changed, str):
        return changed
    digest = case_digest(changed, loaded.suite.suite, loaded.suite.path.parent)
    return replace(loaded, case=changed, digest=digest, cell=cell, matrix=matrix)


def why_not(loaded: LoadedCase, settings: Settings) -> str:
    """Why settings are not applicable to a case; empty if they are."""
    changed = _changed(loaded, settings)
    return changed if isinstance(changed, str) else ""


def _changed(loaded: LoadedCase, settings: Settings) -> Case | str:
    case, kind = loaded.case, loaded.suite.suite.kind
    taking = (case.base, case.change) if isinstance(case, InvarianceCase) else (case,)
    known = Settings.model_fields.keys() & type(taking[0]).model_fields.keys()
    if not known:
        return f"not applicable: cases of kind `{kind}` take no settings"
    usual = Settings()
    own = [
        name
        for name in Settings.model_fields
        if name in known and any(getattr(each, name) != getattr(usual, name) for each in taking)
    ]
    if own:
        return f"not applicable: the case has its own `{own[0]}`"
    refused = [name for name in settings.imposed if name not in known]
    if refused:
        return f"not applicable: cases of kind `{kind}` take no `{refused[0]}`"
    # What is set and what is left out is not the same: `change` changes what it sets.
    values = case.model_dump(mode="json", exclude_unset=True)
    if isinstance(case, InvarianceCase):
        both = {name: value for name, value in settings.imposed.items() if name in _OF_BOTH}
        one = {name: value for name, value in settings.imposed.items() if name not in _OF_BOTH}
        values["base"] = values.get("base", {}) | both
        values["change"] |= one
    else:
        values |= settings.imposed
    try:
        return type(case).model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = f" take no such `{where}`" if where else ""
        return f"not applicable: cases of kind `{kind}`{what}: {first['msg'].removeprefix('Value error, ')}"


def settle(outcome: CheckOutcome) -> CheckOutcome:
    """In a cell, what was asked for and did not run is an `error`: the verdict is about another cell."""
    wrong = [problem for problem in outcome.problems if problem.rule in _NOT_USED]
    if outcome.verdict != "fail" or not wrong:
        return outcome
    return replace(outcome, verdict="error", reason="; ".join(problem.message for problem in wrong))
