"""What the parity cases of a session share: tiny checkpoints, and what oracles computed on them.

Each checkpoint is written once per configuration and seed, and an oracle runs once per distinct request,
however many targets are compared with it. All files lie in one temporary folder, which `close` deletes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.errors import EngineError
from conformance.targets import registry
from conformance.targets.protocol import ForwardRequest, ForwardResult, Target

WriteCheckpoint = Callable[[dict[str, Any], Path, int], None]


@dataclass(frozen=True)
class Wanted:
    """A forward pass, before it is known where its files lie."""

    config: dict[str, Any]
    seed: int
    rows: tuple[tuple[int, ...], ...]
    prefill: int | None
    capture: tuple[str, ...]


class Oracles:
    """Makes checkpoints and asks oracles.

    Args:
        open_target: Gives the open target for a resolved spec.
        write: Writes a checkpoint; the bundled implementation's way if left out.
    """

    def __init__(self, open_target: Callable[[str], Target], write: WriteCheckpoint | None = None) -> None:
        self._open_target = open_target
        self._write = write or _write_checkpoint
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = itertools.count()
        self._checkpoints: dict[str, Path] = {}
        self._answers: dict[str, ForwardResult] = {}

    @staticmethod
    def unavailable(spec: str) -> str:
        """Why an oracle cannot be used here, and what to do; empty if it can.

        Raises:
            TargetError: no such target.
        """
        return registry.unavailable(spec)

    def request(self, wanted: Wanted, **options: Any) -> ForwardRequest:
        """The request for a target: its checkpoint exists, its tensors go into a file of its own.

        Args:
            wanted: The forward pass.
            options: `dtype` and `attention`.
        """
        return ForwardRequest(
            checkpoint=str(self._checkpoint(wanted)),
            input_ids=wanted.rows,
            prefill=wanted.prefill,
            capture=wanted.capture,
            output=str(self._path() / f"{next(self._numbers)}.safetensors"),
            **options,
        )

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

    def close(self) -> None:
        """Delete all files. Safe to call twice."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = None
        self._checkpoints.clear()
        self._answers.clear()

    def _checkpoint(self, wanted: Wanted) -> Path:
        key = _digest(wanted.config, wanted.seed)
        if key not in self._checkpoints:
            folder = self._path() / f"checkpoint-{key[:16]}"
            folder.mkdir(exist_ok=True)
            self._write(wanted.config, folder, wanted.seed)
            self._checkpoints[key] = folder
        return self._checkpoints[key]

    def _path(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="conformance-parity-")
        return Path(self._folder.name)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write_checkpoint(config: dict[str, Any], folder: Path, seed: int) -> None:
    # It loads torch, which takes seconds that parser suites need not spend.
    from conformance.targets import reference_model

    reference_model.write_checkpoint(config, folder, seed=seed)
