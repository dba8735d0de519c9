"""From what a solver says that it costs to seconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Self

from influence_framework.advice.rates import Rates
from influence_framework.costs import Cost, Work, Workload
from influence_framework.data import nbytes
from influence_framework.memory import GRAPH
from influence_framework.problem import Problem


@dataclass(frozen=True)
class Prediction:
    """What a composition is expected to take.

    Attributes:
        fit_seconds: From reading the data to the inverse.
        score_seconds: All scores of the pairs asked about.
        peak_bytes: Most memory at any time, beside the model and the caller's data.
        fit: Work of the fit.
        score: Work of the solves, or of all scores where no systems are solved.
    """

    fit_seconds: float
    score_seconds: float
    peak_bytes: float
    fit: Work
    score: Work

    @property
    def seconds(self) -> float:
        """Fit and scores."""
        return self.fit_seconds + self.score_seconds

    @classmethod
    def of(cls, cost: Cost, workload: Workload, problem: Problem, rates: Rates, setup: float) -> Self:
        """What ``cost`` amounts to here; ``setup`` seconds go by before any fit."""
        fit, score = setup + rates.seconds(cost.fit), 0.0
        if cost.scoring is not None:
            work = cost.scoring
            score = rates.seconds(work)
        else:
            chunks = ceil(workload.n_test / workload.columns)
            work = chunks * cost.solve
            score = rates.seconds(work) + workload.n_test * rates.gradient
            score += workload.n_train * chunks * rates.contraction(workload.columns)
        if cost.fit.products:
            fit += rates.graphs
        elif work.products:
            score += rates.graphs
        return cls(fit, score, peak_bytes(cost, workload, problem, kept=rates.keeps_graphs), cost.fit, work)


def peak_bytes(cost: Cost, workload: Workload, problem: Problem, *, kept: bool) -> float:
    """Of the fit or of the scores, whichever takes more."""
    held = sum(nbytes(batch) for batch in problem.data) if problem.cached else 0
    # Whole batches go through the model, within an eighth of the budget, and their graphs are a few times that.
    batch = GRAPH * problem.sample_bytes * min(problem.share_size, problem.max_batch)
    multiplies = bool(cost.fit.products or cost.solve.products)
    graphs = GRAPH * problem.sample_bytes * problem.share_size if kept and multiplies else 0
    scores = workload.n_test * workload.n_train * workload.element
    if cost.scoring is not None:
        sides = sum(
            layer.groups * layer.positions * (layer.outputs + layer.inputs) for layer in workload.layers
        )
        scoring = min(problem.memory_budget / 2, workload.n_test * sides * workload.element)
    else:
        scoring = cost.solve_bytes + workload.vectors(2 * workload.columns)
    return held + max(graphs, batch) + max(cost.fit_bytes, cost.held_bytes + scoring + scores)
