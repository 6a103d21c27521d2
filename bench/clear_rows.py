"""Rows of token ids for the bfloat16 cases of models with experts, chosen by the oracle alone.

In bfloat16 a near tie between experts may go either way, and from there on all tensors differ. A token is
*clear* if, in the oracle's float32 run, the last chosen and the first unchosen expert of every layer are at
least `MARGIN` apart, in logits of the router. A row grows token by token: at each place the ids of the
vocabulary are tried in an order drawn by seed and place, and the first clear one is taken. Tokens cannot see
what follows them, so those already taken stay clear. Row k has the seed k. No target takes part.

    python bench/clear_rows.py parity/odd-sizes odd-short --weights 600

prints them as a suite's `rows`, and how far the oracle's own bfloat16 logits of the router are from float32.
With `--measure` it prints the largest such distance over 250 random rows of six tokens in which rounding
changes no expert of the first layer. The margin is at least eight times that: a target of which one logit is
four times as far from float32 as any of the oracle's, as a case allows, still chooses the same experts.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.checks import tensors
from conformance.loading import load_suites
from conformance.oracles import Oracles, Wanted
from conformance.suites import ParitySuite
from conformance.targets import registry

LENGTH = 18
COUNT = 4
MARGIN = 0.06
_FIRST_BATCH = 8
_MEASURED = 250

Row = tuple[int, ...]


class NoClearTokenError(Exception):
    """No id of the vocabulary is clear behind a row."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and the oracle that computes with it."""

    oracles: Oracles
    oracle: str
    config: dict[str, Any]
    seed: int

    def router_logits(self, rows: tuple[Row, ...], dtype: str) -> Tensor:
        """[layers, rows, tokens, experts] of rows of one length."""
        names = tuple(f"layers.{layer}.router.proj" for layer in range(self.config["num_hidden_layers"]))
        wanted = Wanted(self.config, self.seed, rows, None, names)
        found = tensors.read(self.oracles.ask(self.oracle, wanted, dtype).path)
        return torch.stack([found[name] for name in names]).unflatten(1, (len(rows), len(rows[0])))

    def margins(self, rows: tuple[Row, ...]) -> Tensor:
        """[rows, tokens]: the least distance of any layer's last chosen from its first unchosen expert."""
        ranked = self.router_logits(rows, "float32").sort(dim=-1, descending=True).values
        top_k = self.config["top_k_experts"]
        return (ranked[..., top_k - 1] - ranked[..., top_k]).amin(dim=0)


@contextlib.contextmanager
def opened(suite: ParitySuite, config: str, seed: int) -> Iterator[Weights]:
    """The oracle of a suite, with weights for one of its configurations."""
    with contextlib.closing(registry.open_target(suite.oracle)) as target:
        oracles = Oracles(lambda _spec: target)
        with contextlib.closing(oracles):
            yield Weights(oracles, suite.oracle, suite.configs[config], seed)


def clear_rows(weights: Weights) -> tuple[Row, ...]:
    """The rows that the rule gives."""
    return tuple(_clear_row(weights, seed) for seed in range(COUNT))


def largest_distance(weights: Weights) -> float:
    """How far the oracle's bfloat16 logits of any router are from float32, where its first one agrees."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, weights.config["vocab_size"], (_MEASURED, 6), generator=generator)
    rows = tuple(tuple(row) for row in drawn.tolist())
    full, half = (weights.router_logits(rows, dtype) for dtype in ("float32", "bfloat16"))
    chosen = [
        logits[0].topk(weights.config["top_k_experts"]).indices.sort().values for logits in (full, half)
    ]
    agree = (chosen[0] == chosen[1]).flatten(1).all(dim=1)
    return float((full - half)[:, agree].abs().max())


def _clear_row(weights: Weights, seed: int) -> Row:
    row: Row = ()
    for _ in range(LENGTH):
        row = (*row, next_token(weights, row, seed))
    return row


def next_token(weights: Weights, row: Row, seed: int) -> int:
    """The first id that is clear behind a row, in the order that its seed and length draw.

    Raises:
        NoClearTokenError: there is none.
    """
    vocabulary = range(weights.config["vocab_size"])
    order = random.Random(f"{seed}:{len(row)}").sample(vocabulary, len(vocabulary))
    start, size = 0, _FIRST_BATCH
    while ids := order[start : start + size]:
        margins = weights.margins(tuple((*row, i) for i in ids))[:, -1].tolist()
        for candidate, margin in zip(ids, margins, strict=True):
            if margin >= MARGIN:
                return candidate
        start, size = start + size, 2 * size
    raise NoClearTokenError(f"behind {list(row)} no token has a margin of {MARGIN}; take a smaller one")


def find_suite(name: str) -> ParitySuite:
    """A committed parity suite by id."""
    found = next((loaded.suite for loaded in load_suites() if loaded.suite.id == name), None)
    if not isinstance(found, ParitySuite):
        raise SystemExit(f"there is no suite {name} of kind parity")
    return found


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description="Choose rows whose experts are clear, by the oracle alone.")
    parser.add_argument("suite")
    parser.add_argument("config")
    parser.add_argument("--weights", type=int, required=True, help="seed of the checkpoint")
    parser.add_argument("--measure", action="store_true", help="print what the margin rests on instead")
    options = parser.parse_args()
    with opened(find_suite(options.suite), options.config, options.weights) as weights:
        if options.measure:
            print(f"largest distance {largest_distance(weights):.2g}; margin {MARGIN:g}")
            return
        rows = clear_rows(weights)
        apart = (weights.router_logits(rows, "bfloat16") - weights.router_logits(rows, "float32")).abs()
    for row in rows:
        print(f"- {list(row)}")
    print(f"the oracle's own bfloat16 logits are up to {float(apart.max()):.2g} away; margin {MARGIN:g}")


if __name__ == "__main__":
    main()
