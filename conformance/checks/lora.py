"""Judge what a target makes of LoRA adapters.

What an adapter has to do is known from the draw that it was written from: the bundled model computes it with
other weights, and reads no adapter. Log-probabilities of the target's own tokens are compared with that.

Rules:
  no-effect      an adapter changes nothing
  numbers        an adapter changes the numbers, and not as the merged weights do
  zeroed         an adapter of zeros changes the numbers, if only by a bit
  mapping        an adapter stands in other places of the engine than the table says
  parts          the engine takes the model to have towers or connectors that it has not, or to lack its own
  not-applied    the engine says that an adapter stands nowhere
  isolation      a row in a batch of several adapters differs from the same row where all have its adapter
  foreign        it is the row with another row's adapter, or with none
  left-over      after adapters were used, a batch without any differs from one before
  accepted       a damaged adapter is taken without a word
  raised         the target raised: with an adapter that is whole, or without any
  refused        so it did where damage was to be refused, and it answers without adapters: it refuses all
  incomplete     an answer is missing, is empty, or lacks its log-probabilities
  nothing-found  a prefix cache that was asked for has found nothing
  wrong-…        a layout, a draft or another setting was asked for and did not run
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from conformance import lora_names
from conformance.checks.base import CheckOutcome, no_refusal, refuses
from conformance.checks.likelihoods import EXACT, apart, identical, worst
from conformance.checks.lora_asking import IncompleteError, Inquiry, Prompt, RefusedError, Written
from conformance.errors import EngineError
from conformance.lora_suite import LoraCase, LoraSuite
from conformance.media import ImagePiece, SoundPiece
from conformance.oracles import Oracles
from conformance.results import Problem
from conformance.targets.protocol import Feature, GenerateResult, Parts, Target

_VISIBLE = 20
"""What an adapter changes is at least so many times the tolerance, or the case says nothing."""
_EARLIER = 4
"""Times as many adapters as a batch has are used before it."""
_OTHERS = 1000
"""What is added to their seeds."""
_SHOWN = 12
_READABLE = ("no-prefix",)
"""Damages that leave an adapter whole under other names: it may be taken, if it acts."""


def judge(case: LoraCase, suite: LoraSuite, target: Target, oracles: Oracles) -> CheckOutcome:
    """Ask with adapters, and compare.

    Raises:
        EngineError: the case itself is no good: an adapter fits nothing, or what it changes cannot be seen.
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    reason = _cannot(case, target)
    if reason:
        return CheckOutcome("skip", reason=reason)
    inquiry = Inquiry(case, suite.configs[case.config], target, oracles)
    try:
        problems = [*_JUDGES[case.judge](inquiry), *inquiry.wrong.values()]
    except RefusedError as error:
        wanted = None if inquiry.effective else case.or_refused
        problems = []
        if wanted is None or not refuses(error.cause, wanted):
            message = f"generation raised {error}{no_refusal(error.cause, wanted)}"
            problems = [Problem(rule="raised", message=message, got=str(error))]
    except IncompleteError as error:
        problems = [Problem(rule="incomplete", message=str(error), got=str(error))]
    return CheckOutcome.from_problems(problems, inquiry.evidence())


def _cannot(case: LoraCase, target: Target) -> str:
    """Why the target is not asked; empty if it is."""
    info = target.describe()
    if "generate" not in info.capabilities:
        why = info.unavailable.get("generate")
        return f"{target.spec} has no capability `generate`{f': {why}' if why else ''}"
    pieces = [piece for row in case.rows for piece in row]
    asked: list[Feature] = ["lora", *case.way.options("").features]
    if case.way.repeat > 1:
        asked.append("repeat")
    if case.judge == "isolation":
        asked.append("mixed-adapters")
    if any(isinstance(piece, ImagePiece) for piece in pieces):
        asked.append("images")
    if any(isinstance(piece, SoundPiece) for piece in pieces):
        asked.append("sounds")
    lacking = [feature for feature in asked if feature not in info.features]
    if lacking:
        return f"{target.spec} cannot generate with {', '.join(lacking)}"
    if case.judge == "mapping" and lora_names.table(info.name) is None:
        return f"there is no table of the names that {info.name} has for its modules"
    return ""


# ------------------------------------------------------------------------------------------ judges


def _mapping(inquiry: Inquiry) -> Iterator[Problem]:
    """Where the probe of each module stands."""
    probes = inquiry.probes()
    table = lora_names.table(inquiry.target.describe().name)
    assert table is not None
    result = inquiry.ask([prompt for *_, prompt in probes], [adapter for adapter, *_ in probes], tokens=1)
    wrong: dict[str, tuple[list[str], list[str]]] = {}
    for adapter, _, module, _ in probes:
        expected = sorted(table(module.name, inquiry.config))
        got = sorted(result.adapted.get(str(adapter.folder), ()))
        if expected != got:
            wrong[module.name] = (expected, got)
    if wrong:
        first, (expected, got) = next(iter(wrong.items()))
        yield Problem(
            rule="mapping",
            message=f"the adapter for {first} stands in {', '.join(got) or 'no module'} and must stand in "
            f"{', '.join(expected)}; {len(wrong)} of {len(probes)} modules are mapped wrongly",
            expected={name: pair[0] for name, pair in wrong.items()},
            got={name: pair[1] for name, pair in wrong.items()},
        )
    yield from _parts(inquiry, result.parts)


