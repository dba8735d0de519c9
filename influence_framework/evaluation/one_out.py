"""What leaving out one training point does to the loss of test points, by training without it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence_framework.errors import InvalidInputError
from influence_framework.evaluation.recipes import Recipe
from influence_framework.evaluation.retraining import Job, Retraining
from influence_framework.evaluation.statistics import (
    Estimate,
    Floats,
    Kind,
    as_array,
    bootstrap_mean,
    correlations,
    fisher_interval,
)
from influence_framework.objective import Loss, Objective


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well scores predict what retraining did.

    Attributes:
        kind: Of the correlation, ``"pearson"`` or ``"spearman"``.
        by_point: Correlation for each test point, ``(n_test,)``; NaN where retraining changed nothing.
        low: Lower ends of their 95 % intervals, by Fisher's z.
        high: Upper ends.
        mean: Mean over the test points, with its bootstrap interval over them.
        slope: Least-squares factor between prediction and truth over all pairs: one where the predictions are
            right in size too.
    """

    kind: Kind
    by_point: Floats
    low: Floats
    high: Floats
    mean: Estimate
    slope: float


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """True changes of test losses.

    Attributes:
        points: Positions of the training points that were left out, ``(k,)``.
        size: ``n``, number of training points.
        losses: Losses of the test points with all training points, ``(seeds, n_test)`` float64.
        losses_without: The same without each of ``points``, ``(seeds, n_test, k)``.
    """

    points: Int[Tensor, " k"]
    size: int
    losses: Float[Tensor, "seeds m"]
    losses_without: Float[Tensor, "seeds m k"]

    @property
    def changes(self) -> Float[Tensor, "m k"]:
        """Loss without the point, less the loss with it; the mean over the seeds."""
        return (self.losses_without - self.losses[:, :, None]).mean(0)

    @property
    def spread(self) -> Float[Tensor, "m k"]:
        """Standard error of :attr:`changes` from the seeds; NaN with a single one."""
        each = self.losses_without - self.losses[:, :, None]
        return each.std(0) / each.shape[0] ** 0.5 if len(each) > 1 else torch.full_like(each[0], torch.nan)

    def predicted(self, scores: Any) -> Float[Tensor, "m k"]:
        """``+score/n``: the changes that ``scores`` stand for.

        Args:
            scores: ``(n_test, n)`` of all training points, or ``(n_test, k)`` of :attr:`points`.

        Raises:
            InvalidInputError: They are neither.
        """
        matrix = torch.from_numpy(as_array(scores))
        tests, count = self.changes.shape
        if matrix.shape == (tests, self.size):
            matrix = matrix[:, self.points.cpu()]
        if matrix.shape != (tests, count):
            raise InvalidInputError(
                f"Scores must be ({tests}, {self.size}) of all training points or ({tests}, {count}) of those "
                f"left out, got {tuple(matrix.shape)}."
            )
        return matrix / self.size

    def agreement(
        self, scores: Any, kind: Kind = "pearson", *, resamples: int = 1000, seed: int = 0
    ) -> Agreement:
        """Correlation of ``+score/n`` with the true changes, for each test point over the training points.

        Args:
            scores: ``(n_test, n)`` or ``(n_test, k)``.
            kind: ``"pearson"`` or ``"spearman"``.
            resamples: Of the bootstrap over test points.
            seed: Of the bootstrap.

        Raises:
            InvalidInputError: Shapes do not fit, or retraining changed nothing.
        """
        predicted, changes = as_array(self.predicted(scores)), as_array(self.changes)
        by_point = correlations(predicted, changes, kind)
        low, high = fisher_interval(by_point, changes.shape[1], kind)
        size = float((predicted**2).sum())
        slope = float((predicted * changes).sum() / size) if size else float("nan")
        return Agreement(
            kind, by_point, low, high, bootstrap_mean(by_point, resamples=resamples, seed=seed), slope
        )


def leave_one_out(
    model: nn.Module,
    loss: Loss | Objective,
    x_test: Any,
    y_test: Any,
    x: Any,
    y: Any,
    *,
    recipe: Recipe,
    points: Sequence[int] | Tensor | None = None,
    seeds: Sequence[int] = (0,),
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LeaveOneOut:
    """True change of every test loss when one training point is left out, by training again without it.

    ``change = ℓ(z_test; trained without z_j) − ℓ(z_test; trained with all)``, which ``+score/n`` predicts in
    mode Up: a helpful point has a positive score, and leaving it out raises the loss. Koh and Liang (2017),
    "Understanding Black-box Predictions via Influence Functions", §4.1.

    Convex models: ``recipe=ConvexFit(weight_decay=λ)``. Nets: ``recipe=GradientDescent(start="trained")``
    goes on from the optimum with and without the point; ``start="scratch"`` draws everything anew, which asks
    for many seeds, since the effect of one point is small beside that of the seed. Where ``model`` goes on
    from its parameters, its own training loss should be near its minimum.

    Args:
        model: The trained model, in eval mode.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        x_test: Inputs of the test points.
        y_test: Their targets.
        x: Inputs of all training points.
        y: Their targets.
        recipe: How to train: :class:`ConvexFit`, :class:`GradientDescent` or your own :class:`Recipe`.
        points: Positions of the training points to leave out, one at a time; all where left out.
        seeds: Train with each of these, and take the mean.
        folder: Where results are kept; a run that was killed goes on there.
        progress: Show a bar that counts models.

    Raises:
        InvalidInputError: What does not fit, with the remedy.

    Warns:
        ConvergenceWarning: A convex fit did not reach its tolerance.
    """
    retraining = Retraining.of(model, loss, (x_test, y_test), (x, y), recipe)
    chosen = checked_positions(points, retraining.size)
    everything = torch.arange(retraining.size)
    jobs = [Job(everything, seed) for seed in seeds]
    if not jobs:
        raise InvalidInputError("seeds is empty: pass at least one.")
    jobs += [Job(everything[everything != point], seed) for seed in seeds for point in chosen]
    found = retraining.run(
        jobs,
        {"loss": retraining.losses},
        folder=folder,
        progress=progress,
        description="Training without a point",
    )["loss"]
    without = found[len(seeds) :].reshape(len(seeds), len(chosen), -1).mT
    return LeaveOneOut(chosen, retraining.size, found[: len(seeds)], without)


def checked_positions(points: Sequence[int] | Tensor | None, size: int) -> Int[Tensor, " k"]:
    """Positions of training points, all of them where none are given.

    Raises:
        InvalidInputError: One is out of range, no integer or there twice.
    """
    if points is None:
        return torch.arange(size)
    chosen = torch.as_tensor(points).cpu()
    if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise InvalidInputError("points are the positions of some training points, integers.")
    if int(chosen.min()) < 0 or int(chosen.max()) >= size or len(chosen.unique()) != len(chosen):
        raise InvalidInputError(f"points must be different positions from 0 to {size - 1}.")
    return chosen.long()
