"""Run one case on one target: the only way a verdict comes about.

A target that raises, dies, hangs or exits costs one case. Targets stay open between cases, a few
at a time, and one that cannot be started is not started again for every case.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import cast

from conformance import checks, placing, resources
from conformance.checks import CheckOutcome, Search
from conformance.errors import (
    ConformanceError,
    EngineError,
    NotRecordedError,
    TargetError,
    TargetTimeoutError,
    WorkerDiedError,
)
from conformance.expectations import Expectation, Expectations
from conformance.loading import LoadedCase
from conformance.oracles import Oracles
from conformance.results import PlannedCase, Result
from conformance.shortening import shortened_result
from conformance.targets import registry
from conformance.targets.protocol import Target, TargetInfo
from conformance.targets.recorder import Recorder, RecordingTarget
from conformance.targets.replay import PerCase, is_replay

DEFAULT_TIMEOUT = 5.0
"""Seconds that one request to a target may take; a case makes several."""

_START_LIMIT = 300.0
"""Seconds that a target may take to start, whatever its own limit says."""

_MAX_OPEN = 2
_FORWARD_LIMIT = 300.0
"""Seconds that a case may take beyond its requests where engines are imported and models run."""
_KINDS_OF_MODELS = (
    *("parity", "mask", "contract", "processor", "generation", "invariance", "lora", "server", "scoring"),
)
_ACCURACY_LIMIT = 12 * 3600.0
"""The same where hundreds of questions are asked."""
_MAX_REQUESTS = 20
_REQUESTS_IN_PROCESS = 6
_STDERR_TAIL = 4000


class _DeadlineExceeded(BaseException):
    """The case took too long. Not an `Exception`, so that code under test does not swallow it."""


@dataclass(frozen=True)
class OpenTarget:
    """A started target and what it says about itself."""

    target: Target
    info: TargetInfo


class TargetPool:
    """Targets in use, opened when first asked for; the least recently used one makes room.

    Args:
        timeout: Seconds for one request.
        record: The target whose answers are recorded, and the new file for them.
        seed: Of the chunkings that are sampled, and of answers that are drawn.
    """

    def __init__(
        self, timeout: float = DEFAULT_TIMEOUT, record: tuple[str, Path] | None = None, seed: int = 0
    ) -> None:
        self.timeout = timeout
        self.seed = seed
        self._recorded = record[0] if record is not None else None
        self._recorder = Recorder(record[1]) if record is not None else None
        self.oracles = Oracles(lambda spec: self.get(spec).target)
        self._open: OrderedDict[str, OpenTarget] = OrderedDict()
        self._failed: dict[str, ConformanceError] = {}

    def get(self, spec: str) -> OpenTarget:
        """The open target for a resolved spec.

        Raises:
            ConformanceError: it cannot be started; the same error again at each call.
        """
        if spec in self._failed:
            raise self._failed[spec]
        if spec not in self._open:
            while len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)[1].target.close()
            try:
                with _deadline(_START_LIMIT):
                    recorder = self._recorder if spec == self._recorded else None
                    self._open[spec] = _open(spec, self.timeout, recorder)
            except ConformanceError as error:
                self._failed[spec] = error
                raise
            except _DeadlineExceeded:
                self._failed[spec] = TargetTimeoutError(f"{spec} did not start within {_START_LIMIT:g} s")
                raise self._failed[spec] from None
        self._open.move_to_end(spec)
        return self._open[spec]

    def discard(self, spec: str) -> None:
        """Close one target, whose state is in doubt; it is opened afresh when next asked for."""
        if spec in self._open:
            self._open.pop(spec).target.close()

    def close(self) -> None:
        """Close all targets, and delete what their oracles computed."""
        self.oracles.close()
        while self._open:
            self._open.popitem()[1].target.close()
        if self._recorder is not None:
            self._recorder.close()


def _open(spec: str, timeout: float, recorder: Recorder | None) -> OpenTarget:
    target = registry.open_target(spec, timeout=timeout)
    try:
        if recorder is not None:
            target = cast(Target, RecordingTarget(target, recorder))
        return OpenTarget(target, registry.describe(target))
    except BaseException:
        target.close()
        raise


def run_case(
    loaded: LoadedCase,
    spec: str,
    pool: TargetPool,
    expectations: Expectations,
    *,
    search: Search = "bounded",
) -> Result:
    """Judge a case on a target and apply what is expected of that target.

    Never raises for anything the target does.
    """
    started = time.perf_counter()
    limit = _case_limit(loaded, spec, pool.timeout)
    expectation: Expectation | None = None
    stderr = ""
    try:
        opened = pool.get(spec)
        expectation = expectations.find(
            loaded.address, _expected_name(spec, opened.info), opened.info.version, loaded.cell
        )
        if isinstance(opened.target, PerCase):
            opened.target.begin_case()
        with _deadline(limit):
            outcome = checks.judge(
                loaded.case,
                loaded.suite.suite,
                opened.target,
                seed=pool.seed,
                search=search,
                oracles=pool.oracles,
                folder=loaded.suite.path.parent,
            )
    except TargetTimeoutError as error:
        outcome, stderr = CheckOutcome("timeout", reason=str(error)), error.stderr_tail
    except WorkerDiedError as error:
        outcome, stderr = CheckOutcome("error", reason=str(error)), error.stderr_tail
    except EngineError as error:
        outcome, stderr = CheckOutcome("error", reason=str(error)), error.traceback
    except NotRecordedError as error:
        outcome = CheckOutcome("inconclusive", reason=str(error))
    except _DeadlineExceeded:
        pool.discard(spec)
        outcome = CheckOutcome("timeout", reason=f"no verdict within {limit:g} s")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it costs this case only
        pool.discard(spec)
        outcome = CheckOutcome("error", reason=f"{type(error).__name__}: {error}")
        stderr = traceback.format_exc()
    if loaded.cell:
        outcome = placing.settle(outcome)
    result = _result(loaded, spec, outcome, expectation, stderr, time.perf_counter() - started)
    # Without its seed the line would sample other chunkings, and draw other answers.
    return (
        result.model_copy(update={"repeat": f"{result.repeat} --seed {pool.seed}"}) if pool.seed else result
    )


def rejudge(loaded: LoadedCase, stored: Result, info: TargetInfo, expectations: Expectations) -> Result:
    """The verdict of a stored result under the expectations of today."""
    verdict, reason = stored.verdict, stored.reason
    if stored.own_verdict is not None:
        verdict, reason = stored.own_verdict, stored.own_reason
    outcome = CheckOutcome(verdict, stored.problems, stored.evidence, reason)
    name = _expected_name(stored.target, info)
    expectation = expectations.find(loaded.address, name, info.version, loaded.cell)
    result = _result(loaded, stored.target, outcome, expectation, stored.stderr, stored.duration)
    return result.model_copy(update={"shortened": stored.shortened})


def failed_result(planned: PlannedCase, repeat: str, reason: str) -> Result:
    """Verdict `error` for a case whose process died without a result."""
    return Result(
        **planned.model_dump(include={"suite", "case", "target", "kind", "area", "digest"}),
        verdict="error",
        reason=reason,
        repeat=repeat,
    )


def skipped_result(loaded: LoadedCase, spec: str, reason: str) -> Result:
    """Verdict `skip` for a case whose target cannot be used here."""
    return _result(loaded, spec, CheckOutcome("skip", reason=reason), None, "", 0.0)


def plan(loaded: LoadedCase, spec: str) -> PlannedCase:
    """The manifest's entry for a case on a target."""
    return PlannedCase(
        suite=loaded.suite.suite.id,
        case=loaded.case.id,
        target=spec,
        kind=loaded.suite.suite.kind,
        area=loaded.suite.suite.area,
        title=loaded.case.title,
        source=loaded.case.source,
        digest=loaded.digest,
    )


