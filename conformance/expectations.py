"""Known failures: `suites/expectations/<target>.yaml`.

1. An expectation names cases, a version range of the target, and the rules that are known to break.
2. It is strict. A failure that breaks any other rule is still a `fail`; a pass is an `xpass`.
3. At most one expectation holds for a case at a version. One for cells of the matrix goes before one for
   everywhere.
4. A review date that has passed only warns.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, Field, StringConstraints

from conformance import yamlfile
from conformance.discovery import EXPECTATIONS_FOLDER
from conformance.loading import LoadedSuite, LoadedSuites, load_suites
from conformance.suitebase import SourceRef, Strict

_GLOB = re.compile(r"[*?\[]")


def _specifiers(text: str) -> str:
    try:
        specifiers = SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(f"{error}; write a range like '>=0.24,<0.33'") from None
    if any(specifier.operator == "===" for specifier in specifiers):
        raise ValueError("`===` compares text, not versions; use `==`")
    return text


class Entry(Strict):
    """One known failure."""

    cases: tuple[str, ...] = Field(min_length=1)
    """Case addresses, `suite-id::case-id`. A pattern with `*` must match at least two cases."""
    versions: Annotated[str, AfterValidator(_specifiers)] = ""
    """Version range of the target, such as `>=0.24,<0.33`; absent for every version."""
    cells: tuple[str, ...] = ()
    """Patterns of the cells of the matrix in which it holds; absent: in all, and outside the matrix."""
    rules: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")], ...] = Field(min_length=1)
    """The rules that are known to break; `error` and `timeout` stand for those verdicts."""
    reason: str = Field(min_length=8)
    """One sentence: what the target does wrong."""
    source: SourceRef
    finding: Annotated[str, StringConstraints(pattern=r"^F-\d{3}$")] | None = None
    """Heading in docs/findings.md, for failures that were found with this harness."""
    repeat: str = Field(min_length=8)
    """One shell line that shows the failure."""
    review: dt.date
    """When somebody should look whether it still holds."""


class ExpectationFile(Strict):
    """What one file holds."""

    target: str
    """Registry name of the target, and the file's name."""
    expectations: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Expectation:
    """An entry, applied to the cases it names."""

    entry: Entry
    target: str
    where: str
    """`file:line`."""
    addresses: frozenset[str]

    def holds_for(self, address: str, version: str, cell: str = "") -> bool:
        """Whether it speaks about this case at this version, in a cell of the matrix or (empty) outside."""
        cells = self.entry.cells
        if cells and not any(fnmatch.fnmatchcase(cell, pattern) for pattern in cells):
            return False
        return address in self.addresses and _in_range(self.entry.versions, version)


@dataclass(frozen=True)
class Expectations:
    """All known failures of all targets."""

    all: tuple[Expectation, ...] = ()

    def find(self, address: str, target: str, version: str, cell: str = "") -> Expectation | None:
        """The one expectation for a case on a target (by registry name) at a version.

        Args:
            address: Of the case.
            target: Its registry name.
            version: Of the target.
            cell: Of the matrix; empty outside it.
        """
        found = [e for e in self.all if e.target == target and e.holds_for(address, version, cell)]
        return next((e for e in found if e.entry.cells), next(iter(found), None))

    def overdue(self) -> tuple[str, ...]:
        """A note for each entry whose review date has passed."""
        today = dt.datetime.now(dt.UTC).date()
        return tuple(
            f"{e.where}: review was due on {e.entry.review}; the date only warns"
            for e in self.all
            if e.entry.review < today
        )


def load(suites: LoadedSuites) -> Expectations:
    """Load the expectations beside some suites.

    Args:
        suites: Every suite of the roots concerned: a pattern that matches none of their cases is an error.

    Raises:
        SuiteError: with file and line.
    """
    found: list[Expectation] = []
    for root in sorted({suite.root for suite in suites}):
        folder = root / EXPECTATIONS_FOLDER
        known = frozenset(case.address for suite in suites if suite.root == root for case in suite.cases)
        for path in sorted(folder.glob("*.yaml")):
            found += _load_file(path, known)
    return Expectations(tuple(found))


def beside(suites: Iterable[LoadedSuite]) -> Expectations:
    """Load the expectations beside the roots of some suites, which may be a part of what the roots hold.

    Raises:
        SuiteError: with file and line.
    """
    return load(load_suites(sorted({suite.root for suite in suites})))


def json_schema() -> dict[str, Any]:
    """JSON Schema of expectation files, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ExpectationFile.model_json_schema(),
    }


def _load_file(path: Path, known: Set[str]) -> list[Expectation]:
    document = yamlfile.read(path)
    if not isinstance(document.value, dict):
        raise document.error((), "an expectation file is a mapping with `target` and `expectations`")
    content = document.validate(ExpectationFile)
    if content.target != path.stem:
        raise document.error(
            ("target",), f"{content.target!r} must equal the file's name, {path.stem!r}; change one of them"
        )
    result: list[Expectation] = []
    for index, entry in enumerate(content.expectations):
        addresses: set[str] = set()
        for position, pattern in enumerate(entry.cases):
            loc = ("expectations", index, "cases", position)
            addresses |= _addresses(document, loc, pattern, known)
        line = document.line(("expectations", index))
        new = Expectation(entry, content.target, f"{_short(path)}:{line}", frozenset(addresses))
        for old in result:
            both = old.addresses & new.addresses
            if not both or not _may_meet(old.entry.cells, new.entry.cells):
                continue
            version = common_version(old.entry.versions, new.entry.versions)
            if version is not None:
                raise document.error(
                    ("expectations", index),
                    f"{min(both)} at version {version} is also named by {old.where}; "
                    "make their `versions` disjoint or merge them",
                )
        result.append(new)
    return result


def _may_meet(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two entries may hold in one cell, neither going before the other."""
    return not (first or second) or bool(set(first) & set(second))


def _addresses(document: yamlfile.Document, loc: yamlfile.Loc, pattern: str, known: Set[str]) -> set[str]:
    if _GLOB.search(pattern):
        matches = {address for address in known if fnmatch.fnmatchcase(address, pattern)}
    else:
        matches = {pattern} & known
    if not matches:
        raise document.error(loc, f"{pattern!r} matches no case; a case is named `suite-id::case-id`")
    if len(matches) == 1 and _GLOB.search(pattern):
        raise document.error(loc, f"{pattern!r} matches one case only; write {matches.pop()!r}")
    return matches


def _short(path: Path) -> str:
    """The file's path below its suites folder's parent: the same on every machine."""
    return "/".join(path.parts[-3:])


def _in_range(specifiers: str, version: str) -> bool:
    if not specifiers:
        return True
    try:
        return SpecifierSet(specifiers).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False  # a range says nothing about a version that has no order


def common_version(first: str, second: str) -> str | None:
    """A version that lies in both ranges, or None.

    Ranges change only at the versions they mention, so it is enough to try those and a neighbour
    on each side.
    """
    sets = (SpecifierSet(first), SpecifierSet(second))
    candidates = {Version("0"), Version("99999")}
    for specifier in _specifier_versions(sets):
        base = Version(specifier.removesuffix(".*"))
        candidates |= {
            base,
            Version(f"{base.base_version}.dev0"),
            Version(f"{base.base_version}.0.0.1"),
        }
    common = [v for v in sorted(candidates) if all(s.contains(v, prereleases=True) for s in sets)]
    return str(common[0]) if common else None


def _specifier_versions(sets: Iterable[SpecifierSet]) -> Iterable[str]:
    return (specifier.version for specifiers in sets for specifier in specifiers)
