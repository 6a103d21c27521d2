"""A lesson: one conversation, its media, and the answer that is to be learned.

Everything that the nano checkpoints learn, and everything that they are examined on, comes from generators of
lessons. A generator is a function of a source of chance and a split, with no other input, so that a seed
gives the same lessons everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]
Split = Literal["train", "test"]
Picture = NDArray[np.uint8]
"""Pixels [height, width, 3], red first."""
Sound = NDArray[np.float32]
"""Samples between -1 and 1, 16 000 a second."""


@dataclass(frozen=True)
class Lesson:
    """A conversation up to the model's turn, and the turn."""

    messages: tuple[Message, ...]
    """In OpenAI's form. Parts `{"type": "image"}` and `{"type": "audio"}` stand for the media in order."""
    answer: str
    """All that the model generates, thought and markers included, but for the token that stops it."""
    key: str
    """Identity of the template: the whole text with slots. No key occurs in both splits."""
    numbers: tuple[int, ...] = ()
    """What fills the numeric slots. For one key, no tuple occurs in both splits."""
    pictures: tuple[Picture, ...] = ()
    sounds: tuple[Sound, ...] = ()
    thinking: bool = False
    tools: tuple[Message, ...] = ()
    """Declarations, in OpenAI's form."""
    stop: str = "<turn|>"
    """The token that ends the turn; `<|tool_response>` after a tool call."""


Generator = Callable[[random.Random, Split], Lesson]
"""Draws a lesson of a split."""
