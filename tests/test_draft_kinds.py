"""A draft model of another kind than was asked for is refused, with its name, and never run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from conformance.errors import EngineError
from conformance.invariance.prompting import checkpoint_of
from conformance.invariance_suite import Way
from conformance.oracles import Oracles
from conformance.targets.protocol import EngineOptions, GenerateRequest, Speculation
from conformance.targets.reference import ReferenceTarget
from tests.invariance_cases import case_of

Method = Literal["eagle3", "assistant"]


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("asked", "given", "words"),
    [
        ("eagle3", "assistant", "speculators_model_type"),
        ("assistant", "eagle3", "model_type"),
    ],
)
def test_a_draft_of_the_other_kind_is_refused(
    asked: Method, given: Method, words: str, oracles: Oracles
) -> None:
    checkpoint = checkpoint_of(case_of(), oracles)

    def request(method: Method, kind: Method) -> GenerateRequest:
        draft = oracles.speaking_draft(checkpoint, Way.model_validate({kind: {}}))
        speculation = Speculation(method=method, checkpoint=str(draft))
        return GenerateRequest(
            checkpoint=str(checkpoint),
            prompts=((3, 5, 8),),
            max_new_tokens=2,
            options=EngineOptions(speculation=speculation),
        )

    target = ReferenceTarget()
    assert target.generate(request(given, given)).effective["speculation"] == given
    with pytest.raises(EngineError, match=words):
        target.generate(request(asked, given))
