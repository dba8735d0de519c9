"""Iterations and time of ``cg`` with no preconditioner, with ``nystroem`` and with ``ekfac``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import problems
from timing import seconds
from torch import nn

import influence_framework as inf

POINTS = 10
TOLERANCE = 1e-4
MOST = 500
CHOICES: dict[str, Any] = {
    "none": None,
    "`nystroem`, rank 100": {"name": "nystroem", "rank": 100},
    "`ekfac`, exact": {"name": "ekfac", "samples": "exact"},
}


def nets() -> Iterator[tuple[str, nn.Module, problems.Digits]]:
    data = problems.digits()
    yield "64-128-64-10, tanh", problems.trained(data, [64, 128, 64, 10]), data
    images = problems.images(data, 200, POINTS)
    convolutional = problems.seeded(problems.convolutional)
    yield "three `Conv2d`", problems.train(convolutional, images, steps=100, lr=3e-3), images
    tokens = problems.sequences(data, 100, POINTS)
    transformer = problems.seeded(lambda: problems.Transformer(width=32))
    yield "four encoders of width 32", problems.train(transformer, tokens, steps=100, lr=3e-3), tokens


def solve(
    net: nn.Module, data: problems.Digits, strength: float, choice: Any, source: str
) -> tuple[str, float]:
    """What became of the right-hand sides, and the seconds that fit and solution took."""
    said: list[str] = []

    def work() -> None:
        solver = {"name": "cg", "rtol": TOLERANCE, "atol": 0.0, "maxiter": MOST, "preconditioner": choice}
        named = {"name": source, "precompute_grad": True}
        model = inf.compose(net, problems.LOSS, solver=solver, source=named, hessian_regularization=strength)
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
        taken = seconds(work)
    return said[-1], taken


def report(runs: int) -> Iterator[str]:
    yield from (
        "## Preconditioners of `cg`",
        "",
        f"{POINTS} right-hand sides to a relative residual of {TOLERANCE:g}, in float32, from one run each: "
        "iterations of the slowest right-hand side, and seconds with the fit of the preconditioner. λ is a "
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
