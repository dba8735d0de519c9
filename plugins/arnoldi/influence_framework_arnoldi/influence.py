"""The influence model that inverts on the largest eigenpairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from influence_framework.compose import Spec, resolve_source
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource
from influence_framework.regularization import Regularization
from influence_framework_arnoldi.solver import ArnoldiSolver


class ArnoldiInfluence(TorchInfluenceFunctionModel):
    """``∇ℓ(z_test)ᵀ (H + λI)⁻¹ ∇ℓ(z)`` with ``H`` replaced by its largest eigenpairs.

    The same as ``compose(model, loss, solver={"name": "arnoldi", ...}, source="hessian", ...)``.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an objective.
        hessian_regularization: λ; above the magnitude of the most negative eigenvalue of the Hessian. At 0
            only the span of the eigenvectors is inverted.
        rank_estimate: Number of eigenpairs.
        krylov_dimension: Basis vectors kept at a time; ``min(P, max(2·rank_estimate + 1, 20))`` where left
            out.
        tol: Residual of an eigenpair relative to its eigenvalue.
        max_iter: How often the basis may be filled; ``10·P`` where left out.
        eigen_computation_on_gpu: Decompose by CuPy, on the GPU that the model is on, in place of PyTorch on
            the model's own device.
        precompute_grad: Keep the gradient graphs of all batches for the next product.
        source: The curvature.
        blocks: Which parameters share a block.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        seed: Of the random start vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        rank_estimate: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        precompute_grad: bool = False,
        *,
        source: Spec | HessianSource = "hessian",
        blocks: str | Mapping[str, Sequence[str]] = "full",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
    ) -> None:
        solver = ArnoldiSolver(
            rank=rank_estimate,
            krylov_dimension=krylov_dimension,
            tol=tol,
            max_iter=max_iter,
            backend="cupy" if eigen_computation_on_gpu else "torch",
            seed=seed,
        )
        super().__init__(
            model,
            loss,
            solver=solver,
            source=resolve_source(source, precompute_grad=precompute_grad),
            blocks=blocks,
            hessian_regularization=hessian_regularization,
            memory_budget=memory_budget,
        )
