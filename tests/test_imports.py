"""Which module may import which: read from the sources, imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("conformance", "model_impl")


def _graph(root: Path) -> dict[str, set[str]]:
    files = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    modules = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }
    graph = {}
    for name, file in modules.items():
        found = _imports(ast.parse(file.read_text(encoding="utf-8")))
        # The module of a package, or the package where a name of its own is imported.
        graph[name] = {other if other in modules else other.rpartition(".")[0] for other in found}
        graph[name] &= modules.keys() - {name}
    return graph


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names; those for type checkers alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imports(node)


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(_graph(ROOT)).prepare()


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "conformance").mkdir()
    (tmp_path / "conformance" / "a.py").write_text("from conformance import b\n")
    (tmp_path / "conformance" / "b.py").write_text("def f():\n    from conformance.a import x\n")
    with pytest.raises(CycleError):
        TopologicalSorter(_graph(tmp_path)).prepare()


def test_the_implementation_knows_nothing_of_the_harness() -> None:
    graph = _graph(ROOT)
    assert "model_impl.config" in graph["model_impl.text"], "imports are found"
    for name, imported in graph.items():
        if name.startswith("model_impl"):
            assert not [other for other in imported if other.startswith("conformance")], name
