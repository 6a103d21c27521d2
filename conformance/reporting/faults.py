"""What the dashboard shows of faults: for each class a table by areas, and a page for each fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conformance.faults.places import CLASSES, Class
from conformance.faults.record import FaultRecord, FaultsFile, Rates, rates, rates_by_class
from conformance.reporting.slugs import Slugs
from conformance.reporting.view import Case, Site


@dataclass(frozen=True)
class FaultView:
    """One fault."""

    record: FaultRecord
    slug: str
    areas: dict[str, list[tuple[str, Case | None]]]
    """The cases that noticed it, by area: address, and the case in the run of this dashboard."""
    crashed: list[tuple[str, Case | None]]

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"faults/{self.slug}.html"

    @property
    def total(self) -> int:
        """Cases that noticed it."""
        return sum(len(cases) for cases in self.areas.values())

    @property
    def pointing(self) -> frozenset[str]:
        """Addresses of the cases that pointed at the patched module."""
        return frozenset(self.record.pointing(self.record.last))

    @property
    def localised(self) -> bool:
        """Whether most cases of the lowest level did in the last run."""
        return self.record.localised(self.record.last)


@dataclass(frozen=True)
class Measure:
    """What the rates count: the faults of which it holds, by class."""

    slug: str
    title: str
    by_class: dict[Class, list[FaultView]]


@dataclass(frozen=True)
class ClassView:
    """Faults of one class, by the areas in which they were noticed."""

    name: Class
    rates: Rates
    faults: list[FaultView]
    areas: list[str]


class FaultsView:
    """A record of faults.

    Args:
        file: It.
        site: The run beside which it is shown, for links.
    """

    def __init__(self, file: FaultsFile, site: Site) -> None:
        self.file = file
        self._cases = {case.address: case for case in site.cases}
        slugs = Slugs()
        self.faults = [self._fault(found, slugs[found.fault]) for found in file.faults]
        self.rates = rates(file.faults)
        by_class = rates_by_class(file.faults)
        self.classes = [self._class(name, by_class[name]) for name in CLASSES if name in by_class]
        self.area_slugs = Slugs()

    @property
    def measures(self) -> dict[str, Measure]:
        """The columns of the rates, under the names of the rates."""
        columns: dict[str, tuple[str, Callable[[FaultRecord], bool]]] = {
            "detected": ("Noticed", lambda found: found.last.detected),
            "detected_first": ("Noticed in first runs", lambda found: found.first.detected),
            "localised": ("Noticed where they are", lambda found: found.localised(found.last)),
            "localised_first": (
                "Noticed where they are, in first runs",
                lambda found: found.localised(found.first),
            ),
            "in_area": ("Noticed in their area", lambda found: found.in_area(found.last)),
            "in_area_first": (
                "Noticed in their area, in first runs",
                lambda found: found.in_area(found.first),
            ),
            "crash_only": ("Noticed by crashes only", lambda found: found.last.crash_only),
        }
        return {
            name: Measure(
                name.replace("_", "-"),
                title,
                {c.name: [fault for fault in c.faults if holds(fault.record)] for c in self.classes},
            )
            for name, (title, holds) in columns.items()
        }

    @property
    def unnoticed(self) -> list[FaultView]:
        """Faults that nothing noticed."""
        return [fault for fault in self.faults if not fault.record.last.detected]

    @property
    def crash_only(self) -> list[FaultView]:
        """Faults that showed as a crash and in no answer."""
        return [fault for fault in self.faults if fault.record.last.crash_only]

    @property
    def astray(self) -> list[FaultView]:
        """Faults that were noticed, and most cases of the lowest level did not point at the module."""
        return [f for f in self.faults if f.record.last.detected and not f.localised]

    def _fault(self, found: FaultRecord, slug: str) -> FaultView:
        areas = {area: self._linked(cases) for area, cases in found.noticed.items()}
        return FaultView(found, slug, areas, self._linked(found.crashed))

    def _linked(self, addresses: tuple[str, ...]) -> list[tuple[str, Case | None]]:
        return [(address, self._cases.get(address)) for address in addresses]

    def _class(self, name: Class, found: Rates) -> ClassView:
        faults = [fault for fault in self.faults if fault.record.fault_class == name]
        return ClassView(name, found, faults, sorted({area for fault in faults for area in fault.areas}))
