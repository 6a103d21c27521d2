"""With which sources the bundled checkpoints were trained, and what is said when those have changed."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conformance.cli import invoke
from conformance.targets import bundled
from model_impl.nano import sources

PACKAGE = Path(sources.__file__).parent
BOOKKEEPING = {
    "train": {"sources", "items", "score", "scripted", "dialogues"},
    "drafts": {"sources", "scripted", "items", "accepted"},
    "scripted": {"sources"},
    "adapted": {"sources", "scripted"},
}
"""What recipes import to examine what they made, and to write it down."""


def test_every_manifest_says_with_which_sources_and_what_trains_it() -> None:
    for name in sources.names():
        folder = sources.CHECKPOINTS / name
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["sources"].keys() >= {"script.py"}, name
        assert sources.recipe(folder) == manifest["recipe"]
    assert len(sources.names()) == 7


@pytest.mark.parametrize("module", sorted(sources.RECIPES))
def test_what_a_recipe_imports_counts_or_is_bookkeeping(module: str) -> None:
    counted = {name.partition(".")[0].partition("/")[0] for name in sources.sources(command(module))}
    imported = {name.partition(".")[0] for name in sources.imported((PACKAGE / f"{module}.py").read_text())}
    assert imported - BOOKKEEPING[module] <= counted


def command(module: str) -> str:
    name = {"train": " nano-d", "drafts": " nano-d"}.get(module, "")
    return f"python -m model_impl.nano.{module}{name}"


def changed(name: str, old: str, new: str) -> sources.Read:
    """The sources, but for one change."""

    def read(path: str) -> bytes | None:
        content = sources.here(path)
        if path == name and content is not None:
            assert old.encode() in content
            return content.replace(old.encode(), new.encode())
        return content

    return read


@pytest.mark.parametrize(
    ("module", "file", "old", "new", "counts"),
    [
        ("train", "problems.py", "\n\n", "\n# more\n\n", True),
        ("train", "train.py", "_GRADIENT = 1.0", "_GRADIENT = 2.0", True),
        ("train", "train.py", "backward(loss)", "backward(2 * loss)", True),
        ("train", "train.py", "_REPORT_EVERY = 25", "_REPORT_EVERY = 50", False),
        ("train", "score.py", "\n\n", "\n# more\n\n", False),
        ("drafts", "checkpoints/nano-d/manifest.json", 'safetensors": "', 'safetensors": "0', True),
        ("scripted", "script.yaml", "\n", "\n# more\n", True),
        ("adapted", "training.py", "\n\n", "\n# more\n\n", True),
    ],
)  # fmt: skip
def test_a_change_of_what_is_learned_counts_and_one_of_the_reports_does_not(
    module: str, file: str, old: str, new: str, counts: bool
) -> None:
    before = sources.sources(command(module))
    after = sources.sources(command(module), changed(file, old, new))
    assert (before != after) is counts


def test_a_piece_that_is_gone_is_told() -> None:
    with pytest.raises(sources.SourcesError, match=r"train\.py: has no _GRADIENT"):
        sources.sources(command("train"), changed("train.py", "_GRADIENT = 1.0", "_LARGEST = 1.0"))
    with pytest.raises(sources.SourcesError, match="is no recipe"):
        sources.sources("python -m model_impl.nano.items")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The manifests alone, where they may be written."""
    for name in sources.names():
        (tmp_path / name).mkdir()
        shutil.copy(sources.CHECKPOINTS / name / "manifest.json", tmp_path / name)
    monkeypatch.setattr(sources, "CHECKPOINTS", tmp_path)
    return tmp_path


