"""With which sources bundled checkpoints were trained.

Training takes up to an hour and a half, so weights are committed. Their manifest has a digest of each source
that decides what is learned, and how: generators, courses, configurations, optimisers, steps. Bookkeeping
(reports, states, examinations, the form in which weights are stored) does not count, nor does the model's own
code, which is held against its oracle by other means.

Checkpoints that were trained before manifests said so get the sources of the oldest commit whose manifest
tells of the same training, by `python -m model_impl.nano.sources NAME...`: every entry but later ones is the
same, the seconds that it took among them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_impl.errors import ModelError

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MANIFEST = "manifest.json"
KEY, COMMIT, AGREED = "sources", "sources_at", "sources_agree_with"
"""Entries of a manifest: digests by file; the commit that they were read from afterwards; and, where they are
later than the training, what showed that they make the same (`model_impl.nano.drawn`)."""
Read = Callable[[str], bytes | None]
"""Content of a file below `model_impl/nano`; None if there is none."""
_PACKAGE = "model_impl.nano"
_LATER = ("sha256", KEY, COMMIT, AGREED, "acceptance")
"""Entries that a manifest may get after its training, and digests."""
_SHORT = 16
_BEGUN = "sources.json"


class SourcesError(ModelError):
    """It cannot be said with which sources a checkpoint was trained."""


@dataclass(frozen=True)
class _Recipe:
    """What of a recipe decides the weights."""

    pieces: tuple[str, ...]
    """Definitions of its own module; the rest of it is bookkeeping."""
    modules: tuple[str, ...]
    """Modules that count whole, with all that they import of this package."""
    files: tuple[str, ...] = ()
    """Other files that they read."""


RECIPES: Mapping[str, _Recipe] = {
    "train": _Recipe(
        (
            *("_GRADIENT", "_BOUNDS", "_STATISTICS", "_PLACES", "_prepare"),
            *("Training._advance", "Training._timetable", "Training._fresh"),
        ),
        ("batches", "curriculum", "families", "optimiser", "settings", "vocabulary"),
    ),
    "drafts": _Recipe(
        (
            *("_SAMPLE", "_GRADIENT", "_NO_LABEL", "COURSE", "DraftRecipe", "RECIPES"),
            *("said", "fresh_head", "loss", "train"),
        ),
        ("batches", "dialogues", "families", "optimiser", "problems", "subjects", "unrolled"),
    ),
    "scripted": _Recipe(
        ("SEED", "PLAIN_PICTURES", "_TIMES", "Amounts", "DEFAULT", "make", "_fresh_model", "_gallery"),
        ("conversations", "gallery", "pictured", "script", "settings", "training", "vocabulary"),
        ("script.yaml",),
    ),
    "adapted": _Recipe(
        (
            *("RANK", "_MODULES", "_STEPS", "_CONVERSATIONS", "_EACH", "_NEW", "other_script", "make"),
            *("_is_default", "_fresh"),
        ),
        ("conversations", "script", "training"),
        ("script.yaml",),
    ),
}
"""By the module of the recipe."""


def here(name: str) -> bytes | None:
    """A file as it is now."""
    path = Path(__file__).parent / name
    return path.read_bytes() if path.is_file() else None


def sources(recipe: str, read: Read = here) -> dict[str, str]:
    """Digests of what decides the weights that a recipe makes.

    Args:
        recipe: The command, as a manifest has it, such as `python -m model_impl.nano.train nano-d`.
        read: Where from; by default as they are now.

    Returns:
        Short SHA-256 by file; of a recipe's own module, of its pieces together. A head or an adapter
        also rests on the weights of its checkpoint.

    Raises:
        SourcesError: it is no recipe of this package, or one of its files or pieces is not there.
    """
    module, arguments = _parsed(recipe)
    known = RECIPES[module]
    own = f"{module}.py"
    found = {name: _short(_content(name, read)) for name in _reached(known.modules, read) | {*known.files}}
    found[own] = _short("\n".join(_pieces(own, _content(own, read).decode(), known.pieces)).encode())
    base = arguments[0] if module == "drafts" else "scripted" if module == "adapted" else None
    if base is not None:
        name = f"checkpoints/{base}/{MANIFEST}"
        weights = json.loads(_content(name, read))["sha256"]["model.safetensors"]
        found[f"checkpoints/{base}/model.safetensors"] = weights[:_SHORT]
    return dict(sorted(found.items()))


def stale(folder: Path) -> tuple[str, ...]:
    """Sources with which a checkpoint was trained and that are others now; nothing is run.

    Args:
        folder: The checkpoint's, among the bundled ones.

    Raises:
        SourcesError: the manifest does not say.
    """
    manifest = _manifest(folder)
    if KEY not in manifest:
        raise SourcesError(f"{folder / MANIFEST}: does not say with which sources it was trained")
    then, now = manifest[KEY], sources(manifest["recipe"])
    return tuple(sorted(name for name in {*then, *now} if then.get(name) != now.get(name)))


def recipe(folder: Path) -> str:
    """The command that trains a bundled checkpoint."""
    return str(_manifest(folder)["recipe"])


def names() -> tuple[str, ...]:
    """All bundled checkpoints, heads and adapters."""
    return tuple(sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{MANIFEST}")))


def begun(state: Path, command: str) -> dict[str, str]:
    """The sources with which a training began, kept beside its state: it may go on with others.

    Args:
        state: Folder of the state; must exist.
        command: The recipe.
    """
    path = state / _BEGUN
    if not (state / "state.pt").exists() or not path.exists():
        path.write_text(json.dumps(sources(command)) + "\n", encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def note(
    folder: Path,
    found: Mapping[str, str],
    commit: str | None = None,
    agreed: Mapping[str, str] | None = None,
) -> None:
    """Put the sources into a checkpoint's manifest.

    Args:
        folder: The checkpoint's.
        found: What `sources` gave.
        commit: Where they were read, if that was later than the training.
        agreed: If they are not those of the training: the commit of those, and the digest of what both give.
    """
    about = (KEY, COMMIT, AGREED)
    manifest = {name: value for name, value in _manifest(folder).items() if name not in about}
    digests = manifest.pop("sha256")
    at: dict[str, Any] = {COMMIT: commit} if commit is not None else {}
    if agreed is not None:
        at[AGREED] = dict(agreed)
    content = {**manifest, KEY: dict(found), **at, "sha256": digests}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def note_afterwards(folder: Path) -> str:
    """Put the sources of the commit that brought a training into a manifest that says nothing of them.

    Args:
        folder: The checkpoint's, in a git repository with its whole history.

    Returns:
        The commit.

    Raises:
        SourcesError: the training said with which sources it was made, or no commit tells of it.
    """
    manifest = _manifest(folder)
    if KEY in manifest and COMMIT not in manifest:
        raise SourcesError(f"{folder / MANIFEST}: the training itself has said with which sources")
    package = folder.parent.parent
    path = f"./{folder.relative_to(package)}/{MANIFEST}"
    for commit in _git(package, "log", "--reverse", "--format=%H", "--", path).stdout.decode().split():
        there = _at(package, commit)
        if _told(json.loads(there(path.removeprefix("./")) or b"{}")) == _told(manifest):
            note(folder, sources(manifest["recipe"], there), commit)
            return commit
    raise SourcesError(f"{folder}: no commit has a manifest that tells of this training")


def commit_of(folder: Path) -> str:
    """The newest commit with the sources that a manifest has.

    Args:
        folder: The checkpoint's, in a git repository with its whole history.

    Raises:
        SourcesError: no commit has them all.
    """
    manifest, package = _manifest(folder), folder.parent.parent
    for commit in _git(package, "log", "--format=%H", "--", ".").stdout.decode().split():
        try:
            if sources(manifest["recipe"], _at(package, commit)) == manifest[KEY]:
                return commit
        except SourcesError:
            continue  # it has no such recipe, or not yet all of it
    raise SourcesError(f"{folder / MANIFEST}: no commit has all sources that it names")


def _told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in _LATER}


def _parsed(command: str) -> tuple[str, list[str]]:
    words = command.split()
    module = words[2].removeprefix(f"{_PACKAGE}.") if words[:2] == ["python", "-m"] and words[2:] else ""
    if module not in RECIPES:
        raise SourcesError(f"{command!r} is no recipe of a bundled checkpoint")
    return module, words[3:]


def _manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return loaded


def _content(name: str, read: Read) -> bytes:
    content = read(name)
    if content is None:
        raise SourcesError(f"{name}: is not there")
    return content


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_SHORT]


def _reached(modules: Sequence[str], read: Read) -> set[str]:
    """Files of modules, and of all that they import of this package."""
    found: set[str] = set()
    to_do = list(modules)
    while to_do:
        name = _file(to_do.pop(), read)
        if name is not None and name not in found:
            found.add(name)
            to_do += imported(_content(name, read).decode())
    return found


def imported(text: str) -> Iterator[str]:
    """Names below this package that a source imports: `subjects.tones`, and what may be a module or not."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{_PACKAGE}."):
            module = str(node.module)[len(_PACKAGE) + 1 :]
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


