"""The solver ``lissa``: options, and what surrounds the recursion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from influence_framework.costs import Cost, Workload
from influence_framework.errors import (
    ConvergenceWarning,
    IndefiniteOperatorWarning,
    InvalidInputError,
    MissingCapabilityError,
)
from influence_framework.inverses import Inverse, make_solution, row_norms, scaled_rows
from influence_framework.protocols import LinearOperator, Minibatches, SavedState, Solution, StopReason
from influence_framework_lissa.cost import cost_of_lissa
from influence_framework_lissa.recursion import Rows, Systems, averaged, plain
from influence_framework_lissa.spectrum import typical_largest

ATTAINABLE = 10.0
"""Relative residual, in units of the dtype's precision, below which nothing can be told from rounding."""
MARGIN = 1.2
"""Automatic scale, in units of the least that is stable in mean square."""


@dataclass(frozen=True)
class LissaSolver:
    """LiSSA: a stochastic recursion whose products are with random mini-batches.

    With ``C_b`` the curvature of a random mini-batch, drawn anew in every iteration, and ``s`` the scale::

        h ← b + (1 − d)·h − (C_b + λI) h / s        x = h / s

    All right-hand sides share each product. Agarwal, Bullins and Hazan (2017), "Second-Order Stochastic
    Optimization for Machine Learning in Linear Time", §3, with the scale of Koh and Liang (2017),
    "Understanding Black-box Predictions via Influence Functions", §3. The mean of the recursion
    converges where ``s > Λ / (2 − d)``, ``Λ`` the largest eigenvalue of ``C + λI``, and mini-batches need
    more than that; the smallest eigenvalue ``μ`` then converges as ``(1 − d − μ/s)^t``. With ``d = 0`` the
    fixed point is ``x = (C + λI)⁻¹ b``. With ``d > 0`` it is ``(C + (λ + d·s) I)⁻¹ b``: that system is
    the one solved to ``rtol``, while the residual reported stays the one of ``C + λI``.

    With a fixed scale the iterates do not converge but wander about the fixed point, since mini-batches
    differ. By default the recursion is therefore cut into runs: each averages the second half of its
    iterates, takes the step along the average that leaves the least residual, and the next run solves
    for that residual, which is the true one, with the whole operator. A right-hand side is done when
    its residual is at most ``rtol·‖b‖``. Nothing but these checks, one product with the whole operator
    each, goes over all the data.

    Attributes:
        maxiter: Limit on iterations, that is on products with mini-batches.
        dampen: ``d``, from 0 to below 1.
        scale: ``s``, in the units of the curvature, or ``"auto"``: 1.2 times the least that is stable, by an
            estimate from a few products with mini-batches at ``fit``, and doubled during a solve
            whenever that proves too little.
        h0: Initial guess of the solution ``x``, ``(P,)`` for every right-hand side or ``(P, k)``; zero where
            left out, which gives ``h = b`` in the first iteration.
        rtol: Relative tolerance on the residual; never taken below ten times the dtype's precision.
        seed: Of the mini-batches' order and of the estimate's random vectors. Every solve starts from it.
        averaging: Iterations of the first run; later ones are longer where a run leaves more than 0.7 of the
            residual. Larger values suit data of very many mini-batches, where a check is dear.
            ``None`` for the plain recursion: ``maxiter`` iterations of which the last is returned, whatever
            ``rtol``, with the noise of its mini-batches.
        progress: Show a bar that counts iterations.
        warn_on_max_iteration: Warn of right-hand sides that reached the iteration limit.
    """

    requires: ClassVar[tuple[type, ...]] = (Minibatches,)

    maxiter: int = 1000
    dampen: float = 0.0
    scale: float | Literal["auto"] = "auto"
    h0: Float[Tensor, "P *k"] | None = field(default=None, compare=False)
    rtol: float = 1e-4
    seed: int = 0
    averaging: int | None = 32
    progress: bool = False
    warn_on_max_iteration: bool = True

    def __post_init__(self) -> None:
        if not _is_count(self.maxiter):
            raise InvalidInputError(f"maxiter must be a positive integer, got {self.maxiter!r}.")
        if not (_is_number(self.dampen) and 0 <= self.dampen < 1):
            raise InvalidInputError(
                f"dampen is the d of (1 − d)·h, from 0 to below 1, got {self.dampen!r}. It adds d·scale to the "
                "regularisation: to raise that, use hessian_regularization."
            )
        if self.scale != "auto" and not (_is_number(self.scale) and self.scale > 0):
            raise InvalidInputError(f"scale must be a positive number or 'auto', got {self.scale!r}.")
        if self.h0 is not None and not isinstance(self.h0, Tensor):
            raise InvalidInputError(f"h0 must be a tensor or None, got {type(self.h0).__name__}.")
        if not (_is_number(self.rtol) and self.rtol >= 0):
            raise InvalidInputError(f"rtol must be finite and not negative, got {self.rtol!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InvalidInputError(f"seed must be an integer, got {self.seed!r}.")
        if self.averaging is not None and not _is_count(self.averaging):
            raise InvalidInputError(
                "averaging counts the iterations of the first run: expected a positive integer, or None for "
                f"the plain recursion, got {self.averaging!r}."
            )

    @property
    def accuracy(self) -> float | None:
        """``rtol``, unless the plain recursion or ``dampen`` makes the result an approximation."""
        return None if self.averaging is None or self.dampen else self.rtol

    def fit(self, operator: LinearOperator, regularization: float) -> LissaInverse:
        """Choose the scale where it is ``"auto"``; the systems themselves are solved on demand.

        Raises:
            MissingCapabilityError: The operator offers no mini-batches.
            InvalidInputError: The scale is ``"auto"`` and ``C + λI`` is zero.
            NonFiniteError: A product contains NaN or infinity.

        Warns:
            ConvergenceWarning: ``dampen`` is not 0, so that another λ than the one asked for is solved with.
        """
        if not isinstance(operator, Minibatches):
            raise MissingCapabilityError(
                f"'lissa' works on mini-batches, and {type(operator).__name__} has none (no method "
                "minibatches(generator)): use a curvature source over data, or another solver such as 'cg'."
            )
        largest = typical_largest(operator, operator, self.seed) if self.scale == "auto" else None
        inverse = LissaInverse(operator, regularization, self, operator, largest)
        if self.dampen:
            warnings.warn(
                f"dampen={self.dampen:g} adds dampen·scale to the regularisation: the systems solved are those "
                f"of λ = {inverse.added:.4g}, not of λ = {regularization:.4g}. Use dampen=0, with that λ as "
                "hessian_regularization if it is meant.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return inverse

    def cost(self, workload: Workload) -> Cost:
        """A mini-batch for every iteration, of which the spectrum tells how many."""
        if self.dampen:
            raise InvalidInputError(f"dampen = {self.dampen:g} solves with another λ than the one asked for")
        scale = None if self.scale == "auto" else float(self.scale)
        rtol = max(self.rtol, ATTAINABLE * workload.precision)
        return cost_of_lissa(workload, scale, MARGIN / 2, rtol, self.averaging, self.maxiter)

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> LissaInverse:
        """The scale as it was."""
        if not isinstance(operator, Minibatches):
            raise MissingCapabilityError(
                f"'lissa' works on mini-batches, and {type(operator).__name__} has none."
            )
        return LissaInverse(operator, regularization, self, operator, state.values["largest"])


@dataclass(frozen=True, eq=False)
class LissaInverse(Inverse):
    """``(C + λI)⁻¹`` by LiSSA, solved anew for every right-hand side.

    Attributes:
        base: ``C``.
        regularization: λ.
        solver: The options.
        batches: What yields the mini-batches; the same object as ``base``.
        largest: The largest eigenvalue that mini-batches typically have; ``None`` where the scale was given.
    """

    multiplies: ClassVar[bool] = True

    base: LinearOperator
    regularization: float
    solver: LissaSolver
    batches: Minibatches
    largest: float | None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InvalidInputError(
                "The curvature is zero and so is the regularisation: there is nothing to invert. Use "
                "hessian_regularization > 0."
            )

    @property
    def quiet(self) -> frozenset[StopReason]:
        silent = () if self.solver.warn_on_max_iteration else (StopReason.ITERATION_LIMIT,)
        return frozenset(silent)

    @property
    def scale(self) -> float:
        """``s`` that a solve starts with."""
        if self.largest is None:
            return float(self.solver.scale)
        return self._stable_scale(self.largest)

    @property
    def added(self) -> float:
        """What a solve adds to the diagonal of ``C``: ``λ + d·s``."""
        return self.regularization + self.solver.dampen * self.scale

    def _stable_scale(self, largest: float) -> float:
        return MARGIN * (largest + self.regularization) / (2.0 - self.solver.dampen)

    def with_regularization(self, regularization: float) -> LissaInverse:
        """Another λ; nothing is estimated again."""
        return replace(self, regularization=regularization)

    def state(self) -> SavedState:
        """What the scale follows from."""
        return SavedState(values={"largest": self.largest})

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        rhs, unit = scaled_rows(columns)
        norms = row_norms(rhs)
        limit = self.solver.maxiter
        with tqdm(total=limit, desc="LiSSA", unit="iteration", disable=not self.solver.progress) as progress:
            systems = self._systems(rhs, norms, self._initial(columns) / unit, _notifier(progress))
            self._run(systems, rhs, norms)
        self._explain(systems)
        dampened = systems.shift - self.regularization
        remaining = row_norms(torch.add(systems.residual, systems.value, alpha=dampened))
        relative = torch.where(norms == 0, 0.0, remaining.double() / norms.double())
        reasons = [reason or StopReason.CONVERGED for reason in systems.reason]
        # The recursion looks at curvature only where something goes wrong.
        seen = torch.tensor(systems.extremes, dtype=torch.float64, device="cpu")
        curvature = torch.where(seen.isfinite(), seen, torch.nan).expand(len(rhs), 2)
        return make_solution(
            (systems.value * unit).T, relative, reasons, systems.iterations.tolist(), curvature
        )

    def _systems(
        self, rhs: Rows, norms: Float[Tensor, " k"], value: Rows, notify: Callable[[int], object]
    ) -> Systems:
        generator = torch.Generator("cpu").manual_seed(self.solver.seed)
        floor = ATTAINABLE * torch.finfo(rhs.dtype).eps
        value[norms == 0] = 0.0
        systems = Systems(
            batches=self.batches.minibatches(generator),
            whole=self.base,
            shift=self.added,
            scale=self.scale,
            adaptive=self.solver.scale == "auto",
            value=value,
            residual=rhs.clone(),
            tolerance=max(self.solver.rtol, floor) * norms,
            reason=[None] * len(rhs),
            iterations=torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device),
            limit=self.solver.maxiter,
            notify=notify,
        )
        if self.solver.h0 is not None:
            systems.residual -= systems.apply(value)
        return systems

    def _run(self, systems: Systems, rhs: Rows, norms: Float[Tensor, " k"]) -> None:
        """Run the recursion until every claim it makes is true; the residuals are the true ones then."""
        finite = torch.isfinite(norms)
        systems.mark(torch.nonzero(~finite).flatten(), StopReason.NOT_FINITE)
        active = torch.nonzero(finite & (row_norms(systems.residual) > systems.tolerance)).flatten()
        previous = torch.full_like(norms, math.inf)
        while len(active):
            if self.solver.averaging is None:
                plain(systems, active)
            else:
                averaged(systems, active, self.solver.averaging)
            systems.residual[active] = rhs[active] - systems.apply(systems.value[active])
            latest = row_norms(systems.residual)
            claimed = systems.marked(active, StopReason.CONVERGED)
            again = claimed[latest[claimed] > systems.tolerance[claimed]]
            systems.mark(again, None if systems.passes < systems.limit else StopReason.ITERATION_LIMIT)
            systems.mark(again[latest[again] > 0.5 * previous[again]], StopReason.STAGNATED)
            active = systems.marked(again, None)
            previous = latest

    def _initial(self, columns: Float[Tensor, "P k"]) -> Rows:
        guess = self.solver.h0
        if guess is None:
            return torch.zeros_like(columns.T)
        if guess.shape not in (columns.shape[:1], columns.shape):
            raise InvalidInputError(
                f"h0 must be ({columns.shape[0]},) or {tuple(columns.shape)} for these right-hand sides, got "
                f"{tuple(guess.shape)}."
            )
        if guess.dtype != columns.dtype or guess.device != columns.device:
            raise InvalidInputError(
                f"h0 is {guess.dtype} on {guess.device}, the right-hand sides {columns.dtype} on "
                f"{columns.device}: convert it with .to(...)."
            )
        if not torch.isfinite(guess).all():
            raise InvalidInputError("h0 contains NaN or infinity: pass a finite guess, or None.")
        return (guess if guess.ndim == 1 else guess.T).expand(columns.T.shape)

    def _explain(self, systems: Systems) -> None:
        """Warn, once, of what no further iteration would mend, and say what would."""
        low, high = systems.extremes
        if StopReason.NEGATIVE_CURVATURE in systems.reason:
            warnings.warn(
                f"C + λI is not positive definite at λ = {self.regularization:g}: C has an eigenvalue of at "
                f"most {low:.4g}, along which LiSSA diverges at every scale. Use λ > {-low:.3g}, with a "
                "margin, or the source 'gauss_newton'.",
                IndefiniteOperatorWarning,
                stacklevel=4,
            )
        if StopReason.DIVERGED in systems.reason:
            largest = max(high, typical_largest(self.base, self.batches, self.solver.seed))
            stable = max(self._stable_scale(largest), 2.0 * systems.scale)
            warnings.warn(
                f"LiSSA diverged at scale={systems.scale:g}: the largest eigenvalue of mini-batches is about "
                f"{largest:.4g}. Use scale={stable:.3g}, or scale='auto'.",
                ConvergenceWarning,
                stacklevel=4,
            )


def _notifier(progress: tqdm[Any]) -> Callable[[int], object]:
    def notify(width: int) -> None:
        progress.set_postfix(systems=width, refresh=False)
        progress.update()

    return notify


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
