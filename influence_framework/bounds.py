"""Scores of pairs with a bound on their error, from residuals of both sides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.fitted import SOLVE_COPIES, Fitted, FittedBlock
from influence_framework.gradients import mixed_norms
from influence_framework.problem import Problem
from influence_framework.protocols import InfluenceMode
from influence_framework.solving import SolveLog

ROUNDING = 16.0
"""Rounding errors of a gradient or a product, in units of the dtype's precision and of the terms' size."""


class BoundedScores(NamedTuple):
    """Scores and bounds on their errors.

    Attributes:
        scores: ``(n_test, n_train)``, in mode Perturbation ``(n_test, n_train, *features)``.
        bounds: Of the same shape; none of the scores is farther than this from ``gᵢᵀ (C + λI)⁻¹ gⱼ``, or
            ``gᵢᵀ (C + λI)⁻¹ ∇ₓgⱼ``, of the gradients and the curvature that this dtype computes.
    """

    scores: Float[Tensor, "m n *features"]
    bounds: Float[Tensor, "m n *features"]


@dataclass(frozen=True)
class _Side:
    """Some points of one side in one block.

    Attributes:
        gradients: ``g``, one a row.
        values: ``x̂ ≈ (C + λI)⁻¹ g``.
        residuals: ``r = g − (C + λI) x̂``.
        rounding: What rounding may have done to ``‖r‖``.
    """

    gradients: Float[Tensor, "m P"]
    values: Float[Tensor, "m P"]
    residuals: Float[Tensor, "m P"]
    rounding: Float[Tensor, " m"]

    @classmethod
    def of(cls, block: FittedBlock, gradients: Float[Tensor, "m P"], largest: float, log: SolveLog) -> _Side:
        """Solve for the rows of ``gradients``; ``largest`` bounds the eigenvalues of ``C + λI``."""
        own = gradients[:, block.selection]
        values = block.solve(gradients, log)
        images = torch.add((block.operator @ values.T).T, values, alpha=block.regularization)
        precision = ROUNDING * torch.finfo(own.dtype).eps
        rounding = precision * (_norms(own) + largest * _norms(values))
        return cls(own, values, own - images, rounding)


def bounded_scores(
    fitted: Fitted, test: Batch, train: Batch, log: SolveLog, problem: Problem | None = None
) -> BoundedScores:
    """Adjoint-corrected scores and what is left of their errors, summed over blocks.

    With ``A = C + λI``, solutions ``x̂`` and residuals ``r = g − A x̂`` of both sides, exactly::

        gᵢᵀ A⁻¹ gⱼ = x̂ᵢ·gⱼ + rᵢ·x̂ⱼ + rᵢᵀ A⁻¹ rⱼ,        |rᵢᵀ A⁻¹ rⱼ| ≤ ‖rᵢ‖ ‖rⱼ‖ / μ

    where μ is a lower bound on the eigenvalues of ``A``: λ, as ``C`` is positive semidefinite. The first two
    terms are the score, the last is the bound, and rounding of residuals and inner products is added to it.
    Where ``rⱼ = rᵢ`` the bound exceeds the error at most ``‖A‖/μ`` times. Pierce and Giles (2000), "Adjoint
    Recovery of Superconvergent Functionals from PDE Approximations", §2, for the correction.

    Args:
        fitted: Operators and inverses.
        test: Points of one side.
        train: Points of the other; where it is the same object, it is solved for once.
        log: Where the solves are noted.
        problem: That whose losses are differentiated for ``test``, where it is another one; the two sides are
            other objects then.

    Raises:
        InvalidInputError: A block has no lower bound: its source does not claim to be positive semidefinite,
            or λ is 0.
    """
    largest = _largest(fitted)
    rows = []
    for left in fitted.gradients(test, 2 * SOLVE_COPIES, problem):
        sides = {name: _Side.of(block, left, largest[name], log) for name, block in fitted.blocks.items()}
        whole = train is test and len(left) == fitted.size(test)
        pieces = []
        for right in [None] if whole else fitted.gradients(train, copies=2 * SOLVE_COPIES):
            parts = [
                _pairs(
                    sides[name],
                    sides[name] if right is None else _Side.of(block, right, largest[name], log),
                    block.regularization,
                )
                for name, block in fitted.blocks.items()
            ]
            pieces.append(BoundedScores(*map(_total, zip(*parts, strict=True))))
        rows.append(BoundedScores(*(torch.cat(part, dim=1) for part in zip(*pieces, strict=True))))
    return BoundedScores(*map(torch.cat, zip(*rows, strict=True)))


def bounded_perturbations(
    fitted: Fitted, test: Batch, train: Batch, log: SolveLog, problem: Problem | None = None
) -> BoundedScores:
    """Scores of mode Perturbation and bounds on their errors, summed over blocks.

    With the solution ``x̂ᵢ`` for a test point, its residual ``rᵢ`` and the derivative ``m`` of a training
    point's gradient with respect to one feature of its input::

        |gᵢᵀ A⁻¹ m − x̂ᵢ·m| = |rᵢᵀ A⁻¹ m| ≤ ‖rᵢ‖ ‖m‖ / μ

    Only test points are solved for, so that nothing corrects the scores, and the bound is of first order in
    the residual. It costs the norm of every ``m``: for each training point a derivative of its gradient
    along every feature.

    Args:
        fitted: Operators and inverses.
        test: Points that are solved for.
        train: Points whose inputs are varied.
        log: Where the solves are noted.
        problem: As for :func:`bounded_scores`.

    Raises:
        InvalidInputError: A block has no lower bound, as for :func:`bounded_scores`.
    """
    largest = _largest(fitted)
    norms = mixed_norms({name: block.index for name, block in fitted.blocks.items()}, fitted.problem, train)
    pieces = []
    for gradients in fitted.gradients(test, 2 * SOLVE_COPIES, problem):
        sides = {name: _Side.of(block, gradients, largest[name], log) for name, block in fitted.blocks.items()}
        values = {name: side.values for name, side in sides.items()}
        scores = fitted.contract(values, train, InfluenceMode.Perturbation)
        bounds = []
        for name, side in sides.items():
            remains = (_norms(side.residuals) + side.rounding) / fitted.blocks[name].regularization
            remains += ROUNDING * torch.finfo(gradients.dtype).eps * _norms(side.values)
            bound = torch.outer(remains, norms[name].flatten()).reshape(len(remains), *norms[name].shape)
            bounds.append(bound.to(gradients.dtype))
        pieces.append(BoundedScores(_total(scores.values()), _total(bounds)))
    return BoundedScores(*map(torch.cat, zip(*pieces, strict=True)))


def _largest(fitted: Fitted) -> dict[str, float]:
    """The trace of every block's ``C + λI``; an error where nothing bounds its eigenvalues from below."""
    for block in fitted.blocks.values():
        _check_bounded(block)
    return {
        name: fitted.scales[name].mean_eigenvalue * block.operator.shape[0] + block.regularization
        for name, block in fitted.blocks.items()
    }


