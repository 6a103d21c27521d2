"""The engine beside transformers' `generate` and vLLM's engine, in one run: prefill, decoding, memory.

All load the same seeded checkpoint in float32 and generate greedily with two threads, each in a process of
its own, taking turns. Columns: bench/README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from bench.generation import PROMPT, THREADS, Row, arguments_of, below, measure, memory_bandwidth
from bench.text_model import MODELS

PEERS = ("engine", "generate", "transformers", "vllm")
FLOOR = "transformers"
"""The peer that the engine must not be slower than, nor take more memory than."""
TOLERANCE = 0.05
"""Part of a ratio of times that counts as noise; the ratio is the median of the rounds'."""


def main() -> int:
    """Measure, print, and return 1 if the engine is below its floor."""
    parser = arguments_of(__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS[1:], default=PEERS[1:], help="beside the engine")
    parser.add_argument("--model", choices=MODELS, default="per-layer embeddings")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the floor, for noise")
    arguments = parser.parse_args()
    bandwidth = memory_bandwidth()
    rows = list(
        measure(
            [PEERS[0], *arguments.peers],
            arguments.model,
            MODELS[arguments.model],
            batches=arguments.batches,
            rounds=arguments.rounds,
            steps=arguments.steps,
            bandwidth=bandwidth,
        )
    )
    if arguments.json:
        print(json.dumps({"bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows, bandwidth)
    found = below(rows, FLOOR, arguments.tolerance) if FLOOR in arguments.peers else []
    for line in found:
        print(f"below the floor: {line}", file=sys.stderr)
    return int(bool(found))


def show(rows: Sequence[Row], bandwidth: float) -> None:
    """Print a table: a line for each peer at each batch size."""
    about = f"{rows[0].model}, {rows[0].parameters / 1e6:.0f} M parameters"
    table = Table(title=f"{about}; float32, {THREADS} threads, memory read at {bandwidth / 1e9:.1f} GB/s")
    for column in (
        "batch", "peer", f"prefill {PROMPT}, s", "the engine is faster", "decode, ms", "the engine is faster",
        "memory, MB", "of bandwidth",
    ):  # fmt: skip
        table.add_column(column)
    for row in rows:
        prefill, decode = ([1.0, *row.ratios(what).values()] for what in ("prefill", "decode"))
        for place, peer in enumerate(row.decode):
            table.add_row(
                str(row.batch),
                peer,
                f"{row.prefill[peer]:.2f}",
                f"{prefill[place]:.2f}" if place else "",
                f"{row.decode[peer] * 1e3:.1f}",
                f"{decode[place]:.2f}" if place else "",
                f"{row.memory[peer] / 1e6:.0f}",
                f"{row.bandwidth:.0%}" if not place and row.batch == 1 else "",
            )
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
