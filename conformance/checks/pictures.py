"""Pictures in requests to servers: how they are sent, and how many tokens they take."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, get_args

from conformance.media import Budget, Picture
from conformance.results import Problem
from conformance.suites import ImagePart, ServerCase, image_parts, is_image

Message = Mapping[str, Any]
BUDGETS: tuple[int, ...] = get_args(Budget)
PLAIN = Picture(width=96, height=96, colour="red")
"""What every server takes that takes pictures at all."""
_TILE = 48
"""Pixels of a soft token along each side."""


def pictures_of(messages: Iterable[Message]) -> list[Picture]:
    """All pictures of a conversation, in order."""
    return [part.image for message in messages for part in image_parts(message)]


def sendable(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form: each picture as a data URL."""
    return _mapped(messages, lambda part: _url_part(part.image))


def content_sendable(content: Sequence[Any]) -> list[Any]:
    """A content's parts in that form."""
    (message,) = sendable([{"content": content}])
    return list(message["content"])


def replaced(messages: Iterable[Message], pictures: Iterable[Picture]) -> list[dict[str, Any]]:
    """Messages with others in place of their pictures, in order."""
    others = iter(pictures)
    return _mapped(messages, lambda part: part.model_copy(update={"image": next(others)}).model_dump())


def mended(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages whose damaged pictures are whole."""
    given = list(messages)
    whole = {"damage": "none", "claimed": None}
    return replaced(given, [picture.model_copy(update=whole) for picture in pictures_of(given)])


def plain(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages with as many pictures that are small and of one colour."""
    given = list(messages)
    return replaced(given, [PLAIN] * len(pictures_of(given)))


def in_case(case: ServerCase) -> bool:
    """Whether a case sends pictures."""
    beside = ({"content": text.content} for text in case.beside if not isinstance(text, str))
    return bool(pictures_of([*case.messages, *beside]))


def soft_tokens(picture: Picture, budget: int) -> int:
    """How many soft tokens a picture takes (fact sheet, section 3.1)."""
    width, height = picture.width, picture.height
    scale = math.sqrt(budget * _TILE**2 / (height * width))
    rows, columns = math.floor(scale * height / _TILE), math.floor(scale * width / _TILE)
    if rows == 0:
        return min(width // height, budget)
    return rows * columns if columns else min(height // width, budget)


def growth_problem(
    old: Sequence[Picture], new: Sequence[Picture], budgets: Sequence[int], got: int
) -> Problem | None:
    """Judge by how many tokens a prompt grew with other pictures.

    Args:
        old: Its pictures.
        new: The others.
        budgets: Most soft tokens of a picture; what the server was told may be any of them.
        got: How many tokens it grew by.
    """
    expected = {budget: _all_tokens(new, budget) - _all_tokens(old, budget) for budget in budgets}
    if got in expected.values():
        return None
    by = ", ".join(f"{tokens} at a budget of {budget}" for budget, tokens in expected.items())
    return Problem(
        rule="picture-tokens",
        message=f"with other pictures the prompt has {got} tokens more; by their sizes it has {by}",
        expected=list(expected.values()),
        got=got,
    )


def _all_tokens(pictures: Sequence[Picture], budget: int) -> int:
    return sum(soft_tokens(picture, budget) for picture in pictures)


def earlier_turns(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The conversation up to each user's message but the last one."""
    places = [place for place, message in enumerate(messages) if message.get("role") == "user"]
    for place in places[:-1]:
        yield messages[: place + 1]


def _mapped(
    messages: Iterable[Message], change: Callable[[ImagePart], dict[str, Any]]
) -> list[dict[str, Any]]:
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [change(ImagePart.model_validate(p)) if is_image(p) else p for p in content]
            made.append({**message, "content": parts})
        else:
            made.append(dict(message))
    return made


@lru_cache(maxsize=64)
def _url(picture: Picture) -> str:
    # It loads torch, which takes seconds that other server suites need not spend.
    from conformance import media_files

    data = base64.b64encode(media_files.picture_bytes(picture)).decode()
    return f"data:image/{picture.format};base64,{data}"


def _url_part(picture: Picture) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": _url(picture)}}
