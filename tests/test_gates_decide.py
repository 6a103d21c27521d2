"""Two sheets to a decision: verdicts, what is left out, what is refused, and liars that would get through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from conformance.gates.decide import decide
from conformance.gates.pairing import ComparisonError
from conformance.gates.spec import PairedRule
from conformance.scoring import Sheet
from tests.gate_sheets import arms, changed, item, paired, sheet, unpaired


def judged(both: int, lost: int, gained: int, neither: int, gate: PairedRule | None = None) -> Any:
    return decide(gate or paired(), *arms(both, lost, gained, neither))


def test_equal_answers_pass() -> None:
    decision = judged(900, 0, 0, 100)
    assert (decision.verdict, decision.reasons, decision.changed) == ("pass", ("within-margin",), False)
    assert decision.score.share == decision.reference_score.share == 0.9
    assert decision.p_value == 1.0
    assert decision.drop_interval.low < 0 < decision.drop_interval.high < 0.02
    assert "pass: 90.0% of 1000 items are right, 90.0% of the reference's" in decision.sentence


def test_a_large_drop_fails_twice_over() -> None:
    decision = judged(820, 80, 0, 100)
    assert (decision.verdict, decision.reasons) == ("fail", ("drop", "alarm"))
    assert decision.drop == pytest.approx(0.08)
    assert decision.discordant == (80, 0)
    assert decision.lost[0] == "doc-820"


def test_a_sure_drop_above_the_floor_fails_by_the_alarm() -> None:
    decision = judged(888, 12, 2, 98)
    assert (decision.verdict, decision.reasons) == ("fail", ("alarm",))


def test_a_sure_drop_below_the_floor_passes_and_is_flagged() -> None:
    decision = judged(895, 5, 0, 100)
    assert (decision.verdict, decision.changed) == ("pass", True)
    assert decision.p_value < 0.05
    assert "there is a change, which is too small to matter" in decision.sentence


def test_between_is_inconclusive_and_never_a_pass() -> None:
    decision = judged(850, 40, 30, 80)
    assert (decision.verdict, decision.reasons) == ("inconclusive", ("between",))


def test_an_improvement_passes() -> None:
    decision = judged(850, 0, 50, 100)
    assert (decision.verdict, decision.changed) == ("pass", False)
    assert decision.drop == pytest.approx(-0.05)


def test_order_does_not_matter() -> None:
    reference, target = arms(888, 12, 2, 98)
    turned = target.model_copy(update={"items": tuple(reversed(target.items))})
    whole, other = decide(paired(), reference, target), decide(paired(), reference, turned)
    assert other == whole


# ---------------------------------------------------------------------------- what is left out


def _with_outcomes(target: Sheet, outcome: str, numbers: range, **fields: Any) -> Sheet:
    for number in numbers:
        target = changed(target, number, outcome=outcome, **fields)
    return target


def test_transport_errors_are_left_out_and_not_wrong() -> None:
    reference, target = arms(900, 0, 0, 100)
    target = _with_outcomes(target, "transport-error", range(10), extracted=None)
    decision = decide(paired(max_transport_errors=0.01), reference, target)
    assert decision.verdict == "pass"
    assert (decision.items, decision.excluded, decision.discordant) == (990, 10, (0, 0))
    assert decision.outcomes["transport-error"] == 10
    assert "10 items are left out" in decision.sentence


def test_answers_that_differ_are_told_though_no_score_does() -> None:
    """Other words, other outcomes, and the mark of the turn's end, which servers leave out."""
    reference, target = arms(900, 0, 0, 100)
    same = decide(paired(), reference, target)
    assert (same.texts_differ, same.outcomes_differ) == (0, 0)
    assert same.sentence.endswith("All answers are the same, word for word.")
    target = changed(target, 1, answer=target.items[1].answer + "\n<turn|>")
    target = changed(target, 2, answer="Let me see. 3")
    target = changed(target, 950, answer="what?", outcome="unparsable")
    decision = decide(paired(), reference, target)
    assert (decision.drop, decision.texts_differ, decision.outcomes_differ) == (0, 2, 1)
    assert decision.sentence.endswith("2 answers have other words, and 1 another outcome.")
    alone = decide(unpaired(), None, sheet([True] * 1319))
    assert (alone.texts_differ, alone.outcomes_differ) == (None, None)
    assert "other words" not in alone.sentence


def other_words(target: Sheet, numbers: Iterable[int]) -> Sheet:
    """The same answers, said otherwise."""
    for number in numbers:
        target = changed(target, number, answer=f"Let me see. {target.items[number].answer}")
    return target


