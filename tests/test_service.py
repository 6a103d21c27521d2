"""The service: its pages are the dashboard, its queries answer what the history holds, all is guarded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from conformance.comparison import compare
from conformance.report import make_pages
from conformance.reporting.badges import badge, words
from conformance.results import CellRecord
from conformance.service.guard import POLICY
from conformance.store import StoreError
from conformance.store.history import Store
from conformance.store.tables import ResultRow
from tests.history_runs import (
    CASE,
    SUITE,
    accuracy_result,
    decision,
    footer,
    header,
    items_of,
    planned,
    result,
    sheet,
    write,
)
from tests.services import client

API = "/api/v1"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Two nights: case `b` fails in the second; `old` ran in the first alone."""
    with Store(f"sqlite:///{tmp_path}/history.sqlite", create=True) as opened:
        for n, verdict in ((1, "pass"), (2, "fail")):
            answers = sheet(items_of({"correct": 90 + n, "wrong": 10 - n}))
            results = [
                accuracy_result(answers, decision(answers)),
                result("b", verdict, kind="parser", area="parser"),
                *(
                    [result("old", "skip", kind="parser", area="parser", target="vllm@0.32.0")]
                    if n == 1
                    else []
                ),
            ]
            head = header(f"run-{n}", f"2026-11-0{n}T02:00:00+00:00", manifest=planned(*results))
            opened.merge_file(write(tmp_path / f"{n}.jsonl", head, *results, footer()))
        yield opened


@pytest.fixture
def ask(store: Store) -> TestClient:
    return client(store)


# ---------------------------------------------------------------------------------------------- pages


def test_the_pages_are_those_of_the_dashboard(ask: TestClient, store: Store) -> None:
    for run_id, prefix in (("run-2", "/"), ("run-2", "/runs/run-2/"), ("run-1", "/runs/run-1/")):
        run = store.run(run_id)
        scored = {key for key, found in run.latest().items() if found.evidence.accuracy is not None}
        pages = dict(
            make_pages(
                run,
                history=store.accuracy(besides=scored),
                comparison=compare(store, [run]),
                runs=store.runs(),
                served=True,
            )
        )
        assert len(pages) > 8
        for path, html in pages.items():
            answer = ask.get(prefix + path)
            assert answer.status_code == 200, path
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            assert answer.text == html
        assert ask.get(prefix).text == pages["index.html"]


def test_links_of_pages_lead_to_pages(ask: TestClient) -> None:
    to_do, seen = ["/", "/runs/run-1/"], set()
    while to_do:
        address = to_do.pop()
        if address in seen:
            continue
        seen.add(address)
        answer = ask.get(address)
        assert answer.status_code == 200, address
        assert address != "/runs.html" or 'href="/runs/run-1/"' in answer.text
        if answer.headers["content-type"].startswith("text/html"):
            found = re.findall(r'(?:href|src)="([^"#]+)[^"]*"', answer.text)
            to_do += [answer.url.join(link).path for link in found if not link.startswith("https:")]
    assert {"/assets/style.css", "/runs/run-1/assets/icon.svg", "/runs/run-1/accuracy.html"} <= seen


def test_a_run_without_a_slash_is_sent_to_its_folder(ask: TestClient) -> None:
    answer = ask.get("/runs/run-1")
    assert (answer.status_code, answer.headers["location"]) == (308, "/runs/run-1/")


def test_pages_follow_the_database(ask: TestClient, store: Store, tmp_path: Path) -> None:
    assert "run-2" in ask.get("/").text
    assert store.revision() == 2
    path = write(tmp_path / "3.jsonl", header("run-3", "2026-11-03T02:00:00+00:00"), result("c"), footer())
    store.merge_file(path)
    assert "run-3" in ask.get("/").text
    assert ask.get(f"{API}/summary").json()["areas"][0]["counts"] == {"pass": 2}
    store.merge_file(path)
    assert store.revision() == 3


def test_pages_are_made_from_a_run_that_is_read_once(ask: TestClient, store: Store, monkeypatch) -> None:
    read = []
    real = Store.run
    monkeypatch.setattr(Store, "run", lambda self, run_id: read.append(run_id) or real(self, run_id))
    for _ in range(3):
        assert ask.get("/").status_code == 200
        assert ask.get("/runs/run-1/policies.html").status_code == 200
    assert read == ["run-2", "run-1"]


def test_cells_are_read_once_and_one_that_cannot_be_read_takes_no_page_down(
    ask: TestClient, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, day in (("fresh", "2026-11-02"), ("broken", "2026-11-01"), ("gone", "2026-09-01")):
        cell = CellRecord(id=f"fake+{name}", axes={"target": "fake", "attention": "own", "layout": "single"})
        tried = result("b", kind="generation", target="fake")
        head = header(f"cell-{name}", f"{day}T03:00:00+00:00", cell=cell, manifest=planned(tried))
        store.merge_file(write(tmp_path / f"{name}.jsonl", head, tried, footer()))
    with store._database.writing() as session:
        row = session.scalars(select(ResultRow).where(ResultRow.run_id == "cell-broken")).one()
        row.body = row.body.replace('"reason"', '"why"')
    read = []
    real = Store.run
    monkeypatch.setattr(Store, "run", lambda self, run_id: read.append(run_id) or real(self, run_id))
    for _ in range(2):
        for path in ("/", "/runs/run-1/", "/matrix.html"):
            assert ask.get(path).status_code == 200
    assert sorted(read) == ["cell-broken", "cell-fresh", "run-1", "run-2"]
    page = ask.get("/matrix.html").text
    assert "fake+fresh" in page
    assert (
        "The newest run of the cell fake+broken is left out: run cell-broken: was stored by another" in page
    )
    assert "1 cell is left out: not run within 30 days of the newest." in page


@pytest.mark.parametrize(
    "path",
    [
        "/nothing.html",
        "/assets/../index.html/x",
        "/..%2f..%2fetc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2fpyproject.toml",
        "/assets/%00",
        "/runs/..%2f..%2fetc/passwd",
        "/runs/%2e%2e/index.html",
        "/runs/run-1/..%2f..%2f..%2fetc/passwd",
        "/runs/run-9/",
        "/runs/run-1%00/",
        "/runs/",
        "//etc/passwd",
        "/cases/" + "a/" * 2000,
        "/runs/" + "a" * 5000 + "/",
    ],
)
def test_a_path_that_is_no_page_is_not_found(ask: TestClient, path: str) -> None:
    answer = ask.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/plain")
    assert "no such page" in answer.text


def test_an_empty_history_says_so(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/empty.sqlite", create=True) as store:
        asked = client(store)
        answer = asked.get("/")
        assert (answer.status_code, "No run has been merged yet" in answer.text) == (404, True)
        assert asked.get(f"{API}/runs").json() == {"total": 0, "runs": []}
        assert asked.get(f"{API}/summary").json() == {"run_id": None, "areas": []}


def test_a_run_with_a_hostile_id_is_shown_and_never_a_path(store: Store, tmp_path: Path) -> None:
    run_id = "../../etc/<script>"
    path = write(tmp_path / "x.jsonl", header(run_id, "2026-11-09T02:00:00+00:00"), result("c"), footer())
    store.merge_file(path)
    asked = client(store)
    answer = asked.get("/")
    assert answer.status_code == 200
    assert "<script>" not in answer.text
    assert asked.get(f"{API}/runs").json()["runs"][0]["run_id"] == run_id
    assert asked.get(f"{API}/runs/..%2f..%2fetc%2f%3Cscript%3E").status_code == 404


# -------------------------------------------------------------------------------------------- queries


def test_runs_come_newest_first_and_in_portions(ask: TestClient) -> None:
    found = ask.get(f"{API}/runs").json()
    assert [run["run_id"] for run in found["runs"]] == ["run-2", "run-1"]
    assert ask.get(f"{API}/runs/run-2").json() == found["runs"][0]
    assert found["runs"][0]["counts"] == {"fail": 1, "pass": 1}
    second = ask.get(f"{API}/runs", params={"limit": 1, "offset": 1}).json()
    assert (second["total"], [run["run_id"] for run in second["runs"]]) == (2, ["run-1"])
    assert ask.get(f"{API}/runs/run-9").json() == {"detail": "there is no such run"}


@pytest.mark.parametrize(
    ("wanted", "cases"),
    [
        ({}, ["b", CASE, "old"]),
        ({"verdict": "skip"}, ["old"]),
        ({"target": "fake", "area": "parser"}, ["b"]),
        ({"suite": SUITE, "limit": 1, "offset": 1}, [CASE]),
        ({"area": "' OR 1=1 --"}, []),
    ],
)
def test_results_of_a_run(ask: TestClient, wanted: dict[str, str], cases: list[str]) -> None:
    found = ask.get(f"{API}/runs/run-1/results", params=wanted).json()
    assert [row["case"] for row in found["results"]] == cases
    assert found["total"] == (3 if "suite" in wanted else len(cases))


def test_a_result_has_its_evidence(ask: TestClient, store: Store) -> None:
    key = {"suite": SUITE, "case": CASE, "target": "fake"}
    found = ask.get(f"{API}/runs/run-1/result", params=key)
    assert found.status_code == 200
    assert len(found.json()["evidence"]["accuracy"]["sheet"]["items"]) == 100
    assert found.json() == store.run("run-1").latest()[SUITE, CASE, "fake"].model_dump(mode="json")
    missing = ask.get(f"{API}/runs/run-1/result", params=key | {"case": "nothing"})
    assert (missing.status_code, missing.json()) == (404, {"detail": "this run has no such result"})


def test_changes_between_two_runs(ask: TestClient) -> None:
    found = ask.get(f"{API}/runs/run-2/changes", params={"since": "run-1"}).json()
    assert [(row["case"], row["before"], row["after"]) for row in found["changes"]] == [
        ("b", "pass", "fail"),
        ("old", "skip", None),
    ]
    assert ask.get(f"{API}/runs/run-2/changes", params={"since": "run-9"}).status_code == 404


def test_cases_have_their_newest_verdicts(ask: TestClient) -> None:
    found = ask.get(f"{API}/cases", params={"kind": "parser"}).json()
    assert found["total"] == 2
    assert [(row["case"], row["verdicts"]) for row in found["cases"]] == [
        ("b", {"fake": "fail"}),
        ("old", {"vllm@0.32.0": "skip"}),
    ]


def test_a_case_over_time_has_its_scores(ask: TestClient) -> None:
    found = ask.get(f"{API}/history", params={"suite": SUITE, "case": CASE, "target": "fake"}).json()
    scores = [point["decision"]["score"]["count"] for point in found["points"]]
    assert scores == [91, 92]
    assert found["points"][0]["outcomes"] == {"correct": 91, "wrong": 9}
    newest = ask.get(f"{API}/history", params={"suite": SUITE, "case": CASE, "limit": 1}).json()
    assert (newest["total"], newest["points"]) == (2, found["points"][1:])
    assert [v["run_id"] for v in ask.get(f"{API}/accuracy").json()["series"]] == ["run-2"]
    assert ask.get(f"{API}/history", params={"suite": SUITE, "case": "x"}).status_code == 404


def test_targets_by_areas(ask: TestClient) -> None:
    newest = ask.get(f"{API}/summary").json()["areas"]
    assert [(row["target"], row["area"], row["counts"]) for row in newest] == [
        ("fake", "accuracy", {"pass": 1}),
        ("fake", "parser", {"fail": 1}),
        ("vllm@0.32.0", "parser", {"skip": 1}),
    ]
    earlier = ask.get(f"{API}/summary", params={"run": "run-1"}).json()
    assert (earlier["run_id"], earlier["areas"][1]["counts"]) == ("run-1", {"pass": 1})
    assert ask.get(f"{API}/summary", params={"run": "run-9"}).status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "offset=-1",
        "offset=99999999999999999999",
        "verdict=maybe",
        "area=%00",
    ],
)
def test_a_wrong_query_is_refused_with_one_sentence(ask: TestClient, query: str) -> None:
    answer = ask.get(f"{API}/runs/run-1/results?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"query {query.partition('=')[0]}: ")


def test_health(ask: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask.get(f"{API}/health").json() == {
        "status": "ok",
        "version": "0.1.0",
        "ingest": True,
        "runs": 2,
    }

    def gone(_: Store) -> None:
        raise StoreError("postgresql://someone@secret-host/name: the history cannot be used")

    monkeypatch.setattr(Store, "size", gone)
    monkeypatch.setattr(Store, "revision", gone)
    answer = ask.get(f"{API}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    for path in ("/", f"{API}/runs", f"{API}/summary"):
        answer = ask.get(path)
        assert answer.status_code == 503
        assert "secret-host" not in answer.text


# --------------------------------------------------------------------------------------------- badges


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("fake.svg", "fake: 1 of 2 fail"),
        ("fake/accuracy.svg", "fake accuracy: 1 pass"),
        ("vllm@0.32.0/parser.svg", "vllm@0.32.0 parser: not run"),
    ],
)
def test_badges(ask: TestClient, path: str, said: str) -> None:
    answer = ask.get(f"{API}/badges/{path}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert ET.fromstring(answer.text).attrib["aria-label"] == said


@pytest.mark.parametrize(
    ("path", "status"),
    [("nothing.svg", 404), ("fake/nothing.svg", 404), ("a%3Cb.svg", 422), ("..svg", 422), ("x%00.svg", 422)],
)
def test_a_badge_of_nothing_is_refused(ask: TestClient, path: str, status: int) -> None:
    assert ask.get(f"{API}/badges/{path}").status_code == status


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"pass": 3, "error": 1, "timeout": 1, "xpass": 1, "skip": 9}, "3 of 6 fail"),
        ({"pass": 3, "inconclusive": 1}, "1 of 4 inconclusive"),
        ({"pass": 3, "xfail": 1}, "3 pass, 1 fail as known"),
        ({"pass": 3, "skip": 1}, "3 pass"),
        ({"skip": 1}, "not run"),
    ],
)
def test_words_of_badges(counts, said: str) -> None:
    assert words(counts)[0] == said


