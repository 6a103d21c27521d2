"""What only the numbers and the files can tell about a case of kind `accuracy`: whether its gate can work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from conformance import resources, yamlfile
from conformance.errors import ConformanceError, UsageError
from conformance.gates import baseline, pairing, planning
from conformance.gates.spec import PairedGate
from conformance.gates.suite import AccuracyCase, AccuracySuite
from conformance.scoring import Sheet, SheetHeader

Loc = tuple[str | int, ...]


def check(case: AccuracyCase, folder: Path) -> tuple[Loc, str] | None:
    """Field of a case and what is wrong with it; None if nothing is.

    Args:
        case: It.
        folder: Of its suite.
    """
    try:
        planning.check(case.gate)
    except planning.GateError as error:
        return ("gate", "items"), str(error)
    if isinstance(case.gate, PairedGate):
        try:
            reference(case, case.gate, folder)
        except ConformanceError as error:
            return ("gate", "reference"), str(error)
    return None


def reference(case: AccuracyCase, gate: PairedGate, folder: Path) -> Sheet:
    """The stored reference of a case.

    Raises:
        BaselineError: there is none, it was changed by hand, or it cannot serve this case.
        SheetError, ComparisonError: it is no sheet, or one with items that are there twice, or that name
            clusters which the gate does not declare.
    """
    sheet = baseline.read(baseline.inside(folder, gate.reference))
    baseline.check_reference(gate, sheet)
    pairing.check_clusters(gate.clusters, sheet)
    check_asked(case, sheet.header)
    return sheet


def reference_sha256(case: AccuracyCase, folder: Path) -> str:
    """Digest of the reference's file; empty where there is none."""
    if not isinstance(case.gate, PairedGate):
        return ""
    path = baseline.inside(folder, case.gate.reference)
    return baseline.file_sha256(path) if path.is_file() else ""


def check_asked(case: AccuracyCase, header: SheetHeader) -> None:
    """Refuse a sheet that was made in another way than the case declares.

    Raises:
        BaselineError: names the field and both values.
    """
    for name, declared, found in _differences(case, header):
        raise baseline.BaselineError(
            f"the case has {name} {declared!r} and the reference {found!r}; make them equal, or "
            f"{baseline.AGAIN}"
        )


def _differences(case: AccuracyCase, header: SheetHeader) -> Iterator[tuple[str, object, object]]:
    for name in ("task", "thinking", "seed", "order_seed", "filter", "shots", "max_new_tokens"):
        declared, found = getattr(case, name), getattr(header, name)
        if declared is not None and declared != found:
            yield name, declared, found
    same_weights = not (isinstance(case.gate, PairedGate) and case.gate.other_checkpoint)
    name = case.checkpoint.rpartition("/")[2]
    if same_weights and header.checkpoint.rpartition("/")[2] != name:
        yield "checkpoint", case.checkpoint, header.checkpoint


def find_case(argument: str) -> tuple[AccuracyCase, Path]:
    """One case and its suite's file, read without asking whether its gate can work.

    So a gate can be planned, and its first reference made.

    Args:
        argument: `FILE::case-id`, or `suite-id::case-id` of a bundled suite.

    Raises:
        SuiteError: the file is no suite of this kind.
        UsageError: there is no such file or case.
    """
    name, _, case_id = argument.partition("::")
    path = Path(name)
    if not path.is_file():
        path = resources.suites_dir() / f"{name}.yaml"
    if not path.is_file() or not case_id:
        raise UsageError(f"{argument!r} names no case; write FILE::case-id, or suite-id::case-id")
    document = yamlfile.read(path)
    if not isinstance(document.value, dict) or document.value.get("kind") != "accuracy":
        raise document.error(("kind",), "expected a suite of kind accuracy")
    suite = document.validate(AccuracySuite)
    for case in suite.cases:
        if case.id == case_id:
            return case, path
    known = ", ".join(case.id for case in suite.cases)
    raise UsageError(f"{path}: no case {case_id!r}; there are {known}")
