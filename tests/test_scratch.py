"""Temporary folders: deleted by their owner, or by the next one when the owner was killed."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from conformance.scratch import Scratch

KIND = "conformance-test-"

OWNER = f"""
import sys
from conformance.scratch import Scratch
scratch = Scratch({KIND!r})
(scratch.path / "weights").write_bytes(b"x" * 1000)
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def owner() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_owner_left_is_deleted_by_the_next() -> None:
    process, left = owner()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (left / "weights").exists()
    scratch = Scratch(KIND)
    assert not left.exists()
    scratch.close()


def test_what_a_living_owner_holds_stays() -> None:
    process, held = owner()
    scratch = Scratch(KIND)
    assert (held / "weights").exists()
    scratch.close()
    process.communicate("")
    assert not held.exists(), "the end of a process deletes its folder"


def test_another_kind_stays(parent: Path) -> None:
    (parent / "conformance-other-x").mkdir()
    (parent / f"{KIND}a-file").write_text("")
    (parent / f"{KIND}a-link").symlink_to(parent / "conformance-other-x")
    scratch = Scratch(KIND)
    assert {path.name for path in parent.iterdir()} == {
        "conformance-other-x",
        f"{KIND}a-file",
        f"{KIND}a-link",
        scratch.path.name,
    }
    scratch.close()


def test_closing_deletes_once(parent: Path) -> None:
    scratch = Scratch(KIND)
    (scratch.path / "deep").mkdir()
    scratch.close()
    scratch.close()
    assert list(parent.iterdir()) == []


def test_a_forgotten_folder_is_deleted(parent: Path) -> None:
    Scratch(KIND)
    gc.collect()
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("moment", ["os.open", "fcntl.flock"])
def test_swept_before_it_is_locked(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's sweep may find a new folder before its owner holds it, before either of the owner's steps."""
    module, name = {"os.open": (os, "open"), "fcntl.flock": (fcntl, "flock")}[moment]
    step, made, swept = getattr(module, name), tempfile.mkdtemp, []

    def make(**options: Any) -> str:
        swept.append(made(**options))
        return swept[-1]

    def late(*arguments: Any) -> Any:
        if len(swept) == 1 and Path(swept[0]).is_dir():
            Path(swept[0]).rmdir()
        return step(*arguments)

    monkeypatch.setattr(tempfile, "mkdtemp", make)
    monkeypatch.setattr(module, name, late)
    scratch = Scratch(KIND)
    monkeypatch.undo()
    assert (len(swept), str(scratch.path)) == (2, swept[1])
    (scratch.path / "weights").write_bytes(b"x")
    scratch.close()
