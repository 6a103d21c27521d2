"""The dashboard in a real browser, from a folder: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page

from conformance.report import write_site
from conformance.reporting.view import Site
from tests import run_fixtures as fixtures
from tests.browsers import chromium
from tests.report_beside import PAGES as BESIDE
from tests.report_beside import run_of_three, write_beside

pytestmark = pytest.mark.xdist_group("report-browser")  # its fixtures take long: one process makes them

PHONE, DESK = 360, 1280

# For each text on the page: its colour on the first opaque background below it. Colours are read
# back from a canvas, which turns every notation of CSS into bytes.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const cache = new Map();
  const rgba = (text) => {
    if (!cache.has(text)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = text;
      canvas.fillRect(0, 0, 1, 1);
      cache.set(text, [...canvas.getImageData(0, 0, 1, 1).data]);
    }
    return cache.get(text);
  };
  const luminance = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const worst = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest(".hidden, .skip")) continue;
    let below = element;
    while (below && rgba(getComputedStyle(below).backgroundColor)[3] < 255) below = below.parentElement;
    const a = getComputedStyle(element).color;
    const b = below ? getComputedStyle(below).backgroundColor : "white";
    const [x, y] = [luminance(rgba(a)), luminance(rgba(b))];
    const ratio = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    worst.set(`${element.className || element.tagName}: ${a} on ${b}`, ratio);
  }
  return [...worst].sort((p, q) => p[1] - q[1]);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@dataclass
class Sites:
    """The written sites, and one page of every kind."""

    root: Path
    kinds: dict[str, Path] = field(default_factory=dict)


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> Sites:
    root = tmp_path_factory.mktemp("browser")
    suites = fixtures.realistic_suites()
    real = fixtures.realistic_run(suites)
    runs = {
        "real": (real, suites),
        "killed": (fixtures.killed_run(), ()),
        "empty": (fixtures.empty_run(), ()),
        "wide": (fixtures.wide_run(8), ()),
        "hostile": (fixtures.hostile_run(), ()),
    }
    for name, (run, loaded) in runs.items():
        write_site(run, root / name, loaded)
    write_beside(run_of_three(), root / "beside", root / "history.sqlite")
    entries = Site(real, suites).entries

    def case(rule: str) -> Path:
        found = (e for e in entries if e.result and any(p.rule == rule for p in e.result.problems))
        return root / "real" / next(found).case.page

    kinds = {
        "overview": root / "real/index.html",
        "target": root / "real/targets/vllm-0-32-0.html",
        "streams": root / "real/streams/vllm-0-32-0.html",
        "suite": root / "real/suites/parser-tool-calls.html",
        "verdict": root / "real/verdicts/fail.html",
        "policies": root / "real/policies.html",
        "case, streamed failure": case("stream-equals-whole"),
        "case, failure": case("expected"),
        "case, error": case("raised"),
        "case, template": case("prompt"),
        "case, contested": root / "real/cases/parser-recovery/unclosed-call-0.html",
        "killed": root / "killed/index.html",
        "empty": root / "empty/index.html",
        "eight targets": root / "wide/index.html",
        "hostile overview": root / "hostile/index.html",
    }
    kinds |= {kind: root / "beside" / page for kind, page in BESIDE.items()}
    by_size = sorted((root / "hostile/cases").rglob("*.html"), key=lambda page: page.stat().st_size)
    hostile = [by_size[0], by_size[len(by_size) // 2], by_size[-2], by_size[-1]]
    kinds |= {f"hostile case {n}": page for n, page in enumerate(hostile)}
    return Sites(root, kinds)


@dataclass
class Watched:
    """A browser page that remembers what went wrong on it."""

    page: Page
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", self._request)

    def _request(self, request) -> None:
        if not request.url.startswith("file:"):
            self.wrong.append(f"request: {request.url}")

    def _failed(self, request) -> None:
        # Leaving a page while its icon is still being read aborts that read.
        if request.failure != "net::ERR_ABORTED":
            self.wrong.append(f"failed: {request.url}: {request.failure}")

    def open(self, path: Path) -> None:
        self.page.goto(path.as_uri())


@pytest.fixture
def opened(browser):
    """Opens a context and a watched page in it; closes them all."""
    contexts: list[BrowserContext] = []

    def open_context(width: int, theme: str, *, scripts: bool = False) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, java_script_enabled=scripts
        )
        contexts.append(context)
        return Watched(context.new_page())

    yield open_context
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("width", "theme"), [(PHONE, "light"), (PHONE, "dark"), (768, "light"), (DESK, "light"), (DESK, "dark")]
)
def test_every_kind_of_page_fits_its_window_and_asks_for_nothing(opened, sites, width, theme):
    watched = opened(width, theme)
    for kind, path in sites.kinds.items():
        watched.open(path)
        across = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert across[0] <= across[1], f"{kind} is {across[0]} wide in a window of {width}"
        styled = watched.page.evaluate("getComputedStyle(document.body).getPropertyValue('--paper')")
        assert styled.startswith("#"), f"{kind} has no style"
    assert watched.wrong == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_contrast_in_both_themes(opened, sites, theme):
    watched = opened(DESK, theme)
    for kind, path in sites.kinds.items():
        if kind.startswith("hostile case"):
            continue
        watched.open(path)
        watched.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        contrasts = watched.page.evaluate(CONTRASTS)
        assert len(contrasts) >= 5
        low = [(pair, round(ratio, 2)) for pair, ratio in contrasts if ratio < 4.5]
        assert low == [], f"{kind}: {low[:5]}"


@pytest.mark.parametrize(("theme", "dark"), [("light", False), ("dark", True)])
def test_the_theme_follows_the_reader(opened, sites, theme, dark):
    watched = opened(DESK, theme)
    watched.open(sites.kinds["overview"])
    colour = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(colour.split("(")[1].split(",")[0])
    assert (red < 60) is dark


def test_hostile_output_runs_nothing_even_where_scripts_may_run(opened, sites):
    watched = opened(DESK, "light", scripts=True)
    pages = sorted((sites.root / "hostile").rglob("*.html"))
    assert len(pages) > 20
    pages += [sites.kinds[kind] for kind in BESIDE]
    pages += sorted((sites.root / "beside/cells").iterdir())
    for path in pages:
        watched.open(path)
        assert "Gemma 4 conformance" in watched.page.title(), path
        assert watched.page.locator("main h1").is_visible(), path
        assert watched.page.evaluate("document.scripts.length + document.images.length") == 0
    watched.open(sites.kinds["hostile case 0"])
    for fold in watched.page.locator("summary").all():
        fold.click()
    assert "Gemma 4 conformance" in watched.page.title()
    assert watched.wrong == []


def test_the_policy_of_the_pages_stops_a_script_that_gets_in(opened, sites, tmp_path):
    """The second line of defence: what if escaping failed?"""
    source = (sites.root / "real/policies.html").read_text("utf-8")
    spoiled = sites.root / "real/spoiled.html"
    spoiled.write_text(source.replace("</main>", "<script>document.title = 'owned'</script></main>"), "utf-8")
    watched = opened(DESK, "light", scripts=True)
    watched.open(spoiled)
    spoiled.unlink()
    assert watched.page.title() == "Policies · Gemma 4 conformance"
    assert any("Content Security Policy" in text for text in watched.wrong)


def test_the_site_works_by_clicking_without_scripts(opened, sites):
    watched = opened(DESK, "light")
    page = watched.page
    watched.open(sites.kinds["overview"])
    page.locator("#attention .entry a").first.click()
    assert page.locator("main h1").is_visible()
    assert "/cases/" in page.url
    page.locator("nav.trail a").last.click()
    assert "/suites/" in page.url
    page.locator("nav[aria-label=Site] a", has_text="Results").click()
    assert page.url.endswith("index.html#results")
    cell = page.locator("#results tbody td .others a").first
    number = int(cell.locator(".number").inner_text())
    cell.click()
    fragment = page.url.split("#")[1]
    assert page.locator(f"[id='{fragment}'] [data-item]").count() == number
    assert watched.wrong == []


def press(page: Page, key: str, element: Locator, effect: str) -> None:
    """Press a key until ``effect`` holds of the element.

    A browser that has not drawn its first frame drops keys, and on a busy machine that frame takes
    a while: a reader would press again too.
    """
    for _ in range(30):
        page.keyboard.press(key)
        for _ in range(10):
            if element.evaluate(effect):
                return
            page.wait_for_timeout(100)
    pytest.fail(f"{key} was pressed for half a minute without effect")


def test_wide_tables_scroll_with_the_keyboard(opened, sites):
    watched = opened(PHONE, "light")
    watched.open(sites.kinds["eight targets"])
    region = watched.page.locator("#results .wide")
    region.focus()
    press(watched.page, "ArrowRight", region, "(e) => e.scrollLeft > 0")
    assert watched.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("kind", ["matrix", "ladder", "faults", "trials", "runs"])
def test_tables_beside_a_run_scroll_and_their_numbers_open_with_the_keyboard(opened, sites, kind):
    watched = opened(PHONE, "light")
    watched.open(sites.kinds[kind])
    page = watched.page
    regions = page.locator("main .wide").all()
    wide = [region for region in regions if region.evaluate("(e) => e.scrollWidth > e.clientWidth")]
    assert wide, "a phone is narrower than this table"
    wide[0].focus()
    press(page, "ArrowRight", wide[0], "(e) => e.scrollLeft > 0")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    link = page.locator("main .wide td a").first
    link.focus()
    press(page, "Enter", page.locator("html"), f"() => location.href !== {sites.kinds[kind].as_uri()!r}")
    assert page.locator("main h1").is_visible()
    fragment = page.url.partition("#")[2]
    assert not fragment or page.locator(f"[id='{fragment}']").count() == 1


@pytest.mark.parametrize("kind", ["comparison", "alone", "backtests", "release", "fault"])
def test_lists_beside_a_run_are_reached_with_the_keyboard(opened, sites, kind):
    watched = opened(DESK, "light")
    watched.open(sites.kinds[kind])
    first = watched.page.locator("main a").first
    for _ in range(60):
        watched.page.keyboard.press("Tab")
        if first.evaluate("(e) => e === document.activeElement"):
            break
    assert first.evaluate("(e) => e === document.activeElement"), "its first link has no tab stop"
    assert watched.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_first_tab_stop_skips_to_the_content(opened, sites):
    watched = opened(DESK, "light")
    watched.open(sites.kinds["overview"])
    skip = watched.page.locator("a.skip")
    press(
        watched.page,
        "Tab",
        skip,
        "(e) => e === document.activeElement && e.getBoundingClientRect().left >= 0",
    )
    watched.page.keyboard.press("Enter")
    assert watched.page.evaluate("document.activeElement.id") == "main"


def test_copied_input_is_the_input(opened, sites):
    """The signs for whitespace are drawn by the style sheet, so a selection does not hold them."""
    watched = opened(DESK, "light")
    watched.open(sites.root / "real/cases/parser-reasoning/direct-answer-is-content-2.html")
    block = watched.page.locator("pre[aria-label=Input]")
    block.evaluate("(e) => getSelection().selectAllChildren(e)")
    assert watched.page.evaluate("getSelection().toString()") == (
        "The answer for Tokyo is 42.\n\n- one\n\t- two  \n- three"
    )
    drawn = block.locator(".tab").evaluate("(e) => getComputedStyle(e, '::before').content")
    assert drawn == '"⇥"'


def test_folded_text_opens_and_prints_open(opened, sites):
    watched = opened(DESK, "light")
    watched.open(sites.kinds["case, error"])
    fold = watched.page.locator("details", has_text="standard error")
    text = fold.locator("pre")
    assert not text.is_visible()
    watched.page.emulate_media(media="print")
    assert text.evaluate("(e) => e.getBoundingClientRect().height") > 10
    assert not watched.page.locator("nav[aria-label=Site]").is_visible()
    watched.page.emulate_media(media="screen")
    fold.locator("summary").click()
    assert text.is_visible()