def test_a_checkpoint_of_todays_sources_holds_and_another_is_open(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in sources.names():
        sources.note(copied / name, sources.sources(sources.recipe(copied / name)))
    assert [found.changed for found in bundled.trained()] == [()] * 7
    assert invoke(["checkpoints", "check"]) == 0
    assert "to be trained" not in capsys.readouterr().out
    path = copied / "nano-e" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"]["curriculum.py"] = "0" * 16
    path.write_text(json.dumps(manifest))
    assert invoke(["checkpoints", "check"]) == 3
    told = capsys.readouterr().out.splitlines()
    assert "nano-e: to be trained again: changed since: curriculum.py" in told
    assert told[-1] == "1 of 7 are to be trained again: python -m model_impl.nano.train nano-e"
    del manifest["sources"]
    path.write_text(json.dumps(manifest))
    assert invoke(["checkpoints", "check"]) == 2
    assert "does not say with which sources" in capsys.readouterr().err


def test_a_training_that_goes_on_is_of_the_sources_that_it_began_with(tmp_path: Path) -> None:
    first = sources.begun(tmp_path, command("train"))
    assert first == sources.sources(command("train"))
    (tmp_path / "sources.json").write_text('{"a.py": "1"}')
    assert sources.begun(tmp_path, command("train")) == first, "it has not begun before it has a state"
    (tmp_path / "sources.json").write_text('{"a.py": "1"}')
    (tmp_path / "state.pt").touch()
    assert sources.begun(tmp_path, command("train")) == {"a.py": "1"}


# ---------------------------------------------------------------------------- afterwards, from the history


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.invalid")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def committed(package: Path, **manifest: Any) -> str:
    (package / "checkpoints/x/manifest.json").write_text(json.dumps(manifest))
    git(package, "add", "-A")
    git(package, "commit", "-qm", "a change")
    return git(package, "rev-parse", "HEAD")


def test_older_checkpoints_get_the_sources_of_the_commit_that_brought_their_training(tmp_path: Path) -> None:
    package = tmp_path / "package"
    folder = package / "checkpoints/x"
    folder.mkdir(parents=True)
    for path in PACKAGE.rglob("*.py"):
        there = package / path.relative_to(PACKAGE)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(path, there)
    git(tmp_path, "init", "-q")
    said = {"recipe": command("train"), "seconds": 7}
    committed(package, **said | {"seconds": 5}, sha256={"w": "0"})
    optimiser = (package / "optimiser.py").read_text()
    (package / "optimiser.py").write_text(optimiser + "\nAS_IT_WAS = True\n")
    made = committed(package, **said, sha256={"w": "1"})
    (package / "optimiser.py").write_text(optimiser)
    committed(package, **said, sha256={"w": "stored anew"})
    assert sources.note_afterwards(folder) == made
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sources_at"] == made
    assert sources.stale(folder) == ("optimiser.py",)
    assert sources.note_afterwards(folder) == made, "what was read from the history may be read again"
    sources.note(folder, {"a.py": "1"})
    with pytest.raises(sources.SourcesError, match="the training itself has said"):
        sources.note_afterwards(folder)
    (folder / "manifest.json").write_text(json.dumps(said | {"seconds": 9, "sha256": {}}))
    with pytest.raises(sources.SourcesError, match="no commit has a manifest that tells of this training"):
        sources.note_afterwards(folder)


def test_the_commit_of_sources_is_the_newest_that_has_them_all(tmp_path: Path) -> None:
    package = tmp_path / "package"
    folder = package / "checkpoints/x"
    folder.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    committed(package, recipe="of a time without generators")
    for path in PACKAGE.rglob("*.py"):
        there = package / path.relative_to(PACKAGE)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(path, there)
    said = {"recipe": command("train"), "sources": sources.sources(command("train")), "sha256": {}}
    committed(package, **said)
    (package / "score.py").write_text("AS_IT_WAS = True\n")
    newest = committed(package, **said)
    (package / "optimiser.py").write_text("AS_IT_WAS = True\n")
    committed(package, **said)
    assert sources.commit_of(folder) == newest
    said["sources"] |= {"optimiser.py": "0" * 16}
    committed(package, **said)
    with pytest.raises(sources.SourcesError, match="no commit has all sources that it names"):
        sources.commit_of(folder)


def test_each_recipe_notes_its_sources() -> None:
    for module in sources.RECIPES:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert "sources.note(" in ast.unparse(main), module
