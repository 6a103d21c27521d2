"""`conformance ladder`: the same cases over every release of a target."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import click

from conformance import expectations, runfile
from conformance.commands import output
from conformance.commands.output import LadderOutput, json_option
from conformance.commands.selection import select
from conformance.errors import TargetError, UsageError
from conformance.history import BAD, GOOD, Cell, Ladder, LadderRow, Releases, Rung, climb
from conformance.loading import LoadedCase
from conformance.results import Verdict
from conformance.targets import environments, registry

DEFAULT_SUITES = ("parser/*",)
_SIGNS: dict[Verdict, str] = {
    "pass": ".",
    "error": "E",
    "timeout": "T",
    "skip": "-",
    "inconclusive": "?",
}
_LEGEND = (
    ". pass   F fail   S fail, but only in streams   (lower case: expected)   T timeout   E error   - skip   "
    "? inconclusive"
)


@click.command("ladder")
@click.argument("cases", nargs=-1, metavar="[SUITE]...")
@click.option("--target", "-t", required=True, metavar="NAME", help="Target with versions, such as vllm.")
@click.option("--release", "versions", multiple=True, metavar="VERSION", help="Only these; may be repeated.")
@click.option("--install", is_flag=True, help="Install what is missing (vLLM: 400 MB each).")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.  [default: runs/ladder-NAME.json]")
@json_option
def ladder_command(
    cases: tuple[str, ...],
    target: str,
    versions: tuple[str, ...],
    install: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run SUITE (paths, suite ids, cases or patterns; default: the parser suites) on every release.

    Releases that are not installed are left out, and named with the reason. Verdicts are the check's own:
    an expectation changes the sign of a failure, and nothing else. Failures of the whole answer are told
    from those that show in streams only. Results are kept, so a second ladder asks
    only what has changed.
    """
    specs = _specs(target, versions)
    selected = select(cases or DEFAULT_SUITES)
    path = out or Path("runs") / f"ladder-{target}.json"
    runfile.check_parent(path)
    if install:
        _install(specs)
    known = expectations.beside(selected.suites)

    def expected(loaded: LoadedCase, version: str) -> bool:
        return known.find(loaded.address, target, version) is not None

    with contextlib.closing(Releases()) as releases:
        ladder = climb(target, selected.cases, releases, specs=specs, known=expected, progress=_tell)
    if all(rung.reason for rung in ladder.releases):
        reasons = "; ".join(f"{rung.spec}: {rung.reason}" for rung in ladder.releases)
        raise UsageError(f"no release of {target} can be asked; install some, or give --install ({reasons})")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ladder.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if as_json:
        output.emit_json(LadderOutput(file=str(path), ladder=ladder))
    else:
        _print(ladder, path)


def _specs(target: str, versions: tuple[str, ...]) -> list[str]:
    every = registry.releases(target)
    wanted = {registry.resolve(f"{target}@{version}") for version in versions}
    return [spec for spec in every if spec in wanted or not wanted]


def _install(specs: list[str]) -> None:
    for spec in specs:
        try:
            environments.install(spec, _tell)
        except TargetError as error:
            _tell(f"{spec}: {error}")


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _print(ladder: Ladder, path: Path) -> None:
    ran = [rung for rung in ladder.releases if not rung.reason]
    changing = [row for row in ladder.rows if row.changes]
    rows = [
        (row.case, "".join(_sign(row.cells.get(rung.spec)) for rung in ran), _turns(row, ran))
        for row in changing
    ]
    screen = output.console()
    title = f"{ladder.target}: cases on which releases differ"
    screen.print(output.table(title, ("case", "releases", "changes"), rows))
    screen.print(f"releases: {' '.join(rung.version for rung in ran)}", markup=False, soft_wrap=True)
    steady = [row for row in ladder.rows if not row.changes]
    always = sum(all(cell.verdict == "pass" for cell in row.cells.values()) for row in steady)
    screen.print(_LEGEND, markup=False)
    screen.print(
        f"cases that differ: {len(changing)}; that do not: {len(steady)}, "
        f"of which {always} pass on every release",
        markup=False,
    )
    for rung in ladder.releases:
        if rung.reason:
            screen.print(f"{rung.spec} is left out: {rung.reason}", markup=False, soft_wrap=True)
    screen.print(f"ladder: {path}", markup=False, soft_wrap=True)


def _sign(cell: Cell | None) -> str:
    if cell is None:
        return " "
    if cell.verdict == "fail":
        sign = "S" if cell.whole else "F"
        return sign.lower() if cell.known else sign
    return _SIGNS.get(cell.verdict, cell.verdict)


def _turns(row: LadderRow, ran: Sequence[Rung]) -> str:
    """Where the verdict changes, oldest first."""
    cells = [(rung.version, row.cells[rung.spec]) for rung in ran if rung.spec in row.cells]
    judged = [(version, cell.verdict in GOOD) for version, cell in cells if cell.verdict in (*GOOD, *BAD)]
    return ", ".join(
        f"{'mended' if good else 'broke'} in {version}"
        for (_, before), (version, good) in itertools.pairwise(judged)
        if good != before
    )
