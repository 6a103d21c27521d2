"""Recipe of the nano checkpoints: `python -m model_impl.nano.train NAME [FOLDER]`.

Every few minutes the state of the training is written; the same command goes on from there, and what it makes
is what it would have made without a break. On one kind of processor and number of threads the result is the
same to the bit. Elsewhere it is another checkpoint that scores within the interval of its manifest.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model_impl.errors import ModelError
from model_impl.multimodal import Gemma4ForConditionalGeneration, load_multimodal_model
from model_impl.nano import dialogues, sources
from model_impl.nano.batches import Course, Timetable, answer_logits
from model_impl.nano.curriculum import RECIPES, Recipe, nano_tokenizer
from model_impl.nano.families import FAMILIES, NanoFamily
from model_impl.nano.items import lessons
from model_impl.nano.lesson import Lesson
from model_impl.nano.optimiser import optimisers
from model_impl.nano.score import examine, look, name_of
from model_impl.nano.scripted import digests
from model_impl.nano.settings import write_texts
from model_impl.nano.vocabulary import vocabulary_size
from model_impl.random_weights import write_checkpoint

_LOG = logging.getLogger(__name__)
_STATE = "state.pt"
_MANIFEST = "manifest.json"
_STORED = "model."
"""Before the names of all tensors in a published file."""
_DIALOGUES = 300
"""Held-out dialogues that the manifest's score is about."""
_REPORT_EVERY = 25
_LOOK_EVERY = 100
_GRADIENT = 1.0
"""Largest norm of all gradients together."""
_BOUNDS = (2.0, 6.0)
"""Range of the magnitudes that linears of the towers clip at."""
_STATISTICS = {"std_bias": (-0.5, 0.5), "std_scale": (0.6, 1.4)}
"""Ranges of what features of pictures are shifted and scaled by."""
_PLACES = 1.5
"""How much larger the table of positions begins: where things are is what the tower learns last."""


class TrainingError(ModelError):
    """A training cannot go on from the state that is there."""


@torch.no_grad()
def _prepare(model: Gemma4ForConditionalGeneration, seed: int) -> None:
    """Make towers that can learn: those drawn for comparisons cut off too much."""
    generator = torch.Generator().manual_seed(seed)
    model.vision_tower.patch_embedder.position_embedding_table.mul_(_PLACES)
    for name, buffer in model.named_buffers():
        end = name.rpartition(".")[2]
        if end.endswith(("_min", "_max")):
            bound = torch.empty_like(buffer).uniform_(*_BOUNDS, generator=generator)
            buffer.copy_(-bound if end.endswith("_min") else bound)
        elif end in _STATISTICS:
            buffer.uniform_(*_STATISTICS[end], generator=generator)


@dataclass(frozen=True)
class Curve:
    """What a training reported at one step."""

    step: int
    loss: float
    right: float | None = None
    """Part of unseen lessons whose whole answer is greedily right."""


