"""Targets of a matrix of tests: the bundled model, which says that it ran what was asked for, or does not."""

from __future__ import annotations

import os
import time
from pathlib import Path

from conformance.targets.protocol import Feature, GenerateRequest, GenerateResult, TargetInfo
from conformance.targets.reference import ReferenceTarget

LAYOUTS: tuple[Feature, ...] = ("tensor-parallel", "pipeline-parallel")


class Obedient(ReferenceTarget):
    """Claims every layout, and the backend that it was asked for."""

    spec = "matrix_targets:Obedient"
    features: tuple[Feature, ...] = LAYOUTS

    def describe(self) -> TargetInfo:
        return super().describe().model_copy(update={"features": self.features})

    def generate(self, request: GenerateRequest) -> GenerateResult:
        options = request.options
        plain = options.model_copy(update={"tensor_parallel": 1, "pipeline_parallel": 1, "attention": None})
        made = super().generate(request.model_copy(update={"options": plain}))
        layout = {name: str(getattr(options, name)) for name in ("tensor_parallel", "pipeline_parallel")}
        ran = {**made.effective, **layout, "attention": options.attention or "own"}
        return made.model_copy(update={"effective": ran})


class Deaf(Obedient):
    """Runs one stage whatever it is told."""

    spec = "matrix_targets:Deaf"

    def generate(self, request: GenerateRequest) -> GenerateResult:
        made = super().generate(request)
        return made.model_copy(update={"effective": made.effective | {"pipeline_parallel": "1"}})


class Single(Obedient):
    """Has no layouts, whatever a matrix says."""

    spec = "matrix_targets:Single"
    features = ()


class Dies(Obedient):
    """Takes its process with it."""

    spec = "matrix_targets:Dies"

    def generate(self, request: GenerateRequest) -> GenerateResult:
        del request
        os._exit(7)


class Hangs(Obedient):
    """Does not come back."""

    spec = "matrix_targets:Hangs"

    def generate(self, request: GenerateRequest) -> GenerateResult:
        time.sleep(600)
        raise AssertionError(request)


class Waits(Obedient):
    """Leaves its process id in `WAITS_FOR_ITS_END` and waits to be killed; once that is there, it answers."""

    spec = "matrix_targets:Waits"

    def generate(self, request: GenerateRequest) -> GenerateResult:
        flag = Path(os.environ["WAITS_FOR_ITS_END"])
        if not flag.exists():
            flag.with_suffix(".new").write_text(str(os.getpid()))
            flag.with_suffix(".new").rename(flag)
            time.sleep(600)
        return super().generate(request)
