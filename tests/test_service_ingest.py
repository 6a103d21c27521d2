"""Runs that are sent to the service: who may, how much, what becomes of them."""

from __future__ import annotations

import datetime as dt
import gzip
import hmac
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from conformance.errors import UsageError
from conformance.service import ingest
from conformance.service.ingest import Token
from conformance.store.history import Store
from tests.history_runs import footer, header, result
from tests.postgres import Server
from tests.services import SENDER, TOKEN, client, lines

RUNS = "/api/v1/runs"
KEY = ("suite", "case", "target")
FILE = lines(header(), result("a"), result("b", "fail"), footer())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path}/history.sqlite", create=True) as opened:
        yield opened


@pytest.fixture
def ask(store: Store) -> TestClient:
    return client(store)


def send(ask: TestClient, content: bytes | Iterator[bytes], **headers: str) -> tuple[int, dict]:
    answer = ask.post(RUNS, content=content, headers=SENDER | headers)
    return answer.status_code, answer.json()


# ---------------------------------------------------------------------------------------- what is kept


def test_a_run_is_taken_once(ask: TestClient, store: Store) -> None:
    told = {"run_id": "run-1", "added": 2, "updated": 0, "unchanged": 0, "newer": True, "torn": ""}
    assert send(ask, FILE) == (201, told)
    assert send(ask, FILE) == (200, told | {"added": 0, "unchanged": 2, "newer": False})
    assert store.size() == 1
    assert [r.verdict for r in store.run("run-1").results] == ["pass", "fail"]


def test_a_run_that_has_grown_adds_what_is_new(ask: TestClient, store: Store) -> None:
    assert send(ask, lines(header(), result("a")))[1]["added"] == 1
    assert store.runs()[0].finished is None
    status, told = send(ask, FILE)
    assert (status, told["added"], told["unchanged"]) == (201, 1, 1)
    assert store.runs()[0].finished is not None


def test_a_torn_last_line_is_told_and_the_rest_is_kept(ask: TestClient, store: Store) -> None:
    status, told = send(ask, FILE[:-30])
    assert (status, told["added"]) == (201, 2)
    assert told["torn"].startswith("line 4 was cut off after ")
    assert store.size() == 1


# ------------------------------------------------------------------------------------------ who may send


