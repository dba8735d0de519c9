"""Influence scores of a PyTorch model: from an inverse per block to scores per pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence_framework.data import Batch, detached, random_state_kept, split
from influence_framework.devices import to_device
from influence_framework.errors import InvalidInputError, NonFiniteError, NotFittedError, did_you_mean
from influence_framework.gradients import (
    Factors,
    contract_perturbation,
    contract_up,
    sample_chunks,
    sample_gradients,
)
from influence_framework.objective import Loss, Objective
from influence_framework.operators import require_capabilities
from influence_framework.parameters import Blocks
from influence_framework.problem import (
    DEFAULT_MEMORY_BUDGET,
    Problem,
    check_differentiable,
    check_leaves,
    check_model,
    check_unchanged,
    model_state,
)
from influence_framework.protocols import (
    HessianSource,
    InfluenceMode,
    InverseOperator,
    LinearOperator,
    Reregularizable,
    Solver,
)

SOLVE_COPIES = 12
"""Vectors of the length of a right-hand side that an iterative solver holds for each of them."""


@dataclass(frozen=True, eq=False)
class _Block:
    """One block's share of the flat vector, its curvature and the inverse fitted to it.

    ``index`` is ``None`` where the block is the whole vector.
    """

    index: Tensor | None
    operator: LinearOperator
    regularization: float
    inverse: InverseOperator

    @property
    def selection(self) -> Tensor | slice:
        """What picks this block's columns out of rows over the whole vector."""
        return slice(None) if self.index is None else self.index


