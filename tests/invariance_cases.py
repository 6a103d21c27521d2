"""Cases of invariance for tests, and what an engine makes of them."""

from __future__ import annotations

from typing import Any

from conformance.checks import CheckOutcome, judge
from conformance.invariance_suite import DrawnPrompts, InvarianceCase, InvarianceSuite, Way
from conformance.oracles import Oracles
from tests.lying_engines import Engine

LENGTHS = (3, 5, 8, 13)
CHUNKS = Way(prefill_chunk=7)


def case_of(**fields: Any) -> InvarianceCase:
    usual: dict[str, Any] = {
        "id": "one",
        "title": "A case of the tests.",
        "source": ("check 13",),
        "model": "dense",
        "prompts": DrawnPrompts(lengths=LENGTHS),
        "change": CHUNKS,
    }
    if "sampling" not in fields:
        usual["max_new_tokens"] = 12
    return InvarianceCase.model_validate(usual | fields)


def judged(target: Engine, oracles: Oracles, **fields: Any) -> CheckOutcome:
    oracles.forget()  # every engine of these tests has the same name
    case = case_of(**fields)
    return judge(case, suite_of(case), target, oracles=oracles)


def suite_of(case: InvarianceCase) -> InvarianceSuite:
    return InvarianceSuite(
        kind="invariance",
        id="tests/one",
        title="Tests",
        description="For tests.",
        area="tests",
        cases=(case,),
    )


def rules(outcome: CheckOutcome) -> list[str]:
    return [problem.rule for problem in outcome.problems]
