"""The dashboard's pages, read with an HTML parser: structure, links, numbers, untrusted text."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from lxml import html

from conformance.report import MARKER, write_site
from conformance.reporting.signs import SIGNS, status_of
from conformance.reporting.text import LONG_TEXT, plain
from conformance.reporting.view import Site
from conformance.results import Run
from tests import run_fixtures as fixtures

pytestmark = pytest.mark.xdist_group("report")  # its fixtures take long: one process makes them

Tree = html.HtmlElement

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufffe]")
_VOID = {"meta", "link", "br", "rect", "img", "input", "hr"}


class Pages:
    """A written site, parsed as it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[Path, Tree] = {}

    def __iter__(self):
        return iter(sorted(self.root.rglob("*.html")))

    def tree(self, path: Path | str) -> Tree:
        file = self.root / path
        if file not in self._trees:
            self._trees[file] = html.document_fromstring(file.read_bytes())
        return self._trees[file]

    def at(self, page: Path, href: str) -> Tree | None:
        """The element that an internal link points to: the page's root without a fragment."""
        parts = urlsplit(href)
        file = page if not parts.path else (page.parent / unquote(parts.path))
        tree = self.tree(file.resolve())
        if not parts.fragment:
            return tree
        found = tree.xpath("//*[@id=$id]", id=unquote(parts.fragment))
        return found[0] if found else None


def _runs():
    suites = fixtures.realistic_suites()
    return {
        "realistic": (fixtures.realistic_run(suites), suites),
        "file-only": (fixtures.realistic_run(suites), ()),
        "killed": (fixtures.killed_run(), ()),
        "empty": (fixtures.empty_run(), ()),
        "one-target": (fixtures.wide_run(1), ()),
        "eight-targets": (fixtures.wide_run(8), ()),
        "hostile": (fixtures.hostile_run(), ()),
    }


RUNS = ["realistic", "file-only", "killed", "empty", "one-target", "eight-targets", "hostile"]


@pytest.fixture(scope="module")
def runs():
    return _runs()


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """Every run's site."""
    folder = tmp_path_factory.mktemp("sites")
    return {
        name: Pages(write_site(run, folder / name, suites).resolve()) for name, (run, suites) in runs.items()
    }


def text_of(element: Tree) -> str:
    return " ".join(element.text_content().split())


def problem_case(run: Run, rule: str) -> tuple[str, str]:
    """Page and anchor of the first case that broke a rule."""
    entry = next(
        e
        for e in Site(run).entries
        if e.result is not None and any(p.rule == rule for p in e.result.problems)
    )
    return entry.case.page, f"t.{entry.target.slug}"


# Structure


