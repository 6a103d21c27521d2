"""The dashboard's pages beside a run: release ladders and backtests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lxml import html

from conformance import history
from conformance.backtests import BacktestResult, Findings, read_findings
from conformance.errors import UsageError
from conformance.history import Cell, Ladder, LadderRow, Rung
from conformance.report import write_site
from conformance.reporting.ladders import LadderView
from conformance.reporting.view import Site
from conformance.results import Verdict
from tests import run_fixtures as fixtures
from tests.conftest import Run as Command
from tests.test_report import Pages, text_of

SIGNS: dict[str, tuple[Verdict, bool]] = {
    ".": ("pass", False),
    "F": ("fail", False),
    "f": ("fail", True),
    "T": ("timeout", False),
    "-": ("skip", False),
}
VERSIONS = ("0.9", "1.0", "1.1", "1.2", "2.0")
HOSTILE = "<script>alert(1)</script>::x\"'><img src=x onerror=alert(2)>"


def ladder_of(rows: dict[str, str], target: str = "toy", missing: str = "") -> Ladder:
    """A ladder from one sign for each release."""
    usable = [version for version in VERSIONS if version != missing]
    return Ladder(
        target=target,
        sources="0123456789abcdef",
        releases=tuple(
            Rung(
                spec=f"{target}@{v}",
                version=v,
                reason="not installed; run `install it`" if v == missing else "",
            )
            for v in VERSIONS
        ),
        rows=tuple(
            LadderRow(
                case=case,
                source=("T01",),
                cells={
                    f"{target}@{version}": Cell(
                        verdict=SIGNS[sign][0],
                        known=SIGNS[sign][1],
                        rules=("marker-leak",) if sign in "fF" else (),
                    )
                    for version, sign in zip(usable, signs, strict=True)
                },
            )
            for case, signs in rows.items()
        ),
    )


ROWS = {
    "parser/demo::always": ".....",
    "parser/demo::never": "fffff",
    "parser/demo::mended": "FF...",
    "parser/demo::broke": "...fF",
    "parser/demo::twice": "F.F..",
    "parser/demo::over-a-skip": "F-.TT",
    "parser/other::never": "FFFFF",
    "parser/other::expected-last": "FFFFf",
}


def view(rows: dict[str, str], missing: str = "") -> LadderView:
    return LadderView(ladder_of(rows, missing=missing), Site(fixtures.empty_run()), "toy")


# ---------------------------------------------------------------------------------------------- the view


@pytest.mark.parametrize(
    ("signs", "turns"),
    [
        (".....", []),
        ("fffff", []),
        ("FF...", [("mended", "1.1")]),
        ("...fF", [("broke", "1.2")]),
        ("F.F..", [("mended", "1.0"), ("broke", "1.1"), ("mended", "1.2")]),
        ("F-.TT", [("mended", "1.1"), ("broke", "1.2")]),
        (".---F", [("broke", "2.0")]),
        ("-----", []),
        ("FTFTF", []),
    ],
)
def test_where_a_case_turns(signs: str, turns: list[tuple[str, str]]) -> None:
    found = view({"parser/demo::x": signs})
    (line,) = found.suites[0].lines
    assert [(kind, release.version) for kind, release, _ in line.turns] == turns
    marked = [(step.turn, v) for step, v in zip(line.steps, VERSIONS, strict=True) if step.turn]
    assert marked == turns
    for release in found.releases:
        assert len(release.mended) == (("mended", release.version) in turns)
        assert len(release.broke) == (("broke", release.version) in turns)


def test_cases_are_grouped_by_suite_and_by_whether_they_change() -> None:
    demo, other = view(ROWS).suites
    assert (demo.id, other.id) == ("parser/demo", "parser/other")
    assert [line.id for line in demo.changing] == ["mended", "broke", "twice", "over-a-skip"]
    assert {status: [line.id for line in lines] for status, lines in demo.steady.items()} == {
        "pass": ["always"],
        "xfail": ["never"],
    }
    assert other.changing == [], "that an expectation covers some failures is no change"
    assert [line.id for line in other.steady["fail"]] == ["never", "expected-last"]


def test_releases_count_their_cases() -> None:
    first, *_, last = view(ROWS).releases
    assert first.counts == {"pass": 2, "fail": 5, "xfail": 1}
    assert last.counts == {"pass": 3, "fail": 2, "timeout": 1, "xfail": 2}
    assert list(last.counts) == ["pass", "fail", "timeout", "xfail"], "in the order of the signs"
    assert [(words, number) for _, words, number, _, _ in last.parts] == [
        ("pass", 3),
        ("fail", 4),
        ("timeout", 1),
    ]
    assert sum(width for *_, width in last.parts) == pytest.approx(100)


def test_failures_in_streams_alone_are_told_apart() -> None:
    def cell(verdict: Verdict, *, whole: bool | None) -> Cell:
        return Cell(verdict=verdict, whole=whole)

    cells = [cell("fail", whole=False), cell("timeout", whole=None), cell("fail", whole=True)]
    cells += [cell("pass", whole=True), cell("fail", whole=False)]
    ladder = ladder_of({"parser/demo::x": "....."}).model_copy(
        update={
            "rows": (
                LadderRow(
                    case="parser/demo::x",
                    source=(),
                    cells={f"toy@{v}": c for v, c in zip(VERSIONS, cells, strict=True)},
                ),
            )
        }
    )
    found = LadderView(ladder, Site(fixtures.empty_run()), "toy")
    (line,) = found.suites[0].changing
    assert [step.streams_only for step in line.steps] == [False, False, True, False, False]
    assert [(right, release.version) for right, release in line.whole_turns] == [(True, "1.1")]
    assert [(kind, release.version) for kind, release, _ in line.turns] == [
        ("mended", "1.2"),
        ("broke", "2.0"),
    ]
    assert [[words for _, words, *_ in release.parts] for release in found.releases] == [
        ["fail"],
        ["timeout"],
        ["fail in streams only"],
        ["pass"],
        ["fail"],
    ]


# ---------------------------------------------------------------------------------------------- the pages


@pytest.fixture(scope="module")
def findings() -> Findings:
    def found(i: str, state: str, case: str) -> BacktestResult:
        return BacktestResult.model_validate(
            {
                "id": i,
                "title": "The `last` word is lost.",
                "case": case,
                "last_bad": "toy@0.9",
                "first_good": "toy@1.0",
                "state": state,
                "proof": [f"toy@0.9 answers {i}", HOSTILE],
                "elsewhere": "Ollama" if i == "T02" else "",
            }
        )

    real = next(iter(Site(fixtures.realistic_run(fixtures.realistic_suites())).cases)).address
    return Findings(
        backtests=(
            found("T01", "detected", real),
            found("T02", "missed", HOSTILE),
            found("T03", "detected", real),
        ),
        not_reachable={
            "R01": "Its engine is not here.",
            "R02": "Its engine is not here.",
            "R03": "No release.",
        },
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, findings: Findings) -> Pages:
    suites = fixtures.realistic_suites()
    run = fixtures.realistic_run(suites)
    real = [case.address for case in Site(run, suites).cases[:2]]
    rows = {**ROWS, real[0]: "F....", real[1]: ".....", HOSTILE: "F...F"}
    ladders = [ladder_of({"old::x": "FFFFF"}), ladder_of({"a::x": "F..."}, "other", "1.1"), ladder_of(rows)]
    folder = tmp_path_factory.mktemp("releases") / "site"
    return Pages(write_site(run, folder, suites, ladders=ladders, backtests=findings).resolve())


def test_the_overview_links_them(site: Pages) -> None:
    section = site.tree("index.html").xpath("//section[@id='releases']")[0]
    assert section.xpath(".//a/@href") == ["ladders/toy.html", "ladders/other.html", "backtests.html"]
    assert "11 cases on 5 releases; releases differ on 6" in text_of(section), "the last ladder of a target"
    assert "2 detected, 1 missed" in text_of(section)
    assert site.tree("policies.html").xpath("//header//a[text()='Releases']/@href") == ["index.html#releases"]


def test_without_ladders_nothing_links_to_any(tmp_path: Path) -> None:
    pages = Pages(write_site(fixtures.wide_run(1), tmp_path / "site").resolve())
    assert not (pages.root / "ladders").exists()
    assert not pages.tree("index.html").xpath("//a[contains(@href, 'releases')]")


def test_a_row_says_in_words_what_its_cells_show(site: Pages) -> None:
    page = site.tree("ladders/toy.html")
    rows = {
        text_of(row.xpath("./th/span[@class='id']")[0]): row
        for row in page.xpath("//table[contains(@class,'ladder')]//tbody/tr")
    }
    twice = rows["twice · T01"]
    cells = [text_of(cell.xpath("./span[@class='hidden']")[0]) for cell in twice.xpath("./td")]
    assert cells == ["fail", "pass, first good", "fail, first bad", "pass, first good", "pass"]
    assert "▲ mended in 1.0; ▼ broke in 1.1 (marker-leak); ▲ mended in 1.2" in text_of(twice)
    assert all(cell.xpath("./span[@aria-hidden]") for cell in twice.xpath("./td")), "glyphs are not read out"
    assert "always" not in rows, "what does not change is folded"
    folded = page.xpath("//section[@id='s.parser-demo']/details")
    assert [text_of(fold.xpath("./summary")[0]) for fold in folded] == [
        "✓pass on every release: 1 case",
        "⊗expected failure on every release: 1 case",
    ]
    assert not any(fold.get("open") for fold in page.xpath("//details"))


def test_each_release_lists_what_changed_in_it(site: Pages) -> None:
    page = site.tree("ladders/toy.html")
    mended = page.xpath("//ul[@id='r.1-1.mended']")[0]
    assert [text_of(item) for item in mended.xpath(".//a")] == ["mended", "over-a-skip"]
    row = site.at(site.root / "ladders/toy.html", mended.xpath(".//a/@href")[0])
    assert row is not None
    assert row.tag == "tr"


def test_releases_without_verdicts_say_why(site: Pages) -> None:
    missing = site.tree("ladders/other.html").xpath("//section[@id='missing']")[0]
    assert [text_of(part) for part in missing.xpath(".//dl/div/*")] == [
        "1.1",
        "not installed; run install it",
    ]
    header = site.tree("ladders/other.html").xpath("//table[contains(@class,'ladder')]/thead//code")
    assert [text_of(code) for code in header] == ["0.9", "1.0", "1.2", "2.0"]


def test_cases_of_the_run_are_linked(site: Pages) -> None:
    links = site.tree("ladders/toy.html").xpath("//section[@id='cases']//a[contains(@href, '../cases/')]")
    assert len(links) == 2


def test_backtests_show_their_proof(site: Pages) -> None:
    page = site.tree("backtests.html")
    assert [text_of(h) for h in page.xpath("//h2")] == ["detected 2", "missed 1", "Without a backtest 3"]
    missed = page.xpath("//li[@id='b.t02.toy-0-9']")[0]
    assert "The catalogue has the fault of Ollama" in text_of(missed)
    assert missed.xpath("./details/@open"), "a miss shows what is lacking at once"
    assert HOSTILE in text_of(missed)
    terms = {
        text_of(term.xpath("./dt")[0]): text_of(term.xpath("./dd")[0]) for term in page.xpath("//dl/div")
    }
    assert terms == {"R01, R02": "Its engine is not here.", "R03": "No release."}


def test_the_pages_keep_the_rules_of_all_pages(site: Pages) -> None:
    from tests import test_report as rules

    written = {"releases": site}
    rules.test_tags_are_balanced_and_ids_are_unique(written, "releases")
    rules.test_pages_have_landmarks_headings_and_a_policy(written, "releases")
    rules.test_tables_have_captions_scopes_and_a_keyboard(written, "releases")
    rules.test_nothing_is_asked_from_elsewhere(written, "releases")
    rules.test_every_internal_link_resolves(written, "releases")
    rules.test_every_number_in_a_table_is_a_link(written, "releases")
    rules.test_every_counted_number_is_the_length_of_the_list_it_links_to(written, "releases")
    rules.test_every_sign_has_its_glyph_and_its_word(written, "releases")


def test_hostile_names_make_no_element(site: Pages) -> None:
    for page in ("ladders/toy.html", "backtests.html"):
        assert not site.tree(page).xpath("//script | //img | //@onerror")
        assert "onerror" in text_of(site.tree(page)), "it is shown"


def test_five_hundred_cases_on_sixteen_releases_stay_readable(tmp_path: Path) -> None:
    versions = tuple(f"0.{k}.0" for k in range(16))
    signs = ["F" * (k % 17) + "." * (16 - k % 17) for k in range(500)]
    ladder = Ladder(
        target="toy",
        sources="0" * 64,
        releases=tuple(Rung(spec=f"toy@{v}", version=v) for v in versions),
        rows=tuple(
            LadderRow(
                case=f"parser/s{k % 20}::case-{k}",
                source=(),
                cells={
                    f"toy@{v}": Cell(verdict=SIGNS[sign][0]) for v, sign in zip(versions, row, strict=True)
                },
            )
            for k, row in enumerate(signs)
        ),
    )
    write_site(fixtures.empty_run(), tmp_path / "site", ladders=[ladder])
    page = tmp_path / "site/ladders/toy.html"
    tree = html.document_fromstring(page.read_bytes())
    assert page.stat().st_size < 2_000_000
    assert len(tree.xpath("//table[contains(@class,'ladder')]")) == 20
    changing = sum(len(set(row)) > 1 for row in signs)
    assert len(tree.xpath("//table[contains(@class,'ladder')]//tbody/tr")) == changing


# -------------------------------------------------------------------------------------------- command line


def test_command_line(run_conformance: Command, tmp_path: Path, findings: Findings) -> None:
    run = tmp_path / "run.jsonl"
    done = run_conformance(
        "run",
        "parser/typing::nullable-null",
        "-t",
        "reference",
        "--out",
        str(run),
        "--no-report",
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "ladder.json").write_text(ladder_of(ROWS).model_dump_json())
    (tmp_path / "backtests.json").write_text(findings.model_dump_json())
    files = ("--ladder", str(tmp_path / "ladder.json"), "--backtests", str(tmp_path / "backtests.json"))
    done = run_conformance("report", str(run), "--out", str(tmp_path / "site"), *files)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/ladders/toy.html").is_file()
    assert (tmp_path / "site/backtests.html").is_file()


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"target": "toy"}), "\xff"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"file\.json: is not what `conformance ladder` writes"):
        history.read(path)
    with pytest.raises(UsageError, match=r"file\.json: is not what `conformance backtest --out FILE` writes"):
        read_findings(path)


def test_absent_files_are_refused(tmp_path: Path) -> None:
    for read in (history.read, read_findings):
        with pytest.raises(UsageError, match=r"none\.json: cannot be read: No such file"):
            read(tmp_path / "none.json")
