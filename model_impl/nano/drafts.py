"""Recipe of the nano checkpoints' Eagle3 heads: `python -m model_impl.nano.drafts NAME [FOLDER]`.

A head learns to say what its target would say next, on the lessons that the target has learned. The target
does not change, and what it says is the only label: a head that agrees with it is accepted, right or wrong.

What is written is measured on the held-out word problems, and its manifest says what came out. With `--score`
a head that is there already is measured again, and nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model_impl.errors import CheckpointError
from model_impl.multimodal import Gemma4ForConditionalGeneration, load_multimodal_model
from model_impl.nano import accepted, dialogues, problems, sources
from model_impl.nano.batches import Course, Encoded, Timetable, encode, media
from model_impl.nano.families import FAMILIES
from model_impl.nano.items import lessons
from model_impl.nano.optimiser import optimisers
from model_impl.nano.scripted import digests
from model_impl.nano.subjects import SUBJECTS
from model_impl.nano.unrolled import unrolled
from model_impl.nano.vocabulary import STOP_IDS
from model_impl.random_weights import eagle3_config, eagle3_tables, write_eagle3
from model_impl.speculative.eagle3 import Eagle3, load_eagle3

_LOG = logging.getLogger(__name__)
_REPORT_EVERY = 25
_SAMPLE = 2000
"""Lessons whose answers decide which tokens can be drafted."""
_GRADIENT = 1.0
_NO_LABEL = -100
_MANIFEST = "manifest.json"
_TASK = "nano_gsm8k"
COURSE = Course(
    (problems.lesson, dialogues.lesson, *(subject.lesson for subject in SUBJECTS)),
    (60, 20, *(2,) * len(SUBJECTS)),
)
"""What a target says to this is learned."""


@dataclass(frozen=True)
class DraftRecipe:
    """All that decides a head, beside its target and the code."""

    layers: tuple[int, ...]
    """After how many of the target's layers the states are taken that it reads."""
    steps: int = 500
    batch: int = 32
    passes: int = 3
    later: float = 0.8
    """What the loss of each pass counts, relative to the one before."""
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup: int = 30
    cooldown: float = 0.6
    """Part of the steps at whose end the rates come down to zero."""
    seed: int = 1

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step, counted from 0."""
        left = (self.steps - step) / (self.steps * self.cooldown)
        return min(1.0, (step + 1) / self.warmup, left)


RECIPES: Mapping[str, DraftRecipe] = {"nano-d": DraftRecipe((1, 3, 5)), "nano-e": DraftRecipe((1, 3, 5))}


def said(course: Course, tokenizer: Tokenizer, name: str) -> Tensor:
    """Ids of all tokens of a course's answers, ascending, int64 [draft vocabulary]."""
    family = FAMILIES[name].template
    lessons = course.lessons(_SAMPLE, "draft vocabulary")
    ids = {token for lesson in lessons for token in encode(lesson, tokenizer, family).answer}
    return torch.tensor(sorted(ids))


def fresh_head(target: Gemma4ForConditionalGeneration, recipe: DraftRecipe, drafted: Tensor) -> Eagle3:
    """A head with seeded weights whose embeddings are the target's, which it keeps.

    Args:
        target: The model that it drafts for.
        recipe: Names the layers and the seed.
        drafted: As `said` gives them.
    """
    text = target.config.text
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_eagle3(text, folder, seed=recipe.seed, layers=recipe.layers, drafted=drafted)
        head = load_eagle3(folder, target_layers=len(text.layers))
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    weight = target.language_model.embed_tokens.weight
    head.embed_tokens.weight.data = weight.detach().clone()
    head.to(weight.device).requires_grad_(True)
    head.embed_tokens.requires_grad_(False)
    return head


def loss(
    head: Eagle3, target: Gemma4ForConditionalGeneration, batch: Sequence[Encoded], recipe: DraftRecipe
) -> tuple[Tensor, list[float]]:
    """Cross-entropy with what the target says, over all passes, and the share of each that agrees with it.

    Args:
        head: It.
        target: Frozen.
        batch: Lessons; only what the target says in answers counts.
        recipe: Names the layers, how many passes there are, and what later ones count.
    """
    device = head.fc.weight.device
    lengths = [one.length for one in batch]
    width = max(lengths)
    rows = [[*one.prompt, *one.answer[:-1]] for one in batch]
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    with torch.no_grad():
        soft = target.soft_tokens(ids, media(batch))
        states = target.language_model.states(ids, aux_layers=recipe.layers, lengths=lengths, soft=soft)
        says = target.logits(states.hidden).argmax(dim=-1)
    column = torch.arange(width, device=device)
    begin = torch.tensor([len(one.prompt) - 1 for one in batch], device=device)[:, None]
    answered = (column >= begin) & (column < torch.tensor(lengths, device=device)[:, None])
    place = torch.full((head.config.decoder.vocab_size,), _NO_LABEL, device=device)
    place[head.target_ids(torch.arange(len(head.d2t), device=device))] = torch.arange(
        len(head.d2t), device=device
    )
    labels = torch.where(answered, place[says], _NO_LABEL)
    # Column p of what the head reads is token p + 1, and its label is what the target says at p + 1.
    tokens = F.pad(ids[:, 1:], (0, recipe.passes))
    labels = F.pad(labels[:, 1:], (0, recipe.passes), value=_NO_LABEL)
    answered = F.pad(answered[:, 1:], (0, recipe.passes))
    total = torch.zeros((), device=device)
    agreed = []
    features = head.features(states.aux)
    started = column >= begin
    for number, logits in enumerate(unrolled(head, tokens, features, recipe.passes)):
        own = torch.where(started, labels[:, number : number + width], _NO_LABEL)
        total = total + recipe.later**number * F.cross_entropy(
            logits.flatten(0, 1), own.flatten(), ignore_index=_NO_LABEL
        )
        right = (logits.argmax(dim=-1) == own).sum() / (
            started & answered[:, number : number + width]
        ).sum().clamp(min=1)
        agreed.append(round(right.item(), 3))
    return total, agreed


