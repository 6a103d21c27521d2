"""Implementations that generate from one checkpoint beside each other, in one run: prefill, decoding, memory.

Each is a process of its own, in float32 with two threads, greedy; they take turns, and medians count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.peers import Peer
from conformance.targets import environments, registry
from model_impl.random_weights import write_checkpoint

THREADS = 2
PROMPT = 512
OWN = ("generate", "engine")
"""The bundled implementation: one batch from beginning to end, and the engine that requests join."""
_PEER = Path(__file__).with_name("generation_peer.py")
_BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One model at one batch size; first the peer that the others are compared with."""

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

    rounds: dict[str, dict[str, list[float]]]
    """The times of `prefill` and `decode` round by round, per peer."""

    def ratios(self, what: str) -> dict[str, float]:
        """How many times faster the first peer is than each of the others: the median of the rounds' ratios.

        The turns of a round follow each other, so that what slows the machine for a while slows all of them.

        Args:
            what: `prefill` or `decode`.
        """
        first, *others = self.rounds[what]
        own = self.rounds[what][first]
        return {
            peer: statistics.median(
                other / time for other, time in zip(self.rounds[what][peer], own, strict=True)
            )
            for peer in others
        }


def arguments_of(about: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark of generation takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each peer; the median counts")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", action="store_true")
    return parser


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
    names: Sequence[str],
    model: str,
    config: dict[str, Any],
    *,
    batches: Sequence[int],
    rounds: int,
    steps: int,
    bandwidth: float,
) -> Iterator[Row]:
    """One row per batch size.

    Args:
        names: Peers; the first is one of `OWN`, the others may be targets with environments of their own.
        model: What rows call it.
        config: Configuration of a text model; its weights are drawn.
        batches: Prompts at a time.
        rounds: Turns of each peer that count.
        steps: Tokens after the first one.
        bandwidth: From `memory_bandwidth`.

    Raises:
        SystemExit: a peer is not installed.
    """
    first = names[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoint(config, folder, seed=1)
        peers = [stack.enter_context(_open(name, folder)) for name in names]
        for batch in batches:
            prefill: dict[str, list[float]] = {name: [] for name in names}
            decode: dict[str, list[float]] = {name: [] for name in names}
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
                parameters=about[first]["parameters"],
                batch=batch,
                prefill={name: statistics.median(times) for name, times in prefill.items()},
                decode=step,
                memory={name: about[name]["memory"] for name in about},
                bandwidth=about[first]["read_per_step"] / step[first] / bandwidth,
                rounds={"prefill": prefill, "decode": decode},
            )


def below(rows: Sequence[Row], peer: str, tolerance: float) -> list[str]:
    """Where the first peer is slower than another by more than noise, or takes more memory, in words.

    Args:
        rows: From `measure`.
        peer: The other one.
        tolerance: Part of a ratio that counts as noise; memory has none.
    """
    found = []
    for row in rows:
        for what in ("prefill", "decode"):
            ratio = row.ratios(what)[peer]
            if ratio < 1 - tolerance:
                found.append(f"batch {row.batch}: {what} is {ratio:.2f} times as fast as with {peer}")
        own = next(iter(row.memory))
        if row.memory[own] > row.memory[peer]:
            mine, other = row.memory[own] / 1e6, row.memory[peer] / 1e6
            found.append(f"batch {row.batch}: {mine:.0f} MB, and {peer} takes {other:.0f}")
    return found


@contextmanager
def _open(name: str, folder: Path) -> Iterator[Peer]:
    python: Path | str = sys.executable
    import_paths: tuple[Path, ...] = ()
    if name not in OWN:
        spec = registry.resolve(name)
        environment = environments.status(spec)
        if reason := environment.reason or "; ".join(environment.lacking.values()):
            raise SystemExit(f"{spec}: {reason}")
        python, import_paths = environment.python, environment.import_paths
    peer = Peer(name, [python, _PEER, name, folder, str(THREADS)], import_paths)
    try:
        yield peer
    finally:
        peer.close()
