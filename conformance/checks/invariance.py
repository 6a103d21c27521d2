"""Judge pairs of configurations: the same request must have the same output under both.

1. What ran, as read back from the engine, must be what was asked for; else the case is an `error`.
2. The target is measured against itself. That is the noise below which nothing is judged; above its cap the
   case is an `error`.
3. The control: a copy of the model, of which one layer is 1 % off, must come out as another one; else the
   case is an `error`, because it would notice nothing.
4. Tokens, then log-probabilities, are compared by `conformance.invariance.pairs`. Answers that repeat one
   token do not count. Many near ties are `inconclusive`, and so is a case that asks for what the target does
   not tell: what its prefix cache found, what it accepted of drafts.
5. Drawn answers are compared with the distribution that they should have (`conformance.invariance.drawing`).
6. A failure names the first place and, where the target shows its states, the first layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.checks.base import CheckOutcome, no_refusal, refuses
from conformance.errors import EngineError
from conformance.invariance import acceptance, drawing, localising
from conformance.invariance.asking import Answers, Asker, Prompts
from conformance.invariance.noise import Noise, follow, measure
from conformance.invariance.pairs import Comparison, Difference, repeats
from conformance.invariance.prompting import checkpoint_of, prompts_of
from conformance.invariance_suite import Acceptance, ExamPrompts, InvarianceCase, Way
from conformance.oracles import Oracles
from conformance.results import Evidence, Problem
from conformance.targets.protocol import DType, Feature, Generation, Target, TargetInfo

PERTURBATION: dict[DType, float] = {"float32": 0.01, "bfloat16": 0.1}
"""Of the control. One part in a hundred is what bfloat16 itself rounds to, summed over some layers."""
TIED = 0.02
"""Part of the prompts that may end in near ties."""
_SHOWN = 3
"""Differences that are told one by one."""


def judge(case: InvarianceCase, target: Target, oracles: Oracles, *, seed: int = 0) -> CheckOutcome:
    """Ask in both ways, and compare.

    Args:
        case: The case.
        target: Who is asked.
        oracles: Make its model.
        seed: Added to that with which answers are drawn.

    Raises:
        EngineError: from the target, where it is set up as the baseline.
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    info = target.describe()
    reason = _cannot(case, target, info)
    if reason:
        return CheckOutcome("skip", reason=reason)
    if case.sampling is not None and seed:
        drawn = case.sampling.model_copy(update={"seed": case.sampling.seed + seed})
        case = case.model_copy(update={"sampling": drawn})
    pair = _Pair(case, target, oracles, info.features)
    return pair.drawn() if case.sampling is not None else pair.greedy()


def _cannot(case: InvarianceCase, target: Target, info: TargetInfo) -> str:
    """Why the target is not asked; empty if it is."""
    if "generate" not in info.capabilities:
        why = info.unavailable.get("generate")
        return f"{target.spec} has no capability `generate`{f': {why}' if why else ''}"
    asked: dict[Feature, bool] = {}
    for way in (case.base, case.changed):
        asked |= dict.fromkeys(way.options().features, True)
        asked |= {"repeat": asked.get("repeat", False) or way.repeat > 1}
        for option in ("attention", "cache"):
            name, known = getattr(way, option), info.choices.get(option, ())
            if name is not None and name not in known:
                return (
                    f"{target.spec} has no {option} {name!r}; it has {', '.join(known) or 'no choice of it'}"
                )
    asked["sampling"] = case.sampling is not None
    asked["images"] = bool(getattr(case.prompts, "pictures", ())) or _asks(case, "nano_mmmu")
    asked["sounds"] = _asks(case, "nano_sounds")
    lacking = [name for name, is_asked in asked.items() if is_asked and name not in info.features]
    return f"{target.spec} cannot generate with {', '.join(lacking)}" if lacking else ""


def _asks(case: InvarianceCase, task: str) -> bool:
    return isinstance(case.prompts, ExamPrompts) and case.prompts.task == task


