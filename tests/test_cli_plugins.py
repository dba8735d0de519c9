"""``influence plugins``: what it lists of what is installed, and of what is not to be used."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import influence_framework as inf
from influence_framework.cli.main import main
from influence_framework.cli.plugins import as_json, overview
from tests.plugins import Stating, solver_plugin


@dataclass(frozen=True)
class Halving:
    """Half of everything, as ``I/2``.

    Attributes:
        steps: How often.
    """

    steps: int
    label: str = "x"

    def fit(self, operator: inf.LinearOperator, regularization: float) -> Any:
        raise NotImplementedError


class Undocumented:
    def fit(self, operator: inf.LinearOperator, regularization: float) -> Any:
        raise NotImplementedError


class TestPlugins:
    def test_lists_what_is_installed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plugins"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "DESCRIPTION"]
        for name, method in inf.solvers.items():
            line = next(line for line in lines if line.split()[0] == name)
            assert line.split()[1:4] == ["solver", method.distribution, method.version]
        assert any(line.startswith("gauss_newton ") and " source " in line for line in lines)

    def test_columns_line_up(self) -> None:
        registry = inf.Registry(
            {"a-rather-long-name": solver_plugin(half=Halving, undocumented=Undocumented)}, installed=False
        )
        header, *rows = overview(registry).splitlines()
        for title in ("KIND", "DISTRIBUTION", "VERSION", "DESCRIPTION"):
            column = header.index(title)
            assert all(row[column - 1] == " " and row[column] != " " for row in rows)
        assert "Half of everything, as I/2." in overview(registry)
        assert "(no description)" in overview(registry)

    def test_verbose_adds_options(self) -> None:
        registry = inf.Registry({"one": solver_plugin(half=Halving)}, installed=False)
        assert "steps" not in overview(registry)
        lines = overview(registry, verbose=True).splitlines()
        assert "    steps: int (required)" in lines
        assert "    label: str = 'x'" in lines

    def test_verbose_says_what_a_method_states_about_itself(self) -> None:
        registry = inf.Registry({"one": solver_plugin(half=Halving, stating=Stating)}, installed=False)
        stated = [
            "    needs an operator with Diagonal, Trace",
            "    can precondition other solvers",
            "    can refine the solutions of other solvers",
            "    takes indefinite systems",
            "    made for the source 'hessian'",
        ]
        described = overview(registry, verbose=True).split("\n\n")
        assert not set(stated) & set(described[0].splitlines())
        assert described[1].splitlines()[1:] == stated
        assert not set(stated) & set(overview(registry).splitlines())

    def test_tracebacks_on_demand(self) -> None:
        def register_solvers(register: Any) -> None:
            raise RuntimeError("not today")

        broken = SimpleNamespace(register_solvers=inf.hookimpl(register_solvers))
        registry = inf.Registry({"bad": broken, "good": solver_plugin(half=Halving)}, installed=False)
        assert "Traceback" not in overview(registry)
        told = overview(registry, tracebacks=True)
        assert "\n\nbad (bad unknown): RuntimeError: not today. Tell its authors" in told
        assert 'raise RuntimeError("not today")' in told
        assert told.count("Traceback (most recent call last)") == 1
        assert told.endswith("RuntimeError: not today")

    def test_the_command_takes_what_is_to_be_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plugins", "--verbose", "--tracebacks"]) == 0
        assert capsys.readouterr().out == overview(inf.default_registry, verbose=True, tracebacks=True) + "\n"
        assert main(["plugins", "--json"]) == 0
        assert capsys.readouterr().out == as_json(inf.default_registry) + "\n"

    def test_json_holds_all_of_it(self) -> None:
        registry = inf.Registry(
            {
                "one": solver_plugin(half=Halving, stating=Stating, same=Halving),
                "two": solver_plugin(same=Undocumented),
                "broken": SimpleNamespace(),
            },
            installed=False,
        )
        said = json.loads(as_json(registry))
        assert said["api_version"] == inf.PLUGIN_API_VERSION
        solvers = {method["name"]: method for method in said["methods"] if method["kind"] == "solver"}
        assert solvers == {
            "half": {
                "name": "half",
                "kind": "solver",
                "distribution": "one",
                "version": "unknown",
                "description": "Half of everything, as ``I/2``.",
                "options": {
                    "steps": {"annotation": "int", "default": None},
                    "label": {"annotation": "str", "default": "'x'"},
                },
                "requires": [],
                "preconditioner": False,
                "refines": False,
                "takes_indefinite": False,
                "default_source": None,
            },
            "stating": {
                "name": "stating",
                "kind": "solver",
                "distribution": "one",
                "version": "unknown",
                "description": "",
                "options": {},
                "requires": ["Diagonal", "Trace"],
                "preconditioner": True,
                "refines": True,
                "takes_indefinite": True,
                "default_source": "hessian",
            },
        }
        sources = [method["name"] for method in said["methods"] if method["kind"] == "source"]
        assert sources == list(registry.hessian_sources)
        (failure,) = registry.failures
        assert said["failures"] == [
            {
                "plugin": "broken",
                "distribution": "broken",
                "version": "unknown",
                "reason": failure.reason,
                "details": failure.details,
            }
        ]
        assert said["conflicts"] == list(registry.conflicts)
        assert len(registry.conflicts) == 1

    def test_wraps_to_the_terminal(self) -> None:
        registry = inf.Registry({"one": solver_plugin(half=Halving)}, installed=False)
        wrapped = overview(registry, width=90)
        assert max(map(len, wrapped.splitlines())) <= 90
        assert wrapped.split() == overview(registry).split()

    def test_without_any_solver(self) -> None:
        text = overview(inf.Registry(installed=False))
        assert "No solver is installed." in text
        assert "pip install 'influence-framework[all]'" in text
        assert "gauss_newton" in text

    def test_failures_and_conflicts(self) -> None:
        registry = inf.Registry(
            {
                "good": solver_plugin(half=Halving),
                "other": solver_plugin(half=Undocumented),
                "broken": SimpleNamespace(),
            },
            installed=False,
        )
        text = overview(registry, width=80)
        (failure,) = registry.failures
        table, failures, conflicts = text.split("\n\n")
        assert not re.search(r"^half ", table, re.MULTILINE)
        assert failures.startswith("Plugins that failed to load:\n  PLUGIN")
        assert ["broken", "broken", "unknown", *failure.reason.split()] == failures.splitlines()[2].split() + [
            word for line in failures.splitlines()[3:] for word in line.split()
        ]
        assert "Names that several plugins claim" in conflicts
        assert "'half' is claimed by good" in conflicts

    def test_no_section_without_need(self) -> None:
        text = overview(inf.Registry({"one": solver_plugin(half=Halving)}, installed=False))
        assert "No solver" not in text
        assert "failed" not in text
        assert "claim" not in text
