"""The documented influence model on top of the solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from influence_framework import HessianSource, Objective, TorchInfluenceFunctionModel
from influence_framework.compose import Spec, resolve
from influence_framework.objective import Loss
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework_nystroem.solver import NystroemSolver


class NystroemSketchInfluence(TorchInfluenceFunctionModel):
    """Influence through a low-rank Nyström approximation of the curvature.

    The inverse is ``(C + λI)⁻¹ ≈ U (Θ + λI)⁻¹ Uᵀ + λ⁻¹ (I − U Uᵀ)``, see :class:`NystroemSolver`.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        hessian_regularization: λ, in the units of the curvature of the mean loss; one number, or one per
            block name.
        rank: Rank of the approximation, or ``"auto"``.
        source: The curvature, as a name, a mapping with options or an instance. The Hessian of a trained
            net is usually indefinite, for which the approximation is not made: ``"gauss_newton"`` never is.
        blocks: Which parameters share a block.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        seed: Of the generator that draws the test matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: float | Mapping[str, float],
        rank: int | Literal["auto"],
        *,
        source: Spec | HessianSource = "hessian",
        blocks: str | Mapping[str, Sequence[str]] = "full",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            loss,
            solver=NystroemSolver(rank=rank, seed=seed),
            source=resolve("source", source),
            blocks=blocks,
            hessian_regularization=hessian_regularization,
            memory_budget=memory_budget,
        )


__all__ = ["NystroemSketchInfluence"]
