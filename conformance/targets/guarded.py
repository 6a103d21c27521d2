"""What every process of an engine gets from this one, and how it ends, whatever happens.

It runs under `conformance.worker.guardian`, in a scratch folder of its own, and sees of this process's
environment and of its packages only what is listed here. All files and sockets that it makes for itself lie
in that folder, which the guardian deletes at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import conformance

STOP_GRACE = 3.0
"""Seconds that an engine has to end once it is told to; its guardian kills it after two."""

_PASSED_ON = (
    "CUDA_VISIBLE_DEVICES", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "LOGNAME",
    "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS", "PATH", "PYTHONHASHSEED",
    "TZ", "USER",
)  # fmt: skip
"""All that an engine gets to see of this process's environment: the rest may hold secrets or change
how the engine behaves."""

_FIXED = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONUTF8": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def scratch_folder() -> Path:
    """A new folder.

    In it `import/`, which holds this one package and nothing else it is installed with, and `tmp/`, for all
    that the engine leaves lying about.
    """
    scratch = Path(tempfile.mkdtemp(prefix="conformance-"))
    package = Path(conformance.__file__).parent
    (scratch / "tmp").mkdir()
    (scratch / "import").mkdir()
    (scratch / "import" / package.name).symlink_to(package, target_is_directory=True)
    return scratch


def variables(scratch: Path, extra: Mapping[str, str], import_paths: Sequence[Path]) -> dict[str, str]:
    """The environment variables of an engine.

    Args:
        scratch: Its folder, from `scratch_folder`.
        extra: Variables of its own, which win.
        import_paths: Folders that it may import from, besides its own environment.
    """
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    paths = [scratch / "import", *import_paths]
    return {
        "OMP_NUM_THREADS": "1",
        # Sets of strings have an order by chance otherwise, and with it what an engine does: F-252 in
        # docs/findings.md answers with another adapter in each process. Trials vary it.
        "PYTHONHASHSEED": "0",
        **passed_on,
        **_FIXED,
        "TMPDIR": str(scratch / "tmp"),
        "VLLM_RPC_BASE_PATH": str(scratch / "tmp"),
        "CONFORMANCE_SCRATCH": str(scratch),
        **extra,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }


def ending(code: int) -> str:
    """An exit code in words, as a guardian or the kernel gives it: `ended with exit code 1`."""
    if code < 0 or code > 128:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code if code < 0 else code - 128).name}"
    return f"ended with exit code {code}"


def end(process: subprocess.Popen[bytes], scratch: Path, owner: int) -> None:
    """Tell the guardian to kill everything, or do so if it does not; delete the scratch folder.

    Args:
        process: The guardian.
        scratch: The folder.
        owner: Process that started it; a fork of that one ends nothing.
    """
    if os.getpid() != owner:
        return
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
