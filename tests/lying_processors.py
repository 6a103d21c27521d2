"""Targets that prepare media as the bundled implementation does, but for one lie."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.checks import CheckOutcome, judge
from conformance.oracles import Oracles
from conformance.suites import ProcessorCase, ProcessorSuite
from conformance.targets.protocol import Capability, PreprocessRequest, PreprocessResult, TargetInfo
from conformance.targets.reference import ReferenceTarget

ORACLE = "lying_targets:Oracle"
REFERENCE = ReferenceTarget()
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
Rewrite = Callable[[str], str]
Raise = Callable[[PreprocessRequest], None]


class Fake:
    """Its answer is changed when it is there."""

    def __init__(
        self,
        change: Change = lambda tensors: None,
        *,
        prompt: Rewrite = lambda prompt: prompt,
        fails: Raise = lambda request: None,
        spec: str = "fake",
        capabilities: tuple[Capability, ...] = ("preprocess",),
        unavailable: str = "",
    ) -> None:
        self.spec = spec
        self.change, self.prompt, self.fails = change, prompt, fails
        self.info = TargetInfo(
            name="fake",
            version="1",
            capabilities=capabilities,
            unavailable={"preprocess": unavailable} if unavailable else {},
        )
        self.requests: list[PreprocessRequest] = []

    def describe(self) -> TargetInfo:
        return self.info

    def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
        self.requests.append(request)
        self.fails(request)
        result = REFERENCE.preprocess(request)
        tensors = {name: tensor.clone() for name, tensor in load_file(result.path).items()}
        self.change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, result.path)
        return PreprocessResult(path=result.path, prompt=self.prompt(result.prompt))


class Patched:
    """Some of its functions are others while it answers."""

    spec = "fake"

    def __init__(self, *patches: tuple[object, str, Any]) -> None:
        self.patches = patches

    def describe(self) -> TargetInfo:
        return TargetInfo(name="fake", version="1", capabilities=("preprocess",))

    def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for owner, name, value in self.patches:
                patch.setattr(owner, name, value)
            return REFERENCE.preprocess(request)


TWO = [{"image": {"width": 64, "height": 48, "seed": seed}} for seed in (1, 2)]
CLIPS = [{"video": {"frames": frames, "width": 48, "height": 48, "fps": 1}} for frames in (2, 3)]
SOUNDS = [{"audio": {"samples": samples}} for samples in (1600, 700)]
ALL = [SOUNDS[0], TWO[0], CLIPS[0], TWO[1], SOUNDS[1]]
BAD = {"image": {"width": 200, "height": 100, "damage": "truncated"}}


class Setting:
    """An oracle and what it was asked."""

    def __init__(self) -> None:
        self.oracle = Fake(spec=ORACLE)
        self.oracles = Oracles(lambda spec: self.oracle)  # type: ignore[arg-type,return-value]

    def run(self, target: Fake, **changes: Any) -> CheckOutcome:
        case = processor_case(**changes)
        return judge(case, processor_suite(case), target, oracles=self.oracles)  # type: ignore[arg-type]


def processor_case(**changes: Any) -> ProcessorCase:
    values: dict[str, Any] = {
        "id": "demo",
        "title": "A case of this test.",
        "source": ["spec 3.1"],
        "pieces": TWO,
        "image_budget": 70,
        "sample_frames": False,
    }
    return ProcessorCase.model_validate(values | changes)


def processor_suite(case: ProcessorCase) -> ProcessorSuite:
    return ProcessorSuite(
        kind="processor",
        id="processor/demo",
        title="Demo",
        description="Made by a test.",
        area="demo",
        oracle=ORACLE,
        cases=(case,),
    )


def rules(outcome: CheckOutcome) -> list[str]:
    return [problem.rule for problem in outcome.problems]


def fails_at(*numbers: int, error: BaseException) -> Raise:
    counter = itertools.count()

    def fails(request: PreprocessRequest) -> None:
        if next(counter) in numbers:
            raise error

    return fails
