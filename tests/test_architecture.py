"""Who may import whom: plugins import core, core imports no plugin, and nobody what is not declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "influence_framework"
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}
"""Import names of the distributions whose names differ."""


@cache
def project(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return parsed


def names(requirements: list[str]) -> set[str]:
    """Distribution names of requirements like ``torch>=2.6``."""
    return {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements}


def modules(requirements: list[str]) -> set[str]:
    return {MODULES.get(name, name.replace("-", "_")) for name in names(requirements)}


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} holds no source"
    return found


def package(name: str) -> Path:
    return PLUGINS[name] / f"influence_framework_{name}"


def imports(tree: ast.AST, *, for_types: bool = True) -> Iterator[str]:
    """Dotted names of all modules imported anywhere, in functions and for type checkers included."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module or ""


def roots(path: Path) -> set[str]:
    """Top-level packages that a file imports, the standard library left out."""
    tree = ast.parse(path.read_text())
    return {name.partition(".")[0] for name in imports(tree)} - set(sys.stdlib_module_names)


def strings(tree: ast.Module) -> Iterator[str]:
    """String constants that are no documentation."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


@pytest.mark.parametrize("path", sources(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_core_knows_no_plugin(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [name for name in imports(tree) if name.startswith("influence_framework_")] == []
    assert [text for text in strings(tree) if re.search(r"\binfluence_framework_[a-z]", text)] == []


def test_core_depends_on_six_distributions() -> None:
    expected = {"torch", "pluggy", "numpy", "scipy", "tqdm", "jaxtyping"}
    assert names(project(ROOT)["dependencies"]) == expected


@pytest.mark.parametrize("path", sources(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_core_imports_what_it_declares(path: Path) -> None:
    allowed = {"influence_framework", *modules(project(ROOT)["dependencies"])}
    if "cli" in path.relative_to(CORE).parts:
        allowed |= modules(project(ROOT)["optional-dependencies"]["demo"])
    if {"cli", "reporting"} & set(path.relative_to(CORE).parts):
        # markupsafe is what jinja2 marks text with.
        allowed |= {*modules(project(ROOT)["optional-dependencies"]["report"]), "markupsafe"}
    extras = {"reports.py": "pandas", "outputs.py": "pandas", "store.py": "store", "files.py": "save"}
    extras["sklearn.py"] = "sklearn"
    if path.name in extras:
        allowed |= modules(project(ROOT)["optional-dependencies"][extras[path.name]])
    assert roots(path) <= allowed


def test_core_has_no_import_cycle() -> None:
    """Not even one that Python would forgive."""
    graph = {}
    for path in sources(CORE):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        # The package itself gathers all names: importing them from there would be a cycle in the making.
        graph[dotted] = {
            name for name in imports(tree, for_types=False) if name.startswith("influence_framework.")
        }
    TopologicalSorter(graph).prepare()


def test_the_protocols_depend_on_nothing_but_errors() -> None:
    tree = ast.parse((CORE / "protocols.py").read_text())
    ours = {name for name in imports(tree, for_types=False) if name.startswith("influence_framework")}
    assert ours == {"influence_framework.errors"}


@pytest.mark.parametrize("name", list(PLUGINS))
class TestPlugins:
    def test_imports_core_and_what_it_declares(self, name: str) -> None:
        declared = modules(project(PLUGINS[name])["dependencies"])
        assert "influence_framework" in declared
        allowed = {f"influence_framework_{name}", *declared, *modules(project(ROOT)["dependencies"])}
        for path in sources(package(name)):
            assert roots(path) <= allowed, path

    def test_depends_on_no_other_plugin(self, name: str) -> None:
        ours = {
            dependency
            for dependency in names(project(PLUGINS[name])["dependencies"])
            if "influence" in dependency
        }
        assert ours == {"influence-framework"}

    def test_is_a_distribution_like_the_others(self, name: str) -> None:
        declared = project(PLUGINS[name])
        assert declared["name"] == f"influence-framework-{name}"
        assert declared["entry-points"] == {"influence_framework": {name: f"influence_framework_{name}"}}
        assert declared["requires-python"] == project(ROOT)["requires-python"]
        assert (package(name) / "py.typed").exists()
        assert (PLUGINS[name] / "README.md").exists()
        assert list((PLUGINS[name] / "tests").glob("test_*.py")), "it has no test"
