"""`conformance serve` in a process of its own: limits on the wire, two writers, its end, its refusals."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from conformance.service.listening import is_loopback
from conformance.store.history import Store
from tests.history_runs import accuracy_result, decision, footer, header, items_of, result, sheet
from tests.services import SENDER, TOKEN, Running, lines, logged, running

FILE = lines(header(), result("a"), footer())
RUNS = "/api/v1/runs"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    with running(folder, f"sqlite:///{folder}/history.sqlite", options=["--max-upload", "1"]) as found:
        yield found


def connect(served: Running) -> socket.socket:
    where = urlsplit(served.url)
    return socket.create_connection((where.hostname, where.port), timeout=60)


def head(*more: str, token: str = TOKEN) -> bytes:
    said = [f"POST {RUNS} HTTP/1.1", "Host: localhost", "Content-Type: application/x-ndjson"]
    return "\r\n".join([*said, f"Authorization: Bearer {token}", *more, "", ""]).encode()


def answer_of(connection: socket.socket) -> tuple[int, dict]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def send(url: str, content: bytes) -> dict:
    answer = httpx2.post(url + RUNS, content=content, headers=SENDER, timeout=120)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def test_a_body_without_an_end_is_cut_off_at_the_limit(served: Running) -> None:
    """1 MiB may be sent; who sends on without saying how much is told so long before 64 MiB."""
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with connect(served) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(17):
                connection.sendall(chunk)
        assert answer_of(connection)[0] == 413
        # The rest is not read: the connection is closed.
        connection.settimeout(60)
        with contextlib.suppress(ConnectionError):
            for _ in range(1024):
                connection.sendall(chunk)
            pytest.fail("the service read on")


def test_an_announced_body_above_the_limit_is_refused_unread(served: Running) -> None:
    with connect(served) as connection:
        connection.sendall(head("Content-Length: 1048577"))
        assert answer_of(connection)[0] == 413


def test_a_sender_without_the_token_is_refused_before_the_body(served: Running) -> None:
    with connect(served) as connection:
        connection.sendall(head("Content-Length: 1000", token="wrong"))
        assert answer_of(connection)[0] == 401


def test_a_body_that_breaks_off_leaves_nothing(served: Running) -> None:
    with connect(served) as connection:
        connection.sendall(head(f"Content-Length: {len(FILE) + 1}") + FILE)
    with connect(served) as connection:
        connection.sendall(head("Content-Length: 3") + b"{}\n")
        assert answer_of(connection)[0] == 422
    assert httpx2.get(served.url + RUNS).json()["total"] == 0


def test_a_connection_without_a_request_is_closed_and_a_slow_request_is_not(served: Running) -> None:
    with connect(served) as slow, connect(served) as silent, connect(served) as second:
        slow.sendall(head("Content-Length: 3"))
        second.sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_of(second)[0] == 200
        second.sendall(b"GET /api/v1/health HT")
        for connection in (silent, second):
            assert connection.recv(1) == b""
        slow.sendall(b"{}\n")
        assert answer_of(slow)[0] == 422


def test_two_services_on_one_database_lose_nothing(tmp_path: Path) -> None:
    """They also race to make it, and a third writer merges files beside them."""
    url = f"sqlite:///{tmp_path}/history.sqlite"
    answers = sheet(items_of({"correct": 20, "wrong": 5}))
    files = [
        lines(
            header(f"run-{n}", f"2026-11-{n + 1:02}T02:00:00+00:00"),
            accuracy_result(answers, decision(answers)),
            result("b"),
            footer(),
        )
        for n in range(10)
    ]
    shared = lines(header("shared"), result("a"), result("b"), footer())
    with (
        running(tmp_path / "one", url) as one,
        running(tmp_path / "two", url) as two,
        ThreadPoolExecutor(4) as senders,
    ):
        both = (one.url, two.url)
        sent = [senders.submit(send, both[n % 2], file) for n, file in enumerate(files)]
        sent += [senders.submit(send, where, shared) for where in both * 2]
        told = [one_of.result(timeout=120) for one_of in sent]
        # What one was sent, the other shows.
        for where in both:
            assert httpx2.get(where + RUNS, timeout=60).json()["total"] == 11
        assert one.end() == two.end() == 0
    assert sum(answer["added"] for answer in told) == 22
    with Store(url) as store:
        assert all(run.counts == {"pass": 2} for run in store.runs())
        assert store.revision() == 11
        assert len(store.run("run-7").latest()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told_and_answers_what_is_open(tmp_path: Path, number: signal.Signals) -> None:
    url = f"sqlite:///{tmp_path}/history.sqlite"
    with running(tmp_path / "served", url) as service:
        with connect(service) as connection:
            connection.sendall(head(f"Content-Length: {len(FILE)}") + FILE[:50])
            # Asked on another connection: the first one is being read by now.
            assert httpx2.get(service.url + "/api/v1/health").json()["status"] == "ok"
            service.process.send_signal(number)
            connection.sendall(FILE[50:])
            assert answer_of(connection)[0] == 201
        assert service.process.wait(timeout=60) == 0
        log = service.log.read_text()
        assert "Traceback" not in log
        assert TOKEN not in log
        assert "POST /api/v1/runs 201" in log
        assert "ended" in (tmp_path / "served" / "out").read_text()


def test_the_log_has_no_token_wherever_it_was_put(served: Running) -> None:
    httpx2.get(f"{served.url}{RUNS}?token={TOKEN}".replace(" ", "+"), headers={"Cookie": f"t={TOKEN}"})
    httpx2.post(served.url + RUNS, headers={"Authorization": f"Bearer {TOKEN}"})
    log = logged(served, "POST /api/v1/runs 415")
    assert TOKEN not in log
    assert TOKEN.replace(" ", "+") not in log


# ------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "token", "said"),
    [
        (["--host", "0.0.0.0"], None, "other machines could reach this address"),
        (["--host", "192.0.2.1"], None, "add --remote if they may"),
        (["--host", "0.0.0.0", "--remote"], None, "say by --name HOST how others call it"),
        (["--host", "192.0.2.1", "--remote", "--name", "x"], TOKEN, "this address cannot be taken"),
        (["--host", "no such host", "--remote"], TOKEN, "this address cannot be taken"),
        (["--name", "gw:8080"], None, "--name gw:8080: write a name alone"),
        (["--name", "foo*"], None, "--name foo*: write a name alone"),
        (["--name", "*"], None, "--name *: write a name alone"),
        (["--name", ""], None, "--name : write a name alone"),
        ([], None, "there is no history; `conformance store merge RUN` begins one"),
        ([], "short", "CONFORMANCE_INGEST_TOKEN: a token of fewer than 16 characters can be guessed"),
    ],
)
def test_it_refuses_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options, token, said
) -> None:
    from conformance.cli import invoke

    if token is not None:
        monkeypatch.setenv("CONFORMANCE_INGEST_TOKEN", token)
    else:
        monkeypatch.delenv("CONFORMANCE_INGEST_TOKEN", raising=False)
    database = f"sqlite:///{tmp_path}/history.sqlite"
    assert invoke(["serve", "--port", "0", "--database", database, *options]) == 2
    assert said in capsys.readouterr().err
    assert token is not None or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "", "127.1")],
)
def test_loopback_is_told_from_the_rest(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside
