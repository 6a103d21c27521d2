"""Hostile model output in a real browser, as the service shows it: nothing runs, nothing leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, Route

from conformance.results import Run
from conformance.service.guard import POLICY
from conformance.store.history import Store
from tests import run_fixtures as fixtures
from tests.browsers import chromium
from tests.report_beside import PAGES as BESIDE
from tests.report_beside import beside
from tests.services import SENDER, Running, lines, running

pytestmark = pytest.mark.xdist_group("service-browser")  # its fixtures take long: one process makes them

RUN_ID = "hostile-1"
_LINK = re.compile(r'href="([^"#]+\.html)')


def storable(value: Any) -> Any:
    """The same without what JSON, or a database, cannot hold."""
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "ignore").decode()
    if isinstance(value, dict):
        return {storable(name): storable(inner) for name, inner in value.items()}
    return [storable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def hostile_file() -> bytes:
    """A run with hostile text wherever text can be, but for its id and time, which the service checks."""
    run = Run.model_validate(storable(fixtures.hostile_run().model_dump()))
    head = run.header.model_copy(
        update={
            "run_id": RUN_ID,
            "started": "2026-11-01T02:00:00Z",
            "harness": "<b>0</b>",
            "commit": "<script>",
        }
    )
    assert run.footer is not None
    return lines(head, *run.results, run.footer.model_copy(update={"finished": "<script>"}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    shown = beside(fixtures.wide_run(1))
    database = f"sqlite:///{folder}/history.sqlite"
    with Store(database, create=True) as store:
        for cell in shown.cells:
            store.merge(cell, lines=len(cell.results))
    with running(folder, database, options=shown.files(folder)) as found:
        answer = httpx2.post(f"{found.url}/api/v1/runs", content=hostile_file(), headers=SENDER, timeout=120)
        assert answer.status_code == 201, answer.text
        yield found


@pytest.fixture(scope="module")
def paths(served: Running) -> list[str]:
    """Every page of the run, found by its links."""
    to_do, seen = ["/"], set()
    while to_do:
        path = to_do.pop()
        if path not in seen:
            seen.add(path)
            answer = httpx2.get(served.url + path, timeout=60)
            to_do += [answer.url.join(link).path for link in _LINK.findall(answer.text) if "//" not in link]
    return sorted(seen)


@pytest.fixture
def page(browser: Browser, served: Running) -> Iterator[tuple[Page, list[str]]]:
    """A page that may run scripts, and what went wrong on it."""
    context = browser.new_context()
    opened, wrong = context.new_page(), []

    def ended(request: Any) -> None:
        # Requests that the policy stops are told of too: they end by it, and never leave the browser.
        if not request.url.startswith(served.url + "/") and request.failure != "csp":
            wrong.append(f"request: {request.url}: {request.failure}")

    opened.set_default_timeout(180_000)  # the largest pages, on a busy machine
    opened.on("requestfinished", ended)
    opened.on("requestfailed", ended)
    opened.on("console", lambda message: wrong.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    yield opened, wrong
    context.close()


def test_hostile_output_runs_nothing_and_asks_nothing_elsewhere(
    page, served: Running, paths: list[str]
) -> None:
    opened, wrong = page
    assert len(paths) > 20
    assert any("/cases/" in path for path in paths)
    for page_beside in BESIDE.values():
        # Only one target is asked, and nothing that one alone fails.
        assert page_beside == "alone.html" or any(path.endswith(f"/{page_beside}") for path in paths)
    assert any("/cells/" in path and "script" in path for path in paths)
    for path in paths:
        answer = opened.goto(served.url + path)
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "Gemma 4 conformance" in opened.title(), path
        assert opened.locator("main h1").is_visible(), path
        assert opened.evaluate("document.scripts.length + document.images.length") == 0
        styled = opened.evaluate("getComputedStyle(document.body).getPropertyValue('--paper')")
        assert styled.startswith("#"), f"{path} has no style under the policy"
    assert wrong == []


@pytest.mark.parametrize(
    "content",
    [
        "<script>document.title = 'owned'</script>",
        "<img src=x onerror=\"document.title = 'owned'\">",
        "<svg onload=\"document.title = 'owned'\"></svg>",
        "<script src='https://example.org/x.js'></script>",
        "<iframe srcdoc=\"<script>parent.document.title = 'owned'</script>\"></iframe>",
        "<link rel=stylesheet href='https://example.org/x.css'>",
        "<img src='https://example.org/x.png'>",
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
        "<object data='https://example.org/x'></object>",
        "<style>@import url(https://example.org/x.css);</style>",
    ],
)
def test_the_policy_that_is_served_stops_what_gets_in(page, served: Running, content: str) -> None:
    """If escaping failed, and the page said nothing of its policy itself."""
    opened, wrong = page

    def spoil(route: Route) -> None:
        answer = route.fetch()
        text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", answer.text())
        assert "Content-Security-Policy" not in text
        route.fulfill(response=answer, body=text.replace("</main>", f"{content}</main>"))

    opened.route(served.url + "/policies.html", spoil)
    opened.goto(served.url + "/policies.html")
    opened.wait_for_load_state("networkidle")
    assert opened.title() == "Policies · Gemma 4 conformance"
    assert [text for text in wrong if text.startswith(("request", "dialog"))] == []
    assert any("Content Security Policy" in text for text in wrong), wrong


@pytest.mark.parametrize("policy", [POLICY, POLICY.partition("; frame-ancestors")[0]])
def test_no_other_page_can_frame_it(page, served: Running, policy: str) -> None:
    """With the policy that is served; without its last rule it could."""
    opened, _ = page
    frame = f"<iframe src='{served.url}/policies.html'></iframe>"
    opened.route("http://other.example/", lambda route: route.fulfill(body=frame, content_type="text/html"))

    def answer(route: Route) -> None:
        real = route.fetch()
        assert real.headers["content-security-policy"] == POLICY
        route.fulfill(response=real, headers=real.headers | {"content-security-policy": policy})

    opened.route(served.url + "/policies.html", answer)
    opened.goto("http://other.example/")
    for _ in range(200):  # a network at rest does not mean that the frame has got what it will show
        shown = opened.frames[1].url if len(opened.frames) > 1 else ""
        if shown not in ("", "about:blank"):
            break
        opened.wait_for_timeout(50)
    assert shown.startswith("chrome-error:" if policy == POLICY else served.url), shown


def test_hostile_json_and_badges_are_shown_as_what_they_are(page, served: Running) -> None:
    opened, wrong = page
    for path in (f"/api/v1/runs/{RUN_ID}/results?limit=1000", "/api/v1/cases", "/api/v1/runs"):
        answer = opened.goto(served.url + path)
        assert answer.headers["content-type"] == "application/json"
        assert opened.evaluate("document.scripts.length") == 0
    assert opened.title() == ""
    assert [text for text in wrong if not text.startswith("console: Failed to load resource")] == []
