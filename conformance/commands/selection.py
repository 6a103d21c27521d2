"""How cases are named on the command line.

An argument is a path (a suite file, or a folder of them), a path with `::case-id`, or a shell-style
pattern over suite ids and case addresses (`parser/*`, `parser/reasoning::*label*`). Patterns look
at the bundled suites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.errors import UsageError
from conformance.loading import LoadedCase, LoadedSuites, load_suites

SLOW = "slow"
"""Tag of cases that take long and seldom find what quicker ones miss."""


@dataclass(frozen=True)
class Selected:
    """Cases that were named, and all suites of the files concerned."""

    suites: LoadedSuites
    cases: tuple[LoadedCase, ...]

    def pytest_arguments(self) -> list[str]:
        """The selection in pytest's words: a whole file, or single cases of it."""
        wanted = {case.address for case in self.cases}
        arguments = []
        for suite in self.suites:
            chosen = [case for case in suite.cases if case.address in wanted]
            if len(chosen) == len(suite.cases):
                arguments.append(str(suite.path))
            else:
                arguments += [f"{suite.path}::{case.case.id}" for case in chosen]
        return arguments


def select(arguments: Sequence[str], *, quick: bool = False) -> Selected:
    """Find the cases that arguments name; without arguments all bundled ones.

    Args:
        arguments: As they stand on the command line.
        quick: Without those that have the tag `slow`.

    Raises:
        SuiteError: a suite file is broken.
        UsageError: an argument names nothing, or nothing is left.
    """
    selected = _named(arguments)
    if not quick:
        return selected
    kept = tuple(case for case in selected.cases if SLOW not in case.case.tags)
    if not kept:
        raise UsageError(f"all cases that were named have the tag `{SLOW}`; leave out --quick")
    return Selected(selected.suites, kept)


def _named(arguments: Sequence[str]) -> Selected:
    if not arguments:
        suites = load_suites()
        return Selected(suites, suites.cases)
    paths: list[Path] = []
    patterns: list[str] = []
    single: list[tuple[Path, str]] = []
    for argument in arguments:
        name, _, case_id = argument.partition("::")
        if not Path(name).exists():
            patterns.append(argument)
        elif case_id:
            single.append((Path(name), case_id))
        else:
            paths.append(Path(name))
    cases: dict[str, LoadedCase] = {}
    files = [*paths, *(path for path, _ in single)]
    if paths:
        cases |= {case.address: case for case in load_suites(paths).cases}
    for path, case_id in single:
        for suite in load_suites([path]):
            case = suite.case(case_id)
            cases[case.address] = case
    bundled = load_suites() if patterns else None
    for pattern in patterns:
        matches = bundled.match(pattern) if bundled is not None else ()
        if not matches:
            raise UsageError(
                f"{pattern!r} is no path, and matches no case or suite; "
                "`conformance list cases` names them all"
            )
        cases |= {case.address: case for case in matches}
        files += [case.suite.path for case in matches]
    return Selected(load_suites(files), tuple(cases.values()))


def select_one(argument: str) -> LoadedCase:
    """The one case that an argument names.

    Raises:
        UsageError: it names none, or several.
    """
    cases = select([argument]).cases
    if len(cases) > 1:
        raise UsageError(f"{argument!r} names {len(cases)} cases; name one as suite-id::case-id")
    return cases[0]
