"""What ``cg`` and ``jacobi`` take."""

from __future__ import annotations

from influence_framework.costs import Cost, Costed, Fidelity, Work, Workload
from influence_framework.errors import InvalidInputError, MissingCapabilityError
from influence_framework.protocols import Solver
from influence_framework_cg.recurrence import REPLACE_EVERY

VECTORS = 12
"""Vectors held, and at most read and written in a step, for each right-hand side."""


def cost_of_cg(
    workload: Workload, rtol: float, maxiter: int | None, preconditioner: Solver | None, *, block: bool
) -> Cost:
    """Of conjugate gradients to ``rtol``.

    Raises:
        InvalidInputError: It would fail.
        MissingCapabilityError: Nothing tells how many steps it takes.
    """
    spectrum, regularization = workload.probed, workload.regularization
    if block:
        raise MissingCapabilityError(
            "how many steps one search space for all right-hand sides saves is not known"
        )
    if not workload.semidefinite and spectrum.smallest + regularization <= 0:
        raise InvalidInputError(
            f"the curvature has an eigenvalue of {spectrum.smallest:.2g}, which λ = {regularization:.2g} does "
            "not make up for: it stops at negative curvature"
        )
    fitted = None
    deflated = None
    if preconditioner is not None:
        fitted = preconditioner.cost(workload) if isinstance(preconditioner, Costed) else None
        if fitted is None or fitted.apply is None or fitted.deflated is None:
            raise MissingCapabilityError(
                f"how many steps {type(preconditioner).__name__} saves cannot be told beforehand"
            )
        deflated = fitted.deflated
    most, mean = spectrum.iterations(regularization, rtol, deflated)
    most, mean = max(1.0, most), max(1.0, mean)
    limit = 10 * workload.parameters if maxiter is None else maxiter
    if most > limit:
        raise InvalidInputError(f"it would take about {most:.0f} steps, more than maxiter = {limit}")
    columns = workload.columns
    solve = Work(
        # Right-hand sides that are done leave the product; true residuals are for all.
        products=((most, columns * mean / most), (1 + most // REPLACE_EVERY, columns)),
        traffic=workload.vectors(VECTORS) * mean * columns,
    )
    largest = spectrum.largest if deflated is None else min(spectrum.largest, deflated)
    condition = 1 + largest / max(regularization, 1e-300)
    before = 1 + spectrum.largest / max(regularization, 1e-300)
    lowered = "" if fitted is None else f", brought down from {before:.2g}"
    return Cost(
        Fidelity.EXACT,
        fit=Work() if fitted is None else fitted.fit,
        solve=solve if fitted is None or fitted.apply is None else solve + (mean * columns) * fitted.apply,
        fit_bytes=0.0 if fitted is None else fitted.fit_bytes,
        held_bytes=0.0 if fitted is None else fitted.held_bytes,
        solve_bytes=workload.vectors(VECTORS * columns),
        reasons=(
            f"condition number {condition:.2g}{lowered}: about {most:.0f} steps to a relative residual of "
            f"{rtol:g}",
        ),
    )


def cost_of_jacobi(workload: Workload, products: float, probes: int) -> Cost:
    """Of the diagonal, exact or from ``products`` products with ``probes`` vectors in all."""
    offered = "Diagonal" in workload.capabilities
    by_probes = Work(products=((products, probes / products),))
    return Cost(
        Fidelity.DIAGONAL,
        fit=Work(diagonals=1) if offered else by_probes,
        solve=Work(products=((1, workload.columns),), traffic=workload.vectors(4 * workload.columns)),
        fit_bytes=workload.vectors(4),
        held_bytes=workload.vectors(1),
        solve_bytes=workload.vectors(4 * workload.columns),
        apply=Work(traffic=workload.vectors(4)),
        reasons=("the diagonal exactly" if offered else f"the diagonal from {probes} random vectors",),
    )
