"""What processes that work side by side are told of the machine they share.

Environment variables, because both libraries read them once, when a process starts. What is set already is
left as it is.
"""

from __future__ import annotations

import os

THREADS = "CONFORMANCE_THREADS"
"""Variable with the number of threads that the bundled implementation has where a request names none."""
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
"""Of glibc (mallopt(3)), in bytes: up to this size memory comes from the heap, and that much of it is kept.

By default a tensor of some megabytes is mapped afresh by each operation and given back after it, and the
kernel clears its pages every time: a fifth of what a gate took."""


def variables(workers: int) -> dict[str, str]:
    """Variables for each of some processes that work at the same time, less those that are set.

    One thread for each, as engines and the bundled implementation have anyway: models of suites are small,
    and threads of PyTorch wait for one another by turning in circles, which takes the cores from those they
    wait for. One process alone keeps PyTorch's default for what it does besides.

    Args:
        workers: How many processes, 1 or more.
    """
    wanted = _ALLOCATOR | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})
    return {name: value for name, value in wanted.items() if name not in os.environ}
