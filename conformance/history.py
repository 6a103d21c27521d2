"""The release ladder: the same cases over every release of a target, and the release that changed a verdict.

1. Verdicts here are the check's own: expectations are not applied.
2. Streams are sampled on every release, by the same seed, so that one yardstick measures them all.
3. A result is kept under its release, what drives it and what is installed of it, the digest of its suite and
   case, and that of the harness's sources.
   What did not come to a verdict (`error`, `timeout`) is not kept.
4. A release that is not installed, or whose engine does not start, has a reason and no verdicts.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from conformance import runfile
from conformance.errors import ConformanceError, UsageError
from conformance.expectations import Expectations
from conformance.loading import LoadedCase
from conformance.results import Result, Verdict
from conformance.runner import TargetPool, run_case
from conformance.targets import environments, registry

_OF_NO_VERDICT = ("conformance/targets/locks/", "conformance/backtests/")
"""Files whose change makes no kept verdict doubtful: a release's own lock counts by itself."""
GOOD: tuple[Verdict, ...] = ("pass",)
BAD: tuple[Verdict, ...] = ("fail", "timeout")
"""What a release itself did; the others, and `error` with them, say nothing about it."""


class Row(BaseModel):
    """Base of what is written as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rung(Row):
    """One release of a target."""

    spec: str
    version: str
    reason: str = ""
    """Why there are no verdicts, and what to do; empty where there are."""


class Cell(Row):
    """A case on a release."""

    verdict: Verdict
    rules: tuple[str, ...] = ()
    """Rules that it breaks."""
    reason: str = ""
    known: bool = False
    """An expectation for this release covers it; the verdict is the check's own all the same."""
    whole: bool | None = None
    """Whether the whole answer broke no rule, so that only streams did; None if that is unknown."""


class LadderRow(Row):
    """A case over all releases."""

    case: str
    """`suite-id::case-id`."""
    source: tuple[str, ...]
    cells: dict[str, Cell]
    """By spec; releases without verdicts are left out."""

    @property
    def changes(self) -> bool:
        """Whether releases differ in their verdict, or in whether the whole answer is right."""
        return len({(cell.verdict, cell.whole) for cell in self.cells.values()}) > 1


class Ladder(Row):
    """Cases over the releases of a target."""

    target: str
    sources: str
    """Digest of the harness's sources."""
    releases: tuple[Rung, ...]
    """Oldest first."""
    rows: tuple[LadderRow, ...]


