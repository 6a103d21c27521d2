"""Pages of accuracy: scores over time, outcome classes, and every item with its prompt and answer."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from lxml import html

from conformance.report import write_site
from conformance.reporting.accuracy import MOST_POINTS, AccuracyView, points, settings
from conformance.reporting.items import CLASSES, ITEMS_ON_A_PAGE
from conformance.reporting.text import plain
from conformance.reporting.view import Site
from conformance.results import Header, Result, Run
from conformance.scoring import OUTCOMES
from conformance.store import StoredVerdict
from conformance.store.history import Store
from tests import test_report
from tests.history_runs import (
    CASE,
    INFO,
    SUITE,
    accuracy_result,
    decision,
    footer,
    header,
    item,
    items_of,
    planned,
    result,
    run_of,
    sheet,
    write,
)
from tests.run_fixtures import HOSTILE, empty_run
from tests.test_report import Pages, text_of
from tests.test_report_browser import CONTRASTS, DESK, PHONE, browser, opened  # noqa: F401

COUNTS = {"correct": 120, "wrong": 6, "unparsable": 3, "truncated": 2, "empty": 1, "transport-error": 1}
STRUCTURE = [
    test_report.test_tags_are_balanced_and_ids_are_unique,
    test_report.test_pages_have_landmarks_headings_and_a_policy,
    test_report.test_tables_have_captions_scopes_and_a_keyboard,
    test_report.test_nothing_is_asked_from_elsewhere,
    test_report.test_every_internal_link_resolves,
    test_report.test_every_number_in_a_table_is_a_link,
    test_report.test_every_counted_number_is_the_length_of_the_list_it_links_to,
    test_report.test_every_sign_has_its_glyph_and_its_word,
]


def whole(head: Header, *results: Result) -> Run:
    return Run(
        header=head.model_copy(update={"manifest": planned(*results)}), results=results, footer=footer()
    )


def scored(right: int = 120, *, verdict: str = "pass", **changes: object) -> Result:
    """120 items or so, four of which the reference alone has right, and two the target alone."""
    answers = sheet(items_of(COUNTS | {"correct": right}))
    wrong = [i.doc_id for i in answers.items if i.outcome in ("wrong", "truncated")]
    right_ids = [i.doc_id for i in answers.items if i.outcome == "correct"]
    made = decision(answers, lost=wrong[:4], gained=right_ids[-2:], verdict=verdict)
    return accuracy_result(answers, made, **changes)


def night(number: int, *results: Result) -> Run:
    return whole(header(f"n{number}", f"2026-11-{number:02}T02:00:00+00:00"), *results)


def plain_run() -> Run:
    skipped = result("gsm8k-31b", "skip", reason="the checkpoint is not at hand")
    other = scored(100, verdict="fail", target="engine@2")
    answers = sheet(items_of({"correct": 3}), task="nano_mmmu", checkpoint="nano-a")
    refused = accuracy_result(answers, None, "mmmu-a", "error", reason="the prompts are other ones")
    return night(9, scored(), other, skipped, refused)


def hostile_run() -> Run:
    odd = [item(n, answer=t, prompt=t, doc_id=f"{n} {t}", expected=t, error=t) for n, t in enumerate(HOSTILE)]
    odd += [item(100 + n, "wrong", extracted=t, cluster=t, finish_reason=t) for n, t in enumerate(HOSTILE)]
    answers = sheet(
        odd, task=HOSTILE[0], checkpoint=HOSTILE[2], effective={HOSTILE[3]: HOSTILE[1]}, dtype=HOSTILE[9]
    )
    made = decision(answers, lost=[odd[13].doc_id], gained=[odd[0].doc_id], sentence=" ".join(HOSTILE))
    one = accuracy_result(answers, made, reason=HOSTILE[0], target=HOSTILE[3])
    return whole(header(targets={HOSTILE[3]: INFO}), one)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory):
    """Eight nights of two targets before the plain run, in a database; one target is not in that run."""
    folder = tmp_path_factory.mktemp("history")
    with Store(f"sqlite:///{folder}/h.sqlite", create=True) as store:
        for number in range(1, 9):
            right = 90 if number == 5 else 118 + number % 3
            results = [
                scored(right, verdict="fail" if number == 5 else "pass"),
                scored(right, target="gone@1"),
            ]
            if number == 3:
                results[0] = result(verdict="error", reason="the worker died")
            run = night(number, *results)
            store.merge_file(write(folder / "r.jsonl", run.header, *results, footer()))
        return store.accuracy()


@pytest.fixture(scope="module")
def written(history, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pages]:
    folder = tmp_path_factory.mktemp("sites")
    runs = {"plain": (plain_run(), None), "history": (plain_run(), history), "hostile": (hostile_run(), None)}
    return {
        name: Pages(write_site(run, folder / name, history=past).resolve())
        for name, (run, past) in runs.items()
    }


@pytest.mark.parametrize("name", ["plain", "history", "hostile"])
@pytest.mark.parametrize("check", STRUCTURE, ids=lambda check: check.__name__.removeprefix("test_"))
def test_the_pages_are_built_like_all_others(written, name, check):
    check(written, name)


def series_page(written: Pages, target: str = "fake") -> tuple[str, html.HtmlElement]:
    tree = written.tree("accuracy.html")
    (href,) = {
        a.get("href")
        for a in tree.xpath("//tbody//th/a")
        if text_of(a) == target and "nano-g" in a.get("href")
    }
    return href, written.tree(href)


# -------------------------------------------------------------------------------------------- scores


def test_the_overview_has_a_row_for_each_score(written):
    tree = written["plain"].tree("accuracy.html")
    sections = {text_of(s.xpath("./h2")[0]): s for s in tree.xpath("//section[.//tbody]")}
    assert set(sections) == {"nano_gsm8k on nano-e", "nano_mmmu on nano-a"}
    rows = [[text_of(cell) for cell in row] for row in sections["nano_gsm8k on nano-e"].xpath(".//tbody/tr")]
    fake, engine = rows
    assert fake[0].startswith("fake accuracy/nano::gsm8k-e")
    assert fake[1].endswith("pass")
    assert fake[2] == "90.2 %88.2 % to 92.2 %"
    assert (fake[4], fake[5]) == ("+1.5+0.3 to +2.7", "2.0")
    assert fake[6] == "120 correct, 6 wrong, 3 unparsable, 2 truncated, 1 empty, 1 transport-error"
    assert engine[1].endswith("fail")
    (refused,) = sections["nano_mmmu on nano-a"].xpath(".//tbody/tr")
    assert "the prompts are other ones" in text_of(refused)
    without = tree.xpath("//section[@id='without']//li")
    assert [("not at hand" in text_of(li)) for li in without] == [True]


def test_a_strip_has_the_score_between_its_limits_and_the_gate_below_the_reference():
    view = AccuracyView(Site(plain_run()))
    task = next(task for task in view.tasks if task.name == "nano_gsm8k")
    strips = [task.strip(series) for series in task.series]
    for strip in strips:
        assert 0 < strip.low < strip.at < strip.high < 100
        assert 0 < strip.gate < strip.reference < 100
    margins = {round(strip.reference - strip.gate, 6) for strip in strips}
    assert len(margins) == 1  # one scale for all rows
    assert strips[0].at > strips[1].at


def test_one_run_is_shown_without_a_database(written):
    _, tree = series_page(written["plain"])
    assert len(tree.xpath("//svg[@aria-labelledby='scores-title']//g[contains(@class, 'mark')]")) == 1
    assert len(tree.xpath("//section[@id='history']//table[1]/tbody/tr")) == 2  # scores, and outcome classes
    assert "made with a database" in written["plain"].tree("accuracy.html").text_content()


def test_history_is_drawn_oldest_first_and_told_newest_first(written):
    _, tree = series_page(written["history"])
    (chart,) = tree.xpath("//svg[@aria-labelledby='scores-title']")
    assert chart.get("role") == "img"
    assert len(chart.xpath("./title|./desc")) == 2
    titles = chart.xpath(".//g/title/text()")
    assert [title.split(":")[0] for title in titles] == [f"{d} Nov" for d in (1, 2, 4, 5, 6, 7, 8, 9)]
    assert titles[3] == "5 Nov: 87.4 %, 85.4 % to 89.4 %, fail"
    assert titles[-1] == "9 Nov: 90.2 %, 88.2 % to 92.2 %, pass"
    for mark in chart.xpath(".//g[contains(@class, 'mark')]"):
        whisker, dot = mark.xpath("./path[@class='whisker']/@d")[0], mark.xpath("./circle[@class='dot']/@cy")
        top, bottom = map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", whisker).groups())
        assert top < bottom
        assert all(top < float(y) < bottom for y in dot)
    # One ring, around this run's mark, which is the last one.
    marks = chart.xpath(".//g[contains(@class, 'mark')]")
    assert [bool(mark.xpath("./*[@class='own']")) for mark in marks] == [False] * 7 + [True]
    assert [mark.get("class") for mark in marks].count("mark s-fail") == 1
    scores, classes = tree.xpath("//section[@id='history']//table")
    rows = [[text_of(cell) for cell in row] for row in scores.xpath("./tbody/tr")]
    assert [row[0].split(" November")[0] for row in rows] == [str(day) for day in range(9, 0, -1)]
    assert rows[6][1:] == ["!error", "the worker died"]
    assert rows[4][2:4] == ["87.4 %", "85.4 % to 89.4 %"]
    outcomes = [[text_of(cell) for cell in row][1:] for row in classes.xpath("./tbody/tr")]
    assert outcomes[0] == [str(COUNTS.get(name, 0)) for name in OUTCOMES]
    assert outcomes[4] == [str((COUNTS | {"correct": 90}).get(name, 0)) for name in OUTCOMES]
    assert outcomes[6] == ["no items"]


def test_what_only_the_history_has_is_shown_as_that(written, history):
    _, tree = series_page(written["history"], "gone@1")
    assert "Not of this run. The newest scores are those of run n8" in tree.xpath("//main")[0].text_content()
    assert not tree.xpath("//a[text()='The case in this run']")
    assert tree.xpath("//ul[@class='filters']//a[contains(@href, 'wrong-1')]/@data-total") == ["6"]
    assert (SUITE, CASE, "gone@1") in history
    assert len(history[SUITE, CASE, "gone@1"][-1][1].evidence.accuracy.sheet.items) == 133


def test_the_run_of_the_dashboard_is_one_point_also_when_it_is_stored(history):
    run = plain_run()
    verdict, stored = history[SUITE, CASE, "fake"][-1]
    past = dict(history)
    mine = verdict.model_copy(update={"run_id": run.header.run_id, "started": run.header.started})
    past[SUITE, CASE, "fake"] = [*history[SUITE, CASE, "fake"], (mine, stored)]
    (series,) = [s for s in AccuracyView(Site(run), past).series if s.key == (SUITE, CASE, "fake")]
    assert [point.own for point in series.points] == [False] * 8 + [True]
    assert series.latest.result is run.results[0]


def test_an_older_run_stands_at_its_place_and_shows_its_own_scores(history):
    run = whole(header("n4b", "2026-11-04T03:00:00+01:00"), scored(111))
    (series,) = [s for s in AccuracyView(Site(run), history).series if s.key == (SUITE, CASE, "fake")]
    assert [point.run_id for point in series.points] == [
        "n1",
        "n2",
        "n3",
        "n4",
        "n4b",
        *(f"n{k}" for k in (5, 6, 7, 8)),
    ]
    assert series.latest.own
    assert series.decision.score.count == 111


def test_a_run_without_scores_of_its_own_shows_the_last_ones(history):
    run = night(9, result(verdict="error", reason="the worker died"))
    view = AccuracyView(Site(run), history)
    (series,) = [s for s in view.series if s.key == (SUITE, CASE, "fake")]
    assert (series.latest.run_id, series.latest.own) == ("n8", False)
    assert [entry.summary for entry in view.without] == ["the worker died"]
    assert view.of(view.without[0]) is None


def test_a_chart_holds_the_newest_runs(tmp_path):
    shared = {"suite": SUITE, "case": CASE, "target": "fake", "kind": "accuracy", "area": "accuracy"}
    verdict = StoredVerdict(
        run_id="", started="", harness="0", commit=None, verdict="pass", digest="d1", **shared
    )
    past = []
    for number in range(MOST_POINTS + 9):
        stamp = f"2025-01-01T{number // 60:02}:{number % 60:02}:00+00:00"
        past.append((verdict.model_copy(update={"run_id": f"r{number}", "started": stamp}), scored()))
    pages = Pages(write_site(plain_run(), tmp_path / "s", history={(SUITE, CASE, "fake"): past}).resolve())
    _, tree = series_page(pages)
    assert f"The newest {MOST_POINTS} of {MOST_POINTS + 10} runs." in tree.text_content()
    rows = tree.xpath("//section[@id='history']//table")[0].xpath("./tbody/tr")
    assert len(rows) == MOST_POINTS
    assert rows[0].get("class") == "own-run"
    assert "r10" in text_of(rows[-1])


def test_settings_stand_beside_those_of_the_reference():
    one = scored()
    accuracy = one.evidence.accuracy
    theirs = accuracy.sheet.header.model_copy(
        update={"target": "reference", "effective": {"attention": "sdpa"}}
    )
    evidence = accuracy.model_copy(update={"reference": theirs})
    found = {setting.name: setting for setting in settings(evidence)}
    assert (found["target"].mine, found["target"].theirs, found["target"].differs) == (
        "fake",
        "reference",
        True,
    )
    assert found["effective attention"].differs
    assert not found["thinking"].differs
    assert {setting.theirs for setting in settings(accuracy)} == {""}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0123, "+1.2"), (-0.0123, "\u22121.2"), (0.0, "0.0"), (-0.00001, "0.0"), (0.0005, "+0.1")],
)
def test_points_have_a_sign_unless_they_are_none(value, shown):
    assert points(value) == shown


# --------------------------------------------------------------------------------------------- items


def all_items(pages: Pages, folder: str, name: str) -> list[html.HtmlElement]:
    found, number = [], 1
    while (pages.root / folder / f"{name}-{number}.html").exists():
        found += pages.tree(f"{folder}/{name}-{number}.html").xpath("//main/section[@data-item]")
        number += 1
    return found


def doc_id(section: html.HtmlElement) -> str:
    return re.match(r"Item (\S+)", text_of(section.xpath("./h2")[0]))[1]


def test_every_item_is_in_the_list_of_its_class_once_and_links_say_how_many(written):
    href, tree = series_page(written["plain"])
    answers = plain_run().results[0].evidence.accuracy
    totals = {
        a.get("href").rsplit("/", 1)[1].removesuffix("-1.html"): int(a.get("data-total"))
        for a in tree.xpath("//ul[@class='filters']//a")
    }
    assert list(totals) == [
        "discordant",
        "wrong",
        "unparsable",
        "truncated",
        "empty",
        "transport-error",
        "correct",
    ]
    assert totals == {"discordant": 6} | COUNTS
    by_class = {item.doc_id: item.outcome for item in answers.sheet.items}
    seen: Counter[str] = Counter()
    for name, total in totals.items():
        listed = [
            doc_id(section) for section in all_items(written["plain"], href.removesuffix(".html"), name)
        ]
        assert len(listed) == total
        if name != "discordant":
            assert {by_class[listed_id] for listed_id in listed} == {name}
            seen.update(listed)
    assert seen == Counter(list(by_class))
    assert (written["plain"].root / href.removesuffix(".html") / "correct-3.html").exists()
    assert ITEMS_ON_A_PAGE == 50


def test_discordant_pairs_come_first_in_every_list(written):
    href, _ = series_page(written["plain"])
    made = plain_run().results[0].evidence.accuracy.decision
    folder = href.removesuffix(".html")
    listed = [doc_id(section) for section in all_items(written["plain"], folder, "discordant")]
    assert listed[:4] == sorted(made.lost, key=listed.index)
    assert set(listed[:4]) == set(made.lost)
    assert set(listed[4:]) == set(made.gained)
    first = all_items(written["plain"], folder, "correct")[:3]
    assert [doc_id(section) in made.gained for section in first] == [True, True, False]
    assert "gained: the reference has it wrong" in text_of(first[0])
    assert "lost: the reference has it right" in text_of(all_items(written["plain"], folder, "wrong")[0])


def test_an_item_shows_prompt_answer_and_what_was_read(written):
    href, _ = series_page(written["plain"])
    items = {item.doc_id: item for item in plain_run().results[0].evidence.accuracy.sheet.items}
    folder = href.removesuffix(".html")
    for name in ("correct", "unparsable", "empty"):
        section = all_items(written["plain"], folder, name)[-1]
        shown = items[doc_id(section)]
        texts = {pre.get("aria-label"): pre.text_content() for pre in section.xpath(".//pre")}
        assert texts["Prompt"] == shown.prompt
        assert texts.get("Answer", "") == shown.answer
        facts = {text_of(dt): text_of(dt.getnext()) for dt in section.xpath(".//dl//dt")}
        assert facts["Expected"] == shown.expected
        assert facts["Read in the answer"] == (shown.extracted or "nothing")
        assert text_of(section.xpath(".//h2/*[contains(@class, 'kind')]")[0]).endswith(name)


def test_pages_of_a_list_lead_to_each_other(written):
    href, _ = series_page(written["plain"])
    page = f"{href.removesuffix('.html')}/correct-2.html"
    tree = written["plain"].tree(page)
    assert "51 to 100 of 120." in tree.text_content()
    (pager,) = tree.xpath("//nav[@class='pager']")
    assert [a.get("href").rsplit("/", 1)[1] for a in pager.xpath("./a")] == [
        "correct-1.html",
        "correct-3.html",
    ]
    assert pager.xpath(".//a[@aria-current='page']/text()") == ["2"]
    assert tree.xpath("//ul[@class='filters']//a[@aria-current]/@data-total") == ["120"]


def test_a_case_page_leads_to_its_scores(written):
    tree = written["plain"].tree("cases/accuracy-nano/gsm8k-e.html")
    links = tree.xpath("//section[@id='t.fake']//a[contains(@href, 'accuracy/')]")
    assert [text_of(a) for a in links] == ["Score, history, and all 133 items with their answers"]
    assert "Made up by a test." in text_of(tree.xpath("//section[@id='t.fake']")[0])


def test_a_run_without_accuracy_has_no_such_page(tmp_path):
    pages = Pages(write_site(empty_run(), tmp_path / "site").resolve())
    assert not (pages.root / "accuracy.html").exists()
    assert not pages.tree("index.html").xpath("//a[contains(@href, 'accuracy')]")
    skipped = night(1, result("a", "skip", reason="no checkpoint"))
    pages = Pages(write_site(skipped, tmp_path / "site").resolve())
    assert "This run has no scores." in pages.tree("accuracy.html").text_content()


def test_hostile_answers_are_shown_and_not_obeyed(written):
    pages = written["hostile"]
    seen = ""
    for page in pages:
        tree = pages.tree(page)
        assert not tree.xpath("//script|//img|//svg[@onload]|//main//style|//*[@onmouseover]|//*[@onerror]")
        seen += tree.text_content()
    for text in HOSTILE[:8]:
        assert plain(text) in seen


def test_every_outcome_class_has_a_glyph_of_its_own():
    assert tuple(CLASSES) == OUTCOMES
    assert len({shown.glyph for shown in CLASSES.values()}) == len(CLASSES)
    assert len({shown.look for shown in CLASSES.values()}) == len(CLASSES)


# ------------------------------------------------------------------------------------------- browser


def kinds(written: dict[str, Pages]) -> list[Path]:
    found = []
    for pages in written.values():
        folder = min(path for path in (pages.root / "accuracy").iterdir() if path.is_dir())
        found += [pages.root / "index.html", pages.root / "accuracy.html", folder.with_suffix(".html")]
        found += [next(folder.glob("wrong-1.html")), next(folder.glob("discordant-1.html"))]
    return found


@pytest.mark.parametrize(
    ("width", "theme"), [(PHONE, "light"), (PHONE, "dark"), (768, "light"), (DESK, "dark")]
)
def test_the_pages_fit_their_window_and_ask_for_nothing(opened, written, width, theme):  # noqa: F811
    watched = opened(width, theme)
    for path in kinds(written):
        watched.open(path)
        across = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert across[0] <= across[1], f"{path} is {across[0]} wide in a window of {width}"
    assert watched.wrong == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_have_contrast(opened, written, theme):  # noqa: F811
    watched = opened(DESK, theme)
    for path in kinds({"history": written["history"]}):
        watched.open(path)
        low = [pair for pair in watched.page.evaluate(CONTRASTS) if pair[1] < 4.5]
        assert low == [], f"{path}: {low[:5]}"
    watched.open(written["history"].root / series_page(written["history"])[0])
    fill = watched.page.evaluate("getComputedStyle(document.querySelector('.chart .dot')).fill")
    assert fill == watched.page.evaluate("getComputedStyle(document.querySelector('.sign.s-pass')).color")


def test_hostile_items_run_nothing_even_where_scripts_may_run(opened, written):  # noqa: F811
    watched = opened(DESK, "light", scripts=True)
    for path in sorted((written["hostile"].root / "accuracy").rglob("*.html")):
        watched.open(path)
        assert "Gemma 4 conformance" in watched.page.title(), path
        assert watched.page.evaluate("document.scripts.length + document.images.length") == 0
    assert watched.wrong == []


def test_filters_and_pages_work_by_clicking_without_scripts(opened, written):  # noqa: F811
    watched = opened(DESK, "light")
    page = watched.page
    watched.open(written["plain"].root / "index.html")
    page.locator("nav[aria-label=Site] a", has_text="Accuracy").click()
    page.locator("tbody th a", has_text="fake").first.click()
    page.locator(".filters a", has_text="correct").click()
    assert page.locator("[data-item]").count() == ITEMS_ON_A_PAGE
    page.locator("nav.pager a[rel=next]").click()
    page.locator("nav.pager a[rel=next]").click()
    assert page.locator("[data-item]").count() == COUNTS["correct"] - 2 * ITEMS_ON_A_PAGE
    page.locator(".filters a", has_text="discordant").click()
    assert page.locator("[data-item]").count() == 6
    assert watched.wrong == []


# ------------------------------------------------------------------------------------------- command


def test_the_command_draws_history_only_with_a_database(tmp_path, run_conformance):
    url = f"sqlite:///{tmp_path}/h.sqlite"
    for number in (1, 2):
        run_of(tmp_path / f"{number}.jsonl", night(number).header, scored(118 + number))
    merged = run_conformance("store", "merge", "1.jsonl", "2.jsonl", "--database", url)
    assert merged.returncode == 0, merged.stderr
    for options, marks in (((), 1), (("--database", url), 2)):
        done = run_conformance("report", "2.jsonl", "--out", "site", *options)
        assert done.returncode == 0, done.stderr
        _, tree = series_page(Pages((tmp_path / "site").resolve()))
        assert len(tree.xpath("//svg[@aria-labelledby='scores-title']//g[contains(@class, 'mark')]")) == marks
    lost = run_conformance("report", "2.jsonl", "--out", "site", "--database", "sqlite:///nowhere.sqlite")
    assert (lost.returncode, "there is no history" in lost.stderr) == (2, True)
