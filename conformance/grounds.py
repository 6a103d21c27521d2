"""What the results of long work rest on, as short digests: sources that bear on a verdict, and cases.

A result whose grounds are no more those of today is stale; that is found without running anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import model_impl
from conformance import commands, runfile
from conformance.loading import LoadedCase

_PATCHES = (
    "architecture",
    "evaluation",
    "layouts",
    "lora",
    "masks",
    "media",
    "parser",
    "processing",
    "ranks",
    "runtime",
    "template",
)
_OF_NO_VERDICT = (
    *(f"conformance/faults/{name}.py" for name in _PATCHES),
    *(
        "conformance/faults/places",
        "conformance/faults/pointers",
        "conformance/faults/record.py",
        "conformance/faults/written.py",
        "conformance/gates/record.py",
        "conformance/sealed.py",
    ),
    *("conformance/reporting/", "conformance/schemas/", "conformance/service/"),
    *("conformance/store/", "conformance/workflows/", "conformance/backtests/", "conformance/targets/locks/"),
    *("conformance/report.py", "conformance/history.py", "conformance/matrix.py", "conformance/covering.py"),
    *("conformance/ray_executor.py", "conformance/cli.py", "conformance/nightly"),
    *("conformance/comparison.py", "conformance/resources.py"),
    *("model_impl/nano/sources.py", "model_impl/nano/drawn.py"),
)
"""Beginnings of files whose change makes no result doubtful. Each fault's own patch and place count by
themselves."""
_COMMANDS = ("run.py", "selection.py")
"""Those commands that bear on verdicts: what is run, and how it is gone on with."""
OF_TRIALS = ("conformance/execute.py", "conformance/trials")
"""Files that bear on trials only."""
OF_ENGINES = tuple(
    f"conformance/worker/adapters/{name}" for name in ("sglang_parsers", "transformers", "vllm", "wave")
)
"""Beginnings of files that drive engines in environments of their own, never the bundled implementation."""
_SHORT = 16


def sources(*without: str) -> str:
    """Digest of the harness and the bundled implementation, as far as they bear on a verdict.

    Args:
        without: Beginnings of more files that do not count.
    """
    others = (path.name for path in Path(commands.__path__[0]).glob("*.py") if path.name not in _COMMANDS)
    of_others = (f"conformance/commands/{name}" for name in sorted(others))
    return runfile.harness_digest((*_OF_NO_VERDICT, *of_others, *_manifests(), *without))[:_SHORT]


def _manifests() -> list[str]:
    """Of bundled checkpoints: how they came about. Their other files count, in which it would show."""
    root = Path(model_impl.__path__[0])
    found = sorted(root.glob("nano/checkpoints/*/manifest.json"))
    return [f"model_impl/{path.relative_to(root).as_posix()}" for path in found]


def of_cases(cases: Iterable[LoadedCase]) -> str:
    """Digest of cases, whatever their order."""
    return of_text("\n".join(sorted(f"{case.address} {case.digest}" for case in cases)))


def of_text(text: str) -> str:
    """Digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:_SHORT]
