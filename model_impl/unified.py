"""Images without an encoder, as in the unified 12B (fact sheet, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.media_config import PatchConfig
from model_impl.vision import check_squares


class TileEmbedder(nn.Module):
    """Tiles of pixels to soft tokens: `LN(LN(W · LN(tile) + b) + table[column, 0] + table[row, 1])`.

    What follows, a norm without weight and a linear, is the projector.
    """

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_ln1 = nn.LayerNorm(3 * config.tile**2)
        self.patch_dense = nn.Linear(3 * config.tile**2, config.width)
        self.patch_ln2 = nn.LayerNorm(config.width)
        self.pos_embedding = nn.Parameter(torch.empty(config.positions, 2, config.width))
        self.pos_norm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Soft tokens of all images, one image after the other, row by row; padding leaves no trace.

        Args:
            pixels: [N, P, 3 · tile²] in [0, 1].
            positions: int [N, P, 2]: column and row of each tile; negative at padding.

        Returns:
            [all soft tokens, width], in the dtype of the weights.

        Raises:
            MediaError: the tiles do not fit the embedder, or a position is beyond its table.
        """
        check_squares(pixels, positions, self.config.tile, self.config.positions)
        valid = (positions >= 0).all(dim=-1)
        columns, rows = positions[valid].unbind(-1)
        x = self.patch_ln2(self.patch_dense(self.patch_ln1(pixels[valid].to(self.pos_embedding.dtype))))
        place = F.embedding(columns, self.pos_embedding[:, 0]) + F.embedding(rows, self.pos_embedding[:, 1])
        placed: Tensor = self.pos_norm(x + place)
        return placed
