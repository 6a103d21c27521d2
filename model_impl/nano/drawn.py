"""Whether changed sources still make the same checkpoint: `python -m model_impl.nano.drawn NAME...`.

A checkpoint is stale by the text of its sources, and most changes of text teach the same. So both are asked,
on one machine: the sources of the training, taken from the history, and today's, each with today's code of
the model. Of a nano training, which takes up to an hour and a half, all batches are drawn and compared, and
every source that is about more than batches must be as it was; a recipe that takes minutes is run whole, and
its weights are compared. If nothing differs, the manifest gets today's sources, and says which they match.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

_NANO = Path(__file__).parent
_WEIGHTS = {"scripted": "model.safetensors", "adapted": "adapter_model.safetensors"}
"""By recipes that take minutes: what is compared."""
_OF_BATCHES = (
    *("curriculum.py", "dialogues.py", "lesson.py", "phrases.py", "problems.py", "words.py"),
    "subjects/",
)
"""Beginnings of the sources that decide nothing but what `batches` sees."""


def batches(name: str) -> str:
    """Digest of all that a nano training is given: its numbers, its tokens, its pictures and its sounds.

    The sources of an older commit run this very text, so it uses nothing that came later than they.

    Args:
        name: Of the checkpoint, such as `nano-d`.

    Returns:
        SHA-256, hexadecimal. Pictures and sounds are drawn in floating point: another machine may give
        another.
    """
    from model_impl.nano.batches import Timetable
    from model_impl.nano.curriculum import RECIPES, nano_tokenizer
    from model_impl.nano.families import FAMILIES

    recipe, tokenizer = RECIPES[name], nano_tokenizer()
    numbers = {entry.name: getattr(recipe, entry.name) for entry in fields(recipe) if entry.name != "stages"}
    steps = [(recipe.stage(step), recipe.rate(step)) for step in range(recipe.steps)]
    digest = hashlib.sha256(json.dumps([numbers, steps, tokenizer.to_str()], sort_keys=True).encode())
    for number, stage in enumerate(recipe.stages):
        digest.update(f"stage {number} of {stage.steps} steps".encode())
        seed = f"{recipe.seed}:{number}"
        table = Timetable(stage.course, tokenizer, FAMILIES[name].template, recipe.batch, seed)
        for step in range(stage.steps):
            for one in table.batch(step):
                media: list[np.ndarray[Any, Any]] = [*one.lesson.pictures, *one.lesson.sounds]
                digest.update(json.dumps([one.prompt, one.answer, [each.shape for each in media]]).encode())
                for each in media:
                    digest.update(each.tobytes())
    return digest.hexdigest()


def renew(folder: Path) -> str:
    """Put today's sources into the manifest of a checkpoint that they make as well.

    Args:
        folder: The checkpoint's, in a git repository with its whole history.

    Returns:
        What was found, in words.

    Raises:
        SourcesError: they do not make it, or that cannot be told but by training it again.
    """
    from model_impl.nano import sources

    changed = sources.stale(folder)
    if not changed:
        return "its sources are those of its training"
    command = sources.recipe(folder)
    _, _, module, *arguments = command.split()
    module = module.rpartition(".")[2]
    again = f"train it again: {command}"
    more = [name for name in changed if not name.startswith(_OF_BATCHES)]
    if module == "drafts" or (module == "train" and more):
        raise sources.SourcesError(f"{', '.join(more or changed)} may change more than batches; {again}")
    then = sources.commit_of(folder)
    with tempfile.TemporaryDirectory(prefix="drawn-") as name:
        old, new = Path(name, "then"), Path(name, "now")
        for tree in (old, new):
            shutil.copytree(_NANO.parent, tree / "model_impl", ignore=shutil.ignore_patterns("__pycache__"))
        _replace_nano(old, then)
        found = [_asked(tree, module, arguments) for tree in (old, new)]
    what = "weights" if module in _WEIGHTS else "batches"
    if found[0] != found[1]:
        raise sources.SourcesError(f"the sources of {then[:12]} give other {what} than today's; {again}")
    sources.note(folder, sources.sources(command), agreed={"commit": then, what: found[1]})
    return f"today's sources and those of {then[:12]} give the same {what}, {found[1][:16]}"


def _replace_nano(tree: Path, commit: str) -> None:
    """Give a copy of the implementation the recipes of an older commit."""
    shutil.rmtree(tree / "model_impl" / "nano")
    command = ["git", "archive", commit, "."]
    packed = subprocess.run(command, cwd=_NANO, capture_output=True, check=True).stdout  # noqa: S603
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(tree / "model_impl" / "nano", filter="data")


def _asked(tree: Path, module: str, arguments: Sequence[str]) -> str:
    """The digest of what a tree gives.

    Raises:
        SourcesError: its process failed.
    """
    from model_impl.nano import sources

    out = tree / "out"
    out.mkdir()
    if module in _WEIGHTS:
        command = ["-m", f"model_impl.nano.{module}", *arguments, str(out)]
    else:
        command = [str(Path(__file__)), "--tell", *arguments]
    done = subprocess.run(  # noqa: S603 - this very interpreter
        [sys.executable, "-P", *command],
        env=os.environ | {"PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise sources.SourcesError(f"the recipe of {tree.name} failed, so nothing can be compared: {said}")
    if module in _WEIGHTS:
        return hashlib.sha256((out / _WEIGHTS[module]).read_bytes()).hexdigest()
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Renew the manifests of checkpoints that today's sources make as well."""
    parser = argparse.ArgumentParser(prog="python -m model_impl.nano.drawn", description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--tell", action="store_true", help="only say what the trainings of NAME are given")
    chosen = parser.parse_args(arguments)
    if chosen.tell:
        sys.stdout.write("".join(f"{batches(name)}\n" for name in chosen.names))
        return
    from model_impl.nano import sources

    for name in chosen.names:
        sys.stdout.write(f"{name}: {renew(sources.CHECKPOINTS / name)}\n")


if __name__ == "__main__":
    main()
