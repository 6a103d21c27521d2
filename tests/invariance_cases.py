"""Cases of invariance for tests, and what an engine makes of them."""

from __future__ import annotations

from typing import Any

from conformance.checks import CheckOutcome, judge
from conformance.invariance_suite import DrawnPrompts, InvarianceCase, InvarianceSuite, Way
from conformance.oracles import Oracles
from tests.lying_engines import Asked, Change, Engine, Logits, raised

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


def chunked(asked: Asked) -> bool:
    return asked.options.prefill_chunk is not None


def at(length: int, place: int) -> Any:
    """Whether a token is the one at a place of the answer to the prompt of a length."""
    starts: dict[int, int] = {}

    def here(asked: Asked) -> bool:
        if asked.place == 0 and len(asked.context) == length:
            starts[asked.context[0]] = length
        return starts.get(asked.context[0]) == length and len(asked.context) == length + place

    return here


def other_token() -> Change:
    here = at(LENGTHS[2], 4)

    def change(asked: Asked, logits: Logits) -> Logits:
        return raised(logits, logits.index(min(logits)), 0.5) if here(asked) and chunked(asked) else logits

    return change


def tie(length: int, place: int, gap: float = 1e-6) -> Change:
    """Two tokens that are equally likely but for rounding, which falls the other way in chunks."""
    here = at(length, place)

    def change(asked: Asked, logits: Logits) -> Logits:
        if not here(asked):
            return logits
        first, second = (7, 8) if not chunked(asked) else (8, 7)
        return raised(raised(logits, second, 1.0), first, gap)

    return change
