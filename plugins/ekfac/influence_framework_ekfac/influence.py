"""The influence model on Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_framework.compose import Spec, resolve_source
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.layers import Samples
from influence_framework.measurement import Measurement
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource, InfluenceMode
from influence_framework.regularization import Regularization
from influence_framework_ekfac.solver import EkfacSolver
from influence_framework_ekfac.statistics import WeightSharing


class EkfacInfluence(TorchInfluenceFunctionModel):
    """``∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ℓ(z)`` with Kronecker-factored curvature ``C``, one block a layer.

    The same as ``compose(model, loss, solver={"name": "ekfac", ...}, blocks="per_layer", ...)``. Layers are
    named after their modules in every result.

    Args:
        model: A trained model in eval mode.
        update_diagonal: Refit the eigenvalues in the eigenbasis (EK-FAC); else plain K-FAC.
        hessian_regularization: λ.
        progress: Show a bar for each pass.
        loss: ``loss(output, target) -> scalar``, or an objective; cross-entropy where left out.
        source: The curvature.
        blocks: Which parameters share a block. Curvature between layers is left out in any case.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        samples: Targets drawn from the model's predictions for every sample, or ``"exact"``.
        weight_sharing: What a position is to the factors; see :class:`EkfacSolver`.
        uncovered: What becomes of parameters without a matrix form; see :class:`EkfacSolver`.
        score_rtol: How far a score may be off; see :class:`EkfacSolver`.
        dtype: Of covariances and eigendecompositions.
        seed: Of the drawn targets.
        partitions: Groups that the layers are worked on in; see :class:`EkfacSolver`.
        storage: Where eigenbases are kept; see :class:`EkfacSolver`.
        storage_dtype: What they are rounded to there; see :class:`EkfacSolver`.
        score_dtype: What gradients are rounded to for scores; see :class:`EkfacSolver`.
    """

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: Regularization = 0.0,
        progress: bool = False,
        *,
        loss: Loss | Objective | None = None,
        source: Spec | HessianSource = "gauss_newton",
        blocks: str | Mapping[str, Sequence[str]] = "per_layer",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        samples: Samples = 1,
        weight_sharing: WeightSharing = "expand",
        uncovered: Literal["error", "diagonal", "identity"] = "error",
        score_rtol: float = 1e-4,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        partitions: int | Literal["auto"] = 1,
        storage: str = "device",
        storage_dtype: torch.dtype | None = None,
        score_dtype: torch.dtype | None = None,
    ) -> None:
        solver = EkfacSolver(
            update_diagonal=update_diagonal,
            progress=progress,
            samples=samples,
            weight_sharing=weight_sharing,
            uncovered=uncovered,
            score_rtol=score_rtol,
            dtype=dtype,
            seed=seed,
            memory_budget=memory_budget,
            partitions=partitions,
            storage=storage,
            storage_dtype=storage_dtype,
            score_dtype=score_dtype,
        )
        super().__init__(
            model,
            nn.CrossEntropyLoss() if loss is None else loss,
            solver=solver,
            source=resolve_source(source, precompute_grad=False),
            blocks=blocks,
            hessian_regularization=hessian_regularization,
            memory_budget=memory_budget,
        )

    def influences_by_layer(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
    ) -> dict[str, Tensor]:
        """Each layer's part of :meth:`influences`, ``(n_test, n_train)`` whatever the sizes."""
        return self.influences_by_block(x_test, y_test, x, y, mode, measurement=measurement)

    def influence_factors_by_layer(
        self, x: Any, y: Any, *, measurement: Measurement | None = None
    ) -> dict[str, Tensor]:
        """Each layer's columns of :meth:`influence_factors`."""
        return self.influence_factors_by_block(x, y, measurement=measurement)

    def influences_from_factors_by_layer(
        self,
        z_test_factors: Mapping[str, Tensor],
        x: Any,
        y: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[str, Tensor]:
        """Each layer's part of :meth:`influences_from_factors`, from factors by layer."""
        return self.influences_from_factors_by_block(z_test_factors, x, y, mode)