def test_more_answers_in_other_words_than_declared_fail_though_all_are_right() -> None:
    reference, target = arms(1000, 0, 0, 0)
    for most, differing, verdict in (
        (None, 40, "pass"),
        (0.01, 10, "pass"),
        (0.01, 11, "fail"),
        (0.0, 1, "fail"),
    ):
        decision = decide(paired(max_texts_differ=most), reference, other_words(target, range(differing)))
        assert (decision.verdict, decision.texts_differ, decision.drop) == (verdict, differing, 0)
        assert decision.by_words_alone == (verdict == "fail")
    assert decision.reasons == ("texts",)
    assert "More answers than declared have other words" in decision.sentence


def test_other_words_stand_beside_a_drop_and_do_not_hide_it() -> None:
    decision = decide(paired(max_texts_differ=0.01), *arms(900, 50, 0, 50))
    assert (decision.verdict, decision.reasons) == ("fail", ("drop", "alarm", "texts"))
    assert not decision.by_words_alone


def test_other_words_fail_what_is_else_inconclusive_or_flagged() -> None:
    """A drop that passes and is flagged as changed, and one of which nothing is sure."""
    for table, verdict in (((895, 5, 0, 100), "pass"), ((850, 40, 30, 80), "inconclusive")):
        known = judged(*table)
        assert (known.verdict, known.changed) == (verdict, verdict == "pass")
        decision = judged(*table, paired(max_texts_differ=0.0))
        assert (decision.verdict, decision.reasons, decision.changed) == ("fail", ("texts",), False)


@pytest.mark.parametrize("dropped", [False, True])
def test_too_many_transport_errors_are_inconclusive(dropped: bool) -> None:
    """Whether they are told, or their items silently left away: what is gone may be what is wrong."""
    reference, target = arms(850, 50, 0, 100)
    if dropped:
        kept = [it for it in target.items if it.doc_id not in {f"doc-{n}" for n in range(850, 900)}]
        target = target.model_copy(update={"items": tuple(kept)})
    else:
        target = _with_outcomes(target, "transport-error", range(850, 900), extracted=None)
    decision = decide(paired(max_transport_errors=0.01), reference, target)
    assert (decision.verdict, decision.reasons) == ("inconclusive", ("transport-errors",))
    assert decision.missing == (50 if dropped else 0)
    assert decision.p_value is None
    assert decision.drop_interval is None


def test_a_lost_answer_of_the_reference_is_left_out_too() -> None:
    reference, target = arms(900, 0, 0, 100)
    reference = _with_outcomes(reference, "transport-error", range(3), extracted=None)
    assert decide(paired(), reference, target).verdict == "inconclusive"
    assert decide(paired(max_transport_errors=0.005), reference, target).excluded == 3


def test_refusing_items_fails() -> None:
    reference, target = arms(900, 0, 0, 100)
    target = _with_outcomes(target, "refused", range(5), extracted=None)
    assert decide(paired(), reference, target).reasons == ("refused",)
    assert decide(paired(max_refused=0.005), reference, target).verdict == "pass"


def test_answers_that_break_off_have_a_limit_of_their_own() -> None:
    reference, target = arms(900, 0, 0, 100)
    broken = _with_outcomes(target, "truncated", range(900, 930), finish_reason="length")
    assert decide(paired(max_truncated=0.03), reference, broken).verdict == "pass"
    decision = decide(paired(max_truncated=0.02), reference, broken)
    assert (decision.verdict, decision.reasons, decision.changed) == ("fail", ("truncated",), False)
    assert (decision.truncated.count, decision.truncated.of) == (30, 1000)


@pytest.mark.parametrize("outcome", ["unparsable", "truncated", "empty", "wrong"])
def test_everything_but_a_right_answer_counts_as_not_right(outcome: str) -> None:
    reference, target = arms(1000, 0, 0, 0)
    target = _with_outcomes(target, outcome, range(60), extracted=None)
    decision = decide(paired(), reference, target)
    assert decision.verdict == "fail"
    assert decision.outcomes[outcome] == 60
    assert len(decision.lost) == 60


# ---------------------------------------------------------------------------- what is refused


def refused(reference: Sheet, target: Sheet, gate: PairedRule | None = None) -> str:
    with pytest.raises(ComparisonError) as error:
        decide(gate or paired(items=10, margin=0.3), reference, target)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "products"),
        ("task_version", "2.0"),
        ("filter", "flexible-extract"),
        ("metric", "acc"),
        ("thinking", False),
        ("shots", 5),
        ("max_new_tokens", 65),
        ("seed", 1),
        ("order_seed", 1),
        ("template_sha256", "other"),
        ("checkpoint_sha256", "other"),
    ],
)
def test_other_methods_are_refused(field: str, value: Any) -> None:
    message = refused(*arms(9, 0, 0, 1, **{field: value}))
    assert f"{field} " in message
    assert repr(value) in message


