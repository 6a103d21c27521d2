"""Whether changed sources still make the same checkpoint (`model_impl.nano.drawn`)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from model_impl.nano import curriculum, drawn, sources
from model_impl.nano.batches import Course

OLD = "0" * 16


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The manifest of nano-d, of today's sources; its training's commit is made up."""
    shutil.copy(sources.CHECKPOINTS / "nano-d" / "manifest.json", tmp_path)
    sources.note(tmp_path, sources.sources(sources.recipe(tmp_path)))
    monkeypatch.setattr(sources, "commit_of", lambda folder: "c" * 40)
    monkeypatch.setattr(drawn, "_replace_nano", lambda tree, commit: None)
    return tmp_path


def gives(monkeypatch: pytest.MonkeyPatch, **by_tree: str) -> list[str]:
    """Trees give these digests; returns which were asked."""
    asked: list[str] = []

    def answer(tree: Path, module: str, arguments: list[str]) -> str:
        assert (tree / "model_impl/text.py").is_file(), "each tree is a whole implementation"
        asked.append(f"{tree.name} {module} {' '.join(arguments)}")
        return by_tree[tree.name]

    monkeypatch.setattr(drawn, "_asked", answer)
    return asked


def aged(folder: Path, *names: str, **also: str) -> None:
    """Let sources be others than those of the training."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | also
    manifest["sources"] |= dict.fromkeys(names, OLD)
    path.write_text(json.dumps(manifest))


def written(folder: Path) -> Mapping[str, object]:
    found: dict[str, object] = json.loads((folder / "manifest.json").read_text())
    return found


def test_sources_that_draw_the_same_batches_are_taken_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = gives(monkeypatch, then="a" * 64, now="a" * 64)
    aged(folder, "curriculum.py", "subjects/tones.py", sources_at="b" * 40)
    assert "give the same batches, aaaaaaaaaaaaaaaa" in drawn.renew(folder)
    assert asked == ["then train nano-d", "now train nano-d"]
    assert sources.stale(folder) == ()
    assert written(folder)["sources_agree_with"] == {"commit": "c" * 40, "batches": "a" * 64}
    assert "sources_at" not in written(folder)
    assert drawn.renew(folder) == "its sources are those of its training"
    assert len(asked) == 2, "nothing is run for what has not changed"


def test_other_batches_are_another_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(monkeypatch, then="a" * 64, now="b" * 64)
    aged(folder, "curriculum.py")
    before = written(folder)
    with pytest.raises(sources.SourcesError, match=r"other batches than today's; train it again: python -m "):
        drawn.renew(folder)
    assert written(folder) == before


@pytest.mark.parametrize("name", ["train.py", "optimiser.py", "batches.py", "families.py", "settings.py"])
def test_what_decides_more_than_batches_is_not_excused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = gives(monkeypatch)
    aged(folder, "curriculum.py", name)
    with pytest.raises(sources.SourcesError, match=f"^{name} may change more than batches; train it again"):
        drawn.renew(folder)
    assert not asked


def test_a_recipe_of_minutes_is_run_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gives(monkeypatch, then="a" * 64, now="a" * 64)
    aged(folder, recipe="python -m model_impl.nano.scripted")
    assert "give the same weights" in drawn.renew(folder)
    assert asked == ["then scripted ", "now scripted "]


def test_a_head_is_trained_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gives(monkeypatch)
    aged(folder, "subjects/tones.py", recipe="python -m model_impl.nano.drafts nano-d")
    with pytest.raises(sources.SourcesError, match=r"again: python -m model_impl\.nano\.drafts nano-d"):
        drawn.renew(folder)
    assert not asked


def test_a_tree_is_asked_by_its_own_code_and_one_that_fails_says_why(tmp_path: Path) -> None:
    for place in ("model_impl", "model_impl/nano"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "__init__.py").touch()
    recipe = tmp_path / "model_impl/nano/scripted.py"
    recipe.write_text("import pathlib, sys; pathlib.Path(sys.argv[1], 'model.safetensors').write_text('w')")
    assert drawn._asked(tmp_path, "scripted", []) == hashlib.sha256(b"w").hexdigest()
    shutil.rmtree(tmp_path / "out")
    recipe.write_text("raise OSError('no lesson is left')")
    with pytest.raises(sources.SourcesError, match=r"nothing can be compared: .*no lesson is left"):
        drawn._asked(tmp_path, "scripted", [])


def test_a_tree_has_the_recipes_of_the_commit_and_the_code_of_today(tmp_path: Path) -> None:
    nano = tmp_path / "model_impl/nano"
    nano.mkdir(parents=True)
    (nano / "late.py").touch()
    drawn._replace_nano(tmp_path, "HEAD")
    assert not (nano / "late.py").exists()
    assert (nano / "curriculum.py").is_file()


def test_the_digest_is_of_every_batch_and_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = curriculum.RECIPES["nano-e"]
    stages = tuple(replace(stage, steps=1) for stage in whole.stages)
    small = replace(whole, stages=stages, batch=4)
    course = stages[-1].course

    def digest(recipe: curriculum.Recipe) -> str:
        monkeypatch.setattr(curriculum, "RECIPES", {"nano-e": recipe})
        return drawn.batches("nano-e")

    first = digest(small)
    assert digest(small) == first
    heavier = Course(course.generators, (*course.weights[:-1], course.weights[-1] + 50))
    others = [
        replace(small, seed=2),
        replace(small, weight_decay=0.2),
        replace(small, cooldown=0.4),
        replace(small, stages=stages[:-1]),
        replace(small, stages=(*stages[:-1], replace(stages[-1], steps=2))),
        replace(small, stages=(*stages[:-1], replace(stages[-1], course=heavier))),
    ]
    assert len({first, *map(digest, others)}) == 1 + len(others)
