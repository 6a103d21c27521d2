"""How the time of parsers grows with the output, on outputs made to make it grow.

A parser that looks at every character a bounded number of times takes ten times as long for ten times the
text. The reference must (at most 12 times, in one run on one machine); beside it stand the other targets,
at sizes they can bear. What the columns mean: bench/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from conformance.errors import ConformanceError, TargetTimeoutError
from conformance.suites import PROMPTS
from conformance.targets.protocol import Chunking, ParseRequest, StreamRequest, Target
from conformance.targets.registry import default_targets, open_target, unavailable
from conformance.tokenization import encode, pieces
from model_impl.chat.parser import MessageBuilder, Parser

MAX_GROWTH = 12.0
"""Largest ratio of times for ten times the text that counts as linear: 10, and a fifth for noise."""

PATIENCE = 120.0
"""Seconds that one measurement of the reference may take; above, its sizes are divided by ten."""

SHORTEST = 0.002
"""Seconds that the smaller output must take, or both become ten times as large: below, caches decide."""

SETTLED = 0.3
"""Seconds for which a measurement is repeated, at least twice; the least counts."""

LONG = 5.0
"""Seconds after which a measurement is not repeated."""

Mode = Literal["whole", "streamed"]
Q = '<|"|>'
_CALL = "<|tool_call>call:f{"

FAMILIES: dict[str, tuple[str, str]] = {
    "unclosed string": (f"{_CALL}a:{Q}", "some words, "),
    "nested brackets": (f"{_CALL}a:", "["),
    "repeated openers": ("", "<|tool_call>"),
    "marker prefixes": ("", "<|tool_cal"),
    "quotes that never close": (f"{_CALL}a:", "'x "),
    "calls after an open quote": ("<|tool_call>", "call:f{a:'x} "),
    "calls in one wrapper": ("<|tool_call>", "call:f{a:1}"),
    "stray markers in a quote": (f"{_CALL}a:'", "<pad>x"),
}
"""Each output is the first text, and the second as often as it fits."""


@dataclass(frozen=True)
class Measurement:
    """One family in one mode at two sizes."""

    target: str
    family: str
    mode: Mode
    sizes: tuple[int, int]
    """Characters."""
    seconds: tuple[float | None, float | None]
    """None: not measured, for the reason in `note`."""
    note: str = ""

    @property
    def growth(self) -> float | None:
        """Time of the larger output over that of the smaller one, as if it were ten times as large."""
        small, large = self.seconds
        if small is None or large is None:
            return None
        return large / max(small, 1e-9) * 10 * self.sizes[0] / self.sizes[1]


def build(family: str, size: int) -> str:
    """An output of this family with `size` characters."""
    head, unit = FAMILIES[family]
    return (head + unit * ((size - len(head)) // len(unit) + 1))[:size]


# ---------------------------------------------------------------------------------------- the reference


def parse_directly(output: str, mode: Mode) -> None:
    """Read an output with the reference: in one feed, or character by character."""
    parser, builder = Parser(PROMPTS["model"]), MessageBuilder()
    if mode == "whole":
        builder.add(parser.feed(output))
    else:
        for character in output:
            builder.add(parser.feed(character))
    builder.add(parser.finish())
    builder.message(parser)


def cpu_seconds(output: str, mode: Mode) -> float:
    """Least processor time of some runs: other processes of the machine do not count."""
    least = total = 0.0
    runs = 0
    while total < SETTLED or (runs < 2 and total < LONG):
        gc.collect()
        start = time.process_time()
        parse_directly(output, mode)
        taken = time.process_time() - start
        least = min(least or taken, taken)
        total += taken
        runs += 1
    return least


def measure_reference(family: str, mode: Mode, sizes: tuple[int, int]) -> Measurement:
    """Both sizes of a family; smaller or larger ones where these take too long or are over too soon."""
    note = ""
    small = cpu_seconds(build(family, sizes[0]), mode)
    while small * sizes[1] / sizes[0] > PATIENCE or small < SHORTEST:
        factor, note = (10, "larger, to be measurable") if small < SHORTEST else (0.1, "smaller, for time")
        sizes = (round(sizes[0] * factor), round(sizes[1] * factor))
        small = cpu_seconds(build(family, sizes[0]), mode)
    return Measurement(
        "reference", family, mode, sizes, (small, cpu_seconds(build(family, sizes[1]), mode)), note
    )


# ---------------------------------------------------------------------------------------- any target


def measure_target(target: Target, family: str, mode: Mode, sizes: tuple[int, int]) -> Measurement:
    """Both sizes of a family through the target protocol, in wall time; stops at the first that fails."""
    seconds: list[float | None] = [None, None]
    note = ""
    for number, size in enumerate(sizes):
        request = request_of(build(family, size))
        try:
            answer_time(target, request, mode)  # the first call may start the engine, or compile
            seconds[number] = min(answer_time(target, request, mode) for _ in range(2))
        except TargetTimeoutError:
            note = "time-out"
            break
        except ConformanceError as error:
            note = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            break
    return Measurement(target.spec, family, mode, sizes, (seconds[0], seconds[1]), note)


def request_of(output: str) -> ParseRequest:
    """The request of an output in a fresh turn."""
    prompt = PROMPTS["model"]
    return ParseRequest(output=output, pieces=pieces(output), prompt=prompt, prompt_ids=encode(prompt))


def answer_time(target: Target, request: ParseRequest, mode: Mode) -> float:
    """Seconds until the target has answered.

    Raises:
        ConformanceError: It did not.
    """
    start = time.perf_counter()
    if mode == "whole":
        target.parse(request)
    else:
        cuts = tuple(range(1, len(request.pieces)))
        stream = StreamRequest(request=request, chunkings=(Chunking(name="one token a chunk", cuts=cuts),))
        (result,) = target.parse_stream(stream)
        if result.error:
            raise ConformanceError(result.error)
    return time.perf_counter() - start


@contextmanager
def opened(spec: str, timeout: float) -> Iterator[Target | str]:
    """The target, or why it cannot be measured."""
    try:
        reason = unavailable(spec)
        target = None if reason else open_target(spec, timeout=timeout)
    except ConformanceError as error:
        reason, target = str(error), None
    if target is None:
        yield reason
        return
    try:
        lacking = {"parse", "parse_stream"} - set(target.describe().capabilities)
        yield f"it has no capability {', '.join(sorted(lacking))}" if lacking else target
    finally:
        target.close()


# ---------------------------------------------------------------------------------------- report


def show_reference(console: Console, measurements: Sequence[Measurement]) -> None:
    """One line a measurement."""
    title = "The reference alone: processor time; one character a chunk when streamed"
    table = Table("output", "mode", title=title, title_justify="left")
    for heading in ("characters", "seconds", "growth"):
        table.add_column(heading, justify="right")
    table.add_column()
    for m in measurements:
        table.add_row(
            m.family, m.mode, " → ".join(f"{size:,}" for size in m.sizes), _seconds(m), _growth(m), m.note
        )
    console.print(table)


def show_targets(console: Console, measurements: Sequence[Measurement]) -> None:
    """One line an output and mode, one column a target."""
    if not measurements:
        return
    specs = list(dict.fromkeys(m.target for m in measurements))
    small, large = measurements[0].sizes
    title = (
        f"Every target as the harness asks it: wall time, {small:,} → {large:,} characters; "
        "one token a chunk when streamed"
    )
    table = Table("output", "mode", *specs, title=title, title_justify="left")
    found = {(m.target, m.family, m.mode): m for m in measurements}
    for family, mode in dict.fromkeys((m.family, m.mode) for m in measurements):
        cells = [found[spec, family, mode] for spec in specs]
        table.add_row(family, mode, *(f"{_seconds(m)} s\n{m.note or 'growth ' + _growth(m)}" for m in cells))
    console.print(table)


def _seconds(m: Measurement) -> str:
    return " → ".join("?" if s is None else f"{s:.3f}" for s in m.seconds)


def _growth(m: Measurement) -> str:
    if m.growth is None:
        return "?"
    return f"[red]{m.growth:.1f}[/red]" if m.growth > MAX_GROWTH else f"{m.growth:.1f}"


def main() -> None:
    """Measure, print, and exit with 1 if the reference is not linear."""
    arguments = _arguments()
    console = Console(stderr=arguments.json)
    if not console.is_terminal:
        console.width = 150
    sizes = _characters((0.1, 1.0) if arguments.quick else arguments.sizes)
    target_sizes = _characters((0.0005, 0.005) if arguments.quick else arguments.target_sizes)
    timeout = 10.0 if arguments.quick else arguments.timeout
    modes: tuple[Mode, Mode] = ("whole", "streamed")
    jobs = [(family, mode) for mode in modes for family in FAMILIES]
    reference: list[Measurement] = []
    targets: list[Measurement] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reference", total=len(jobs) * (1 + len(arguments.targets)))
        for family, mode in jobs:
            reference.append(measure_reference(family, mode, sizes))
            progress.advance(task)
        for spec in arguments.targets:
            progress.update(task, description=spec)
            with opened(spec, timeout) as target:
                if isinstance(target, str):
                    console.print(f"{spec} is left out: {target}")
                    progress.advance(task, len(jobs))
                    continue
                for family, mode in jobs:
                    targets.append(measure_target(target, family, mode, target_sizes))
                    progress.advance(task)
    show_reference(console, reference)
    show_targets(console, targets)
    slow = [m for m in reference if m.growth is None or m.growth > MAX_GROWTH]
    if arguments.json:
        print(json.dumps(_document(reference, targets), indent=1))
    if slow:
        names = ", ".join(f"{m.family} ({m.mode})" for m in slow)
        arguments.parser.exit(1, f"the reference grows by more than {MAX_GROWTH:g} times: {names}\n")


def _document(reference: Sequence[Measurement], targets: Sequence[Measurement]) -> dict[str, object]:
    return {
        "max_growth": MAX_GROWTH,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "reference": [{**asdict(m), "growth": m.growth} for m in reference],
        "targets": [{**asdict(m), "growth": m.growth} for m in targets],
    }


def _characters(megabytes: Sequence[float]) -> tuple[int, int]:
    small, large = (round(size * 1_000_000) for size in megabytes)
    return small, large


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    pairs = {
        "--sizes": ((1.0, 10.0), "of the reference's outputs, in million characters"),
        "--target-sizes": ((0.002, 0.02), "the same for all targets"),
    }
    for option, (default, explanation) in pairs.items():
        parser.add_argument(
            option, nargs=2, type=float, default=default, metavar=("SMALL", "LARGE"), help=explanation
        )
    parser.add_argument(
        "--targets", nargs="*", default=default_targets(), metavar="SPEC", help="default: all"
    )
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one answer of a target")
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes, or less")
    parser.add_argument("--json", action="store_true", help="print JSON; the tables go to standard error")
    parser.set_defaults(parser=parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