def test_other_weights_can_be_allowed() -> None:
    sheets = arms(9, 0, 0, 1, checkpoint_sha256="quantised")
    assert decide(paired(items=10, margin=0.3, other_checkpoint=True), *sheets).items == 10


def test_a_server_need_not_know_its_files() -> None:
    sheets = arms(9, 0, 0, 1, checkpoint_sha256="", template_sha256="")
    assert decide(paired(items=10, margin=0.3), *sheets).items == 10


def test_other_prompts_are_refused() -> None:
    reference, target = arms(9, 0, 0, 1)
    message = refused(reference, changed(target, 4, prompt_hash="other"))
    assert "1 prompts differ" in message
    assert "doc-4" in message


def test_other_documents_are_refused() -> None:
    reference, target = arms(9, 0, 0, 1)
    assert "1 documents differ" in refused(reference, changed(target, 4, doc_hash="other"))


def test_items_that_the_reference_has_not_are_refused() -> None:
    reference, target = arms(9, 0, 0, 1)
    more = target.model_copy(update={"items": (*target.items, item(99))})
    assert "no answer to 1 items (doc-99)" in refused(reference, more)


def test_an_item_that_is_there_twice_is_refused() -> None:
    """Else the better one of two answers could be kept."""
    reference, target = arms(9, 0, 0, 1)
    twice = target.model_copy(update={"items": (*target.items, target.items[0])})
    assert "'doc-0' is there twice" in refused(reference, twice)


def test_best_of_several_is_refused() -> None:
    reference, target = arms(9, 0, 0, 1)
    assert "asked 3 times" in refused(reference, changed(target, 2, repeats=3))


def test_the_gate_says_how_many_items_there_are() -> None:
    assert "has 10 items and the gate declares 1000" in refused(*arms(9, 0, 0, 1), paired())


def test_an_empty_sheet_is_refused() -> None:
    reference, target = arms(9, 0, 0, 1)
    assert "no items" in refused(reference, target.model_copy(update={"items": ()}))


def test_sheets_must_fit_the_kind_of_gate() -> None:
    reference, target = arms(9, 0, 0, 1)
    with pytest.raises(ComparisonError, match="needs a reference"):
        decide(paired(items=10, margin=0.3), None, target)
    with pytest.raises(ComparisonError, match="takes none"):
        decide(unpaired(), reference, target)


# ---------------------------------------------------------------------------- stopping early


SEQUENTIAL = paired(stop_alpha=0.02)


def test_a_stopped_run_fails_without_a_p_value() -> None:
    reference, target = sheet([True] * 1000), sheet([False] * 12)
    decision = decide(SEQUENTIAL, reference, target)
    assert (decision.verdict, decision.reasons) == ("fail", ("stopped",))
    assert decision.stop is not None
    assert decision.stop.stopped_at == 8
    assert decision.stop.threshold == 50
    assert decision.p_value is None
    assert decision.drop_interval is None
    assert decision.missing == 988


def test_a_part_without_a_stop_says_nothing() -> None:
    """Nothing passes on a part of the items, however good it looks."""
    decision = decide(SEQUENTIAL, sheet([True] * 1000), sheet([True] * 900))
    assert decision.verdict == "inconclusive"
    assert decision.p_value is None


def test_a_part_that_was_chosen_is_refused() -> None:
    reference = sheet([True] * 1000)
    target = sheet([False] * 30)
    chosen = target.model_copy(update={"items": target.items[10:]})
    assert "not the reference's first ones" in refused(reference, chosen, SEQUENTIAL)


def test_a_stop_counts_though_the_run_went_on() -> None:
    """What would have been stopped has failed, whatever came after."""
    flags = [False] * 12 + [True] * 988
    decision = decide(SEQUENTIAL, sheet([True] * 12 + [False] * 50 + [True] * 938), sheet(flags))
    assert decision.drop < 0
    assert decision.verdict == "fail"


def test_a_whole_run_is_judged_with_what_is_left_of_alpha() -> None:
    decision = decide(SEQUENTIAL, *arms(900, 0, 0, 100))
    assert decision.verdict == "pass"
    assert decision.drop_interval is not None
    assert decision.drop_interval.level == pytest.approx(0.94)


# ---------------------------------------------------------------------------- clusters


