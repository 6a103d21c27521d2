"""Documents of the nano tasks: JSON Lines beside this file, written by `python -m model_impl.nano.items`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance import resources
from conformance.tasks import sources
from conformance.tasks.sources import DataError

_MEDIA = ("image_", "audio_")


def documents(path: Path) -> list[dict[str, Any]]:
    """Documents of a file; media, which stand there in base64, as the bytes of files.

    Raises:
        DataError: it cannot be read.
    """
    found = []
    try:
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            doc = json.loads(line)
            for name in (name for name in doc if name.startswith(_MEDIA)):
                doc[name] = base64.b64decode(doc[name], validate=True)
            found.append(doc)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: line {len(found) + 1} cannot be read: {error}") from error
    if not found:
        raise DataError(f"{path}: holds no documents")
    return found


def _dataset(name: str) -> Callable[..., dict[str, Any]]:
    def load(**_metadata: Any) -> dict[str, Any]:
        """Splits, as lm-eval's `custom_dataset` gives them."""
        return {"test": sources.dataset(documents(resources.task_data(name)))}

    return load


gsm8k = _dataset("nano_gsm8k")
mmmu = _dataset("nano_mmmu")
sounds = _dataset("nano_sounds")