def _parts(inquiry: Inquiry, told: Parts | None) -> Iterator[Problem]:
    """What an engine that tells takes to be there besides the language model."""
    known = lora_names.parts(inquiry.config)
    if told is None:
        return
    wrong = [
        f"{kind} {_listed(sorted(got)) or 'none'}, and it has {_listed(sorted(expected)) or 'none'}"
        for kind, got, expected in (
            ("connectors", told.connectors, known.connectors),
            ("towers", told.towers, known.towers),
        )
        if set(got) != set(expected)
    ]
    if wrong:
        yield Problem(
            rule="parts",
            message=f"the model is taken to have the {'; the '.join(wrong)}",
            expected=known.model_dump(mode="json"),
            got=told.model_dump(mode="json"),
        )


def _numbers(inquiry: Inquiry) -> Iterator[Problem]:
    """What adapters give, against the merged weights."""
    adapters = _adapters(inquiry)
    turns: list[Written | None] = [*adapters, None] if inquiry.case.plain else [*adapters]
    count = max(len(inquiry.prompts), len(turns))
    prompts = [inquiry.prompts[k % len(inquiry.prompts)] for k in range(count)]
    chosen = [turns[k % len(turns)] for k in range(count)]
    result = inquiry.ask(prompts, chosen)
    yield from _not_applied(inquiry, adapters, result)
    yield from _compared(inquiry, prompts, chosen, result)
    yield from _prefixes(inquiry)


def _liveness(inquiry: Inquiry) -> Iterator[Problem]:
    """Each module's probe, and the same with zeros."""
    probes = inquiry.probes()
    prompts = [prompt for *_, prompt in probes]
    adapters = [adapter for adapter, *_ in probes]
    result = inquiry.ask(prompts, adapters, tokens=1)
    yield from _compared(inquiry, prompts, adapters, result)
    zeros = [inquiry.zeroed(adapter, spec, module) for adapter, spec, module, _ in probes]
    restored = inquiry.ask(prompts, zeros, tokens=1)
    plain = inquiry.ask(prompts, [None] * len(probes), tokens=1)
    # In batches of other sizes kernels add in another order; where the sizes are the same, so is every bit.
    alike = restored.batches == plain.batches
    shown = {
        adapter.title: distance
        for adapter, one, other in zip(adapters, restored.generations, plain.generations, strict=True)
        if not identical(one, other) and ((distance := apart(one, other)) > EXACT or alike)
    }
    if shown:
        yield Problem(
            rule="zeroed",
            message=f"an adapter of zeros changes log-probabilities, by up to {max(shown.values()):.3g}; "
            f"modules: {_listed(list(shown))}",
            got=list(shown),
        )


def _isolation(inquiry: Inquiry) -> Iterator[Problem]:
    """Rows with different adapters and with none, against batches in which all rows have the same."""
    adapters = _adapters(inquiry)
    prompts = inquiry.prompts
    every: list[Written | None] = [*adapters, None]
    chosen = [every[row % len(every)] for row in range(len(prompts))]
    before = inquiry.ask(prompts, [None] * len(prompts))
    # An engine has room for a few adapters at a time: what was there before must not be in the way.
    others = [
        inquiry.adapter(spec.model_copy(update={"seed": spec.seed + _OTHERS * number}), f"earlier {number}")
        for number in range(1, _EARLIER + 1)
        for spec in inquiry.case.adapters
    ]
    inquiry.ask([prompts[0]] * len(others), others, tokens=1)
    mixed = inquiry.ask(prompts, chosen, mixed=True)
    yield from _compared(inquiry, prompts, chosen, mixed)
    alone = [inquiry.ask(prompts, [each] * len(prompts)) for each in adapters]
    after = inquiry.ask(prompts, [None] * len(prompts))
    runs = [*alone, after]
    for place, made in enumerate(mixed.generations):
        row = place % len(prompts)
        own = chosen[row]
        distances = [apart(made, run.generations[place]) for run in runs]
        if distances[every.index(own)] <= inquiry.case.tolerance / 10:
            continue
        nearest = min(range(len(runs)), key=distances.__getitem__)
        names = [each.title if each else "no adapter" for each in every]
        foreign = distances[nearest] <= inquiry.case.tolerance / 10
        yield Problem(
            rule="foreign" if foreign else "isolation",
            message=f"row {row} with {names[every.index(own)]} "
            + (
                f"answers in the mixed batch as with {names[nearest]}"
                if foreign
                else f"is {distances[every.index(own)]:.3g} from the same row where all rows use it"
            ),
        )
    if not all(map(identical, before.generations, after.generations)):
        left = max(map(apart, before.generations, after.generations))
        yield Problem(
            rule="left-over",
            message=f"a batch without adapters differs by {left:.3g} from the same one before any was used",
        )
    yield from _prefixes(inquiry)


