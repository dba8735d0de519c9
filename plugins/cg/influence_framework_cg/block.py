"""Block conjugate gradients: one Krylov space shared by all right-hand sides."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.protocols import StopReason
from influence_framework_cg.recurrence import REPLACE_EVERY, Rows, Systems, row_norms


def block_conjugate_gradients(systems: Systems, active: Int[Tensor, " m"]) -> None:
    """Run block PCG on the ``active`` systems until each is ended; results land in ``systems``.

    O'Leary (1980), "The Block Conjugate Gradient Algorithm and Related Methods", in the
    breakdown-free form of Ji and Li (2017), "A breakdown-free block conjugate gradient method",
    algorithm 2: search directions are orthonormalised every iteration and dependent ones dropped, so
    the block may be narrower than the number of systems. Two departures: systems that are done leave
    the residual block (the remaining ones keep the whole search space), and the small matrices are
    factored in float64 whatever the dtype.
    """
    residual = systems.residual[active]
    keep = systems.settle(active, row_norms(residual))
    active, residual = active[keep], residual[keep]
    directions = orthonormal_rows(systems.precondition(residual))
    iteration = 0
    while len(active):
        product = systems.apply(directions)
        systems.iterations[active] += 1
        iteration += 1
        gram = (directions @ product.T).double()
        factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
        if not torch.isfinite(gram).all():
            systems.end(active, StopReason.NOT_FINITE)
            return
        if failed.item():
            systems.end(active, StopReason.NEGATIVE_CURVATURE)
            return
        steps = _solve(factor, directions @ residual.T).T
        systems.value.index_add_(0, active, steps @ directions)
        residual = torch.addmm(residual, steps, product, alpha=-1.0)
        keep = torch.ones(len(active), dtype=torch.bool, device=active.device)
        if iteration % REPLACE_EVERY == 0:
            residual, keep = systems.replace(active, residual)
        norms = row_norms(residual)
        keep[keep.clone()] = systems.settle(active[keep], norms[keep])
        systems.notify(iteration, int(keep.sum()))
        if not keep.all():
            active, residual = active[keep], residual[keep]
        if not len(active):
            return
        preconditioned = systems.precondition(residual)
        conjugate = _solve(factor, product @ preconditioned.T).T
        directions = orthonormal_rows(torch.addmm(preconditioned, conjugate, directions, alpha=-1.0))


def _solve(factor: Float[Tensor, "m m"], columns: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    return torch.cholesky_solve(columns.double(), factor).to(columns.dtype)


def orthonormal_rows(rows: Rows) -> Float[Tensor, "r P"]:
    """An orthonormal basis of the row space, dependent directions dropped.

    From the eigenvectors of the Gram matrix of the normalised rows, in float64 and twice, since once
    leaves the orthogonality lost in proportion to the square of the condition number.
    """
    norms = row_norms(rows)
    nonzero = norms > 0
    basis = rows[nonzero] / norms[nonzero, None]
    # Directions below this singular value are the rounding of the rows' own dtype.
    smallest = 30 * torch.finfo(rows.dtype).eps
    cutoff = max(smallest**2, 1e-14)
    for _ in range(2):
        wide = basis.double()
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        if not len(values):
            return basis
        keep = values > cutoff * values[-1]
        basis = ((vectors[:, keep] / values[keep].sqrt()).T @ wide).to(rows.dtype)
    return basis
