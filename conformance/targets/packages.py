"""Run pip, and Python, for the environments of engines; what they print becomes progress."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from conformance.errors import TargetError

Progress = Callable[[str], None]

_SCRUBBED = (
    "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__",
    "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON",
)  # fmt: skip
"""Variables that would make pip or Python look or install elsewhere."""


def pip_install(python: Path, arguments: Sequence[str], what: str, progress: Progress) -> None:
    """`pip install` with the pip of an environment.

    Raises:
        TargetError: pip failed; with the end of what it printed.
    """
    pip = [str(python), "-m", "pip", "install", "--no-compile", "--progress-bar", "off"]
    run([*pip, *arguments], f"{what}: pip", progress)


def run(command: Sequence[str], what: str, progress: Progress) -> None:
    """Run a command, reporting what pip does.

    Raises:
        TargetError: it fails; with the end of what it printed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _SCRUBBED}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    tail: deque[str] = deque(maxlen=20)
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in _lines(process):
                tail.append(line)
                if line.startswith(("Downloading ", "Installing collected")):
                    progress(line if len(line) < 100 else f"{line[:97]}…")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        end = "\n".join(tail)
        raise TargetError(
            f"{what} failed with exit code {process.returncode}; nothing was installed. It printed:\n{end}"
        )


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()
