"""Sixteen images of mixed sizes: in one batch, one by one, and in transformers. Columns: bench/README.md.

All load the same seeded tower in float32 and encode the same images with two threads, each in a process of
its own, taking turns. transformers runs as it is used: its own processor, all images in one call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench.peers import Peer
from conformance.targets import environments, registry
from model_impl.media_config import MultimodalConfig, VisionConfig
from model_impl.vision import VisionTower

THREADS = 2
PEER = Path(__file__).with_name("vision_peer.py")
SAME = 1e-4
"""Largest distance of two peers' soft tokens, relative to their norm."""

SIZES = [
    (640, 480), (480, 640), (1920, 1080), (1080, 1920), (224, 224), (512, 512), (3000, 2000), (1024, 768),
    (100, 1000), (2000, 100), (60, 60), (800, 200), (333, 777), (1280, 720), (1, 1), (1500, 500),
]  # fmt: skip
"""Width and height."""

CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "sliding_window": 64,
    },
    "image_token_id": 5,
    "boi_token_id": 6,
    "eoi_token_id": 7,
    # The tower of E2B with a quarter of its layers and of its widths.
    "vision_config": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "position_embedding_size": 10_240,
        "use_clipped_linears": True,
        "standardize": False,
    },
}

MODES = {
    "batched": ("reference", False),
    "one by one": ("reference", True),
    "transformers": ("transformers", False),
}
"""Peer, and whether each image is a call of its own."""


@dataclass(frozen=True)
class Row:
    """All images at one budget."""

    budget: int
    soft_tokens: int
    prepare: dict[str, float]
    """Seconds from decoded images to patches, per mode."""
    encode: dict[str, float]
    """Seconds from patches to soft tokens, per mode."""
    memory: dict[str, int]
    """Largest resident size of the peers, in bytes."""
    distance: float
    """Largest relative distance of any mode's soft tokens from the batched ones."""

    def ratio(self, what: dict[str, float], mode: str) -> float:
        """How many times faster the batch is than another mode."""
        return what[mode] / what["batched"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each mode; the best counts")
    parser.add_argument("--budgets", type=int, nargs="+", default=[70, 280])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(budget, arguments.rounds) for budget in arguments.budgets]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)
    if any(row.distance > SAME for row in rows):
        raise SystemExit("the peers disagree; the times mean nothing")


def measure(budget: int, rounds: int) -> Row:
    """All modes at one budget, in turns."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        write(folder)
        peers = {peer.name: peer for peer in stack.enter_context(opened(folder, budget))}
        times: dict[str, dict[str, list[float]]] = {mode: {"prepare": [], "encode": []} for mode in MODES}
        memory: dict[str, int] = {}
        for number in range(rounds + 1):
            for mode, (peer, one_by_one) in MODES.items():
                answer = peers[peer].ask(one_by_one=one_by_one, features=f"{mode}.safetensors")
                memory[peer] = answer["memory"]
                for what in ("prepare", "encode"):
                    if number:  # the first turn warms up
                        times[mode][what].append(answer[what])
        features = {mode: load_file(folder / f"{mode}.safetensors")["features"] for mode in MODES}
    batched = features["batched"]
    return Row(
        budget=budget,
        soft_tokens=len(batched),
        prepare={mode: min(times[mode]["prepare"]) for mode in MODES},
        encode={mode: min(times[mode]["encode"]) for mode in MODES},
        memory=memory,
        distance=max(float((other - batched).norm() / batched.norm()) for other in features.values()),
    )


def write(folder: Path) -> None:
    """The configuration, seeded weights with bounds that seldom cut, and the images."""
    vision = MultimodalConfig.from_dict(CONFIG).vision
    assert isinstance(vision, VisionConfig)
    seeded = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisionTower(vision).state_dict().items()}
    weights = {name: weight(name, shape, seeded) for name, shape in shapes.items()}
    images = {
        f"{number:02d}": torch.randint(0, 256, (3, height, width), generator=seeded, dtype=torch.uint8)
        for number, (width, height) in enumerate(SIZES)
    }
    save_file(weights, folder / "tower.safetensors")
    save_file(images, folder / "images.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def weight(name: str, shape: torch.Size, seeded: torch.Generator) -> torch.Tensor:
    """One tensor of the tower."""
    if name.endswith(("_min", "_max")):
        return torch.tensor(-3.0 if name.endswith("_min") else 3.0)
    if "norm" in name:
        return torch.empty(shape).uniform_(0.5, 1.0, generator=seeded)
    return torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=seeded)


@contextmanager
def opened(folder: Path, budget: int) -> Iterator[list[Peer]]:
    """Both implementations."""
    spec = registry.resolve("transformers")
    oracle = environments.status(spec)
    if reason := oracle.reason or "; ".join(oracle.lacking.values()):
        raise SystemExit(f"{spec}: {reason}")
    rest = (folder, str(THREADS), str(budget))
    peers = [
        Peer("reference", [sys.executable, PEER, "reference", *rest]),
        Peer("transformers", [oracle.python, PEER, "transformers", *rest], oracle.import_paths),
    ]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table(title=f"{len(SIZES)} images of mixed sizes, float32, {THREADS} threads")
    for column in ("budget", "tokens", "stage", *MODES, "times faster than", "memory, MB"):
        table.add_column(column)
    for row in rows:
        memory = f"{row.memory['reference'] / 1e6:.0f} : {row.memory['transformers'] / 1e6:.0f}"
        for stage, times in (("prepare", row.prepare), ("encode", row.encode)):
            first = stage == "prepare"
            table.add_row(
                str(row.budget) if first else "",
                str(row.soft_tokens) if first else "",
                stage,
                *(f"{times[mode]:.2f}" for mode in MODES),
                f"{row.ratio(times, 'one by one'):.2f} : {row.ratio(times, 'transformers'):.2f}",
                memory if first else "",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