def test_a_badge_escapes_its_label() -> None:
    picture = ET.fromstring(badge("</text><script>x</script>\"'&", {"pass": 1}))
    assert {element.tag.rpartition("}")[2] for element in picture.iter()} == {
        "svg",
        "title",
        "rect",
        "g",
        "text",
    }


# ------------------------------------------------------------------------------------------- guarding


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/assets/style.css", 200),
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
        ("GET", f"{API}/runs", 200),
        ("GET", f"{API}/openapi.json", 200),
        ("GET", f"{API}/badges/fake.svg", 200),
        ("GET", f"{API}/runs/run-9", 404),
        ("DELETE", f"{API}/runs", 405),
        ("POST", f"{API}/runs", 401),
    ],
)
def test_every_answer_has_its_headers(ask: TestClient, method: str, path: str, status: int) -> None:
    answer = ask.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "cross-origin-resource-policy" in answer.headers
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cache-control"] == "no-cache"


def test_the_policy_is_strict() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["frame-ancestors"] == "'none'"
    assert "script-src" not in rules
    assert not re.search(r"unsafe|\*|https?:|data:|blob:", POLICY)


def test_an_error_of_the_application_is_guarded_and_tells_nothing(
    ask: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(Store, "runs", broken)
    answer = ask.get(f"{API}/runs")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example"])
def test_a_service_that_is_called_by_another_name_does_not_answer(ask: TestClient, host: str) -> None:
    assert ask.get("/", headers={"Host": host}).status_code == 400


def test_it_answers_to_its_own_names(ask: TestClient) -> None:
    for host in ("localhost:8643", "127.0.0.1", "[::1]:8643"):
        assert ask.get("/", headers={"Host": host}).status_code == 200, host


def test_the_log_has_no_query_and_no_line_of_its_callers(
    ask: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="conformance.service"):
        ask.get(f"{API}/runs?token=secret", headers={"Authorization": "Bearer secret"})
        ask.get("/x%0d%0aINFO%20forged")
    assert [message.rsplit(" ", 2)[0] for message in caplog.messages] == [
        "GET /api/v1/runs 200",
        "GET /x%0D%0AINFO%20forged 404",
    ]
