"""What the bundled implementation brings besides a target: the scripted checkpoint, and what it says.

Importing it loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from model_impl.nano.conversations import plain_examples
from model_impl.nano.script import checkpoint_folder, load_script

STOP_IDS = (1, 106, 50)
"""`<eos>`, `<turn|>` and `<|tool_response>`, as the checkpoint's `generation_config.json` has them."""


@dataclass(frozen=True)
class Dialogue:
    """A prompt, and the answer that is known by heart."""

    line: str
    """Its id in the script."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """With the stop token that ends it."""


def checkpoint() -> Path:
    """Folder of the scripted checkpoint."""
    return checkpoint_folder()


@cache
def digests() -> dict[str, str]:
    """SHA-256 of each of its files, as its manifest has them; a test compares the two."""
    manifest = json.loads((checkpoint_folder() / "manifest.json").read_text(encoding="utf-8"))
    return dict(manifest["sha256"])


@cache
def tokenizer() -> Tokenizer:
    """The scripted checkpoint's. Do not change it."""
    return Tokenizer.from_file(str(checkpoint_folder() / "tokenizer.json"))


def text(ids: Collection[int]) -> str:
    """Token ids as text, markers included."""
    return str(tokenizer().decode(list(ids), skip_special_tokens=False))


def lines() -> tuple[str, ...]:
    """Ids of the script's lines, and of what it says to anything else."""
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


@cache
def _examples() -> tuple[Dialogue, ...]:
    return tuple(
        Dialogue(example.name, example.prompt, example.output)
        for example in plain_examples(load_script(), tokenizer())
    )