def repeat_line(loaded: LoadedCase, spec: str) -> str:
    """One shell line that runs this case on this target again."""
    name = loaded.address
    if loaded.suite.root != resources.suites_dir():
        path = loaded.suite.path
        with contextlib.suppress(ValueError):
            path = path.relative_to(Path.cwd())
        name = f"{path}::{loaded.case.id}"
    options = ["--cell", loaded.cell] if loaded.cell else ["--target", spec]
    options += ["--matrix", str(loaded.matrix)] if loaded.matrix is not None else []
    return shlex.join(["conformance", "run", name, *options])


def apply_expectation(outcome: CheckOutcome, expectation: Expectation | None) -> CheckOutcome:
    """Turn a check's own verdict into the one that counts."""
    if expectation is None or outcome.verdict in ("skip", "inconclusive"):
        return outcome
    entry = expectation.entry
    if outcome.verdict == "pass":
        reason = f"passes, but {expectation.where} expects it to fail: {entry.reason}"
        return replace(outcome, verdict="xpass", reason=reason)
    broken = {problem.rule for problem in outcome.problems}
    if outcome.verdict in ("error", "timeout"):
        broken = {outcome.verdict}
    beyond = broken - set(entry.rules)
    if beyond:
        reason = f"breaks more than {expectation.where} expects: {', '.join(sorted(beyond))}"
        return replace(outcome, reason=f"{outcome.reason}; {reason}" if outcome.reason else reason)
    mended = set(entry.rules) - broken
    if mended:
        reason = f"no longer breaks what {expectation.where} expects: {', '.join(sorted(mended))}"
        return replace(outcome, verdict="xpass", reason=reason)
    return replace(outcome, verdict="xfail", reason=entry.reason)