def _refusal(inquiry: Inquiry) -> Iterator[Problem]:
    """A damaged adapter, after a whole one: a target that refuses every adapter refuses no damage."""
    from conformance import lora_adapters

    case = inquiry.case
    assert case.damage is not None
    how = case.damage
    (whole,) = _adapters(inquiry)

    def make(folder: Path) -> None:
        shutil.copytree(whole.folder, folder, dirs_exist_ok=True)
        lora_adapters.damage(folder, how)

    folder = inquiry.oracles.made(make, "damaged", str(whole.folder), how)
    damaged = Written(f"{whole.title}, {how}", folder, whole.drawn)
    prompts = inquiry.prompts
    try:
        inquiry.ask(prompts, [whole])
    except RefusedError as error:
        if case.or_refused is not None:
            raise
        inquiry.ask(prompts, [None])
        yield Problem(
            rule="refused", message=f"the undamaged adapter is refused too: {error}", got=str(error)
        )
        return
    try:
        result = inquiry.ask(prompts, [damaged])
    except RefusedError:
        result = None
    if result is not None and how in _READABLE:
        yield from _compared(inquiry, prompts, [damaged], result)
    elif result is not None:
        yield Problem(
            rule="accepted",
            message=f"a damaged adapter ({how}) was taken and answered with; the engine says that it "
            f"stands in {_listed(list(result.adapted.get(str(folder), ()))) or 'no module'}",
        )
    inquiry.ask(prompts, [None])


_JUDGES: dict[str, Callable[[Inquiry], Iterator[Problem]]] = {
    "mapping": _mapping,
    "numbers": _numbers,
    "liveness": _liveness,
    "isolation": _isolation,
    "refusal": _refusal,
}


# ------------------------------------------------------------------------------------------ comparing


def _adapters(inquiry: Inquiry) -> list[Written]:
    return [
        inquiry.adapter(spec, f"adapter {number} ({', '.join([*spec.modules, *spec.save]) or 'experts'})")
        for number, spec in enumerate(inquiry.case.adapters, 1)
    ]


def _not_applied(inquiry: Inquiry, adapters: Sequence[Written], result: GenerateResult) -> Iterator[Problem]:
    """What an engine that tells says of itself."""
    if lora_names.table(inquiry.target.describe().name) is None:
        return
    for adapter in adapters:
        if not result.adapted.get(str(adapter.folder)):
            yield Problem(rule="not-applied", message=f"{adapter.title} stands in no module of the engine")


def _prefixes(inquiry: Inquiry) -> Iterator[Problem]:
    """Whether a prefix cache that was asked for has found anything."""
    if inquiry.case.way.prefix_cache and inquiry.found == 0:
        yield Problem(rule="nothing-found", message="no prompt found a token of it in the prefix cache")


def _compared(
    inquiry: Inquiry,
    prompts: Sequence[Prompt],
    adapters: Sequence[Written | None],
    result: GenerateResult,
) -> Iterator[Problem]:
    """Answers against merged weights: which adapters do nothing, and which do something else.

    Raises:
        EngineError: what an adapter changes is too little to be seen.
    """
    limit = inquiry.case.tolerance
    prompts, adapters = [*prompts] * inquiry.case.way.repeat, [*adapters] * inquiry.case.way.repeat
    truths = inquiry.truth(prompts, result.generations, adapters)
    plains = inquiry.truth(prompts, result.generations, [None] * len(prompts))
    dead: list[str] = []
    wrong: dict[str, float] = {}
    for adapter, made, truth, plain in zip(adapters, result.generations, truths, plains, strict=True):
        title = adapter.title if adapter else "no adapter"
        change = float((truth - plain).abs().max())
        if adapter is not None and change < _VISIBLE * limit:
            raise EngineError(
                f"{title} changes log-probabilities by {change:.3g} at most, too little to be seen at a "
                f"tolerance of {limit:g}; choose other rows, or a larger scale"
            )
        distance = worst(made, truth)
        if distance > limit:
            if adapter is not None and worst(made, plain) <= limit:
                dead.append(title)
            else:
                wrong[title] = max(distance, wrong.get(title, 0.0))
    if dead:
        yield Problem(
            rule="no-effect",
            message=f"the numbers are those without any adapter; adapters for: {_listed(dead)}",
            got=dead,
        )
    if wrong:
        yield Problem(
            rule="numbers",
            message=f"log-probabilities are up to {max(wrong.values()):.3g} from those of the merged weights "
            f"(limit {limit:g}); adapters for: {_listed(list(wrong))}",
            got={
                title: float(f"{distance:.3g}") if math.isfinite(distance) else "not a number"
                for title, distance in wrong.items()
            },
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


__all__ = ["judge"]
