"""Imported by every Python process that has this folder on its path: mends the import of torchvision.

The published torchvision is built for CUDA. Beside a CPU torch its extension cannot be loaded, and its import
then fails, because it describes two operators that only the extension defines. They are declared here, and
never run: images are resized and normalised in Python. Where the extension loads, nothing is done.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself; sees the first import of torchvision."""

    _library: Any = None
    """Declarations last as long as this object."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            found = importlib.util.find_spec(name)
            if found is not None and found.origin is not None:
                self._declare(Path(found.origin).parent)
        return None

    def _declare(self, package: Path) -> None:
        torch: Any = importlib.import_module("torch")
        try:
            for extension in package.glob("_C*.so"):
                torch.ops.load_library(extension)
        except OSError:
            self._library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                self._library.define(schema)


_FINDER = _BeforeTorchvision()
sys.meta_path.insert(0, _FINDER)
