"""The hooks a plugin implements. A plugin is a module with one or more of these functions.

It may state the version of this interface that it was written for::

    INFLUENCE_API_VERSION = 1

One that states a later version than :data:`API_VERSION` is set aside, and said to need a newer core.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import pluggy

PROJECT = "influence_framework"
"""Name of the pluggy project and of the entry-point group."""

API_VERSION = 1
"""Version of the interface; it goes up where a plugin may have to change, or may use something new."""

API_VERSION_ATTRIBUTE = "INFLUENCE_API_VERSION"
"""The name under which a plugin states the version it was written for; left out, it is taken for this one."""

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


@hookspec
def register_objectives(register: Register) -> None:
    """Announce objectives: ``register("name", ObjectiveClass)`` for each.

    The class takes its options as keyword arguments and has the methods of
    :class:`influence_framework.Objective`, ``sample_losses(outputs, batch)`` among them.
    """


@hookspec
def register_executors(register: Register) -> None:
    """Announce executors: ``register("name", ExecutorClass)`` for each.

    The class takes its options as keyword arguments and has ``run(job, units)``.
    """