def _subjects(lost_in: range) -> tuple[Sheet, Sheet]:
    """Ten subjects of 100 items; the target loses ten items of each of some."""
    clusters = [f"subject-{n // 100}" for n in range(1000)]
    right = [not (n // 100 in lost_in and n % 100 < 10) for n in range(1000)]
    return sheet([True] * 1000, clusters=clusters), sheet(right, clusters=clusters)


CLUSTERED = paired(clusters=10, design_effect=1.5)


def test_a_drop_in_one_subject_is_not_sure_for_others() -> None:
    one = decide(CLUSTERED, *_subjects(range(1)))
    assert one.clusters == 10
    assert one.design_effect is not None
    assert one.design_effect > 5
    assert one.test == "exact McNemar and clustered t"
    assert one.verdict == "inconclusive"
    assert one.drop_interval is not None
    independent = decide(paired(), *arms(990, 10, 0, 0))
    assert independent.verdict == "fail"
    assert independent.drop_interval is not None
    assert one.drop_interval.low < independent.drop_interval.low
    assert one.drop_interval.high > independent.drop_interval.high


def test_subjects_that_are_all_there_are_do_not_stand_for_others() -> None:
    """A subject that is wholly broken fails then, as exact McNemar has it."""
    one = decide(paired(clusters="all"), *_subjects(range(1)))
    independent = decide(paired(), *arms(990, 10, 0, 0))
    assert one.verdict == "fail"
    assert (one.clusters, one.design_effect, one.test) == (None, None, "exact McNemar")
    assert (one.p_value, one.drop_interval) == (independent.p_value, independent.drop_interval)


def test_clusters_are_declared_as_the_items_name_them() -> None:
    sheets = _subjects(range(1))
    assert "declare `clusters: 10` with a measured `design_effect`" in refused(*sheets, paired())
    assert "name 10 clusters and the gate declares 30" in refused(
        *sheets, paired(clusters=30, design_effect=1.5)
    )
    assert "name no clusters and the gate declares 10" in refused(*arms(900, 0, 0, 100), CLUSTERED)


def test_a_sequential_test_takes_no_clusters() -> None:
    """Ten losses in one subject would stop it, where a whole sheet is not sure."""
    sheets = _subjects(range(1))
    assert "declare `clusters: 10`" in refused(*sheets, SEQUENTIAL)
    whole = decide(paired(clusters="all", stop_alpha=0.02), *sheets)
    assert whole.reasons == ("stopped",)


def test_a_drop_in_all_subjects_fails() -> None:
    assert decide(CLUSTERED, *_subjects(range(10))).verdict == "fail"


def test_clusters_never_make_a_gate_surer() -> None:
    """Equal losses in every subject have no spread at all; the interval is still the independent one."""
    decision = decide(CLUSTERED, *_subjects(range(10)))
    alone = decide(paired(), *arms(900, 100, 0, 0))
    assert decision.drop_interval is not None
    assert alone.drop_interval is not None
    assert decision.drop_interval.low == pytest.approx(alone.drop_interval.low)


def test_half_named_clusters_are_refused() -> None:
    reference, target = arms(9, 0, 0, 1)
    assert "names no cluster" in refused(changed(reference, 0, cluster="sums"), target)


def test_one_cluster_is_refused() -> None:
    clusters = ["only"] * 10
    both = sheet([True] * 10, clusters=clusters), sheet([True] * 10, clusters=clusters)
    assert "all items are of the cluster 'only'" in refused(*both)


# ---------------------------------------------------------------------------- published figures


def test_unpaired_verdicts() -> None:
    verdicts = {
        right: decide(unpaired(), None, sheet([n < right for n in range(1319)])).verdict
        for right in (1240, 1200, 1150)
    }
    assert verdicts == {1240: "pass", 1200: "fail", 1150: "fail"}
    decision = decide(unpaired(), None, sheet([n < 1220 for n in range(1319)]))
    assert decision.verdict == "pass"
    assert (decision.kind, decision.test, decision.lost) == ("unpaired", "two proportions", ())
    assert decision.reference_score.share == pytest.approx(0.934, abs=5e-4)


def test_an_unpaired_sheet_must_be_whole() -> None:
    decision = decide(unpaired(), None, sheet([True] * 1300))
    assert (decision.verdict, decision.missing) == ("inconclusive", 19)
    with pytest.raises(ComparisonError, match="1400 items were asked"):
        decide(unpaired(), None, sheet([True] * 1400))


def test_clusters_widen_an_unpaired_interval() -> None:
    right = [(n // 132) % 5 != 0 for n in range(1319)]
    clusters = [str(n // 132) for n in range(1319)]
    gate = unpaired(score=0.8, margin=0.1)
    alone = decide(gate, None, sheet(right))
    clustered = decide(gate, None, sheet(right, clusters=clusters))
    assert alone.drop_interval is not None
    assert clustered.drop_interval is not None
    assert clustered.drop_interval.high > alone.drop_interval.high + 0.1
    assert clustered.verdict == "inconclusive"
