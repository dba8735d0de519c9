"""A solver under test, and the systems it is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.compose import DEFAULT_SOURCE, resolve
from influence_framework.operators import dense_by_columns, require_capabilities
from influence_framework.protocols import HessianSource, InverseOperator, LinearOperator, Solution, Solver
from influence_framework.registry import Kind, Registry
from influence_framework.testing.problems import ProductsOnly, batches, network, normal, problem, symmetric

DEFAULT_ACCURACY = 1e-6
"""Relative residual asked of a solver that states no accuracy."""

SIZE = 10
"""Parameters of the matrices that solvers without requirements are tested on."""

DAMPING = {"matrix": 1e-3, "net": 3e-2}
"""λ relative to the largest eigenvalue."""

DTYPES = (torch.float32, torch.float64)
Condition = Literal["definite", "indefinite", "singular", "badly scaled"]
CONDITIONS: tuple[Condition, ...] = ("definite", "indefinite", "singular")
"""Those that a solution is looked at under; the last is for preconditioners."""


class Lenient(ProductsOnly):
    """Works in whatever dtype and device it is asked to, and leaves it to a check to say what is wrong."""

    def __matmul__(self, columns: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        self.columns.append(columns.detach().clone())
        return self.matrix.to(columns.device, columns.dtype) @ columns


class LenientDense(Lenient):
    """The same, and it offers its diagonal and the whole matrix."""

    def diagonal(self) -> Float[Tensor, " P"]:
        return self.matrix.diagonal().clone()

    def to_dense(self) -> Float[Tensor, "P P"]:
        return self.matrix.clone()


@dataclass(frozen=True, eq=False)
class System:
    """``C + λI``: what a solver is given, and the same in float64 on the CPU.

    Attributes:
        operator: ``C`` as the solver sees it.
        regularization: λ.
        matrix: ``C``, dense.
    """

    operator: LinearOperator
    regularization: float
    matrix: Float[Tensor, "P P"]

    @property
    def size(self) -> int:
        """``P``."""
        return len(self.matrix)

    @property
    def shifted(self) -> Float[Tensor, "P P"]:
        """``C + λI``, dense."""
        return self.matrix + self.regularization * torch.eye(self.size, dtype=torch.float64, device="cpu")

    def at(self, regularization: float) -> System:
        """The same curvature at another λ."""
        return replace(self, regularization=regularization)

    def columns(self, *shape: int, seed: int = 1) -> Float[Tensor, "P *k"]:
        """Normal right-hand sides in the operator's dtype."""
        return normal(self.size, *shape, seed=seed, dtype=self.operator.dtype, device=self.operator.device)

    def residuals(self, value: Float[Tensor, "P k"], columns: Float[Tensor, "P k"]) -> Float[Tensor, " k"]:
        """``‖b − (C + λI)x‖ / ‖b‖``, in float64."""
        return _norms(_reference(columns) - self.shifted @ _reference(value)) / _norms(_reference(columns))


