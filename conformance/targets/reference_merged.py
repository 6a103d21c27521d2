"""What the bundled model gives with other weights: the oracle of suites of kind `lora`.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.targets.reference_lora import is_whole
from conformance.targets.reference_model import engine
from conformance.targets.reference_reader import Reader
from model_impl.checkpoint import PREFIX

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Question:
    """A prompt with its media, and the beginning of an answer."""

    prompt: tuple[int, ...]
    """With one placeholder for each image and sound."""
    answer: tuple[int, ...]
    images: tuple[str, ...] = ()
    sounds: tuple[str, ...] = ()


def logprobs(
    checkpoint: Path,
    questions: Sequence[Question],
    changes: Sequence[Mapping[str, Tensor]],
) -> list[Tensor]:
    """Log-probabilities of a model whose weights are others; no adapter is read.

    Args:
        checkpoint: Folder of the model.
        questions: Each is read by itself, in one pass without a cache.
        changes: For each question the weights that are others, by their names in the checkpoint's file. Head
            and embedding may be one weight there, and only one of the two another here.

    Returns:
        For each question, float32 [tokens of the answer's beginning + 1, vocabulary]: those of each of its
        tokens and of the one that comes next.

    Raises:
        EngineError: the model refuses something.
    """
    with engine(), torch.inference_mode():
        reader = Reader(checkpoint, "float32", None, media=is_whole(checkpoint))
        own = reader.model.state_dict()
        prefix = "model." if is_whole(checkpoint) else PREFIX
        found: list[Tensor] = []
        tied_head, table = reader.text.lm_head, reader.text.embed_tokens.weight
        for question, given in zip(questions, changes, strict=True):
            change = dict(given)
            head = change.pop(_HEAD, None) if reader.text.config.tie_word_embeddings else None
            if head is not None or f"{PREFIX}embed_tokens.weight" in change:
                reader.text.lm_head = _OwnHead(table.clone() if head is None else head)
            kept = {name: own[name.removeprefix(prefix)].clone() for name in change}
            for name, weight in change.items():
                own[name.removeprefix(prefix)].copy_(weight)
            answer = (*question.answer, 0)  # the last token is not read
            found.append(reader.logprobs(question.prompt, answer, question.images, question.sounds))
            for name, weight in kept.items():
                own[name.removeprefix(prefix)].copy_(weight)
            reader.text.lm_head = tied_head
        return found


class _OwnHead(nn.Module):
    """In the place of a tied head: one with a weight of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, hidden: Tensor, _tied: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary]."""
        return F.linear(hidden, self._weight)
