"""What ``inf.advise`` predicts beside what is measured, for every candidate, on four problems."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import problems
from preconditioners import small_convolutional
from scipy.stats import spearmanr
from torch import Tensor, nn

import influence_framework as inf

LIMIT = 20.0
"""Seconds that a candidate may be predicted to take; those above are not run."""


@dataclass(frozen=True)
class Case:
    """A problem.

    Attributes:
        title: Of its rows.
        net: Trained.
        data: What it was trained on.
    """

    title: str
    net: nn.Module
    data: problems.Digits


def cases() -> Iterator[Case]:
    data = problems.digits()
    yield Case("64-20-10, tanh", problems.trained(data, [64, 20, 10]), data)
    yield Case("64-128-64-10, tanh", problems.trained(data, [64, 128, 64, 10]), data)
    shape = (1, 8, 8)
    pixels = problems.Digits(data.x.unflatten(1, shape), data.y, data.x_test.unflatten(1, shape), data.y_test)
    convolutional = problems.train(problems.seeded(small_convolutional), pixels, steps=200, lr=1e-2)
    yield Case("three `Conv2d`", convolutional, pixels)
    tokens = problems.sequences(data, 150, 10)
    transformer = problems.seeded(lambda: problems.Transformer(width=16))
    yield Case("four encoders of width 16", problems.train(transformer, tokens, steps=100, lr=3e-3), tokens)


def measured(case: Case, composition: dict[str, Any]) -> tuple[float, float, Tensor]:
    """Seconds of the fit and of the scores, and the scores."""
    data = case.data
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = inf.compose(case.net, problems.LOSS, **composition, on_failure="ignore")
        model.fit(data.loader(100))
        fitted = time.perf_counter()
        scores = model.influences(data.x_test, data.y_test, data.x, data.y)
    return fitted - start, time.perf_counter() - fitted, scores


def off(predicted: float, seconds: float) -> float:
    """By which factor, at least 1."""
    return max(predicted / seconds, seconds / predicted)


def report(runs: int) -> Iterator[str]:
    yield (
        "Not paired: seconds that `inf.advise` predicts for fit and scores, and that they take, the least of "
        f"{min(runs, 2)} runs. Candidates that are predicted to take more than {LIMIT:g} s are not run. The "
        "last column is the rank correlation with the scores of `direct`, or of the recommended candidate "
        "where that was not run: the mean over test points."
    )
    worst = []
    for case in cases():
        data = case.data
        start = time.perf_counter()
        advice = inf.advise(case.net, problems.LOSS, data.loader(100), n_test=len(data.x_test))
        took = time.perf_counter() - start
        yield ""
        yield f"## {case.title}"
        yield ""
        yield (
            f"{advice.workload.parameters:,} parameters, {len(data.x)} training and {len(data.x_test)} test "
            f"points. The advice took {took:.1f} s: **{advice.best.name}**, at λ = {advice.regularization:g}."
        )
        yield ""
        yield "| Candidate | Predicted: fit | scores | Measured: fit | scores | Off by | Correlation |"
        yield "|---|---|---|---|---|---|---|"
        rows, found = [], {}
        for candidate in advice.candidates:
            predicted = candidate.prediction
            if predicted is None:
                rows.append((candidate.name, candidate.reason))
                continue
            head = f"| {candidate.name} | {predicted.fit_seconds:.3f} | {predicted.score_seconds:.3f} |"
            if predicted.seconds > LIMIT:
                rows.append((candidate.name, head + " not run | | | {} |"))
                continue
            tries = [measured(case, dict(candidate.composition)) for _ in range(min(runs, 2))]
            fit, score = min(one[0] for one in tries), min(one[1] for one in tries)
            found[candidate.name] = tries[0][2]
            factor = off(predicted.seconds, fit + score)
            worst.append((factor, case.title, candidate.name))
            rows.append((candidate.name, f"{head} {fit:.3f} | {score:.3f} | {factor:.1f} | {{}} |"))
        reference = found.get("direct", found.get(advice.best.name))
        for name, row in rows:
            if name in found and reference is not None:
                pairs = zip(found[name], reference, strict=True)
                alike = statistics.mean(spearmanr(one, other).statistic for one, other in pairs)
                yield row.format(f"{alike:.3f}")
            else:
                yield row.format("") if row.startswith("|") else f"| {name} | {row} | | | | | |"
    yield ""
    factor, title, name = max(worst)
    within = sum(one[0] <= 3 for one in worst)
    yield (
        f"{within} of {len(worst)} predictions are within a factor of 3; the worst is {name} on {title}, by "
        f"{factor:.1f}."
    )
