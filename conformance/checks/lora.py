"""Judge what a target makes of LoRA adapters.

What an adapter has to do is known from the draw that it was written from: the bundled model computes it with
other weights, and reads no adapter. Log-probabilities of the target's own tokens are compared with that.

Rules:
  no-effect      an adapter changes nothing
  numbers        an adapter changes the numbers, and not as the merged weights do
  zeroed         an adapter of zeros changes the numbers
  mapping        an adapter stands in other places of the engine than the table says
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

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance import lora_names
from conformance.checks.base import CheckOutcome, no_refusal, refuses
from conformance.checks.likelihoods import EXACT, apart, worst
from conformance.errors import EngineError
from conformance.invariance.asking import wrong_settings
from conformance.invariance_suite import Way
from conformance.loading import text_ids
from conformance.lora_suite import AdapterSpec, LoraCase, LoraSuite
from conformance.media import ImagePiece, SoundPiece, TextPiece, kind_of, marker_ids
from conformance.oracles import Oracles
from conformance.results import Evidence, Problem
from conformance.targets.protocol import Feature, GenerateRequest, GenerateResult, Generation, Target

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.lora_adapters import Checkpoint, Drawn, Module

_BOS = 2
_FIRST_TEXT = 3
"""Tokens below are for padding and the beginnings and ends of texts."""
_VISIBLE = 20
"""What an adapter changes is at least so many times the tolerance, or the case says nothing."""
_EARLIER = 4
"""Times as many adapters as a batch has are used before it."""
_OTHERS = 1000
"""What is added to their seeds."""
_SHOWN = 12
_READABLE = ("no-prefix",)
"""Damages that leave an adapter whole under other names: it may be taken, if it acts."""
_MEDIA = {"vision_tower": "image", "embed_vision": "image", "vision_embedder": "image",
          "audio_tower": "audio", "embed_audio": "audio"}  # fmt: skip
"""Which pieces a part of a model needs to do anything."""


def judge(case: LoraCase, suite: LoraSuite, target: Target, oracles: Oracles) -> CheckOutcome:
    """Ask with adapters, and compare.

    Raises:
        EngineError: the case itself is no good: an adapter fits nothing, or what it changes cannot be seen.
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    reason = _cannot(case, target)
    if reason:
        return CheckOutcome("skip", reason=reason)
    inquiry = _Inquiry(case, suite.configs[case.config], target, oracles)
    try:
        problems = [*_JUDGES[case.judge](inquiry), *inquiry.wrong.values()]
    except _RefusedError as error:
        wanted = None if inquiry.effective else case.or_refused
        problems = []
        if wanted is None or not refuses(error.cause, wanted):
            message = f"generation raised {error}{no_refusal(error.cause, wanted)}"
            problems = [Problem(rule="raised", message=message, got=str(error))]
    except _IncompleteError as error:
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