@dataclass(frozen=True, eq=False)
class SolverSubject:
    """A solver under test.

    Attributes:
        solver: The instance.
        registry: Where names are looked up.
        accuracy: Largest relative residual of what it calls solved; ``None`` for an approximation.
    """

    kind: ClassVar[Kind] = "solver"

    solver: Solver
    registry: Registry
    accuracy: float | None

    @property
    def method(self) -> Solver:
        """The solver."""
        return self.solver

    @property
    def requires(self) -> tuple[type, ...]:
        """The capabilities that the solver asks of its operator."""
        return tuple(getattr(self.solver, "requires", ()))

    @property
    def takes_indefinite(self) -> bool:
        """Whether the solver says that it takes negative eigenvalues."""
        return bool(getattr(self.solver, "takes_indefinite", False))

    @cached_property
    def source(self) -> HessianSource:
        """The curvature that the solver is composed with by default."""
        name = getattr(self.solver, "default_source", None) or DEFAULT_SOURCE
        found: HessianSource = resolve("source", name, self.registry)
        return found

    @cached_property
    def definite(self) -> System:
        """The system that most checks are made on, in float64."""
        return self.system("definite")

    @cached_property
    def inverse(self) -> InverseOperator:
        """What the solver makes of it."""
        return self.fit(self.definite)

    @cached_property
    def applied(self) -> Float[Tensor, "P P"]:
        """That inverse as a matrix, ``P`` columns at a time."""
        return _reference(self.inverse @ torch.eye(self.definite.size, dtype=torch.float64, device="cpu"))

    @cached_property
    def attempts(self) -> list[tuple[Condition, System, Solution]]:
        """Solutions for three columns of systems good and bad, but for the bad ones that the solver refuses."""
        found = []
        for condition in CONDITIONS:
            system = self.system(condition)
            try:
                found.append((condition, system, self.fit(system).solve(system.columns(3))))
            except Exception:
                if condition == "definite":
                    raise
        return found

    def fit(self, system: System) -> InverseOperator:
        """A fresh inverse."""
        return self.solver.fit(system.operator, system.regularization)

    def system(
        self, condition: Condition, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> System:
        """A system in that condition, small, and of a net where the solver requires more than products.

        At λ the definite ones have condition numbers of at most a thousand; the singular ones have λ = 0.
        """
        if self.requires:
            return self._of_net(condition, dtype, device)
        matrix = symmetric(SPECTRA[condition], seed=3)
        if condition == "badly scaled":
            scales = torch.logspace(-2, 2, SIZE, dtype=torch.float64, device="cpu")
            matrix = scales[:, None] * matrix * scales
        regularization = {"singular": 0.0, "indefinite": 0.1}.get(condition, DAMPING["matrix"] * 10.0)
        return System(Lenient(matrix.to(device, dtype)), regularization, matrix)

    def also_dense(self, system: System) -> Iterator[System]:
        """The system, and with an operator that offers its matrix and diagonal, which solvers may use."""
        yield system
        if isinstance(system.operator, Lenient):
            yield replace(system, operator=LenientDense(system.operator.matrix))

    def _of_net(self, condition: Condition, dtype: torch.dtype, device: torch.device | str) -> System:
        source = resolve("source", "hessian", self.registry) if condition == "indefinite" else self.source
        made = problem(network(dtype=dtype, device=device), batches(dtype=dtype, device=device))
        operator = source.operator(made, made.parameters)
        require_capabilities(type(self.solver).__name__, operator, self.requires)
        exact = problem()
        matrix = dense_by_columns(source.operator(exact, exact.parameters))
        spectrum = torch.linalg.eigvalsh(matrix)
        damped = DAMPING["net"] * spectrum[-1].item()
        regularization = {"singular": 0.0, "indefinite": -spectrum[0].item() / 2}.get(condition, damped)
        return System(operator, regularization, matrix)

    def allowed(self, dtype: torch.dtype = torch.float64) -> float:
        """What an error in this dtype may be: the stated accuracy, and never less than half of the digits."""
        half: float = torch.finfo(dtype).eps ** 0.5
        return max(self.accuracy or 0.0, half)

    def apart(
        self,
        system: System,
        value: Float[Tensor, "P k"],
        other: Float[Tensor, "P k"],
        columns: Float[Tensor, "P k"],
    ) -> float:
        """How far two results for the same columns are apart, in units of what is allowed.

        A solver of ``C + λI`` promises residuals, so that its results are compared by them; an approximation
        is a matrix of its own, and its results are compared with each other.
        """
        difference = _reference(value) - _reference(other)
        if self.accuracy is None:
            scale = _norms(_reference(other))
        else:
            # Each of the two may be off by its share.
            difference, scale = system.shifted @ difference / 2, _norms(_reference(columns))
        relative = _norms(difference) / scale.clamp_min(torch.finfo(torch.float64).tiny)
        return float(relative.max()) / self.allowed(system.operator.dtype)


SPECTRA: dict[Condition, list[float]] = {
    "definite": torch.logspace(-3, 1, SIZE, dtype=torch.float64, device="cpu").tolist(),
    "indefinite": [-2.0, -0.5, *torch.logspace(-1, 1, SIZE - 2, dtype=torch.float64, device="cpu").tolist()],
    "singular": [0.0, 0.0, *torch.logspace(-1, 1, SIZE - 2, dtype=torch.float64, device="cpu").tolist()],
    "badly scaled": torch.logspace(-1, 1, SIZE, dtype=torch.float64, device="cpu").tolist(),
}


def devices() -> list[torch.device]:
    """The CPU, and the first accelerator of NVIDIA where there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def _reference(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _norms(columns: Float[Tensor, "P k"]) -> Float[Tensor, " k"]:
    norms: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return norms