@dataclass
class _Found:
    """What is told of a case besides its problems."""

    effective: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class _Pair:
    """A case on a target."""

    def __init__(
        self, case: InvarianceCase, target: Target, oracles: Oracles, features: tuple[Feature, ...]
    ) -> None:
        self.case = case
        self.features = features
        self.oracles = oracles
        self.asker = Asker(target, oracles, checkpoint_of(case, oracles))
        self.prompts = prompts_of(case, oracles)
        self.found = _Found()
        self.untold: list[str] = []
        """What the case asks for and the target does not tell."""

    # ------------------------------------------------------------------------------------- greedy answers

    def greedy(self) -> CheckOutcome:
        """Judge the likeliest tokens."""
        case = self.case
        base = self.asker.greedy(case.base, self.prompts, case.max_new_tokens)
        if base.wrong:
            return self._unasked(base)
        if reason := _untold(base.rounds[0]):
            return self._outcome("fail", [Problem(rule="alternatives", message=reason)])
        counted = [n for n, answer in enumerate(base.rounds[0]) if not repeats(answer.token_ids)]
        self.found.facts["prompts"] = len(self.prompts.ids)
        self.found.facts["repeating"] = len(self.prompts.ids) - len(counted)
        noise = self._noise()
        if noise.too_high:
            return self._outcome("error", reason=noise.too_high)
        if reason := self._uncontrolled(base, noise, counted):
            return self._outcome("error", reason=reason)
        try:
            found, answers = follow(
                self.asker, case.changed, self.prompts, case.max_new_tokens, base, noise.near, counted
            )
        except EngineError as error:
            return self._refused(error)
        self.found.effective = answers.effective
        if answers.wrong:
            return self._unasked(answers)
        return self._compared(base, answers, found, noise, counted)

    def _noise(self) -> Noise:
        case = self.case
        noise = measure(self.asker, case.base, self.prompts, case.max_new_tokens, self.features, case.changed)
        self.found.facts["noise"] = {name: _short(value) for name, value in noise.measured.items()}
        self.found.facts["noise_floor"] = _short(noise.floor)
        return noise

    def _uncontrolled(self, base: Answers, noise: Noise, counted: Sequence[int]) -> str:
        """Why the control says that this case would notice nothing; empty if it would."""
        part = PERTURBATION[self.case.base.rounded_to]
        folder = self.oracles.perturbed(self.asker.checkpoint, part)
        control = Asker(self.asker.target, self.oracles, folder, drafted_for=self.asker.checkpoint)
        way = self.case.base.model_copy(update={"repeat": 1})
        limit = self.case.max_new_tokens
        (found, *_), _ = follow(control, way, self.prompts, limit, base, noise.near, counted)
        self.found.facts["control"] = {
            "tokens": len(found.failures),
            "farthest": _short(found.farthest.value),
        }
        if not counted or found.failures or found.farthest.value > self.case.factor * noise.floor:
            return ""
        return (
            f"the control was not noticed: with one layer {part:.0%} off, log-probabilities are "
            f"{found.farthest.value:.3g} apart and no token differs"
        )

    def _compared(
        self,
        base: Answers,
        answers: Answers,
        found: Sequence[Comparison],
        noise: Noise,
        counted: Sequence[int],
    ) -> CheckOutcome:
        failures = [(turn, each) for turn, one in enumerate(found) for each in one.failures]
        tied = {prompt for one in found for prompt in one.tied}
        farthest = max((one.farthest for one in found), key=lambda distance: distance.value)
        self.found.facts |= {
            "near_ties": len(tied),
            "farthest": _short(farthest.value),
            "places": sum(one.places for one in found),
        }
        problems = [self._token_problem(base, turn, each, noise) for turn, each in failures[:_SHOWN]]
        if len(failures) > _SHOWN:
            problems.append(Problem(rule="tokens", message=f"{len(failures) - _SHOWN} more such differences"))
        problems += self._ending_problems(found)
        limit = self.case.factor * noise.floor
        if farthest.value > limit:
            place = f"place {farthest.place} of the answer to {self.prompts.names[farthest.prompt]}"
            layer = self._layer(base, farthest.prompt, farthest.place)
            problems.append(
                Problem(
                    rule="logprobs",
                    message=f"log-probabilities are up to {farthest.value:.3g} apart (limit {limit:.3g}), "
                    f"that of token {farthest.token} at {place}; {layer}",
                    got=_short(farthest.value),
                )
            )
        problems += self._cache_problems(answers)
        problems += self._acceptance_problems(answers)
        problems += self._round_problems(base, answers, tied)
        if problems:
            return self._outcome("fail", problems)
        if self.untold:
            return self._outcome("inconclusive", reason="; ".join(self.untold))
        if not counted:
            return self._outcome("inconclusive", reason="every answer repeats one token")
        if len(tied) > TIED * len(counted):
            return self._outcome(
                "inconclusive", reason=f"{len(tied)} of {len(counted)} prompts end in near ties"
            )
        return self._outcome("pass")

    def _token_problem(self, base: Answers, turn: int, each: Difference, noise: Noise) -> Problem:
        again = f" when asked for time {turn + 1}" if turn else ""
        got, expected = (
            "the end" if token is None else f"token {token}" for token in (each.got, each.expected)
        )
        message = (
            f"the answer to {self.prompts.names[each.prompt]} has {got} at place {each.place}{again}, "
            f"not {expected}"
        )
        if each.got is not None and each.expected is not None:
            message += (
                f", which is likelier than any other by {each.gap:.3g} (near ties are up to {noise.near:.3g})"
                f"; {self._layer(base, each.prompt, each.place)}"
            )
        return Problem(rule="tokens", message=message, expected=each.expected, got=each.got)

    def _ending_problems(self, found: Sequence[Comparison]) -> Iterator[Problem]:
        endings = [(turn, each) for turn, one in enumerate(found) for each in one.endings]
        for turn, each in endings[:_SHOWN]:
            again = f" when asked for time {turn + 1}" if turn else ""
            yield Problem(
                rule="ending",
                message=f"the answer to {self.prompts.names[each.prompt]} has ended{again} for the reason "
                f"{each.got!r} and not {each.expected!r}",
                expected=each.expected,
                got=each.got,
            )

    def _layer(self, base: Answers, number: int, place: int) -> str:
        if "states" not in self.features:
            return "this target does not show which layer"
        prompt = self.prompts.pick([number])
        prompt = prompt.followed_by([base.rounds[0][number].token_ids[:place]])
        return localising.first_layer(self.asker, self.case.base, self.case.changed, prompt)

    def _cache_problems(self, answers: Answers) -> Iterator[Problem]:
        if not self.case.finds:
            return
        counts = [made.cached_tokens for each in answers.rounds for made in each]
        told = [count for count in counts if count is not None]
        self.found.facts["cached_tokens"] = sum(told) if told else "not told"
        if any(told):
            return
        if len(told) == len(counts):
            yield Problem(rule="no-hits", message="no token of any prompt was found in the prefix cache")
        else:
            self._not_told("how many tokens of a prompt were found in the prefix cache", counts)

    def _acceptance_problems(self, answers: Answers) -> Iterator[Problem]:
        if self.case.changed.draft is None:
            return
        made = answers.rounds[0]
        rounds = acceptance.rounds(made)
        self.found.facts["rounds_with_a_draft"] = "not told" if rounds is None else rounds
        if rounds == 0:
            yield Problem(rule="no-drafts", message="no round of any answer had a draft", got=0)
            return
        length = acceptance.length(made)
        if length is not None:
            self.found.facts["tokens_a_round"] = _short(length.mean)
            self.found.facts["accepted_by_place"] = [_short(part) for part in length.by_place]
        if self.case.acceptance is None:
            return
        told = [each.accepted for each in made]
        limits = acceptance.interval(made)
        if None in told:
            self._not_told("what was accepted of drafts", told)
        elif length is None or limits is None:
            self.untold.append("a single answer had drafts, and no interval comes of one")
        else:
            yield from self._floor_problems(self.case.acceptance, length, limits)

    def _floor_problems(
        self, floor: Acceptance, length: acceptance.Length, limits: tuple[float, float]
    ) -> Iterator[Problem]:
        low, high = limits
        self.found.facts["tokens_a_round_interval"] = [_short(low), _short(high)]
        if length.mean < floor.at_least:
            yield Problem(
                rule="acceptance",
                message=f"a round brings {length.mean:.3g} tokens ({low:.3g} to {high:.3g} at 99 %), which "
                f"is below {floor.at_least:g}: the draft does not guess as it can",
                expected=floor.at_least,
                got=_short(length.mean),
            )
        parts = (*length.by_place, *(0.0 for _ in floor.by_place))
        for place, (least, part) in enumerate(zip(floor.by_place, parts, strict=False), start=1):
            if part < least:
                yield Problem(
                    rule="acceptance-by-place",
                    message=f"of the tokens drafted at place {place} of a round {part:.3g} were accepted, "
                    f"which is below {least:g}: what is drafted there is not what it should be",
                    expected=least,
                    got=_short(part),
                )
                return

    def _round_problems(self, base: Answers, answers: Answers, tied: Collection[int]) -> Iterator[Problem]:
        """The same draft for the same tokens guesses the same, whatever else has changed."""
        if self.case.base.draft is None or self.case.base.draft != self.case.changed.draft:
            return
        expected = [made.accepted for made in base.rounds[0]]
        told = [*expected, *(made.accepted for each in answers.rounds for made in each)]
        if None in told:
            self._not_told("what was accepted of drafts", told)
            return
        for turn, each in enumerate(answers.rounds):
            for number, (rounds, made) in enumerate(zip(expected, each, strict=True)):
                # Behind a near tie come other tokens, and so other rounds.
                if made.accepted != rounds and number not in tied:
                    again = f" when asked for time {turn + 1}" if turn else ""
                    yield Problem(
                        rule="rounds",
                        message=f"of the drafts for {self.prompts.names[number]}{again}, others were "
                        "accepted than before the change: the draft model has not read the same",
                        expected=list(rounds or ()),
                        got=list(made.accepted or ()),
                    )
                    return

    def _not_told(self, what: str, told: Sequence[object]) -> None:
        """Note what the case cannot be decided without."""
        reason = (
            f"{self.asker.target.spec} does not tell {what}, in {told.count(None)} of {len(told)} answers"
        )
        if reason not in self.untold:
            self.untold.append(reason)

    # -------------------------------------------------------------------------------------- drawn answers

    def drawn(self) -> CheckOutcome:
        """Judge the distribution of drawn answers."""
        case = self.case
        assert case.sampling is not None
        places = drawing.PLACES
        once = case.base.model_copy(update={"repeat": 1, "given": "together"})
        laws = drawing.law_of(self.asker, once, self.prompts, case.sampling, places)
        problems: list[Problem] = []
        self.found.facts |= {"draws": case.draws, "alpha": drawing.ALPHA}
        limit = places + 1  # so that what is tested comes in a round of several drafts
        sides: list[tuple[str, Answers]] = []
        for rule, way in (("base-distribution", case.base), ("distribution", case.changed)):
            try:
                answers = self.asker.drawn(way, self.prompts, case.sampling, limit, case.draws)
            except EngineError as error:
                if way == case.base:
                    raise
                return self._refused(error)
            self.found.effective = answers.effective
            if answers.wrong:
                return self._unasked(answers)
            sides.append((rule, answers))
        verdicts = [drawing.compare_draws(laws, answers.rounds, places) for _, answers in sides]
        alpha = drawing.alpha_of_each(verdicts)
        for (rule, answers), verdict in zip(sides, verdicts, strict=True):
            self.found.facts[rule] = [f"{fit.p_value:.2g}" for fit in verdict.fits]
            problems += self._distribution_problems(rule, verdict, alpha)
            moved = [drawing.shifted(law, case.shift) for law in laws]
            control = drawing.compare_draws(moved, answers.rounds, places)
            if not problems and not control.rejected(alpha):
                reason = (
                    "the control was not noticed: draws do not tell their own distribution from one in "
                    f"which the likeliest token has {case.shift:g} less"
                )
                return self._outcome("error", reason=reason)
        problems += self._cache_problems(answers)
        problems += self._acceptance_of_draws(answers)
        if self.untold and not problems:
            return self._outcome("inconclusive", reason="; ".join(self.untold))
        return self._outcome("fail" if problems else "pass", problems)

    def _acceptance_of_draws(self, answers: Answers) -> Iterator[Problem]:
        """By draw: what is drawn for one prompt is independent."""
        flat = tuple(made for each in answers.rounds for made in each)
        return self._acceptance_problems(Answers((flat,)))

    def _distribution_problems(self, rule: str, verdict: drawing.Verdict, alpha: float) -> Iterator[Problem]:
        for number, place, token in verdict.impossible[:_SHOWN]:
            yield Problem(
                rule=rule,
                message=f"token {token} was drawn at place {place} of the answer to "
                f"{self.prompts.names[number]}, and top_k and top_p leave it out",
                got=token,
            )
        for fit in verdict.rejected(alpha)[:_SHOWN]:
            yield Problem(
                rule=rule,
                message=f"what was drawn at place {fit.place} of the answers to "
                f"{self.prompts.names[fit.prompt]} is not distributed as the log-probabilities say: G "
                f"{fit.statistic:.4g} with {fit.freedom} degrees of freedom, p {fit.p_value:.2g}, below "
                f"{alpha:.2g}",
                got=f"{fit.p_value:.2g}",
            )

    # ---------------------------------------------------------------------------------------- what comes out

    def _refused(self, error: EngineError) -> CheckOutcome:
        self.found.facts["refused"] = str(error)
        wanted = self.case.or_refused
        if wanted is not None and refuses(error, wanted):
            return self._outcome("pass")
        message = f"generation raised {error}{no_refusal(error, wanted)}"
        return self._outcome(
            "fail", [Problem(rule="raised", message=message, expected=wanted, got=str(error))]
        )

    def _unasked(self, answers: Answers) -> CheckOutcome:
        self.found.effective = answers.effective
        names = ", ".join(problem.message for problem in answers.wrong)
        return self._outcome("error", answers.wrong, reason=f"another configuration ran: {names}")

    def _outcome(self, verdict: Any, problems: Sequence[Problem] = (), *, reason: str = "") -> CheckOutcome:
        return CheckOutcome(verdict, tuple(problems), _evidence(self.case, self.prompts, self.found), reason)


