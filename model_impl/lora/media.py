"""Images, videos and sounds of rows that use different adapters.

Whoever uses one adapter shares a pass of the towers, and nobody else does: what stands inside a tower, packed
patches or the positions of an audio attention, belongs to no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model_impl.errors import MediaError
from model_impl.lora.apply import Adapters
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media
from model_impl.preprocess.audio import AudioBatch
from model_impl.preprocess.images import ImageBatch
from model_impl.runtime.masks import NO_BLOCK
from model_impl.text import SoftTokens


def soft_tokens(
    adapters: Adapters, input_ids: Tensor, media: Media, wanted: Sequence[str | None]
) -> SoftTokens | None:
    """As `Gemma4ForConditionalGeneration.soft_tokens`, each row's media with the row's own adapter.

    Args:
        adapters: Of a whole model.
        input_ids: int [B, T].
        media: In the order of the placeholders, row by row. Videos are not among them.
        wanted: For each row the name of its adapter, or None.

    Raises:
        AdapterError: as `Adapters.rows`.
        MediaError: placeholders and media do not match, or there are videos and several adapters.
    """
    model = adapters.model
    assert isinstance(model, Gemma4ForConditionalGeneration)
    groups = list(dict.fromkeys(wanted))
    if len(groups) == 1:
        with adapters.rows(wanted):
            return model.soft_tokens(input_ids, media)
    if media.videos is not None:
        raise MediaError("rows with videos must use one adapter in a batch; send them apart")
    tokens = model.config.tokens
    images = _owners(input_ids, tokens.image, media.images)
    sounds = _owners(input_ids, tokens.audio, media.audio)
    where = torch.zeros_like(input_ids, dtype=torch.bool)
    blocks = torch.full_like(input_ids, NO_BLOCK)
    features: dict[int, Tensor] = {}
    number = 0
    for name in groups:
        rows = [row for row, own in enumerate(wanted) if own == name]
        part = Media(images=_images(media.images, images, rows), audio=_sounds(media.audio, sounds, rows))
        with adapters.rows([name] * len(rows)):
            soft = model.soft_tokens(input_ids[rows], part)
        if soft is None:
            continue
        where[rows] = soft.where
        blocks[rows] = torch.where(soft.blocks == NO_BLOCK, NO_BLOCK, soft.blocks + number)
        number = int(blocks.max()) + 1
        counts = soft.where.sum(dim=1).tolist()
        features |= dict(zip(rows, torch.split(soft.features, counts), strict=True))
    if not features:
        return None
    return SoftTokens(where, torch.cat([features[row] for row in sorted(features)]), blocks)


def _owners(input_ids: Tensor, token: int | None, batch: ImageBatch | AudioBatch | None) -> list[int]:
    """The row of each piece.

    Raises:
        MediaError: the rows hold more or fewer placeholders than the pieces take.
    """
    if batch is None:
        return []
    rows = torch.eq(input_ids, -1 if token is None else token).nonzero()[:, 0].tolist()
    ends = list(itertools.accumulate(batch.soft_tokens))
    if not ends or ends[-1] != len(rows):
        raise MediaError(
            f"the prompts hold {len(rows)} placeholders, and the media take {sum(batch.soft_tokens)}"
        )
    return [rows[end - 1] for end in ends]


def _images(batch: ImageBatch | None, owners: list[int], rows: Sequence[int]) -> ImageBatch | None:
    """The images of some rows; None if there are none."""
    chosen = [piece for piece, row in enumerate(owners) if row in rows]
    if batch is None or not chosen:
        return None
    counts = tuple(batch.soft_tokens[piece] for piece in chosen)
    return replace(batch, pixels=batch.pixels[chosen], positions=batch.positions[chosen], soft_tokens=counts)


def _sounds(batch: AudioBatch | None, owners: list[int], rows: Sequence[int]) -> AudioBatch | None:
    """The sounds of some rows; None if there are none."""
    chosen = [piece for piece, row in enumerate(owners) if row in rows]
    if batch is None or not chosen:
        return None
    counts = tuple(batch.soft_tokens[piece] for piece in chosen)
    dropped = tuple(batch.dropped[piece] for piece in chosen)
    return replace(
        batch,
        features=batch.features[chosen],
        mask=batch.mask[chosen],
        soft_tokens=counts,
        dropped=dropped,
    )
