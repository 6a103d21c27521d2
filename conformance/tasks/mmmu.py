"""Multiple-choice questions about pictures, as MMMU has them, and what is read from answers to them.

lm-eval's reader of such answers draws a letter by chance where it finds none. `letter` asks the same reader
and keeps chance out: such an answer has no letter, and counts as wrong.
"""

from __future__ import annotations

import ast
import io
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from lm_eval.api.filter import Filter  # type: ignore[import-untyped]
from lm_eval.tasks.mmmu import utils  # type: ignore[import-untyped]
from PIL import Image

from conformance.errors import ConformanceError
from conformance.scoring import INVALID

Document = Mapping[str, Any]

_PLACE = re.compile(r"<(image|audio) (\d+)>")


class DocumentError(ConformanceError):
    """A document is not in the form of the task."""


class _ChanceError(Exception):
    """The reader was about to draw."""


class _NoChance:
    """Stands in for `random` in lm-eval's reader."""

    @staticmethod
    def choice(_choices: Sequence[str]) -> str:
        raise _ChanceError


def options(doc: Document) -> list[str]:
    """A document's options, which data sets hold as a list or as the text of one.

    Raises:
        DocumentError: they are neither, or too many to have a letter each.
    """
    found = doc["options"]
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError) as error:
            raise DocumentError(f"options {found[:80]!r}: no list: {error}") from error
    if not isinstance(found, Sequence) or len(found) > len(string.ascii_uppercase):
        raise DocumentError(f"options {str(found)[:80]!r}: expected a list of at most 26")
    return [str(option) for option in found]


def letter(response: str, doc: Document) -> str | None:
    """The letter that a response chooses; None where there is nothing to go by."""
    texts = options(doc)
    letters = list(string.ascii_uppercase[: len(texts)])
    with mock.patch.object(utils, "random", _NoChance):
        try:
            return str(
                utils.parse_multi_choice_response(response, letters, dict(zip(letters, texts, strict=True)))
            )
        except _ChanceError:
            return None


def is_open(doc: Document) -> bool:
    """Whether it asks for a word or a number instead of a letter."""
    return bool(doc.get("question_type", "multiple-choice") != "multiple-choice")


class Choice(Filter):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's filter: each response to the letter that it chooses, or to the mark of an invalid one."""

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
        """Responses to one document stand together."""
        return [[_read(response, doc) for response in own] for own, doc in zip(resps, docs, strict=True)]


def _read(response: str, doc: Document) -> str:
    if is_open(doc):
        return response.strip() or INVALID
    return letter(response, doc) or INVALID


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Score what `Choice` gave."""
    if is_open(doc):
        right = results[0] != INVALID and utils.eval_open(
            doc["answer"], utils.parse_open_response(results[0])
        )
    else:
        right = results[0] == doc["answer"]
    return {"acc": float(right)}


def doc_to_text(doc: Document) -> str:
    """lm-eval's own wording; where a picture or a sound belongs, `<image>` or `<audio>`."""
    return _PLACE.sub(r"<\1>", _worded(doc))


def doc_to_image(doc: Document) -> list[Image.Image]:
    """Pictures in the order in which the text speaks of them."""
    return [picture(doc, f"image_{number}") for number in _numbers(doc, "image")]


def doc_to_audio(doc: Document) -> list[Any]:
    """Sounds likewise."""
    return [_field(doc, f"audio_{number}") for number in _numbers(doc, "audio")]


def _worded(doc: Document) -> str:
    """The question with its options, and how to answer."""
    written = {"question_type": "multiple-choice", **doc, "options": repr(options(doc))}
    return str(utils._doc_to_text(written))


def _numbers(doc: Document, kind: str) -> list[str]:
    return [number for found, number in _PLACE.findall(_worded(doc)) if found == kind]


def _field(doc: Document, name: str) -> Any:
    found = doc.get(name)
    if found is None:
        raise DocumentError(f"the text speaks of {name}, and the document has none")
    return found


def picture(doc: Document, name: str) -> Image.Image:
    """A decoded picture, or what a file of the hub's holds: a mapping with its bytes."""
    found = _field(doc, name)
    if isinstance(found, Mapping):
        found = found.get("bytes")
    if isinstance(found, bytes):
        found = Image.open(io.BytesIO(found))
    if not isinstance(found, Image.Image):
        raise DocumentError(f"{name}: expected a picture, found {type(found).__name__}")
    return found
