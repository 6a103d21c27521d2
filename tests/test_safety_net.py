"""The nets under all tests hold: no network, and no skip without permission."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import pytest_socket

from tests.conftest import PERMITTED, Run, Suites


def test_other_machines_cannot_be_reached() -> None:
    with pytest.raises(pytest_socket.SocketConnectBlockedError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_this_machine_can(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
@pytest.mark.parametrize(
    ("skip", "code"),
    [
        ("import pytest\ndef test_it(): pytest.skip('too hard')", 1),
        ("import pytest\npytest.skip('no GPU', allow_module_level=True)", 1),
        ("import pytest\ndef test_it(): pytest.xfail('known')", 0),
    ],
)
def test_a_skip_that_is_not_listed_fails_the_session(
    run_pytest: Run, tmp_path: Path, skip: str, code: int, workers: tuple[str, ...]
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_configure\n")
    (tmp_path / "test_skip.py").write_text(f"{skip}\n")
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    done = run_pytest(tmp_path, *workers)
    assert done.returncode == code, done.stdout
    assert ("SKIP NOT PERMITTED" in done.stdout) is (code == 1)


def test_an_inconclusive_case_is_no_skip(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_configure\n")
    suites.write("hello")
    done = run_pytest(".", "--target", "lying_targets:unsure")
    assert "SKIP NOT PERMITTED" not in done.stdout
    assert done.returncode == 3


def test_every_permission_gives_a_reason() -> None:
    assert all(set(entry) == {"test", "reason", "why"} and len(entry["why"]) > 20 for entry in PERMITTED)
