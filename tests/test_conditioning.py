"""Parity limits decide only where float32 itself is well inside them: the suites' checkpoints are such."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conformance.checks.parity import module_names
from conformance.loading import load_suites, resolve_rows
from conformance.suites import ParityCase, ParitySuite
from conformance.worker.modules import LOGITS
from model_impl.checkpoint import load_text_model
from model_impl.random_weights import write_checkpoint

SHARE = 1 / 3
"""Of a case's limit: two right implementations may then be as far apart as rounding takes them."""

SUITES = [
    loaded.suite
    for loaded in load_suites()
    if isinstance(loaded.suite, ParitySuite) and loaded.suite.area == "text-model"
]
CASES = [(suite, case) for suite in SUITES for case in suite.cases if case.dtype == "float32"]


def outputs(model: nn.Module, names: tuple[str, ...], rows: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """Each module's output over all rows, one after the other, in float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Iterator[None]:
        hook = model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output: found[name].append(
                (output[0] if isinstance(output, tuple) else output).double().flatten()
            )
        )
        yield
        hook.remove()

    hooks = [keep(name) for name in names if name != LOGITS]
    for hook in hooks:
        next(hook)
    with torch.inference_mode():
        for row in rows:
            found[LOGITS].append(model.logits(model(torch.tensor([list(row)]))).double().flatten())
    for hook in hooks:
        next(hook, None)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    ("suite", "case"), CASES, ids=[f"{suite.id.removeprefix('parity/')}-{case.id}" for suite, case in CASES]
)
def test_float32_is_well_inside_the_limits(suite: ParitySuite, case: ParityCase, tmp_path: Path) -> None:
    config = suite.configs[case.config]
    write_checkpoint(config, tmp_path, seed=case.weights)
    names, rows = module_names(config), resolve_rows(case.rows, suite.configs[case.config])
    truth, single = (
        outputs(load_text_model(tmp_path, dtype=dtype), names, rows)
        for dtype in (torch.float64, torch.float32)
    )
    apart = {name: float((single[name] - truth[name]).norm() / truth[name].norm()) for name in names}
    limit = SHARE * case.tolerance.relative
    assert {name: distance for name, distance in apart.items() if not distance < limit} == {}
