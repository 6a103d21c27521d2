"""One implementation of one checkpoint, for `text_model.py`: answers JSON lines with times.

Runs under the interpreter of the implementation it measures; nothing but that implementation is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Generate = Callable[[torch.Tensor, int], list[float]]
"""Prompts [B, T] and a number of tokens to the times at which a step's tokens were there."""


def reference(folder: Path) -> tuple[torch.nn.Module, Generate]:
    """The bundled implementation."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from model_impl.checkpoint import load_text_model
    from model_impl.runtime.generate import stream

    model = load_text_model(folder)

    def generate(ids: torch.Tensor, count: int) -> list[float]:
        tokens = stream(model, ids.tolist(), max_new_tokens=count)
        times = [time.perf_counter() for _ in tokens]
        return times[:: len(ids)]

    return model, generate


def transformers(folder: Path) -> tuple[torch.nn.Module, Generate]:
    """Hugging Face transformers, with its defaults."""
    from transformers import Gemma4ForCausalLM, StoppingCriteriaList
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Gemma4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, key_mapping={r"^model\.language_model\.": "model."}
    ).eval()

    def generate(ids: torch.Tensor, count: int) -> list[float]:
        times: list[float] = []

        def never_stop(ids: torch.Tensor, _scores: object, **_more: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            eos_token_id=None, stopping_criteria=StoppingCriteriaList([never_stop]),
        )  # fmt: skip
        return times

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
            started = time.perf_counter()
            times = generate(ids, 1 + steps)
        answer = {
            "prefill": times[0] - started,
            "decode": (times[-1] - times[0]) / steps,
            "memory": peak_memory(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "read_per_step": read_per_step(model),
        }
        print(json.dumps(answer), flush=True)


def peak_memory() -> int:
    """Largest resident size of this program so far, in bytes; `ru_maxrss` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


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


if __name__ == "__main__":
    main()
