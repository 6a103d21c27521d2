"""What a run's header says about the machine: an allow-list, so that nothing private slips in."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from conformance import resources

_PACKAGES = (
    "jinja2",
    "pydantic",
    "pytest",
    "pytest-xdist",
    "pyyaml",
    "tokenizers",
    "torch",
)
_VARIABLES = (
    "CI",
    "CONFORMANCE_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "GITHUB_REF_NAME",
    "GITHUB_RUN_ID",
    "GITHUB_SHA",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "VLLM_ATTENTION_BACKEND",
)
_REFERENCES = ":(top,exclude,glob)suites/**/references/**"
"""Of git: stored references, which the answers of others do not depend on."""
_URL_USER = re.compile(r"(?<=://)[^/@\s]+@")


def environment() -> dict[str, str]:
    """Python, platform, CPU count, package versions and allow-listed variables."""
    facts = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    for package in _PACKAGES:
        try:
            facts[f"package:{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[f"package:{package}"] = "absent"
    facts.update({f"env:{name}": redact(os.environ[name]) for name in _VARIABLES if name in os.environ})
    return facts


def redact(text: str) -> str:
    """Remove user names and passwords from the URLs in a text."""
    return _URL_USER.sub("", text)


def git_commit(root: Path | None = None, *, but_references: bool = False) -> str | None:
    """Commit of the source tree, with `+dirty` when git is here and reports changes.

    None for an installed package, and for a tree that is no git checkout.

    Args:
        root: Of the tree; None: this one.
        but_references: Changes of suites' stored references do not count, so that several can be made anew.
    """
    root = resources.checkout_root() if root is None else root
    commit = _head(root) if root is not None else None
    if root is None or commit is None:
        return None
    git = shutil.which("git")
    if git is None:
        return commit
    paths = ("--", ":(top)", _REFERENCES) if but_references else ()
    status = subprocess.run(  # noqa: S603 - a fixed command in our own tree
        [git, "-C", str(root), "status", "--porcelain", "--untracked-files=no", *paths],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return f"{commit}+dirty" if status.returncode == 0 and status.stdout.strip() else commit


def _head(root: Path) -> str | None:
    """Commit id that HEAD names, read from the files of the repository."""
    git_dir = root / ".git"
    if git_dir.is_file():  # a linked work tree
        git_dir = root / git_dir.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    if not (git_dir / "HEAD").is_file():
        return None
    head = (git_dir / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head
    ref = head.removeprefix("ref:").strip()
    common = git_dir
    if (git_dir / "commondir").is_file():
        common = git_dir / (git_dir / "commondir").read_text(encoding="utf-8").strip()
    for folder in (git_dir, common):
        if (folder / ref).is_file():
            return (folder / ref).read_text(encoding="utf-8").strip()
    if (common / "packed-refs").is_file():
        for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
            commit, _, name = line.partition(" ")
            if name == ref:
                return commit
    return None
