"""Files that carry a digest of themselves: what long work found, kept in the repository.

One that was changed by hand is refused, so that what it says came from a command.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from conformance.errors import ConformanceError
from conformance.records import Record


class RecordError(ConformanceError):
    """A record cannot be read or written."""


class Sealed(Record):
    """What such a file holds, but for its digest."""

    digest: str = ""
    """SHA-256 of the file with this field empty."""


SealedT = TypeVar("SealedT", bound=Sealed)


def read(path: Path, model: type[SealedT], command: str) -> SealedT:
    """Read such a file.

    Args:
        path: Of it.
        model: What it holds.
        command: That writes it, and the option with which it writes another one, for messages.

    Raises:
        RecordError: there is none, it is something else, or it was changed by hand.
    """
    try:
        file = model.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path}: is not what this version's {command} writes; write another file, or remove this one"
        ) from error
    if file.digest != digest_of(file):
        raise RecordError(f"{path}: was changed by hand: its digest is not its own; run {command} again")
    return file


def write(file: Sealed, path: Path) -> None:
    """Write such a file: readers see the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    text = file.model_copy(update={"digest": digest_of(file)}).model_dump_json(indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def digest_of(file: Sealed) -> str:
    """SHA-256 of a file's text, were its digest empty."""
    return hashlib.sha256(file.model_copy(update={"digest": ""}).model_dump_json().encode()).hexdigest()