class _RefusedError(Exception):
    """The target refused what it was asked."""

    def __init__(self, cause: EngineError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _IncompleteError(Exception):
    """The target answered, and left something out; that is no refusal."""


@dataclass(frozen=True)
class _Prompt:
    ids: tuple[int, ...]
    images: tuple[str, ...]
    sounds: tuple[str, ...]


@dataclass(frozen=True)
class _Adapter:
    """An adapter, and what it does."""

    title: str
    folder: Path
    drawn: Drawn


@dataclass
class _Inquiry:
    """A case on a target."""

    case: LoraCase
    config: dict[str, Any]
    target: Target
    oracles: Oracles
    prompts: list[_Prompt] = field(init=False)
    checkpoint: Checkpoint = field(init=False)
    asked: list[str] = field(default_factory=list)
    """Titles of adapters."""
    effective: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, Problem] = field(default_factory=dict)
    """By rule: settings that were asked for and did not run."""
    found: int | None = 0
    """Tokens that were found in the prefix cache; None where the target does not tell."""

    def __post_init__(self) -> None:
        from conformance.lora_adapters import Checkpoint

        self.checkpoint = Checkpoint(self.oracles.whole_checkpoint(self.config, self.case.weights))
        self.prompts = list(self._prompts())

    # -------------------------------------------------------------------------------------- asking

    def ask(
        self, prompts: Sequence[_Prompt], adapters: Sequence[_Adapter | None], tokens: int | None = None
    ) -> GenerateResult:
        """Generate, each prompt with its adapter; so many tokens, if not as many as the case says.

        All prompts are asked as often as the case says; answers to all of them, one time after the other.

        Raises:
            _RefusedError: the target raised.
            _IncompleteError: it answered to another number of prompts, or without log-probabilities.
        """
        way = self.case.way
        self.asked += [adapter.title for adapter in adapters if adapter and adapter.title not in self.asked]
        request = GenerateRequest(
            checkpoint=str(self.checkpoint.folder),
            prompts=tuple(prompt.ids for prompt in prompts),
            images=tuple(prompt.images for prompt in prompts) if any(p.images for p in prompts) else (),
            sounds=tuple(prompt.sounds for prompt in prompts) if any(p.sounds for p in prompts) else (),
            adapters=tuple(str(adapter.folder) if adapter else None for adapter in adapters),
            max_new_tokens=tokens or self.case.max_new_tokens,
            top_logprobs=20,
            repeat=way.repeat,
            options=way.options(self._draft()),
        )
        try:
            result = self.target.generate(request)
        except EngineError as error:
            raise _RefusedError(error) from error
        broken = [
            made
            for made in result.generations
            if not made.token_ids or len(made.logprobs) != len(made.token_ids)
        ]
        expected = len(prompts) * way.repeat
        if len(result.generations) != expected or broken:
            raise _IncompleteError(
                f"{len(result.generations)} answers came where {expected} were asked for, and "
                f"{len(broken)} are empty or have no log-probabilities"
            )
        self.effective = result.effective
        if way != Way():
            self.wrong |= {problem.rule: problem for problem in wrong_settings(request, result.effective)}
        for made in result.generations:
            told = made.cached_tokens
            self.found = None if self.found is None or told is None else self.found + told
        return result

    def _draft(self) -> str | None:
        """The folder of the draft model, if there is one."""
        if self.case.way.draft is None:
            return None
        return str(self.oracles.speaking_draft(self.checkpoint.folder, self.case.way))

    def adapter(self, spec: AdapterSpec, title: str, only: Module | None = None) -> _Adapter:
        """An adapter of the case, written once."""
        from conformance import lora_adapters

        spec = self.named(spec)
        drawn = lora_adapters.draw(self.checkpoint, spec, only=only)
        folder = self.oracles.made(
            lambda folder: lora_adapters.write(drawn, spec, folder, only=only),
            *("adapter", str(self.checkpoint.folder), spec.model_dump(), only and only.name),
        )
        return _Adapter(title, folder, drawn)

    def zeroed(self, adapter: _Adapter, spec: AdapterSpec, only: Module) -> _Adapter:
        """The same with zeros."""
        from conformance import lora_adapters

        spec = self.named(spec)
        drawn = lora_adapters.zeroed(adapter.drawn)
        folder = self.oracles.made(
            lambda folder: lora_adapters.write(drawn, spec, folder, only=only),
            *("zeroed", str(self.checkpoint.folder), spec.model_dump(), only.name),
        )
        return _Adapter(f"{adapter.title}, zeroed", folder, drawn)

    def named(self, spec: AdapterSpec) -> AdapterSpec:
        """With the form of names that the checkpoint's own model has, where the case names none."""
        return spec.model_copy(update={"keys": spec.keys or self.checkpoint.keys})

    def truth(
        self, prompts: Sequence[_Prompt], made: Sequence[Generation], adapters: Sequence[_Adapter | None]
    ) -> list[Tensor]:
        """Log-probabilities at the tokens of answers, by weights into which adapters are merged."""
        from conformance.targets import reference_merged

        questions = [
            reference_merged.Question(prompt.ids, answer.token_ids[:-1], prompt.images, prompt.sounds)
            for prompt, answer in zip(prompts, made, strict=True)
        ]
        keys = [
            (question, adapter and adapter.folder)
            for question, adapter in zip(questions, adapters, strict=True)
        ]
        changes = {
            key: adapter.drawn.weights if adapter else {} for key, adapter in zip(keys, adapters, strict=True)
        }
        found = reference_merged.logprobs(
            self.checkpoint.folder, [question for question, _ in changes], list(changes.values())
        )
        by_key = dict(zip(changes, found, strict=True))
        return [by_key[key] for key in keys]

    # -------------------------------------------------------------------------------------- what is asked

    def probes(self) -> list[tuple[_Adapter, AdapterSpec, Module, _Prompt]]:
        """An adapter for each module that the rows can show, with the first prompt that shows it."""
        case = self.case
        spec = AdapterSpec(
            seed=case.seed, modules=("-",), experts=case.experts, keys=case.keys, rank=2, alpha=6.0, scale=1.0
        )
        found = []
        for module in self.checkpoint.modules:
            name, part = module.name, module.part
            if case.probes and not any(part == p or name == p or name.endswith(f".{p}") for p in case.probes):
                continue
            kind = _MEDIA.get(part)
            prompts = [
                prompt
                for prompt in self.prompts
                if kind is None or (prompt.images if kind == "image" else prompt.sounds)
            ]
            if prompts and (case.keys != "text" or part == "language_model"):
                found.append((self.adapter(spec, name, module), spec, module, prompts[0]))
        if not found:
            raise EngineError(f"there is no module to probe among {', '.join(case.probes) or 'all'}")
        return found

    def _prompts(self) -> Iterator[_Prompt]:
        draw = random.Random(self.case.seed)  # noqa: S311 - seeded test data
        last = text_ids(self.config)
        shared = [draw.randrange(_FIRST_TEXT, last) for _ in range(self.case.shared)]
        for row in self.case.rows:
            ids = [_BOS, *shared]
            for number, piece in enumerate(row):
                if isinstance(piece, TextPiece):
                    own = piece.text - (len(shared) if number == 0 else 0)
                    ids += [draw.randrange(_FIRST_TEXT, last) for _ in range(own)]
                else:
                    placeholder = marker_ids(self.config, kind_of(piece))[1]
                    assert placeholder is not None
                    ids.append(placeholder)
            files = {
                kind: tuple(
                    file.path
                    for file in self.oracles.files([piece for piece in row if isinstance(piece, kind)])
                )
                for kind in (ImagePiece, SoundPiece)
            }
            yield _Prompt(tuple(ids), files[ImagePiece], files[SoundPiece])

    def evidence(self) -> Evidence:
        """What was asked."""
        case = self.case
        return Evidence(
            input=json.dumps(
                {
                    "config": case.config,
                    "prompts": [list(prompt.ids) for prompt in self.prompts],
                    "adapters": [
                        spec.model_dump(mode="json", exclude_defaults=True) for spec in case.adapters
                    ]
                    or self.asked,
                    **({"damage": case.damage} if case.damage else {}),
                    **({"way": way} if (way := case.way.model_dump(exclude_defaults=True)) else {}),
                },
                indent=2,
            ),
            got={"effective": self.effective} if self.effective else None,
        )


