"""Does a gate notice a numerical bug? Known faults, switched on one at a time in the bundled implementation.

Beside each gate stands what suites of tensors make of the same fault: they must notice every one, the gate
alone need not, and what it misses is told with the drop that was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from conformance.expectations import Expectations
from conformance.faults import Fault
from conformance.faults.run import REFERENCE, REQUEST_SECONDS, BaselineError, detect
from conformance.gates.decision import Decision, Reading, Sensitivity
from conformance.gates.record import Told
from conformance.loading import LoadedCase, LoadedSuites
from conformance.results import Result
from conformance.runner import TargetPool, run_case

FAULTS = (
    "scale-by-head-dim",
    "rope-interleaved",
    "no-value-norm",
    "erf-gelu-in-mlp",
    "no-soft-cap",
    "per-layer-sum-unscaled",
    "expert-scale-dropped",
    "layer-scalar-dropped",
    "both-ways-in-full-layers",
    "images-seen-causally",
    "window-one-short",
)
"""Faults that a table has by default."""
GATES = "accuracy/nano"
"""The gates that the record is about."""


def measure(
    faults: Sequence[Fault],
    gates: Sequence[LoadedCase],
    suites: LoadedSuites | None,
    expectations: Expectations,
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> list[Sensitivity]:
    """Run gates, and suites of tensors, once without any fault and once with each.

    Args:
        faults: Switched on one at a time.
        gates: Accuracy cases whose checkpoints are here.
        suites: Suites of tensors; None: they are not asked.
        expectations: Of these suites.
        progress: Told a line after each gate.

    Raises:
        BaselineError: a gate does not pass without any fault, so that it would prove nothing.
    """
    clean: set[str] = set()
    found = []
    with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as pool:

        def read(loaded: LoadedCase, name: str) -> Result:
            result = run_case(loaded, REFERENCE, pool, Expectations())
            said = _decision(result)
            told = said.sentence if said is not None else result.reason or result.verdict
            progress(f"{name}: {loaded.address}: {told}")
            return result

        for loaded in gates:
            result = read(loaded, "no fault")
            if result.verdict != "pass":
                raise BaselineError(
                    f"{loaded.address} does not pass on the reference with no fault switched on: "
                    f"{result.verdict}, {result.reason}"
                )
        for fault in faults:
            tensors = None
            if suites is not None:
                (detection,) = detect([fault], suites, expectations, pool=pool, clean=clean)
                tensors = tuple(catch.case for catch in detection.caught_by) if detection.detected else ()
            with fault.applied():
                results = [read(loaded, fault.id) for loaded in gates]
            readings = tuple(
                Reading(
                    case=loaded.address,
                    verdict=result.verdict,
                    reason=result.reason,
                    decision=_decision(result),
                )
                for loaded, result in zip(gates, results, strict=True)
            )
            found.append(Sensitivity(fault=fault.id, title=fault.title, tensors=tensors, readings=readings))
    return found


def _decision(result: Result) -> Decision | None:
    return result.evidence.accuracy.decision if result.evidence.accuracy is not None else None


def markdown(found: Sequence[Sensitivity]) -> str:
    """The table of docs/gates.md: score, drop in points, lost and gained items and verdict of each gate."""
    gates = [reading.case.partition("::")[2] for reading in found[0].readings] if found else []
    lines = [
        f"| fault | tensors | {' | '.join(gates)} |",
        "| --- | --- |" + " --- |" * len(gates),
    ]
    for row in found:
        noticed = "not asked" if row.tensors is None else f"{len(row.tensors)} cases"
        cells = " | ".join(_cell(reading) for reading in row.readings)
        lines.append(f"| `{row.fault}` | {noticed} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(reading: Reading) -> str:
    if reading.decision is None:
        return f"{reading.verdict}: {reading.reason}"
    return str(Told.of(reading.decision))
