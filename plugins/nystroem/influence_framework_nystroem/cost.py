"""What ``nystroem`` takes, and the rank it is advised with."""

from __future__ import annotations

import math

from influence_framework.costs import Cost, Fidelity, Products, Work, Workload
from influence_framework_nystroem.sketch import PASSES, TEST_VECTORS

LEFT = 3.0
"""Norm of what a sketch leaves, in units of the first eigenvalue beyond its rank."""

LEAST, MOST = 10, 512
"""Ranks that are advised."""


def rank_for(workload: Workload) -> int:
    """The number of eigenvalues above λ, with a margin for what an estimate of it may miss."""
    above = 1.2 * workload.probed.count(workload.regularization)
    return min(max(LEAST, math.ceil(above)), MOST, workload.parameters)


def cost_of_nystroem(workload: Workload, products: Products, rank: int, width: int) -> Cost:
    """Of an approximation of ``rank`` from ``width`` test vectors, multiplied in ``products``."""
    # Two orthonormal bases, the core in float64, and the eigenvectors.
    flops = 14.0 * workload.parameters * width**2 + 25.0 * width**3
    fit = Work(products=products, flops=flops, traffic=workload.vectors(10 * width))
    return _low_rank(workload, fit, 5 * width, rank)


def cost_of_leading(workload: Workload, products: Products, rank: int, rows: int) -> Cost:
    """Of an approximation of ``rank`` from leading ``rows``, chosen in ``products``' worth of passes."""
    # The matrix of inner products, at most; its eigenvectors; and what they make of the rows.
    side = min(rows, workload.parameters)
    flops = 2.0 * workload.parameters * (rows * side + rows * rank) + _eigenvectors(side, rank)
    fit = Work(products=products, flops=flops, traffic=workload.vectors(6 * rows))
    # Inner products, and of layers two factors of them, in float64.
    return _low_rank(workload, fit, rows + rank, rank, 3 * 8.0 * side**2)


def _eigenvectors(rows: int, rank: int) -> float:
    """Flops for those of a matrix of inner products, as ``leading_approximation`` finds them."""
    width = rank + TEST_VECTORS
    if rows <= 2 * width:
        return 10.0 * rows**3
    return PASSES * (2.0 * rows**2 * width + 4.0 * rows * width**2) + 10.0 * width**3


def _low_rank(workload: Workload, fit: Work, vectors: int, rank: int, more: float = 0.0) -> Cost:
    """After a ``fit`` that holds so many ``vectors``, and so many bytes ``more``."""
    size, rank = workload.parameters, min(rank, workload.parameters)
    left = workload.probed.at(rank + 1)
    applied = 8.0 * size * rank
    return Cost(
        Fidelity.LOW_RANK,
        fit=fit,
        solve=Work(flops=applied * workload.columns, traffic=workload.vectors(4 * workload.columns + 4 * rank)),
        fit_bytes=workload.vectors(vectors) + more,
        held_bytes=workload.vectors(rank),
        solve_bytes=workload.vectors(4 * workload.columns),
        apply=Work(flops=applied, traffic=workload.vectors(4)),
        deflated=LEFT * left,
        reasons=(
            f"rank {rank} leaves out eigenvalues of up to about {left:.2g}, "
            f"{left / max(workload.regularization, 1e-300):.2g} λ",
        ),
    )
