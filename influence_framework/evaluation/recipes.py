"""How a model is trained again: to the optimum by L-BFGS, or by gradient descent as nets are."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from influence_framework.data import Batch, leaves, random_state_kept, take
from influence_framework.errors import ConvergenceWarning, InvalidInputError
from influence_framework.objective import Objective
from influence_framework.problem import Problem

WHITENED = 2000
"""Parameters up to which L-BFGS works in coordinates in which the Hessian at the start is the identity."""


RESTARTS = 3
"""Times that L-BFGS starts, in new coordinates each time."""
SEARCHED = 1e-7
"""Gradient below which line searches fail on the rounding of the loss."""
POLISHING = 50
"""Steps without a line search at most."""


@dataclass(frozen=True)
class Coordinates:
    """In which a minimum is looked for.

    Attributes:
        unwhiten: From them to steps of the parameters.
        stretch: Bound on the norm of a gradient over its norm in these coordinates.
    """

    unwhiten: Callable[[Tensor], Tensor]
    stretch: float


@runtime_checkable
class Recipe(Protocol):
    """How a model is trained: frozen options, no state.

    A training loop of your own is a recipe once it has this method.
    """

    def train(
        self, model: nn.Module, objective: Objective, data: Batch, kept: Int[Tensor, " s"], seed: int
    ) -> nn.Module:
        """A model trained on the samples ``kept`` of ``data``, in eval mode; ``model`` stays as it is.

        The same arguments give the same model: all randomness comes from ``seed``.
        """
        ...


@runtime_checkable
class StackedRecipe(Recipe, Protocol):
    """Capability of a recipe: train several models at once, with the same results as one by one."""

    def train_stacked(
        self,
        model: nn.Module,
        objective: Objective,
        data: Batch,
        kept: Int[Tensor, "m s"],
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """Trained parameters by name, ``(m, *shape)``.

        Raises:
            RuntimeError: ``torch.func.vmap`` cannot work with the model; it is then trained one by one.
        """
        ...


@dataclass(frozen=True)
class ConvexFit:
    """The minimum of ``1/N Σ_{i kept} ℓ_i(θ) + weight_decay/2 ‖θ‖²``, by L-BFGS in float64.

    ``N`` counts all training points, those left out too, so that a point that is left out is one whose weight
    went from ``1/N`` to zero: what ``score/N`` predicts, with ``λ = weight_decay``. It starts from the
    parameters of the model; where there are few, in coordinates in which the Hessian there is the identity,
    which makes the refit without a point a matter of a few steps. Liu and Nocedal (1989), "On the Limited
    Memory BFGS Method for Large Scale Optimization", §2; strong Wolfe line search, then plain steps, which
    need no differences of losses and so reach the last digits.

    Attributes:
        weight_decay: Of all trainable parameters, in units of the mean loss.
        tolerance: Largest norm of the gradient at the end.
        max_iterations: Steps with a line search at most, for each of up to three starts.
    """

    weight_decay: float = 0.0
    tolerance: float = 1e-9
    max_iterations: int = 500

    def __post_init__(self) -> None:
        _check_at_least_zero("weight_decay", self.weight_decay)
        if not self.tolerance > 0:
            raise InvalidInputError(f"tolerance must be positive, got {self.tolerance}.")
        _check_count("max_iterations", self.max_iterations)

    def train(
        self, model: nn.Module, objective: Objective, data: Batch, kept: Int[Tensor, " s"], seed: int
    ) -> nn.Module:
        """The minimum; ``seed`` has no say in it.

        Warns:
            ConvergenceWarning: The gradient is larger than ``tolerance`` at the end.
        """
        found = self.train_stacked(model, objective, data, kept[None], [seed])
        trained = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in found.items():
                trained.get_parameter(name).copy_(value[0])
        return trained.eval()

    def train_stacked(
        self,
        model: nn.Module,
        objective: Objective,
        data: Batch,
        kept: Int[Tensor, "m s"],
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """One minimum after the other, all in the same coordinates.

        Warns:
            ConvergenceWarning: A gradient is larger than ``tolerance`` at the end.
        """
        problem = Problem.build(model, objective, [data])
        space = problem.parameters
        start = space.flatten(space.leaves(problem.model)).detach()
        coordinates = self._coordinates(problem, start)
        found = torch.stack([self._minimum(problem, start, coordinates, take(data, index)) for index in kept])
        return dict(zip(space.names, space.unflatten_rows(found), strict=True))

    def _minimum(
        self, problem: Problem, start: Tensor, coordinates: Coordinates, part: Batch
    ) -> Float[Tensor, " P"]:
        share = problem.objective.size(part) / problem.size

        def value(theta: Float[Tensor, " P"]) -> Tensor:
            loss = problem.mean_loss(problem.parameters.unflatten(theta), part) * share
            return loss + self.weight_decay / 2 * theta.square().sum()

        for rest in reversed(range(RESTARTS)):
            start = self._steps(value, start, coordinates)
            theta = start.clone().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(value(theta), theta)
            if (size := float(gradient.norm())) <= self.tolerance:
                return start
            if rest:
                coordinates = self._coordinates(problem, start)
        warnings.warn(
            f"A refit ended with a gradient of norm {size:.1e}, where tolerance={self.tolerance:.1e} was "
            "asked for: raise max_iterations, or use GradientDescent where the loss is not convex in the "
            "parameters.",
            ConvergenceWarning,
            stacklevel=2,
        )
        return start

    def _coordinates(self, problem: Problem, at: Float[Tensor, " P"]) -> Coordinates:
        """``u ↦ L⁻ᵀ u`` with ``L Lᵀ`` the Hessian, or ``u`` itself where that is large or not definite."""
        space = problem.parameters
        plain = Coordinates(lambda u: u, 1.0)
        if space.numel > WHITENED or not problem.twice_differentiable:
            return plain
        # Importing core imports no source: they are loaded at the first look-up.
        from influence_framework.sources.hessian import Hessian

        moved = copy.deepcopy(problem.model)
        with torch.no_grad():
            for name, value in space.unflatten(at).items():
                moved.get_parameter(name).copy_(value)
        eye = torch.eye(space.numel, dtype=space.dtype, device=space.device)
        hessian = Hessian().operator(replace(problem, model=moved), space) @ eye + self.weight_decay * eye
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            return plain
        return Coordinates(
            lambda u: torch.linalg.solve_triangular(factor.T, u[:, None], upper=True)[:, 0],
            max(1.0, float(hessian.trace()) ** 0.5),
        )

    def _steps(
        self, value: Callable[[Tensor], Tensor], start: Float[Tensor, " P"], coordinates: Coordinates
    ) -> Float[Tensor, " P"]:
        u = torch.zeros_like(start).requires_grad_()

        def closure() -> Tensor:
            u.grad = None
            loss = value(start + coordinates.unwhiten(u))
            loss.backward()
            return loss

        best, smallest = u.detach().clone(), math.inf
        goal = self.tolerance / (10 * coordinates.stretch)
        for search, steps, enough in (
            ("strong_wolfe", self.max_iterations, max(goal, SEARCHED)),
            (None, min(self.max_iterations, POLISHING), goal),
        ):
            optimizer = torch.optim.LBFGS(
                [u],
                max_iter=steps,
                max_eval=4 * steps,
                tolerance_grad=enough,
                tolerance_change=0.0,
                line_search_fn=search,
            )
            with torch.enable_grad():
                optimizer.step(closure)
                closure()
            gradient = u.grad
            if gradient is not None and float(gradient.norm()) < smallest:
                best, smallest = u.detach().clone(), float(gradient.norm())
        return (start + coordinates.unwhiten(best)).detach()


@dataclass(frozen=True)
class GradientDescent:
    """Mini-batch gradient descent on ``1/s Σ_{i kept} ℓ_i(θ) + weight_decay/2 ‖θ‖²``, as nets are trained.

    With ``start="scratch"`` every module draws its initial parameters anew by ``reset_parameters``; with
    ``start="trained"`` training goes on from the parameters of the model, as for the effect of a single point
    near an optimum (Koh and Liang 2017, §4.1). A training point is drawn in the same epochs and next to the
    same others whichever points are left out, so that two runs with one seed differ by little else.

    Attributes:
        epochs: Passes over the samples kept.
        batch_size: Samples a step; ``None`` for all of them.
        learning_rate: Of the first step.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``, of ``torch.optim``.
        momentum: Of ``"sgd"``.
        weight_decay: As the optimizer takes it.
        schedule: ``"constant"``, or ``"cosine"`` for a rate that falls to zero along half a cosine.
        start: ``"scratch"`` or ``"trained"``.
    """

    epochs: int = 20
    batch_size: int | None = 64
    learning_rate: float = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    start: Literal["scratch", "trained"] = "scratch"

    def __post_init__(self) -> None:
        _check_count("epochs", self.epochs)
        if self.batch_size is not None:
            _check_count("batch_size", self.batch_size)
        _check_at_least_zero("weight_decay", self.weight_decay)
        for name, known in (
            ("optimizer", ("sgd", "adam", "adamw")),
            ("schedule", ("constant", "cosine")),
            ("start", ("scratch", "trained")),
        ):
            if getattr(self, name) not in known:
                raise InvalidInputError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )

    def train(
        self, model: nn.Module, objective: Objective, data: Batch, kept: Int[Tensor, " s"], seed: int
    ) -> nn.Module:
        """A model trained on the samples ``kept``, in train mode while it is trained."""
        trained = self._initial(model, seed).train()
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        total = len(next(leaves(data)))
        with random_state_kept(), torch.enable_grad():
            torch.manual_seed(seed)
            optimizer = self._optimizer(parameters)
            for batch in self._batches(optimizer, kept[None], [seed], total):
                optimizer.zero_grad()
                part = take(data, batch[0])
                objective.mean_loss(objective.outputs(trained, part), part).backward()
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return trained.eval()

    def train_stacked(
        self,
        model: nn.Module,
        objective: Objective,
        data: Batch,
        kept: Int[Tensor, "m s"],
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """All at once: every step is one vectorised forward and backward pass of all models.

        Optimizers work element by element, so each model takes the steps that it would take alone.
        """
        initial = [self._initial(model, seed) for seed in seeds]
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        stacked = {
            name: torch.stack([member.get_parameter(name).detach() for member in initial]).requires_grad_()
            for name in names
        }
        template = copy.deepcopy(model).train()

        def loss(parameters: dict[str, Tensor], part: Batch) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(template, parameters, args, kwargs)

            return objective.mean_loss(objective.outputs(call, part), part)

        losses = torch.func.vmap(loss)
        total = len(next(leaves(data)))
        with torch.enable_grad():
            optimizer = self._optimizer(list(stacked.values()))
            for batch in self._batches(optimizer, kept, seeds, total):
                optimizer.zero_grad()
                losses(stacked, take(data, batch)).sum().backward()
                optimizer.step()
        return {name: tensor.detach() for name, tensor in stacked.items()}

    def _optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.learning_rate, weight_decay=self.weight_decay)

    def _batches(
        self, optimizer: torch.optim.Optimizer, kept: Int[Tensor, "m s"], seeds: Sequence[int], total: int
    ) -> Iterator[Int[Tensor, "m b"]]:
        """Positions of the samples of every step, with the rate of the step set."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = self.batch_size or kept.shape[1]
        steps = self.epochs * math.ceil(kept.shape[1] / size)
        step = 0
        for _ in range(self.epochs):
            keys = torch.stack([torch.rand(total, generator=generator) for generator in generators])
            order = keys.to(kept.device).gather(1, kept).argsort(dim=1, stable=True)
            for batch in kept.gather(1, order).split(size, dim=1):
                if self.schedule == "cosine":
                    rate = self.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                yield batch
                step += 1

    def _initial(self, model: nn.Module, seed: int) -> nn.Module:
        fresh = copy.deepcopy(model)
        if self.start == "trained":
            return fresh
        frozen = {name: p.detach().clone() for name, p in fresh.named_parameters() if not p.requires_grad}
        with random_state_kept():
            torch.manual_seed(seed)
            for name, module in fresh.named_modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                elif any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                    raise InvalidInputError(
                        f"The module {name or 'at the root'!r} ({type(module).__name__}) has parameters of its "
                        "own and no reset_parameters(), so it cannot be trained from scratch: give it one, or "
                        "use start='trained'."
                    )
        with torch.no_grad():
            for name, value in frozen.items():
                fresh.get_parameter(name).copy_(value)
        return fresh


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(f"{name} must be a positive integer, got {value!r}.")


def _check_at_least_zero(name: str, value: float) -> None:
    if not value >= 0:
        raise InvalidInputError(f"{name} must be zero or more, got {value}.")
