"""`conformance …`: the command line. The only place that ends the process.

Exit codes: 2 wrong use, broken suites or nothing collected; else 1 any fail, xpass, error or
timeout; else 3 any inconclusive; else 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

import conformance
from conformance.commands.backtest import backtest_command
from conformance.commands.bisect import bisect_command
from conformance.commands.checkpoints import checkpoints_group
from conformance.commands.faults import faults_group
from conformance.commands.gate import gate_group
from conformance.commands.ladder import ladder_command
from conformance.commands.listing import list_command
from conformance.commands.matrix import matrix_group
from conformance.commands.new_case import new_case_command
from conformance.commands.nightly import nightly_command
from conformance.commands.probe import probe_command
from conformance.commands.report import report_command
from conformance.commands.requests import requests_command
from conformance.commands.run import run_command
from conformance.commands.schema import schema_command
from conformance.commands.serve import serve_command
from conformance.commands.show import show_command
from conformance.commands.store import store_group
from conformance.commands.targets import targets_group
from conformance.commands.trial import trial_group
from conformance.errors import ConformanceError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(conformance.__version__, prog_name="conformance")
def cli() -> None:
    """Conformance of Gemma 4 implementations: run suites on targets, and report."""


for command in (
    run_command,
    probe_command,
    list_command,
    show_command,
    report_command,
    targets_group,
    requests_command,
    schema_command,
    new_case_command,
    faults_group,
    trial_group,
    checkpoints_group,
    nightly_command,
    ladder_command,
    bisect_command,
    backtest_command,
    store_group,
    serve_command,
    gate_group,
    matrix_group,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    # As `python -m` does: `--target package.module:Class` finds a package in the working directory.
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors of the user become one message."""
    try:
        code = cli.main(arguments, prog_name="conformance", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except ConformanceError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except click.Abort:
        click.echo("interrupted", err=True)
        return 2
    return code if isinstance(code, int) else 0
