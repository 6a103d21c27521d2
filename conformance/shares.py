"""What processes that work side by side are told of the machine they share.

Environment variables, because both libraries read them once, when a process starts. What is set already is
left as it is.
"""

from __future__ import annotations

import os

_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
"""Of glibc (mallopt(3)), in bytes: up to this size memory comes from the heap, and that much of it is kept.

By default a tensor of some megabytes is mapped afresh by each operation and given back after it, and the
kernel clears its pages every time: a fifth of what a gate took."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def variables(workers: int) -> dict[str, str]:
    """Variables for each of some processes that work at the same time, less those that are set.

    Threads of PyTorch wait for one another by turning in circles: with one for each core in every process,
    they mostly take the cores from those they wait for. One process alone keeps PyTorch's default.

    Args:
        workers: How many processes, 1 or more.
    """
    wanted = dict(_ALLOCATOR)
    if workers > 1:
        wanted["OMP_NUM_THREADS"] = str(max(1, cores() // workers))
    return {name: value for name, value in wanted.items() if name not in os.environ}
