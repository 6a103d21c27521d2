"""`conformance serve`: the dashboard over HTTP, queries as JSON, and ingest of runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from conformance import history
from conformance.backtests import read_findings
from conformance.commands.selection import select
from conformance.commands.store import database_option
from conformance.errors import UsageError
from conformance.faults import record
from conformance.trials.record import read as read_trials

DEFAULT_PORT = 8643
_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
"""A name as requests have it, without a port; `*.` stands for every name below a domain."""
_MIB = 1024 * 1024
_FILE = click.Path(path_type=Path)


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port to listen on; 0 takes one that is free.",
)
@click.option(
    "--remote",
    is_flag=True,
    help="Let other machines ask: anyone who reaches the address reads everything, without TLS.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="HOST",
    help="Name by which the service is called besides its address, such as that of a proxy; may be repeated.",
)
@click.option(
    "--max-upload",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    metavar="MIB",
    help="Mebibytes of a run file that is sent.",
)
@click.option("--suites", "paths", multiple=True, metavar="PATH", help="Suite files or folders of your own.")
@click.option(
    "--ladder", "ladders", multiple=True, type=_FILE, help="What `conformance ladder` wrote; may be repeated."
)
@click.option("--backtests", type=_FILE, help="What `conformance backtest` wrote.")
@click.option("--faults", type=_FILE, help="What `conformance faults measure` wrote.")
@click.option("--trials", type=_FILE, help="What `conformance trial --record` wrote.")
@database_option("The history to serve.  [default: a file in the user's data folder]")
def serve_command(
    host: str,
    port: int,
    remote: bool,
    names: tuple[str, ...],
    max_upload: int,
    paths: tuple[str, ...],
    ladders: tuple[Path, ...],
    backtests: Path | None,
    faults: Path | None,
    trials: Path | None,
    database: str | None,
) -> None:
    """Serve the history of runs: its dashboard, and queries as JSON under /api/v1.

    Takes run files at /api/v1/runs from whoever shows the token that CONFORMANCE_INGEST_TOKEN holds; without
    that variable it takes none. Ends at SIGINT or SIGTERM, once open requests are answered.
    """
    from conformance.service.app import make_app
    from conformance.service.ingest import TOKEN_VARIABLE, Ingest, Token
    from conformance.service.listening import is_loopback, listen, names_of, serve, url_of
    from conformance.service.pages import Dashboard
    from conformance.store.history import Store

    for name in names:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"--name {name}: write a name alone and without a port, "
                "such as gw.example.com, [::1] or *.example.com"
            )
    if not is_loopback(host) and not remote:
        raise UsageError(
            f"--host {host}: other machines could reach this address, and read everything without TLS; "
            "add --remote if they may, or put a proxy in front of 127.0.0.1"
        )
    if host in ("0.0.0.0", "::") and not names:  # noqa: S104  # refused here, not listened on
        raise UsageError(
            f"--host {host}: this is every address of the machine; say by --name HOST how others call it, "
            "because requests that call it by another name are refused"
        )
    # Taken out, so that nothing which is started from here inherits it.
    secret = os.environ.pop(TOKEN_VARIABLE, "")
    token = Token(secret) if secret else None
    suites = select(paths).suites
    steps = [history.read(path) for path in ladders]
    findings = read_findings(backtests) if backtests is not None else None
    found = record.read(faults) if faults is not None else None
    tried = read_trials(trials) if trials is not None else None
    with Store(database, create=token is not None) as store:
        dashboard = Dashboard(
            store, tuple(suites), ladders=steps, backtests=findings, faults=found, trials=tried
        )
        ingest = Ingest(store, token, max_upload * _MIB)
        with listen(host, port) as listening:
            if not is_loopback(host):
                click.echo(f"note: {host} is reached by other machines; nothing is encrypted", err=True)
            click.echo(f"serving {store.name}")
            click.echo(f"at {url_of(listening)}{'' if token else ', taking no runs'}")
            serve(make_app(store, dashboard, ingest, names_of(host, names)), listening)
    click.echo("ended")
