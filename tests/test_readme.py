"""README's numbers are those of the repository."""

from __future__ import annotations

import importlib.util
import re
import struct

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
_SPEC = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
assert _SPEC is not None
assert _SPEC.loader is not None
readme = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(readme)


def test_its_numbers_are_current() -> None:
    """If this fails: python docs/readme.py."""
    assert readme.written(TEXT) == TEXT
    assert "| vLLM: its parsers and its engine | 0.32.0 |" in TEXT


def test_other_numbers_are_replaced() -> None:
    other = re.sub(r"There are \d+ cases", "There are 7 cases", TEXT)
    assert other != TEXT
    assert readme.written(other) == TEXT


def test_a_text_without_a_place_for_them_is_refused() -> None:
    with pytest.raises(ValueError, match="around what belongs there"):
        readme.written("# Gemma 4 conformance\n")


def test_its_files_are_there() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / name).exists(), name
    picture = (ROOT / "docs" / "dashboard.png").read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (1200, 900)
