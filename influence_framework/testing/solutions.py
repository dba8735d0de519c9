"""Checks of what a solver says of its own results, where they are good and where they cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from influence_framework.protocols import Solution, StopReason
from influence_framework.testing.subjects import SolverSubject, System

SUCCESS = (StopReason.CONVERGED, StopReason.APPROXIMATION)


def solution_is_complete(subject: SolverSubject) -> Iterator[str]:
    """A ``Solution`` has a flag, a count of iterations, a residual and a reason for each right-hand side."""
    columns = subject.definite.columns(3)
    solution = subject.inverse.solve(columns)
    if not isinstance(solution, Solution):
        yield f"solve returned {type(solution).__name__}, expected Solution"
        return
    if solution.value.shape != columns.shape:
        yield f"value has shape {tuple(solution.value.shape)}, expected {tuple(columns.shape)}"
    for name, tensor in (
        ("converged", solution.converged),
        ("iterations", solution.iterations),
        ("residual", solution.residual),
    ):
        if tensor.shape != (3,):
            yield f"{name} has shape {tuple(tensor.shape)}, expected (3,)"
    if solution.converged.dtype != torch.bool:
        yield f"converged is {solution.converged.dtype}, expected torch.bool"
    if solution.residual.dtype != torch.float64:
        yield f"residual is {solution.residual.dtype}, expected torch.float64"
    if solution.iterations.is_floating_point() or (solution.iterations < 0).any():
        yield f"iterations are {solution.iterations.tolist()}, expected integers of at least 0"
    if (solution.residual < 0).any():
        yield f"residual is {solution.residual.tolist()}, expected no negative number"
    if len(solution.reason) != 3 or not all(isinstance(reason, StopReason) for reason in solution.reason):
        yield f"reason is {solution.reason}, expected 3 members of StopReason"


def claimed_residual_is_the_true_one(subject: SolverSubject) -> Iterator[str]:
    """The residual is ``‖b − (C + λI)x‖ / ‖b‖`` of the value returned, or NaN where it was not measured."""
    for condition, system, solution in subject.attempts:
        columns = system.columns(3)
        true, claimed = system.residuals(solution.value, columns), solution.residual.cpu()
        # Rounding of the product that measures it.
        size = torch.linalg.vector_norm(solution.value.cpu(), dim=0) / torch.linalg.vector_norm(columns, dim=0)
        rounding = 1e2 * torch.finfo(torch.float64).eps * (1 + torch.linalg.matrix_norm(system.shifted) * size)
        wrong = ~claimed.isnan() & ~((claimed - true).abs() <= 1e-2 * true + rounding)
        # Of a value that is not finite, no residual is true but NaN or infinity.
        wrong &= true.isfinite() | claimed.isfinite()
        for column in torch.nonzero(wrong).flatten().tolist():
            yield f"{condition}, column {column}: claimed {claimed[column]:.1e}, true {true[column]:.1e}"


def converged_means_solved(subject: SolverSubject) -> Iterator[str]:
    """``converged`` agrees with the reason, and what is solved within the accuracy is called converged."""
    for condition, system, solution in subject.attempts:
        flags = solution.converged.tolist()
        for column, (flag, reason) in enumerate(zip(flags, solution.reason, strict=True)):
            if flag != (reason in SUCCESS):
                yield f"{condition}, column {column}: converged is {flag}, and the reason {reason.name}"
        solved = system.residuals(solution.value, system.columns(3)) <= subject.allowed()
        if (
            condition == "definite"
            and subject.accuracy is not None
            and (solved & ~solution.converged.cpu()).any()
        ):
            yield f"definite: converged is {flags}, and solved within the accuracy {solved.tolist()}"


def indefinite_is_reported(subject: SolverSubject) -> Iterator[str]:
    """Where ``C + λI`` is indefinite, what is not solved is refused, warned of, not converged or measured."""
    yield from _silently_wrong(subject, subject.system("indefinite"), tolerated=subject.takes_indefinite)


def indefinite_is_solved_where_taken(subject: SolverSubject) -> Iterator[str]:
    """A solver with ``takes_indefinite = True`` reaches its accuracy, if any, on indefinite systems too."""
    if not subject.takes_indefinite or subject.accuracy is None:
        return
    system = subject.system("indefinite")
    columns = system.columns(3)
    solution = subject.fit(system).solve(columns)
    worst = float(system.residuals(solution.value, columns).max())
    if not (worst <= subject.allowed() and solution.converged.all()):
        flags = solution.converged.tolist()
        yield f"relative residual {worst:.1e}, expected at most {subject.allowed():.1e}; converged is {flags}"


def singular_is_reported(subject: SolverSubject) -> Iterator[str]:
    """Where ``C`` is singular and λ = 0, what is not solved is refused, warned of or called not converged."""
    yield from _silently_wrong(subject, subject.system("singular"))


def _silently_wrong(subject: SolverSubject, system: System, *, tolerated: bool = False) -> Iterator[str]:
    """A line for each column that is called solved, and is not.

    An approximation that tells its residual hides nothing; one that was not measured does, unless it is
    ``tolerated``. Values that are not finite are none.
    """
    columns = system.columns(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            solution = subject.fit(system).solve(columns)
        except Exception:
            return
    if any(issubclass(warning.category, UserWarning | RuntimeWarning) for warning in caught):
        return
    true = system.residuals(solution.value, columns)
    for column, (flag, reason) in enumerate(zip(solution.converged.tolist(), solution.reason, strict=True)):
        honest = reason is StopReason.APPROXIMATION and bool(torch.isfinite(true[column]))
        honest &= tolerated or bool(torch.isfinite(solution.residual[column]))
        if flag and not honest and not true[column] <= subject.allowed():
            yield f"column {column}: silently {reason.name.lower()}, relative residual {true[column]:.1e}"


def zero_gives_zero(subject: SolverSubject) -> Iterator[str]:
    """A right-hand side of zeros has the solution zero, converged, whatever is solved beside it."""
    system = subject.definite
    columns = system.columns(3)
    columns[:, 1] = 0.0
    solution = subject.inverse.solve(columns)
    largest = float(solution.value[:, 1].abs().max())
    if largest != 0:
        yield f"its solution has entries of up to {largest:.1e}"
    if not solution.converged[1] or solution.residual[1] > 0:
        yield f"converged is {bool(solution.converged[1])} and the residual {float(solution.residual[1]):.1e}"
    others = [0, 2]
    alone = subject.inverse.solve(columns[:, others]).value
    distance = subject.apart(system, solution.value[:, others], alone, columns[:, others])
    if not distance <= 1:
        yield f"the solutions beside it are apart by {distance:.1e} times what is allowed"


def nan_is_reported(subject: SolverSubject) -> Iterator[str]:
    """A right-hand side with NaN is refused, or called not converged and spoils no other."""
    system = subject.definite
    columns = system.columns(3)
    columns[2, 1] = float("nan")
    try:
        solution = subject.inverse.solve(columns)
    except Exception:
        return
    if solution.converged[1]:
        yield f"it is called converged ({solution.reason[1].name})"
    others = [0, 2]
    alone = subject.inverse.solve(columns[:, others]).value
    distance = subject.apart(system, solution.value[:, others], alone, columns[:, others])
    if not distance <= 1:
        yield f"the solutions beside it are apart by {distance:.1e} times what is allowed"


SOLUTION_CHECKS = (
    solution_is_complete,
    claimed_residual_is_the_true_one,
    converged_means_solved,
    indefinite_is_reported,
    indefinite_is_solved_where_taken,
    singular_is_reported,
    zero_gives_zero,
    nan_is_reported,
)
