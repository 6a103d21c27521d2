"""How far apart implementations are that are all right, in bfloat16: what the limits of parity rest on.

The rows of a suite's cases, and further ones drawn like them, go through the oracle in float32 and, in
bfloat16, through the oracle, its eager backend and the backends of the bundled implementation. For every
module the distance from float32 is held against the oracle's own, by both measures of
`conformance.checks.tensors.distance`. Passes in which rounding alone chooses other experts are left out, as
the check leaves them open.

    python bench/rounding.py parity/e2b-like --draws 4

prints, for each implementation, the ratios' 99 %, 99.9 % and largest, and in how many passes some module is
further than a limit allows: with the factor of the case for both measures, and as the check has it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conformance.checks import parity, tensors
from conformance.loading import LoadedCase, load_suites
from conformance.oracles import Wanted
from conformance.runner import TargetPool
from conformance.suites import ParityCase, ParitySuite, RandomRows

SECONDS = 120.0
"""For one pass."""
_DRAW = 1000
"""Between the seeds of a case's rows and of those drawn like them."""
ORACLES_OTHER = "oracle, eager"
BACKENDS = ("eager", "sdpa", "flex")


@dataclass(frozen=True)
class Apart:
    """A module's distance from float32, over the oracle's own."""

    norm: float
    largest: float
    factor: float
    """Of the case."""


Pass = Mapping[str, Sequence[Apart]]
"""By implementation, every module of one forward pass."""


def passes(cases: Sequence[LoadedCase], draws: int) -> Iterator[Pass]:
    """Run cases in bfloat16, each with its own rows and others.

    Args:
        cases: Of kind `parity`. Those that ask for a backend or have written rows are left out: a draw cannot
            change them.
        draws: Passes of each.
    """
    with contextlib.closing(TargetPool(timeout=SECONDS)) as pool:
        for loaded in cases:
            case, suite = loaded.case, loaded.suite.suite
            assert isinstance(case, ParityCase)
            assert isinstance(suite, ParitySuite)
            if case.attention is None and isinstance(case.rows, RandomRows):
                for draw in range(draws):
                    rows = case.rows.model_copy(update={"seed": case.rows.seed + _DRAW * draw})
                    found = _one_pass(pool, suite, case.model_copy(update={"rows": rows}))
                    if found:
                        yield found


def _one_pass(pool: TargetPool, suite: ParitySuite, case: ParityCase) -> Pass:
    config = suite.configs[case.config]
    names = case.modules or parity.module_names(config)
    rows = pool.oracles.prompts(case.rows, config).rows
    wanted = Wanted(config, case.weights, rows, case.prefill, names)
    truth = pool.oracles.ask(suite.oracle, wanted, "float32")
    own = pool.oracles.ask(suite.oracle, wanted, "bfloat16")
    exact, rounded = tensors.read(truth.path), tensors.read(own.path)
    routers = [name for name in names if name.endswith(".router")]
    if not all(tensors.same_experts(exact[name], rounded[name]) for name in routers):
        return {}
    base = {name: tensors.distance(rounded[name], exact[name]) for name in names}
    found = {}
    asked = {ORACLES_OTHER: (suite.oracle, "eager")} | {name: ("reference", name) for name in BACKENDS}
    for who, (spec, attention) in asked.items():
        request = pool.oracles.request(wanted, dtype="bfloat16", attention=attention)
        theirs = tensors.read(pool.get(spec).target.forward(request).path)
        distances = {name: tensors.distance(theirs[name], exact[name]) for name in names}
        found[who] = [
            Apart(
                norm=ratio(distances[name].relative, base[name].relative),
                largest=ratio(distances[name].maximum, base[name].maximum),
                factor=case.factor,
            )
            for name in names
        ]
    return found


def ratio(theirs: float, own: float) -> float:
    """One over the other; 1 where both are exact."""
    if own > 0:
        return theirs / own
    return 1.0 if theirs == 0 else math.inf


def beyond(found: Sequence[Apart], extremes: float) -> bool:
    """Whether some module is further than allowed, with so much more for the largest difference."""
    return any(at.norm > at.factor or at.largest > extremes * at.factor for at in found)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def table(found: Sequence[Pass]) -> Iterator[str]:
    """The lines that are printed."""
    yield f"{len(found)} passes, {sum(len(next(iter(one.values()))) for one in found)} modules"
    head = f"{'':15}{'norm: 99 %':>12}{'99.9 %':>9}{'most':>7}{'largest: 99 %':>16}{'99.9 %':>9}{'most':>7}"
    yield f"{head}{'beyond x1':>12}{f'x{parity.EXTREMES:g}':>7}"
    for who in found[0]:
        every = [at for one in found for at in one[who]]
        cells = f"{who:15}"
        for widths, values in (
            ((12, 9, 7), [at.norm for at in every]),
            ((16, 9, 7), [at.largest for at in every]),
        ):
            numbers = (quantile(values, 0.99), quantile(values, 0.999), max(values))
            cells += "".join(f"{n:>{width}.2f}" for n, width in zip(numbers, widths, strict=True))
        plain, allowed = (sum(beyond(one[who], x) for one in found) for x in (1.0, parity.EXTREMES))
        yield f"{cells}{plain:>12}{allowed:>7}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How far apart right implementations are in bfloat16.")
    parser.add_argument("suite", nargs="*", default=["parity/e2b-like"], help="of kind parity")
    parser.add_argument("--draws", type=int, default=4, help="passes for each case (default: 4)")
    options = parser.parse_args()
    cases = [
        case
        for case in load_suites().cases
        if case.suite.suite.id in options.suite and isinstance(case.case, ParityCase)
    ]
    if not cases or options.draws < 1:
        raise SystemExit("name suites of kind parity, and one draw or more")
    found = list(passes(cases, options.draws))
    if not found:
        raise SystemExit("in every pass rounding alone chose other experts; name another suite")
    for line in table(found):
        print(line)


if __name__ == "__main__":
    main()
