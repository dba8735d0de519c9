"""The linear datamodeling score: do sums of scores predict training on random subsets?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence_framework.errors import InvalidInputError
from influence_framework.evaluation.recipes import Recipe
from influence_framework.evaluation.retraining import Job, Retraining
from influence_framework.evaluation.statistics import (
    Estimate,
    Floats,
    as_array,
    bootstrap,
    correlations,
    fisher_interval,
    mean_of,
    nan_mean,
    ranks,
)
from influence_framework.objective import Loss, Objective

SPLITS = 20
"""Random halves of the seeds that the noise ceiling is averaged over."""


@dataclass(frozen=True, eq=False)
class SubsetLosses:
    """Test losses of models trained on random subsets.

    Attributes:
        kept: Positions of the training points of each subset, ``(subsets, s)``.
        size: ``n``, number of training points.
        losses: ``(subsets, repeats, n_test)`` float64: every subset was trained on ``repeats`` times, each
            time with another seed.
    """

    kept: Int[Tensor, "k s"]
    size: int
    losses: Float[Tensor, "k r m"]

    @property
    def mean(self) -> Floats:
        """Mean loss over the repeats, ``(n_test, subsets)``."""
        return as_array(self.losses.mean(1).T)

    def predicted(self, scores: Any) -> Floats:
        """``−1/n Σ_{j in subset} score_j``, ``(n_test, subsets)``: lower losses where helpful points are in.

        Raises:
            InvalidInputError: The scores are not ``(n_test, n)``.
        """
        matrix = as_array(scores)
        wanted = (self.losses.shape[2], self.size)
        if matrix.shape != wanted:
            raise InvalidInputError(f"Scores must be (n_test, n_train) = {wanted}, got {matrix.shape}.")
        if not np.isfinite(matrix).all():
            raise InvalidInputError("Scores contain NaN or infinity.")
        members = np.zeros((len(self.kept), self.size))
        np.put_along_axis(members, self.kept.numpy(), 1.0, axis=1)
        return -(matrix @ members.T) / self.size

    def ceiling(self, *, seed: int = 0, resamples: int = 1000) -> Estimate:
        """The score that the true expected losses would reach, given how much the seeds of training matter.

        With ``r`` the mean rank correlation of the losses averaged over one half of the repeats with those over
        the other half, the reliability of the mean of all is ``k r / (1 + (k − 1) r)``, ``k`` the number of
        repeats over that of a half (Spearman 1910, Brown 1910), and a perfect predictor correlates with it by
        the square root of that. One where training is deterministic.

        Raises:
            InvalidInputError: Every subset was trained on once only.
        """
        repeats = self.losses.shape[1]
        if repeats < 2:
            raise InvalidInputError(
                "The noise ceiling compares repeats of the same subset: train on each at least twice, "
                "repeats=2."
            )
        losses = as_array(self.losses)
        half = repeats // 2
        generator = np.random.default_rng(seed)
        halves = []
        for _ in range(1 if repeats == 2 else SPLITS):
            order = generator.permutation(repeats)
            parts = order[:half], order[half : 2 * half]
            halves.append([ranks(losses[:, part].mean(1).T) for part in parts])

        def value(columns: Any, rows: Any) -> float:
            drawn = [[part[rows][:, columns] for part in pair] for pair in halves]
            each = [nan_mean(correlations(a, b, "pearson")) for a, b in drawn]
            r = max(float(np.mean(each)), 0.0)
            times = repeats / half
            return float(np.sqrt(times * r / (1 + (times - 1) * r)))

        everything = value(slice(None), slice(None))
        return bootstrap(
            lambda g: value(*self.resampled(g)),
            everything,
            resamples=max(1, resamples // len(halves)),
            seed=seed,
        )

    def resampled(self, generator: np.random.Generator) -> tuple[Any, Any]:
        """Random subsets and test points, as many as there are."""
        subsets, _, tests = self.losses.shape
        return generator.integers(subsets, size=subsets), generator.integers(tests, size=tests)


@dataclass(frozen=True, eq=False)
class LinearDatamodelingScore:
    """How well sums of scores predict the losses of models trained on random subsets.

    Attributes:
        by_point: Rank correlation for each test point, ``(n_test,)``; NaN where all losses were equal.
        low: Lower ends of their 95 % intervals, by Fisher's z.
        high: Upper ends.
        mean: Mean over the test points, with its bootstrap interval over subsets and test points.
        ceiling: What a perfect predictor would reach; ``None`` where every subset was trained on once.
    """

    by_point: Floats
    low: Floats
    high: Floats
    mean: Estimate
    ceiling: Estimate | None

    def __str__(self) -> str:
        ceiling = "" if self.ceiling is None else f" of at most {self.ceiling.value:.3f}"
        return f"LDS {self.mean:.3f}{ceiling}"


def retrain_on_subsets(
    model: nn.Module,
    loss: Loss | Objective,
    x_test: Any,
    y_test: Any,
    x: Any,
    y: Any,
    *,
    recipe: Recipe,
    subsets: int = 100,
    fraction: float = 0.5,
    repeats: int = 1,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SubsetLosses:
    """Train on random subsets of ``fraction · n`` training points, and note the losses of the test points.

    Scores of any number of methods are then judged by :func:`linear_datamodeling_score`. Ilyas et al. (2022),
    "Datamodels: Predicting Predictions from Training Data", §2.

    Args:
        model: The model; it stays as it is.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        x_test: Inputs of the test points.
        y_test: Their targets.
        x: Inputs of all training points.
        y: Their targets.
        recipe: How to train; several models at once where it can.
        subsets: How many.
        fraction: Share of the training points in each.
        repeats: Seeds for each subset, for the noise ceiling and for less noise.
        seed: Of the subsets and of all training.
        folder: Where results are kept; a run that was killed goes on there.
        progress: Show a bar that counts models.

    Raises:
        InvalidInputError: What does not fit, with the remedy.
    """
    retraining = Retraining.of(model, loss, (x_test, y_test), (x, y), recipe)
    size = round(fraction * retraining.size)
    if not 0 < size < retraining.size:
        raise InvalidInputError(
            f"fraction={fraction} of {retraining.size} training points is {size}: between none and all are "
            "needed."
        )
    if subsets < 2 or repeats < 1:
        raise InvalidInputError(
            f"At least two subsets and one repeat are needed, got subsets={subsets}, repeats={repeats}."
        )
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack(
        [torch.randperm(retraining.size, generator=generator)[:size].sort().values for _ in range(subsets)]
    )
    # Every model has a seed of its own: shared ones would look like an effect of the subsets.
    seeds = torch.randint(2**31, (subsets, repeats), generator=generator).tolist()
    jobs = [Job(index, each) for index, row in zip(kept, seeds, strict=True) for each in row]
    found = retraining.run(
        jobs,
        {"loss": retraining.losses},
        folder=folder,
        progress=progress,
        description="Training on subsets",
    )["loss"]
    return SubsetLosses(kept, retraining.size, found.reshape(subsets, repeats, -1))


def linear_datamodeling_score(
    scores: Any, truth: SubsetLosses, *, resamples: int = 1000, seed: int = 0
) -> LinearDatamodelingScore:
    """Rank correlation, for each test point, of predicted with true losses over random subsets.

    The loss of a model trained on the subset ``S`` is predicted to be ``−1/n Σ_{j ∈ S} score_j`` up to a
    constant: a positive score says that the point helps, so it lowers the loss where it is in. Park et al.
    (2023), "TRAK: Attributing Model Behavior at Scale", §2; of losses here, where they take margins.

    Args:
        scores: ``(n_test, n_train)`` in mode Up.
        truth: From :func:`retrain_on_subsets`.
        resamples: Of the bootstrap over subsets and test points.
        seed: Of the bootstrap, and of the halves of the noise ceiling.

    Raises:
        InvalidInputError: Shapes do not fit, or training was the same on all subsets.
    """
    predicted, actual = truth.predicted(scores), truth.mean
    by_point = correlations(predicted, actual)
    low, high = fisher_interval(by_point, actual.shape[1])

    ranked = ranks(predicted), ranks(actual)

    def statistic(generator: np.random.Generator) -> float:
        # Ranks among the resampled differ from these by rounding only, and would take most of the time.
        columns, rows = truth.resampled(generator)
        a, b = (values[rows][:, columns] for values in ranked)
        return nan_mean(correlations(a, b, "pearson"))

    mean = bootstrap(statistic, mean_of(by_point), resamples=resamples, seed=seed)
    ceiling = truth.ceiling(seed=seed) if truth.losses.shape[1] > 1 else None
    return LinearDatamodelingScore(by_point, low, high, mean, ceiling)
