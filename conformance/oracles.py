"""What the cases of a session share that run models: files made for them, and what oracles computed.

Each checkpoint, adapter and draft head is written once, and an oracle runs once per distinct request,
however many targets are compared with it. All files lie in one temporary folder, which `close` deletes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.errors import EngineError
from conformance.invariance.models import MODELS, DrawnModel
from conformance.invariance_suite import Way
from conformance.loading import resolve_rows
from conformance.media import MediaPiece, Prompts, kind_of
from conformance.scratch import Scratch
from conformance.suites import MixedRows, RandomAdapter, RandomDraft, Rows
from conformance.targets import bundled, environments, registry
from conformance.targets.protocol import (
    ForwardRequest,
    ForwardResult,
    KVDType,
    LongBlocks,
    MediaFile,
    PreprocessRequest,
    PreprocessResult,
    Target,
)

if TYPE_CHECKING:
    from torch import Tensor

WriteCheckpoint = Callable[[dict[str, Any], Path, int], None]
Ids = Sequence[int]

_MAX_PREPARED = 8
"""Answers about media that are kept: each may hold tens of megabytes."""


@dataclass(frozen=True)
class Wanted:
    """A forward pass, before it is known where its files lie."""

    config: dict[str, Any]
    seed: int
    rows: tuple[tuple[int, ...], ...]
    prefill: int | None
    capture: tuple[str, ...]
    media: str = ""
    long_blocks: LongBlocks | None = None


class Oracles:
    """Makes checkpoints and asks oracles.

    Args:
        open_target: Gives the open target for a resolved spec.
        write: Writes a checkpoint; the bundled implementation's way if left out.
    """

    def __init__(self, open_target: Callable[[str], Target], write: WriteCheckpoint | None = None) -> None:
        self._open_target = open_target
        self._write = write or _write_checkpoint
        self._folder: Scratch | None = None
        self._numbers = itertools.count()
        self._made: dict[str, Path] = {}
        self._answers: dict[str, ForwardResult] = {}
        self._logprobs: dict[str, list[Tensor]] = {}
        self._prompts: dict[str, Prompts] = {}
        self._prepared: dict[str, PreprocessResult] = {}
        self._files: dict[str, tuple[MediaFile, ...]] = {}
        self._unavailable: dict[tuple[str, str], str] = {}
        self.kept: dict[str, Any] = {}
        """What targets have answered, where checks ask the same for several cases."""

    def unavailable(self, spec: str, part: str = "") -> str:
        """Why an oracle cannot be used here, and what to do; empty if it can.

        Args:
            spec: The oracle's.
            part: Of its environment that is needed besides.

        Raises:
            TargetError: no such target.
        """
        if (spec, part) not in self._unavailable:
            reason = registry.unavailable(spec)
            if part and not reason and not registry.is_factory(spec):
                reason = environments.status(spec).lacking.get(part, "")
            self._unavailable[spec, part] = reason
        return self._unavailable[spec, part]

    def request(self, wanted: Wanted, **options: Any) -> ForwardRequest:
        """The request for a target: its checkpoint exists, its tensors go into a file of its own.

        Args:
            wanted: The forward pass.
            options: `dtype` and `attention`.
        """
        return ForwardRequest(
            checkpoint=str(self.checkpoint(wanted.config, wanted.seed)),
            input_ids=wanted.rows,
            prefill=wanted.prefill,
            media=wanted.media,
            capture=wanted.capture,
            long_blocks=wanted.long_blocks,
            output=str(self.output()),
            **options,
        )

    def prompts(self, rows: Rows, config: dict[str, Any]) -> Prompts:
        """Token ids of rows, and the media among them.

        Raises:
            EngineError: the bundled preprocessing refuses a piece.
        """
        if not isinstance(rows, MixedRows):
            return Prompts(resolve_rows(rows, config))
        from conformance import mixed_rows
        from model_impl.errors import MediaError

        key = _digest("prompts", rows.model_dump(), config)
        if key not in self._prompts:
            folder = self._path() / f"prompts-{key[:16]}"
            folder.mkdir(exist_ok=True)
            try:
                self._prompts[key] = mixed_rows.build(rows, config, folder)
            except MediaError as error:
                raise EngineError(f"{type(error).__name__}: {error}") from error
        return self._prompts[key]

    def preprocess(self, spec: str, request: PreprocessRequest) -> PreprocessResult:
        """What the oracle makes of media; the tensors' file is there until some more have been asked for.

        Raises:
            EngineError: the oracle raised; the message names it.
            WorkerDiedError, TargetTimeoutError: from the oracle.
        """
        key = _digest("preprocess", spec, request.model_dump(exclude={"output"}))
        if key not in self._prepared:
            try:
                self._prepared[key] = self._open_target(spec).preprocess(request)
            except EngineError as error:
                raise EngineError(f"the oracle {spec}: {error}", traceback=error.traceback) from error
            if len(self._prepared) > _MAX_PREPARED:
                oldest = self._prepared.pop(next(iter(self._prepared)))
                Path(oldest.path).unlink(missing_ok=True)
        return self._prepared[key]

    def files(self, pieces: Sequence[MediaPiece]) -> tuple[MediaFile, ...]:
        """Files of media."""
        from conformance import media_files

        key = _digest("files", [piece.model_dump() for piece in pieces])
        if key not in self._files:
            folder = self._path() / f"files-{key[:16]}"
            folder.mkdir(exist_ok=True)
            self._files[key] = tuple(
                media_files.write(piece, folder, f"{kind_of(piece)}-{number}")
                for number, piece in enumerate(pieces, 1)
            )
        return self._files[key]

    def output(self) -> Path:
        """A new path for tensors."""
        return self._path() / f"{next(self._numbers)}.safetensors"

    def ask(self, spec: str, wanted: Wanted, dtype: str) -> ForwardResult:
        """What the oracle computes, in its own choice of backend.

        Raises:
            EngineError: the oracle raised; the message names it.
            WorkerDiedError, TargetTimeoutError: from the oracle.
        """
        request = self.request(wanted, dtype=dtype)
        key = _digest(spec, request.model_dump(exclude={"output"}))
        if key not in self._answers:
            try:
                self._answers[key] = self._open_target(spec).forward(request)
            except EngineError as error:
                raise EngineError(f"the oracle {spec}: {error}", traceback=error.traceback) from error
        return self._answers[key]

    def whole_checkpoint(self, config: dict[str, Any], seed: int) -> Path:
        """The folder of a random checkpoint with the scripted checkpoint's tokenizer and processor beside it.

        Raises:
            EngineError: the configuration is none of a Gemma 4.
        """

        def make(folder: Path) -> None:
            self._write(config, folder, seed)
            bundled.add_processors(folder, unified=config.get("model_type") == "gemma4_unified")

        return self._folder_of(make, "whole", config, seed)

    def made(self, make: Callable[[Path], None], *key: Any) -> Path:
        """The folder that `make` fills, which it does once for each key, whose first part names it."""
        return self._folder_of(make, *key)

    def adapter(self, checkpoint: Path, spec: RandomAdapter) -> Path:
        """The folder of a LoRA adapter for a checkpoint.

        Raises:
            EngineError: the checkpoint has no such modules.
        """
        from conformance.targets import reference_model

        return self._folder_of(
            lambda folder: reference_model.write_adapter(checkpoint, folder, **spec.model_dump()),
            *("adapter", str(checkpoint), spec.model_dump()),
        )

    def merged(self, checkpoint: Path, spec: RandomAdapter) -> Path:
        """The folder of the checkpoint that an adapter makes of another.

        Raises:
            EngineError: as `adapter`.
        """
        from conformance.targets import reference_model

        adapter = self.adapter(checkpoint, spec)
        return self._folder_of(
            lambda folder: reference_model.merge_adapter(checkpoint, adapter, folder), "merged", str(adapter)
        )

    def draft(self, checkpoint: Path, spec: RandomDraft) -> Path:
        """The folder of an Eagle3 head for a checkpoint.

        Raises:
            EngineError: the head cannot read those layers.
        """
        from conformance.targets import reference_model

        return self._folder_of(
            lambda folder: reference_model.write_draft(
                checkpoint, folder, seed=spec.seed, layers=spec.layers
            ),
            *("draft", str(checkpoint), spec.model_dump()),
        )

    def speaking(self, model: DrawnModel, seed: int) -> Path:
        """The folder of a drawn model that says more than its last token.

        Raises:
            EngineError: the bundled implementation refuses the configuration.
        """
        from conformance.targets import reference_model

        return self._folder_of(
            lambda folder: reference_model.write_speaking(MODELS[model], folder, seed=seed),
            *("speaking", MODELS[model], seed),
        )

    def perturbed(self, checkpoint: Path, part: float) -> Path:
        """The folder of a copy of a checkpoint, of which the layer in the middle is slightly wrong.

        Raises:
            EngineError: the checkpoint cannot be perturbed.
        """
        from conformance.targets import reference_model

        return self._folder_of(
            lambda folder: reference_model.write_perturbed(checkpoint, folder, part=part),
            *("perturbed", str(checkpoint), part),
        )

    def speaking_draft(self, checkpoint: Path, way: Way) -> Path:
        """The folder of a draft model for a checkpoint: a trained one's own, which is bundled with it.

        Raises:
            EngineError: the checkpoint has no such draft.
        """
        from conformance.targets import reference_model

        assert way.draft is not None
        if trained := bundled.trained_draft(checkpoint):
            return trained
        draft, kind = way.draft, "eagle3" if way.eagle3 is not None else "assistant"
        return self._folder_of(
            lambda folder: reference_model.write_speaking_draft(
                checkpoint, folder, kind, guesses=draft.guesses, seed=draft.seed, layers=draft.layers
            ),
            *("draft", kind, str(checkpoint), draft.model_dump(exclude={"tokens"})),
        )

    def forget(self) -> None:
        """Forget what targets have answered, because they are about to answer differently."""
        self.kept.clear()
        self._logprobs.clear()

    def logprobs(
        self,
        checkpoint: Path,
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        dtype: str,
        images: Sequence[Sequence[str]] = (),
        kv_dtype: KVDType | None = None,
    ) -> list[Tensor]:
        """The bundled implementation's log-probabilities at the answers' tokens, in one pass.

        Its parity with other implementations is what suites of kind `parity` judge.

        Args:
            checkpoint: Folder of the model.
            prompts: Token ids, with one placeholder for each picture.
            answers: Token ids of each answer.
            dtype: Of weights and activations.
            images: Files of each prompt's pictures, which `files` made; empty: no prompt has any.
            kv_dtype: To which keys and values are rounded; None: to none.

        Returns:
            For each prompt, float32 [tokens of its answer, vocabulary].

        Raises:
            EngineError: the bundled implementation raised.
        """
        from conformance.targets import reference_generate

        key = _digest(str(checkpoint), prompts, answers, dtype, images, kv_dtype)
        if key not in self._logprobs:
            self._logprobs[key] = reference_generate.logprobs(
                checkpoint, prompts, images, answers, dtype, kv_dtype
            )
        return self._logprobs[key]

    def close(self) -> None:
        """Delete all files. Safe to call twice."""
        if self._folder is not None:
            self._folder.close()
        self._folder = None
        self._made.clear()
        self._answers.clear()
        self.forget()
        self._prompts.clear()
        self._prepared.clear()
        self._files.clear()
        self._unavailable.clear()

    def checkpoint(self, config: dict[str, Any], seed: int) -> Path:
        """The folder of a checkpoint with random weights.

        Raises:
            EngineError: the configuration is none of a Gemma 4 text model.
        """
        return self._folder_of(
            lambda folder: self._write(config, folder, seed), *("checkpoint", config, seed)
        )

    def _folder_of(self, make: Callable[[Path], None], *key: Any) -> Path:
        """The folder that `make` fills, which it does once for each key."""
        digest = _digest(*key)
        if digest not in self._made:
            folder = self._path() / f"{key[0]}-{digest[:16]}"
            folder.mkdir(exist_ok=True)
            make(folder)
            self._made[digest] = folder
        return self._made[digest]

    def _path(self) -> Path:
        if self._folder is None:
            self._folder = Scratch("conformance-oracles-")
        return self._folder.path


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# The bundled implementation is imported where it is needed: it loads torch, which takes seconds that parser
# suites need not spend.


def _write_checkpoint(config: dict[str, Any], folder: Path, seed: int) -> None:
    from conformance.targets import reference_model

    reference_model.write_checkpoint(config, folder, seed=seed)