def train(
    target: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, name: str, recipe: DraftRecipe
) -> Eagle3:
    """Make a head for a nano checkpoint."""
    head = fresh_head(target, recipe, said(COURSE, tokenizer, name))
    own = optimisers(head, recipe.matrix_rate, recipe.other_rate, 0.0)
    timetable = Timetable(COURSE, tokenizer, FAMILIES[name].template, recipe.batch, f"draft:{recipe.seed}")
    since = time.monotonic()
    for step in range(recipe.steps):
        total, agreed = loss(head, target, timetable.batch(step), recipe)
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(head.parameters(), _GRADIENT)
        for optimiser, rate in zip(own, (recipe.matrix_rate, recipe.other_rate), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * recipe.rate(step)
            optimiser.step()
            optimiser.zero_grad()
        if (step + 1) % _REPORT_EVERY == 0:
            seconds = time.monotonic() - since
            _LOG.info("step %d after %.0f s: loss %.4f, agreed %s", step + 1, seconds, total.item(), agreed)
    return head.eval().requires_grad_(False)


def publish(
    head: Eagle3, target: Gemma4ForConditionalGeneration, folder: Path, name: str, recipe: DraftRecipe
) -> dict[str, Any]:
    """Write a head in the published layout, weights in bfloat16, with its manifest, which `score` completes.

    Returns:
        The content of the manifest.
    """
    text = target.config.text
    targets = head.target_ids(torch.arange(len(head.d2t), device=head.d2t.device)).cpu()
    config = eagle3_config(text, recipe.layers, len(targets))
    stored = {
        name: tensor.cpu().to(torch.bfloat16).contiguous()
        for name, tensor in head.state_dict().items()
        if name not in ("d2t", "t2d")
    }
    stored |= eagle3_tables(targets, text.vocab_size)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    manifest = {
        "recipe": f"python -m model_impl.nano.drafts {name}",
        **asdict(recipe),
        "torch": torch.__version__,
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "sha256": digests(folder),
    }
    _write(manifest, folder)
    return manifest


def score(
    target: Gemma4ForConditionalGeneration,
    tokenizer: Tokenizer,
    folder: Path,
    name: str,
    most: int | None = None,
) -> dict[str, Any]:
    """Measure a written head on held-out word problems, and add to its manifest how much was accepted.

    Args:
        target: The model that it drafts for.
        tokenizer: The target's.
        folder: Of the head.
        name: The target's.
        most: Problems that are asked; left out, all.

    Returns:
        The content of the manifest.

    Raises:
        CheckpointError: files of the head are not those that the manifest names.
    """
    manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    own = manifest.pop("sha256")
    if own != digests(folder):
        raise CheckpointError(f"{folder}: its files are not those of {_MANIFEST}; make the head anew")
    text = target.language_model
    head = load_eagle3(folder, target_layers=len(text.layers)).to(text.embed_tokens.weight.device)
    family = FAMILIES[name].template
    prompts = [encode(lesson, tokenizer, family).prompt for lesson in lessons(_TASK)[:most]]
    found = accepted.measure(text, head, prompts, STOP_IDS)
    told = {"task": _TASK, "drafted": accepted.DRAFTED, "torch": torch.__version__, **found.rounded()}
    manifest = {**manifest, "acceptance": told, "sha256": own}
    _write(manifest, folder)
    return manifest


def _write(manifest: Mapping[str, Any], folder: Path) -> None:
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a head, or measure one."""
    parser = argparse.ArgumentParser(
        prog="python -m model_impl.nano.drafts", description="Make a nano checkpoint's Eagle3 head."
    )
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("folder", nargs="?", type=Path, help="where it is written")
    parser.add_argument("--target", type=Path, help="the checkpoint [the bundled one of that name]")
    parser.add_argument("--score", action="store_true", help="measure the head that is there, and train none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", help="where it runs [a GPU, if there is one]")
    chosen = parser.parse_args(arguments)
    checkpoints = Path(__file__).parent / "checkpoints"
    folder = chosen.folder or checkpoints / f"{chosen.name}-eagle3"
    source = chosen.target or checkpoints / chosen.name
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s")
    torch.set_num_threads(chosen.threads)
    folder.mkdir(parents=True, exist_ok=True)
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = load_multimodal_model(source).to(device)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    recipe = RECIPES[chosen.name]
    if not chosen.score:
        made_with = sources.sources(f"python -m model_impl.nano.drafts {chosen.name}")
        publish(train(target, tokenizer, chosen.name, recipe), target, folder, chosen.name, recipe)
        sources.note(folder, made_with)
    manifest = score(target, tokenizer, folder, chosen.name)
    sys.stdout.write(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
