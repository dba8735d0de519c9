"""What the commands of the repository install and run: one version of everything, each plugin everywhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.typechecked import CheckedLoader

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLUGINS = [tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]
PACKAGES = sorted(path.name for path in ROOT.glob("plugins/*/influence_framework_*"))


def pins(path: Path) -> dict[str, str]:
    """Versions by normalised name; every line but comments must be an exact pin."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    exact = [re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line) for line in lines]
    assert all(exact), [line for line, match in zip(lines, exact, strict=True) if not match]
    return {normal(match[1]): match[2] for match in exact if match}


def normal(requirement: str) -> str:
    """The distribution's normalised name."""
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def requirements() -> set[str]:
    """All that any pyproject.toml here asks for, our own distributions left out."""
    asked: list[str] = []
    for parsed in (PROJECT, *PLUGINS):
        asked += parsed["build-system"]["requires"]
        asked += parsed["project"]["dependencies"]
    for extra in ("demo", "report"):
        asked += PROJECT["project"]["optional-dependencies"][extra]
    for group in PROJECT["dependency-groups"].values():
        asked += group
    return {normal(requirement) for requirement in asked} - {"influence-framework"}


def test_constraints_pin_all_that_is_installed() -> None:
    assert requirements() | {"pip"} <= set(pins(ROOT / "constraints.txt"))


def test_constraints_are_sorted() -> None:
    names = list(pins(ROOT / "constraints.txt"))
    assert names == sorted(names)


def test_the_benchmark_measures_the_torch_that_the_tests_run_with() -> None:
    assert pins(ROOT / "benchmarks/requirements.txt")["torch"] == pins(ROOT / "constraints.txt")["torch"]


def test_versions_of_core_and_plugins_go_together() -> None:
    major, minor, _ = PROJECT["project"]["version"].split(".")
    for plugin in PLUGINS:
        (core,) = [d for d in plugin["project"]["dependencies"] if normal(d) == "influence-framework"]
        assert core == f"influence-framework>={major}.{minor},<{major}.{int(minor) + 1}"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_plugin_is_checked_like_core(package: str) -> None:
    tools = PROJECT["tool"]
    name = package.removeprefix("influence_framework_")
    assert package in tools["mypy"]["packages"]
    assert f"plugins/{name}" in tools["mypy"]["mypy_path"].split(":")
    assert isinstance(importlib.import_module(package).__loader__, CheckedLoader)


def recipe(target: str) -> str:
    """What make would run for a target in a repository that nothing was installed in."""
    command = ["make", "--dry-run", "--always-make", target]
    # Under `make test` the flags of that make would be taken over.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs"])
def test_each_target_installs_core_and_every_plugin_at_pinned_versions(target: str) -> None:
    commands = recipe(target)
    (install,) = [line for line in commands.replace("\\\n", "").splitlines() if "--editable" in line]
    assert "--constraint constraints.txt" in install
    assert "--editable '.[demo]'" in install
    for plugin in ROOT.glob("plugins/*/pyproject.toml"):
        assert f"--editable ./plugins/{plugin.parent.name}" in install
    for group in PROJECT["dependency-groups"]:
        assert f"--group {group}" in install


def test_continuous_integration_runs_what_developers_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make test", "make docs"]
    assert "mypy" in recipe("lint")
    assert "ruff check" in recipe("lint")
    assert "ruff format --check" in recipe("lint")
    assert "mkdocs build --strict" in recipe("docs")
    everything = r"-m pytest --numprocesses auto$"
    assert re.search(everything, recipe("test"), re.MULTILINE), "some tests are left out"
