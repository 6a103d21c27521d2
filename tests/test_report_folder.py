"""The dashboard's folder: replaced whole, never somebody else's, and quick to write."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from conformance import report
from conformance.errors import ConformanceError
from conformance.report import MARKER, ReportError, write_site
from tests import run_fixtures as fixtures


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_run_gives_the_same_bytes_and_replaces_the_old_site(tmp_path):
    out = tmp_path / "deep" / "site"
    assert write_site(fixtures.wide_run(2), out) == out
    (out / "targets" / "stale.html").write_text("old")
    write_site(fixtures.wide_run(1), out)
    first = _snapshot(out)
    assert not [name for name in first if "stale" in name or "engine-1" in name]
    write_site(fixtures.wide_run(1), out)
    assert _snapshot(out) == first
    assert [p.name for p in out.parent.iterdir()] == ["site"]
    assert out.stat().st_mode & 0o055 == 0o055


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    write_site(fixtures.empty_run(), out)  # an empty folder may be used
    (out / MARKER).unlink()
    before = _snapshot(out)
    with pytest.raises(ReportError, match=r"precious: holds files that are not a dashboard.*left alone"):
        write_site(fixtures.empty_run(), out)
    assert _snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_files_and_links_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match="is a file; name a folder"):
        write_site(fixtures.empty_run(), tmp_path / "file")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ReportError, match="is a symbolic link"):
        write_site(fixtures.empty_run(), tmp_path / "link")
    with pytest.raises(ReportError, match="cannot be written"):
        write_site(fixtures.empty_run(), tmp_path / "file" / "below")
    assert issubclass(ReportError, ConformanceError)


@pytest.mark.parametrize("where", ["pages", "swap"])
def test_a_site_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch, where):
    out = write_site(fixtures.wide_run(1), tmp_path / "site")
    before = _snapshot(out)

    def broken(*_args):
        raise OSError("disk full")

    if where == "pages":
        monkeypatch.setattr(report.shutil, "copytree", broken)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: broken() if ".new-" in self.name else rename(self, to)
        )
    with pytest.raises(ReportError, match="disk full"):
        write_site(fixtures.wide_run(2), out)
    assert _snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_three_thousand_cases_on_four_targets_take_less_than_half_a_minute(tmp_path):
    run = fixtures.big_run(3_000, 4)
    start = time.process_time()
    out = write_site(run, tmp_path / "site")
    took = time.process_time() - start
    assert took < 30, f"{took:.0f} s of processor time"
    assert len(list((out / "cases").rglob("*.html"))) == 3_000
    assert (out / "index.html").stat().st_size < 1_000_000
