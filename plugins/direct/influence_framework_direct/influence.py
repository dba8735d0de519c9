"""The influence model that factors the curvature matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from influence_framework.compose import Spec, resolve
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource
from influence_framework.regularization import Regularization
from influence_framework_direct.solver import DirectSolver


class DirectInfluence(TorchInfluenceFunctionModel):
    """``∇ℓ(z_test)ᵀ (H + λI)⁻¹ ∇ℓ(z)`` with ``H + λI`` formed and factored.

    The same as ``compose(model, loss, solver="direct", source="hessian", ...)``.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an objective.
        hessian_regularization: λ.
        source: The curvature.
        blocks: Which parameters share a block.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        *,
        source: Spec | HessianSource = "hessian",
        blocks: str | Mapping[str, Sequence[str]] = "full",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> None:
        super().__init__(
            model,
            loss,
            solver=DirectSolver(),
            source=resolve("source", source),
            blocks=blocks,
            hessian_regularization=hessian_regularization,
            memory_budget=memory_budget,
        )
