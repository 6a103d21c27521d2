"""Recipe of the scripted checkpoint: `python -m model_impl.nano.scripted [FOLDER]`.

A real Gemma 4 checkpoint, small: per-layer embeddings, sliding and full layers of different head widths, a
window shorter than any prompt or picture, and a vision tower. It has learned `script.yaml` by heart and
nothing else. Norms start off neutral and are trained; `layer_scalar` is off neutral and frozen, and so is the
whole tower, with clipped linears and standardised output: only its projector learns. No published model has
all of this at once: those with per-layer embeddings mask soft tokens like text.

The weights are stored in bfloat16, as published ones are; all gaps are measured on what is stored. The
result depends on the script, the code, the seed, and on the order in which the machine's matrix products
add up: another kind of processor gives another checkpoint that says the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model_impl.multimodal import Gemma4ForConditionalGeneration, load_multimodal_model
from model_impl.nano import sources
from model_impl.nano.conversations import FAMILY, plain_examples, random_examples, with_one_key
from model_impl.nano.gallery import Gallery, draw, show
from model_impl.nano.pictured import (
    plain_picture_examples,
    random_picture_examples,
    row_examples,
    sight_examples,
)
from model_impl.nano.script import Script, checkpoint_folder, load_script
from model_impl.nano.settings import SOFT_TOKENS, config, write_texts
from model_impl.nano.training import Plan, smallest_gaps, train
from model_impl.nano.vocabulary import build_tokenizer, vocabulary_size
from model_impl.random_weights import write_checkpoint

MARGIN = 2.0
"""Least gap, in plain conversations, between the logit of a scripted token and that of any other.

A quarter of a unit is the rounding of a logit of 30 in bfloat16, so no engine's kernels turn it over.
"""
SEED = 4
THREADS = 1
"""On a machine that others use, a second thread waits for them and makes these small products slower."""
HELD_OUT_SEED = 1_000_003
PLAIN_PICTURES = 12
"""The first pictures of a gallery: a message about each, and about some side by side, is plain."""

_MANIFEST = "manifest.json"
_STORED = "model."
"""Before the names of all tensors in a published file."""
_TIMES = 3
"""How often plain conversations about pictures are among the others: they must come out by the margin."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Amounts:
    """How much is learned, and how much it is measured on."""

    steps: tuple[int, int, int] = (100, 280, 1600)
    """Of training: on how a picture was read; on plain questions about pictures; on everything. Each lesson
    takes a fraction of the time that it takes among what comes later, if it is learned there at all."""
    conversations: int = 2000
    """Random ones without pictures, beside the plain ones."""
    picture_conversations: int = 2000
    pictures: int = 96
    held_out: int = 200
    """Random conversations of either kind that are not learned, and as many pictures as those have."""


DEFAULT = Amounts()


def make(folder: Path, script: Script, amounts: Amounts = DEFAULT) -> dict[str, Any]:
    """Write the whole checkpoint; return the content of its manifest.

    Args:
        folder: Must exist; files of the same names are replaced.
        script: What to learn.
        amounts: How much of it.
    """
    start = time.process_time()
    tokenizer = build_tokenizer(script)
    content = config(vocabulary_size(tokenizer))
    write_texts(folder, tokenizer, content, FAMILY)
    model = _fresh_model(content)
    gallery = _gallery(model, script, amounts.pictures, SEED)
    plain_pictures = gallery[:PLAIN_PICTURES]
    about = (script, tokenizer, gallery)
    lessons = (
        list(sight_examples(script, tokenizer, plain_pictures)),
        list(row_examples(*about, amounts.picture_conversations, SEED)),
        [
            *plain_examples(script, tokenizer),
            *random_examples(script, tokenizer, amounts.conversations, SEED),
            *list(plain_picture_examples(script, tokenizer, plain_pictures)) * _TIMES,
            *random_picture_examples(*about, amounts.picture_conversations, SEED),
        ],
    )
    torch.manual_seed(SEED)
    for examples, steps in zip(lessons, amounts.steps, strict=True):
        if not examples:
            continue  # a script may have no such line
        tokens = sum(len(example.prompt) + len(example.output) for example in examples)
        _LOG.info("%d conversations of %d tokens", len(examples), tokens)
        train(model, examples, gallery, Plan(steps=steps, seed=SEED))
    stored = {_STORED + name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    seconds = time.process_time() - start
    manifest = {
        "recipe": "python -m model_impl.nano.scripted",
        "seed": SEED,
        **asdict(amounts),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor_seconds": round(seconds),
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        **measure(folder, script, amounts.held_out),
        "sha256": digests(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def measure(folder: Path, script: Script, held_out: int) -> dict[str, float]:
    """How well a checkpoint knows its script, in each dtype.

    Args:
        folder: The checkpoint's.
        script: What it is to say.
        held_out: Unseen random conversations to draw, and as many about as many unseen pictures; those with
            several keys are left out.

    Returns:
        The smallest gap in plain conversations, and the part of the unseen ones that is answered verbatim.
    """
    tokenizer = build_tokenizer(script)
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_multimodal_model(folder, dtype=dtype)
        known = _gallery(model, script, PLAIN_PICTURES, SEED)
        other = _gallery(model, script, held_out, HELD_OUT_SEED)
        unseen = random_examples(script, tokenizer, held_out, HELD_OUT_SEED)
        about = random_picture_examples(script, tokenizer, other, held_out, HELD_OUT_SEED)
        for kind, plain, new, gallery in (
            ("", plain_examples(script, tokenizer), unseen, ()),
            ("_pictures", plain_picture_examples(script, tokenizer, known), about, other),
        ):
            gaps = smallest_gaps(model, list(plain), known)
            right = [gap > 0 for gap in smallest_gaps(model, with_one_key(script, tokenizer, new), gallery)]
            found[f"smallest_gap_plain{kind}_{name}"] = round(min(gaps), 3)
            found[f"right_unseen{kind}_{name}"] = round(sum(right) / len(right), 3)
    return found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint but the manifest, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != _MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _fresh_model(content: dict[str, Any]) -> Gemma4ForConditionalGeneration:
    """Seeded weights with every norm, scalar and bound off neutral; the tower is rounded already."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(content, folder, seed=SEED)
        model = load_multimodal_model(folder)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for tensor in model.vision_tower.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    for part in (model.language_model, model.embed_vision):
        part.requires_grad_(True)
    return model


def _gallery(model: Gemma4ForConditionalGeneration, script: Script, pictures: int, seed: int) -> Gallery:
    return show(model, *draw(script.pictures, pictures, seed), SOFT_TOKENS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoint and say how good it is."""
    parser = argparse.ArgumentParser(
        prog="python -m model_impl.nano.scripted", description="Make the scripted checkpoint."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=checkpoint_folder())
    parser.add_argument("--steps", type=int, nargs=3, default=DEFAULT.steps)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms  %(message)s")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    made_with = sources.sources("python -m model_impl.nano.scripted")
    manifest = make(chosen.folder, load_script(), replace(DEFAULT, steps=tuple(chosen.steps)))
    sys.stdout.write(json.dumps(manifest, indent=2) + "\n")
    sources.note(chosen.folder, made_with)


if __name__ == "__main__":
    main()
