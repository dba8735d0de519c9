"""Curvature of a penalised loss: what is penalised, how much, and what nothing determines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import InvalidInputError
from influence_framework.operators import DerivedOperator, to_dense
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import HessianSource, LinearOperator


@dataclass(frozen=True, eq=False)
class PenalizedOperator(DerivedOperator):
    """``C + diag(penalty) + G``, where ``G`` projects on shifts that are common to all classes.

    ``G = 1/K 1 1ᵀ ⊗ I`` on each of the ``free`` tensors ``(K, …)``, zero elsewhere. Offers ``Dense``.

    Attributes:
        base: ``C``.
        parameters: Names and shapes of its parameters.
        penalty: ``(P,)``.
        free: Names of the tensors.
    """

    base: LinearOperator
    parameters: ParameterSpace
    penalty: Float[Tensor, " P"]
    free: frozenset[str]

    @property
    def positive_semidefinite(self) -> bool:
        """Whether ``C`` is; what is added has no negative eigenvalue."""
        return bool(getattr(self.base, "positive_semidefinite", False))

    def _added(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        added = self.penalty[:, None] * columns
        spans = zip(self.parameters.names, self.parameters.spans, self.parameters.shapes, strict=True)
        for name, (start, stop), shape in spans:
            if name in self.free:
                by_class = columns[start:stop].unflatten(0, (shape[0], -1))
                added[start:stop] += by_class.mean(0).expand_as(by_class).flatten(0, 1)
        return added

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.base @ columns + self._added(columns)

    def to_dense(self) -> Float[Tensor, "P P"]:
        """The full matrix."""
        identity = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return to_dense(self.base).add_(self._added(identity))


@dataclass(frozen=True)
class Penalized:
    """Curvature of ``1/n Σ ℓ_i + ½ Σ_t λ_t ‖θ_t‖²``, with a weight ``λ_t`` for every parameter tensor ``t``.

    Unlike the λ of ``C + λI`` it may leave some tensors out, as intercepts usually are, in one system for all.

    A softmax does not change when all its logits are shifted alike. Where no penalty holds them either, the
    curvature is singular along such shifts of the parameters; gradients have no part in them, so any positive
    curvature there gives the same scores. The tensors ``free`` are given the curvature one.

    Attributes:
        source: Of the curvature of the loss.
        weight_decay: ``λ_t`` by name; tensors that are not named have none.
        free: Names of tensors ``(K, …)`` whose first dimension counts classes, and whose common shifts nothing
            determines.
    """

    source: HessianSource
    weight_decay: Mapping[str, float]
    free: frozenset[str] = frozenset()

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The curvature with respect to ``parameters``.

        Raises:
            InvalidInputError: A tensor that is named and not there.
        """
        if unknown := {*self.weight_decay, *self.free} - {*problem.parameters.names}:
            raise InvalidInputError(
                f"A penalty is named for {', '.join(sorted(unknown))}; the trainable parameters are "
                f"{', '.join(problem.parameters.names)}."
            )
        strengths = [
            torch.full((size,), self.weight_decay.get(name, 0.0), dtype=parameters.dtype)
            for name, size in zip(parameters.names, parameters.sizes, strict=True)
        ]
        penalty = torch.cat(strengths).to(parameters.device)
        return PenalizedOperator(self.source.operator(problem, parameters), parameters, penalty, self.free)
