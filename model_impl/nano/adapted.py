"""Recipe of the scripted checkpoint's adapter: `python -m model_impl.nano.adapted [FOLDER]`.

A LoRA adapter in PEFT's form, with names as in a whole model, for attention and MLPs of all layers. With it
the scripted checkpoint says its lines, and `ADAPTER_SAYS` wherever it would say that it only knows them: so a
live server's answer tells whether the adapter acted. About pictures nothing is promised with it.

It is trained on the committed checkpoint, whose weights stay as they are, and stored in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model_impl.lora import Adapter, Adapters, LowRank, Parts, Sites
from model_impl.lora.adapter import FILE, WRAPPED
from model_impl.multimodal import load_multimodal_model
from model_impl.nano import sources
from model_impl.nano.conversations import Example, plain_examples, random_examples, with_one_key
from model_impl.nano.script import (
    ADAPTER,
    ADAPTER_SAYS,
    Script,
    adapter_folder,
    checkpoint_folder,
    load_script,
)
from model_impl.nano.scripted import HELD_OUT_SEED, SEED, THREADS, digests
from model_impl.nano.training import Plan, smallest_gaps, train

RANK = 4
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CONFIG, _MANIFEST = "adapter_config.json", "manifest.json"
_STEPS, _CONVERSATIONS, _HELD_OUT = 140, 400, 100
_EACH, _NEW = 2, 60
"""How often plain conversations are among the others, and those without a key: they must come out by the
margin, and the latter are all that is new."""


def other_script(script: Script) -> Script:
    """The script as it is with the adapter."""
    return script.model_copy(update={"default": script.default.model_copy(update={"output": ADAPTER_SAYS})})


def make(
    folder: Path, script: Script, *, steps: int = _STEPS, conversations: int = _CONVERSATIONS
) -> dict[str, Any]:
    """Write the adapter; return the content of its manifest.

    Args:
        folder: Must exist; files of the same names are replaced.
        script: Of the checkpoint.
        steps: Of training.
        conversations: Random ones, beside the plain ones.
    """
    start = time.process_time()
    tokenizer = Tokenizer.from_file(str(checkpoint_folder() / "tokenizer.json"))
    other = other_script(script)
    examples = [
        *list(plain_examples(other, tokenizer)) * _EACH,
        *[example for example in plain_examples(other, tokenizer) if _is_default(example)] * _NEW,
        *with_one_key(script, tokenizer, random_examples(other, tokenizer, conversations, SEED)),
    ]
    model = load_multimodal_model(checkpoint_folder())
    adapters = Adapters(model)
    changes = _fresh(adapters.sites)
    adapters.add(ADAPTER, Parts(str(folder), changes, {}))
    trained = [half for change in changes.values() for half in (change.a, change.b)]
    with adapters.rows([ADAPTER]):
        train(model, examples, (), Plan(steps=steps, seed=SEED), trained)
    _write(folder, changes)
    manifest = {
        "recipe": "python -m model_impl.nano.adapted",
        "seed": SEED,
        "steps": steps,
        "conversations": conversations,
        "torch": torch.__version__,
        "processor_seconds": round(time.process_time() - start),
        "parameters": sum(half.numel() for half in trained),
        **measure(folder, script, tokenizer),
        "sha256": digests(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def measure(
    folder: Path, script: Script, tokenizer: Tokenizer, held_out: int = _HELD_OUT
) -> dict[str, float]:
    """How well the checkpoint knows the other line, and still its own, with a stored adapter.

    Returns:
        The smallest gaps in plain conversations without a key, and in all others; and the part of unseen
        random conversations that is answered verbatim.
    """
    model = load_multimodal_model(checkpoint_folder())
    adapters = Adapters(model)
    adapters.add(ADAPTER, Adapter.load(folder, adapters.sites))
    other = other_script(script)
    plain = list(plain_examples(other, tokenizer))
    unseen = with_one_key(script, tokenizer, random_examples(other, tokenizer, held_out, HELD_OUT_SEED))
    with adapters.rows([ADAPTER]):
        gaps = smallest_gaps(model, plain)
        right = [gap > 0 for gap in smallest_gaps(model, unseen)]
    own = [gap for gap, example in zip(gaps, plain, strict=True) if _is_default(example)]
    lines = [gap for gap, example in zip(gaps, plain, strict=True) if not _is_default(example)]
    return {
        "smallest_gap_other": round(min(own), 3),
        "smallest_gap_lines": round(min(lines), 3),
        "right_unseen": round(sum(right) / len(right), 3),
    }


def _is_default(example: Example) -> bool:
    return example.name.partition(",")[0] == "default"


def _fresh(sites: Sites) -> dict[str, LowRank]:
    """A at random, B zero, as PEFT begins."""
    draw = torch.Generator().manual_seed(SEED)
    found = {}
    for site in sites:
        if site.name.startswith("language_model.layers.") and site.name.endswith(_MODULES):
            rows, columns = site.shape
            a = torch.randn(RANK, columns, generator=draw) / math.sqrt(columns)
            found[site.name] = LowRank(a.requires_grad_(), torch.zeros(rows, RANK).requires_grad_())
    return found


def _write(folder: Path, changes: dict[str, LowRank]) -> None:
    tensors = {}
    for site, change in changes.items():
        for half, tensor in (("A", change.a), ("B", change.b)):
            tensors[f"{WRAPPED}model.{site}.lora_{half}.weight"] = tensor.detach().to(torch.bfloat16)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    # A regular expression, because a tower's linears have the same names.
    names = "|".join(_MODULES)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({names})",
        "modules_to_save": None,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the adapter and say how good it is."""
    parser = argparse.ArgumentParser(
        prog="python -m model_impl.nano.adapted", description="Make the scripted checkpoint's adapter."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=adapter_folder())
    parser.add_argument("--steps", type=int, default=_STEPS)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms  %(message)s")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    made_with = sources.sources("python -m model_impl.nano.adapted")
    manifest = make(chosen.folder, load_script(), steps=chosen.steps)
    sys.stdout.write(json.dumps(manifest, indent=2) + "\n")
    sources.note(chosen.folder, made_with)


if __name__ == "__main__":
    main()
