"""Processes that benchmarks ask in turns, a JSON line each way."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Peer:
    """A process that holds one implementation.

    Args:
        name: What errors call it.
        command: Its interpreter, script and arguments.
        import_paths: Folders that it imports from besides.
    """

    def __init__(self, name: str, command: Sequence[str | Path], import_paths: Sequence[Path] = ()) -> None:
        paths = [*map(str, import_paths), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self.name = name

    def ask(self, **question: Any) -> dict[str, Any]:
        """One exchange; the first waits for the model.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
