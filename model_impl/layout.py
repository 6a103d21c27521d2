"""How weights lie in memory.

A matrix keeps its shape and its name; only its strides change. Decoding reads every weight once a step, and
a matrix-vector product can read memory more than twice as fast along the longer side (bench/README.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from model_impl.text import TextPart


def lay_out(model: nn.Module) -> None:
    """Make the longer side of every matrix that is multiplied with contiguous, one matrix after the other.

    Embedding tables stay as they are, except one that is the head as well; so do experts, whose matrices are
    small, and gain nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = along_longer_side(module.weight.data)
        elif isinstance(module, TextPart) and module.config.tie_word_embeddings and module.ends:
            module.embed_tokens.weight.data = along_longer_side(module.embed_tokens.weight.data)


def along_longer_side(matrix: Tensor) -> Tensor:
    """The same [out, in], with the longer axis contiguous."""
    rows, columns = matrix.shape
    return matrix if rows <= columns else matrix.T.contiguous().T