def try_factory(spec: str) -> None:
    """Make the target of a factory once, and close it again.

    Raises:
        TargetError: it cannot be imported, raises, takes too long, or makes something else.
    """
    try:
        with _deadline(_START_LIMIT):
            registry.open_target(spec).close()
    except _DeadlineExceeded:
        raise TargetError(f"{spec}: made no target within {_START_LIMIT:g} s") from None


def target_name(spec: str) -> str:
    """Registry name of a resolved spec: `vllm` of `vllm@0.32.0`."""
    return spec.partition("@")[0]


def _expected_name(spec: str, info: TargetInfo) -> str:
    """Whose known failures count: those of the target that was recorded, where answers are replayed."""
    return info.name if is_replay(spec) else target_name(spec)


def in_process(spec: str) -> bool:
    """Whether a target runs in this process: the bundled one, and factories named by import path."""
    return target_name(spec) == "reference" or registry.is_factory(spec)


def _case_limit(loaded: LoadedCase, spec: str, timeout: float) -> float:
    """Seconds for one case. Targets in other processes keep their own limit for each request."""
    limit = timeout * (_REQUESTS_IN_PROCESS if in_process(spec) else _MAX_REQUESTS)
    if loaded.suite.suite.kind == "accuracy":
        return limit + _ACCURACY_LIMIT
    return limit + (_FORWARD_LIMIT if loaded.suite.suite.kind in _KINDS_OF_MODELS else 0)


def _result(
    loaded: LoadedCase,
    spec: str,
    outcome: CheckOutcome,
    expectation: Expectation | None,
    stderr: str,
    duration: float,
) -> Result:
    final = apply_expectation(outcome, expectation)
    result = Result(
        suite=loaded.suite.suite.id,
        case=loaded.case.id,
        target=spec,
        kind=loaded.suite.suite.kind,
        area=loaded.suite.suite.area,
        verdict=final.verdict,
        reason=" ".join(final.reason.split()),
        problems=final.problems,
        evidence=final.evidence,
        expectation=expectation.where if expectation is not None else None,
        own_verdict=outcome.verdict if expectation is not None else None,
        own_reason=" ".join(outcome.reason.split()) if expectation is not None else "",
        stderr=stderr[-_STDERR_TAIL:],
        duration=round(duration, 6),
        digest=loaded.digest,
        repeat=repeat_line(loaded, spec),
    )
    return shortened_result(result)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Interrupt the body after so many seconds; only the main thread can be interrupted.

    The alarm repeats, in case the body swallows the first one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise _DeadlineExceeded

    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
