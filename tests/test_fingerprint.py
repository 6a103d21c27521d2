"""What a run says about its machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conformance import fingerprint

IDENTITY = ["-c", "user.name=t", "-c", "user.email=t@example.org"]


def git(*arguments: str, cwd: Path) -> str:
    command = ["git", *IDENTITY, *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    git("init", "--initial-branch=main", cwd=root)
    (root / "file").write_text("one")
    git("add", "file", cwd=root)
    git("commit", "-m", "one", cwd=root)
    return root


def test_commit_and_dirt(repository: Path) -> None:
    commit = git("rev-parse", "HEAD", cwd=repository)
    assert fingerprint.git_commit(repository) == commit
    (repository / "file").write_text("two")
    assert fingerprint.git_commit(repository) == f"{commit}+dirty"


def test_stored_references_can_be_left_out_of_the_dirt(repository: Path) -> None:
    paths = [repository / "suites" / "accuracy" / name for name in ("references/a.jsonl", "nano.yaml")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
        git("add", str(path), cwd=repository)
    git("commit", "-m", "two", cwd=repository)
    commit = git("rev-parse", "HEAD", cwd=repository)
    paths[0].write_text("two")
    assert fingerprint.git_commit(repository) == f"{commit}+dirty"
    assert fingerprint.git_commit(repository, but_references=True) == commit
    paths[1].write_text("two")
    assert fingerprint.git_commit(repository, but_references=True) == f"{commit}+dirty"


@pytest.mark.parametrize("state", ["branch", "packed", "detached", "worktree"])
def test_commit_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    commit = git("rev-parse", "HEAD", cwd=repository)
    root = repository
    if state == "packed":
        git("pack-refs", "--all", cwd=repository)
    if state == "detached":
        git("checkout", "--detach", cwd=repository)
    if state == "worktree":
        root = repository.parent / "worktree"
        git("worktree", "add", "-b", "other", str(root), cwd=repository)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fingerprint.git_commit(root) == commit


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert fingerprint.git_commit(tmp_path) is None


def test_only_listed_variables_and_no_users_in_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    monkeypatch.setenv("GITHUB_REF_NAME", "https://me:hunter2@example.org/x")
    facts = fingerprint.environment()
    assert not [value for value in facts.values() if "hunter2" in value]
    assert facts["env:GITHUB_REF_NAME"] == "https://example.org/x"
    assert facts["package:pytest"] == pytest.__version__
