"""The text model beside transformers, in one run: prefill, decoding, memory. Columns: bench/README.md.

Both load the same seeded checkpoint in float32 and generate greedily with two threads, each in a process of
its own, taking turns. transformers runs as it is used: `generate`, its default attention and experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.peers import Peer
from conformance.targets import environments, registry
from model_impl.random_weights import write_checkpoint

THREADS = 2
PROMPT = 512
PEER = Path(__file__).with_name("text_model_peer.py")
_BANDWIDTH_BYTES = 1 << 30

_S, _F = "sliding_attention", "full_attention"
_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 24_576,
    "vocab_size_per_layer_input": 24_576,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 256,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        _S: {"rope_type": "default", "rope_theta": 10_000.0},
        _F: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    # E2B with all of its layers, and widths divided by six: half of the weights are the per-layer table.
    "per-layer embeddings": {
        **_COMMON,
        "num_hidden_layers": 35,
        "layer_types": ([_S] * 4 + [_F]) * 7,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "intermediate_size": 1024,
        "hidden_size_per_layer_input": 40,
    },
    # 26B-A4B with all of its layers and experts, and widths divided by eleven.
    "mixture of experts": {
        **_COMMON,
        "num_hidden_layers": 30,
        "layer_types": ([_S] * 5 + [_F]) * 5,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "intermediate_size": 192,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 64,
    },
}


@dataclass(frozen=True)
class Row:
    """One model at one batch size."""

    model: str
    parameters: int
    batch: int
    prefill: dict[str, float]
    """Seconds for a prompt of `PROMPT` tokens in each row and the first token after it, per peer."""
    decode: dict[str, float]
    """Seconds for each further step."""
    memory: dict[str, int]
    """Largest resident size so far, in bytes."""
    bandwidth: float
    """Part of the measured memory bandwidth that reading the used weights once a step amounts to."""

    def ratio(self, what: dict[str, float]) -> float:
        """How many times faster the reference is."""
        return what["transformers"] / what["reference"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each peer; the median counts")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bandwidth = memory_bandwidth()
    rows = [
        row
        for model, config in MODELS.items()
        for row in measure(model, config, arguments.batches, arguments.rounds, arguments.steps, bandwidth)
    ]
    if arguments.json:
        print(json.dumps({"bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows, bandwidth)


def memory_bandwidth() -> float:
    """Bytes a second that `THREADS` threads read: the best of five sums over a gibibyte."""
    torch.set_num_threads(THREADS)
    data = torch.ones(_BANDWIDTH_BYTES // 4)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return _BANDWIDTH_BYTES / min(times)


def measure(
    model: str, config: dict[str, Any], batches: Sequence[int], rounds: int, steps: int, bandwidth: float
) -> Iterator[Row]:
    """One row per batch size."""
    spec = registry.resolve("transformers")
    oracle = environments.status(spec)
    if oracle.reason:
        raise SystemExit(f"{spec}: {oracle.reason}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(config, folder, seed=1)
        python = oracle.path / "bin" / "python"
        peers = [
            stack.enter_context(_open("reference", sys.executable, folder)),
            stack.enter_context(_open("transformers", python, folder)),
        ]
        for batch in batches:
            prefill: dict[str, list[float]] = {peer.name: [] for peer in peers}
            decode: dict[str, list[float]] = {peer.name: [] for peer in peers}
            about: dict[str, dict[str, Any]] = {}
            for number in range(rounds + 1):
                for peer in peers:
                    about[peer.name] = peer.ask(batch=batch, prompt=PROMPT, steps=steps)
                    if number:  # the first turn warms up
                        prefill[peer.name].append(about[peer.name]["prefill"])
                        decode[peer.name].append(about[peer.name]["decode"])
            step = {name: statistics.median(times) for name, times in decode.items()}
            yield Row(
                model=model,
                parameters=about["reference"]["parameters"],
                batch=batch,
                prefill={name: statistics.median(times) for name, times in prefill.items()},
                decode=step,
                memory={name: about[name]["memory"] for name in about},
                bandwidth=about["reference"]["read_per_step"] / step["reference"] / bandwidth,
            )


@contextmanager
def _open(name: str, python: Path | str, folder: Path) -> Iterator[Peer]:
    peer = Peer(name, [python, PEER, name, folder, str(THREADS)])
    try:
        yield peer
    finally:
        peer.close()


def show(rows: Sequence[Row], bandwidth: float) -> None:
    """Print a table."""
    table = Table(title=f"float32, {THREADS} threads, memory read at {bandwidth / 1e9:.1f} GB/s")
    for column in (
        "model", "parameters", "batch", f"prefill {PROMPT}, s", "times faster", "decode, ms", "times faster",
        "memory, MB", "of bandwidth",
    ):  # fmt: skip
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.model,
            f"{row.parameters / 1e6:.0f} M",
            str(row.batch),
            f"{row.prefill['reference']:.2f} : {row.prefill['transformers']:.2f}",
            f"{row.ratio(row.prefill):.2f}",
            f"{row.decode['reference'] * 1e3:.1f} : {row.decode['transformers'] * 1e3:.1f}",
            f"{row.ratio(row.decode):.2f}",
            f"{row.memory['reference'] / 1e6:.0f} : {row.memory['transformers'] / 1e6:.0f}",
            f"{row.bandwidth:.0%}" if row.batch == 1 else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
