"""Conjugate gradients for several shifts at once, from one Krylov space for each right-hand side."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.inverses import row_norms
from influence_framework_cg.recurrence import Apply, Notify, Rows, inner


def shifted_conjugate_gradients(
    apply: Apply,
    rhs: Rows,
    shifts: Float[Tensor, " s"],
    tolerance: Float[Tensor, " k"],
    limit: int,
    notify: Notify,
) -> tuple[Float[Tensor, "s k P"], Int[Tensor, " k"]]:
    """Approximate ``(A + σI)⁻¹ b`` for every shift ``σ ≥ 0`` and row ``b``, at one product an iteration.

    Krylov spaces do not depend on the shift, and residuals for different shifts stay parallel:
    ``r_σ = ζ_σ r``. Jegerlehner (1996), "Krylov space solvers for shifted linear systems", §2.3
    (arXiv hep-lat/9612014), with the ratios ``ζ_{i+1}/ζ_i`` in place of the ``ζ``, which underflow.

    The residuals are recursive ones, and a row that meets non-positive curvature is left where it
    is: the result is to be checked, and worked on where it must be.

    Args:
        apply: ``V ↦ V A`` on rows.
        rhs: Right-hand sides, one a row.
        shifts: ``σ``.
        tolerance: On ``‖r_σ‖``, for each row.
        limit: Iteration limit.
        notify: Progress.

    Returns:
        The approximations, and the iterations spent on each row.
    """
    count, width = len(shifts), len(rhs)
    value = rhs.new_zeros(count, width, rhs.shape[1])
    iterations = torch.zeros(width, dtype=torch.int64, device=rhs.device)
    active = torch.nonzero(row_norms(rhs) > tolerance).flatten()
    residual = rhs[active]
    direction = residual
    directions = residual.expand(count, *residual.shape).clone()
    rho = inner(residual, residual)
    scale = rhs.new_ones(count, len(active))
    ratio, step, beta = torch.ones_like(scale), torch.ones_like(rho), torch.zeros_like(rho)
    for iteration in range(limit):
        if not len(active):
            break
        product = apply(direction)
        iterations[active] += 1
        curvature = inner(direction, product)
        previous, step = step, rho / curvature
        damping = step * beta / previous
        ratio = 1 / (1 + damping * (1 - ratio) + shifts[:, None] * step)
        proper = curvature > 0
        step, ratio = torch.where(proper, step, 0.0), torch.where(proper, ratio, 1.0)
        value[:, active] += (step * ratio)[..., None] * directions
        residual = residual - step[:, None] * product
        latest = inner(residual, residual)
        beta = latest / rho
        rho = latest
        scale = scale * ratio
        keep = proper & ((scale.abs() * rho.sqrt()) > tolerance[active]).any(0)
        direction = residual + beta[:, None] * direction
        directions = torch.addcmul(
            scale[..., None] * residual, (beta * ratio.square())[..., None].expand_as(directions), directions
        )
        notify(iteration + 1, int(keep.sum()))
        if not keep.all():
            active, residual, direction, directions = (
                active[keep],
                residual[keep],
                direction[keep],
                directions[:, keep],
            )
            rho, beta, step = rho[keep], beta[keep], step[keep]
            scale, ratio = scale[:, keep], ratio[:, keep]
    return value, iterations
