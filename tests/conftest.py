"""Shared by all tests: the command line as a fixture, no network, deadlines, no skip without permission."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import pytest_socket

from conformance.plugin import report_verdict
from tests.deadlines import Deadlines, watch

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PERMITTED = tomllib.loads((TESTS / "permitted_skips.toml").read_text(encoding="utf-8")).get("skip", [])
SUBPROCESS_TIMEOUT = 240

# ---------------------------------------------------------------------------- safety nets

# A shell's background job ignores interrupts, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines that run tests are shared and slow; time is limited by test runs, not by examples.
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests reach this machine only; pytest-socket lifts the limit after each test."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)


@dataclass(eq=False)
class SkipGuard:
    """Fails a session in which something was skipped that tests/permitted_skips.toml does not list."""

    refused: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and report_verdict(report) != "inconclusive":
            self._check(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._check(report)

    def _check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(_permits(entry, report.nodeid, reason) for entry in PERMITTED):
            self.refused.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.refused:
            terminalreporter.write_line(f"SKIP NOT PERMITTED (tests/permitted_skips.toml): {line}", red=True)


def _permits(entry: Mapping[str, str], node_id: str, reason: str) -> bool:
    """Whether an entry covers a skip; in `test`, `*` stands for any text."""
    pattern = re.escape(entry["test"]).replace(r"\*", ".*")
    return re.fullmatch(pattern, node_id, re.DOTALL) is not None and entry["reason"] in reason


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipGuard(), "skip-guard")
    loaded = config.pluginmanager.hasplugin
    if loaded("timeout") or loaded("pytest_timeout"):  # sessions that tests start load few plugins
        deadlines = Deadlines()
        config.pluginmanager.register(deadlines, "deadlines")
        watch(deadlines.started)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server that gives empty databases: `tests.postgres.Server`."""
    from tests.postgres import server

    with server() as started:
        yield started


# ---------------------------------------------------------------------------- front door


@dataclass
class Suites:
    """A folder of small suites whose right answer is: content is the output."""

    root: Path

    def write(self, *outputs: str, suite: str = "parser/demo", **changes: str) -> Path:
        """A suite with one case per output; the case `case-hello` has the output `hello`."""
        path = self.root / f"{suite}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "id": suite,
            "kind": "parser",
            "title": "Demo",
            "description": "Made by a test.",
            "area": "demo",
        } | changes
        lines = [f"{key}: {value}" for key, value in head.items()] + ["cases:"]
        for output in outputs:
            lines += [
                f"  - id: case-{output}",
                "    title: Content is the whole output.",
                "    source: [R02]",
                f"    output: {output}",
                f"    expect: {{content: {output}}}",
            ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def expect(self, text: str, target: str = "lying_targets:Lying") -> Path:
        """An expectations file."""
        path = self.root / "expectations" / f"{target}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"target: {target}\nexpectations:\n{text}", encoding="utf-8")
        return path


@pytest.fixture
def suites(tmp_path: Path) -> Suites:
    root = tmp_path / "suites"
    root.mkdir()
    return Suites(root)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment of a subprocess that can import the fake targets."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_"))}
    path = [str(TESTS), str(ROOT), variables.get("PYTHONPATH", "")]
    return variables | {"PYTHONPATH": os.pathsep.join(p for p in path if p), "COLUMNS": "200"}


def _runner(arguments: list[str], cwd: Path, environment: dict[str, str]) -> Run:
    def run(*more: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*arguments, *map(str, more)],
            cwd=cwd,
            env=environment | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=SUBPROCESS_TIMEOUT,
            check=False,
        )

    return run


@pytest.fixture
def run_conformance(tmp_path: Path, environment: dict[str, str]) -> Run:
    """`conformance …` in an empty folder."""
    return _runner([sys.executable, "-m", "conformance"], tmp_path, environment)


@pytest.fixture
def run_pytest(tmp_path: Path, environment: dict[str, str]) -> Run:
    """`pytest …` in an empty folder, with the plugin named by module so that no install is needed.

    Plugins of the development tools are left out: they take longer to load than most of these runs.
    """
    plugins = ["-p", "conformance.plugin", "-p", "xdist.plugin"]
    alone = environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return _runner([sys.executable, "-m", "pytest", *plugins], tmp_path, alone)


@pytest.fixture
def unchanged(suites: Suites) -> Iterator[Path]:
    """A file that the test must leave as it is."""
    path = suites.write("hello")
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