def _file(module: str, read: Read) -> str | None:
    """The file of a module, or of the one that a name is imported from."""
    while module:
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if read(name) is not None:
                return name
        module = module.rpartition(".")[0]
    return None


def _pieces(file: str, text: str, wanted: Sequence[str]) -> Iterator[str]:
    """The text of definitions, in the order in which they are wanted."""
    lines = text.splitlines()
    found = {name: "\n".join(lines[first - 1 : last]) for name, first, last in _defined(ast.parse(text).body)}
    for name in wanted:
        if name not in found:
            raise SourcesError(f"{file}: has no {name}, which a recipe rests on")
        yield found[name]


def _defined(body: Sequence[ast.stmt], within: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of all definitions, decorators included."""
    for node in body:
        last = node.end_lineno or node.lineno
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield within + node.name, first, last
            if isinstance(node, ast.ClassDef):
                yield from _defined(node.body, f"{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (inner for target in targets for inner in ast.walk(target)):
                if isinstance(name, ast.Name):
                    yield within + name.id, node.lineno, last


def _at(package: Path, commit: str) -> Read:
    """Files as a commit has them."""

    def read(name: str) -> bytes | None:
        shown = _git(package, "show", f"{commit}:./{name}")
        return shown.stdout if shown.returncode == 0 else None

    return read


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False)  # noqa: S603 - fixed commands


def main(arguments: Sequence[str] | None = None) -> None:
    """Note for checkpoints that do not say it with which sources they were trained."""
    parser = argparse.ArgumentParser(prog=f"python -m {_PACKAGE}.sources", description=main.__doc__)
    parser.add_argument("names", nargs="+", choices=names(), metavar="NAME")
    for name in parser.parse_args(arguments).names:
        commit = note_afterwards(CHECKPOINTS / name)
        changed = ", ".join(stale(CHECKPOINTS / name)) or "none"
        sys.stdout.write(f"{name}: sources of {commit[:12]}; others now: {changed}\n")


if __name__ == "__main__":
    main()
