"""Learning by heart: token by token, until every token of every answer wins by a wide margin."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_impl.multimodal import Gemma4ForConditionalGeneration
from model_impl.nano.conversations import Example
from model_impl.nano.gallery import Gallery
from model_impl.runtime.masks import NO_BLOCK
from model_impl.text import SoftTokens

_LOG = logging.getLogger(__name__)
_REPORT_EVERY = 100


@dataclass(frozen=True)
class Plan:
    """How to train."""

    steps: int
    batch: int = 12
    learning_rate: float = 6e-3
    warmup: int = 30
    weight_decay: float = 0.01
    margin: float = 10.0
    """Gap between the right token's logit and the best other one, below which the loss asks for more."""
    pressure: float = 0.01
    """Weight of that part of the loss, beside cross-entropy."""
    seed: int = 0


def train(
    model: Gemma4ForConditionalGeneration,
    examples: Sequence[Example],
    gallery: Gallery,
    plan: Plan,
    trained: Sequence[Tensor] = (),
) -> None:
    """Train some tensors in place: unless given, all parameters of the model that require gradients.

    Deterministic on one kind of machine and number of threads.
    """
    trained = trained or [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    model.train()
    for step, batch in enumerate(_batches(examples, plan), start=1):
        logits, targets = _scripted(model, batch, gallery)
        gaps = _gaps(logits, targets)
        loss = F.cross_entropy(logits, targets) + plan.pressure * F.relu(plan.margin - gaps).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % _REPORT_EVERY == 0 or step == plan.steps:
            _LOG.info(
                "step %d: loss %.4f, gradient %.2f, smallest gap %.2f, wrong %d of %d",
                step, loss.item(), norm.item(), gaps.min().item(), int((gaps <= 0).sum()), len(gaps),
            )  # fmt: skip
    model.eval()


@torch.inference_mode()
def smallest_gaps(
    model: Gemma4ForConditionalGeneration,
    examples: Sequence[Example],
    gallery: Gallery = (),
    batch: int = 12,
) -> list[float]:
    """For each example, by how much the right token beats every other one, at its closest.

    Above zero: greedy generation gives the output. Logits are taken after soft-capping.
    """
    found: dict[int, float] = {}
    order = sorted(range(len(examples)), key=lambda index: _length(examples[index]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        gaps = _gaps(*_scripted(model, [examples[index] for index in chosen], gallery))
        pieces = torch.split(gaps, [len(examples[index].output) for index in chosen])
        found |= {index: piece.min().item() for index, piece in zip(chosen, pieces, strict=True)}
    return [found[index] for index in range(len(examples))]


def _scripted(
    model: Gemma4ForConditionalGeneration, batch: Sequence[Example], gallery: Gallery
) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] where outputs are generated, and the tokens [N] that belong there."""
    rows = [(*example.prompt, *example.output[:-1]) for example in batch]
    width = max(map(len, rows))
    text = model.language_model
    padding = text.config.pad_token_id
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    hidden = text(ids, lengths=[len(row) for row in rows], soft=_soft_tokens(model, ids, batch, gallery))
    scripted = [hidden[i, len(e.prompt) - 1 : _length(e) - 1] for i, e in enumerate(batch)]
    targets = torch.tensor([token for example in batch for token in example.output])
    return text.logits(torch.cat(scripted)).float(), targets


def _soft_tokens(
    model: Gemma4ForConditionalGeneration, ids: Tensor, batch: Sequence[Example], gallery: Gallery
) -> SoftTokens | None:
    """What stands at the placeholders of a batch; None where there are none."""
    shown = [gallery[place] for example in batch for place in example.pictures]
    if not shown:
        return None
    where = ids == model.config.tokens.image
    numbers = torch.repeat_interleave(
        torch.arange(len(shown)), torch.tensor([picture.soft_tokens for picture in shown])
    )
    blocks = torch.full_like(ids, NO_BLOCK)
    blocks[where] = numbers
    blocks[torch.tensor([example.causal for example in batch])] = NO_BLOCK
    features = model.embed_vision(torch.cat([picture.features for picture in shown]))
    return SoftTokens(where, features, blocks)


def _gaps(logits: Tensor, targets: Tensor) -> Tensor:
    right = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], float("-inf")).amax(dim=1)
    return right[:, 0] - others


def _batches(examples: Sequence[Example], plan: Plan) -> Iterator[list[Example]]:
    """Examples of about one length together, as padding costs time; each is used once before any is again."""
    source = random.Random(plan.seed)  # noqa: S311 - not a secret
    made = 0
    while made < plan.steps:
        shuffled = source.sample(examples, len(examples))
        groups = [
            sorted(shuffled[start : start + plan.batch * 16], key=_length)
            for start in range(0, len(shuffled), plan.batch * 16)
        ]
        batches = [group[i : i + plan.batch] for group in groups for i in range(0, len(group), plan.batch)]
        source.shuffle(batches)
        yield from batches[: plan.steps - made]
        made += len(batches)


def _rate(step: int, plan: Plan) -> float:
    warm = min(1.0, (step + 1) / plan.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / plan.steps)))


def _length(example: Example) -> int:
    return len(example.prompt) + len(example.output)
