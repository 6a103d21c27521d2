"""`conformance gate`: plan gates, run them, compare two sheets, replace a reference."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import ValidationError
from rich.console import Console

from conformance import runfile
from conformance.commands import output
from conformance.commands.output import (
    ChancesRow,
    GateCompareOutput,
    GatePlanOutput,
    GateRow,
    GateRunOutput,
    PlanRow,
    RebaselineOutput,
    SensitivityCheckOutput,
    SensitivityOutput,
    SensitivityRow,
    json_option,
)
from conformance.commands.run import execute, print_summary, seconds, summarise
from conformance.commands.selection import Selected, select
from conformance.errors import UsageError
from conformance.gates.decision import Decision
from conformance.gates.spec import PairedGate, PairedRule, Rule
from conformance.gates.suite import AccuracyCase
from conformance.loading import LoadedSuites, load_suites
from conformance.recording import new_run_id
from conformance.results import Run, exit_code
from conformance.runner import DEFAULT_TIMEOUT
from conformance.scoring import Sheet
from conformance.session import select_targets

_R = TypeVar("_R", bound=Rule)
_FILE = click.Path(path_type=Path)
_DROPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""True drops of a plan's table, in margins."""
_UNSAFE = re.compile(r"[^A-Za-z0-9.@-]+")


@click.group("gate")
def gate_group() -> None:
    """Accuracy gates: what they can detect, and what they say. See docs/gates.md."""


# ---------------------------------------------------------------------------- plan


@gate_group.command("plan")
@click.argument("cases", nargs=-1, required=True)
@click.option("--items", type=int, help="Instead of the case's own number.")
@click.option("--margin", type=float, help="Instead of the case's own; 0.02 is two points.")
@click.option("--discordance", type=float, help="Instead of the case's own, of a paired gate.")
@json_option
@click.pass_context
def plan_command(
    context: click.Context,
    cases: tuple[str, ...],
    items: int | None,
    margin: float | None,
    discordance: float | None,
    as_json: bool,
) -> None:
    """Tell what the gates of CASES (FILE::case-id, or suite-id::case-id) can detect, and what they need.

    Exits with 1 if one of them cannot reach its margin.
    """
    from conformance.gates.loading import find_case

    changes = {"items": items, "margin": margin, "discordance": discordance}
    given = {name: value for name, value in changes.items() if value is not None}
    rows = []
    for argument in cases:
        case, _ = find_case(argument)
        rows.append(_plan_row(argument, _changed(case.gate, given)))
    if as_json:
        output.emit_json(GatePlanOutput(plans=tuple(rows)))
    else:
        for row in rows:
            _print_plan(row)
    context.exit(0 if all(row.reaches for row in rows) else 1)


def _changed(rule: Rule, changes: dict[str, Any]) -> Rule:
    unknown = set(changes) - set(type(rule).model_fields)
    if unknown:
        raise UsageError(f"an unpaired gate has no {', '.join(unknown)}")
    return _validated(type(rule), rule.model_dump() | changes)


def _plan_row(address: str, rule: Rule) -> PlanRow:
    from conformance.gates import planning
    from conformance.gates.multiplicity import false_alarms_a_year

    plan = planning.make_plan(rule)
    return PlanRow(
        address=address,
        kind="paired" if isinstance(rule, PairedRule) else "unpaired",
        items=rule.items,
        margin=rule.margin,
        floor=rule.floor,
        alpha=rule.alpha,
        power=rule.power,
        reaches=plan.reaches(rule),
        needed=plan.needed,
        detectable=plan.detectable,
        certifiable=plan.certifiable,
        chances=tuple(
            ChancesRow(
                drop=drop,
                passes=found.passes,
                fails=found.fails,
                inconclusive=found.inconclusive,
                alarms=found.alarms,
            )
            for drop in (rule.margin * part for part in _DROPS)
            for found in (planning.chances(rule, drop),)
        ),
        false_alarms_a_year=false_alarms_a_year(plan.at_zero.fails),
    )


