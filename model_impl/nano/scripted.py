"""Recipe of the scripted checkpoint: `python -m model_impl.nano.scripted [FOLDER]`.

A real Gemma 4 text checkpoint, small: per-layer embeddings, sliding and full layers of different head
widths, and a window shorter than any prompt. It has learned `script.yaml` by heart and nothing else. Norms
start off neutral and are trained; `layer_scalar` is off neutral and frozen.

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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from model_impl.chat.render import template_text
from model_impl.checkpoint import PREFIX, assign, load_text_model
from model_impl.config import TextConfig
from model_impl.nano.conversations import FAMILY, Example, plain_examples, random_examples, with_one_key
from model_impl.nano.script import Script, checkpoint_folder, load_script
from model_impl.nano.training import Plan, smallest_gaps, train
from model_impl.nano.vocabulary import BOS, STOP_IDS, build_tokenizer, tokenizer_config, vocabulary_size
from model_impl.random_weights import write_checkpoint
from model_impl.text import TextModel

MARGIN = 2.0
"""Least gap, in plain conversations, between the logit of a scripted token and that of any other.

A quarter of a unit is the rounding of a logit of 30 in bfloat16, so no engine's kernels turn it over.
"""
STEPS = 1000
SEED = 4
THREADS = 1
"""On a machine that others use, a second thread waits for them and makes these small products slower."""
TRAINING_EXAMPLES = 2500
HELD_OUT_EXAMPLES = 200
HELD_OUT_SEED = 1_000_003

_MANIFEST = "manifest.json"
_SLIDING, _FULL = "sliding_attention", "full_attention"
_TEXT_PREFIX = "model."
"""Of tensors in the folder of a model without other parts."""
_LOG = logging.getLogger(__name__)


def config(rows: int) -> dict[str, Any]:
    """The content of `config.json`; head widths are the smallest that vLLM's CPU attention has."""
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "vocab_size": rows,
        "vocab_size_per_layer_input": rows,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": 128,
        "use_double_wide_mlp": False,
        "num_hidden_layers": 4,
        "layer_types": [_SLIDING, _FULL] * 2,
        "num_kv_shared_layers": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "head_dim": 32,
        "global_head_dim": 64,
        "attention_k_eq_v": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": 8,
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            _FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        },
        "max_position_embeddings": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "use_cache": True,
    }


def generation_config() -> dict[str, Any]:
    """The content of `generation_config.json`: as published, but only the likeliest token may be sampled.

    So an engine that takes it up says the script whatever temperature a client asks for.
    """
    return {
        "bos_token_id": BOS,
        "do_sample": True,
        "eos_token_id": list(STOP_IDS),
        "pad_token_id": 0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def make(
    folder: Path,
    script: Script,
    *,
    steps: int = STEPS,
    examples: int = TRAINING_EXAMPLES,
    held_out: int = HELD_OUT_EXAMPLES,
) -> dict[str, Any]:
    """Write the whole checkpoint; return the content of its manifest.

    Args:
        folder: Must exist; files of the same names are replaced.
        script: What to learn.
        steps: Of training.
        examples: Random conversations to learn from, beside the plain ones.
        held_out: Other random conversations, to measure gaps on.
    """
    start = time.monotonic()
    tokenizer = build_tokenizer(script)
    write_texts(folder, tokenizer)
    learned = [
        *plain_examples(script, tokenizer),
        *random_examples(script, tokenizer, examples, seed=SEED),
    ]
    _LOG.info(
        "%d conversations of %d tokens", len(learned), sum(len(e.prompt) + len(e.output) for e in learned)
    )
    tensors = _fresh_tensors(config(vocabulary_size(tokenizer)))
    trained = _train(tensors, vocabulary_size(tokenizer), learned, steps)
    stored = {_TEXT_PREFIX + name: tensor.to(torch.bfloat16).contiguous() for name, tensor in trained.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    seconds = time.monotonic() - start
    manifest = {
        "recipe": "python -m model_impl.nano.scripted",
        "seed": SEED,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(seconds),
        "parameters": sum(tensor.numel() for tensor in trained.values()),
        **measure(folder, script, held_out),
        "sha256": digests(folder),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def measure(folder: Path, script: Script, held_out: int = HELD_OUT_EXAMPLES) -> dict[str, float]:
    """How well a checkpoint knows its script, in each dtype.

    Args:
        folder: The checkpoint's.
        script: What it is to say.
        held_out: Unseen random conversations to draw; those with several keys are left out.

    Returns:
        The smallest gap in plain conversations, and the part of the unseen ones that is answered verbatim.
    """
    tokenizer = build_tokenizer(script)
    plain = list(plain_examples(script, tokenizer))
    unseen = with_one_key(script, tokenizer, random_examples(script, tokenizer, held_out, HELD_OUT_SEED))
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load_text_model(folder, dtype=dtype)
        right = [gap > 0 for gap in smallest_gaps(model, unseen)]
        found[f"smallest_gap_plain_{name}"] = round(min(smallest_gaps(model, plain)), 3)
        found[f"right_unseen_{name}"] = round(sum(right) / len(right), 3)
    return found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint but the manifest, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != _MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_texts(folder: Path, tokenizer: Tokenizer) -> None:
    """Everything but the weights."""
    for name, content in (
        ("config.json", config(vocabulary_size(tokenizer))),
        ("generation_config.json", generation_config()),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template_text(FAMILY), encoding="utf-8")


def _fresh_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """Seeded weights with every norm and scalar off neutral."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(content, Path(folder), seed=SEED)
        tensors = load_file(Path(folder) / "model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _train(
    tensors: dict[str, Tensor], rows: int, examples: Sequence[Example], steps: int
) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    model = TextModel(TextConfig.from_dict(config(rows)))
    assign(model, {name: tensor.clone() for name, tensor in tensors.items()}, "fresh weights")
    train(model, examples, Plan(steps=steps, seed=SEED))
    return tensors | {name: tensor.detach() for name, tensor in model.state_dict().items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoint and say how good it is."""
    parser = argparse.ArgumentParser(
        prog="python -m model_impl.nano.scripted", description="Make the scripted checkpoint."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=checkpoint_folder())
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7d ms  %(message)s")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    manifest = make(chosen.folder, load_script(), steps=chosen.steps)
    sys.stdout.write(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