@dataclass(frozen=True, eq=False)
class _Fit:
    """Everything that ``fit`` leaves behind.

    ``state`` are the model's parameters and buffers as they were, to notice that it was trained on.
    """

    problem: Problem
    blocks: dict[str, _Block]
    state: dict[str, Tensor]


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
        hessian_regularization: λ, one number or one per block name.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        *,
        solver: Solver,
        source: HessianSource,
        blocks: str | Mapping[str, Sequence[str]] = "full",
        hessian_regularization: float | Mapping[str, float] = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> None:
        if memory_budget <= 0:
            raise InvalidInputError(f"memory_budget is a positive number of bytes, got {memory_budget}.")
        _check_regularization(hessian_regularization)
        self.model = model
        self.loss = loss
        self.solver = solver
        self.source = source
        self.blocks = blocks
        self.hessian_regularization = hessian_regularization
        self.memory_budget = memory_budget
        self._fit: _Fit | None = None

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

    def fit(self, data: Iterable[Batch]) -> Self:
        """Read the training data and fit one inverse per block.

        Args:
            data: A ``DataLoader`` or any re-iterable of batches ``(x, y)`` of the training data.

        Returns:
            The model itself. If anything raises, what an earlier ``fit`` left stays in force.

        Raises:
            InvalidInputError: Data, model, loss, blocks or λ do not fit together.
            MissingCapabilityError: The solver needs what the source does not offer.
        """
        with random_state_kept():
            problem = Problem.build(self.model, self.loss, data, memory_budget=self.memory_budget)
            blocks = Blocks.resolve(self.blocks, problem.parameters)
            strengths = _per_block(self.hessian_regularization, blocks)
            fitted = {}
            for name, parameters in blocks.items():
                part = problem.parameters.subset(parameters)
                operator = self.source.operator(problem, part)
                index = problem.parameters.indices_of(part)
                fitted[name] = _Block(index, operator, strengths[name], self._invert(operator, strengths[name]))
        self._fit = _Fit(problem, fitted, model_state(self.model))
        return self

    def _invert(self, operator: LinearOperator, regularization: float) -> InverseOperator:
        requires = getattr(self.solver, "requires", ())
        require_capabilities(type(self.solver).__name__, operator, requires)
        inverse = self.solver.fit(operator, regularization)
        if not isinstance(inverse, InverseOperator) or inverse.shape != operator.shape:
            raise InvalidInputError(
                f"{type(self.solver).__name__}.fit returned {type(inverse).__name__} where an inverse operator "
                f"of shape {operator.shape} was expected: the solver is faulty."
            )
        return inverse

    def with_regularization(self, hessian_regularization: float | Mapping[str, float]) -> Self:
        """The same model at another λ; this one stays as it is.

        If fitted, so is the result: without fitting again where the inverse offers it, else by fitting
        on the curvature operator that exists already.
        """
        _check_regularization(hessian_regularization)
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, hessian_regularization=hessian_regularization)
        if self._fit is not None:
            strengths = _per_block(hessian_regularization, self._fit.blocks)
            with random_state_kept():
                blocks = {
                    name: replace(
                        block,
                        regularization=strengths[name],
                        inverse=block.inverse.with_regularization(strengths[name])
                        if isinstance(block.inverse, Reregularizable)
                        else self._invert(block.operator, strengths[name]),
                    )
                    for name, block in self._fit.blocks.items()
                }
            other._fit = replace(self._fit, blocks=blocks)
        return other

    def to(self, device: torch.device | str) -> Self:
        """Move the model (in place, like ``nn.Module.to``) and all that was fitted; returns itself."""
        device = torch.device(device)
        fitted = to_device(self._fit, device)
        self.model.to(device)
        self._fit = fitted
        return self

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

    def influences_by_block(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[str, Tensor]:
        """Each block's part of :meth:`influences`; they add up to it."""
        mode = InfluenceMode.parse(mode)
        fitted = self._fitted()
        test = self._checked((x_test, y_test), "test data")
        if (x is None) != (y is None):
            given, missing = ("x", "y") if y is None else ("y", "x")
            raise InvalidInputError(
                f"Got {given} without {missing}: pass both, or neither to score the test points on each other."
            )
        train = test if x is None else self._checked((x, y), "training points")
        if mode is InfluenceMode.Perturbation:
            check_differentiable(train)
        with random_state_kept():
            if mode is InfluenceMode.Up and self._size(train) < self._size(test):
                transposed = self._scores(fitted, train, test, mode)
                return {name: scores.T for name, scores in transposed.items()}
            return self._scores(fitted, test, train, mode)

    def influence_factors(self, x: Any, y: Any) -> Float[Tensor, "n P"]:
        """``(C + λI)⁻¹ ∇ℓ(z)`` of every point, one row each, in the order of the flat vector.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        fitted = self._fitted()
        return self._assemble(fitted, self.influence_factors_by_block(x, y))

    def influence_factors_by_block(self, x: Any, y: Any) -> dict[str, Tensor]:
        """Each block's columns ``(n, P_block)`` of :meth:`influence_factors`."""
        fitted = self._fitted()
        batch = self._checked((x, y), "points")
        with random_state_kept():
            chunks = [self._factors(fitted, chunk) for chunk in self._solve_chunks(fitted, batch)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in fitted.blocks}

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
            return _contraction(mode)({"all": Factors(z_test_factors)}, fitted.problem, train)["all"]

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
            return self._contract(fitted, z_test_factors, train, mode)

    def _fitted(self) -> _Fit:
        if self._fit is None:
            raise NotFittedError("This influence model is not fitted: call model.fit(train_loader) first.")
        return self._fit

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

    def _size(self, batch: Batch) -> int:
        return self._fitted().problem.objective.size(batch)

    def _scores(self, fitted: _Fit, solved: Batch, other: Batch, mode: InfluenceMode) -> dict[str, Tensor]:
        """Scores by block with the system solved for ``solved``, a budget's worth of points at a time."""
        parts = [
            self._contract(fitted, self._factors(fitted, chunk), other, mode)
            for chunk in self._solve_chunks(fitted, solved)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in fitted.blocks}

    def _solve_chunks(self, fitted: _Fit, batch: Batch) -> Iterator[Batch]:
        problem = fitted.problem
        yield from sample_chunks(problem, problem.parameters, batch, self._size(batch), copies=SOLVE_COPIES)

    def _factors(self, fitted: _Fit, batch: Batch) -> dict[str, Tensor]:
        gradients = sample_gradients(fitted.problem, fitted.problem.parameters, batch)
        factors = {}
        for name, block in fitted.blocks.items():
            value = block.inverse.solve(gradients[:, block.selection].T).value.T
            bad = torch.nonzero(~torch.isfinite(value).all(dim=1)).flatten().tolist()
            if bad:
                raise NonFiniteError(
                    f"{type(self.solver).__name__} returned NaN or infinity for {len(bad)} of {len(value)} "
                    f"right-hand sides in block {name!r} (positions {bad[:8]}): raise the regularisation, or "
                    "use another solver."
                )
            factors[name] = value
        return factors

    def _contract(
        self, fitted: _Fit, factors: Mapping[str, Tensor], batch: Batch, mode: InfluenceMode
    ) -> dict[str, Tensor]:
        """Each block's scores, from one pass over the gradients for all blocks."""
        parts = {name: Factors(factors[name], block.index) for name, block in fitted.blocks.items()}
        return _contraction(mode)(parts, fitted.problem, batch)

    def _assemble(self, fitted: _Fit, factors: Mapping[str, Tensor]) -> Float[Tensor, "n P"]:
        """Factors by block as rows in the order of the flat vector."""
        count = len(next(iter(factors.values())))
        parameters = fitted.problem.parameters
        rows = torch.empty(count, parameters.numel, dtype=parameters.dtype, device=parameters.device)
        for name, block in fitted.blocks.items():
            rows[:, block.selection] = factors[name]
        return rows

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


def _contraction(
    mode: InfluenceMode,
) -> Callable[[Mapping[str, Factors], Problem, Batch], dict[str, Tensor]]:
    return contract_up if mode is InfluenceMode.Up else contract_perturbation


def _check_regularization(regularization: float | Mapping[str, float]) -> None:
    values = (
        regularization if isinstance(regularization, Mapping) else {"hessian_regularization": regularization}
    )
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInputError(
                f"The regularisation is a number or a mapping from block name to number; {name!r} is {value!r}."
            )
        if not math.isfinite(value) or value < 0:
            raise InvalidInputError(
                f"The regularisation must be finite and not negative, got {value} for {name!r}."
            )


def _per_block(regularization: float | Mapping[str, float], blocks: Iterable[str]) -> dict[str, float]:
    blocks = list(blocks)
    if not isinstance(regularization, Mapping):
        return dict.fromkeys(blocks, float(regularization))
    for name in regularization:
        if name not in blocks:
            raise InvalidInputError(
                f"hessian_regularization names the block {name!r}, which does not exist."
                f"{did_you_mean(name, blocks)} Blocks: {', '.join(blocks)}."
            )
    missing = [name for name in blocks if name not in regularization]
    if missing:
        raise InvalidInputError(
            f"hessian_regularization gives no value for the blocks {', '.join(missing)}: name every block, "
            "or pass one number."
        )
    return {name: float(regularization[name]) for name in blocks}
