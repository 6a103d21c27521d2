"""One implementation of one checkpoint, for `generation.py`: answers JSON lines with times.

Runs under the interpreter of the implementation it measures; nothing but that implementation is imported.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Generate = Callable[[torch.Tensor, int], list[float]]
"""Prompts [B, T] and a number of tokens to the times at which a step's tokens were there."""


_BLOCK = 16
"""Positions in a block of the engine's full layers, as in vLLM's; its sliding layers have twice as many."""
_SEQUENCES = 8


def alone(folder: Path) -> tuple[torch.nn.Module, Generate]:
    """The bundled implementation's `generate`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from model_impl.checkpoint import load_text_model
    from model_impl.runtime.generate import stream

    model = load_text_model(folder)

    def generate(ids: torch.Tensor, count: int) -> list[float]:
        tokens = stream(model, ids.tolist(), max_new_tokens=count)
        times = [time.perf_counter() for _ in tokens]
        return times[:: len(ids)]

    return model, generate


def engine(folder: Path) -> tuple[torch.nn.Module, Generate]:
    """The bundled engine, with a paged cache and nothing found in it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from model_impl.checkpoint import load_text_model
    from model_impl.runtime.engine import Engine, EngineConfig
    from model_impl.runtime.paged import CacheSizes
    from model_impl.runtime.request import Request
    from model_impl.runtime.runner import LocalRunner

    model = load_text_model(folder)
    kinds = model.config.kinds

    def generate(ids: torch.Tensor, count: int) -> list[float]:
        size = {kind: _BLOCK if kind == "full_attention" else 2 * _BLOCK for kind in kinds}
        longest = ids.shape[1] + count
        blocks = {kind: len(ids) * (math.ceil(longest / each) + 1) for kind, each in size.items()}
        runner = LocalRunner(model, CacheSizes(size, blocks))
        runs = Engine(runner, EngineConfig(ids.numel(), _SEQUENCES, prefix_caching=False))
        for row in ids.tolist():
            runs.add(Request(tuple(row), count))
        times = []
        while runs.unfinished:
            runs.step()
            times.append(time.perf_counter())
        runner.close()
        return times

    return model, generate


def vllm(folder: Path) -> tuple[None, Generate]:
    """The engine of vLLM in this process, with all prompts in one step, as the others have them."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024,
        max_num_batched_tokens=1024 * _SEQUENCES, max_num_seqs=_SEQUENCES, enable_prefix_caching=False,
        generation_config="vllm", disable_log_stats=True,
    )  # fmt: skip
    number = 0

    def generate(ids: torch.Tensor, count: int) -> list[float]:
        nonlocal number
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for row in ids.tolist():
            number += 1
            model.llm_engine.add_request(str(number), {"prompt_token_ids": row}, sampling)
        times = []
        while model.llm_engine.has_unfinished_requests():
            model.llm_engine.step()
            times.append(time.perf_counter())
        return times

    return None, generate


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
    known: dict[str, Callable[[Path], tuple[torch.nn.Module | None, Generate]]] = {
        "generate": alone,
        "engine": engine,
        "transformers": transformers,
        "vllm": vllm,
    }
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    model, generate = known[name](Path(folder))
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
        }
        if model is not None:
            answer["parameters"] = sum(p.numel() for p in model.parameters())
            answer["read_per_step"] = read_per_step(model)
        os.write(answers, f"{json.dumps(answer)}\n".encode())


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
