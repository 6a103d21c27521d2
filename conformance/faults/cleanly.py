"""What the quick cases do while no fault is on: which pass, and what of the implementation they run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from conformance import expectations
from conformance.faults import reach
from conformance.faults.base import Fault
from conformance.faults.run import REFERENCE, REQUEST_SECONDS
from conformance.loading import LoadedCase
from conformance.records import Record
from conformance.runner import TargetPool, run_case


class Clean(Record):
    """A run of cases without a fault."""

    left_out: dict[str, int]
    """Cases that say nothing about faults, by their verdict."""
    functions: tuple[str, ...]
    """Names of all functions that were run."""
    passed: dict[str, tuple[int, ...]]
    """Addresses of the other cases, with the functions that each runs, by their places in `functions`."""

    @classmethod
    def of(cls, cases: Sequence[LoadedCase]) -> Clean:
        """Run cases."""
        known = expectations.beside(case.suite for case in cases)
        verdicts: dict[str, str] = {}
        with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as pool, reach.Watch() as watch:
            for case in cases:
                # What one case leaves for the next would hide what the next one runs by itself.
                pool.oracles.close()
                watch.case(case.address)
                verdicts[case.address] = run_case(case, REFERENCE, pool, known, search="none").verdict
            # Targets are closed after the last case, not as a part of it.
            watch.case("")
        reached = watch.reached()
        functions = sorted({name for names in reached.values() for name in names})
        places = {name: place for place, name in enumerate(functions)}
        return cls(
            left_out=dict(sorted(Counter(v for v in verdicts.values() if v != "pass").items())),
            functions=tuple(functions),
            passed={
                address: tuple(sorted(places[name] for name in reached.get(address, ())))
                for address, verdict in verdicts.items()
                if verdict == "pass"
            },
        )

    @classmethod
    def read(cls, path: Path) -> Clean | None:
        """What a file holds; None if there is none, or it is no such file."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None

    def reaching(self, fault: Fault, cases: Sequence[LoadedCase]) -> list[LoadedCase]:
        """Those of some cases that passed and that a fault can change."""
        replaced = reach.replaced(fault)
        return [
            case
            for case in cases
            if case.address in self.passed
            and reach.can_reach(
                replaced, frozenset(self.functions[place] for place in self.passed[case.address])
            )
        ]
