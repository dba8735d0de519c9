"""The influence model that solves by LiSSA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from influence_framework.compose import Spec, resolve
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource
from influence_framework.regularization import Regularization
from influence_framework_lissa.solver import LissaSolver


class LissaInfluence(TorchInfluenceFunctionModel):
    """``∇ℓ(z_test)ᵀ (H + λI)⁻¹ ∇ℓ(z)`` with the systems solved by LiSSA.

    The same as ``compose(model, loss, solver={"name": "lissa", "scale": 10.0, ...}, source="hessian", ...)``.
    The recursion is stated in :class:`LissaSolver`. Mini-batches have the size of the loader's batches.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an objective.
        hessian_regularization: λ; above the magnitude of the most negative eigenvalue of the Hessian.
        maxiter: Limit on iterations.
        dampen: ``d`` of the recursion; where it is not 0, ``d·scale`` is added to λ.
        scale: ``s`` of the recursion, in the units of the curvature; ``"auto"`` chooses it.
        h0: Initial guess of the solutions, ``(P,)`` or ``(P, k)``; zero where left out.
        rtol: Relative tolerance on each residual.
        progress: Show a bar.
        warn_on_max_iteration: Warn of systems that reached the iteration limit.
        source: The curvature.
        blocks: Which parameters share a block.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        seed: Of the mini-batches' order.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float | Literal["auto"] = 10.0,
        h0: Tensor | None = None,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        *,
        source: Spec | HessianSource = "hessian",
        blocks: str | Mapping[str, Sequence[str]] = "full",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
    ) -> None:
        solver = LissaSolver(
            maxiter=maxiter,
            dampen=dampen,
            scale=scale,
            h0=h0,
            rtol=rtol,
            seed=seed,
            progress=progress,
            warn_on_max_iteration=warn_on_max_iteration,
        )
        super().__init__(
            model,
            loss,
            solver=solver,
            source=resolve("source", source),
            blocks=blocks,
            hessian_regularization=hessian_regularization,
            memory_budget=memory_budget,
        )
