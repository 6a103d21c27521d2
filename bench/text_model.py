"""The text model beside transformers, in one run: prefill, decoding, memory. Columns: bench/README.md.

Both load the same seeded checkpoint in float32 and generate greedily with two threads, each in a process of
its own, taking turns. transformers runs as it is used: `generate`, its default attention and experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.generation import PROMPT, THREADS, Row, arguments_of, measure, memory_bandwidth

PEERS = ("generate", "transformers")

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


def main() -> None:
    """Measure and print."""
    parser = arguments_of(__doc__)
    arguments = parser.parse_args()
    bandwidth = memory_bandwidth()
    rows = [
        row
        for model, config in MODELS.items()
        for row in measure(
            PEERS,
            model,
            config,
            batches=arguments.batches,
            rounds=arguments.rounds,
            steps=arguments.steps,
            bandwidth=bandwidth,
        )
    ]
    if arguments.json:
        print(json.dumps({"bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows, bandwidth)


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
            f"{row.prefill['generate']:.2f} : {row.prefill['transformers']:.2f}",
            f"{row.ratios('prefill')['transformers']:.2f}",
            f"{row.decode['generate'] * 1e3:.1f} : {row.decode['transformers'] * 1e3:.1f}",
            f"{row.ratios('decode')['transformers']:.2f}",
            f"{row.memory['generate'] / 1e6:.0f} : {row.memory['transformers'] / 1e6:.0f}",
            f"{row.bandwidth:.0%}" if row.batch == 1 else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