def read(path: Path) -> Ladder:
    """Read what `conformance ladder` wrote.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    try:
        return Ladder.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not what `conformance ladder` writes; write it again") from error


class Seen(Row):
    """What one release was found to do with a case."""

    spec: str
    verdict: Verdict
    good: bool
    """Whether it passes, or keeps the rule that was asked about."""
    rules: tuple[str, ...] = ()
    stored: bool
    """Whether it was known from an earlier run."""


class Bisection(Row):
    """Where the verdict on a case changes."""

    case: str
    target: str
    rule: str | None
    """The rule that was asked about; None for all."""
    before: str | None
    """The last release before the change; None if there is none."""
    after: str | None
    """The first release after it."""
    kind: str
    """`broke`, `mended` or `none`."""
    seen: tuple[Seen, ...]
    """Oldest first."""
    monotonic: bool
    """Whether the releases seen change only once, from good to bad or back."""
    unusable: tuple[Rung, ...]
    """Releases that could not be asked."""


@dataclass(frozen=True)
class Asked:
    """A result, and whether it was kept from an earlier run."""

    result: Result
    stored: bool


class Releases:
    """Asks releases of targets, and keeps what they answered. Use `close` when done.

    Args:
        pool: Targets in use.
        folder: Where results are kept; by default beside the environments.
    """

    def __init__(self, pool: TargetPool | None = None, folder: Path | None = None) -> None:
        self.pool = pool or TargetPool()
        self._folder = folder or environments.home() / "ladder"
        self._kept: dict[Path, dict[str, Result]] = {}

    def close(self) -> None:
        """Close all targets."""
        self.pool.close()

    def unusable(self, spec: str, cases: Sequence[LoadedCase] = ()) -> str:
        """Why a release cannot be asked, and what to do about it; empty if it can.

        It is not started for cases that are all known already.
        """
        reason = registry.unavailable(spec)
        if reason or (cases and all(self.stored(loaded, spec) is not None for loaded in cases)):
            return reason
        try:
            self.pool.get(spec)
        except ConformanceError as error:
            return f"it does not start here: {error}"
        return ""

    def stored(self, loaded: LoadedCase, spec: str) -> Result | None:
        """The result of an earlier run."""
        return self._read(self._path(loaded, spec)).get(loaded.digest)

    def ask(self, loaded: LoadedCase, spec: str) -> Asked:
        """The check's own result for a case on a release."""
        found = self.stored(loaded, spec)
        if found is not None:
            return Asked(found, stored=True)
        result = run_case(loaded, spec, self.pool, Expectations(), search="none")
        if result.verdict not in ("error", "timeout"):
            path = self._path(loaded, spec)
            path.parent.mkdir(parents=True, exist_ok=True)
            line = result.model_dump_json().encode() + b"\n"
            with path.open("a+b") as file:
                # Behind a line that was cut off the next one would be lost too.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    line = b"\n" + line
                file.write(line)
            self._read(path)[loaded.digest] = result
        return Asked(result, stored=False)

    def _path(self, loaded: LoadedCase, spec: str) -> Path:
        key = (_release_digest(spec), loaded.suite.digest, runfile.harness_digest(_OF_NO_VERDICT))
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
        return self._folder / spec / f"{name}.jsonl"

    def _read(self, path: Path) -> dict[str, Result]:
        """Results by the digest of their case. A line that was cut off is asked for again."""
        if path not in self._kept:
            kept: dict[str, Result] = {}
            # `splitlines` would also cut within results, at line separators that engines print; a line may be
            # cut off within a character.
            for line in path.read_bytes().split(b"\n") if path.exists() else ():
                try:
                    result = Result.model_validate_json(line)
                except ValidationError:
                    continue
                kept[result.digest] = result
            self._kept[path] = kept
        return self._kept[path]


def _release_digest(spec: str) -> str:
    """What answers for a release: its locks, its adapter and the parts that are there."""
    found = environments.status(spec)
    lock = found.lock
    base = environments.find_lock(lock.overlay_of).digest if lock.overlay_of else ""
    parts = sorted(f"{part.name}={part.digest}" for part in lock.parts if part.name in found.parts)
    return " ".join((lock.digest, f"base={base}", f"adapter={lock.adapter}", *parts))


def climb(
    target: str,
    cases: Sequence[LoadedCase],
    releases: Releases,
    *,
    specs: Sequence[str] | None = None,
    known: Callable[[LoadedCase, str], bool] = lambda loaded, version: False,
    progress: Callable[[str], None] = lambda line: None,
) -> Ladder:
    """Every case on every release of a target.

    Args:
        target: Name of a target with versions.
        cases: Cases to judge.
        releases: Asks them.
        specs: Releases to ask, oldest first; None for all.
        known: Whether an expectation covers a failure of a case at a version.
        progress: Called with one line for each release.

    Raises:
        TargetError: no such target.
    """
    rungs: list[Rung] = []
    cells: dict[str, dict[str, Cell]] = {loaded.address: {} for loaded in cases}
    for spec in registry.releases(target) if specs is None else specs:
        version = spec.partition("@")[2]
        reason = releases.unusable(spec, cases)
        rungs.append(Rung(spec=spec, version=version, reason=reason))
        if reason:
            progress(f"{spec}: no verdicts: {reason}")
            continue
        fresh = 0
        for loaded in cases:
            asked = releases.ask(loaded, spec)
            fresh += not asked.stored
            cells[loaded.address][spec] = _cell(asked.result, known=known(loaded, version))
        verdicts = Counter(cell[spec].verdict for cell in cells.values())
        failed = sum(verdicts[verdict] for verdict in BAD)
        errors = f", {verdicts['error']} come to no verdict (error)" if verdicts["error"] else ""
        progress(f"{spec}: {len(cases)} cases, {fresh} of them run now; {failed} fail{errors}")
    return Ladder(
        target=target,
        sources=runfile.harness_digest(_OF_NO_VERDICT),
        releases=tuple(rungs),
        rows=tuple(
            LadderRow(case=loaded.address, source=loaded.case.source, cells=cells[loaded.address])
            for loaded in cases
        ),
    )


