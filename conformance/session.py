"""What the suite items of one process share: targets, expectations, and results to reuse."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from conformance import expectations, fingerprint, placing, runfile, runner
from conformance.errors import ConformanceError, TargetError, UsageError
from conformance.expectations import Expectations
from conformance.loading import LoadedCase, load_suites
from conformance.results import Result
from conformance.runner import TargetPool
from conformance.targets import registry
from conformance.targets.protocol import TargetInfo

if TYPE_CHECKING:
    from conformance.matrix import Cell


class ReviewDue(UserWarning):
    """The review date of an expectation has passed."""


class Done(BaseModel):
    """A result on its way to the process that writes the run file."""

    result: Result
    info: TargetInfo | None
    stored: bool
    """The run file that is being resumed holds exactly this result already."""

    def to_json(self) -> str:
        """As text, which every transport between processes carries."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Done:
        """Back from text."""
        return cls.model_validate_json(text)


@dataclass(frozen=True)
class Selection:
    """Targets of a run, resolved."""

    specs: tuple[str, ...]
    unavailable: dict[str, str]
    """Of the defaults: those that are not installed, and how to install them."""


def select_targets(wanted: Sequence[str] | None) -> Selection:
    """Resolve the targets that were asked for, or the defaults.

    Raises:
        TargetError: a target is unknown, or was asked for by name and cannot be used.
    """
    unavailable = {}
    specs = tuple(dict.fromkeys(registry.resolve(spec) for spec in wanted or registry.default_targets()))
    for spec in specs:
        if registry.is_factory(spec):
            _check_factory(spec)
        reason = registry.unavailable(spec)
        if reason and wanted:
            raise UsageError(f"{spec} cannot be used: {reason}")
        if reason:
            unavailable[spec] = f"{spec} cannot be used: {reason}"
    return Selection(specs, unavailable)


def select_cell(cell: Cell, wanted: Sequence[str] | None = None) -> Selection:
    """The target of a cell. Where it cannot run, its cases are skipped, and nothing is refused.

    Raises:
        UsageError: other targets were asked for.
    """
    if wanted and {registry.resolve(spec) for spec in wanted} != {cell.target}:
        raise UsageError(f"the cell {cell.id} is one of {cell.target}; leave out --target")
    reason = cannot_run(cell)
    return Selection((cell.target,), {cell.target: reason} if reason else {})


def cannot_run(cell: Cell) -> str:
    """Why a cell cannot run on this machine; empty if it can, as far as is known without its target."""
    if "cuda" in cell.needs:
        import torch

        if not torch.cuda.is_available():
            return "needs CUDA, and PyTorch finds none here"
    reason = registry.unavailable(cell.target)
    return f"{cell.target} cannot be used: {reason}" if reason else ""


def _cell(cell_id: str, path: Path | None) -> Cell:
    from conformance import matrix  # it makes coverings, which other runs need not load

    return matrix.load(path).cell(cell_id)


@cache
def _check_factory(spec: str) -> None:
    """Use a factory once, so that one that makes no target is wrong use and not a failing case."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that started this one has done it
    try:
        runner.try_factory(spec)
    except TargetError as error:
        raise UsageError(str(error)) from error


class SuiteSession:
    """Runs cases; made once per process.

    Args:
        targets: Specs as the user gave them; None for the defaults.
        timeout: Seconds for one request; None for the default.
        resume: Run file whose results are reused.
        record: New file for the answers of the target.
        expect_failures: False to report known failures as failures.
        cell: Id of a cell of the matrix, whose target and settings are used.
        matrix: File of that matrix; None for the bundled one.
        seed: Of sampled chunkings.

    Raises:
        UsageError: no such cell, or one of another target; answers of several targets cannot be recorded, nor
            those of a run that is resumed.
    """

    def __init__(
        self,
        targets: Sequence[str] | None,
        timeout: float | None,
        resume: str | None,
        *,
        record: str | None = None,
        expect_failures: bool = True,
        cell: str | None = None,
        matrix: str | None = None,
        seed: int = 0,
    ) -> None:
        self._matrix = Path(matrix) if matrix else None
        self.cell = _cell(cell, self._matrix) if cell else None
        selection = select_targets(targets) if self.cell is None else select_cell(self.cell, targets)
        self.specs = selection.specs
        self.unavailable = selection.unavailable
        if record and (resume or len(self.specs) != 1):
            raise UsageError("the answers of one target are recorded, in a run of its own: name one target")
        recorded = (self.specs[0], Path(record)) if record else None
        self.pool = TargetPool(timeout or runner.DEFAULT_TIMEOUT, recorded, seed)
        self._stored = runfile.read_stored(Path(resume)) if resume else {}
        self._environment = fingerprint.environment() if resume else {}
        self._expect_failures = expect_failures
        self._expectations: dict[Path, Expectations] = {}

    @staticmethod
    def check_options(run: str | None, resume: str | None) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: both a new run file and one to resume.
        """
        if run and resume:
            raise UsageError("--resume appends to the run it names; leave out the option for a new run file")

    def place(self, loaded: LoadedCase) -> LoadedCase | None:
        """A case as it is run here: with the settings of the cell; None where they are not applicable."""
        if self.cell is None:
            return loaded
        placed = placing.place(loaded, self.cell.settings, self.cell.id, self._matrix)
        return placed if isinstance(placed, LoadedCase) else None

    def expectations(self, root: Path) -> Expectations:
        """Known failures of the suites under a root.

        Raises:
            SuiteError: an expectation file, or a suite that it may speak about, is broken.
        """
        if root not in self._expectations:
            loaded = expectations.load(load_suites([root])) if self._expect_failures else Expectations()
            for note in loaded.overdue():
                warnings.warn(ReviewDue(note), stacklevel=2)
            self._expectations[root] = loaded
        return self._expectations[root]

    def run(self, loaded: LoadedCase, spec: str) -> Done:
        """The result of a case on a target: reused, skipped, or fresh."""
        known = self.expectations(loaded.suite.root)
        stored = self._stored.get((loaded.suite.suite.id, loaded.case.id, spec))
        if stored is not None:
            # A target that is gone since cannot be asked; its verdicts are not replaced by skips.
            info = stored.info if spec in self.unavailable else self._info(spec)
            if info is not None and stored.reusable(loaded.digest, info, self._environment):
                result = runner.rejudge(loaded, stored.result, info, known)
                return Done(result=result, info=info, stored=result == stored.result)
        if spec in self.unavailable:
            result = runner.skipped_result(loaded, spec, self.unavailable[spec])
            return Done(result=result, info=None, stored=False)
        result = runner.run_case(loaded, spec, self.pool, known)
        return Done(result=result, info=self._info(spec), stored=False)

    def _info(self, spec: str) -> TargetInfo | None:
        try:
            return self.pool.get(spec).info
        except ConformanceError:
            return None  # the case's own verdict says why
