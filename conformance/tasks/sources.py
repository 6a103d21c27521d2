"""Where documents of real tasks come from: a local folder, or the hub.

The folder that `CONFORMANCE_DATA_DIR` names holds data sets as the hub has them: `openai/gsm8k/main/
test-00000-of-00001.parquet`, or shorter, `gsm8k/test.jsonl`. What is not in it comes from the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.errors import ConformanceError

VARIABLE = "CONFORMANCE_DATA_DIR"
_SPLITS = ("train", "validation", "dev", "test")
_FILE = re.compile(rf"({'|'.join(_SPLITS)})(?:([-_]).*)?\.(parquet|jsonl)")


class DataError(ConformanceError):
    """Documents cannot be read: says from where, and what to do."""


def data_folder() -> Path | None:
    """The local folder; None where none is named.

    Raises:
        DataError: there is no such folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise DataError(f"{VARIABLE} names {folder}, which is no folder")
    return folder


def local_files(dataset: str, name: str | None = None) -> dict[str, tuple[Path, ...]]:
    """Files of each split in the local folder; empty where the data set is not there.

    Args:
        dataset: As the hub names it, `openai/gsm8k`.
        name: Of its configuration, `main`.
    """
    root = data_folder()
    if root is None:
        return {}
    for place in (root / dataset, root / dataset.rpartition("/")[2]):
        for folder in (place / name, place) if name else (place,):
            found = _splits(folder)
            if found:
                return found
    return {}


def _splits(folder: Path) -> dict[str, tuple[Path, ...]]:
    """A file that is named after its split alone wins over parts, and those of the hub over others."""
    ranked: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob("*")):
        match = _FILE.fullmatch(path.name)
        if match:
            ranked.setdefault(match[1], {}).setdefault(match[2] or "", []).append(path)
    order = ("", "-", "_")
    return {split: tuple(next(by[key] for key in order if key in by)) for split, by in ranked.items()}


def digests(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    found = {}
    for path in (path for paths in files.values() for path in paths):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def load(dataset: str, name: str | None = None) -> dict[str, Any]:
    """Splits of a data set, each a `datasets.Dataset`.

    Raises:
        DataError: a local file cannot be read, or the hub cannot be reached or has no such data set.
    """
    import datasets  # type: ignore[import-untyped]

    local = local_files(dataset, name)
    if local:
        return {
            split: datasets.concatenate_datasets(list(map(_read, paths))) for split, paths in local.items()
        }
    try:
        return dict(datasets.load_dataset(dataset, name))
    except Exception as error:  # of the network, the hub, or the reader
        what = f"{dataset} ({name})" if name else dataset
        raise DataError(
            f"{what}: not in {os.environ.get(VARIABLE) or 'a local folder'}, and the hub does not give it "
            f"({type(error).__name__}: {error}); put a copy in a folder and name it in {VARIABLE}"
        ) from error


def dataset(documents: Sequence[Mapping[str, Any]]) -> Any:
    """A `datasets.Dataset` with all fields that any document has; absent ones are None."""
    import datasets

    # `from_list` knows the fields of the first one only.
    names = dict.fromkeys(name for doc in documents for name in doc)
    return datasets.Dataset.from_list([{name: doc.get(name) for name in names} for doc in documents])


def _read(path: Path) -> Any:
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        if path.suffix == ".parquet":
            return datasets.Dataset(pyarrow.parquet.read_table(path))
        with path.open(encoding="utf-8") as file:
            return dataset([json.loads(line) for line in file if line.strip()])
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