def _untold(answers: Sequence[Generation]) -> str:
    """Why nothing can be decided by the baseline's answers; empty if it can."""
    for number, answer in enumerate(answers):
        if len(answer.top) != len(answer.token_ids) or any(len(best) < 2 for best in answer.top):
            return (
                f"answer {number} of the baseline has {len(answer.token_ids)} tokens and alternatives to "
                f"{sum(len(best) > 1 for best in answer.top)} of them: a near tie could not be told"
            )
    return ""


def _short(value: float) -> float | str:
    return float(f"{value:.3g}") if math.isfinite(value) else "not a number"


def _evidence(case: InvarianceCase, prompts: Prompts, found: _Found) -> Evidence:
    asked: dict[str, Any] = {
        "model": case.model,
        "prompts": list(prompts.names),
        "max_new_tokens": case.max_new_tokens,
        "base": _told(case.base),
        "changed": _told(case.changed),
    }
    if case.sampling is not None:
        asked["sampling"] = case.sampling.model_dump(mode="json", exclude_defaults=True)
    return Evidence(
        input=json.dumps(asked, ensure_ascii=False, indent=2),
        got={"effective": found.effective, **found.facts} if found.effective or found.facts else None,
    )


def _told(way: Way) -> dict[str, Any]:
    return way.model_dump(mode="json", exclude_defaults=True)