@pytest.mark.parametrize(
    "shown",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN.upper()}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer " + "x" * 50_000,
        "Bearer t\xf6ken",
    ],
)
def test_without_the_token_nothing_is_taken(ask: TestClient, store: Store, shown: str | None) -> None:
    headers = [(b"content-type", b"application/x-ndjson")]
    if shown is not None:
        headers.append((b"authorization", shown.encode("latin-1")))
    answer = ask.post(RUNS, content=FILE, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.text
    assert store.size() == 0


def test_the_token_is_not_taken_from_the_query(ask: TestClient) -> None:
    answer = ask.post(f"{RUNS}?token={TOKEN}&access_token={TOKEN}", content=FILE)
    assert answer.status_code == 401


def test_without_a_token_of_its_own_the_service_takes_nothing(store: Store) -> None:
    ask = client(store, token=None)
    for headers in (SENDER, {}, {"Authorization": "Bearer "}):
        answer = ask.post(RUNS, content=FILE, headers=headers)
        assert answer.status_code == 403
        assert "CONFORMANCE_INGEST_TOKEN" in answer.json()["detail"]
    assert store.size() == 0


def test_nothing_is_read_from_who_may_not_send(ask: TestClient) -> None:
    def body() -> Iterator[bytes]:
        yield b"x"
        raise AssertionError("the body was read")

    answer = ask.post(RUNS, content=body(), headers=SENDER | {"Authorization": "Bearer wrong"})
    assert answer.status_code == 401


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, real = [], hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(ingest.hmac, "compare_digest", watched)
    token = Token(TOKEN)
    assert token.matches(TOKEN)
    assert not token.matches("")
    assert not token.matches(TOKEN * 1000)
    # Digests of one length: neither the length of the token nor where two differ can be measured.
    assert [(len(one), len(other)) for one, other in compared] == [(32, 32)] * 3
    assert TOKEN not in repr(vars(token)) + repr(token)


def test_a_short_token_is_refused() -> None:
    with pytest.raises(UsageError, match="fewer than 16 characters can be guessed; draw one by") as raised:
        Token("tooshorttoken")
    assert "tooshorttoken" not in str(raised.value)


# ------------------------------------------------------------------------------------------ how much


def in_portions(content: bytes, size: int = 100) -> Iterator[bytes]:
    """A body of unknown length, which is sent chunked."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


def test_the_limit_holds_for_announced_and_for_chunked_bodies(store: Store) -> None:
    ask = client(store, limit=len(FILE) - 1)
    said = f"the run file has more than {len(FILE) - 1} bytes; merge it by `conformance store merge`"
    refused = (413, {"detail": said})
    assert send(ask, FILE) == refused
    assert send(ask, in_portions(FILE)) == refused
    assert store.size() == 0
    ask = client(store, limit=len(FILE))
    assert send(ask, in_portions(FILE))[0] == 201


def test_a_compressed_body_is_refused_and_never_unpacked(ask: TestClient, store: Store) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    for encoding in ("gzip", "br", "identity, gzip", "zstd"):
        status, told = send(ask, bomb, **{"Content-Encoding": encoding})
        assert (status, told["detail"]) == (415, "send the run file as it is, without a Content-Encoding")
    assert send(ask, bomb)[0] == 422
    assert store.size() == 0


def test_a_body_of_another_type_is_refused(ask: TestClient) -> None:
    for kind in ("application/json", "application/x-www-form-urlencoded", ""):
        status, told = send(ask, FILE, **{"Content-Type": kind})
        assert (status, told["detail"]) == (415, "send a run file as `Content-Type: application/x-ndjson`")


def test_a_run_of_too_many_results_is_refused(
    ask: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "MOST_RESULTS", 1)
    assert send(ask, FILE) == (422, {"detail": "the run has more than 1 results"})
    assert store.size() == 0


# ----------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "run file: the file holds no complete header"),
        (b"\n", "run file:1: Invalid JSON"),
        (b"{}\n", "run file:1: Unable to extract tag"),
        (b"\xff\xfe\n", "run file:1: Invalid JSON"),
        (b"[" * 100_000 + b"\n", "run file:1: Invalid JSON"),
        (FILE + b"garbage\n", "run file:5: Invalid JSON"),
        (lines(result("a")), "run file:1: a run file begins with its header"),
        (lines(header(schema_version=99)), "run file:1: schema version 99"),
        (lines(header(started="yesterday")), "started at 'yesterday', which is no ISO 8601 time"),
        (lines(header(started="0001-01-01T00:00:00+14:00")), "which is no ISO 8601 time"),
        (lines(header(), result("a"), footer().model_copy(update={"exit_code": 10**20})), "exit code"),
        (lines(header(), result("a\0b")), "U+0000"),
        (lines(header(), result("a" * 3000)), "names of more than 2000 bytes"),
        (lines(header(), result("a")).replace(b'"duration":0.0', b'"duration":NaN'), "(duration)"),
        (lines(header(), result("a")).replace(b'"duration":0.0', b'"duration":1e999'), "(duration)"),
    ],
)
def test_what_is_no_run_file_is_refused_and_leaves_nothing(
    ask: TestClient, store: Store, content: bytes, said: str
) -> None:
    status, told = send(ask, content)
    assert (status, said in told["detail"]) == (422, True), told
    assert store.size() == 0


@pytest.mark.parametrize(
    "run_id",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "a\0b",
        "/etc/passwd",
        "a b",
        "-x",
        "<b>",
        "a\n",
        "é",
        "a" * 101,
        "%2e",
    ],
)
def test_a_run_whose_id_is_no_name_is_refused(ask: TestClient, store: Store, run_id: str) -> None:
    status, told = send(ask, lines(header(run_id), result("a"), footer()))
    assert (status, told["detail"].startswith("the run's id must be")) == (422, True)
    assert store.size() == 0


def test_a_run_of_the_future_is_refused(ask: TestClient, store: Store) -> None:
    """A day is what clocks may differ by."""
    now = dt.datetime.now(dt.UTC)
    for hours, status in ((26, 422), (22, 201)):
        started = (now + dt.timedelta(hours=hours)).isoformat()
        assert send(ask, lines(header("ahead", started), result("a"), footer()))[0] == status
    assert [run.run_id for run in store.runs()] == ["ahead"]


def test_another_run_of_the_same_id_is_refused(ask: TestClient) -> None:
    assert send(ask, FILE)[0] == 201
    status, told = send(ask, lines(header(started="2026-11-02T02:00:00+00:00"), result("a")))
    assert (status, told) == (409, {"detail": "run run-1: another run of this id is stored"})


def test_names_of_cases_are_never_paths(ask: TestClient, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    hostile = ["../../evil", "/etc/passwd", "..\\evil", "a\nb", "<script>x</script>", "%2e%2e/x"]
    results = [result(name, suite=f"../{name}", target=name, area=name) for name in hostile]
    assert send(ask, lines(header(), *results, footer()))[0] == 201
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    page = ask.get("/")
    assert page.status_code == 200
    assert "<script" not in page.text
    found = ask.get("/api/v1/runs/run-1/results").json()
    assert {row["target"] for row in found["results"]} == set(hostile)
    badges = {ask.get(f"/api/v1/badges/{name}.svg").status_code for name in ("%2e%2e%2fevil", "%3Cscript%3E")}
    assert badges <= {404, 422}


def test_deep_and_huge_values_come_back_or_are_refused(ask: TestClient, store: Store) -> None:
    plain = lines(header(), result("a"), footer())
    deep = "[" * 150 + "]" * 150
    for value, accepted in (
        (deep, True),
        ("[" * 5000 + "]" * 5000, False),
        ("9" * 4000, True),
        ("9" * 5000, False),
    ):
        got = plain.replace(b'"got":null', b'"got":' + value.encode())
        got = got.replace(b'"run-1"', f'"run-{len(value)}"'.encode())
        status, told = send(ask, got)
        assert status == (201 if accepted else 422), (value[:10], told)
        if accepted:
            run_id = f"run-{len(value)}"
            shown = ask.get(
                f"/api/v1/runs/{run_id}/result",
                params=dict(zip(KEY, result("a").key, strict=True)),
            )
            assert shown.status_code == 200
            assert ask.get(f"/runs/{run_id}/").status_code == 200
            assert json.loads(shown.text)["case"] == "a"


# ---------------------------------------------------------------------------------------- on PostgreSQL


def test_on_postgresql_it_is_the_same(postgres: Server) -> None:
    with Store(postgres.fresh(), create=True) as store:
        ask = client(store)
        assert send(ask, FILE)[0] == 201
        assert send(ask, FILE)[0] == 200
        assert (
            send(ask, FILE.replace(b'"run-1"', b'"run-2"').replace(b'"case":"a"', b'"case":"a\\u0000"'))[0]
            == 422
        )
        odd = result("'; DROP TABLE conformance_runs; --", suite="é\u2028🦊", target="$1 %s {x}")
        assert send(ask, lines(header("run-3"), odd, footer()))[0] == 201
        shown = ask.get("/api/v1/runs/run-3/result", params=dict(zip(KEY, odd.key, strict=True)))
        assert shown.json()["case"] == odd.case
        for query in ("area=%00", "area=%ed%a0%80", "offset=10000000", "suite=%25", "area=" + "x" * 1000):
            assert ask.get(f"/api/v1/runs/run-1/results?{query}").status_code in (200, 422), query
        assert ask.get("/").status_code == 200
        assert ask.get("/api/v1/summary").status_code == 200


def test_a_database_that_was_restarted_is_reached_again(postgres: Server) -> None:
    with Store(postgres.fresh(), create=True) as store:
        ask = client(store)
        assert send(ask, FILE)[0] == 201
        postgres.cut_connections()
        assert ask.get("/api/v1/health").json()["status"] == "ok"
        postgres.cut_connections()
        assert send(ask, FILE)[0] == 200
