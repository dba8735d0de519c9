"""What ``arnoldi`` takes, and the rank it is advised with."""

from __future__ import annotations

import math

from influence_framework.costs import Cost, Fidelity, Work, Workload
from influence_framework_arnoldi.lanczos import search_steps
from influence_framework_arnoldi.pairs import Wanted

LEAST, MOST = 10, 256
"""Ranks that are advised."""

PRODUCTS_A_PAIR = 1.8
"""Products that a pair takes in spectra of nets; several times as many where eigenvalues decay slowly."""


def rank_for(workload: Workload) -> int:
    """The number of eigenvalues above λ, with a margin for what an estimate of it may miss."""
    above = 1.2 * workload.probed.count(workload.regularization)
    return min(max(LEAST, math.ceil(above)), MOST, workload.parameters)


def cost_of_arnoldi(workload: Workload, wanted: Wanted) -> Cost:
    """Of the pairs that are wanted."""
    size, rank, dimension = workload.parameters, wanted.rank, wanted.krylov_dimension
    left = workload.probed.at(rank)
    whole = dimension + wanted.block_size >= size
    if whole:
        fit = workload.forming + Work(products=((1, rank),), eigh=(size,), traffic=workload.vectors(8 * size))
    else:
        products = PRODUCTS_A_PAIR * rank + wanted.block_size * search_steps(size, wanted.block_size)
        # Each is orthogonalised twice against a basis that is half full on average, read twice each time.
        traffic = workload.vectors(4 * 0.5 * dimension) * products
        compressed = max(0.0, (products - dimension) / max(1, dimension - rank))
        fit = Work(
            products=((products / wanted.block_size, wanted.block_size), (1, 1)),
            flops=2.0 * compressed * size * dimension * rank,
            traffic=traffic,
        )
    return Cost(
        Fidelity.LOW_RANK,
        fit=fit,
        solve=Work(
            flops=8.0 * size * rank * workload.columns,
            traffic=workload.vectors(4 * workload.columns + 4 * rank),
        ),
        fit_bytes=4 * workload.vectors(size) if whole else workload.vectors(dimension + 2 * rank + 8),
        held_bytes=workload.vectors(rank),
        solve_bytes=workload.vectors(4 * workload.columns),
        reasons=(
            f"rank {rank} reaches down to an eigenvalue of about {left:.2g}, "
            f"{left / max(workload.regularization, 1e-300):.2g} λ",
        ),
    )
