"""Data sets in the hub's form, made up: MMMU's subjects of business, and MMMU-Pro."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

BUSINESS = ("Accounting", "Economics", "Finance", "Manage", "Marketing")
EACH = 6
"""Questions to a subject."""


def picture(red: int) -> dict[str, Any]:
    """As a file of the hub's holds one."""
    made = io.BytesIO()
    Image.new("RGB", (20, 12), (red, 0, 90)).save(made, format="PNG")
    return {"bytes": made.getvalue(), "path": None}


def write_mmmu(folder: Path) -> None:
    """`MMMU/MMMU/Accounting/validation-00000-of-00001.parquet` and so on."""
    for subject in BUSINESS:
        rows = [_question(subject, number) for number in range(EACH)]
        _write(rows, folder / "MMMU" / "MMMU" / subject / "validation-00000-of-00001.parquet", 2)


def _question(subject: str, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"validation_{subject}_{number}",
        "question": f"{subject} {number}: what does <image 1> show?",
        "options": "['a pear', 'a plum', 'a fig', 'a lime']",
        "answer": "ABCD"[number % 4],
        "question_type": "multiple-choice",
        "image_1": picture(number),
        "image_2": None,
    }
    if number == 4:
        row |= {"question": f"{subject}: <image 2> beside <image 1> and <image 2>", "image_2": picture(200)}
    if number == 5:
        row |= {"question_type": "open", "options": "[]", "answer": "12.5"}
    return row


def write_mmmu_pro(folder: Path) -> None:
    """Two parts of the standard questions, which the hub splits too, and one of the pictures."""
    root = folder / "MMMU" / "MMMU_Pro"
    options = str([f"the number {place}" for place in range(10)])
    standard = [
        {
            "id": f"test_{number}",
            "question": f"{number}: <image 1>?",
            "options": options,
            "answer": "ABCDEFGHIJ"[number],
            "subject": "Art" if number % 2 else "Music",
            "image_1": picture(number),
        }
        for number in range(10)
    ]
    for part in (0, 1):
        path = root / "standard (10 options)" / f"test-0000{part}-of-00002.parquet"
        _write(standard[part * 5 : part * 5 + 5], path, 1)
    seen = [
        {
            "id": f"test_{number}",
            "image": picture(number),
            "options": options,
            "answer": "J",
            "subject": "Art",
        }
        for number in range(4)
    ]
    _write(seen, root / "vision" / "test-00000-of-00001.parquet", 0)


def _write(rows: list[dict[str, Any]], path: Path, pictures: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"image_{number}" for number in range(1, pictures + 1)] or ["image"]
    features = datasets.Features(
        {name: datasets.Image() if name in names else datasets.Value("string") for name in rows[0]}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
