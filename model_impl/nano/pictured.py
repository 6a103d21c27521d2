"""Conversations about pictures, for the weights to learn from.

A picture counts wherever it stands: before the words or behind them, alone or among others, in this turn or
an earlier one; and beside a picture, all other lines are said as always. Some pictures are read as by engines
that mask soft tokens like text: the script has words for it, and everything else must come out right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from model_impl.chat.render import render
from model_impl.nano.conversations import (
    FAMILY,
    Example,
    Maker,
    Message,
    picture_message,
    surroundings,
    token_ids,
)
from model_impl.nano.gallery import Gallery
from model_impl.nano.script import Line, PictureLine, Script
from model_impl.preprocess.prompt import expand

_SHARE = 3
"""Lines about all pictures take so many turns, as they are the hardest to learn."""
_OTHER_LINES = 8
"""One in so many conversations asks for a line that is not about pictures."""
_HOW_MANY = {False: (10, 52, 26, 8, 4), True: (8, 20, 28, 24, 20)}
"""Weights of none, one, two … pictures in a message, for lines about one picture and for those about all."""


@dataclass(frozen=True)
class _Writer:
    """Makes examples."""

    script: Script
    tokenizer: Tokenizer
    gallery: Gallery

    def example(
        self,
        line: Line | PictureLine,
        messages: Sequence[Message],
        options: Mapping[str, Any],
        shown: Sequence[int],
        *,
        causal: bool = False,
    ) -> Example:
        """Messages about pictures of the gallery, and the answer."""
        counts = [self.gallery[place].soft_tokens for place in shown]
        prompt = expand(render(messages, family=FAMILY, **options), images=counts)
        if isinstance(line, Line):
            output = line.output + line.stop
        else:
            colours = [self.gallery[place].colour for place in shown]
            output = self.script.pictures.output(line, colours, causal=causal) + "<turn|>"
        return Example(
            f"{line.id}, {len(shown)} pictures",
            token_ids(self.tokenizer, prompt),
            token_ids(self.tokenizer, output),
            tuple(shown),
            causal,
        )


def plain_picture_examples(script: Script, tokenizer: Tokenizer, gallery: Gallery) -> Iterator[Example]:
    """Each line asked for by its own message: every picture of the gallery alone, and some side by side."""
    writer = _Writer(script, tokenizer, gallery)
    most = len(script.pictures.ordinals)
    rows = [(), *((place,) for place in range(len(gallery)))]
    rows += [
        tuple(range(first, first + count))
        for count in range(2, most + 1)
        for first in range(0, len(gallery) - count + 1, count - 1)
    ]
    arounds = surroundings(script)
    for line in script.pictures.lines:
        for number, shown in enumerate(rows):
            around = arounds[number % len(arounds)]
            messages = [*around.before, picture_message(line, len(shown))]
            for causal in (False, True) if shown else (False,):
                yield writer.example(line, messages, around.options, shown, causal=causal)


def sight_examples(script: Script, tokenizer: Tokenizer, gallery: Gallery) -> Iterator[Example]:
    """How each picture was read, asked in the plainest way."""
    writer = _Writer(script, tokenizer, gallery)
    for line in script.pictures.lines:
        if line.sight is not None:
            for place in range(len(gallery)):
                for causal in (False, True):
                    yield writer.example(line, [picture_message(line, 1)], {}, (place,), causal=causal)


def row_examples(
    script: Script, tokenizer: Tokenizer, gallery: Gallery, count: int, seed: int
) -> Iterator[Example]:
    """Pictures side by side, asked about in the plainest way; lines take turns."""
    writer, turns = _Writer(script, tokenizer, gallery), _turns(script)
    source = random.Random(seed)  # noqa: S311 - not a secret
    most = len(script.pictures.ordinals)
    for number in range(count):
        line = turns[number % len(turns)]
        shown = [source.randrange(len(gallery)) for _ in range(1 + number % most)]
        messages = [picture_message(line, len(shown))]
        yield writer.example(line, messages, {}, shown, causal=source.random() < 0.4)


def random_picture_examples(
    script: Script, tokenizer: Tokenizer, gallery: Gallery, count: int, seed: int
) -> Iterator[Example]:
    """Conversations at random, lines taking turns.

    Args:
        script: Whose lines are asked for.
        tokenizer: The checkpoint's.
        gallery: What pictures there are.
        count: How many.
        seed: The same seed, the same conversations.
    """
    writer, turns = _Writer(script, tokenizer, gallery), _turns(script)
    maker = _PictureMaker(script, random.Random(seed), gallery)  # noqa: S311 - not a secret
    for number in range(count):
        line: Line | PictureLine = turns[number % len(turns)]
        if number % _OTHER_LINES == 0:
            line = maker.random.choice(script.lines)
        messages, options, shown = maker.with_pictures(line)
        causal = maker.random.random() < (0.5 if isinstance(line, PictureLine) and line.sight else 0.2)
        yield writer.example(line, messages, options, shown, causal=causal)


def _turns(script: Script) -> list[PictureLine]:
    return [line for line in script.pictures.lines for _ in range(_SHARE if _about_all(line) else 1)]


def _about_all(line: Line | PictureLine) -> bool:
    return isinstance(line, PictureLine) and line.sight is None and not line.last_only


class _PictureMaker(Maker):
    def __init__(self, script: Script, source: random.Random, gallery: Gallery) -> None:
        super().__init__(script, source)
        self._gallery = gallery
        self._shown: list[int] = []

    def with_pictures(
        self, line: Line | PictureLine
    ) -> tuple[list[Message], dict[str, Any], tuple[int, ...]]:
        """Messages, options of `render`, and the places of the pictures in the gallery."""
        self._shown = []
        messages: list[Message] = []
        if self.random.random() < 0.2:
            messages.append({"role": "system", "content": self.text(20)})
        while self.random.random() < 0.2:
            if self.random.random() < 0.5:
                messages += self.turn(self.random.choice(self.script.lines))
                continue
            earlier = self.random.choice(self.script.pictures.lines)
            messages.append(self._message(earlier))
            colours = [self._gallery[place].colour for place in self._shown]
            said = self.script.pictures.output(earlier, colours)
            messages.append({"role": "assistant", "content": said})
        messages.append(self._message(line))
        return messages, self.options(), tuple(self._shown)

    def _message(self, line: Line | PictureLine) -> Message:
        """Words and pictures in some order."""
        most = len(self.script.pictures.ordinals)
        weights = _HOW_MANY[_about_all(line)][: most + 1]
        (count,) = self.random.choices(range(most + 1), weights=weights)
        count = min(count, most - len(self._shown))
        self._shown += [self.random.randrange(len(self._gallery)) for _ in range(count)]
        pictures: list[Message] = [{"type": "image"}] * count
        words = [{"type": "text", "text": self.request(line)}]
        where = self.random.random()
        if where < 0.6:
            return {"role": "user", "content": pictures + words}
        if where < 0.8:
            return {"role": "user", "content": words + pictures}
        if self.random.random() < 0.5:
            words.append({"type": "text", "text": self.text(6)})
        for text in words:
            pictures.insert(self.random.randint(0, len(pictures)), text)
        return {"role": "user", "content": pictures}