def bisect(
    target: str,
    loaded: LoadedCase,
    releases: Releases,
    rule: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Bisection:
    """The release at which the verdict on a case changes, found by halving.

    The oldest and the newest usable release are asked first. Where they agree, nothing more is run, but
    what is known from earlier runs still counts. A release that gives neither a good nor a bad verdict (it
    skips the case) is passed over.

    Args:
        target: Name of a target with versions.
        loaded: The case.
        releases: Asks them.
        rule: A rule of the case's check, to find where it was broken or kept; None for the verdict.
        progress: Called with one line for each release that is asked.

    Raises:
        TargetError: no such target.
    """
    specs = registry.releases(target)
    unusable: dict[str, str] = {}
    seen: dict[str, Seen] = {}

    def good(spec: str) -> bool | None:
        """Whether the release is good; None if it cannot be asked."""
        if spec not in seen and spec not in unusable:
            _look(spec)
        return seen[spec].good if spec in seen else None

    def _look(spec: str) -> None:
        reason = releases.unusable(spec, [loaded])
        if reason:
            unusable[spec] = reason
            return
        asked = releases.ask(loaded, spec)
        verdict = asked.result.verdict
        found = _is_good(asked.result, rule)
        if found is None:
            unusable[spec] = f"its verdict is {verdict}: {asked.result.reason}"
            return
        seen[spec] = _seen(asked, good=found)
        progress(f"{spec}: {verdict}{' (known from an earlier run)' if asked.stored else ''}")

    def first_usable(indices: Sequence[int]) -> int | None:
        return next((k for k in indices if good(specs[k]) is not None), None)

    low, high = first_usable(range(len(specs))), first_usable(range(len(specs) - 1, -1, -1))
    if low is not None and high is not None and good(specs[low]) != good(specs[high]):
        while True:
            middle = (low + high) // 2
            between = sorted(range(low + 1, high), key=lambda k: abs(k - middle))
            probe = first_usable(between)
            if probe is None:
                break
            if good(specs[probe]) == good(specs[low]):
                low = probe
            else:
                high = probe
    for spec in specs:  # what was known already may contradict what was asked
        stored = releases.stored(loaded, spec) if spec not in seen and spec not in unusable else None
        found = _is_good(stored, rule) if stored is not None else None
        if stored is not None and found is not None:
            seen[spec] = _seen(Asked(stored, stored=True), good=found)
    ordered = [seen[spec] for spec in specs if spec in seen]
    flips = [(a, b) for a, b in itertools.pairwise(ordered) if a.good != b.good]
    before, after = flips[-1] if flips else (None, None)
    kind = "none"
    if after is not None:
        kind = "mended" if after.good else "broke"
    return Bisection(
        case=loaded.address,
        target=target,
        rule=rule,
        before=before.spec if before is not None else None,
        after=after.spec if after is not None else None,
        kind=kind,
        seen=tuple(ordered),
        monotonic=len(flips) <= 1,
        unusable=tuple(
            Rung(spec=spec, version=spec.partition("@")[2], reason=unusable[spec])
            for spec in specs
            if spec in unusable
        ),
    )


def _rules(result: Result) -> tuple[str, ...]:
    return tuple(dict.fromkeys(problem.rule for problem in result.problems))


def _is_good(result: Result, rule: str | None) -> bool | None:
    """Whether a result is good, or keeps a rule; None if it says nothing about that, as an `error` does."""
    if rule is not None:
        return rule not in _rules(result) if result.verdict in ("pass", "fail") else None
    return result.verdict in GOOD if result.verdict in (*GOOD, *BAD) else None


def _cell(result: Result, *, known: bool) -> Cell:
    judged = result.verdict in ("pass", "fail")
    return Cell(
        verdict=result.verdict,
        rules=_rules(result),
        reason=result.reason,
        known=known and result.verdict in BAD,
        whole=all(problem.chunking is not None for problem in result.problems) if judged else None,
    )


def _seen(asked: Asked, *, good: bool) -> Seen:
    result = asked.result
    return Seen(
        spec=result.target, verdict=result.verdict, good=good, rules=_rules(result), stored=asked.stored
    )
