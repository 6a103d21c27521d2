"""`conformance schema`: JSON Schemas of every file and output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from conformance import expectations, loading, matrix, runfile
from conformance.commands import output, requests, trial_output
from conformance.targets import recordings

OUTPUTS: dict[str, type[output.Output]] = {
    "list": output.ListOutput,
    "show": output.ShowOutput,
    "run": output.RunOutput,
    "probe": output.ProbeOutput,
    "report": output.ReportOutput,
    "store-merge": output.StoreMergeOutput,
    "store-compare": output.StoreCompareOutput,
    "store-list": output.StoreListOutput,
    "store-show": output.StoreShowOutput,
    "store-history": output.StoreHistoryOutput,
    "gate-plan": output.GatePlanOutput,
    "gate-run": output.GateRunOutput,
    "gate-compare": output.GateCompareOutput,
    "gate-rebaseline": output.RebaselineOutput,
    "gate-sensitivity": output.SensitivityOutput,
    "gate-check-sensitivity": output.SensitivityCheckOutput,
    "targets": output.TargetsOutput,
    "doctor": output.DoctorOutput,
    "new-case": output.NewCaseOutput,
    "faults": trial_output.FaultsOutput,
    "faults-measure": trial_output.FaultsMeasureOutput,
    "faults-check": trial_output.FaultsCheckOutput,
    "trial-clean": trial_output.CleanOutput,
    "trial-kill": trial_output.KillOutput,
    "trial-check": trial_output.TrialCheckOutput,
    "checkpoints-check": trial_output.CheckpointsCheckOutput,
    "nightly": trial_output.NightlyOutput,
    "ladder": output.LadderOutput,
    "bisect": output.BisectOutput,
    "backtest": output.BacktestOutput,
    "matrix-show": output.MatrixShowOutput,
    "matrix-run": output.MatrixRunOutput,
    "matrix-measure": output.MatrixMeasureOutput,
    "matrix-check": output.MatrixCheckOutput,
}
"""Model of each command's output, under the name of its schema."""


def _output_schema(model: type[output.Output]) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def _openapi() -> dict[str, Any]:
    from conformance.service.app import api_app

    return api_app().openapi()


def schemas() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of each schema to what makes it; `conformance/schemas/NAME.schema.json` holds a copy."""
    files = {
        "suite": loading.json_schema,
        "expectations": expectations.json_schema,
        "matrix": matrix.json_schema,
        "run-file": runfile.json_schema,
        "replay": recordings.json_schema,
        "requests": requests.json_schema,
        "openapi": _openapi,
    }
    outputs = {name: (lambda model=model: _output_schema(model)) for name, model in OUTPUTS.items()}
    return files | outputs


def schema_text(name: str) -> str:
    """One schema as it is printed and committed."""
    return json.dumps(schemas()[name](), indent=2, ensure_ascii=False) + "\n"


@click.command("schema")
@click.argument("name", type=click.Choice(sorted(schemas())), required=False)
def schema_command(name: str | None) -> None:
    """Print the JSON Schema of a suite, an expectations file, a line of some file, or an output.

    `openapi` is the document of the service's API. Without NAME, print the names.
    """
    click.echo(schema_text(name) if name is not None else "\n".join(sorted(schemas())) + "\n", nl=False)
