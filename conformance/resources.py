"""Where the package's data files are: in a checkout beside the package, in a wheel inside it."""

from __future__ import annotations

from pathlib import Path

from conformance.errors import ConformanceError

_PACKAGE = Path(__file__).resolve().parent


def checkout_root() -> Path | None:
    """Root of the source tree that this package runs from, or None when it is installed."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "suites").is_dir() else None


def suites_dir() -> Path:
    """The suites that come with the harness."""
    return _data("suites")


def ci_dir() -> Path:
    """The matrix of CI, and what was measured of it."""
    return _data("ci")


def templates_dir() -> Path:
    """Jinja2 templates of the dashboard."""
    return _data("reports/templates")


def assets_dir() -> Path:
    """Style sheets and other static files of the dashboard."""
    return _data("reports/assets")


def schemas_dir() -> Path:
    """JSON Schemas of suites, run files and command outputs."""
    return _PACKAGE / "schemas"


def task_data(task: str) -> Path:
    """Documents of a bundled task, JSON Lines."""
    return _PACKAGE / "tasks" / "data" / f"{task}.jsonl"


def _data(name: str) -> Path:
    root = checkout_root()
    path = (root if root is not None else _PACKAGE / "data") / name
    if not path.is_dir():
        raise ConformanceError(
            f"{path}: this data folder of the package is missing; install gemma4-conformance again"
        )
    return path
