"""The influence model that solves by conjugate gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from influence_framework.compose import Spec, resolve, resolve_source
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource, Solver
from influence_framework.regularization import Regularization
from influence_framework_cg.solver import CgSolver


class CgInfluence(TorchInfluenceFunctionModel):
    """``∇ℓ(z_test)ᵀ (H + λI)⁻¹ ∇ℓ(z)`` with the systems solved by conjugate gradients.

    The same as ``compose(model, loss, solver={"name": "cg", ...}, source="hessian", ...)``.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an objective.
        hessian_regularization: λ; above the magnitude of the most negative eigenvalue of the Hessian.
        x0: Initial guess, ``(P,)`` or ``(P, k)``; zero where left out.
        rtol: Relative tolerance on each residual.
        atol: Absolute tolerance on each residual.
        maxiter: Iteration limit; ``10·P`` where left out.
        progress: Show a bar.
        precompute_grad: Keep the gradient graphs of all batches for the next product.
        pre_conditioner: A solver to precondition with, or its name, or a mapping with options.
        use_block_cg: One Krylov space shared by all right-hand sides.
        warn_on_max_iteration: Warn of systems that reached the iteration limit.
        source: The curvature.
        blocks: Which parameters share a block.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization = 0.0,
        x0: Tensor | None = None,
        rtol: float = 1e-7,
        atol: float = 1e-7,
        maxiter: int | None = None,
        progress: bool = False,
        precompute_grad: bool = False,
        pre_conditioner: Spec | Solver | None = None,
        use_block_cg: bool = False,
        warn_on_max_iteration: bool = True,
        *,
        source: Spec | HessianSource = "hessian",
        blocks: str | Mapping[str, Sequence[str]] = "full",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> None:
        solver = CgSolver(
            rtol=rtol,
            atol=atol,
            maxiter=maxiter,
            preconditioner=None if pre_conditioner is None else resolve("solver", pre_conditioner),
            x0=x0,
            block=use_block_cg,
            progress=progress,
            warn_on_max_iteration=warn_on_max_iteration,
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
