"""Which functions of the bundled implementation a case runs.

A fault replaces functions. A case that runs none of them without the fault does the same with it, and need
not be asked: what is left are the cases that the fault can change at all.

It is always safe to ask. So a case whose work is done in other processes, which are not watched, reaches
every function, and every case is asked about a fault that replaces anything but functions of the
implementation.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Self
from unittest import mock

import conformance
import model_impl
from conformance.faults.base import Fault

_ROOTS = {package.__name__: Path(package.__file__ or "").parent for package in (model_impl, conformance)}
_EVALUATION = (
    "answering.py",
    "evaluation.py",
    "evaluation_tasks.py",
    "lm_eval_model.py",
    "scoring.py",
    "targets/reference_chat.py",
    "tasks/*.py",
)
"""Files of the harness that faults patch."""
_STARTS_PROCESSES = "model_impl.parallel.group:"
"""Beginning of the names of functions after which processes run that are not watched."""

Reached = Mapping[str, frozenset[str]]
"""Functions by the address of a case, named as `model_impl.text:TextModel.forward`."""


class Watch(AbstractContextManager["Watch"]):
    """Watches the bundled implementation, in all threads that start meanwhile.

    What modules keep between calls is dropped before each case, as a later case would not run what filled it.
    """

    def __init__(self) -> None:
        # Commands that watch nothing need not wait for it.
        from coverage import Coverage

        self._coverage = Coverage(data_file=None, config_file=False, include=[str(path) for path in _files()])

    def __enter__(self) -> Self:
        self._coverage.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._coverage.stop()

    def case(self, address: str) -> None:
        """What runs from now on, a case runs."""
        forget()
        self._coverage.switch_context(address)

    def reached(self) -> Reached:
        """The functions that each case has run."""
        data = self._coverage.get_data()
        found: dict[str, set[str]] = defaultdict(set)
        for file in data.measured_files():
            functions = _functions(Path(file))
            for line, cases in data.contexts_by_lineno(file).items():
                for name in functions.get(line, ()):
                    for case in cases:
                        found[case].add(name)
        return {case: frozenset(names) for case, names in found.items()}


def forget() -> None:
    """Empty all caches of functions of the implementation and of the harness (`functools.cache`)."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in _ROOTS]
    for value in [value for module in modules for value in vars(module).values()]:
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


def can_reach(replaced: frozenset[str] | None, functions: frozenset[str]) -> bool:
    """Whether a case can be changed by a fault.

    Args:
        replaced: What the fault replaces, by `replaced`.
        functions: What the case runs without it.
    """
    if replaced is None or any(name.startswith(_STARTS_PROCESSES) for name in functions):
        return True
    return not replaced.isdisjoint(functions)


def replaced(fault: Fault) -> frozenset[str] | None:
    """The functions of the bundled implementation that a fault replaces; None if that cannot be told."""
    found: set[str] = set()
    for make in fault.patches:
        names = _names(make())
        if not names:
            return None
        found |= names
    return frozenset(found)


def _names(patch: AbstractContextManager[object]) -> set[str]:
    """Of the functions that a patch replaces; empty if it replaces anything else."""
    if not isinstance(patch, mock._patch) or not isinstance(patch.attribute, str):
        return set()
    try:
        original = inspect.getattr_static(patch.getter(), patch.attribute)
    except AttributeError:
        return set()
    functions = _beneath(original)
    names = {f"{function.__module__}:{function.__qualname__}" for function in functions}
    return names if names and names <= _all_names() else set()


def _beneath(original: Any) -> list[FunctionType]:
    """The functions that an attribute stands for."""
    if isinstance(original, property):
        parts = [part for part in (original.fget, original.fset, original.fdel) if part is not None]
    elif isinstance(original, (staticmethod, classmethod)):
        parts = [original.__func__]
    elif isinstance(original, functools.cached_property):
        parts = [original.func]
    else:
        parts = [original]
    unwrapped = [inspect.unwrap(part) for part in parts]
    return unwrapped if all(isinstance(part, FunctionType) for part in unwrapped) else []


@functools.cache
def _all_names() -> frozenset[str]:
    return frozenset(name for file in _files() for names in _functions(file).values() for name in names)


@functools.cache
def _files() -> tuple[Path, ...]:
    """All that is watched."""
    harness = _ROOTS[conformance.__name__]
    evaluation = (path for pattern in _EVALUATION for path in harness.glob(pattern))
    return (*_ROOTS[model_impl.__name__].rglob("*.py"), *evaluation)


@functools.cache
def _functions(file: Path) -> Mapping[int, tuple[str, ...]]:
    """By line: the functions in whose body it is, those around others included."""
    name, root = next((name, root) for name, root in _ROOTS.items() if file.is_relative_to(root))
    module = ".".join([name, *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
    found: dict[int, list[str]] = defaultdict(list)
    for name, node in _walk(ast.parse(file.read_text(encoding="utf-8")), ""):
        assert node.end_lineno is not None
        for line in range(node.body[0].lineno, node.end_lineno + 1):
            found[line].append(f"{module}:{name}")
    return {line: tuple(names) for line, names in found.items()}


def _walk(node: ast.AST, around: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions with their qualified names."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield f"{around}{name}", child
                yield from _walk(child, f"{around}{name}.<locals>.")
            case ast.ClassDef(name=name):
                yield from _walk(child, f"{around}{name}.")
            case _:
                yield from _walk(child, around)
