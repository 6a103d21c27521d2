"""One implementation of one checkpoint, for `text_model.py`: answers JSON lines with times.

Runs under the interpreter of the implementation it measures; nothing but that implementation is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Generate = Callable[[torch.Tensor, int], None]


def reference(folder: Path) -> tuple[torch.nn.Module, Generate]:
    """The bundled implementation."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from model_impl.checkpoint import load_text_model
    from model_impl.runtime.generate import generate

    model = load_text_model(folder)
    return model, lambda ids, steps: generate(model, ids.tolist(), max_new_tokens=steps)


def transformers(folder: Path) -> tuple[torch.nn.Module, Generate]:
    """Hugging Face transformers, with its defaults."""
    from transformers import Gemma4ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Gemma4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, key_mapping={r"^model\.language_model\.": "model."}
    ).eval()

    def generate(ids: torch.Tensor, steps: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, eos_token_id=None
        )

    return model, generate


def main() -> None:
    """Load, then answer until the pipe closes."""
    name, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, generate = {"reference": reference, "transformers": transformers}[name](Path(folder))
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    for line in sys.stdin:
        question = json.loads(line)
        seeded = torch.Generator().manual_seed(question["batch"])
        ids = torch.randint(3, vocabulary, (question["batch"], question["prompt"]), generator=seeded)
        steps = question["steps"]
        with torch.inference_mode():
            first = _seconds(lambda ids=ids: generate(ids, 1))
            whole = _seconds(lambda ids=ids, steps=steps: generate(ids, 1 + steps))
        answer = {
            "prefill": first,
            "decode": (whole - first) / steps,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "parameters": sum(p.numel() for p in model.parameters()),
            "read_per_step": read_per_step(model),
        }
        print(json.dumps(answer), flush=True)


def read_per_step(model: torch.nn.Module) -> int:
    """Bytes of weights that one token needs: tables count one row, experts those that are chosen."""
    top_k = next((m.top_k for m in model.modules() if hasattr(m, "top_k") and hasattr(m, "proj")), 0)
    total = 0
    for name, parameter in model.named_parameters():
        share = 1.0
        if "embed_tokens_per_layer" in name:
            share = 1 / len(parameter)
        elif ".experts." in name:
            share = top_k / len(parameter)
        total += int(parameter.numel() * parameter.element_size() * share)
    return total


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