# ------------------------------------------------------------------------------------------ judges


def _mapping(inquiry: _Inquiry) -> Iterator[Problem]:
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


def _numbers(inquiry: _Inquiry) -> Iterator[Problem]:
    """What adapters give, against the merged weights."""
    adapters = _adapters(inquiry)
    turns: list[_Adapter | None] = [*adapters, None] if inquiry.case.plain else [*adapters]
    count = max(len(inquiry.prompts), len(turns))
    prompts = [inquiry.prompts[k % len(inquiry.prompts)] for k in range(count)]
    chosen = [turns[k % len(turns)] for k in range(count)]
    result = inquiry.ask(prompts, chosen)
    yield from _not_applied(inquiry, adapters, result)
    yield from _compared(inquiry, prompts, chosen, result)
    yield from _prefixes(inquiry)


def _liveness(inquiry: _Inquiry) -> Iterator[Problem]:
    """Each module's probe, and the same with zeros."""
    probes = inquiry.probes()
    prompts = [prompt for *_, prompt in probes]
    adapters = [adapter for adapter, *_ in probes]
    result = inquiry.ask(prompts, adapters, tokens=1)
    yield from _compared(inquiry, prompts, adapters, result)
    zeros = [inquiry.zeroed(adapter, spec, module) for adapter, spec, module, _ in probes]
    restored = inquiry.ask(prompts, zeros, tokens=1)
    plain = inquiry.ask(prompts, [None] * len(probes), tokens=1)
    shown = {
        adapter.title: distance
        for adapter, one, other in zip(adapters, restored.generations, plain.generations, strict=True)
        if (distance := apart(one, other)) > EXACT
    }
    if shown:
        yield Problem(
            rule="zeroed",
            message=f"an adapter of zeros changes log-probabilities by up to {max(shown.values()):.3g}; "
            f"modules: {_listed(list(shown))}",
            got=list(shown),
        )


