"""The bfloat16 rows of models with experts are those that the rule gives, and nobody picked them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench import clear_rows
from bench.clear_rows import COUNT, LENGTH, MARGIN, NoClearTokenError, Weights
from conformance.checks.parity import EXTREMES
from conformance.loading import load_suites, resolve_rows
from conformance.suites import ParityCase, ParitySuite
from conformance.targets import registry


def bfloat16_cases() -> Iterator[tuple[ParitySuite, ParityCase]]:
    for suite in (loaded.suite for loaded in load_suites()):
        if isinstance(suite, ParitySuite):
            for case in suite.cases:
                if case.dtype == "bfloat16" and suite.configs[case.config].get("enable_moe_block"):
                    yield suite, case


CASES = list(bfloat16_cases())
CHECKPOINTS = {(suite.id, case.config, case.weights): suite for suite, case in CASES}


class Table(Weights):
    """The margin of a token is in a table, whatever stands before it."""

    margin_of: dict[int, float]

    def router_logits(self, rows: tuple[tuple[int, ...], ...], dtype: str) -> Tensor:
        found = torch.tensor([[[0.5, 0.5 - self.margin_of.get(i, 0.0), -1.0] for i in row] for row in rows])
        return torch.stack([torch.tensor([9.0, 1.0, 0.0]).expand_as(found), found])


def table(margin_of: dict[int, float]) -> Table:
    weights = Table(oracles=None, oracle="", config={"vocab_size": 100, "top_k_experts": 1}, seed=0)  # type: ignore[arg-type]
    object.__setattr__(weights, "margin_of", margin_of)
    return weights


def test_a_row_takes_the_first_clear_token_of_each_draw() -> None:
    rows = clear_rows.clear_rows(table({3: MARGIN + 1e-6, 41: 2.0, 77: MARGIN - 1e-3}))
    assert [len(row) for row in rows] == [LENGTH] * len(rows)
    assert {token for row in rows for token in row} == {3, 41}
    assert len(set(rows)) == len(rows)


def test_a_vocabulary_without_a_clear_token_is_named() -> None:
    with pytest.raises(NoClearTokenError, match=r"behind \[\] no token has a margin"):
        clear_rows.clear_rows(table({}))


def test_there_are_such_cases() -> None:
    assert len(CASES) >= 4
    for suite, case in CASES:
        window = suite.configs[case.config]["sliding_window"]
        assert all(len(row) > 2 * window for row in resolve_rows(case.rows, suite.configs[case.config]))


@pytest.mark.parametrize("key", CHECKPOINTS, ids=lambda key: "-".join(map(str, key)))
def test_committed_rows_are_the_rule_s(key: tuple[str, str, int]) -> None:
    """All their tokens are clear; that each is the first clear one is looked up at two places of each."""
    suite = CHECKPOINTS[key]
    if reason := registry.unavailable(suite.oracle):
        pytest.skip(f"{suite.oracle}: {reason}")
    cases = [case for other, case in CASES if (other.id, case.config, case.weights) == key]
    rows = resolve_rows(cases[0].rows, suite.configs[cases[0].config])
    assert all(resolve_rows(case.rows, suite.configs[case.config]) == rows for case in cases)
    assert [len(row) for row in rows] == [LENGTH] * COUNT
    with clear_rows.opened(suite, *key[1:]) as weights:
        assert float(weights.margins(rows).min()) >= MARGIN
        for seed, row in enumerate(rows):
            for place in (seed, LENGTH - 1 - seed):
                assert clear_rows.next_token(weights, row[:place], seed) == row[place], (seed, place)
        apart = weights.router_logits(rows, "bfloat16") - weights.router_logits(rows, "float32")
    # What makes the margin wide enough for everybody whom the cases let pass.
    assert all(2 * EXTREMES * case.factor * float(apart.abs().max()) < MARGIN for case in cases)
