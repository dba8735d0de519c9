"""Plugins that cannot be used: each is set aside with what to do, and breaks nothing else."""

from __future__ import annotations

import asyncio
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import influence_framework as inf
from tests.plugins import Flat, Halving, OtherSolver, isolated, plugin, solver_plugin, source_plugin

pytestmark = pytest.mark.usefixtures("as_user")


class Named(OtherSolver):
    def __init__(self, *, name: str = "x") -> None: ...


class Positional(OtherSolver):
    def __init__(self, strength: float, /) -> None: ...


class OneRequirement(OtherSolver):
    requires = inf.Diagonal


class TextRequirement(Flat):
    requires = ("Diagonal",)


def exiting(register: Any) -> None:
    sys.exit("no licence")


def cancelled(register: Any) -> None:
    raise asyncio.CancelledError("not now")


class Unreadable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError


def unreadable(register: Any) -> None:
    raise Unreadable


def stating(version: Any) -> SimpleNamespace:
    """A plugin that is all right but for the version of the interface that it states."""
    return SimpleNamespace(INFLUENCE_API_VERSION=version, **vars(solver_plugin(thing=Halving)))


BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (plugin(register_solvers=lambda register: 1 / 0), "ZeroDivisionError: division by zero"),
    "exits": (plugin(register_solvers=exiting), "it called sys.exit('no licence') while loading"),
    "misspelled_hook": (plugin(register_solver=lambda register: None), "unknown hook 'register_solver'"),
    "wrong_argument": (plugin(register_solvers=lambda registry: None), "Argument(s) {'registry'}"),
    "no_hook": (SimpleNamespace(register_solvers=lambda register: None), "it implements no hook"),
    "no_class": (solver_plugin(thing=3), "'thing' must be registered with a class, got 3"),
    "instance": (solver_plugin(thing=OtherSolver()), "'thing' must be registered with a class"),
    "no_fit": (solver_plugin(thing=Flat), "Flat is no solver: it has no method 'fit'"),
    "no_operator": (
        source_plugin(thing=OtherSolver),
        "OtherSolver is no curvature source: it has no method 'operator'",
    ),
    "upper_case": (
        solver_plugin(Thing=Halving),
        "'Thing' is no name for a solver: use a lower-case identifier",
    ),
    "hyphen": (solver_plugin(**{"my-thing": Halving}), "'my-thing' is no name for a solver"),
    "number": (
        plugin(register_hessian_sources=lambda register: register(7, Flat)),
        "7 is no name for a curvature source",
    ),
    "option_name": (solver_plugin(thing=Named), "Named has an option called 'name'"),
    "by_position": (solver_plugin(thing=Positional), "Positional takes 'strength' by position only"),
    "no_tuple": (
        solver_plugin(thing=OneRequirement),
        "OneRequirement.requires must be a tuple of capabilities",
    ),
    "no_capability": (source_plugin(thing=TextRequirement), "such as (Diagonal,), got ('Diagonal',)"),
    "unreadable": (plugin(register_solvers=unreadable), "Unreadable without a readable message"),
    "base_exception": (plugin(register_solvers=cancelled), "CancelledError: not now"),
    "later": (
        stating(2),
        "it is written for version 2 of the plugin interface, and influence-framework 0.1.0 has",
    ),
    "version_zero": (stating(0), "its INFLUENCE_API_VERSION must be a positive int such as 1, got 0"),
    "version_bool": (stating(True), "its INFLUENCE_API_VERSION must be a positive int such as 1, got True"),
    "version_text": (stating("1"), "its INFLUENCE_API_VERSION must be a positive int such as 1, got '1'"),
    "half_good": (solver_plugin(fine=Halving, thing=3), "'thing' must be registered with a class"),
}


REMEDY = re.compile(
    r"\. (Tell its authors, or leave it out of the registry's plugins"
    r"|Upgrade influence-framework: .* or install a version of \w+ written for influence-framework 0\.1\.0)$"
)


class TestBrokenPlugins:
    @pytest.mark.parametrize("name", list(BROKEN))
    def test_is_set_aside_with_its_reason_and_the_others_work(self, name: str) -> None:
        broken, reason = BROKEN[name]
        # On both sides of it in the order of loading.
        registry = isolated(
            **{name: broken, "aaa": solver_plugin(first=Halving), "zzz": solver_plugin(last=Halving)}
        )
        assert list(registry.solvers) == ["first", "last"]
        assert list(registry.hessian_sources) == list(isolated().hessian_sources)
        (failure,) = registry.failures
        assert (failure.plugin, failure.distribution) == (name, name)
        assert reason in failure.reason
        assert "\n" not in failure.reason
        assert REMEDY.search(failure.reason)
        assert "Traceback" in failure.details

    def test_all_at_once_in_a_fixed_order(self) -> None:
        plugins = {name: broken for name, (broken, _) in BROKEN.items()}
        registry = inf.Registry(dict(reversed(plugins.items())), installed=False)
        assert [failure.plugin for failure in registry.failures] == sorted(BROKEN)

    def test_what_is_stated_about_the_interface(self) -> None:
        assert inf.PLUGIN_API_VERSION == 1
        (failure,) = isolated(mine=stating(2)).failures
        assert failure.reason.endswith(
            "Upgrade influence-framework: pip install --upgrade influence-framework; or install a version of "
            "mine written for influence-framework 0.1.0"
        )
        assert "thing" in isolated(mine=stating(1)).solvers

    def test_an_interface_of_the_future_is_told_before_its_hooks_are(self) -> None:
        later = plugin(register_preconditioners=lambda register: None)
        later.INFLUENCE_API_VERSION = 2
        (failure,) = isolated(mine=later).failures
        assert "version 2 of the plugin interface" in failure.reason

    def test_methods_can_not_be_looked_up_while_plugins_are_loaded(self) -> None:
        def early(register: Any) -> None:
            registry.solvers["first"]

        registry = isolated(aaa=solver_plugin(first=Halving), bbb=plugin(register_solvers=early))
        (failure,) = registry.failures
        assert failure.plugin == "bbb"
        assert "before all of them are known" in failure.reason
        assert list(registry.solvers) == ["first"]

    def test_an_interrupt_is_not_taken_for_a_broken_plugin(self) -> None:
        def interrupted(register: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(isolated(mine=plugin(register_solvers=interrupted)).solvers)

    def test_after_an_interrupt_the_next_look_up_starts_again(self) -> None:
        presses = [KeyboardInterrupt]

        def interrupted(register: Any) -> None:
            if presses:
                raise presses.pop()
            register("thing", Halving)

        solvers = isolated(mine=plugin(register_solvers=interrupted)).solvers
        with pytest.raises(KeyboardInterrupt):
            list(solvers)
        assert list(solvers) == ["thing"]