def _check_bounded(block: FittedBlock) -> None:
    if not getattr(block.operator, "positive_semidefinite", False):
        raise InvalidInputError(
            "return_bounds=True needs a proven lower bound on the spectrum, and the curvature of block "
            f"{block.name!r} does not claim to be positive semidefinite: use the source 'gauss_newton' with a "
            "loss that is convex in the output, or 'empirical_fisher'."
        )
    if not block.regularization > 0:
        raise InvalidInputError(
            "return_bounds=True needs hessian_regularization > 0, which is then the lower bound on the "
            f"spectrum; block {block.name!r} has {block.regularization}."
        )


def _pairs(left: _Side, right: _Side, lowest: float) -> BoundedScores:
    scores = torch.addmm(left.values @ right.gradients.T, left.residuals, right.values.T)
    remains = [_norms(side.residuals) + side.rounding for side in (left, right)]
    precision = ROUNDING * torch.finfo(scores.dtype).eps
    solved = [_norms(side.values) for side in (left, right)]
    bounds = torch.outer(remains[0] / lowest, remains[1])
    bounds += torch.outer(left.rounding, solved[1])
    bounds += precision * torch.outer(solved[0], _norms(right.gradients))
    bounds += precision * torch.outer(remains[0], solved[1])
    return BoundedScores(scores, bounds.to(scores.dtype))


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _norms(rows: Float[Tensor, "m P"]) -> Float[Tensor, " m"]:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms
