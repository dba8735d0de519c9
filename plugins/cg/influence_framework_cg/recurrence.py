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

STEEP = 0.25
"""Residuals that fell to this part with every iteration, on average, are expected to do so once more."""


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
        verified: Systems that ended at an iterate whose true residual was measured; ``residual`` is that.
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
        self.verified = torch.zeros(len(self.rhs), dtype=torch.bool, device=self.rhs.device)
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

    def land(
        self, active: Int[Tensor, " m"], trial: Rows, image: Rows, residual: Rows
    ) -> tuple[Int[Tensor, " l"], Float[Tensor, "l P"], Float[Tensor, " l"]]:
        """End the systems that iterates on ``trial`` solve; the others, with residuals to start afresh from.

        ``image`` is the product with ``trial``. An iterate that is no better than the last is not taken.
        """
        true = self.rhs[active] - image
        norms, before = row_norms(true), row_norms(residual)
        better = norms < before
        self.value[active[better]] = trial[better]
        self.keep_best(active[better], norms[better])
        residual = torch.where(better[:, None], true, residual)
        norms = torch.where(better, norms, before)
        self.residual[active] = residual
        self.verified[active[better & (norms <= self.tolerance[active])]] = True
        go_on = self.settle(active, norms)
        return active[go_on], residual[go_on], norms[go_on]

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

    Where a residual has fallen so steeply that the next step should be the last, it is taken with the length
    of the step before, and the product is with the iterate it leads to. That tells the true residual, for
    which a system that is done otherwise takes a product more. Steeply means within a few iterations, in
    which the recursion has not drifted; a system that is not done then starts afresh, and is not tried again.
    """
    residual = systems.residual[active]
    norms = row_norms(residual)
    keep = systems.settle(active, norms)
    active, residual, norms = active[keep], residual[keep], norms[keep]
    direction = systems.precondition(residual)
    rho = _checked_rho(inner(residual, direction))
    step = torch.zeros_like(rho)
    initial, begun = row_norms(systems.residual), systems.passes
    tried = torch.zeros_like(systems.verified)
    while len(active):
        fall = (norms / initial[active]) ** (1 / max(1, systems.passes - begun))
        last = (fall <= STEEP) & (fall * norms <= systems.tolerance[active]) & ~tried[active]
        systems.iterations[active] += 1
        systems.passes += 1
        others = active[:0], residual[:0], norms[:0]
        if last.any():
            ahead = ~last
            tried[active[last]] = True
            trial = torch.addcmul(systems.value[active[last]], step[last, None], direction[last])
            product, image = systems.apply(torch.cat([direction[ahead], trial])).tensor_split(
                [int(ahead.sum())]
            )
            others = systems.land(active[last], trial, image, residual[last])
            active, residual, direction = active[ahead], residual[ahead], direction[ahead]
            rho = rho[ahead]
        else:
            product = systems.apply(direction)
        curvature = inner(direction, product)
        quotient = curvature / inner(direction, direction)
        systems.see(active, quotient, quotient)
        # ~(c > 0) also catches NaN, which settle() would only see a step later.
        bad = ~(curvature > 0)
        if bad.any():
            systems.end(active[bad & torch.isfinite(curvature)], StopReason.NEGATIVE_CURVATURE)
            systems.end(active[~torch.isfinite(curvature)], StopReason.NOT_FINITE)
            good = ~bad
            active, residual, direction, product = active[good], residual[good], direction[good], product[good]
            curvature, rho = curvature[good], rho[good]
        step = rho / curvature
        systems.value.index_add_(0, active, step[:, None] * direction)
        residual = residual - step[:, None] * product
        keep = torch.ones(len(active), dtype=torch.bool, device=active.device)
        afresh = ~keep
        if systems.passes % REPLACE_EVERY == 0:
            residual, afresh, keep = systems.replace(active, residual, keep)
        norms = row_norms(residual)
        keep[keep.clone()] = systems.settle(active[keep], norms[keep])
        if not keep.all():
            active, residual, direction = active[keep], residual[keep], direction[keep]
            rho, afresh, step, norms = rho[keep], afresh[keep], step[keep], norms[keep]
        if len(others[0]):
            active, residual, norms = (
                torch.cat(pair) for pair in zip((active, residual, norms), others, strict=True)
            )
            fresh = len(others[0])
            direction = torch.cat([direction, direction.new_zeros(fresh, direction.shape[1])])
            rho, step = (torch.cat([values, values.new_ones(fresh)]) for values in (rho, step))
            afresh = torch.cat([afresh, afresh.new_ones(fresh)])
        systems.notify(systems.passes, len(active))
        if not len(active):
            break
        preconditioned = systems.precondition(residual)
        current = _checked_rho(inner(residual, preconditioned))
        beta = torch.where(afresh, 0.0, current / rho)
        direction = preconditioned + beta[:, None] * direction
        rho = current


def _checked_rho(rho: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    if (rho < 0).any():
        raise InvalidInputError(
            f"The preconditioner is not positive definite: rᵀM⁻¹r = {rho.min().item():.3g}. Conjugate "
            "gradients need a symmetric positive definite one."
        )
    return rho
