"""The floor of the benchmarks of generation: what is below it, and what is noise."""

from __future__ import annotations

import statistics

import pytest

from bench import runtime
from bench.generation import Row, below


def row(
    engine: list[float], other: list[float], *, memory: tuple[int, int] = (900, 1000), batch: int = 8
) -> Row:
    times = {"engine": engine, "transformers": other}
    medians = {peer: statistics.median(each) for peer, each in times.items()}
    return Row(
        model="m",
        parameters=1,
        batch=batch,
        prefill=medians,
        decode=medians,
        memory={"engine": memory[0] * 10**6, "transformers": memory[1] * 10**6},
        bandwidth=0.1,
        rounds={"prefill": times, "decode": times},
    )


def test_a_ratio_is_of_turns_that_follow_each_other() -> None:
    """A machine that is slower for some rounds is slower for both."""
    slowed = row([1.0, 5.0, 1.0, 5.0], [1.2, 6.0, 1.2, 6.0])
    assert slowed.ratios("decode") == {"transformers": pytest.approx(1.2)}
    assert row([1.0, 1.0, 9.0], [1.1, 1.1, 1.1]).ratios("prefill")["transformers"] == pytest.approx(1.1)


def test_what_is_slower_by_more_than_noise_is_below() -> None:
    assert below([row([1.0], [1.0])], "transformers", 0.05) == []
    assert below([row([1.0], [0.96])], "transformers", 0.05) == []
    assert below([row([1.0], [0.94])], "transformers", 0.05) == [
        "batch 8: prefill is 0.94 times as fast as with transformers",
        "batch 8: decode is 0.94 times as fast as with transformers",
    ]


def test_memory_has_no_noise() -> None:
    assert below([row([1.0], [1.5], memory=(1001, 1000))], "transformers", 0.05) == [
        "batch 8: 1001 MB, and transformers takes 1000"
    ]


@pytest.mark.parametrize(
    ("other", "arguments", "code"), [(1.2, (), 0), (0.9, (), 1), (0.9, ("--tolerance", "0.2"), 0)]
)
def test_the_exit_code_tells(
    monkeypatch: pytest.MonkeyPatch, other: float, arguments: tuple[str, ...], code: int
) -> None:
    monkeypatch.setattr(runtime, "memory_bandwidth", lambda: 1e10)
    monkeypatch.setattr(runtime, "measure", lambda *_a, **_o: [row([1.0], [other])])
    monkeypatch.setattr("sys.argv", ["runtime.py", "--peers", "transformers", *arguments])
    assert runtime.main() == code
