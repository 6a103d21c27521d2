"""What a failing case says is broken (`pointers.yaml`), which is written down apart from where faults are."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from conformance import yamlfile
from conformance.faults.places import full_module
from conformance.suitebase import CaseId, Strict

_MOST = 3
"""Modules that a case may point at, and still say where something is."""
_Module = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(\.[a-z_]+)*$")]


class Pointer(Strict):
    """Modules that some cases point at when they fail."""

    areas: tuple[CaseId, ...] = Field(min_length=1)
    cases: str = "*"
    """Pattern of their addresses."""
    rules: tuple[str, ...] = ()
    """Of which they broke one; empty: whatever they broke."""
    modules: tuple[_Module, ...] = Field(min_length=1, max_length=_MOST)
    """As in `places.yaml`."""

    def fits(self, area: str, case: str, rules: Collection[str]) -> bool:
        """Whether a failing case is one of these."""
        return (
            area in self.areas
            and fnmatch.fnmatchcase(case, self.cases)
            and (not self.rules or not set(self.rules).isdisjoint(rules))
        )


class Pointers(Strict):
    """What `pointers.yaml` holds."""

    title: str
    pointers: tuple[Pointer, ...]

    def modules(self, area: str, case: str, rules: Collection[str]) -> tuple[str, ...]:
        """Full names of the modules that a failing case points at; none if it does not say.

        Args:
            area: Of the dashboard.
            case: Its address.
            rules: That it broke.
        """
        first = next((pointer for pointer in self.pointers if pointer.fits(area, case, rules)), None)
        return tuple(map(full_module, first.modules)) if first is not None else ()


@cache
def pointers() -> Pointers:
    """What all cases say.

    Raises:
        SuiteError: the file is wrong.
    """
    return yamlfile.read(Path(__file__).with_name("pointers.yaml")).validate(Pointers)
