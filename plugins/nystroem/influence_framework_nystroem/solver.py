"""The solver ``nystroem``: options, the search for a rank, and what is said of indefinite curvature."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from tqdm import tqdm

from influence_framework.costs import Cost, Workload
from influence_framework.errors import (
    ConvergenceWarning,
    IndefiniteOperatorWarning,
    InvalidInputError,
    NonFiniteError,
    SingularOperatorError,
)
from influence_framework.lowrank import LowRankInverse
from influence_framework.operators import require_capabilities
from influence_framework.protocols import LeadingRows, LinearOperator, SavedState
from influence_framework_nystroem.cost import cost_of_leading, cost_of_nystroem, rank_for
from influence_framework_nystroem.sketch import Approximation, Sketch, leading_approximation
from influence_framework_nystroem.spectrum import NORM_STEPS, Apply, lanczos_steps, residual_norm, ritz_values

FIRST_RANK = 32
"""Where the search for a rank starts; it doubles from there."""

CLOSER_LOOK = 8
"""Further products at least once a negative eigenvalue is seen: the first show hardly more than its sign."""

NEGLIGIBLE = 1e-3
"""A negative eigenvalue below this fraction of λ changes the inverse by less than a sketch gets wrong."""


@dataclass(frozen=True)
class NystroemSolver:
    """Randomised Nyström approximation of rank ``r``, made for positive semidefinite curvature.

    ``C ≈ Ĉ = U Θ Uᵀ = ⟦(C Ω) (Ωᵀ C Ω)⁺ (C Ω)ᵀ⟧_r`` with a random orthonormal ``Ω`` of ``r + oversampling``
    columns, all multiplied in one pass over the data: Tropp, Yurtsever, Udell and Cevher (2017),
    "Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming Data", algorithm 3. Then
    ``(C + λI)⁻¹ ≈ U (Θ + λI)⁻¹ Uᵀ + λ⁻¹ (I − U Uᵀ)``, exact where ``r`` reaches the rank of ``C``; its error is
    at most ``λ⁻¹ ‖E‖ / (‖E‖ + λ)`` for ``E = C − Ĉ``: Frangella, Tropp and Udell (2023), "Randomized Nyström
    Preconditioning", §3. With λ = 0 it is the pseudo-inverse of ``Ĉ``.

    The approximation knows nothing of negative curvature, which is looked for in the span of ``Ω`` and,
    by some steps of Davidson's method, around it: by more where the sketch leaves larger eigenvalues, by none
    where the operator is ``positive_semidefinite``. What is found is warned of; where its magnitude reaches λ,
    it is refused.

    With ``leading_rows=m`` what is approximated, by its ``r`` largest eigenpairs, is ``AᵀA`` of those ``m``
    rows of a square root ``C = AᵀA`` that curve most (see :class:`LeadingRows`). That takes the gradients of
    ``m`` samples in place of ``r`` products with all of them: as a preconditioner often as good, in a small
    part of the time. What the other rows would add is missing.

    Memory is five ``P × (r + oversampling)`` matrices while the approximation is made, and one afterwards.

    Attributes:
        rank: ``r``, the most eigenpairs kept; or ``"auto"``: doubled, keeping all products, until an estimate
            of ``‖C − Ĉ‖`` is at most ``tolerance · λ``.
        seed: Of the generator of all random vectors.
        oversampling: Test vectors beyond the rank. Without them ``Ωᵀ C Ω`` is badly conditioned where ``r`` is
            the rank of ``C``, which costs float32 most of its digits.
        power_passes: How often the test vectors are replaced by an orthonormal basis of their products
            first: better eigenpairs of a slowly decaying spectrum, for a pass over the data each.
        checks: The most products with one vector that look for negative curvature that the sketch does not
            see. As many are made as a random start needs to show an eigenvalue of ``−λ``.
        tolerance: Of ``"auto"``, relative to λ.
        max_rank: Where ``"auto"`` gives up, with a warning.
        leading_rows: How many rows of a square root of the curvature to take; ``None`` for all of it. Needs the
            capability ``LeadingRows``, which the sources over a model's data have, and a ``rank`` in numbers.
        progress: Show a bar that counts the columns multiplied.
    """

    rank: int | Literal["auto"] = 50
    seed: int = 0
    oversampling: int = 10
    power_passes: int = 0
    checks: int = 32
    tolerance: float = 1.0
    max_rank: int = 512
    leading_rows: int | None = None
    progress: bool = False

    fixed: ClassVar[bool] = True
    accuracy: ClassVar[None] = None

    @property
    def finds_indefinite(self) -> bool:
        """Whether it looks for negative curvature, with no fewer checks than it does unless told."""
        return self.checks >= NystroemSolver.checks

    def __post_init__(self) -> None:
        if self.rank != "auto" and not _is_count(self.rank, 1):
            raise InvalidInputError(f"rank must be a positive integer or 'auto', got {self.rank!r}.")
        for name, least in (
            ("seed", 0),
            ("oversampling", 0),
            ("power_passes", 0),
            ("checks", 0),
            ("max_rank", 1),
        ):
            value = getattr(self, name)
            if not _is_count(value, least):
                raise InvalidInputError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if self.leading_rows is not None:
            self._check_leading()
        if not (isinstance(self.tolerance, int | float) and 0 < self.tolerance < math.inf):
            raise InvalidInputError(f"tolerance must be finite and positive, got {self.tolerance!r}.")

    def _check_leading(self) -> None:
        if not _is_count(self.leading_rows, 1):
            raise InvalidInputError(
                f"leading_rows must be a positive integer or None, got {self.leading_rows!r}."
            )
        if self.rank == "auto" or self.rank > cast(int, self.leading_rows):
            raise InvalidInputError(
                f"rank must be a number of at most leading_rows={self.leading_rows}, got {self.rank!r}: so "
                "many rows have no more eigenvalues, and tell nothing of those that the others would add."
            )
        if self.power_passes:
            raise InvalidInputError(
                f"power_passes={self.power_passes} improves random test vectors, and leading_rows takes none: "
                "leave one of the two out."
            )

    def fit(self, operator: LinearOperator, regularization: float) -> NystroemInverse:
        """Sketch the operator and look for what the sketch cannot represent.

        Raises:
            SingularOperatorError: ``C`` has a negative eigenvalue of magnitude λ or more.
            InvalidInputError: λ = 0 with ``rank="auto"``, or neither float32 nor float64.
            NonFiniteError: A product contains NaN or infinity.

        Warns:
            IndefiniteOperatorWarning: ``C`` has a negative eigenvalue of smaller magnitude.
            ConvergenceWarning: ``rank="auto"`` ended at ``max_rank``, or at what rounding leaves.
        """
        if operator.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(
                f"'nystroem' factors float32 and float64 matrices, not {operator.dtype}: convert model and "
                "data."
            )
        if self.rank == "auto" and not regularization > 0:
            raise InvalidInputError(
                "rank='auto' looks for an error below the regularisation, so that hessian_regularization must "
                f"be positive, got {regularization}: raise it, or give the rank as a number."
            )
        generator = torch.Generator("cpu").manual_seed(self.seed)
        with tqdm(desc="Nyström sketch", unit="column", disable=not self.progress) as bar:
            apply = _counted(operator, bar)
            if self.leading_rows is None:
                sketch, approximation, error = self._sketch(operator, apply, regularization, generator)
            else:
                require_capabilities("'nystroem' with leading_rows", operator, (LeadingRows,))
                rows = cast(LeadingRows, operator).leading_rows(self.leading_rows)
                sketch, error = Sketch.empty(operator), None
                approximation = leading_approximation(rows, cast(int, self.rank))
            lowest = self._lowest(apply, sketch, approximation, operator, regularization, generator)
        return NystroemInverse(
            operator,
            regularization,
            approximation.values,
            approximation.vectors,
            # Nothing is outside a basis of the whole space but rounding, which λ⁻¹ would blow up.
            tail=None if len(approximation.values) == operator.shape[0] else 0.0,
            solver=self,
            lowest=lowest,
            error=error,
        )

    def cost(self, workload: Workload) -> Cost:
        """A product with all test vectors together, for every pass of the power method too.

        With ``leading_rows`` it is a pass over the data and the gradients of some samples.
        """
        checks = [] if workload.semidefinite else [(float(self.checks), 1.0)]
        if self.leading_rows is not None:
            return cost_of_leading(workload, ((1.0, 1.0), *checks), cast(int, self.rank), self.leading_rows)
        ranks = [self.rank] if self.rank != "auto" else self._doubled(workload)
        products = []
        width = 0
        for rank in ranks:
            widened = min(rank + self.oversampling, workload.parameters)
            products.append((1.0 + self.power_passes, float(widened - width)))
            width = widened
            if self.rank == "auto":
                products.append((float(NORM_STEPS), 1.0))
        return cost_of_nystroem(workload, (*products, *checks), ranks[-1], width)

    def _doubled(self, workload: Workload) -> list[int]:
        """The ranks that ``"auto"`` would try, as far as the spectrum tells."""
        ranks = [min(FIRST_RANK, self.max_rank)]
        while ranks[-1] < min(self.max_rank, workload.parameters):
            if workload.probed.at(ranks[-1] + 1) <= self.tolerance * workload.regularization:
                break
            ranks.append(min(2 * ranks[-1], self.max_rank))
        return ranks

    @staticmethod
    def advised(workload: Workload) -> list[dict[str, Any]]:
        """With a rank that reaches down to λ, as far as the spectrum tells."""
        return [{"rank": rank_for(workload)}]

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> LowRankInverse:
        """The eigenpairs as they were, of the inverse or of its form as a preconditioner."""
        if "lowest" not in state.values:
            return LowRankInverse.restored(operator, regularization, state)
        found = {name: state.values[name] for name in ("lowest", "error")}
        return NystroemInverse.restored(operator, regularization, state, solver=self, **found)

    def _sketch(
        self, operator: LinearOperator, apply: Apply, regularization: float, generator: torch.Generator
    ) -> tuple[Sketch, Approximation, float | None]:
        """The sketch, the approximation from it, and the error of that where it decided the rank.

        Frangella, Tropp and Udell (2023), §5.4, with Lanczos in place of the power method.
        """
        sketch = Sketch.empty(operator)
        rank = min(FIRST_RANK, self.max_rank) if self.rank == "auto" else self.rank
        while True:
            sketch = sketch.widened(apply, rank + self.oversampling, self.power_passes, generator)
            approximation = sketch.approximation(rank)
            if self.rank != "auto":
                return sketch, approximation, None
            error = residual_norm(apply, approximation.values, approximation.vectors, generator)
            if error <= self.tolerance * regularization or rank >= operator.shape[0]:
                return sketch, approximation, error
            attained = error <= approximation.rounding
            if attained or rank == self.max_rank:
                end, remedy = ("rank", "use float64") if attained else ("max_rank", "raise max_rank")
                warnings.warn(
                    f"rank='auto' ended at {end}={rank} with an error of about {error:.3g}"
                    f"{', the rounding of this dtype' if attained else ''}, above {self.tolerance:g} times the "
                    f"regularisation {regularization:.3g}: {remedy} or raise the regularisation.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
                return sketch, approximation, error
            rank = min(2 * rank, self.max_rank)

    def _lowest(
        self,
        apply: Apply,
        sketch: Sketch,
        approximation: Approximation,
        operator: LinearOperator,
        regularization: float,
        generator: torch.Generator,
    ) -> float:
        """The most negative eigenvalue of ``C``, estimated from above; 0 where none is seen.

        The search starts in the span of ``Ω``, where all products are known, and the deflated inverse leads
        it away from the large eigenvalues. It is positive definite, so that it hides no negative one.
        """
        products, found = self._checks(operator, approximation, regularization), False
        if not sketch.test.shape[1]:
            if not products:
                return 0.0
            sketch = sketch.widened(apply, 1, 0, generator)
        precondition = _deflated(operator, regularization, approximation).__matmul__
        negligible = max(approximation.rounding, NEGLIGIBLE * regularization)
        lowest = 0.0
        for values in ritz_values(apply, precondition, sketch.test, sketch.product, sketch.core):
            lowest = values[0].item()
            if not found and lowest < -negligible:
                products, found = max(products, CLOSER_LOOK), True
            if not products:
                break
            products -= 1
        return lowest if lowest < -approximation.rounding else 0.0

    def _checks(self, operator: LinearOperator, approximation: Approximation, regularization: float) -> int:
        """As many products as show an eigenvalue of ``−λ`` beside those left, of up to about ``θ_r``."""
        if getattr(operator, "positive_semidefinite", False):
            return 0
        if regularization == 0:
            return self.checks
        left = approximation.values[-1].item() if len(approximation.values) else 0.0
        return min(self.checks, lanczos_steps(operator.shape[0], regularization / (left + regularization)))


@dataclass(frozen=True, eq=False)
class NystroemInverse(LowRankInverse):
    """``U (Θ + λI)⁻¹ Uᵀ + λ⁻¹ (I − U Uᵀ)``, the inverse of ``Ĉ + λI``.

    Attributes:
        solver: The options it was fitted with.
        lowest: Estimate, from above, of the most negative eigenvalue of ``C``; 0 where none was seen.
        error: Estimate of ``‖C − Ĉ‖`` where ``fit`` made one.
    """

    solver: NystroemSolver = field(kw_only=True)
    lowest: float = field(kw_only=True)
    error: float | None = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if -self.lowest <= NEGLIGIBLE * self.regularization:
            return
        found = f"The curvature is indefinite, with an eigenvalue of {self.lowest:.4g} or less"
        if self.lowest + self.regularization <= 0:
            suggested = -2 * self.lowest
            raise SingularOperatorError(
                f"{found}, which a Nyström approximation takes for zero: with hessian_regularization="
                f"{self.regularization:.4g} its inverse has nothing to do with that of C + λI. Use at least "
                f"{suggested:.3g}, twice the magnitude, or the source 'gauss_newton'.",
                self._condition(),
                suggested,
            )
        warnings.warn(
            f"{found}, which a Nyström approximation takes for zero: with hessian_regularization="
            f"{self.regularization:.4g} its inverse is {-self.lowest / self.regularization:.1%} too small "
            "along the eigenvector. Raise it, or use the source 'gauss_newton'.",
            IndefiniteOperatorWarning,
            stacklevel=4,
        )

    def _condition(self) -> float:
        """Of ``C + λI``, from the eigenvalues seen."""
        ends = torch.tensor([self.lowest, *self.values[:1].tolist()], dtype=torch.float64, device="cpu")
        shifted = (ends + self.regularization).abs()
        return (shifted.max() / shifted[0]).item()

    @cached_property
    def error_estimate(self) -> float:
        """``‖C − Ĉ‖₂``, estimated from below by a few products with single vectors."""
        if self.error is not None:
            return self.error
        # Not the seed of the sketch: on its own test vectors the approximation is exact.
        generator = torch.Generator("cpu").manual_seed(self.solver.seed + 1)
        return residual_norm(self.base.__matmul__, self.values, self.vectors, generator)

    def state(self) -> SavedState:
        """The eigenpairs, and what was found beside them."""
        return super().state() | SavedState(values={"lowest": self.lowest, "error": self.error})

    def preconditioner(self) -> LowRankInverse:
        """``U (Θ + λI)⁻¹ Uᵀ + (θ_r + λ)⁻¹ (I − U Uᵀ)``, with ``θ_r`` the smallest eigenvalue kept.

        Up to the factor ``θ_r + λ`` this is equation 5.3 of Frangella, Tropp and Udell (2023): the large
        eigenvalues come down to the level of the rest, which stays as it is, where ``λ⁻¹`` would spread it
        out. Positive definite at λ = 0 too, since no eigenvalue kept is zero.
        """
        if self.solver.leading_rows is not None and self.regularization > 0:
            # What these rows leave out, not the smallest eigenvalue that they have, tells of the rest.
            return LowRankInverse(self.base, self.regularization, self.values, self.vectors, rough=True)
        return _deflated(self.base, self.regularization, self)

    def with_regularization(self, regularization: float) -> NystroemInverse:
        """Another λ over the same eigenpairs; a new fit where ``rank="auto"`` has too few for it."""
        if self.solver.rank == "auto" and self.error_estimate > self.solver.tolerance * regularization:
            return self.solver.fit(self.base, regularization)
        return super().with_regularization(regularization)


def _deflated(
    operator: LinearOperator, regularization: float, pairs: Approximation | NystroemInverse
) -> LowRankInverse:
    # Where C has no positive eigenvalue, the identity is as good as any multiple of it.
    tail = pairs.values[-1].item() if len(pairs.values) else 1.0
    return LowRankInverse(operator, regularization, pairs.values, pairs.vectors, tail, rough=True)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _counted(operator: LinearOperator, bar: tqdm[Any]) -> Apply:
    """The product with ``operator``, checked and shown."""

    def apply(columns: Tensor) -> Tensor:
        product = operator @ columns
        if not torch.isfinite(product).all():
            raise NonFiniteError(
                "A product with the curvature contains NaN or infinity: check the scale of the data and of the "
                "parameters."
            )
        bar.update(columns.shape[1])
        return product

    return apply


__all__ = ["NystroemInverse", "NystroemSolver"]
