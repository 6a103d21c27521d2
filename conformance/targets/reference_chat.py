"""Prompts for a checkpoint, and what its answers say: its own tokenizer and template, the bundled parser.

Targets that generate take and give token ids. This turns a conversation into the ids of a prompt, and the ids
of an answer into thought and content. Importing it loads no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from conformance.errors import ConformanceError, EngineError
from conformance.targets import bundled
from model_impl.chat import parser as gemma
from model_impl.chat.markers import Tokens
from model_impl.chat.render import render_template
from model_impl.errors import ModelError

_BOS = "<bos>"
_DECIDING = ("*.safetensors", "*.json", "*.jinja")
"""Files of a checkpoint that decide what it says."""
_NOT_DECIDING = ("manifest.json",)
_MEDIA_LENGTHS = {"image": ("image_seq_length", 280), "audio": ("audio_seq_length", 750)}
"""Where `processor_config.json` has the most soft tokens of a piece, and the published values."""


class CheckpointError(ConformanceError):
    """A checkpoint's folder lacks what is needed to talk to it."""


@dataclass(frozen=True)
class Said:
    """An answer, read."""

    raw: str
    """The whole text, markers included."""
    reasoning: str
    content: str


class Chat:
    """What it takes to talk to a checkpoint.

    Args:
        folder: With `config.json`, `tokenizer.json`, `generation_config.json` and a chat template.

    Raises:
        CheckpointError: one of them is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(_file(folder, "tokenizer.json")))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{folder / 'tokenizer.json'}: no tokenizer: {error}") from error
        self.template = _template(folder)
        self.stop_ids = _stop_ids(folder)
        self.soft_tokens = _soft_tokens(folder)
        self.positions = _positions(folder)
        added = self.tokenizer.get_added_tokens_decoder()
        self._control = {number for number, token in added.items() if token.special}

    @property
    def template_sha256(self) -> str:
        """Digest of the template's text."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def prompt(self, messages: Sequence[Mapping[str, Any]], *, thinking: bool) -> str:
        """The conversation as the model reads it, up to the opening of the answer.

        Raises:
            EngineError: the template refuses the conversation.
        """
        try:
            return render_template(self.template, messages, thinking=thinking)
        except ModelError as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids; control tokens are recognised, none is added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def bare_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that no template has rendered, with the token that every prompt begins with."""
        return self.ids(text if text.startswith(_BOS) else _BOS + text)

    @property
    def bos_id(self) -> int:
        """The token that every prompt begins with.

        Raises:
            CheckpointError: the tokenizer has none.
        """
        found = self.tokenizer.token_to_id(_BOS)
        if found is None:
            raise CheckpointError(f"{self.folder / 'tokenizer.json'}: has no token {_BOS}")
        return int(found)

    def read(self, ids: Sequence[int], prompt: str) -> Said:
        """An answer's thought and content, by the bundled parser.

        Args:
            ids: Of the answer, with the token that stopped it.
            prompt: What was answered; its end decides how the answer begins.
        """
        runs: list[tuple[str, Tokens]] = []
        for control, group in itertools.groupby(ids, key=lambda number: number in self._control):
            numbers = list(group)
            # A control token stands for itself; ordinary ones may share a character.
            for part in [[number] for number in numbers] if control else [numbers]:
                text = str(self.tokenizer.decode(part, skip_special_tokens=False))
                runs.append((text, "control" if control else "ordinary"))
        message = gemma.parse(runs, prompt)
        return Said("".join(text for text, _ in runs), message.reasoning, message.content)


def checkpoint_folder(name: str | Path) -> Path:
    """A checkpoint by the name of a bundled one, or by its folder.

    Raises:
        CheckpointError: there is neither.
    """
    if not str(name):
        raise CheckpointError("no checkpoint is named; give the name of a bundled one, or a folder")
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    beside = bundled.checkpoint().parent
    if folder.name == str(name) and (beside / folder.name / "config.json").is_file():
        return beside / folder.name
    known = sorted(path.parent.name for path in beside.glob("*/generation_config.json"))
    raise CheckpointError(
        f"{name}: no folder with a config.json, and no bundled checkpoint; those are {', '.join(known)}"
    )


def checkpoint_sha256(folder: Path) -> str:
    """Digest of the files that decide what a checkpoint says: names, and what is in them."""
    whole = hashlib.sha256()
    files = {path.name: path for pattern in _DECIDING for path in folder.glob(pattern)}
    for name in sorted(set(files) - set(_NOT_DECIDING)):
        with files[name].open("rb") as file:
            whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {name}; give a folder in the published layout")
    return path


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    inside = _json(settings).get("chat_template") if settings.is_file() else None
    if not isinstance(inside, str):
        raise CheckpointError(
            f"{folder}: has no chat_template.jinja, nor a `chat_template` in tokenizer_config.json"
        )
    return inside


def _positions(folder: Path) -> int:
    """Tokens of the longest sequence that the model is made for."""
    path = _file(folder, "config.json")
    config = _json(path)
    text = config.get("text_config", config)
    found = text.get("max_position_embeddings") if isinstance(text, dict) else None
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"{path}: max_position_embeddings is {found!r}; expected a number above 0")
    return found


def _soft_tokens(folder: Path) -> dict[str, int]:
    """Most soft tokens of an image and of a sound."""
    path = folder / "processor_config.json"
    found = _json(path) if path.is_file() else {}
    lengths = {kind: found.get(name, usual) for kind, (name, usual) in _MEDIA_LENGTHS.items()}
    for kind, length in lengths.items():
        if not isinstance(length, int) or length < 1:
            raise CheckpointError(
                f"{path}: {_MEDIA_LENGTHS[kind][0]} is {length!r}; expected a number above 0"
            )
    return lengths


def _stop_ids(folder: Path) -> tuple[int, ...]:
    path = _file(folder, "generation_config.json")
    found = _json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(number, int) for number in ids):
        raise CheckpointError(f"{path}: eos_token_id is {found!r}; expected a token id, or a list of them")
    return tuple(ids)
