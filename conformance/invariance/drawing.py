"""Drawn answers: are they distributed as the target's own log-probabilities say?

1. What can be drawn at the first three places, and with which probability, follows from the log-probabilities
   that the target gives after each beginning: the rule of sampling is applied to them here.
2. A G-test for each prompt and place compares the draws with that, given what was drawn before; the
   statistics of all beginnings are summed, and so are their degrees of freedom. Cells that expect fewer
   than five draws are pooled. As G of a joint distribution is the sum of these, no place is tested twice.
3. A case tests all prompts and places of both its sides at one alpha of 0.001: each at its part of that
   (Bonferroni), so that a right target fails a case at most once in a thousand seeds. A token that cannot be
   drawn at all fails by itself.
4. The control: the same draws must be rejected where the likeliest token has less probability, by as much as
   the case says that it can tell.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conformance.invariance.asking import Asker, Ids, Prompts
from conformance.invariance_suite import Way
from conformance.targets.protocol import Generation, Sampling

PLACES = 3
ALPHA = 0.001
_FEWEST = 5
"""Draws that a cell must expect."""

Law = Mapping[Ids, Mapping[int, float]]
"""After each beginning, the probability of each token that can be drawn."""


@dataclass(frozen=True)
class Fit:
    """One G-test."""

    prompt: int
    place: int
    statistic: float
    freedom: int
    p_value: float


@dataclass(frozen=True)
class Verdict:
    """What the draws of one side say."""

    fits: tuple[Fit, ...]
    impossible: tuple[tuple[int, int, int], ...] = ()
    """Prompt, place and token of draws that have no probability."""

    def rejected(self, alpha: float) -> tuple[Fit, ...]:
        """Tests that fail, each at an alpha of its own."""
        return tuple(fit for fit in self.fits if fit.p_value < alpha)


def alpha_of_each(verdicts: Sequence[Verdict]) -> float:
    """The alpha of each test, where `verdicts` are of all sides of a case."""
    return ALPHA / max(1, sum(len(verdict.fits) for verdict in verdicts))


def law_of(asker: Asker, way: Way, prompts: Prompts, sampling: Sampling, places: int) -> list[Law]:
    """For each prompt, what the target's own log-probabilities say.

    Raises:
        EngineError, WorkerDiedError, TargetTimeoutError: from the target.
    """
    laws: list[dict[Ids, dict[int, float]]] = [{} for _ in prompts.ids]
    starts: list[tuple[int, Ids]] = [(number, ()) for number in range(len(prompts.ids))]
    for _ in range(places):
        asked = prompts.pick([number for number, _ in starts])
        asked = asked.followed_by([beginning for _, beginning in starts])
        answers = asker.greedy(way, asked, 1).rounds[0]
        for (number, beginning), answer in zip(starts, answers, strict=True):
            laws[number][beginning] = probabilities(answer.top[0], sampling)
        starts = [
            (number, (*beginning, token)) for number, beginning in starts for token in laws[number][beginning]
        ]
    return list(laws)


def probabilities(logprobs: Mapping[int, float], sampling: Sampling) -> dict[int, float]:
    """Of each token that can be drawn, the likeliest first.

    Args:
        logprobs: Of the likeliest tokens, more than `top_k` of them or all.
        sampling: With a `top_k`.
    """
    ranked = sorted(logprobs.items(), key=lambda item: -item[1])
    assert sampling.top_k is not None
    last = ranked[min(sampling.top_k, len(ranked)) - 1][1]
    kept = [(token, value) for token, value in ranked if value >= last]
    weights = [math.exp((value - kept[0][1]) / sampling.temperature) for _, value in kept]
    parts = [weight / math.fsum(weights) for weight in weights]
    # A token stays if those before it hold less than `top_p`; the likeliest always stays.
    before = [0.0, *itertools.accumulate(parts)][: len(parts)]
    nucleus = [part for part, held in zip(parts, before, strict=True) if held < sampling.top_p]
    total = math.fsum(nucleus)
    return {token: part / total for (token, _), part in zip(kept, nucleus, strict=False)}


def shifted(law: Law, shift: float) -> dict[Ids, dict[int, float]]:
    """The law of the control: so much probability goes from the likeliest token to the least likely."""
    changed = {}
    for beginning, parts in law.items():
        tokens = list(parts)
        moved = dict(parts)
        if len(tokens) > 1:
            step = min(shift, parts[tokens[0]] / 2)
            moved[tokens[0]] -= step
            moved[tokens[-1]] += step
        changed[beginning] = moved
    return changed


def compare_draws(laws: Sequence[Law], rounds: Sequence[Sequence[Generation]], places: int) -> Verdict:
    """Compare draws with what they should be.

    Args:
        laws: One for each prompt.
        rounds: Draws, each with one answer to each prompt.
        places: How many tokens of an answer are tested.
    """
    fits: list[Fit] = []
    impossible: list[tuple[int, int, int]] = []
    for number, law in enumerate(laws):
        answers = [each[number].token_ids for each in rounds]
        for place in range(places):
            drawn: dict[Ids, Counter[int]] = {}
            for answer in answers:
                if len(answer) > place and answer[:place] in law:
                    drawn.setdefault(answer[:place], Counter())[answer[place]] += 1
            for beginning, counts in drawn.items():
                impossible += [(number, place, token) for token in counts if token not in law[beginning]]
            fits += _fit(number, place, law, drawn)
    return Verdict(tuple(fits), tuple(dict.fromkeys(impossible)))


def _fit(number: int, place: int, law: Law, drawn: Mapping[Ids, Counter[int]]) -> list[Fit]:
    from scipy import stats  # it takes a while to import, and most suites have no statistics

    statistic, freedom = 0.0, 0
    for beginning, counts in drawn.items():
        parts = law[beginning]
        possible = {token: count for token, count in counts.items() if token in parts}
        total = sum(possible.values())
        cells = _pooled([(possible.get(token, 0), part * total) for token, part in parts.items()])
        if len(cells) < 2:
            continue
        observed, expected = zip(*cells, strict=True)
        statistic += float(stats.power_divergence(observed, expected, lambda_="log-likelihood").statistic)
        freedom += len(cells) - 1
    if not freedom:
        return []
    return [Fit(number, place, statistic, freedom, float(stats.chi2.sf(statistic, freedom)))]


def _pooled(cells: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Cells with what is too rare as one; that joins the rarest of the others where it is still too rare."""
    frequent = sorted((cell for cell in cells if cell[1] >= _FEWEST), key=lambda cell: -cell[1])
    rare = [cell for cell in cells if cell[1] < _FEWEST]
    if rare:
        pool = (sum(count for count, _ in rare), math.fsum(expected for _, expected in rare))
        if pool[1] < _FEWEST and frequent:
            last = frequent.pop()
            pool = (pool[0] + last[0], pool[1] + last[1])
        frequent.append(pool)
    return frequent
