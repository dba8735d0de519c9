"""Small solvers and sources, and plugins made of them, for the tests of what is found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import influence_framework as inf


@dataclass(frozen=True)
class Halving:
    """Halves its right-hand sides.

    More about it on further lines.

    Attributes:
        times: How often.
    """

    strength: float
    times: int = 1

    def fit(self, operator: Any, regularization: float) -> Any: ...


class Flat:
    def operator(self, problem: Any, parameters: Any) -> Any: ...


class OtherSolver:
    def fit(self, operator: Any, regularization: float) -> Any: ...


class Stating(OtherSolver):
    requires = (inf.Diagonal, inf.Trace)
    fixed = True
    refines = True
    takes_indefinite = True
    default_source = "hessian"


def plugin(**hooks: Callable[..., None]) -> SimpleNamespace:
    """A plugin with these functions as its hooks."""
    return SimpleNamespace(**{name: inf.hookimpl(function) for name, function in hooks.items()})


def solver_plugin(**methods: Any) -> SimpleNamespace:
    def register_solvers(register: Any) -> None:
        for name, method in methods.items():
            register(name, method)

    return plugin(register_solvers=register_solvers)


def source_plugin(**methods: Any) -> SimpleNamespace:
    def register_hessian_sources(register: Any) -> None:
        for name, method in methods.items():
            register(name, method)

    return plugin(register_hessian_sources=register_hessian_sources)


def isolated(**plugins: Any) -> inf.Registry:
    """Core's own sources and these plugins, whatever is installed."""
    return inf.Registry(plugins, installed=False)
