"""Influence scores of a PyTorch model: from an inverse per block to scores per pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence_framework.checks import check_differentiable, check_leaves, check_model, check_unchanged
from influence_framework.data import Batch, detached, random_state_kept, split
from influence_framework.devices import to_device
from influence_framework.errors import InvalidInputError, NotFittedError
from influence_framework.fitted import Fitted
from influence_framework.memory import advises_on_memory
from influence_framework.objective import Loss, Objective
from influence_framework.parameters import Blocks
from influence_framework.preflight import Preflight
from influence_framework.problem import DEFAULT_MEMORY_BUDGET, Problem
from influence_framework.protocols import HessianSource, InfluenceMode, InverseOperator, Solver
from influence_framework.regularization import (
    Regularization,
    RelativeRegularization,
    Strength,
    check_regularization,
    per_block,
)


class TorchInfluenceFunctionModel:
    """Influence of training points on predictions, for one model, curvature and solver.

    With ``C`` the curvature of the *mean* training loss, λ the regularisation and ``ℓ`` the loss of one
    sample::

        score(z_test, z) = ∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ℓ(z)        mode Up
        score(z_test, z) = ∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ₓ∇ℓ(z)      mode Perturbation

    A positive score in mode Up means that up-weighting the training point lowers the test loss;
    removing it from ``n`` training points changes the test loss by about ``+score/n``. Koh and Liang
    (2017), "Understanding Black-box Predictions via Influence Functions", §2, whose signs are the
    opposite of these.

    Nothing is written to the model: no ``.grad``, no hooks, no change of mode or of the global random
    state.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        solver: How ``C + λI`` is inverted.
        source: Which curvature ``C`` is.
        blocks: Which parameters share a block; curvature between blocks is left out.
        hessian_regularization: λ, one number or one per block name; a :class:`RelativeRegularization` stands
            for a fraction of the mean eigenvalue.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        preflight: Look, before every fit, for parameters without effect and for a λ far outside the spectrum;
            see :attr:`preflight` for what was found.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        *,
        solver: Solver,
        source: HessianSource,
        blocks: str | Mapping[str, Sequence[str]] = "full",
        hessian_regularization: Regularization = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        preflight: bool = True,
    ) -> None:
        if memory_budget <= 0:
            raise InvalidInputError(f"memory_budget is a positive number of bytes, got {memory_budget}.")
        check_regularization(hessian_regularization)
        self.model = model
        self.loss = loss
        self.solver = solver
        self.source = source
        self.blocks = blocks
        self.hessian_regularization = hessian_regularization
        self.memory_budget = memory_budget
        self._probe = preflight
        self._fit: Fitted | None = None

    def __repr__(self) -> str:
        state = "fitted" if self.is_fitted else "not fitted"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, solver={self.solver}, "
            f"source={self.source}, blocks={self.blocks!r}, "
            f"hessian_regularization={self.hessian_regularization}, {state})"
        )

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has succeeded."""
        return self._fit is not None

    @property
    def inverses(self) -> Mapping[str, InverseOperator]:
        """The inverse fitted for each block, by name, with whatever its solver lets one see of it."""
        return {name: block.inverse for name, block in self._fitted().blocks.items()}

    @property
    def preflight(self) -> Preflight:
        """What the last :meth:`fit` found out beforehand; printed, it is a table."""
        return self._fitted().preflight

    @advises_on_memory(points=False)
    def fit(self, data: Iterable[Batch]) -> Self:
        """Read the training data and fit one inverse per block.

        Args:
            data: A ``DataLoader`` or any re-iterable of batches ``(x, y)`` of the training data.

        Returns:
            The model itself. If anything raises, what an earlier ``fit`` left stays in force.

        Raises:
            InvalidInputError: Data, model, loss, blocks or λ do not fit together.
            MissingCapabilityError: The solver needs what the source does not offer.

        Warns:
            PreflightWarning: Parameters that the loss does not depend on; a λ far outside the spectrum.
        """
        with random_state_kept():
            problem = Problem.build(self.model, self.loss, data, memory_budget=self.memory_budget)
            blocks = Blocks.resolve(self.blocks, problem.parameters)
            strengths = per_block(self.hessian_regularization, blocks)
            self._fit = Fitted.fit(problem, blocks, self.source, self.solver, strengths, probe=self._probe)
        return self

    @advises_on_memory(points=False)
    def with_regularization(self, hessian_regularization: Regularization) -> Self:
        """The same model at another λ; this one stays as it is.

        If fitted, so is the result: without fitting again where the inverse offers it, else by fitting
        on the curvature operator that exists already.
        """
        check_regularization(hessian_regularization)
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, hessian_regularization=hessian_regularization)
        if self._fit is not None:
            strengths = per_block(hessian_regularization, self._fit.blocks)
            other._fit = self._fit.with_regularization(strengths)
        return other

    @advises_on_memory(points=False)
    def to(self, device: torch.device | str) -> Self:
        """Move the model (in place, like ``nn.Module.to``) and all that was fitted; returns itself."""
        device = torch.device(device)
        fitted = to_device(self._fit, device)
        self.model.to(device)
        self._fit = fitted
        return self

    @advises_on_memory(points=True)
    def influences(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> Tensor:
        """Scores of every training point ``(x, y)`` for every test point.

        In mode Up the system is solved for the smaller of the two sides, which gives the same scores
        because ``(C + λI)⁻¹`` is symmetric.

        Args:
            x_test: Inputs of the test points; the first dimension counts them.
            y_test: Their targets.
            x: Inputs of the training points; with ``y`` left out too, the test points stand in.
            y: Their targets.
            mode: A member of :class:`InfluenceMode` or its value.

        Returns:
            ``(n_test, n_train)`` in mode Up, ``(n_test, n_train, *features)`` in mode Perturbation.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        return self._total(self.influences_by_block(x_test, y_test, x, y, mode))

    @advises_on_memory(points=True)
    def influences_by_block(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[str, Tensor]:
        """Each block's part of :meth:`influences`; they add up to it."""
        fitted = self._fitted()
        mode, test, train = self._pairs(x_test, y_test, x, y, mode)
        with random_state_kept():
            return fitted.scores(test, train, mode)

    @advises_on_memory(points=True)
    def self_influences(self, x: Any, y: Any) -> Float[Tensor, " n"]:
        """``∇ℓ(z)ᵀ (C + λI)⁻¹ ∇ℓ(z)`` of every point: its influence on its own loss, ``(n,)``.

        High values mark points that the model had to learn by heart, wrong labels among them. The same as
        the diagonal of ``influences(x, y)``, at the cost of no pair: Feldman and Zhang (2020), "What Neural
        Networks Memorize and Why", §1, of which it is the first-order estimate.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        return self._total(self.self_influences_by_block(x, y))

    @advises_on_memory(points=True)
    def self_influences_by_block(self, x: Any, y: Any) -> dict[str, Tensor]:
        """Each block's part of :meth:`self_influences`; they add up to it."""
        fitted = self._fitted()
        batch = self._checked((x, y), "points")
        with random_state_kept():
            return fitted.self_scores(batch)

    @advises_on_memory(points=True)
    def explore_hessian_regularization(
        self,
        x: Any,
        y: Any,
        regularization_values: Sequence[Strength] | Strength,
        x_train: Any = None,
        y_train: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[Strength, dict[str, Tensor]]:
        """:meth:`influences_by_block` for several λ at about the cost of one.

        Gradients are computed once for all λ, and systems are solved together where the inverse can.

        Args:
            x: Inputs of the test points.
            y: Their targets.
            regularization_values: λ, the same for every block.
            x_train: Inputs of the training points; with ``y_train`` left out too, the test points stand in.
            y_train: Their targets.
            mode: A member of :class:`InfluenceMode` or its value.

        Returns:
            For each λ, in the order given, the scores by block: ``(n_test, n_train)`` in mode Up,
            ``(n_test, n_train, *features)`` in mode Perturbation.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        fitted = self._fitted()
        if isinstance(regularization_values, int | float | RelativeRegularization):
            regularization_values = [regularization_values]
        if not len(regularization_values):
            raise InvalidInputError("regularization_values is empty: pass at least one λ.")
        for value in regularization_values:
            check_regularization(value, "regularization_values")
        mode, test, train = self._pairs(x, y, x_train, y_train, mode)
        with random_state_kept():
            return fitted.sweep(test, train, mode, list(dict.fromkeys(regularization_values)))

    @advises_on_memory(points=True)
    def influence_factors(self, x: Any, y: Any) -> Float[Tensor, "n P"]:
        """``(C + λI)⁻¹ ∇ℓ(z)`` of every point, one row each, in the order of the flat vector.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        return self._fitted().assemble(self.influence_factors_by_block(x, y))

    @advises_on_memory(points=True)
    def influence_factors_by_block(self, x: Any, y: Any) -> dict[str, Tensor]:
        """Each block's columns ``(n, P_block)`` of :meth:`influence_factors`."""
        fitted = self._fitted()
        batch = self._checked((x, y), "points")
        with random_state_kept():
            return fitted.factors(batch)

    @advises_on_memory(points=True)
    def influences_from_factors(
        self,
        z_test_factors: Float[Tensor, "m P"],
        x: Any,
        y: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> Tensor:
        """Scores of training points from factors computed earlier.

        Args:
            z_test_factors: Rows of :meth:`influence_factors`, ``(m, P)``.
            x: Inputs of the training points.
            y: Their targets.
            mode: A member of :class:`InfluenceMode` or its value.

        Returns:
            ``(m, n)`` in mode Up, ``(m, n, *features)`` in mode Perturbation.
        """
        mode = InfluenceMode.parse(mode)
        fitted = self._fitted()
        size = fitted.problem.parameters.numel
        self._check_factors(z_test_factors, size, "z_test_factors")
        train = self._checked((x, y), "training points")
        with random_state_kept():
            return fitted.contract_whole(z_test_factors, train, mode)

    @advises_on_memory(points=True)
    def influences_from_factors_by_block(
        self,
        z_test_factors: Mapping[str, Tensor],
        x: Any,
        y: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[str, Tensor]:
        """Each block's part of :meth:`influences_from_factors`, from factors by block."""
        mode = InfluenceMode.parse(mode)
        fitted = self._fitted()
        if not isinstance(z_test_factors, Mapping) or set(z_test_factors) != set(fitted.blocks):
            got = sorted(z_test_factors) if isinstance(z_test_factors, Mapping) else type(z_test_factors)
            raise InvalidInputError(
                f"Expected a mapping with factors for the blocks {list(fitted.blocks)}, got {got}."
            )
        for name, block in fitted.blocks.items():
            self._check_factors(z_test_factors[name], block.operator.shape[0], f"z_test_factors[{name!r}]")
        train = self._checked((x, y), "training points")
        with random_state_kept():
            return fitted.contract(z_test_factors, train, mode)

    def _fitted(self) -> Fitted:
        if self._fit is None:
            raise NotFittedError("This influence model is not fitted: call model.fit(train_loader) first.")
        return self._fit

    def _pairs(
        self, x_test: Any, y_test: Any, x: Any, y: Any, mode: InfluenceMode | str
    ) -> tuple[InfluenceMode, Batch, Batch]:
        """The mode, test and training points, checked."""
        mode = InfluenceMode.parse(mode)
        test = self._checked((x_test, y_test), "test data")
        if (x is None) != (y is None):
            given, missing = ("x", "y") if y is None else ("y", "x")
            raise InvalidInputError(
                f"Got {given} without {missing}: pass both, or neither to score the test points on each other."
            )
        train = test if x is None else self._checked((x, y), "training points")
        if mode is InfluenceMode.Perturbation:
            check_differentiable(train)
        return mode, test, train

    def _checked(self, batch: Batch, what: str) -> Batch:
        for name, part in zip("xy", batch, strict=True):
            if part is None:
                raise InvalidInputError(f"{name} of the {what} is missing: pass both x and y.")
        problem = self._fitted().problem
        check_model(problem.model)
        check_unchanged(problem.model, self._fitted().state)
        check_leaves(batch, problem.parameters, what)
        for piece in split(batch, problem.objective.size(batch), problem.max_batch):
            problem.validated(piece, what)
        return detached(batch)

    def _total(self, by_block: Mapping[str, Tensor]) -> Tensor:
        parts = iter(by_block.values())
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    def _check_factors(self, factors: Any, size: int, name: str) -> None:
        parameters = self._fitted().problem.parameters
        if not isinstance(factors, Tensor) or factors.ndim != 2 or factors.shape[1] != size:
            got = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
            raise InvalidInputError(
                f"{name} must be (m, {size}), the rows that influence_factors returns; got {got}."
            )
        if factors.dtype != parameters.dtype or factors.device != parameters.device:
            raise InvalidInputError(
                f"{name} is {factors.dtype} on {factors.device}, the model {parameters.dtype} on "
                f"{parameters.device}: convert with .to(...)."
            )
        if not torch.isfinite(factors).all():
            raise InvalidInputError(f"{name} contains NaN or infinity.")
