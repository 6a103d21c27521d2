"""Pages beside a run: faults, what changed, what only one target fails, and the list of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import runfile, sealed
from conformance.comparison import Comparison, compare
from conformance.faults import registry
from conformance.faults.measure import Found, recorded
from conformance.faults.record import Basis, FaultRecord, FaultsFile
from conformance.faults.record import write as write_record
from conformance.faults.run import Catch
from conformance.report import make_pages, write_site
from conformance.reporting.alone import AloneView
from conformance.reporting.view import Site
from conformance.results import Run, Verdict
from conformance.store import StoredRun
from conformance.store.history import Store
from conformance.trials.clean import Alarm
from conformance.trials.record import TrialsFile
from tests import run_fixtures as fixtures
from tests.conftest import Run as Command
from tests.test_report import Pages, text_of
from tests.test_report_matrix import GOOD, HOSTILE, cell_run
from tests.test_trials import trials

AT = "2026-11-22T02:00:00+00:00"
BASIS = Basis(sources="s", cases="c", fault="f")


def found(fault: str, run: Run, *, area: str, cases: int, verdict: Verdict = "fail") -> FaultRecord:
    """A fault that the first cases of a run noticed."""
    addresses = list(dict.fromkeys(f"{plan.suite}::{plan.case}" for plan in run.header.manifest))[:cases]
    kind = registry()[fault].kind
    caught = tuple(
        Catch(case=address, kind=kind, area=area, verdict=verdict, rules=("expected",))
        for address in addresses
    )
    result = Found(
        fault=fault, basis=BASIS, cases=99, asked=88, seconds=1.0, at=AT, commit="c1", caught=caught
    )
    return recorded(registry()[fault], result, BASIS, None)


def record_of(run: Run) -> FaultsFile:
    late = found("index-by-tool", run, area="tool-calls", cases=0)
    return FaultsFile(
        faults=(
            found("label-kept", run, area="reasoning", cases=3),
            found("open-channel-ignored", run, area="typing", cases=2),  # noticed elsewhere
            late.model_copy(update={"last": late.last.model_copy(update={"reason": HOSTILE})}),
            found("double-bos", run, area="template", cases=2, verdict="error"),  # by crashes only
        ),
        digest="d" * 64,
    )


def trials_of(run: Run) -> TrialsFile:
    """Two alarms in the second clean run, one of a case of this run, and a lost result of a killed one."""
    plan = run.header.manifest[0]
    known = Alarm(
        address=f"{plan.suite}::{plan.case}", target=plan.target, verdict="fail", usual="pass", reason=HOSTILE
    )
    other = Alarm(
        address="parser/gone::one", target="reference", verdict=None, usual=None, reason="no result"
    )
    file = trials(lost=(f"{known.address} [reference]",))
    assert file.clean is not None
    first, second, *others = file.clean.runs
    alarming = second.model_copy(update={"alarms": (known, other)})
    clean = file.clean.model_copy(update={"runs": (first, alarming, *others)})
    return file.model_copy(update={"clean": clean})


def changed(run: Run, run_id: str, day: int, verdicts: list[Verdict | None]) -> Run:
    """The run as it was on another day: its first results have other verdicts, or were not there."""
    results = list(run.results)
    for number, verdict in enumerate(verdicts):
        if verdict is not None:
            results[number] = results[number].model_copy(update={"verdict": verdict})
    missing = {results[number].key for number, verdict in enumerate(verdicts) if verdict is None}
    kept = tuple(result for result in results if result.key not in missing)
    manifest = tuple(p for p in run.header.manifest if (p.suite, p.case, p.target) not in missing)
    started = f"2026-01-{day:02}T02:00:00+00:00"
    header = run.header.model_copy(
        update={"run_id": run_id, "started": started, "commit": f"commit-{day}", "manifest": manifest}
    )
    return run.model_copy(update={"header": header, "results": kept})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("history") / "h.sqlite"
    return Store(f"sqlite:///{path}", create=True)


@pytest.fixture(scope="module")
def run() -> Run:
    base = fixtures.wide_run(3)
    states: list[Verdict | None] = ["fail", "fail", "pass", "skip", "pass"]
    return changed(base, "run-of-tonight", 3, states)


@pytest.fixture(scope="module")
def cells() -> list[Run]:
    return [cell_run("vllm@0.32.0", "own", "pp2", {"one": "fail", "two": "pass"})]


@pytest.fixture(scope="module")
def comparison(store: Store, run: Run, cells: list[Run]) -> Comparison:
    earlier = changed(run, "run-before", 2, ["pass", "error", "timeout", "pass", None])
    older = changed(run, "run-long-before", 1, ["pass", "pass", "fail", "pass", None])
    for stored in (older, earlier):
        store.merge(stored, lines=len(stored.results))
    before = cell_run("vllm@0.32.0", "own", "pp2", GOOD, started="2025-12-31T02:00:00+00:00")
    store.merge(before, lines=4)
    return compare(store, [run, *cells])


@pytest.fixture(scope="module")
def runs(comparison: Comparison, store: Store) -> tuple[StoredRun, ...]:
    assert comparison.before  # the runs are merged
    return tuple(store.runs())


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    run: Run,
    comparison: Comparison,
    runs: tuple[StoredRun, ...],
    cells: list[Run],
) -> Pages:
    folder = tmp_path_factory.mktemp("extras") / "site"
    out = write_site(
        run,
        folder,
        faults=record_of(run),
        trials=trials_of(run),
        comparison=comparison,
        runs=runs,
        cells=cells,
    )
    return Pages(out.resolve())


def listed(site: Pages, page: str, section: str) -> list[str]:
    return [text_of(item) for item in site.tree(page).xpath(f"//*[@id='{section}']//*[@data-item]")]


def test_the_pages_keep_the_rules_of_all_pages(site: Pages) -> None:
    from tests import test_report as rules

    written = {"extras": site}
    rules.test_tags_are_balanced_and_ids_are_unique(written, "extras")
    rules.test_pages_have_landmarks_headings_and_a_policy(written, "extras")
    rules.test_tables_have_captions_scopes_and_a_keyboard(written, "extras")
    rules.test_nothing_is_asked_from_elsewhere(written, "extras")
    rules.test_every_internal_link_resolves(written, "extras")
    rules.test_every_number_in_a_table_is_a_link(written, "extras")
    rules.test_every_counted_number_is_the_length_of_the_list_it_links_to(written, "extras")
    rules.test_every_sign_has_its_glyph_and_its_word(written, "extras")


def test_every_new_page_is_linked_from_every_page(site: Pages) -> None:
    for page in ("index.html", "faults.html", "faults/label-kept.html"):
        links = {
            href.rpartition("/")[2] for href in site.tree(page).xpath("//nav[@aria-label='Site']//@href")
        }
        assert {"faults.html", "trials.html", "comparison.html", "runs.html"} <= links


def test_without_them_nothing_links_to_them(tmp_path: Path) -> None:
    pages = Pages(write_site(fixtures.wide_run(1), tmp_path / "site").resolve())
    names = {path.name for path in pages.root.rglob("*.html")}
    assert not names & {"faults.html", "trials.html", "comparison.html", "runs.html", "alone.html"}


# ------------------------------------------------------------------------------------------- faults


def test_the_table_of_faults_counts_cases_by_area(site: Pages) -> None:
    tree = site.tree("faults.html")
    (row,) = tree.xpath("//tr[th/a[text()='open-channel-ignored']]")
    (table,) = row.xpath("ancestor::table")
    assert [text_of(head) for head in table.xpath("./thead//th")] == ["Fault", "Level", "reasoning", "typing"]
    assert [text_of(box) for box in row.xpath("./td")] == ["unit, elsewhere", "0", "2"]
    (own,) = tree.xpath("//tr[th/a[text()='label-kept']]")
    assert [text_of(box) for box in own.xpath("./td")] == ["unit", "3", "0"]


def test_rates_and_lists_of_faults(site: Pages) -> None:
    text = text_of(site.tree("faults.html"))
    assert (
        "4 faults measured: 2 noticed (2 in their first runs), 1 of them where they are (1), 1 in an" in text
    )
    assert "did not keep by which cases" not in text
    assert len(listed(site, "faults.html", "unnoticed")) == 2
    (crashed,) = listed(site, "faults.html", "crash-only")
    assert "double-bos" in crashed
    (astray,) = listed(site, "faults.html", "astray")
    assert "open-channel-ignored" in astray
    (total,) = site.tree("faults.html").xpath("//*[@id='classes']//tfoot/tr")
    assert [text_of(box) for box in total.xpath("./td")] == ["4", "2", "2", "1", "1", "1", "1", "1"]


def test_a_fault_leads_to_the_cases_that_noticed_it(site: Pages, run: Run) -> None:
    page = site.tree("faults/label-kept.html")
    links = page.xpath("//section[starts-with(@id, 'a.')]//li[@data-item]//a/@href")
    assert len(links) == 3
    assert all(href.startswith("../cases/") for href in links)
    assert "points at the module" in text_of(page)
    assert "conformance faults measure --fault label-kept --again" in text_of(page)
    assert "Failed and judged nothing" in text_of(site.tree("faults/double-bos.html"))


def test_hostile_reasons_make_no_element(site: Pages) -> None:
    for page in ("faults.html", "faults/index-by-tool.html", "trials.html"):
        tree = site.tree(page)
        assert not tree.xpath("//script | //img | //@onerror")
        assert "onerror" in text_of(tree), "it is shown"


# ------------------------------------------------------------------------------------------- trials


def test_trials_are_told_run_by_run_and_alarms_lead_to_their_case(site: Pages) -> None:
    tree = site.tree("trials.html")
    text = text_of(tree)
    assert "10 runs without a fault, 1 of them with a false alarm." in text
    assert "One run killed 50 times: 1 thing is wrong." in text
    (known, gone) = tree.xpath("//*[@id='alarms']//li[@data-item]")
    assert known.xpath(".//a/@href")[0].startswith("cases/")
    assert "fail, usually pass" in text_of(known)
    assert not gone.xpath(".//a")
    assert "no result" in text_of(gone)
    rows = tree.xpath("//*[@id='clean']//tbody/tr")
    assert [text_of(row.xpath("./td[last()]")[0]) for row in rows] == ["0", "2", *["0"] * 8]
    assert len(tree.xpath("//*[@id='kill']//tbody/tr")) == 50
    overview = text_of(site.tree("index.html").xpath("//*[@id='trials']")[0])
    assert "10 runs without a fault: 2 false alarms. One run killed 50 times: something is wrong." in overview


def test_a_record_of_one_trial_shows_only_that(tmp_path: Path, run: Run) -> None:
    file = trials()
    for left, shown, words in (
        ({"kill": None}, ["clean", "alarms"], "10 runs without a fault, none of them with a false alarm."),
        ({"clean": None}, ["kill"], "One run killed 50 times: nothing lost, and the same verdicts."),
    ):
        out = write_site(run, tmp_path / shown[0], trials=file.model_copy(update=left))
        tree = Pages(out.resolve()).tree("trials.html")
        assert tree.xpath("//section/@id") == shown
        assert words in text_of(tree)


# ------------------------------------------------------------------------------------------- changes


def test_what_changed_is_listed_with_since_when(site: Pages, comparison: Comparison) -> None:
    assert {state: len(comparison.of(state)) for state in comparison.counts if state != "same"} == {
        "broken": 2, "still-broken": 16, "mended": 1, "new": 1, "changed": 1,
    }  # fmt: skip
    for state, number in comparison.counts.items():
        if state != "same":
            assert len(listed(site, "comparison.html", state)) == number
    broken, cell = listed(site, "comparison.html", "broken")
    assert "was pass in run run-before" in broken
    assert "last good in run run-before, commit commit-2" in broken
    assert "vllm@0.32.0+scripted+own+pp2+float32" in cell
    (still,) = (item for item in listed(site, "comparison.html", "still-broken") if "last good" in item)
    assert "2 January 2026" in still
    assert "last good in run run-long-before, commit commit-1" in still


def test_changes_lead_to_cases_and_cells(site: Pages) -> None:
    links = site.tree("comparison.html").xpath("//*[@id='broken']//li//a/@href")
    assert len(links) == 2
    assert links[0].startswith("cases/")
    assert links[1].startswith("cells/")


def test_the_overview_tells_what_changed(site: Pages) -> None:
    text = text_of(site.tree("index.html").xpath("//section[@id='changes']")[0])
    for words in ("2 broken", "16 still broken", "1 mended", "1 new", "as before"):
        assert words in text


def test_an_empty_history_is_told(tmp_path: Path, run: Run) -> None:
    with Store(f"sqlite:///{tmp_path}/empty.sqlite", create=True) as empty:
        nothing = compare(empty, [run])
    pages = Pages(write_site(run, tmp_path / "site", comparison=nothing).resolve())
    assert "holds no earlier result" in text_of(pages.tree("comparison.html"))
    assert "holds no earlier result" in text_of(pages.tree("index.html"))


# ------------------------------------------------------------------------------------------- one target


@pytest.mark.parametrize(
    ("verdicts", "alone"),
    [
        (["fail", "pass", "pass"], 0),
        (["pass", "xfail", "pass"], 1),
        (["pass", "pass", "error"], 2),
        (["timeout", "pass", "skip"], 0),
        (["fail", "fail", "pass"], None),
        (["fail", "skip", "skip"], None),  # nobody to compare with
        (["fail", "pass", "inconclusive"], None),  # who knows
        (["pass", "pass", "pass"], None),
        (["xpass", "pass", "pass"], None),  # it does not fail
    ],
)
def test_which_cases_only_one_target_fails(verdicts: list[Verdict], alone: int | None) -> None:
    base = fixtures.wide_run(3)
    first = base.header.manifest[0]
    plans = [p for p in base.header.manifest if (p.suite, p.case) == (first.suite, first.case)]
    results = {r.key: r for r in base.results}
    changed_results = tuple(
        results[plan.suite, plan.case, plan.target].model_copy(update={"verdict": verdict})
        for plan, verdict in zip(plans, verdicts, strict=True)
    )
    header = base.header.model_copy(update={"manifest": tuple(plans)})
    view = AloneView(Site(base.model_copy(update={"header": header, "results": changed_results})))
    assert [target.spec for target in view.by_target] == ([] if alone is None else [plans[alone].target])
    assert bool(view) is (alone is not None)
    assert view.total == (0 if alone is None else 1)


def test_the_page_lists_them_by_target(site: Pages, run: Run) -> None:
    view = AloneView(Site(run))
    assert view.total
    for target, group in view.by_target.items():
        assert len(listed(site, "alone.html", f"t.{target.slug}")) == group.total


# ------------------------------------------------------------------------------------------- runs


def test_the_list_of_runs(site: Pages, run: Run, runs: tuple[StoredRun, ...]) -> None:
    rows = site.tree("runs.html").xpath("//tbody/tr")
    assert len(rows) == len(runs) == 3
    assert "run-before" in text_of(rows[0])
    assert "commit-2" in text_of(rows[0])
    assert not rows[0].xpath(".//a")  # its dashboard is not in this folder
    assert "vllm@0.32.0+scripted+own+pp2+float32" in text_of(rows[2])


def test_the_service_links_every_run_and_marks_its_own(run: Run, runs: tuple[StoredRun, ...]) -> None:
    own = runs[0].model_copy(update={"run_id": run.header.run_id})
    hostile = runs[1].model_copy(update={"run_id": "a/../b?c"})
    pages = dict(make_pages(run, runs=(own, hostile), served=True))
    assert 'href="index.html" aria-current="page"' in pages["runs.html"]
    assert 'href="/runs/a%2F..%2Fb%3Fc/"' in pages["runs.html"]


# ------------------------------------------------------------------------------------------- command


def test_command_line(run_conformance: Command, tmp_path: Path, run: Run) -> None:
    def write(name: str, stored: Run) -> Path:
        lines = [stored.header, *stored.results, *([stored.footer] if stored.footer is not None else [])]
        path = tmp_path / name
        path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
        return path

    write("run.jsonl", run)
    earlier = runfile.read(write("earlier.jsonl", changed(run, "run-before", 2, ["pass"])))
    with Store(f"sqlite:///{tmp_path}/h.sqlite", create=True) as history:
        history.merge(earlier, lines=9)
    write_record(record_of(run), tmp_path / "faults.json")
    sealed.write(trials_of(run), tmp_path / "trials.json")
    options = [
        "--faults",
        "faults.json",
        "--trials",
        "trials.json",
        "--database",
        "sqlite:///h.sqlite",
        "--out",
        "site",
    ]
    done = run_conformance("report", "run.jsonl", *options)
    assert done.returncode == 0, done.stderr
    site = Pages((tmp_path / "site").resolve())
    assert len(listed(site, "comparison.html", "broken")) == 1
    assert len(site.tree("runs.html").xpath("//tbody/tr")) == 1
    assert len(listed(site, "trials.html", "alarms")) == 2
    (tmp_path / "faults.json").write_text("{}")
    done = run_conformance("report", "run.jsonl", "--faults", "faults.json", "--out", "site")
    assert done.returncode == 2
    assert "faults.json" in done.stderr
