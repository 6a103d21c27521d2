"""What the bundled implementation brings besides a target: the scripted checkpoint, and what it says.

Importing it loads no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from conformance.errors import TargetError
from conformance.scratch import Scratch
from model_impl.chat.render import render
from model_impl.errors import ModelError
from model_impl.nano import sources
from model_impl.nano.conversations import (
    FAMILY,
    picture_message,
    plain_examples,
    surroundings,
    token_ids,
)
from model_impl.nano.script import ADAPTER, adapter_folder, checkpoint_folder, load_script

__all__ = [
    "ADAPTER",
    "STOP_IDS",
    "Dialogue",
    "Trained",
    "about_pictures",
    "adapter",
    "add_processors",
    "checkpoint",
    "dialogues",
    "digests",
    "draft_name",
    "has",
    "lines",
    "text",
    "tokenizer",
    "trained",
    "trained_draft",
]

STOP_IDS = (1, 106, 50)
"""`<eos>`, `<turn|>` and `<|tool_response>`, as the checkpoint's `generation_config.json` has them."""
_PROCESSORS = (
    "chat_template.jinja", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Dialogue:
    """A prompt, and the answer that is known by heart."""

    line: str
    """Its id in the script."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """With the stop token that ends it."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint that was trained, and whether it would be trained so today."""

    name: str
    changed: tuple[str, ...]
    """Sources of its recipe that have changed since."""
    train: str
    """The command that trains it."""


def trained() -> tuple[Trained, ...]:
    """All bundled checkpoints, heads and adapters.

    Raises:
        TargetError: a manifest does not say with which sources.
    """
    folders = [sources.CHECKPOINTS / name for name in sources.names()]
    try:
        return tuple(Trained(path.name, sources.stale(path), sources.recipe(path)) for path in folders)
    except ModelError as error:
        raise TargetError(str(error)) from error


def checkpoint(*, causal_images: bool = False) -> Path:
    """Folder of the scripted checkpoint.

    Args:
        causal_images: A copy, which lasts as long as this process, whose configuration lets soft tokens see
            only those before them.
    """
    return _causal_copy().path if causal_images else checkpoint_folder()


def has(name: str) -> bool:
    """Whether there is a bundled checkpoint, or head, of this name."""
    return (checkpoint_folder().with_name(name) / "manifest.json").is_file()


def draft_name(name: str) -> str:
    """What the folder of a bundled checkpoint's Eagle3 head is called."""
    return f"{name}-eagle3"


def trained_draft(checkpoint: Path) -> Path | None:
    """Folder of the Eagle3 head of a bundled checkpoint that was trained with one."""
    folder = checkpoint.with_name(draft_name(checkpoint.name))
    return folder if folder.parent == checkpoint_folder().parent and has(folder.name) else None


def adapter() -> Path:
    """Folder of the scripted checkpoint's adapter, which servers know as `ADAPTER`."""
    return adapter_folder()


def add_processors(folder: Path, *, unified: bool = False) -> None:
    """Copy what the scripted checkpoint has besides configuration and weights to another checkpoint.

    Args:
        folder: Of the other one.
        unified: It is of an encoder-free model, whose processors are others.
    """
    for name in _PROCESSORS:
        shutil.copy(checkpoint_folder() / name, folder)
    if unified:
        path = folder / "processor_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        for part in ("image_processor", "video_processor"):
            kind = f"{part}_type"
            written[part][kind] = written[part][kind].replace("Gemma4", "Gemma4Unified")
        written["feature_extractor"] = {"feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor"}
        written["processor_class"] = "Gemma4UnifiedProcessor"
        path.write_text(json.dumps(written, indent=2), encoding="utf-8")


@cache
def digests(name: str = "scripted") -> dict[str, str]:
    """SHA-256 of each of a bundled checkpoint's files, as its manifest has them; tests compare the two."""
    folder = checkpoint_folder().with_name(name)
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sha256"])


@cache
def tokenizer() -> Tokenizer:
    """The scripted checkpoint's. Do not change it."""
    return Tokenizer.from_file(str(checkpoint_folder() / "tokenizer.json"))


def text(ids: Collection[int]) -> str:
    """Token ids as text, markers included."""
    return str(tokenizer().decode(list(ids), skip_special_tokens=False))


def lines() -> tuple[str, ...]:
    """Ids of the script's lines without pictures, and of what it says to anything else."""
    script = load_script()
    return (*(line.id for line in script.lines), script.default.id)


def dialogues(asked: str, wanted: Collection[str] = ()) -> tuple[Dialogue, ...]:
    """Prompts with their answers, in the script's order.

    Args:
        asked: What stands around the message that asks for a line: `alone`, `thinking`, `tools`, `system`
            or `all`.
        wanted: Ids of lines; empty: all.
    """
    found = []
    for example in _examples():
        line, _, around = example.line.partition(", ")
        if around == asked and (line in wanted or not wanted):
            found.append(Dialogue(line, example.prompt, example.answer))
    return tuple(found)


def about_pictures(asked: str, line: str, colours: Sequence[str], *, causal_images: bool = False) -> Dialogue:
    """A prompt with one placeholder for each picture, before the words that ask for a line.

    Args:
        asked: As in `dialogues`.
        line: Id of a line about pictures.
        colours: Of the pictures, in order; empty for one of several colours.
        causal_images: As in `checkpoint`.
    """
    script = load_script()
    wanted = script.pictures.line(line)
    (around,) = (each for each in surroundings(script) if each.name == asked)
    messages = [*around.before, picture_message(wanted, len(colours))]
    named = [colour or script.pictures.motley for colour in colours]
    said = script.pictures.output(wanted, named, causal=causal_images)
    return Dialogue(
        f"{line} ({', '.join(named) or 'no picture'})",
        token_ids(tokenizer(), render(messages, family=FAMILY, **around.options)),
        token_ids(tokenizer(), f"{said}<turn|>"),
    )


@cache
def _causal_copy() -> Scratch:
    copy = Scratch("conformance-causal-")
    shutil.copytree(checkpoint_folder(), copy.path, dirs_exist_ok=True)
    path = copy.path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["use_bidirectional_attention"] = None
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return copy


@cache
def _examples() -> tuple[Dialogue, ...]:
    return tuple(
        Dialogue(example.name, example.prompt, example.output)
        for example in plain_examples(load_script(), tokenizer())
    )