def _isolation(inquiry: _Inquiry) -> Iterator[Problem]:
    """Rows with different adapters and with none, against batches in which all rows have the same."""
    adapters = _adapters(inquiry)
    prompts = inquiry.prompts
    every: list[_Adapter | None] = [*adapters, None]
    chosen = [every[row % len(every)] for row in range(len(prompts))]
    before = inquiry.ask(prompts, [None] * len(prompts))
    # An engine has room for a few adapters at a time: what was there before must not be in the way.
    others = [
        inquiry.adapter(spec.model_copy(update={"seed": spec.seed + _OTHERS * number}), f"earlier {number}")
        for number in range(1, _EARLIER + 1)
        for spec in inquiry.case.adapters
    ]
    inquiry.ask([prompts[0]] * len(others), others, tokens=1)
    mixed = inquiry.ask(prompts, chosen)
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
    left = max(map(apart, before.generations, after.generations))
    if left > EXACT:
        yield Problem(
            rule="left-over",
            message=f"a batch without adapters differs by {left:.3g} from the same one before any was used",
        )
    yield from _prefixes(inquiry)


def _refusal(inquiry: _Inquiry) -> Iterator[Problem]:
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
    damaged = _Adapter(f"{whole.title}, {how}", folder, whole.drawn)
    prompts = inquiry.prompts
    try:
        inquiry.ask(prompts, [whole])
    except _RefusedError as error:
        if case.or_refused is not None:
            raise
        inquiry.ask(prompts, [None])
        yield Problem(
            rule="refused", message=f"the undamaged adapter is refused too: {error}", got=str(error)
        )
        return
    try:
        result = inquiry.ask(prompts, [damaged])
    except _RefusedError:
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


_JUDGES: dict[str, Callable[[_Inquiry], Iterator[Problem]]] = {
    "mapping": _mapping,
    "numbers": _numbers,
    "liveness": _liveness,
    "isolation": _isolation,
    "refusal": _refusal,
}


# ------------------------------------------------------------------------------------------ comparing


def _adapters(inquiry: _Inquiry) -> list[_Adapter]:
    return [
        inquiry.adapter(spec, f"adapter {number} ({', '.join([*spec.modules, *spec.save]) or 'experts'})")
        for number, spec in enumerate(inquiry.case.adapters, 1)
    ]


def _not_applied(
    inquiry: _Inquiry, adapters: Sequence[_Adapter], result: GenerateResult
) -> Iterator[Problem]:
    """What an engine that tells says of itself."""
    if lora_names.table(inquiry.target.describe().name) is None:
        return
    for adapter in adapters:
        if not result.adapted.get(str(adapter.folder)):
            yield Problem(rule="not-applied", message=f"{adapter.title} stands in no module of the engine")


def _prefixes(inquiry: _Inquiry) -> Iterator[Problem]:
    """Whether a prefix cache that was asked for has found anything."""
    if inquiry.case.way.prefix_cache and inquiry.found == 0:
        yield Problem(rule="nothing-found", message="no prompt found a token of it in the prefix cache")


def _compared(
    inquiry: _Inquiry,
    prompts: Sequence[_Prompt],
    adapters: Sequence[_Adapter | None],
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