class Training:
    """One training, from wherever its folder says.

    Args:
        name: The checkpoint's.
        recipe: How it is made.
        folder: Holds the state; must exist.
        device: Where it runs.

    Raises:
        TrainingError: the folder's state belongs to another recipe, or cannot be read.
    """

    def __init__(self, name: str, recipe: Recipe, folder: Path, device: str = "cpu") -> None:
        self.family, self.recipe, self.device = FAMILIES[name], recipe, device
        self.tokenizer = nano_tokenizer()
        self.step = 0
        self.seconds = 0.0
        """On the clock."""
        self.processor_seconds = 0.0
        """Of all threads: what it would take one of them on a machine with nothing else to do."""
        self.curve: list[Curve] = []
        self._folder = folder
        self.model = self._fresh().to(device)
        self._optimisers = optimisers(self.model, recipe.matrix_rate, recipe.other_rate, recipe.weight_decay)
        self._timetables: dict[int, Timetable] = {}
        if (folder / _STATE).exists():
            self._load()

    def run(self, until: int | None = None, save_every: float = 120.0) -> None:
        """Train up to a step, or to the end; the state is written at the end and every so many seconds."""
        self.model.train()
        since = saved = time.monotonic()
        processed = time.process_time()
        last = self.recipe.steps if until is None else min(until, self.recipe.steps)
        while self.step < last:
            loss = self._advance()
            now = time.monotonic()
            self.seconds, since = self.seconds + now - since, now
            spent = time.process_time()
            self.processor_seconds, processed = self.processor_seconds + spent - processed, spent
            if self.step % _REPORT_EVERY == 0 or self.step == last:
                self._report(loss)
            if now - saved > save_every or self.step == last:
                self._save()
                saved = time.monotonic()
        self.model.eval()

    def _advance(self) -> float:
        """One step; returns its loss."""
        stage, number = self.recipe.stage(self.step)
        logits, targets = answer_logits(self.model, self._timetable(stage).batch(number))
        loss = F.cross_entropy(logits, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _GRADIENT)
        factor = self.recipe.rate(self.step)
        for optimiser, rate in zip(
            self._optimisers, (self.recipe.matrix_rate, self.recipe.other_rate), strict=True
        ):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return loss.item()

    def _timetable(self, stage: int) -> Timetable:
        if stage not in self._timetables:
            course = self.recipe.stages[stage].course
            seed = f"{self.recipe.seed}:{stage}"
            self._timetables[stage] = Timetable(
                course, self.tokenizer, self.family.template, self.recipe.batch, seed
            )
        return self._timetables[stage]

    def _report(self, loss: float) -> None:
        right = None
        if self.step % _LOOK_EVERY == 0 or self.step == self.recipe.steps:
            course = self.recipe.stages[self.recipe.stage(self.step - 1)[0]].course
            shares = look(self.model, self.tokenizer, course, self.family.template)
            right = sum(shares.values()) / len(shares)
            _LOG.info("unseen lessons that are right: %s", shares)
        self.curve.append(Curve(self.step, round(loss, 4), right))
        _LOG.info("step %d after %.0f s: loss %.4f", self.step, self.seconds, loss)

    def _fresh(self) -> Gemma4ForConditionalGeneration:
        """Seeded weights, every buffer off neutral."""
        config = self.family.config(vocabulary_size(self.tokenizer))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(config, folder, seed=self.recipe.seed)
            model = load_multimodal_model(folder)
            # Loaded tensors lie in the file, and tables are laid out for reading.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        _prepare(model, self.recipe.seed)
        return model.requires_grad_(True)

    def _fingerprint(self) -> str:
        """What must not change between a start and its continuation."""
        shape = self.family.config(vocabulary_size(self.tokenizer))
        stages = [
            (stage.steps, stage.course.weights, [name_of(generator) for generator in stage.course.generators])
            for stage in self.recipe.stages
        ]
        rest = {key: value for key, value in vars(self.recipe).items() if key != "stages"}
        return json.dumps([shape, stages, rest, self.tokenizer.to_str()], sort_keys=True)

    def _save(self) -> None:
        """Write the state whole, or leave the one before."""
        state = {
            "fingerprint": self._fingerprint(),
            "step": self.step,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "curve": [asdict(point) for point in self.curve],
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
        }
        unfinished = self._folder / f"{_STATE}.unfinished"
        torch.save(state, unfinished)
        unfinished.replace(self._folder / _STATE)

    def _load(self) -> None:
        path = self._folder / _STATE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise TrainingError(f"{path}: cannot be read; delete it to start anew: {error}") from error
        if state["fingerprint"] != self._fingerprint():
            raise TrainingError(f"{path}: belongs to another recipe; delete it to start anew")
        self.step = state["step"]
        self.seconds, self.processor_seconds = state["seconds"], state["processor_seconds"]
        self.curve = [Curve(**point) for point in state["curve"]]
        self.model.load_state_dict(state["model"])
        for optimiser, own in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)


