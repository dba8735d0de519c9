"""From a model and its data to a recommended composition."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm import tqdm

from influence_framework.advice.answer import Advice, Candidate
from influence_framework.advice.budget import Budget
from influence_framework.advice.candidates import solver_specs
from influence_framework.advice.predictions import Prediction
from influence_framework.advice.probes import RELATIVE, advised_regularization, effort, spectrum, workload
from influence_framework.advice.rates import Rates
from influence_framework.compose import DEFAULT_SOURCE, Spec, resolve
from influence_framework.costs import Costed, Spectrum, Workload
from influence_framework.data import Batch, random_state_kept
from influence_framework.errors import InfluenceError, InvalidInputError, PreflightWarning
from influence_framework.fitted import SOLVE_COPIES
from influence_framework.objective import Loss, Objective
from influence_framework.parameters import Blocks
from influence_framework.preflight import Preflight
from influence_framework.problem import DEFAULT_MEMORY_BUDGET, Problem
from influence_framework.protocols import HessianSource
from influence_framework.registry import Registry, default_registry
from influence_framework.regularization import RelativeRegularization, Strength, check_regularization


def advise(
    model: nn.Module,
    loss: Spec | Loss | Objective,
    data: Iterable[Batch],
    *,
    budget: Budget | Mapping[str, float] | None = None,
    n_test: int = 100,
    n_train: int | None = None,
    hessian_regularization: Strength | None = None,
    source: Spec | HessianSource | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    seed: int = 0,
    progress: bool = False,
    registry: Registry = default_registry,
) -> Advice:
    """A composition for this model and data, with predicted time and memory of every candidate.

    The size of the problem, its layers, a few Lanczos steps with the curvature of a few samples, and the time
    of one product, of one pass over layers and of dense linear algebra on this machine: from these follows what
    each installed solver takes, if it says so (:class:`influence_framework.costs.Costed`). Of the candidates
    within the budget, those that solve with the curvature itself come first, then approximations of every
    layer, then low-rank ones; among equals the quickest. Times are right within a factor of three or so.

    Nothing is written to the model, and neither fit nor scores take place.

    Args:
        model: A trained model in eval mode.
        loss: As for :func:`influence_framework.compose`.
        data: A ``DataLoader`` or any re-iterable of batches ``(x, y)`` of the training data.
        budget: What may be spent: a :class:`Budget` or a mapping ``{"seconds": ..., "memory": ...}``; a minute
            and half of the machine's memory where left out.
        n_test: Points whose predictions are to be explained.
        n_train: Training points to score for each; all where left out.
        hessian_regularization: λ; where left out, ``3e-3`` times the largest eigenvalue found.
        source: The curvature; where left out, what each solver names as its own, else ``"gauss_newton"``.
        memory_budget: As for ``compose``.
        seed: Of the random vectors from which the spectrum is estimated.
        progress: Show a bar.
        registry: Where names are looked up.

    Raises:
        InvalidInputError: Data, model, loss or λ do not fit together; curvature that is zero.
    """
    limits = Budget.parse(budget)
    for name, value in (("n_test", n_test), ("n_train", 1 if n_train is None else n_train)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInputError(f"{name} counts points and must be a positive integer, got {value!r}.")
    if hessian_regularization is not None:
        check_regularization(hessian_regularization)
        if isinstance(hessian_regularization, Mapping):
            raise InvalidInputError("advise takes one λ for all parameters, got a mapping.")
    if isinstance(loss, str | Mapping):
        loss = resolve("objective", loss, registry)
    with random_state_kept(), tqdm(desc="Advice", unit="step", disable=not progress) as bar:
        start = time.perf_counter()
        problem = Problem.build(model, loss, data, memory_budget=memory_budget)  # type: ignore[arg-type]
        setup = time.perf_counter() - start
        bar.update()
        asked = _Asked(problem, setup, seed, (n_test, n_train or problem.size), hessian_regularization)
        found: list[Candidate] = []
        default = asked.of(DEFAULT_SOURCE if source is None else source, registry)
        bar.update()
        for spec in solver_specs(registry, default.workload):
            own = getattr(registry.solvers[spec["name"]].cls, "default_source", None)
            chosen = source if source is not None else own or DEFAULT_SOURCE
            asking = asked.of(chosen, registry)
            composition = {"solver": spec, "source": chosen, "hessian_regularization": asking.strength}
            if memory_budget != DEFAULT_MEMORY_BUDGET:
                composition["memory_budget"] = memory_budget
            found.append(asking.candidate(composition, limits.on(problem.parameters.device), registry))
            bar.update()
    return Advice(
        tuple(sorted(found, key=lambda candidate: candidate.order)),
        default.strength,
        default.reason,
        default.workload,
        limits.on(problem.parameters.device),
        model,
        loss,
    )


@dataclass(eq=False)
class _Asked:
    """One problem, with each curvature that a candidate names."""

    problem: Problem
    setup: float
    seed: int
    pairs: tuple[int, int]
    strength: Strength | None
    _known: dict[int | str, _Curvature] = field(default_factory=dict)

    def of(self, source: Spec | HessianSource, registry: Registry) -> _Curvature:
        key = source if isinstance(source, str) else id(source)
        if key not in self._known:
            self._known[key] = _Curvature.of(self, resolve("source", source, registry))
        return self._known[key]


@dataclass(frozen=True, eq=False)
class _Curvature:
    """A problem with one curvature: what was found out of it, and what work takes."""

    problem: Problem
    workload: Workload
    rates: Rates
    setup: float
    strength: Strength
    reason: str

    @classmethod
    def of(cls, asked: _Asked, source: HessianSource) -> _Curvature:
        problem = asked.problem
        samples, steps = effort(problem)
        few = problem.first(samples)
        operator, sample = (source.operator(p, p.parameters) for p in (problem, few))
        found = spectrum(few, sample, steps, asked.seed) if problem.twice_differentiable else None
        strength, absolute, reason = _regularization(asked.strength, found)
        described = workload(problem, operator, found, absolute, asked.pairs, SOLVE_COPIES)
        start = time.perf_counter()
        blocks = {name: problem.parameters.subset(names) for name, names in _whole(problem).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PreflightWarning)
            Preflight.of(problem, blocks, source, dict.fromkeys(blocks, absolute), taken=True)
        setup = asked.setup + time.perf_counter() - start
        rates = Rates(problem, few, source, operator, sample, asked.seed)
        return cls(problem, described, rates, setup, strength, reason)

    def candidate(self, composition: Mapping[str, Any], budget: Budget, registry: Registry) -> Candidate:
        try:
            solver = resolve("solver", composition["solver"], registry)
            if not isinstance(solver, Costed):
                return Candidate(composition, None, None, "", "not predicted: it does not say what it takes")
            cost = solver.cost(self.workload)
            found = Prediction.of(cost, self.workload, self.problem, self.rates, self.setup)
        except InfluenceError as error:
            return Candidate(composition, None, None, "", f"no: {error}")
        return Candidate(composition, found, cost.fidelity, budget.exceeded(found), "; ".join(cost.reasons))


def _whole(problem: Problem) -> Blocks:
    return Blocks.resolve("full", problem.parameters)


def _regularization(strength: Strength | None, found: Spectrum | None) -> tuple[Strength, float, str]:
    """λ as it goes to ``compose``, in units of the curvature, and where it comes from."""
    if found is not None and not found.largest > 0:
        raise InvalidInputError(
            "The curvature of the samples tried has no positive eigenvalue: there is nothing to advise on. "
            "Check the loss, or use the source 'gauss_newton'."
        )
    if isinstance(strength, RelativeRegularization):
        if found is None:
            raise InvalidInputError(
                "A λ relative to the mean eigenvalue needs second derivatives, which this model does not have: "
                "give it as a number."
            )
        absolute = strength.fraction * found.mean
        return strength, absolute, f"λ = {strength.fraction:g} of the mean eigenvalue, about {absolute:.2g}."
    if strength is not None:
        return strength, float(strength), f"λ = {strength:g} as given."
    if found is None:
        raise InvalidInputError(
            "Gradients of this model cannot be differentiated again, so that nothing tells λ: give "
            "hessian_regularization."
        )
    absolute = advised_regularization(found)
    return (
        absolute,
        absolute,
        f"λ = {absolute:g} is {RELATIVE:g} of the largest eigenvalue found; compare the scores of a tenth and "
        "of ten times as much.",
    )


__all__ = ["Advice", "Budget", "Candidate", "advise"]
