"""Preconditioned conjugate gradients for many right-hand sides at once, each with its own coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence_framework.errors import InvalidInputError
from influence_framework.inverses import row_norms
from influence_framework.protocols import StopReason

Rows = Float[Tensor, "k P"]
Apply = Callable[[Tensor], Tensor]
Notify = Callable[[int, int], None]
"""Called once an iteration with its number and the number of systems left."""

REPLACE_EVERY = 50
"""Iterations between replacements of the recursive residual by the true one."""


@dataclass
class Systems:
    """The systems still being worked on, one a row, and where each stands.

    Attributes:
        apply: ``V ↦ V (C + λI)`` on rows.
        precondition: ``R ↦ R M⁻¹`` on rows.
        rhs: Right-hand sides.
        value: Current iterates, updated in place.
        residual: Their residuals.
        tolerance: On ``‖r‖``, one each.
        reason: Why each was ended; ``None`` while it is worked on.
        iterations: Products spent on each.
        limit: Iteration limit.
        notify: Progress.
        passes: Iterations made, whatever the system.
        best: Of each system, the iterate of the least true residual that was measured.
        least: Norms of those residuals.
        extremes: Smallest and largest ``vᵀ(C + λI)v / vᵀv`` along each one's search directions, ``(k, 2)``
            float64; NaN before the first.
    """

    apply: Apply
    precondition: Apply
    rhs: Rows
    value: Rows
    residual: Rows
    tolerance: Float[Tensor, " k"]
    reason: list[StopReason | None]
    iterations: Int[Tensor, " k"]
    limit: int
    notify: Notify
    passes: int = 0

    def __post_init__(self) -> None:
        self._checkpoint = row_norms(self.residual)
        self.best = self.value.clone()
        self.least = self._checkpoint.clone()
        self.extremes = self.rhs.new_full((len(self.rhs), 2), float("nan"), dtype=torch.float64)

    def end(self, which: Int[Tensor, " m"], reason: StopReason) -> None:
        """Stop working on these systems."""
        for system in which.tolist():
            self.reason[system] = reason

    def settle(self, active: Int[Tensor, " m"], norms: Float[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """End systems that reached their tolerance, their limit or NaN; the mask of those that go on."""
        broken = ~torch.isfinite(norms)
        reached = ~broken & (norms <= self.tolerance[active])
        spent = self.iterations[active] >= self.limit
        self.end(active[broken], StopReason.NOT_FINITE)
        self.end(active[reached], StopReason.CONVERGED)
        self.end(active[spent & ~reached & ~broken], StopReason.ITERATION_LIMIT)
        return ~(broken | reached | spent)

    def see(self, active: Int[Tensor, " m"], low: Float[Tensor, " m"], high: Float[Tensor, " m"]) -> None:
        """Note the curvatures along the present search directions."""
        seen = self.extremes[active]
        self.extremes[active, 0] = torch.fmin(seen[:, 0], low.double())
        self.extremes[active, 1] = torch.fmax(seen[:, 1], high.double())

    def keep_best(self, active: Int[Tensor, " m"], norms: Float[Tensor, " m"]) -> None:
        """Note the iterates whose true residual, of these ``norms``, is the least so far."""
        better = norms < self.least[active]
        self.best[active[better]] = self.value[active[better]]
        self.least[active[better]] = norms[better]

    def replace(
        self, active: Int[Tensor, " m"], recursive: Rows, live: Bool[Tensor, " m"]
    ) -> tuple[Rows, Bool[Tensor, " m"], Bool[Tensor, " m"]]:
        """Compare recursive with true residuals; the residuals to go on with, and two masks.

        Where the recursion has drifted, the true residual takes over and the search must start afresh
        from it (first mask): the old direction belongs to the old residual, and mixing the two diverges.
        Where the true residual is mostly drift and has not halved since the last comparison, the
        attainable accuracy is reached, and ``live`` systems are ended (second mask: those to go on).
        After van der Vorst and Ye (2000), "Residual Replacement Strategies for Krylov Subspace
        Iterative Methods", §3, whose bound on the drift is measured here instead.
        """
        true = self.rhs[active] - self.apply(self.value[active])
        norms = row_norms(true)
        drift = row_norms(true - recursive)
        self.keep_best(active, norms)
        lost = (drift > 0.5 * norms) & (norms > 0.5 * self._checkpoint[active])
        lost &= live & (norms > self.tolerance[active])
        self._checkpoint[active] = norms
        self.end(active[lost], StopReason.STAGNATED)
        drifted = drift > 0.1 * norms
        return torch.where(drifted[:, None], true, recursive), drifted, ~lost


def inner(a: Rows, b: Rows) -> Float[Tensor, " k"]:
    """Inner product of each row of ``a`` with that of ``b``."""
    products: Tensor = torch.linalg.vecdot(a, b)
    return products


def conjugate_gradients(systems: Systems, active: Int[Tensor, " m"]) -> None:
    """Run PCG on the ``active`` systems until each is ended; results land in ``systems``.

    Hestenes and Stiefel (1952) with a preconditioner, as in Saad (2003), "Iterative Methods for Sparse
    Linear Systems", algorithm 9.1. All systems share each product, each has its own step lengths, and
    those that are done leave the product.
    """
    residual = systems.residual[active]
    keep = systems.settle(active, row_norms(residual))
    active, residual = active[keep], residual[keep]
    direction = systems.precondition(residual)
    rho = _checked_rho(inner(residual, direction))
    while len(active):
        product = systems.apply(direction)
        curvature = inner(direction, product)
        quotient = curvature / inner(direction, direction)
        systems.see(active, quotient, quotient)
        systems.iterations[active] += 1
        systems.passes += 1
        # ~(c > 0) also catches NaN, which settle() would only see a step later.
        bad = ~(curvature > 0)
        if bad.any():
            systems.end(active[bad & torch.isfinite(curvature)], StopReason.NEGATIVE_CURVATURE)
            systems.end(active[~torch.isfinite(curvature)], StopReason.NOT_FINITE)
            good = ~bad
            active, residual, direction, product = active[good], residual[good], direction[good], product[good]
            curvature, rho = curvature[good], rho[good]
            if not len(active):
                break
        step = (rho / curvature)[:, None]
        systems.value.index_add_(0, active, step * direction)
        residual = residual - step * product
        keep = torch.ones(len(active), dtype=torch.bool, device=active.device)
        afresh = ~keep
        if systems.passes % REPLACE_EVERY == 0:
            residual, afresh, keep = systems.replace(active, residual, keep)
        norms = row_norms(residual)
        keep[keep.clone()] = systems.settle(active[keep], norms[keep])
        systems.notify(systems.passes, int(keep.sum()))
        if not keep.all():
            active, residual, direction = active[keep], residual[keep], direction[keep]
            rho, afresh = rho[keep], afresh[keep]
        if not len(active):
            break
        preconditioned = systems.precondition(residual)
        latest = _checked_rho(inner(residual, preconditioned))
        beta = torch.where(afresh, 0.0, latest / rho)
        direction = preconditioned + beta[:, None] * direction
        rho = latest


def _checked_rho(rho: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    if (rho < 0).any():
        raise InvalidInputError(
            f"The preconditioner is not positive definite: rᵀM⁻¹r = {rho.min().item():.3g}. Conjugate "
            "gradients need a symmetric positive definite one."
        )
    return rho
