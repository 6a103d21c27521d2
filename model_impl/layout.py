"""How weights lie in memory.

A matrix keeps its shape and its name; only its strides change. Decoding reads every weight once a step, and
a matrix-vector product can read memory more than twice as fast along the longer side (bench/README.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from model_impl.layers.moe import Experts
from model_impl.text import TextModel


def lay_out(model: nn.Module) -> None:
    """Make the longer side of every matrix that is multiplied with contiguous, one matrix after the other.

    Embedding tables stay as they are, except one that is the head as well.
    """
    for module in model.modules():
        matrices: list[Tensor] = []
        if isinstance(module, nn.Linear):
            matrices = [module.weight]
        elif isinstance(module, Experts):
            matrices = [module.gate_up_proj, module.down_proj]
        elif isinstance(module, TextModel) and module.config.tie_word_embeddings:
            matrices = [module.embed_tokens.weight]
        for matrix in matrices:
            matrix.data = along_longer_side(matrix.data)


def along_longer_side(matrix: Tensor) -> Tensor:
    """The same [..., out, in], with the longer of the last two axes contiguous."""
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        return matrix
    return matrix.transpose(-2, -1).contiguous().transpose(-2, -1)
