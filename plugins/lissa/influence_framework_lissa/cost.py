"""What ``lissa`` takes: its recursion on the spectrum as the probes see it."""

from __future__ import annotations

import math

import torch

from influence_framework.costs import Cost, Fidelity, Measure, Work, Workload
from influence_framework.errors import InvalidInputError, MissingCapabilityError
from influence_framework_lissa.spectrum import SAMPLED, STEPS, WIDTH

VECTORS = 10
"""Vectors held, and at most read and written in an iteration, for each right-hand side."""


def runs(
    measure: Measure, regularization: float, scale: float, length: int, rtol: float, limit: int
) -> list[int]:
    """Lengths of the runs until the residual is ``rtol`` or the limit reached, were mini-batches alike."""
    shifted = measure.values + regularization
    residual = measure.weights.sqrt()
    done: list[int] = []
    while torch.linalg.vector_norm(residual) > rtol and sum(done) < limit:
        steps = min(length, limit - sum(done))
        powers = torch.arange(steps // 2 + 1, steps + 1, dtype=torch.float64)[:, None] + 1
        # h_t / s leaves (1 − μ/s)^(t+1) of the residual along an eigenvector.
        image = residual * (1 - (1 - shifted / scale).pow(powers).mean(0))
        before = torch.linalg.vector_norm(residual)
        residual = residual - (residual @ image) / (image @ image) * image
        done.append(steps)
        if torch.linalg.vector_norm(residual) > 0.7 * before:
            length = math.ceil(1.5 * length)
    return done


def cost_of_lissa(
    workload: Workload, scale: float | None, margin: float, rtol: float, averaging: int | None, limit: int
) -> Cost:
    """Of the recursion; ``scale`` is ``None`` where it is to be found out.

    Raises:
        InvalidInputError: It would fail.
        MissingCapabilityError: There are no mini-batches.
    """
    spectrum, regularization = workload.probed, workload.regularization
    if "Minibatches" not in workload.capabilities:
        raise MissingCapabilityError("the curvature has no mini-batches (Minibatches)")
    if not workload.semidefinite and spectrum.smallest + regularization <= 0:
        raise InvalidInputError(
            f"the curvature has an eigenvalue of {spectrum.smallest:.2g}, which λ = {regularization:.2g} does "
            "not make up for: it diverges"
        )
    fit = Work()
    if scale is None:
        fit = Work(minibatches=((SAMPLED * STEPS, WIDTH),), products=((STEPS, WIDTH),))
        scale = margin * (spectrum.largest + regularization)
    if averaging is None:
        lengths = [limit]
    else:
        found = [runs(m, regularization, scale, averaging, rtol, limit) for m in spectrum.gradients]
        lengths = max(found, key=sum)
    iterations = sum(lengths)
    if averaging is not None and iterations >= limit:
        raise InvalidInputError(
            f"it would take more than maxiter = {limit} iterations, with a condition number of "
            f"{spectrum.largest / max(regularization, 1e-300):.2g}"
        )
    columns = workload.columns
    solve = Work(
        minibatches=((iterations, columns),),
        # The true residual after every run, and once more at the end.
        products=((len(lengths) + 1, columns),),
        traffic=workload.vectors(VECTORS * columns) * iterations,
    )
    return Cost(
        # The plain recursion is held to no tolerance.
        Fidelity.EXACT if averaging is not None else Fidelity.DIAGONAL,
        fit=fit,
        solve=solve,
        fit_bytes=workload.vectors(8 * WIDTH),
        solve_bytes=workload.vectors(VECTORS * columns),
        reasons=(
            f"scale {scale:.2g}: about {iterations} mini-batches to a relative residual of {rtol:g}, "
            "were they all alike",
        ),
    )