class _Balance(HTMLParser):
    """Notes tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.wrong.append(f"{tag} has an attribute twice")
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        if tag not in _VOID:
            self.wrong.append(f"{tag} closes itself")

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


@pytest.mark.parametrize("name", RUNS)
def test_tags_are_balanced_and_ids_are_unique(written, name):
    for page in written[name]:
        balance = _Balance()
        balance.feed(page.read_text("utf-8"))
        assert not balance.wrong, f"{page}: {balance.wrong[:3]}"
        assert balance.stack == [], page
        ids = written[name].tree(page).xpath("//@id")
        assert [i for i, n in Counter(ids).items() if n > 1] == [], page


@pytest.mark.parametrize("name", RUNS)
def test_pages_have_landmarks_headings_and_a_policy(written, name):
    for page in written[name]:
        tree = written[name].tree(page)
        assert tree.get("lang") == "en"
        assert [len(tree.xpath(f"//body/{tag}")) for tag in ("header", "main", "footer")] == [1, 1, 1], page
        assert len(tree.xpath("//h1")) == 1, page
        assert tree.xpath("//body/*[1][@class='skip']/@href") == ["#main"]
        assert tree.xpath("//title/text()")[0].strip()
        (policy,) = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
        assert "default-src 'none'" in policy
        assert "style-src 'self'" in policy
        assert "unsafe" not in policy
        headings = [int(h.tag[1]) for h in tree.xpath("//h1|//h2|//h3|//h4")]
        assert all(after <= before + 1 for before, after in itertools.pairwise(headings)), page


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_captions_scopes_and_a_keyboard(written, name):
    for page in written[name]:
        for table in written[name].tree(page).xpath("//table"):
            assert table.xpath("./caption"), page
            assert all(th.get("scope") in ("row", "col") for th in table.xpath(".//th")), page
            (region,) = table.xpath("ancestor::div[@role='region']")
            assert region.get("tabindex") == "0"
            assert region.get("aria-label")
        for labelled in written[name].tree(page).xpath("//@aria-labelledby"):
            assert written[name].tree(page).xpath("//*[@id=$id]", id=labelled), page


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_asked_from_elsewhere(written, name):
    for page in written[name]:
        tree = written[name].tree(page)
        assert not tree.xpath(
            "//*[@src or @srcset or @action or @formaction or @poster or @ping or @background]"
        )
        for link in tree.xpath("//link/@href"):
            assert (page.parent / link).resolve().is_relative_to(written[name].root)
    for sheet in written[name].root.rglob("*.css"):
        assert not re.search(r"url\(|@import|@font-face", sheet.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_every_internal_link_resolves(written, name):
    seen = 0
    for page in written[name]:
        for anchor in written[name].tree(page).xpath("//a"):
            href = anchor.get("href")
            if urlsplit(href).scheme:
                assert href.startswith("https://"), f"{page}: {href}"
                assert anchor.get("rel") == "noreferrer noopener"
                continue
            target = (page.parent / unquote(urlsplit(href).path)).resolve()
            assert target.is_relative_to(written[name].root), f"{page}: {href} leaves the site"
            assert written[name].at(page, href) is not None, f"{page}: {href} leads nowhere"
            seen += 1
    assert seen > 5


@pytest.mark.parametrize("name", RUNS)
def test_every_counted_number_is_the_length_of_the_list_it_links_to(written, name):
    counted = 0
    for page in written[name]:
        for anchor in written[name].tree(page).xpath("//a[@data-count]"):
            number = int(anchor.get("data-count"))
            assert str(number) in text_of(anchor), f"{page}: shows another number than it counts"
            target = written[name].at(page, anchor.get("href"))
            listed = len(target.xpath("descendant-or-self::*[@data-item]"))
            assert listed == number, f"{page}: {anchor.get('href')} lists {listed}, not {number}"
            counted += 1
    assert counted or name == "empty"


NO_COUNTS = frozenset(
    {"Threads", "Processes", "Order", "Hash seed", "Sampling seed", "Seconds", "Exit code"}
    | {"this target", "reference"}  # settings of accuracy
)
"""Columns of tables whose numbers count no results: what was measured, set or dated."""


_COUNT = re.compile(r"[1-9][\d,]*|.*\b[1-9]\d* (?:" + "|".join(s.word for s in SIGNS.values()) + r")\b.*")


def unlinked(tree: Tree) -> set[tuple[str, str]]:
    """Column and text of each cell of a table that counts something and is no link.

    A text counts if it is a whole number, or one in front of the word of a sign. Left out are counts whose
    results the site does not hold (`elsewhere`); such pages say where they are. Tables without a head
    are of settings.
    """
    found = set()
    for row in tree.xpath("//main//table//tr[td]"):
        heads = row.xpath("ancestor::table/thead/tr/th")
        for cell in row.xpath("./td[not(contains(concat(' ', @class, ' '), ' elsewhere '))]"):
            at = int(cell.xpath("count(preceding-sibling::td) + count(preceding-sibling::th)"))
            column = text_of(heads[at]) if at < len(heads) else ""
            if not heads:
                continue
            for text in cell.xpath(".//text()[not(ancestor::a or ancestor::code or ancestor::pre)]"):
                if column not in NO_COUNTS and _COUNT.fullmatch(" ".join(text.split())):
                    found.add((column, " ".join(text.split())))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_number_in_a_table_is_a_link(written, name):
    for page in written[name]:
        assert unlinked(written[name].tree(page)) == set(), page


@pytest.mark.parametrize("name", RUNS)
def test_every_sign_has_its_glyph_and_its_word(written, name):
    pairs = {(sign.glyph, sign.word) for sign in SIGNS.values()}
    assert len({glyph for glyph, _ in pairs}) == len({word for _, word in pairs}) == len(SIGNS)
    for page in written[name]:
        for sign in written[name].tree(page).xpath("//*[contains(concat(' ', @class, ' '), ' sign ')]"):
            (glyph,) = sign.xpath("./*[@class='glyph']/text()")
            (word,) = sign.xpath("./*[@class='word']/text()")
            assert (glyph, word) in pairs
            assert SIGNS[re.search(r"\bs-([\w-]+)", sign.get("class"))[1]].word == word


# Numbers


@pytest.mark.parametrize("name", ["realistic", "killed", "one-target", "eight-targets"])
def test_the_overview_counts_what_the_manifest_planned(written, runs, name):
    run, _ = runs[name]
    results = {r.key: r for r in run.results}
    counts: Counter[tuple[str, str, str]] = Counter()
    for plan in run.header.manifest:
        result = results.get((plan.suite, plan.case, plan.target))
        counts[plan.area, plan.target, status_of(result)] += 1
        counts[plan.area, plan.target, "total"] += 1
    tree = written[name].tree("index.html")
    (table,) = tree.xpath("//section[@id='results']//table")
    specs = ["".join(th.text_content().split()) for th in table.xpath("./thead//th")[1:]]
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in table.xpath("./tbody/tr"):
        area = text_of(row.xpath("./th")[0])
        for spec, cell in zip(specs, row.xpath("./td"), strict=True):
            passed, total = re.search(
                r"(\d+) pass ?/? of (\d+)", text_of(cell.xpath(".//*[@class='ratio']")[0])
            ).groups()
            seen[area, spec, "total"] = int(total)
            seen[area, spec, "pass"] = int(passed)
            for other in cell.xpath(".//ul//a"):
                status = re.search(r"\bs-([\w-]+)", other.get("class"))[1]
                seen[area, spec, status] = int(other.get("data-count"))
    assert +seen == +counts
    assert set(specs) == set(run.header.targets)


def test_a_killed_run_says_so_and_counts_what_is_missing(written, runs):
    run, _ = runs["killed"]
    tree = written["killed"].tree("index.html")
    notices = [text_of(n) for n in tree.xpath("//*[contains(@class, 'notice')]")]
    assert any(n.startswith("Run not finished.") and "with 300 of 808" in n for n in notices), notices
    assert any("line 302 ends in the middle" in n for n in notices)
    (missing,) = tree.xpath("//*[@class='glance']//a[contains(@href, 'not-run')]/@data-count")
    assert int(missing) == len(run.header.manifest) - 300
    assert "Run not finished" in written["killed"].tree("verdicts/not-run.html").text_content()
    assert "Run not finished" not in written["realistic"].tree("index.html").text_content()


def test_an_empty_run_says_that_there_is_nothing(written):
    tree = written["empty"].tree("index.html")
    assert "Nothing was planned in this run" in tree.text_content()
    assert not tree.xpath("//*[@id='results']")
    assert "There are no results." in text_of(tree.xpath("//*[@id='attention']")[0])


def test_unusable_targets_have_a_reason_and_a_command(written):
    section = written["realistic"].tree("index.html").xpath("//*[@id='unavailable']")[0]
    vllm, openai = section.xpath(".//li")
    assert "its environment is not installed" in text_of(vllm)
    assert text_of(vllm.xpath(".//pre")[0]) == "conformance targets install vllm@0.21.0"
    assert "CONFORMANCE_OPENAI_URL" in text_of(openai)
    assert not openai.xpath(".//pre")


def test_failures_come_before_known_ones_and_every_one_is_listed(written, runs):
    run, _ = runs["realistic"]
    tree = written["realistic"].tree("index.html")
    sections = tree.xpath("//main//section/@id")
    assert sections.index("attention") < sections.index("expected") < sections.index("policies")
    listed = tree.xpath("//*[@id='attention']//*[@data-item]")
    wanted = [r for r in run.results if r.verdict in ("fail", "xpass", "error", "timeout", "inconclusive")]
    assert len(listed) == len(wanted) > 10
    xfails = [r for r in run.results if r.verdict == "xfail"]
    expected = tree.xpath("//*[@id='expected']")[0]
    assert len(expected.xpath(".//*[@data-item]")) == len(xfails) > 3
    assert text_of(expected).count("reported as vllm-project/vllm#39027") == len(xfails)


def test_long_lists_on_the_overview_are_cut_and_link_to_the_whole(tmp_path):
    run = fixtures.realistic_run()
    results = tuple(
        r.model_copy(update={"verdict": "fail", "reason": "broken"}) if r.target == "vllm@0.32.0" else r
        for r in run.results
    )
    pages = Pages(write_site(run.model_copy(update={"results": results}), tmp_path / "site").resolve())
    section = pages.tree("index.html").xpath("//*[@id='attention']")[0]
    fails = len([r for r in results if r.verdict == "fail"])
    assert len(section.xpath(".//ol")[0].xpath(".//*[@data-item]")) < fails
    assert f"All {fails} in one list" in text_of(section)
    assert len(pages.tree("verdicts/fail.html").xpath("//*[@data-item]")) == fails


def test_policies_show_which_answer_each_target_gave(written):
    tree = written["realistic"].tree("index.html")
    row = tree.xpath("//*[@id='policies']//tbody/tr")[0]
    cells = [text_of(td) for td in row.xpath("./td")]
    assert cells == ["◇policypartial-call", "◇policypartial-call", "◇policyraw-text", "\u2013skip"]
    page = row.xpath("./th/a/@href")[0]
    answers = written["realistic"].tree(page).xpath("//*[@class='answers']/li")
    assert [text_of(a.xpath("./h3")[0]) for a in answers] == ["partial-call", "raw-text"]
    assert "Given by reference, vllm@0.32.0." in text_of(answers[0])
    assert "Held by vLLM's older parser" in text_of(answers[1])


def test_stream_coverage_counts_every_parser_case_of_a_target(written, runs):
    run, _ = runs["realistic"]
    rows = written["realistic"].tree("index.html").xpath("//*[@id='streams']//tbody/tr")
    for row, spec in zip(rows, run.header.targets, strict=True):
        numbers = [int(td.text_content()) for td in row.xpath("./td")]
        parsed = [r for r in run.results if r.target == spec and r.kind == "parser"]
        kinds = Counter(r.evidence.stream.kind if r.evidence.stream else "unrecorded" for r in parsed)
        assert numbers == [kinds[k] for k in ("certified", "sampled", "unsupported", "unrecorded")]


def test_a_later_line_of_a_resumed_run_replaces_an_earlier_one(runs):
    run, _ = runs["realistic"]
    again = run.results[0].model_copy(update={"verdict": "fail"})
    site = Site(run.model_copy(update={"results": (*run.results, again)}))
    assert site.total == len(run.header.manifest)
    assert site.entries[0].status == "fail"


def test_a_result_outside_the_manifest_is_kept_and_flagged(runs, tmp_path):
    run, _ = runs["one-target"]
    stray = run.results[0].model_copy(update={"case": "stray-case"})
    pages = Pages(
        write_site(run.model_copy(update={"results": (*run.results, stray)}), tmp_path / "s").resolve()
    )
    assert "1 result is not in the run's manifest" in text_of(pages.tree("index.html").xpath("//main")[0])
    flagged = pages.tree(f"verdicts/{status_of(stray)}.html").xpath("//*[@class='flag']/ancestor::li")
    assert ["stray-case" in text_of(f) for f in flagged] == [True]


# Suites and cases


def test_negative_controls_stand_behind_their_case(written):
    tree = written["realistic"].tree("suites/parser-tool-calls.html")
    rows = tree.xpath("//tbody/tr")
    ids = [text_of(row.xpath(".//*[@class='id']")[0]).split(" ")[0] for row in rows]
    controls = [i for i in ids if i.endswith("-control")]
    assert len(controls) == 10
    for control in controls:
        number = int(control.split("-")[-2])
        assert ids[ids.index(control) - 1] == f"call-after-text-{number - 1}"
    assert len(tree.xpath("//tr[@class='control']//*[@class='tag']")) == 10
    case = written["realistic"].tree("cases/parser-tool-calls/call-after-text-3.html")
    (link,) = case.xpath("//dt[text()='Negative controls']/following-sibling::dd/a/@href")
    assert link.endswith("call-after-text-4-control.html")


def test_controls_in_a_circle_lose_no_case(runs):
    _, suites = runs["realistic"]
    site = Site(runs["realistic"][0], suites)
    suite = next(s for s in site.suites if s.id == "parser/tool-calls")
    first, second = suite.cases[:2]
    suite.controls.update({first.id: [second], second.id: [first]})
    assert sorted(c.id for c in suite.ordered()) == sorted(c.id for c in suite.cases)


def test_facts_of_a_changed_suite_are_not_mixed_with_the_run(runs, tmp_path):
    run, suites = runs["realistic"]
    manifest = tuple(p.model_copy(update={"digest": "other"}) for p in run.header.manifest)
    changed = run.model_copy(
        update={
            "header": run.header.model_copy(
                update={"manifest": manifest, "suites": dict.fromkeys(run.header.suites, "other")}
            )
        }
    )
    pages = Pages(write_site(changed, tmp_path / "site", suites).resolve())
    tree = pages.tree("suites/parser-tool-calls.html")
    assert "The suite's file has changed since this run." in text_of(tree)
    assert "Calls, their names and their place among text." in text_of(tree)
    assert not tree.xpath("//tr[@class='control']")


def test_a_suite_without_its_file_is_shown_from_the_run_alone(written, runs):
    tree = written["file-only"].tree("suites/parser-typing.html")
    assert text_of(tree.xpath("//h1")[0]) == "parser/typing"
    assert len(tree.xpath("//tbody/tr")) == 40
    assert "A declared integer comes out as a number, 7 and not its text" in text_of(tree)


def test_a_failing_case_shows_the_difference_the_chunks_and_how_to_repeat_it(written, runs):
    page, anchor = problem_case(runs["realistic"][0], "stream-equals-whole")
    tree = written["realistic"].tree(page)
    section = tree.xpath("//*[@id=$id]", id=anchor)[0]
    assert section.xpath(".//ins")
    assert "stream-equals-whole" in text_of(section)
    figure = section.xpath(".//figure")[0]
    assert "3 chunks; cut after token 1," in text_of(figure)
    chunks = [pre.text_content() for pre in figure.xpath(".//li/pre")]
    given_input = tree.xpath("//pre[@aria-label='Input']")[0].text_content()
    assert "".join(chunks) == given_input
    command = section.xpath(".//pre[@class='command']")[0].text_content()
    assert command.startswith("conformance run --target ")
    assert "::call-after-text-" in command


def test_a_case_shows_its_evidence(written, runs):
    run, _ = runs["realistic"]
    site = Site(run)
    entry = next(
        e for e in site.entries if e.result.evidence.stream and e.result.evidence.stream.kind == "certified"
    )
    section = written["realistic"].tree(entry.case.page).xpath("//*[@id='t.reference']")[0]
    pieces = entry.result.evidence.stream.pieces
    words = text_of(section.xpath(".//*[@class='stream']")[0])
    assert section.xpath(".//sup/text()") == [str(pieces - 1)]
    assert f"{2 ** (pieces - 1):,}".replace(",", "\u2009") in section.text_content()
    assert f"of {pieces} tokens" in words
    spans = section.xpath(".//pre[contains(@class, 'spans')]")[0]
    assert spans.text_content() == entry.result.evidence.input
    assert "dropped: label of the channel" in spans.xpath(".//@data-role")
    crashed = next(e for e in site.of("error"))
    section = written["realistic"].tree(crashed.case.page).xpath(f"//*[@id='t.{crashed.target.slug}']")[0]
    assert "Segmentation fault" in text_of(section.xpath(".//details")[-1])
    known = next(e for e in site.of("xfail"))
    section = written["realistic"].tree(known.case.page).xpath(f"//*[@id='t.{known.target.slug}']")[0]
    assert "suites/expectations/vllm.yaml:14" in text_of(section)


def test_a_case_shows_what_is_given_beside_its_input(written):
    tree = written["realistic"].tree("cases/parser-typing/declared-integer-0.html")
    (given_with,) = tree.xpath("//h3[text()='What the case also states']/following-sibling::dl")
    assert given_with.xpath("./dt/text()") == ["tools"]
    assert '"name": "get_weather"' in given_with.text_content()
    tree = written["realistic"].tree("cases/parser-reasoning/label-is-dropped-0.html")
    assert not tree.xpath("//h3[text()='What the case also states']")
    tree = written["realistic"].tree("cases/template-turns/system-turn-0.html")
    assert not tree.xpath("//h3[text()='Prompt that it answers']")


def test_sources_that_can_be_read_are_linked(written):
    tree = written["realistic"].tree("cases/parser-reasoning/direct-answer-is-content-2.html")
    links = tree.xpath("//dt[text()='Sources']/following-sibling::dd/a")
    assert [a.get("href") for a in links] == ["https://github.com/vllm-project/vllm/issues/39027"]
    assert "spec 6.5" in text_of(tree.xpath("//dt[text()='Sources']/following-sibling::dd")[0])


def test_input_can_be_copied_as_it_was(written, runs):
    run, _ = runs["realistic"]
    for entry in Site(run).entries:
        if entry.target.spec == "reference" and entry.planned.kind == "parser":
            tree = written["realistic"].tree(entry.case.page)
            (block,) = tree.xpath("//pre[@aria-label='Input']")
            assert block.text_content() == entry.result.evidence.input


# Untrusted text


def test_hostile_text_makes_no_element_attribute_or_address(written):
    for page in written["hostile"]:
        raw = page.read_text("utf-8")
        assert not _UNSEEN.search(raw), page
        tree = written["hostile"].tree(page)
        assert not tree.xpath("//script|//img|//style|//iframe|//object|//base|//form|//svg[@onload]"), page
        assert not [a for e in tree.iter("*") for a in e.attrib if a.startswith("on") or a == "style"], page
        assert not [
            h for h in tree.xpath("//@href") if h.strip().lower().startswith(("javascript:", "data:"))
        ]


def test_hostile_text_is_shown_where_it_belongs(written, runs):
    site = Site(runs["hostile"][0])
    for entry in site.entries:
        wanted = entry.result.evidence.input
        if len(wanted) < LONG_TEXT:
            block = written["hostile"].tree(entry.case.page).xpath("//pre[@aria-label='Input']")[0]
            assert re.sub(r"\[|\]", "", plain(wanted)) == re.sub(r"\[|\]", "", block.text_content())


@pytest.mark.parametrize("name", RUNS)
def test_page_names_are_slugs(written, name):
    for file in written[name].root.rglob("*"):
        parts = file.relative_to(written[name].root).parts
        assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*(\.(html|css|svg))?", p) for p in parts) or parts == (
            MARKER,
        )
