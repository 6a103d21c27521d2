"""What the check of adapters asks a target: prompts, adapters that are written once, and what is true."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.errors import EngineError
from conformance.invariance.asking import wrong_settings
from conformance.invariance_suite import Way
from conformance.loading import text_ids
from conformance.lora_suite import AdapterSpec, LoraCase
from conformance.media import ImagePiece, SoundPiece, TextPiece, kind_of, marker_ids
from conformance.oracles import Oracles
from conformance.results import Evidence, Problem
from conformance.targets.protocol import GenerateRequest, GenerateResult, Generation, Target

if TYPE_CHECKING:
    from torch import Tensor

    from conformance.lora_adapters import Checkpoint, Drawn, Module

_BOS = 2
_FIRST_TEXT = 3
"""Tokens below are for padding and the beginnings and ends of texts."""
_MEDIA = {"vision_tower": "image", "embed_vision": "image", "vision_embedder": "image",
          "audio_tower": "audio", "embed_audio": "audio"}  # fmt: skip
"""Which pieces a part of a model needs to do anything."""


class RefusedError(Exception):
    """The target refused what it was asked."""

    def __init__(self, cause: EngineError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class IncompleteError(Exception):
    """The target answered, and left something out; that is no refusal."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, with one placeholder for each file of media."""

    ids: tuple[int, ...]
    images: tuple[str, ...]
    sounds: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """An adapter, and what it does."""

    title: str
    folder: Path
    drawn: Drawn


@dataclass
class Inquiry:
    """A case on a target."""

    case: LoraCase
    config: dict[str, Any]
    target: Target
    oracles: Oracles
    prompts: list[Prompt] = field(init=False)
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
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[Written | None],
        tokens: int | None = None,
        *,
        mixed: bool = False,
    ) -> GenerateResult:
        """Generate, each prompt with its adapter.

        All prompts are asked as often as the case says; answers to all of them, one time after the other.

        Args:
            prompts: They are given together.
            adapters: Of each; None for none.
            tokens: Of each answer, if not as many as the case says.
            mixed: They have to be answered in one batch.

        Raises:
            RefusedError: the target raised.
            IncompleteError: it answered to another number of prompts, or without log-probabilities.
        """
        way = self.case.way
        self.asked += [adapter.title for adapter in adapters if adapter and adapter.title not in self.asked]
        request = GenerateRequest(
            checkpoint=str(self.checkpoint.folder),
            prompts=tuple(prompt.ids for prompt in prompts),
            images=tuple(prompt.images for prompt in prompts) if any(p.images for p in prompts) else (),
            sounds=tuple(prompt.sounds for prompt in prompts) if any(p.sounds for p in prompts) else (),
            adapters=tuple(str(adapter.folder) if adapter else None for adapter in adapters),
            mixed=mixed,
            max_new_tokens=tokens or self.case.max_new_tokens,
            top_logprobs=20,
            repeat=way.repeat,
            options=way.options(self._draft()),
        )
        try:
            result = self.target.generate(request)
        except EngineError as error:
            raise RefusedError(error) from error
        broken = [
            made
            for made in result.generations
            if not made.token_ids or len(made.logprobs) != len(made.token_ids)
        ]
        expected = len(prompts) * way.repeat
        if len(result.generations) != expected or broken:
            raise IncompleteError(
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

    def adapter(self, spec: AdapterSpec, title: str, only: Module | None = None) -> Written:
        """An adapter of the case, written once."""
        from conformance import lora_adapters

        spec = self.named(spec)
        drawn = lora_adapters.draw(self.checkpoint, spec, only=only)
        folder = self.oracles.made(
            lambda folder: lora_adapters.write(drawn, spec, folder, only=only),
            *("adapter", str(self.checkpoint.folder), spec.model_dump(), only and only.name),
        )
        return Written(title, folder, drawn)

    def zeroed(self, adapter: Written, spec: AdapterSpec, only: Module) -> Written:
        """The same with zeros."""
        from conformance import lora_adapters

        spec = self.named(spec)
        drawn = lora_adapters.zeroed(adapter.drawn)
        folder = self.oracles.made(
            lambda folder: lora_adapters.write(drawn, spec, folder, only=only),
            *("zeroed", str(self.checkpoint.folder), spec.model_dump(), only.name),
        )
        return Written(f"{adapter.title}, zeroed", folder, drawn)

    def named(self, spec: AdapterSpec) -> AdapterSpec:
        """With the form of names that the checkpoint's own model has, where the case names none."""
        return spec.model_copy(update={"keys": spec.keys or self.checkpoint.keys})

    def truth(
        self, prompts: Sequence[Prompt], made: Sequence[Generation], adapters: Sequence[Written | None]
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

    def probes(self) -> list[tuple[Written, AdapterSpec, Module, Prompt]]:
        """An adapter for each module that the rows can show, with the first prompt that shows it."""
        case = self.case
        spec = AdapterSpec(
            seed=case.seed, modules=("-",), experts=case.experts, keys=case.keys, rank=2, alpha=6.0, scale=1.0
        )
        found = []
        for module in self.checkpoint.modules:
            part = module.part
            if not (module.named_by(case.probes) if case.probes else not module.rare):
                continue
            kind = _MEDIA.get(part)
            prompts = [
                prompt
                for prompt in self.prompts
                if kind is None or (prompt.images if kind == "image" else prompt.sounds)
            ]
            if prompts and (case.keys != "text" or kind is None):
                found.append((self.adapter(spec, module.name, module), spec, module, prompts[0]))
        if not found:
            raise EngineError(f"there is no module to probe among {', '.join(case.probes) or 'all'}")
        return found

    def _prompts(self) -> Iterator[Prompt]:
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
            yield Prompt(tuple(ids), files[ImagePiece], files[SoundPiece])

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


__all__ = ["IncompleteError", "Inquiry", "Prompt", "RefusedError", "Written"]
