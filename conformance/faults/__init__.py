"""Known bugs that can be switched on in the bundled implementation."""

from __future__ import annotations

from collections.abc import Sequence

from conformance.errors import UsageError
from conformance.faults.base import Fault


def registry() -> dict[str, Fault]:
    """All faults by id, in the order of the fault catalogue's classes."""
    # Patches of the model need torch, which no other command should wait for.
    from conformance.faults import (
        architecture,
        evaluation,
        layouts,
        lora,
        lora_beside,
        masks,
        media,
        parser,
        processing,
        ranks,
        runtime,
        template,
    )

    classes = (
        parser.faults,
        template.faults,
        architecture.faults,
        media.faults,
        masks.faults,
        processing.faults,
        layouts.faults,
        ranks.faults,
        runtime.faults,
        runtime.generating,
        lora.faults,
        lora_beside.faults,
        evaluation.faults,
    )
    return {fault.id: fault for collection in classes for fault in collection.faults}


def select(ids: Sequence[str]) -> list[Fault]:
    """The named faults, or all.

    Raises:
        UsageError: An id is unknown.
    """
    known = registry()
    unknown = [i for i in ids if i not in known]
    if unknown:
        raise UsageError(f"unknown fault {unknown[0]!r}; `conformance faults list` names them all")
    return [known[i] for i in ids] if ids else list(known.values())


__all__ = ["Fault", "registry", "select"]
