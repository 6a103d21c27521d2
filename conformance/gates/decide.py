"""Sheets to a decision. The rule is in `rule`; here it gets what it judges, and the decision its words.

1. A pass takes the whole sheet. Where more items than declared are missing, lost or refused, no interval and
   no p-value is computed at all.
2. Answers that broke off have a limit of their own, and count as not correct besides. Answers in other words
   have one where the gate declares it, whatever the score.
3. A gate with `stop_alpha` also replays its sequential test, in the reference's order.
4. Dependent items (clusters) can only make a gate more careful: limits are the wider ones, and both tests
   must alarm. A paired gate has to declare them, since it was planned with them or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conformance.gates import pairing, statistics
from conformance.gates import rule as rules
from conformance.gates.decision import Decision, Interval, Limits, Rate, Reason, Stop
from conformance.gates.pairing import UNANSWERED, ComparisonError, Pairing
from conformance.gates.planning import points
from conformance.gates.sequential import SequentialTest
from conformance.gates.spec import PairedRule, Rule, UnpairedGate
from conformance.scoring import Item, Sheet

_LEVEL = 0.95
"""Of intervals that are shown beside scores and rates."""


def decide(spec: Rule, reference: Sheet | None, target: Sheet) -> Decision:
    """Judge a target's sheet.

    Args:
        spec: The gate.
        reference: The stored answers of a paired gate; None for an unpaired one.
        target: Scored answers.

    Raises:
        ComparisonError: the sheets are answers to different questions, or not to those of the gate.
    """
    if isinstance(spec, UnpairedGate) and reference is None:
        return _unpaired(spec, target)
    if isinstance(spec, PairedRule) and reference is not None:
        return _paired(spec, reference, target)
    raise ComparisonError("a paired gate needs a reference's sheet, and an unpaired gate takes none")


def _paired(spec: PairedRule, reference: Sheet, target: Sheet) -> Decision:
    if len(reference.items) != spec.items:
        raise ComparisonError(
            f"the reference has {len(reference.items)} items and the gate declares {spec.items}; make them "
            "equal"
        )
    found = pairing.pair(reference, target, other_checkpoint=spec.other_checkpoint)
    pairing.check_clusters(spec.clusters, reference)
    stop = _replayed(spec, found, reference.header.order_seed)
    pairs = found.pairs
    lost = tuple(p.target.doc_id for p in pairs if p.difference > 0)
    gained = tuple(p.target.doc_id for p in pairs if p.difference < 0)
    facts: dict[str, Any] = {
        "kind": "paired",
        "limits": _limits(spec),
        "items": len(pairs),
        "score": _score([p.target for p in pairs]),
        "reference_score": _score([p.reference for p in pairs]),
        "drop": (len(lost) - len(gained)) / len(pairs) if pairs else 0.0,
        "lost": lost,
        "gained": gained,
        "stop": stop,
        "texts_differ": found.texts_differ,
        "outcomes_differ": found.outcomes_differ,
        "outcomes": target.counts(),
        "reference_outcomes": reference.counts(),
        "missing": found.missing,
        "excluded": found.lost_on_the_way + found.refused,
        "truncated": _truncated([p.target for p in pairs]),
    }
    if stop is not None and stop.stopped_at is not None:
        return _worded(facts | {"verdict": "fail", "reasons": ("stopped",)})
    gone = _gone(spec, found.missing + found.lost_on_the_way, found.refused)
    if gone:
        return _worded(facts | gone)
    judged = _with_truncation(facts | _paired_judgement(spec, found, len(lost), len(gained)))
    return _worded(_with_other_words(judged))


def measured_clusters(reference: Sheet, target: Sheet) -> dict[str, Any]:
    """What a rule for two sheets has to declare of their clusters, as fields of it; nothing without clusters.

    Raises:
        ComparisonError: the sheets are answers to different questions.
    """
    found = pairing.pair(reference, target, other_checkpoint=True)
    named, clusters = pairing.clusters_of(reference.items), found.clusters
    if named is None or clusters is None:
        return {}
    widened = statistics.design_effect([p.difference for p in found.pairs], clusters)
    return {"clusters": len(set(named)), "design_effect": widened}


def _replayed(spec: PairedRule, found: Pairing, order_seed: int) -> Stop | None:
    """The sequential test over the pairs, in the reference's order.

    Raises:
        ComparisonError: the target's items are in another order, or not the first ones.
    """
    if spec.stop_alpha is None:
        return None
    if not found.begins:
        raise ComparisonError(
            "the items are not the reference's first ones in its order; a sequential test on items that were "
            "chosen otherwise says nothing"
        )
    test = SequentialTest(spec.stop_alpha, spec.floor)
    test.see_all(p.difference for p in found.pairs)
    return Stop(
        e_value=test.largest, threshold=test.threshold, stopped_at=test.stopped_at, order_seed=order_seed
    )


def _paired_judgement(spec: PairedRule, found: Pairing, lost: int, gained: int) -> dict[str, Any]:
    n, alpha = len(found.pairs), spec.final_alpha
    judged = rules.judge_pairs(spec, lost, gained, n)
    low, high = (float(limit) for limit in statistics.tango_limits(lost, gained, n, alpha))
    p_value = float(statistics.mcnemar_p(lost, gained, mid=spec.mid_p))
    method, test = "Tango", f"{'mid-p' if spec.mid_p else 'exact'} McNemar"
    clusters = found.clusters if isinstance(spec.clusters, int) else None
    widened = None
    if clusters is not None:
        differences = [p.difference for p in found.pairs]
        spread = statistics.clustered(differences, clusters)
        widened = statistics.design_effect(differences, clusters)
        clustered_low, clustered_high = spread.limits(alpha)
        low, high = min(low, clustered_low), max(high, clustered_high)
        p_value = max(p_value, spread.p_value())
        method, test = f"{method} and clusters", f"{test} and clustered t"
        judged = rules.verdicts(
            spec, (lost - gained) / n, low > spec.margin, high < spec.margin, p_value <= alpha
        )
    return {
        **_judgement(judged),
        "drop_interval": Interval(low=low, high=high, level=1 - 2 * alpha, method=method),
        "p_value": p_value,
        "test": test,
        "clusters": None if clusters is None else len(set(clusters)),
        "design_effect": widened,
    }


def _unpaired(spec: UnpairedGate, target: Sheet) -> Decision:
    pairing.check_items(target)
    if len(target.items) > spec.items:
        raise ComparisonError(f"{len(target.items)} items were asked and the gate declares {spec.items}")
    answered = [item for item in target.items if item.outcome not in UNANSWERED]
    refused = sum(item.outcome == "refused" for item in target.items)
    missing = spec.items - len(target.items)
    score = _score(answered)
    low, high = statistics.wilson_limits(spec.score * spec.of, spec.of, (1 - _LEVEL) / 2)
    facts: dict[str, Any] = {
        "kind": "unpaired",
        "limits": _limits(spec),
        "items": len(answered),
        "score": score,
        "reference_score": Rate(
            count=round(spec.score * spec.of),
            of=spec.of,
            interval=Interval(low=float(low), high=float(high), level=_LEVEL, method="Wilson"),
        ),
        "drop": spec.score - score.share,
        "outcomes": target.counts(),
        "missing": missing,
        "excluded": len(target.items) - len(answered),
        "truncated": _truncated(answered),
    }
    lost = missing + len(target.items) - len(answered) - refused
    gone = _gone(spec, lost, refused)
    return _worded(facts | gone if gone else _with_truncation(facts | _unpaired_judgement(spec, answered)))


def _unpaired_judgement(spec: UnpairedGate, answered: Sequence[Item]) -> dict[str, Any]:
    """As if there were fewer items, both here and there, by as much as clusters widen the variance."""
    right = [int(item.outcome == "correct") for item in answered]
    clusters = pairing.clusters_of(answered)
    widened = statistics.design_effect(right, clusters) if clusters is not None else 1.0
    counts = (spec.score * spec.of / widened, spec.of / widened, sum(right) / widened, len(right) / widened)
    low, high = statistics.shares_limits(*counts, spec.final_alpha)
    judged = rules.judge_shares(spec, *counts)
    return {
        **_judgement(judged),
        "drop_interval": Interval(
            low=float(low), high=float(high), level=1 - 2 * spec.final_alpha, method="Newcombe"
        ),
        "p_value": float(statistics.two_proportions_p(*counts)),
        "test": "two proportions",
        "clusters": None if clusters is None else len(set(clusters)),
        "design_effect": None if clusters is None else widened,
    }


def _judgement(judged: rules.Judged) -> dict[str, Any]:
    """Verdict and reasons of one table."""
    if judged.fails:
        reasons = [name for name, holds in (("drop", judged.beyond), ("alarm", judged.alarms)) if holds]
        return {"verdict": "fail", "reasons": tuple(reasons)}
    if judged.passes:
        return {"verdict": "pass", "reasons": ("within-margin",), "changed": bool(judged.alarms)}
    return {"verdict": "inconclusive", "reasons": ("between",)}


def _gone(spec: Rule, lost: int, refused: int) -> dict[str, Any] | None:
    """The verdict where too many items have no answer; None where they have."""
    if refused > spec.max_refused * spec.items:
        return {"verdict": "fail", "reasons": ("refused",)}
    if lost > spec.max_transport_errors * spec.items:
        return {"verdict": "inconclusive", "reasons": ("transport-errors",)}
    return None


def _with_truncation(facts: dict[str, Any]) -> dict[str, Any]:
    """Too many answers that broke off fail, whatever else is the case."""
    too_many = facts["truncated"].share > facts["limits"].max_truncated
    return _also_failing(facts, "truncated") if too_many else facts


def _with_other_words(facts: dict[str, Any]) -> dict[str, Any]:
    """Where the gate says how many answers may have other words, more fail, whatever else is the case."""
    most, items = facts["limits"].max_texts_differ, facts["items"]
    too_many = most is not None and items > 0 and facts["texts_differ"] / items > most
    return _also_failing(facts, "texts") if too_many else facts


def _also_failing(facts: dict[str, Any], reason: Reason) -> dict[str, Any]:
    kept: tuple[Reason, ...] = facts["reasons"] if facts["verdict"] == "fail" else ()
    return facts | {"verdict": "fail", "reasons": (*kept, reason), "changed": False}


def _score(items: Sequence[Item]) -> Rate:
    right, of = sum(item.outcome == "correct" for item in items), len(items)
    low, high = statistics.wilson_limits(right, of, (1 - _LEVEL) / 2) if of else (0.0, 1.0)
    return Rate(
        count=right, of=of, interval=Interval(low=float(low), high=float(high), level=_LEVEL, method="Wilson")
    )


def _truncated(items: Sequence[Item]) -> Rate:
    """Answers at the token limit, whether something right stands in them or not."""
    count, of = sum(item.finish_reason == "length" for item in items), len(items)
    low, high = statistics.clopper_pearson_limits(count, of, (1 - _LEVEL) / 2) if of else (0.0, 1.0)
    interval = Interval(low=float(low), high=float(high), level=_LEVEL, method="Clopper-Pearson")
    return Rate(count=count, of=of, interval=interval)


def _limits(spec: Rule) -> Limits:
    fields: dict[str, Any] = {name: getattr(spec, name, None) for name in Limits.model_fields}
    return Limits(**fields)


def _worded(facts: dict[str, Any]) -> Decision:
    return Decision(**facts, sentence=sentence(Decision(**facts, sentence="")))


WHY: dict[Reason, str] = {
    "drop": "even the lower limit of the drop is above the margin",
    "alarm": "the target is worse, by more than the floor",
    "stopped": "the sequential test stopped the run",
    "truncated": "too many answers broke off at the token limit",
    "refused": "the target refused too many items",
    "texts": "more answers than declared have other words than the reference's",
    "transport-errors": "too many items are missing or were lost on the way",
    "within-margin": "the upper limit of the drop is below the margin",
    "between": "the drop may be above the margin, or below",
}
"""What each reason means."""


def sentence(decision: Decision) -> str:
    """A decision in words."""
    reference = f"{decision.reference_score.share:.1%} of the reference's"
    words = [
        f"{decision.verdict}: {decision.score.share:.1%} of {decision.items} items are right, {reference};",
        f"the drop is {points(decision.drop)}",
    ]
    if decision.drop_interval is not None:
        interval = decision.drop_interval
        words.append(f"({interval.level:.0%} interval {100 * interval.low:.2f} to {100 * interval.high:.2f})")
    if decision.kind == "paired":
        words.append(f"with {len(decision.lost)} lost and {len(decision.gained)} gained")
    if decision.p_value is not None:
        words.append(f"(p = {decision.p_value:.2g}, {decision.test})")
    why = " and ".join(WHY[reason] for reason in decision.reasons)
    changed = "; there is a change, which is too small to matter" if decision.changed else ""
    left_out = decision.missing + decision.excluded
    rest = f"; {left_out} items are left out" if left_out else ""
    margin = f"(margin {points(decision.limits.margin)})"
    said = f"{' '.join(words)}. {why[0].upper()}{why[1:]} {margin}{changed}{rest}."
    return f"{said} {_differences(decision)}".strip()


def _differences(decision: Decision) -> str:
    """How far two targets give the same answers; one may have changed though no score has."""
    if decision.texts_differ is None or not decision.items:
        return ""
    if not decision.texts_differ:
        return "All answers are the same, word for word."
    return (
        f"{decision.texts_differ} answers have other words, and {decision.outcomes_differ} another outcome."
    )
