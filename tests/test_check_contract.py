"""The kind `contract`: every rule has a target that breaks it, every fault is caught by its own rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance import resources
from conformance.checks import CheckOutcome, judge
from conformance.errors import EngineError, SuiteError
from conformance.faults import registry
from conformance.loading import LoadedSuite, load_suite, load_suites
from conformance.oracles import Oracles
from conformance.suites import ContractCase, ContractSuite
from conformance.targets.protocol import Target, TargetInfo
from conformance.targets.reference import ReferenceTarget
from conformance.targets.stages import StagesRequest, StagesResult
from tests.lying_stages import LIARS, Honest

SUITE = resources.suites_dir() / "contract" / "stages.yaml"
FAULTS = [fault for fault in registry().values() if fault.kind == "contract"]
CAUGHT_BY = {
    "residual-in-payload": ("dense-halves", {"residual"}),
    "residual-added-again": ("dense-halves", {"output"}),
    "per-layer-inputs-not-sent": ("e2b-before-the-sources", {"missing", "empty", "output"}),
    "per-layer-inputs-not-read": ("e2b-before-the-sources", {"output"}),
    "per-layer-inputs-from-the-first-layer": ("e2b-before-the-sources", {"shape", "empty", "output"}),
    "empty-payload-without-layers": ("e2b-before-the-sources", {"empty"}),
    "empty-payload-in-float32": ("dense-four-stages-bfloat16", {"empty"}),
    "payload-sent-in-float32": ("dense-four-stages-bfloat16", {"bytes"}),
    "states-by-index-within-stage": (
        "dense-states-of-all-stages",
        {"missing", "empty", "draft-count", "draft-states"},
    ),
    "states-left-behind": (
        "dense-states-of-all-stages",
        {"missing", "empty", "draft-count", "draft-states"},
    ),
    "one-state-bare": ("dense-one-state", {"draft-form"}),
    "shared-keys-not-sent": ("e2b-halves", {"missing", "empty", "output"}),
    "states-share-memory": ("dense-states-of-all-stages", {"draft-same", "draft-states"}),
}
"""A case that notices a fault, and the rules that it may break there; one of them at least."""


@pytest.fixture(scope="module")
def suite() -> LoadedSuite:
    (loaded,) = load_suites([SUITE])
    return loaded


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} is asked for"))
    yield made
    made.close()


def case_of(loaded: LoadedSuite, case_id: str) -> ContractCase:
    (case,) = (case for case in loaded.suite.cases if case.id == case_id)
    assert isinstance(case, ContractCase)
    return case


def judged(loaded: LoadedSuite, case: ContractCase, target: Any, oracles: Oracles) -> CheckOutcome:
    return judge(case, loaded.suite, target, oracles=oracles)


def test_the_bundled_stages_pass_and_no_file_is_left(suite: LoadedSuite, oracles: Oracles) -> None:
    target: Target = ReferenceTarget()
    for case in suite.suite.cases:
        assert isinstance(case, ContractCase)
        outcome = judged(suite, case, target, oracles)
        assert outcome.verdict == "pass", (case.id, outcome.problems)
        refused = outcome.evidence.got is not None
        assert refused == (case.refused is not None), "what may be refused is answered"
    assert not list(oracles.output().parent.glob("*.safetensors"))


def test_the_suite_has_what_it_promises(suite: LoadedSuite) -> None:
    cases = [case for case in suite.suite.cases if isinstance(case, ContractCase)]
    assert {case.config for case in cases} == {"e2b-like", "dense", "moe"}
    assert {len(case.pipeline) for case in cases} == {2, 3, 4}
    assert any(max(case.pipeline) - min(case.pipeline) > 1 for case in cases), "uneven"
    assert {len(case.aux_layers) for case in cases if case.refused is None} >= {0, 1, 3}
    assert sum(case.refused is not None for case in cases) >= 2


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
def test_a_lie_breaks_its_own_rule_and_no_other(
    liar: type[Honest], suite: LoadedSuite, oracles: Oracles
) -> None:
    found = set()
    for case_id in ("e2b-halves", "dense-states-of-all-stages", "dense-state-twice"):
        case = case_of(suite, case_id).model_copy(update={"may_refuse": None})
        outcome = judged(suite, case, liar(), oracles)
        found |= {problem.rule for problem in outcome.problems}
        assert outcome.verdict == ("fail" if outcome.problems else "pass")
    assert found == liar.rules


def test_an_honest_target_passes_and_one_that_cannot_is_skipped(suite: LoadedSuite, oracles: Oracles) -> None:
    case = case_of(suite, "e2b-halves")
    assert judged(suite, case, Honest(), oracles).verdict == "pass"

    class Cannot(Honest):
        def describe(self) -> TargetInfo:
            return TargetInfo(name="stages", version="1", capabilities=("forward",))

    outcome = judged(suite, case, Cannot(), oracles)
    assert (outcome.verdict, outcome.reason) == ("skip", "stages has no capability `stages`")


def test_a_split_may_be_refused_where_the_case_says_so(suite: LoadedSuite, oracles: Oracles) -> None:
    by_name = {liar.__name__: liar for liar in LIARS}
    may, must_not = case_of(suite, "e2b-halves"), case_of(suite, "e2b-before-the-sources")
    assert judged(suite, may, by_name["Refuses"](), oracles).verdict == "pass"
    assert judged(suite, must_not, by_name["Refuses"](), oracles).verdict == "fail"
    for name in ("Raises", "Exits"):
        outcome = judged(suite, may, by_name[name](), oracles)
        assert [problem.rule for problem in outcome.problems] == ["raised"], "a crash is no refusal"


def test_a_request_that_must_be_refused_must_be_so_by_name(suite: LoadedSuite, oracles: Oracles) -> None:
    class Breaks(Honest):
        def stages(self, request: StagesRequest) -> StagesResult:
            raise EngineError("KeyError: 7")

    outcome = judged(suite, case_of(suite, "dense-state-beyond"), Breaks(), oracles)
    assert [problem.rule for problem in outcome.problems] == ["raised"]
    assert "no refusal in words such as" in outcome.problems[0].message


def test_a_wrong_state_is_named_by_what_it_is(suite: LoadedSuite, oracles: Oracles) -> None:
    (swaps,) = (liar for liar in LIARS if liar.__name__ == "StatesSwapped")
    outcome = judged(suite, case_of(suite, "dense-states-of-all-stages"), swaps(), oracles)
    assert "the states after 1 layers" in outcome.problems[0].message
    assert "they are those after 3 layers" in outcome.problems[0].message


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_each_fault_is_caught_by_name(fault: Any, suite: LoadedSuite, oracles: Oracles) -> None:
    case_id, rules = CAUGHT_BY[fault.id]
    with fault.applied():
        outcome = judged(suite, case_of(suite, case_id), ReferenceTarget(), oracles)
    broken = {problem.rule for problem in outcome.problems}
    assert outcome.verdict == "fail"
    assert broken
    assert broken <= rules | {"stream"}
    assert broken - {"empty", "stream"} or rules == {"empty"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pipeline: [3, 3]", "pipeline: [3, 4]", "does not divide the configuration's 6 layers"),
        ("pipeline: [3, 3]", "pipeline: [6]", "at least 2"),
        ("config: dense\n", "config: none\n", "no configuration 'none' in this suite"),
        ("prefill: 10", "prefill: 14", "leaves none of the 14 tokens"),
        ("aux_layers: [2, 2]\n", "aux_layers: [2, 2]\n    may_refuse: shared\n", "are two cases"),
    ],
)
def test_a_bad_case_is_refused_with_its_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "contract" / "stages.yaml"
    path.parent.mkdir()
    path.write_text(SUITE.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SuiteError, match=message) as caught:
        load_suite(path)
    assert "stages.yaml:" in str(caught.value)


def test_what_is_expected_does_not_come_from_the_bundled_stages() -> None:
    source = Path(resources.__file__).parent / "checks" / "contract.py"
    assert "model_impl" not in source.read_text(encoding="utf-8")
    assert ContractSuite.model_fields["kind"]
