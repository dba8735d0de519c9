"""The entrances: a report of all checks of a method, and the same as an assertion."""

from __future__ import annotations

from typing import Literal

from influence_framework.compose import Spec, resolve
from influence_framework.protocols import Executor, HessianSource, Solver
from influence_framework.registry import Registry, default_registry
from influence_framework.testing.composition import COMPOSITION_CHECKS
from influence_framework.testing.executors import EXECUTOR_CHECKS, ExecutorSubject
from influence_framework.testing.inverses import INVERSE_CHECKS
from influence_framework.testing.preconditioners import PRECONDITIONER_CHECKS
from influence_framework.testing.report import ConformanceReport, run
from influence_framework.testing.solutions import SOLUTION_CHECKS
from influence_framework.testing.sources import SOURCE_CHECKS, SourceSubject
from influence_framework.testing.subjects import DEFAULT_ACCURACY, SolverSubject

Accuracy = float | Literal["stated"] | None


def solver_report(
    spec: Spec | Solver, *, registry: Registry = default_registry, accuracy: Accuracy = "stated"
) -> ConformanceReport:
    """All checks of a solver, on systems of ten parameters or, where it requires more, of a net of 17.

    Args:
        spec: A name, a mapping ``{"name": ..., option: value, ...}``, or an instance.
        registry: Where names are looked up.
        accuracy: The largest relative residual to be asked of it in place of what its attribute ``accuracy``
            states: ``1e-6``, say, for a low-rank method whose rank reaches the number of parameters.
    """
    solver: Solver = resolve("solver", spec, registry)
    asked = getattr(solver, "accuracy", DEFAULT_ACCURACY) if accuracy == "stated" else accuracy
    subject = SolverSubject(solver, registry, asked)
    return run(f"solver {solver!r}", subject, (*INVERSE_CHECKS, *SOLUTION_CHECKS, *COMPOSITION_CHECKS))


def preconditioner_report(spec: Spec | Solver, *, registry: Registry = default_registry) -> ConformanceReport:
    """All checks of a solver as a preconditioner; see :func:`solver_report` for the arguments.

    What it does as a solver is checked there.
    """
    solver: Solver = resolve("solver", spec, registry)
    # One fixed matrix, and to be compared as such.
    subject = SolverSubject(solver, registry, accuracy=None)
    return run(f"preconditioner {solver!r}", subject, PRECONDITIONER_CHECKS)


def source_report(spec: Spec | HessianSource, *, registry: Registry = default_registry) -> ConformanceReport:
    """All checks of a curvature source, on classifiers of 17 and 21 parameters; arguments as above."""
    source: HessianSource = resolve("source", spec, registry)
    return run(f"source {source!r}", SourceSubject(source, registry), SOURCE_CHECKS)


def executor_report(spec: Spec | Executor, *, registry: Registry = default_registry) -> ConformanceReport:
    """All checks of an executor, with a net of 17 parameters; arguments as above.

    What the executor needs has to be there, such as a cluster. Where all of several processes run the same
    program, each makes the call.
    """
    executor: Executor = resolve("executor", spec, registry)
    return run(f"executor {executor!r}", ExecutorSubject(executor, registry), EXECUTOR_CHECKS)


def check_solver(
    spec: Spec | Solver, *, registry: Registry = default_registry, accuracy: Accuracy = "stated"
) -> None:
    """Raise :class:`ConformanceError` unless :func:`solver_report` finds nothing wrong."""
    solver_report(spec, registry=registry, accuracy=accuracy).require()


def check_preconditioner(spec: Spec | Solver, *, registry: Registry = default_registry) -> None:
    """Raise :class:`ConformanceError` unless :func:`preconditioner_report` finds nothing wrong."""
    preconditioner_report(spec, registry=registry).require()


def check_hessian_source(spec: Spec | HessianSource, *, registry: Registry = default_registry) -> None:
    """Raise :class:`ConformanceError` unless :func:`source_report` finds nothing wrong."""
    source_report(spec, registry=registry).require()


def check_executor(spec: Spec | Executor, *, registry: Registry = default_registry) -> None:
    """Raise :class:`ConformanceError` unless :func:`executor_report` finds nothing wrong."""
    executor_report(spec, registry=registry).require()
