"""``influence check``: the table, and the exit status that says how it went."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from influence_framework import hookimpl
from influence_framework.cli import main as command
from influence_framework.hookspecs import Register
from influence_framework.registry import Registry
from tests.faulty_executors import InTurn
from tests.faulty_solvers import Approximate, Exact, NotFixed
from tests.faulty_sources import Source


class NeedsAnOption(Exact):
    def __init__(self, rank: int) -> None:
        super().__init__()


@hookimpl
def register_solvers(register: Register) -> None:
    for name, method in {
        "exact": Exact,
        "approximate": Approximate,
        "unfixed": NotFixed,
        "both": Exact,
        "demanding": NeedsAnOption,
    }.items():
        register(name, method)


@hookimpl
def register_hessian_sources(register: Register) -> None:
    register("curved", Source)
    register("both", Source)


@hookimpl
def register_executors(register: Register) -> None:
    register("turned", InTurn)
    register("both", InTurn)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    plugin = SimpleNamespace(
        register_solvers=register_solvers,
        register_hessian_sources=register_hessian_sources,
        register_executors=register_executors,
    )
    registry = Registry({"test": plugin}, installed=False)
    monkeypatch.setattr(command, "default_registry", registry)
    return registry


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        (["exact"], "solver Exact("),
        (["curved"], "source Source("),
        (["hessian"], "source Hessian("),
        (["turned"], "executor InTurn("),
        (["both", "--kind", "executor"], "executor InTurn("),
        (["approximate", "--kind", "preconditioner"], "preconditioner Approximate("),
        (["both", "--kind", "source"], "source Source("),
        (["both", "--kind", "solver"], "solver Exact("),
    ],
    ids=" ".join,
)
def test_what_conforms_ends_with_zero(
    arguments: list[str], subject: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["check", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(subject)
    assert "FAILED" not in printed.out
    assert printed.err == ""


def test_a_failed_check_ends_with_one_and_shows_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["check", "unfixed", "--kind", "preconditioner"]) == 1
    printed = capsys.readouterr().out
    assert "14 of 15 checks passed" in printed
    assert "FAILED  called_fixed" in printed
    assert "> fixed is False" in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "Unknown solver 'exakt'. Did you mean 'exact'?"),
        (
            "both",
            "'both' is a solver and a curvature source and an executor: add --kind solver or --kind source or "
            "--kind executor.",
        ),
        ("demanding", "'demanding' needs the option 'rank'."),
    ],
)
def test_what_cannot_be_checked_ends_with_two(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["check", name]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("arguments", [[], ["exact", "--kind", "loss"]], ids=["no name", "unknown kind"])
def test_bad_usage_ends_with_two(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["check", *arguments])
    assert caught.value.code == 2
    assert "usage: influence check" in capsys.readouterr().err
