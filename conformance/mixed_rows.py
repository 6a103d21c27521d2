"""Rows of token ids with media among them: files, what the towers read, and the placeholders for it.

The bundled preprocessing makes the tensors, and all targets get the same ones: what a target's own processor
makes of the files is what suites of kind `processor` judge. Needs torch, so it is imported where it is used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conformance import media_files
from conformance.loading import text_ids
from conformance.media import TEXT, Prompts, TextPiece, VideoPiece, kind_of, marker_ids
from conformance.suites import MixedRows
from conformance.targets import reference_media
from conformance.targets.protocol import MediaForm, MediaKind

_TIMESTAMP = 2
"""Tokens of text before a frame, as the time at which it is shown takes some."""


def build(rows: MixedRows, config: Mapping[str, Any], folder: Path) -> Prompts:
    """Make files of the pieces, prepare them, and write down the rows.

    Args:
        rows: What is in them.
        config: As a published `config.json`.
        folder: Takes the files.

    Raises:
        MediaError: the bundled preprocessing refuses a piece.
    """
    media = [piece for row in rows.pieces for piece in row if not isinstance(piece, TextPiece)]
    prepared = reference_media.prepare(
        [media_files.write(piece, folder, f"piece-{number}") for number, piece in enumerate(media)],
        form_of(config),
        image_budget=rows.image_budget,
        frame_budget=rows.frame_budget,
        sample_frames=False,
    )
    path = folder / "media.safetensors"
    reference_media.save(prepared, path)
    counts: dict[MediaKind, Iterator[int]] = {
        "image": iter(prepared.images.soft_tokens if prepared.images else ()),
        "video": iter(prepared.videos.images.soft_tokens if prepared.videos else ()),
        "audio": iter(prepared.audio.soft_tokens if prepared.audio else ()),
    }
    writer = _Writer(config, counts, rows.seed)
    written = [writer.row(row) for row in rows.pieces]
    return Prompts(
        rows=tuple(tuple(ids) for ids, _ in written),
        media=str(path),
        blocks=tuple(tuple(blocks) for _, blocks in written),
    )


def form_of(config: Mapping[str, Any]) -> MediaForm:
    """For what the media of a model are prepared."""
    return "unified" if config.get("model_type") == "gemma4_unified" else "tower"


class _Writer:
    def __init__(
        self, config: Mapping[str, Any], counts: Mapping[MediaKind, Iterator[int]], seed: int
    ) -> None:
        self._config = config
        self._counts = counts
        self._draw = random.Random(seed)  # noqa: S311 - seeded test data
        self._block = 0
        self._text_ids = text_ids(config)

    def row(self, pieces: tuple[Any, ...]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        blocks: list[int] = []
        for piece in pieces:
            if isinstance(piece, TextPiece):
                self._text(ids, blocks, piece.text)
                continue
            kind = kind_of(piece)
            for _ in range(piece.video.frames if isinstance(piece, VideoPiece) else 1):
                if kind == "video":
                    self._text(ids, blocks, _TIMESTAMP)
                count = next(self._counts[kind])
                before, soft, behind = (token or 0 for token in marker_ids(self._config, kind))
                number = TEXT if kind == "audio" else self._block
                self._block += kind != "audio"
                ids += [before, *[soft] * count, behind]
                blocks += [TEXT, *[number] * count, TEXT]
        return ids, blocks

    def _text(self, ids: list[int], blocks: list[int], count: int) -> None:
        ids += [self._draw.randrange(self._text_ids) for _ in range(count)]
        blocks += [TEXT] * count