def _print_plan(row: PlanRow) -> None:
    from conformance.gates.planning import points

    screen = output.console()
    reach = "reaches its margin" if row.reaches else "CANNOT reach its margin"
    lines = (
        f"{row.address} ({row.kind}) {reach}",
        f"  {row.items} items, margin {points(row.margin)}, floor {points(row.floor)}",
        f"  alpha {row.alpha:g}, power {row.power:g}",
        f"  items needed: {row.needed if row.needed is not None else 'more than a million'}",
        f"  least drop that fails with this power (MDE): {points(row.detectable)}",
        f"  least margin that no drop passes with this power: {points(row.certifiable)}",
        f"  false failures a year, run every night: {row.false_alarms_a_year:.1f}",
    )
    for line in lines:
        screen.print(line, markup=False, soft_wrap=True)
    columns = ("true drop", "passes", "fails", "inconclusive", "alarms")
    rows = (
        (points(c.drop), *(f"{value:.3f}" for value in (c.passes, c.fails, c.inconclusive, c.alarms)))
        for c in row.chances
    )
    screen.print(output.table("chances of each verdict", columns, rows))


# ---------------------------------------------------------------------------- run


@gate_group.command("run")
@click.argument("cases", nargs=-1)
@click.option("--target", "-t", "targets", multiple=True, metavar="SPEC", help="Target; may be repeated.")
@click.option("--out", type=_FILE, help="Run file to write.  [default: runs/<id>.jsonl]")
@click.option("--sheets", type=_FILE, help="Folder for the sheets of scored answers.")
@click.option(
    "--timeout",
    default=DEFAULT_TIMEOUT,
    show_default=True,
    callback=seconds,
    help="Seconds for one request, besides what a model takes.",
)
@json_option
@click.pass_context
def run_command(
    context: click.Context,
    cases: tuple[str, ...],
    targets: tuple[str, ...],
    out: Path | None,
    sheets: Path | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Ask, score and judge the accuracy cases among CASES (default: all bundled ones).

    Exits as `conformance run` does: 1 for a failure, else 3 for anything inconclusive, else 0.
    """
    path = out or Path("runs") / f"{new_run_id()}.jsonl"
    runfile.check_new(path)
    selected = _accuracy_cases(cases)
    select_targets(targets)
    code = execute(selected, targets, path, timeout=timeout)
    if not path.exists():
        context.exit(code)
    run = runfile.read(path)
    rows = _gate_rows(run, sheets)
    summary = summarise(run, path, code)
    if as_json:
        output.emit_json(GateRunOutput(run=summary, gates=rows))
    else:
        _print_gates(output.console(), rows)
        print_summary(summary)
    context.exit(code)


def _accuracy_cases(arguments: Sequence[str]) -> Selected:
    selected = select(arguments)
    cases = tuple(case for case in selected.cases if isinstance(case.case, AccuracyCase))
    if not cases:
        raise UsageError("no accuracy cases are named; `conformance list cases` names them")
    wanted = {case.suite.suite.id for case in cases}
    return Selected(LoadedSuites(tuple(s for s in selected.suites if s.suite.id in wanted)), cases)


def _gate_rows(run: Run, sheets: Path | None) -> tuple[GateRow, ...]:
    from conformance.gates.multiplicity import benjamini_hochberg, holm

    results = list(run.latest().values())
    decisions = [r.evidence.accuracy.decision if r.evidence.accuracy is not None else None for r in results]
    known = [n for n, d in enumerate(decisions) if d is not None and d.p_value is not None]
    p_values = [d.p_value for d in decisions if d is not None and d.p_value is not None]
    together = dict(zip(known, zip(holm(p_values), benjamini_hochberg(p_values), strict=True), strict=True))
    rows = []
    for number, (result, decision) in enumerate(zip(results, decisions, strict=True)):
        path = None
        if sheets is not None and result.evidence.accuracy is not None:
            sheets.mkdir(parents=True, exist_ok=True)
            path = sheets / f"{_UNSAFE.sub('-', f'{result.suite}.{result.case}.{result.target}')}.jsonl"
            result.evidence.accuracy.sheet.write(path)
        adjusted = together.get(number)
        rows.append(
            GateRow(
                address=f"{result.suite}::{result.case}",
                target=result.target,
                verdict=result.verdict,
                reason=result.reason,
                decision=decision,
                holm=adjusted[0] if adjusted else None,
                benjamini_hochberg=adjusted[1] if adjusted else None,
                sheet=str(path) if path is not None else None,
            )
        )
    return tuple(rows)


def _print_gates(screen: Console, rows: Sequence[GateRow]) -> None:
    together = sum(row.holm is not None for row in rows)
    for row in rows:
        said = row.decision.sentence if row.decision is not None else f"{row.verdict}: {row.reason}"
        screen.print(f"{row.address} [{row.target}]", markup=False, soft_wrap=True)
        screen.print(f"  {said}", markup=False, soft_wrap=True)
        if row.decision is not None:
            counts = ", ".join(f"{count} {name}" for name, count in row.decision.outcomes.items() if count)
            screen.print(f"  {counts}", markup=False, soft_wrap=True)
        if row.holm is not None and together > 1:
            screen.print(
                f"  among {together} gates: p = {row.holm:.2g} (Holm), {row.benjamini_hochberg:.2g} "
                "(Benjamini-Hochberg)",
                markup=False,
                soft_wrap=True,
            )
        if row.sheet is not None:
            screen.print(f"  sheet: {row.sheet}", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------- compare


def _rule_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--case", "case_name", metavar="CASE", help="Take the gate of this case."),
            click.option("--margin", type=float, help="A drop that must not pass; 0.02 is two points."),
            click.option("--floor", type=float, help="A drop that does not matter.  [default: margin / 4]"),
            click.option("--alpha", type=float, help="[default: 0.05]"),
            click.option("--power", type=float, help="[default: 0.8]"),
            click.option("--discordance", type=float, help="Expected share.  [default: 0.02]"),
            click.option(
                "--clusters",
                type=click.Choice(["all"]),
                help="The groups that items name are all there are; else they count as a sample of more.",
            ),
            click.option("--mid-p", is_flag=True, default=None, help="McNemar's mid-p test."),
            click.option(
                "--other-checkpoint", is_flag=True, default=None, help="The two may have other weights."
            ),
        )
    ):
        command = option(command)
    return command


@gate_group.command("compare")
@click.argument("reference", type=_FILE)
@click.argument("target", type=_FILE)
@_rule_options
@json_option
@click.pass_context
def compare_command(
    context: click.Context,
    /,
    reference: Path,
    target: Path,
    case_name: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare two sheets of the same items, REFERENCE and TARGET, by the rule of a gate.

    Exits with 1 if the target fails, 3 if nothing can be told, else 0.
    """
    from conformance.gates.decide import decide

    first, second = Sheet.read(reference), Sheet.read(target)
    rule = _comparison_rule(case_name, {k: v for k, v in options.items() if v is not None}, first, second)
    decision = decide(rule, first, second)
    row = _plan_row(f"{reference} and {target}", rule)
    if as_json:
        output.emit_json(GateCompareOutput(decision=decision, plan=row))
    else:
        _print_decision(decision)
        if not row.reaches:
            _print_plan(row)
    context.exit(exit_code([decision.verdict]))


def _comparison_rule(
    case_name: str | None, options: dict[str, Any], first: Sheet, second: Sheet
) -> PairedRule:
    """The rule of a case, or of options; clusters that the items name count unless told otherwise."""
    from conformance.gates.decide import measured_clusters
    from conformance.gates.loading import find_case

    if case_name is not None:
        case, _ = find_case(case_name)
        if options or not isinstance(case.gate, PairedGate):
            raise UsageError("--case names a paired gate, and no other option goes with it")
        return case.gate
    if "margin" not in options:
        raise UsageError("give --margin, or the gate of a case by --case")
    defaults = {"floor": options["margin"] / 4, "discordance": 0.02, "items": len(first.items)}
    if "clusters" not in options:
        defaults |= measured_clusters(first, second)
    return _validated(PairedRule, defaults | options)


def _validated(kind: type[_R], fields: dict[str, Any]) -> _R:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        raise UsageError(f"{name}{first['msg']}") from None


def _print_decision(decision: Decision) -> None:
    screen = output.console()
    screen.print(decision.sentence, markup=False, soft_wrap=True)
    if decision.design_effect is not None:
        screen.print(f"design effect of {decision.clusters} clusters: {decision.design_effect:.2f}")
    for name, ids in (("lost", decision.lost), ("gained", decision.gained)):
        if ids:
            screen.print(f"{name}: {', '.join(ids)}", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------- sensitivity


@gate_group.command("sensitivity")
@click.argument("cases", nargs=-1, required=True)
@click.option("--fault", "faults", multiple=True, metavar="ID", help="Instead of the usual eleven.")
@click.option("--tensors/--no-tensors", default=True, help="Also run suites of tensors and masks.")
@click.option(
    "--record", "path", type=_FILE, help="Keep what is measured, in place of the same faults and gates there."
)
@json_option
@click.pass_context
def sensitivity_command(
    context: click.Context,
    cases: tuple[str, ...],
    faults: tuple[str, ...],
    tensors: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Switch known bugs on in the bundled implementation, and see what the gates of CASES make of each.

    Prints a table in Markdown. Exits with 1 if suites of tensors and masks miss a fault.
    """
    from conformance import expectations
    from conformance.faults import select as select_faults
    from conformance.gates import record, sensitivity

    chosen = select_faults(faults or sensitivity.FAULTS)
    gates = _accuracy_cases(cases).cases
    suites = load_suites() if tensors else None
    known = expectations.load(suites) if suites is not None else expectations.Expectations()
    if path is not None and path.exists():
        record.read(path)  # before minutes of work
    rest_on = record.Grounds(chosen, gates, suites) if path is not None else None
    found = sensitivity.measure(
        chosen, gates, suites, known, progress=lambda line: click.echo(line, err=True)
    )
    if path is not None and rest_on is not None:
        record.keep(path, found, rest_on)
    if as_json:
        caught = sum(row.caught for row in found)
        output.emit_json(SensitivityOutput(faults=tuple(found), caught=caught))
    else:
        click.echo(sensitivity.markdown(found), nl=False)
    context.exit(1 if any(row.tensors == () for row in found) else 0)


@gate_group.command("check-sensitivity")
@click.argument("file", required=False, type=_FILE)
@json_option
@click.pass_context
def check_sensitivity_command(context: click.Context, file: Path | None, as_json: bool) -> None:
    """Check whether a record of `sensitivity` (default: the committed one) still holds; nothing is run.

    Exits with 3 if some of it must be measured again, or something of the usual faults and bundled nano gates
    was never measured.
    """
    from conformance.faults import registry
    from conformance.gates import record, sensitivity

    path = file or record.default_path()
    gates = select((sensitivity.GATES,)).cases
    held = record.check(record.read(path), sensitivity.FAULTS, registry(), gates, load_suites())
    stale = tuple(
        SensitivityRow(fault=fault, case=case, reason=why) for (fault, case), why in held.items() if why
    )
    if as_json:
        output.emit_json(SensitivityCheckOutput(file=str(path), cells=len(held), stale=stale))
    else:
        for reason in dict.fromkeys(row.reason for row in stale):
            these = [row for row in stale if row.reason == reason]
            which = ", ".join(dict.fromkeys(row.case for row in these))
            click.echo(f"{len(these)} cells to be measured, as each {reason}: {which}")
        click.echo(f"{len(held) - len(stale)} of {len(held)} cells hold")
    context.exit(3 if stale else 0)


# ---------------------------------------------------------------------------- rebaseline


@gate_group.command("rebaseline")
@click.argument("case_name", metavar="CASE")
@click.option("--sheet", "sheet_path", type=_FILE, help="Answers that are there already.")
@click.option("--target", "-t", "spec", metavar="SPEC", help="Ask this target.  [default: reference]")
@click.option("--reason", required=True, help="Why, in a sentence; it is kept.")
@click.option(
    "--accept-drop",
    is_flag=True,
    help="Replace it though the comparison does not pass, or drops have added up to the margin.",
)
@click.option("--allow-dirty", is_flag=True, help="Though sources were changed since their commit.")
@json_option
@click.pass_context
def rebaseline_command(
    context: click.Context,
    case_name: str,
    sheet_path: Path | None,
    spec: str | None,
    reason: str,
    accept_drop: bool,
    allow_dirty: bool,
    as_json: bool,
) -> None:
    """Make the stored reference of CASE, or replace it and keep a paired comparison with the old one.

    The comparison stands beside the reference, and belongs into the same change. Exits with 1, and changes
    nothing, if the new one does not pass against the old one, or if the drops of all replacements so far have
    added up to the margin (unless --accept-drop is given).
    """
    from conformance import fingerprint
    from conformance.gates import baseline
    from conformance.gates.decide import decide
    from conformance.gates.loading import check_asked, find_case

    case, suite = find_case(case_name)
    gate = case.gate
    if not isinstance(gate, PairedGate):
        raise UsageError(f"{case_name}: an unpaired gate has no reference")
    if sheet_path is not None and spec is not None:
        raise UsageError("--sheet has the answers already; leave out --target")
    # Before any question is asked, which takes minutes.
    if len(reason.strip()) < baseline.SHORTEST_REASON:
        raise UsageError(
            f"--reason {reason!r} is kept beside the reference; say why in {baseline.SHORTEST_REASON} "
            "characters or more"
        )
    path = baseline.inside(suite.parent, gate.reference)
    old = baseline.current(path)
    given = Sheet.read(sheet_path) if sheet_path is not None else None
    if not allow_dirty:
        commit = given.header.commit if given else fingerprint.git_commit(but_references=True)
        baseline.check_sources(commit)
    new = given or _asked(case, spec or "reference")
    baseline.check_reference(gate, new)
    check_asked(case, new.header)
    # New answers may have other words; how much worse they are is what must not pass.
    rule = gate.model_copy(update={"other_checkpoint": True, "max_texts_differ": None})
    decision = decide(rule, old, new) if old else None
    total = baseline.adds_up(path, decision) if decision is not None else None
    too_much = total is not None and baseline.too_much(total, gate)
    good = decision is None or (decision.verdict == "pass" and not too_much)
    replaced = good or accept_drop
    if replaced:
        baseline.store(path, new, reason=reason, comparison=decision, accepted=not good)
    said = RebaselineOutput(
        reference=str(path),
        record=str(baseline.record_path(path)),
        replaced=replaced,
        decision=decision,
        total_drop=total,
    )
    if as_json:
        output.emit_json(said)
    else:
        if decision is not None:
            _print_decision(decision)
        if total is not None:
            _print_total(total, gate, too_much=too_much)
        done = "written" if replaced else "NOT replaced; look into it, or give --accept-drop"
        output.console().print(f"{path}: {done}", markup=False, soft_wrap=True)
    context.exit(0 if replaced else 1)


def _print_total(total: float, gate: PairedGate, *, too_much: bool) -> None:
    from conformance.gates.planning import points

    reached = ": together they must not pass, though each may have" if too_much else ""
    output.console().print(
        f"with this one, the drops of its history add up to {points(total)} (margin {points(gate.margin)})"
        f"{reached}",
        markup=False,
        soft_wrap=True,
    )


def _asked(case: AccuracyCase, spec: str) -> Sheet:
    """Ask a target all items of a case, with a bar on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from conformance.gates import asking
    from conformance.targets import registry

    checkpoint = asking.find_checkpoint(case.checkpoint)
    (resolved,) = select_targets([spec]).specs
    whole = case.model_copy(update={"gate": case.gate.model_copy(update={"stop_alpha": None})})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        _opened(registry.open_target(resolved)) as target,
        Progress(*columns, console=Console(stderr=True)) as bars,
    ):
        bar = bars.add_task(resolved, total=case.gate.items)
        return asking.ask(
            whole, target, checkpoint, progress=lambda done, _total: bars.update(bar, completed=done)
        )


@contextlib.contextmanager
def _opened(target: Any) -> Iterator[Any]:
    try:
        yield target
    finally:
        target.close()
