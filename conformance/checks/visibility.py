"""Which keys a token sees, by the rule of the fact sheet (sections 2.4 and 3.6).

Worked out from the published configuration, one pair of tokens at a time and without the bundled
implementation, so that the two can be held against each other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from conformance.errors import EngineError
from conformance.media import MARKERS, TEXT
from conformance.targets.protocol import LongBlocks

LayerType = Literal["sliding_attention", "full_attention"]
TokenKind = Literal["text", "marker", "image", "frame", "sound"]

SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

_PATTERN = 6
"""Where a configuration does not list its layers, every sixth attends to everything."""
_SOFT: dict[str, TokenKind] = {"image": "image", "video": "frame", "audio": "sound"}


@dataclass(frozen=True)
class Token:
    """A token and what it stands for."""

    kind: TokenKind
    block: int = TEXT
    """Number of the image or frame that it is a soft token of; `TEXT` for all others, those of sounds too."""
    piece: int = 0
    """Which image, frame or sound of its row it is a soft token of, counted by kind from 1."""
    place: int = 0
    """Its place in there, from 1."""

    @property
    def soft(self) -> bool:
        """Whether it stands for a part of an image, a frame or a sound."""
        return self.piece > 0

    def shares_piece(self, other: Token) -> bool:
        """Whether both are soft tokens of the same image, frame or sound."""
        return self.soft and (self.kind, self.piece) == (other.kind, other.piece)

    def __str__(self) -> str:
        return f"{self.kind} {self.piece}, place {self.place}" if self.soft else self.kind


def tokens_of(ids: Sequence[int], blocks: Sequence[int], config: Mapping[str, Any]) -> tuple[Token, ...]:
    """The tokens of a row.

    Args:
        ids: Token ids.
        blocks: For each the number of its image or frame, or `TEXT`.
        config: As published; a text model's has no tokens for media.
    """
    kinds: dict[int, TokenKind] = {}
    for name, kind in _SOFT.items():
        if (token := config.get(f"{name}_token_id")) is not None:
            kinds[token] = kind
    markers = {
        config.get(f"{name}_token_id") for before, _, behind in MARKERS.values() for name in (before, behind)
    }
    pieces: Counter[TokenKind] = Counter()
    made: list[Token] = []
    for index, (number, block) in enumerate(zip(ids, blocks, strict=True)):
        found = kinds.get(number)
        if found is None:
            made.append(Token("marker" if number in markers else "text"))
            continue
        before = made[-1] if made else Token("text")
        if before.kind == found and blocks[index - 1] == block:
            made.append(Token(found, block, before.piece, before.place + 1))
        else:
            pieces[found] += 1
            made.append(Token(found, block, pieces[found], 1))
    return tuple(made)


def outline(tokens: Sequence[Token]) -> list[str]:
    """A row in words: `6 text`, `1 marker`, `64 of image 1`."""
    groups = itertools.groupby(tokens, lambda token: (token.kind, token.piece))
    return [
        f"{sum(1 for _ in group)} {f'of {kind} {piece}' if piece else kind}"
        for (kind, piece), group in groups
    ]


@dataclass(frozen=True)
class Visibility:
    """The rule for one model."""

    layers: tuple[LayerType, ...]
    window: int
    """A query of a sliding layer at q sees keys after q - window."""
    image_attention: bool
    """Tokens of one image see each other both ways in sliding layers."""
    long_blocks: LongBlocks = "clamp_past"

    @classmethod
    def of(cls, config: Mapping[str, Any], long_blocks: LongBlocks | None = None) -> Visibility:
        """The rule that a published configuration asks for.

        Args:
            config: A whole model's, or a text model's.
            long_blocks: What becomes of images that are longer than the window; `clamp_past` if left out.

        Raises:
            EngineError: the configuration does not say how long the window is, or asks for image attention
                that the rule does not know.
        """
        text = config.get("text_config", config)
        count = text["num_hidden_layers"]
        window = text.get("sliding_window")
        if type(window) is not int or window < 1:
            raise EngineError("the configuration needs a positive `sliding_window`")
        unsaid = "vision" if text.get("model_type") == "gemma4_unified_text" else None  # as in transformers
        opened = text.get("use_bidirectional_attention", unsaid)
        if opened not in (None, "vision"):
            raise EngineError(
                f"the configuration has `use_bidirectional_attention: {opened}`; "
                "there is a rule for `null` and for `vision`"
            )
        given: Sequence[LayerType] | None = text.get("layer_types")
        layers = list(given or [SLIDING if number % _PATTERN else FULL for number in range(1, count + 1)])
        layers[-1] = FULL  # whatever is listed
        return cls(
            layers=tuple(layers),
            window=window,
            image_attention=opened == "vision",
            long_blocks=long_blocks or "clamp_past",
        )

    def grid(self, layer: LayerType, row: Sequence[Token]) -> list[list[bool]]:
        """For each token of a row, which tokens of it are seen in layers of a type."""
        places = range(len(row))
        if layer == FULL:
            return [[key <= query for key in places] for query in places]
        blocks = [token.block for token in row]
        lengths = Counter(blocks)
        return [[self._seen_in_window(query, key, blocks, lengths) for key in places] for query in places]

    def _seen_in_window(
        self, query: int, key: int, blocks: Sequence[int], lengths: Mapping[int, int]
    ) -> bool:
        """Whether a query of a sliding layer sees a key."""
        block = blocks[query]
        same_image = self.image_attention and block != TEXT and block == blocks[key]
        if same_image and self.long_blocks == "drop" and lengths[block] > self.window:
            same_image = False
        if same_image and self.long_blocks == "clamp_both" and key - query >= self.window:
            same_image = False
        return (key <= query or same_image) and query - key < self.window
