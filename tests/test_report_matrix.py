"""The dashboard's map of the matrix: its numbers, its drill-down, and what cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.cli import invoke
from conformance.errors import RunFileError
from conformance.report import write_site
from conformance.results import (
    CellRecord,
    Evidence,
    Footer,
    Header,
    PlannedCase,
    Problem,
    Result,
    Run,
    Verdict,
)
from conformance.store.history import Store
from tests import history_runs
from tests import run_fixtures as fixtures
from tests.conftest import Run as Command
from tests.test_report import Pages, text_of

HOSTILE = "<script>alert(1)</script>::x\"'><img src=x onerror=alert(2)>"
CASES = ("one", "two")


def cell_run(
    target: str,
    backend: str,
    layout: str,
    verdicts: dict[str, Verdict],
    *,
    dtype: str = "float32",
    reason: str = "",
    started: str = "2026-11-21T03:44:10+00:00",
    finished: bool = True,
) -> Run:
    """A run of a cell; cases without a verdict were planned and have no result."""
    name = f"{target}+scripted+{backend}+{layout}+{dtype}"
    axes = {
        "target": target,
        "checkpoint": "scripted",
        "attention": backend,
        "layout": layout,
        "dtype": dtype,
    }
    plans = tuple(
        PlannedCase(
            suite="generation/demo", case=case, target=target, kind="generation", area="generation",
            title=f"The rule of case {case}.", source=("P01",), digest="0",
        )
        for case in CASES
    )  # fmt: skip
    problem = Problem(rule="tokens", message="the answer differs from its token 3 on")
    results = tuple(
        Result(
            **plan.model_dump(include={"suite", "case", "target", "kind", "area", "digest"}),
            verdict=verdicts[plan.case],
            reason=reason,
            problems=(problem,) if verdicts[plan.case] == "fail" else (),
            evidence=Evidence(got={"effective": {"attention": backend}}),
            repeat=f"conformance run generation/demo::{plan.case} --cell {name}",
        )
        for plan in plans
        if plan.case in verdicts
    )
    header = Header(
        run_id=f"{name}-{started}",
        started=started,
        harness="0.1.0",
        manifest=plans,
        cell=CellRecord(id=name, axes=axes),
    )
    footer = Footer(finished=started, duration=12.5, counts={}, exit_code=0) if finished else None
    return Run(header=header, results=results, footer=footer)


GOOD: dict[str, Verdict] = {"one": "pass", "two": "pass"}
RUNS = [
    cell_run("vllm@0.32.0", "cpu-attn", "single", GOOD),
    cell_run("vllm@0.32.0", "cpu-attn", "single", {"one": "pass", "two": "fail"}, dtype="bfloat16"),
    cell_run("vllm@0.32.0", "cpu-attn", "pp2", {"one": "xfail", "two": "pass"}, reason="a known failure"),
    cell_run("vllm@0.32.0", "own", "pp2", {"one": "error", "two": "error"}, reason="pp 2 asked, 1 ran"),
    cell_run("vllm@0.32.0", "own", "single", {"one": "pass"}, finished=False),
    cell_run("vllm@installed", "flash-attn", "single", {"one": "skip", "two": "skip"}, reason="needs CUDA"),
    cell_run("vllm@installed", "flash-attn", "pp2", {"one": "skip", "two": "skip"}, reason="needs CUDA"),
    cell_run(HOSTILE, HOSTILE, HOSTILE, {"one": "fail", "two": "pass"}, reason=HOSTILE),
    # An older run of the first cell, which counts no more.
    cell_run("vllm@0.32.0", "cpu-attn", "single", {"one": "fail"}, started="2026-11-20T03:44:10+00:00"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folder = tmp_path_factory.mktemp("matrix") / "site"
    return Pages(write_site(fixtures.wide_run(1), folder, cells=RUNS).resolve())


def boxes(site: Pages, target: str) -> dict[tuple[str, str], str]:
    """Backend and layout to the class and the text of a box."""
    page = site.tree("matrix.html")
    (section,) = (
        s for s in page.xpath("//section") if s.xpath("./h2") and target in text_of(s.xpath("./h2")[0])
    )
    layouts = [text_of(head) for head in section.xpath(".//thead//th[position() > 1]")]
    found = {}
    for row in section.xpath(".//tbody/tr"):
        backend = text_of(row.xpath("./th")[0])
        for layout, box in zip(layouts, row.xpath("./td"), strict=True):
            found[backend, layout] = f"{box.get('class')}: {text_of(box)}"
    return found


def test_a_box_has_the_colour_of_its_worst_cell_and_counts_all(site: Pages) -> None:
    found = boxes(site, "vllm@0.32.0")
    assert found["cpu-attn", "single"].startswith("s-fail: ")
    assert "1 pass" in found["cpu-attn", "single"]
    assert "1 fail" in found["cpu-attn", "single"]
    assert found["cpu-attn", "pp2"].startswith("s-xfail: ")
    assert found["own", "pp2"].startswith("s-error: ")


def test_a_cell_whose_run_broke_off_is_an_error(site: Pages) -> None:
    assert boxes(site, "vllm@0.32.0")["own", "single"].startswith("s-error: ")
    assert "the run did not come to its end; 1 cases have no result" in text_of(site.tree("matrix.html"))


def test_what_needs_a_gpu_is_shown_as_not_run(site: Pages) -> None:
    found = boxes(site, "vllm@installed")
    assert found["flash-attn", "single"].startswith("s-not-run: ")
    assert "1 not run" in found["flash-attn", "single"]
    (idle,) = site.tree("matrix.html").xpath("//section[@id='idle']")
    assert [text_of(part) for part in idle.xpath(".//dt")] == ["2 cells"]
    (reason,) = idle.xpath(".//dd")
    assert text_of(reason).startswith("needs CUDA These cells")
    assert len(reason.xpath(".//*[@data-item]/a")) == 2


def test_only_the_newest_run_of_a_cell_counts(site: Pages) -> None:
    assert len(list((site.root / "cells").glob("*.html"))) == len(RUNS) - 1
    assert "8 cells on 3 targets" in " ".join(text_of(site.tree("matrix.html")).split())


def test_a_cell_says_what_broke_what_ran_and_how_to_repeat_it(site: Pages) -> None:
    page = site.tree("matrix.html")
    (link,) = page.xpath("//section[@id='attention']//a[contains(., 'cpu-attn+single+bfloat16')]")
    cell = site.tree(link.get("href"))
    text = " ".join(text_of(cell).split())
    assert "tokens the answer differs from its token 3 on" in text
    assert "Ran with attention cpu-attn" in text
    assert "conformance matrix run vllm@0.32.0+scripted+cpu-attn+single+bfloat16" in text
    assert "conformance run generation/demo::two --cell vllm@0.32.0+scripted" in text
    assert len(cell.xpath("//*[@id='cases']//*[@data-item]")) == len(CASES)


def test_the_worst_comes_first(site: Pages) -> None:
    signs = [
        text_of(sign)
        for sign in site.tree("matrix.html").xpath(
            "//section[@id='attention']//span[contains(@class,'sign')]"
        )
    ]
    words = ["error", "fail"]
    found = [next(word for word in words if word in sign) for sign in signs]
    assert found == sorted(found, key=words.index)
    assert len(found) == 4


def test_the_pages_keep_the_rules_of_all_pages(site: Pages) -> None:
    from tests import test_report as rules

    written = {"matrix": site}
    rules.test_tags_are_balanced_and_ids_are_unique(written, "matrix")
    rules.test_pages_have_landmarks_headings_and_a_policy(written, "matrix")
    rules.test_tables_have_captions_scopes_and_a_keyboard(written, "matrix")
    rules.test_nothing_is_asked_from_elsewhere(written, "matrix")
    rules.test_every_internal_link_resolves(written, "matrix")
    rules.test_every_number_in_a_table_is_a_link(written, "matrix")
    rules.test_every_counted_number_is_the_length_of_the_list_it_links_to(written, "matrix")
    rules.test_every_sign_has_its_glyph_and_its_word(written, "matrix")


def test_hostile_names_make_no_element(site: Pages) -> None:
    pages = ["matrix.html", *(f"cells/{p.name}" for p in (site.root / "cells").glob("script-alert*"))]
    assert len(pages) == 2
    for page in pages:
        assert not site.tree(page).xpath("//script | //img | //@onerror")
        assert "onerror" in text_of(site.tree(page)), "it is shown"


def test_without_cells_nothing_links_to_a_matrix(tmp_path: Path) -> None:
    pages = Pages(write_site(fixtures.wide_run(1), tmp_path / "site").resolve())
    assert not (pages.root / "matrix.html").exists()
    assert not pages.tree("index.html").xpath("//a[contains(@href, 'matrix')]")


def test_runs_of_no_cell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="is no run of a cell"):
        write_site(fixtures.wide_run(1), tmp_path / "site", cells=[fixtures.wide_run(1)])
    assert not (tmp_path / "site").exists()


def test_command_line(run_conformance: Command, tmp_path: Path) -> None:
    def write(path: Path, run: Run) -> None:
        path.parent.mkdir(exist_ok=True)
        lines = [run.header, *run.results, *([run.footer] if run.footer is not None else [])]
        path.write_text("".join(line.model_dump_json() + "\n" for line in lines))

    write(tmp_path / "run.jsonl", fixtures.wide_run(1))
    for number, run in enumerate(RUNS[:3]):
        write(tmp_path / "cells" / f"{number}.jsonl", run)
    done = run_conformance("report", "run.jsonl", "--out", "site", "--matrix", "cells")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/matrix.html").is_file()
    (tmp_path / "empty").mkdir()
    done = run_conformance("report", "run.jsonl", "--out", "site", "--matrix", "empty")
    assert done.returncode == 2
    assert "empty: there is no run file (*.jsonl) in this folder" in done.stderr


def test_without_its_run_file_the_newest_run_is_shown_and_a_torn_cell_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*more: str) -> tuple[int, str]:
        code = invoke(["report", "lost.jsonl", "--out", "site", "--matrix", "cells", *more])
        return code, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    old = cell_run(
        "ref", "own", "single", {"one": "pass", "two": "pass"}, started="2026-11-19T03:00:00+00:00"
    )
    new = cell_run("ref", "own", "tp2", {"one": "pass", "two": "fail"})
    for name, run in (("old", old), ("new", new)):
        history_runs.write(tmp_path / f"cells/{name}.jsonl", run.header, *run.results, run.footer)
    (tmp_path / "cells/torn.jsonl").write_text('{"type": "hea')
    assert command()[0] == 2, "it is asked for by --or-newest alone"
    code, said = command("--or-newest")
    assert code == 0
    sentence = "A run of a cell is left out: cells/torn.jsonl: the file holds no complete header"
    assert sentence in said
    assert (
        f"lost.jsonl: cannot be read: No such file or directory; shown is the newest run, {new.header.run_id}"
        in said
    )
    page = (tmp_path / "site/matrix.html").read_text()
    assert "ref+scripted+own+single+float32" in page
    assert "ref+scripted+own+tp2+float32" in page
    assert sentence in page
    # One outside the matrix comes first, as it does in the service.
    stored = history_runs.write(
        tmp_path / "run.jsonl",
        history_runs.header("outside"),
        history_runs.result("a"),
        history_runs.footer(),
    )
    with Store("sqlite:///history.sqlite", create=True) as store:
        store.merge_file(stored)
    code, said = command("--or-newest", "--database", "sqlite:///history.sqlite")
    assert (code, "shown is the newest run, outside" in said) == (0, True)