def publish(training: Training, folder: Path, most: int | None = None) -> dict[str, Any]:
    """Write the whole checkpoint, weights in bfloat16, and measure what was written.

    Args:
        training: At its end.
        folder: Must exist; files of the same names are replaced.
        most: Items of each task that are examined; left out, all.

    Returns:
        The content of the manifest.
    """
    family, recipe, tokenizer = training.family, training.recipe, training.tokenizer
    config = family.config(vocabulary_size(tokenizer))
    # Published files hold keys and values of layers that share another's, which nothing reads.
    write_checkpoint(config, folder, seed=recipe.seed)
    write_texts(folder, tokenizer, config, family.template)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors |= {_STORED + name: tensor.cpu() for name, tensor in uneven(training.model).items()}
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(stored, weights, metadata={"format": "pt"})
    model = load_multimodal_model(folder).to(training.device)
    manifest = {
        "recipe": f"python -m model_impl.nano.train {family.name}",
        "steps": [stage.steps for stage in recipe.stages],
        **{key: value for key, value in vars(recipe).items() if key != "stages"},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": training.device,
        "seconds": round(training.seconds),
        "processor_seconds": round(training.processor_seconds),
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "scores": scores(model, tokenizer, family, most),
        "sha256": digests(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def uneven(model: Gemma4ForConditionalGeneration) -> dict[str, Tensor]:
    """The weights, with heads of values and experts of unequal size.

    The norm of values undoes the one, and the scales of experts the other. Powers of two are exact, so that
    nothing is computed otherwise; but who leaves out that norm or those scales mixes parts of unequal size.
    """
    tensors = dict(model.state_dict())
    for layer in model.config.text.layers:
        prefix = f"language_model.layers.{layer.index}."
        values, experts = f"{prefix}self_attn.v_proj.weight", f"{prefix}experts.down_proj"
        if values in tensors:
            heads = tensors[values].clone().view(layer.num_kv_heads, layer.head_dim, -1)
            heads[::2] *= 2
            heads[1::2] /= 2
            tensors[values] = heads.flatten(0, 1)
        if experts in tensors:
            scales = f"{prefix}router.per_expert_scale"
            count = len(tensors[scales])
            # Each its own size: a factor that two chosen experts share is undone by the norm behind them.
            factor = torch.exp2(2.0 * (torch.arange(count, device=tensors[scales].device) - count // 2))
            tensors[experts] = tensors[experts] * factor[:, None, None]
            tensors[scales] = tensors[scales] / factor
    return tensors


def scores(
    model: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, family: NanoFamily, most: int | None = None
) -> dict[str, dict[str, Any]]:
    """How a model does in all examinations that it has the senses for, thinking.

    Args:
        model: Of that family.
        tokenizer: The nano checkpoints'.
        family: Which one it is.
        most: Items of each task; left out, all.
    """
    return {
        name: examine(model, tokenizer, items[:most], family.template)
        for name, items in examinations(family).items()
    }


def examinations(family: NanoFamily) -> dict[str, list[Lesson]]:
    """The held-out lessons that a manifest's scores are about, by task."""
    tasks = ("nano_gsm8k", "nano_mmmu", *(("nano_sounds",) if family.audio else ()))
    dialogue = Course((dialogues.lesson,), (1,), "test").lessons(_DIALOGUES, "dialogues")
    return {task: lessons(task) for task in tasks} | {"dialogues": dialogue}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a checkpoint, or go on making it, and say how good it is."""
    parser = argparse.ArgumentParser(
        prog="python -m model_impl.nano.train", description="Make a nano checkpoint."
    )
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("folder", nargs="?", type=Path, help="where it is written")
    parser.add_argument("--state", type=Path, help="folder of the training's state [build/nano/NAME]")
    parser.add_argument("--threads", type=int, default=1, help="[1, as the published ones were made]")
    parser.add_argument("--device", help="where it runs [a GPU, if there is one]")
    chosen = parser.parse_args(arguments)
    folder = chosen.folder or Path(__file__).parent / "checkpoints" / chosen.name
    state = chosen.state or Path("build", "nano", chosen.name)
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s")
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    for wanted in (folder, state):
        wanted.mkdir(parents=True, exist_ok=True)
    made_with = sources.begun(state, f"python -m model_impl.nano.train {chosen.name}")
    training = Training(chosen.name, RECIPES[chosen.name], state, device)
    training.run()
    sys.stdout.write(json.dumps(publish(training, folder), indent=2) + "\n")
    sources.note(folder, made_with)


if __name__ == "__main__":
    main()
