"""The recursion on mini-batches, for many right-hand sides at once, and the runs it is cut into."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence_framework.inverses import row_norms
from influence_framework.protocols import LinearOperator, StopReason
from influence_framework_lissa.spectrum import ritz_values

Rows = Float[Tensor, "k P"]

LOOK_EVERY = 8
"""Iterations between looks at the norms; each look waits for the device."""
GROWTH = 100.0
"""Growth beyond what a stable recursion can show, which noise does not reach and divergence soon does."""
WITNESSES = 4
"""Diverging iterates from which the cause is looked for."""
STEPS = 5
"""Power iterations on them, each a product with the whole operator."""


@dataclass
class Systems:
    """The systems ``(C + shift·I) x = b`` being worked on, one a row, and where each stands.

    Attributes:
        batches: Mini-batches ``C_b``.
        whole: ``C``.
        shift: What is added to the diagonal.
        scale: ``s``.
        adaptive: Whether the scale may be raised.
        value: Current solutions, updated in place.
        residual: ``b − (C + shift·I) x``, updated in place.
        tolerance: On ``‖residual‖``, one each.
        reason: Why each was ended; ``None`` while it is worked on.
        iterations: Mini-batch products spent on each.
        limit: Iteration limit.
        notify: Called once an iteration with the number of systems in it.
        passes: Iterations made, whatever the system.
        extremes: Least and largest eigenvalue of ``C`` seen where something went wrong.
    """

    batches: Iterator[LinearOperator]
    whole: LinearOperator
    shift: float
    scale: float
    adaptive: bool
    value: Rows
    residual: Rows
    tolerance: Float[Tensor, " k"]
    reason: list[StopReason | None]
    iterations: Int[Tensor, " k"]
    limit: int
    notify: Callable[[int], object]
    passes: int = 0
    extremes: tuple[float, float] = (math.inf, -math.inf)

    def apply(self, rows: Rows) -> Rows:
        """``V ↦ V (C + shift·I)`` with the whole operator."""
        return torch.add((self.whole @ rows.T).T, rows, alpha=self.shift)

    def mark(self, which: Int[Tensor, " m"], reason: StopReason | None) -> None:
        """Note why work on these systems stops; ``None`` to take it up again."""
        for system in which.tolist():
            self.reason[system] = reason

    def marked(self, which: Int[Tensor, " m"], reason: StopReason | None) -> Int[Tensor, " l"]:
        """Those of ``which`` that stopped for this reason; ``None`` for those that did not stop."""
        chosen = [self.reason[system] is reason for system in which.tolist()]
        return which[torch.tensor(chosen, dtype=torch.bool, device=which.device)]

    def indefinite(self, witnesses: Rows) -> bool:
        """Whether ``C + shift·I`` has a negative eigenvalue, looked for from these directions."""
        spectrum = ritz_values(self.whole, witnesses[:WITNESSES].T, STEPS)
        low, high = spectrum[0].item(), spectrum[-1].item()
        self.extremes = (min(low, self.extremes[0]), max(high, self.extremes[1]))
        rounding = 100 * torch.finfo(self.residual.dtype).eps * max(abs(low), abs(high))
        return low + self.shift < -rounding


@dataclass(frozen=True)
class Run:
    """What a run of the recursion from zero led to.

    Attributes:
        active: The systems that stayed bounded.
        step: Their averaged iterates, as corrections of the solution.
        grown: The systems that did not.
        witnesses: Directions, one for each of these, along which the growth is to be sought.
    """

    active: Int[Tensor, " m"]
    step: Float[Tensor, "m P"]
    grown: Int[Tensor, " g"]
    witnesses: Float[Tensor, "g P"]


def run(systems: Systems, active: Int[Tensor, " m"], length: int, tail: int) -> Run:
    """``h ← r + h − (C_b + shift·I) h / s``, ``length`` times from ``h = r``; the mean of the last ``tail``.

    A stable recursion with ``C`` itself keeps ``‖h_t‖ ≤ (t + 1)·‖r‖``, since ``h_t = Σ_{j≤t} (I − A/s)ʲ r``
    and no factor exceeds 1. Iterates far beyond that have diverged, and leave the product.
    """
    rhs = systems.residual[active]
    bound = GROWTH * row_norms(rhs)
    iterate, total = rhs.clone(), torch.zeros_like(rhs)
    grown, witnesses = [active[:0]], [rhs[:0]]
    for step in range(1, length + 1):
        product = (next(systems.batches) @ iterate.T).T
        torch.add(rhs, iterate, alpha=1.0 - systems.shift / systems.scale, out=iterate)
        iterate.add_(product, alpha=-1.0 / systems.scale)
        if step > length - tail:
            total += iterate
        systems.iterations[active] += 1
        systems.passes += 1
        systems.notify(len(active))
        if step % LOOK_EVERY == 0 or step == length:
            norms = row_norms(iterate)
            bounded = norms <= (step + 1) * bound
            if not bounded.all():
                # Where the iterate has overflowed, its right-hand side is the best direction left.
                finite = torch.isfinite(norms)[~bounded, None]
                directions = iterate[~bounded] / norms[~bounded, None]
                witnesses.append(torch.where(finite, directions, rhs[~bounded]))
                grown.append(active[~bounded])
                active, bound = active[bounded], bound[bounded]
                rhs, iterate, total = rhs[bounded], iterate[bounded], total[bounded]
            if not len(active):
                break
    return Run(active, total.div_(tail * systems.scale), torch.cat(grown), torch.cat(witnesses))


def averaged(systems: Systems, active: Int[Tensor, " m"], length: int) -> None:
    """Solve by runs on the residual that is left, until each system is ended; results land in ``systems``.

    Each run averages the second half of its iterates, which takes out most of the noise of the
    mini-batches: Polyak and Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging". One
    product with the whole operator then gives the true residual, and the length of step along the average
    that leaves the least of it. The next run starts from that residual, and its noise is in proportion
    to it: without this the noise of the whole solution would stay. On quadratics the restart is that of
    Johnson and Zhang (2013), "Accelerating Stochastic Gradient Descent using Predictive Variance
    Reduction".

    A run that gains little is not worth the pass over the data at its end: the next ones are longer. Where
    less than half of the average is to be taken, most of it is noise: the scale is raised, if it may be.
    """
    while len(active):
        steps = min(length, systems.limit - systems.passes)
        found = run(systems, active, steps, steps - steps // 2)
        image = systems.apply(found.step)
        curvature = (found.step * image).sum(dim=1)
        before = systems.residual[found.active]
        fraction = (before * image).sum(dim=1) / image.square().sum(dim=1)
        fraction = torch.where(torch.isfinite(fraction), fraction, 0.0)
        norms = advance(systems, found, image, fraction)
        _settle(systems, found, norms, curvature <= 0)
        if len(found.active):
            gain = norms / row_norms(before)
            if gain.median() > 0.7:
                length = math.ceil(1.5 * length)
            if systems.adaptive and fraction.median() < 0.5:
                systems.scale *= 2.0
        active = systems.marked(active, None)


def plain(systems: Systems, active: Int[Tensor, " m"]) -> None:
    """Solve by one run to the iteration limit, whose last iterate is the result."""
    while len(active):
        found = run(systems, active, systems.limit - systems.passes, 1)
        image = systems.apply(found.step)
        better = row_norms(systems.residual[found.active] - image) < row_norms(systems.residual[found.active])
        norms = advance(systems, found, image, better.to(image.dtype))
        _settle(systems, found, norms, torch.zeros_like(better))
        active = systems.marked(active, None)


def advance(
    systems: Systems, found: Run, image: Float[Tensor, "m P"], fraction: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Take this fraction of every step; the norms of the residuals that are left."""
    systems.value.index_add_(0, found.active, fraction[:, None] * found.step)
    systems.residual.index_add_(0, found.active, fraction[:, None] * image, alpha=-1.0)
    return row_norms(systems.residual[found.active])


def _settle(systems: Systems, found: Run, norms: Float[Tensor, " m"], concave: Bool[Tensor, " m"]) -> None:
    """End the systems that are solved, cannot be solved, or have reached the limit."""
    active = found.active
    reached = norms <= systems.tolerance[active]
    if systems.passes >= systems.limit:
        systems.mark(torch.cat([active, found.grown]), StopReason.ITERATION_LIMIT)
    # Along null directions of a singular C rounding alone decides the sign of the curvature.
    if concave.any() and systems.indefinite(found.step[concave]):
        systems.mark(active[concave], StopReason.NEGATIVE_CURVATURE)
    systems.mark(active[reached], StopReason.CONVERGED)
    if not len(found.grown):
        return
    if systems.indefinite(found.witnesses):
        systems.mark(found.grown, StopReason.NEGATIVE_CURVATURE)
    elif systems.adaptive:
        systems.scale *= 2.0
    else:
        systems.mark(found.grown, StopReason.DIVERGED)
