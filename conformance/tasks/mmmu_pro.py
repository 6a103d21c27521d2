"""MMMU-Pro: MMMU's questions with ten options, and as pictures that hold question and options too.

Documents: https://huggingface.co/datasets/MMMU/MMMU_Pro, configurations `standard (10 options)` and `vision`,
split `test`, 1 730 questions each. The standard questions are worded as lm-eval words those of MMMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from conformance.tasks import mmmu, sources

DATASET = "MMMU/MMMU_Pro"
STANDARD = "standard (10 options)"
VISION = "vision"
_INSTRUCTION = "The picture shows a question and its options. Answer with the letter of the right option."


def standard(**_metadata: Any) -> dict[str, Any]:
    """Splits with text and pictures."""
    return sources.load(DATASET, STANDARD)


def vision(**_metadata: Any) -> dict[str, Any]:
    """Splits with one picture for everything."""
    return sources.load(DATASET, VISION)


def vision_text(doc: Mapping[str, Any]) -> str:
    """The same for every document: all else is in the picture."""
    del doc
    return f"<image>\n{_INSTRUCTION}"


def vision_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The picture."""
    return [mmmu.picture(doc, "image")]
