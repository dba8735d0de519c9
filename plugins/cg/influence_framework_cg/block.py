"""Block conjugate gradients: one Krylov space shared by all right-hand sides."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.inverses import row_norms
from influence_framework.protocols import StopReason
from influence_framework_cg.recurrence import REPLACE_EVERY, Rows, Systems, conjugate_gradients


def block_conjugate_gradients(systems: Systems, active: Int[Tensor, " m"]) -> None:
    """Run block PCG on the ``active`` systems until each is ended; results land in ``systems``.

    O'Leary (1980), "The Block Conjugate Gradient Algorithm and Related Methods", in the
    breakdown-free form of Ji and Li (2017), "A breakdown-free block conjugate gradient method",
    algorithm 2: search directions are orthonormalised every iteration and dependent ones dropped, so
    the block may be narrower than the number of systems. The small matrices are factored in float64
    whatever the dtype.

    Systems that are done stay in the block, since the short recurrence of the others rests on their
    residuals. Once half of the block is done, the rest starts over from where it is.
    """
    while len(active):
        active = _until_half_are_done(systems, active)


def _until_half_are_done(systems: Systems, block: Int[Tensor, " m"]) -> Int[Tensor, " l"]:
    """Iterate until at least half of the block is ended; the systems that are not."""
    residual = systems.residual[block]
    live = systems.settle(block, row_norms(residual))
    block, residual, live = block[live], residual[live], live[live]
    directions = orthonormal_rows(systems.precondition(residual))
    width = len(block)
    while 2 * int(live.sum()) > width:
        product = systems.apply(directions)
        systems.iterations[block[live]] += 1
        systems.passes += 1
        gram = (directions @ product.T).double()
        gram = (gram + gram.T) / 2
        if not torch.isfinite(gram).all():
            systems.end(block[live], StopReason.NOT_FINITE)
            return block[:0]
        spectrum = torch.linalg.eigvalsh(gram)
        systems.see(block[live], spectrum[0].expand(int(live.sum())), spectrum[-1].expand(int(live.sum())))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.item():
            # Some direction of the shared space has non-positive curvature: each system by itself tells
            # whose it is, and the others are solved.
            systems.residual[block] = residual
            conjugate_gradients(systems, block[live])
            return block[:0]
        steps = _solve(factor, directions @ residual.T).T
        systems.value.index_add_(0, block, steps @ directions)
        residual = torch.addmm(residual, steps, product, alpha=-1.0)
        afresh = False
        if systems.passes % REPLACE_EVERY == 0:
            residual, drifted, gains = systems.replace(block, residual, live)
            afresh, live = bool(drifted.any()), live & gains
        live[live.clone()] = systems.settle(block[live], row_norms(residual[live]))
        systems.notify(systems.passes, int(live.sum()))
        preconditioned = systems.precondition(residual)
        if not afresh:
            conjugate = _solve(factor, product @ preconditioned.T).T
            preconditioned = torch.addmm(preconditioned, conjugate, directions, alpha=-1.0)
        directions = orthonormal_rows(preconditioned)
    systems.residual[block] = residual
    return block[live]


def _solve(factor: Float[Tensor, "m m"], columns: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    return torch.cholesky_solve(columns.double(), factor).to(columns.dtype)


def orthonormal_rows(rows: Rows) -> Float[Tensor, "r P"]:
    """An orthonormal basis of the row space, dependent directions dropped.

    From the eigenvectors of the Gram matrix of the normalised rows in float64, and again where that
    leaves more than the rounding of the rows' own dtype: one pass loses orthogonality in proportion to
    the square of the condition number.
    """
    norms = row_norms(rows)
    nonzero = norms > 0
    basis = (rows[nonzero] / norms[nonzero, None]).double()
    # Directions below this singular value are the rounding of the rows' own dtype.
    precision = torch.finfo(rows.dtype).eps
    cutoff = max((30 * precision) ** 2, 1e-14)
    while len(basis):
        values, vectors = torch.linalg.eigh(basis @ basis.T)
        keep = values > cutoff * values[-1]
        values, vectors = values[keep], vectors[:, keep]
        basis = (vectors / values.sqrt()).T @ basis
        if values[-1] / values[0] * torch.finfo(torch.float64).eps <= 100 * precision:
            break
    return basis.to(rows.dtype)
