"""Every promise of the documentation names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::([\w:]+)`", PAGE)))


def names_of_tests(path: Path) -> set[str]:
    """Names of test functions, those of classes as ``Class::name``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_every_test_that_is_named_exists(path: str, name: str) -> None:
    assert name.rpartition("::")[2].startswith("test_")
    assert name in names_of_tests(ROOT / path)


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if re.match(r"\| (?!Promise|Wrong result|-)", line)]
    assert len(rows) > 40
    assert [row for row in rows if "::test_" not in row] == []


def test_every_test_of_a_known_wrong_result_is_on_the_page() -> None:
    listed = {f"{path}::{name}" for path, name in NAMED}
    missing = []
    for path in sorted([*ROOT.glob("tests/test_*.py"), *ROOT.glob("plugins/*/tests/test_*.py")]):
        place = path.relative_to(ROOT).as_posix()
        pitfalls = {name for name in names_of_tests(path) if name.startswith("test_pitfall_")}
        missing += [f"{place}::{name}" for name in pitfalls if f"{place}::{name}" not in listed]
    assert missing == []
