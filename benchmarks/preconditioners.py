"""Iterations and time of ``cg`` with no preconditioner, with ``nystroem`` and with ``ekfac``.

Small nets, so that all of it takes a few minutes; iterations depend on the spectrum and not on the size.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import problems
from torch import nn

import influence_framework as inf

POINTS = 5
TOLERANCE = 1e-4
MOST = 400
CHOICES: dict[str, Any] = {
    "none": None,
    "`nystroem`, rank 50": {"name": "nystroem", "rank": 50},
    "`ekfac`": {"name": "ekfac", "samples": "exact", "uncovered": "diagonal"},
}


def nets() -> Iterator[tuple[str, nn.Module, problems.Digits]]:
    data = problems.digits()
    few = problems.Digits(data.x[:600], data.y[:600], data.x_test, data.y_test)
    yield "64-32-16-10, tanh", problems.trained(few, [64, 32, 16, 10]), few
    shape = (1, 8, 8)
    pixels = problems.Digits(few.x.unflatten(1, shape), few.y, few.x_test.unflatten(1, shape), few.y_test)
    convolutional = problems.seeded(small_convolutional)
    yield "three `Conv2d`", problems.train(convolutional, pixels, steps=200, lr=1e-2), pixels
    tokens = problems.sequences(data, 60, POINTS)
    transformer = problems.seeded(lambda: problems.Transformer(width=16))
    yield "four encoders of width 16", problems.train(transformer, tokens, steps=100, lr=3e-3), tokens


def small_convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def solve(
    net: nn.Module, data: problems.Digits, strength: float, choice: Any, source: str
) -> tuple[str, float]:
    """What became of the right-hand sides, and the processor seconds that fit and solution took."""
    said: list[str] = []

    def work() -> None:
        solver = {"name": "cg", "rtol": TOLERANCE, "atol": 0.0, "maxiter": MOST, "preconditioner": choice}
        named = {"name": source, "precompute_grad": True}
        model = inf.compose(
            net,
            problems.LOSS,
            solver=solver,
            source=named,
            hessian_regularization=strength,
            preflight=False,
        )
        model.fit([(data.x, data.y)])
        (inverse,) = model.inverses.values()
        gradients = inf.gradients.sample_gradients(problem, problem.parameters, points)
        solution = inverse.solve(gradients.T)
        most = int(solution.iterations.max())
        failed = int((~solution.converged).sum())
        said.append(f"{most}" if not failed else f"{failed} of {len(gradients)} not within {most}")

    problem = inf.Problem.build(net, problems.LOSS, [(data.x, data.y)])
    points = (data.x_test[:POINTS], data.y_test[:POINTS])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        work()
        taken = time.process_time() - start
    return said[-1], taken


def report(runs: int) -> Iterator[str]:
    yield from (
        "## Preconditioners of `cg`",
        "",
        f"{POINTS} right-hand sides to a relative residual of {TOLERANCE:g}, in float32, from one run each: "
        "iterations of the slowest right-hand side, and processor seconds with all fits. λ is a "
        "multiple of the mean eigenvalue of the Gauss-Newton matrix.",
        "",
        "<!-- --8<-- [start:table] -->",
        "| net | parameters | source | λ / mean eigenvalue | " + " | ".join(CHOICES) + " |",
        "|---|---|---|---|" + "---|" * len(CHOICES),
    )
    for name, net, data in nets():
        problem = inf.Problem.build(net, problems.LOSS, [(data.x, data.y)])
        operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
        mean = inf.regularization.mean_eigenvalue(operator)
        for source, fraction in (("gauss_newton", 10.0), ("gauss_newton", 0.1)):
            cells = []
            for choice in CHOICES.values():
                said, taken = solve(net, data, fraction * mean, choice, source)
                cells.append(f"{said}, {taken:.1f} s")
            yield (
                f"| {name} | {problem.parameters.numel:,} | `{source}` | {fraction:g} | "
                + " | ".join(cells)
                + " |"
            )
    yield "<!-- --8<-- [end:table] -->"
