"""What a fault is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

Patch = Callable[[], AbstractContextManager[object]]
"""Makes a change to `model_impl` that is in force while the context is open."""


@dataclass(frozen=True)
class Fault:
    """A known bug that can be switched on in the bundled implementation.

    The patch lives here and not in `model_impl`, which holds no fault code.
    """

    id: str
    """Short kebab-case name."""
    title: str
    """What the faulty implementation does, as one sentence."""
    source: tuple[str, ...]
    """Where the bug was seen: catalogue ids."""
    kind: str
    """Kind of the suites that must notice it: `parser`, `template`, …"""
    area: str
    """Area of the dashboard in which the failure shows; set down before the fault's first run."""
    module: str
    """Dotted name of the patched module of `model_impl`."""
    patches: tuple[Patch, ...]
    where: str = ""
    """Pattern of the module that a parity case must name first; empty for other kinds."""
    written_in: str = __name__
    """Dotted name of the module of `conformance.faults` that holds the patch."""
    in_ranks: bool = False
    """It is one of `conformance.faults.ranks`, and in the processes of a layout too, which are started while
    it is on."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Switch the bug on for the body."""
        with ExitStack() as stack:
            for make in self.patches:
                stack.enter_context(make())
            if self.in_ranks:
                stack.enter_context(_in_ranks(self.id))
            yield


def _in_ranks(fault_id: str) -> AbstractContextManager[object]:
    from model_impl.parallel import group  # with torch, which faults of parsers and templates do without
    from model_impl.parallel.messages import Preparation

    return patch.object(group, "PREPARATION", Preparation("conformance.faults.ranks", "switch_on", fault_id))


def replace(owner: object, name: str, new: object) -> Patch:
    """A patch that sets one attribute."""
    return lambda: patch.object(owner, name, new)


class Collection:
    """Faults of one class of the catalogue; a decorator adds them where they are written."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.faults: list[Fault] = []

    def __call__(
        self,
        fault_id: str,
        *,
        source: tuple[str, ...],
        area: str,
        module: object,
        where: str = "",
        in_ranks: bool = False,
    ) -> Callable[[Callable[[], Patch | tuple[Patch, ...]]], None]:
        """Register the decorated function: its docstring is the title, its result the patch."""

        def register(make: Callable[[], Patch | tuple[Patch, ...]]) -> None:
            made = make()
            title = (make.__doc__ or "").strip()
            name = getattr(module, "__name__", "")
            patches = made if isinstance(made, tuple) else (made,)
            here = make.__module__
            self.faults.append(
                Fault(fault_id, title, source, self.kind, area, name, patches, where, here, in_ranks)
            )

        return register
