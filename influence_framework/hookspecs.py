"""The hooks a plugin implements. A plugin is a module with one or both of these functions."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import pluggy

PROJECT = "influence_framework"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@runtime_checkable
class Register(Protocol):
    """What a hook gets to announce its methods with."""

    def __call__(self, name: str, method: type[Any]) -> None: ...


@hookspec
def register_solvers(register: Register) -> None:
    """Announce solvers: ``register("name", SolverClass)`` for each.

    The class takes its options as keyword arguments and has ``fit(operator, regularization)``. An
    option annotated as ``Solver`` is composed by name too.
    """


@hookspec
def register_hessian_sources(register: Register) -> None:
    """Announce curvature sources: ``register("name", SourceClass)`` for each.

    The class takes its options as keyword arguments and has ``operator(problem, parameters)``.
    """
