"""What the removal of many points at once does: predictions that flip, and test loss along a ranking."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.evaluation.recipes import Recipe
from influence_framework.evaluation.retraining import Job, Retraining
from influence_framework.evaluation.statistics import QUANTILE, Estimate, as_array
from influence_framework.objective import Loss, Objective


@dataclass(frozen=True, eq=False)
class Brittleness:
    """Whose prediction flips once its most helpful training points are gone.

    Attributes:
        counts: How many points were removed, ``(k,)``.
        flipped: Share of the seeds with which the prediction differs from that of the model of the same seed
            trained on everything, ``(n_test, k)``.
        removed: Positions of the training points in the order of their removal, ``(n_test, max(counts))``.
    """

    counts: tuple[int, ...]
    flipped: Float[Tensor, "m k"]
    removed: Int[Tensor, "m most"]

    @property
    def share(self) -> tuple[Estimate, ...]:
        """Share of flipped predictions for each count, with Wilson's interval over the test points."""
        tests = len(self.flipped)
        found = []
        for column in self.flipped.T:
            value = float(column.mean())
            # Seeds of one test point count as one observation.
            low, high = _wilson(value, tests)
            found.append(Estimate(value, low, high))
        return tuple(found)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Interval of a share.

    Wilson (1927), "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z = QUANTILE
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - reach), min(1.0, centre + reach)


def brittleness(
    model: nn.Module,
    loss: Loss | Objective,
    x_test: Any,
    y_test: Any,
    x: Any,
    y: Any,
    scores: Any,
    *,
    recipe: Recipe,
    counts: Sequence[int] = (10, 20, 50, 100),
    seeds: Sequence[int] = (0,),
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Brittleness:
    """Remove the ``k`` training points with the highest scores for a test point, train again, see if it flips.

    For every test point and every ``k`` of ``counts`` a model is trained with each seed. The better the scores
    find what a prediction rests on, the fewer points it takes. Ilyas et al. (2022), "Datamodels", §4.1. Choose
    test points that the model gets right: whatever becomes of the others says little.

    Args:
        model: The classifier, with outputs ``(n, classes)``, or ``(n,)`` and ``(n, 1)`` logits.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        x_test: Inputs of the test points.
        y_test: Their targets.
        x: Inputs of all training points.
        y: Their targets.
        scores: ``(n_test, n_train)``; positive: the training point helped.
        recipe: How to train.
        counts: How many points to remove.
        seeds: Train with each of these.
        folder: Where results are kept; a run that was killed goes on there.
        progress: Show a bar that counts models.

    Raises:
        InvalidInputError: What does not fit, with the remedy.
    """
    retraining = Retraining.of(model, loss, (x_test, y_test), (x, y), recipe)
    matrix, tests = as_array(scores), retraining.test_size
    _check_shape(matrix, (tests, retraining.size))
    chosen = tuple(sorted({int(count) for count in counts}))
    if not chosen or chosen[0] < 1 or chosen[-1] >= retraining.size or not len(seeds):
        raise InvalidInputError(
            f"counts must be positive and below {retraining.size}, and seeds not empty; got {list(counts)} and "
            f"{list(seeds)}."
        )
    order = torch.from_numpy(np.argsort(-matrix, axis=1, kind="stable"))
    jobs = [Job(torch.arange(retraining.size), seed) for seed in seeds]
    jobs += [Job(row[count:].sort().values, seed) for count in chosen for seed in seeds for row in order]
    found = retraining.run(
        jobs,
        {"class": _classes},
        folder=folder,
        progress=progress,
        description="Training without the most helpful",
    )["class"]
    whole = found[: len(seeds)]
    # (counts, seeds, whose points were removed, whose prediction): the diagonal of the last two counts.
    without = found[len(seeds) :].reshape(len(chosen), len(seeds), tests, tests).diagonal(dim1=2, dim2=3)
    flipped = (without != whole).double().mean(1).T
    return Brittleness(chosen, flipped, order[:, : chosen[-1]])


def _classes(outputs: Tensor, batch: Batch) -> Tensor:
    """Measure: the predicted class."""
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.argmax(1)
    if outputs[0].numel() == 1:
        return (outputs.reshape(len(outputs)) > 0).long()
    raise InvalidInputError(
        f"Predictions are classes: the model must return (n, classes), or one logit for each sample; got "
        f"{tuple(outputs.shape)}."
    )


def _check_shape(matrix: Any, shape: tuple[int, ...]) -> None:
    if matrix.shape != shape:
        raise InvalidInputError(f"Expected an array of shape {shape}, got {matrix.shape}.")
    if np.isnan(matrix).any():
        raise InvalidInputError("The scores contain NaN.")


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Test loss along a ranking.

    Attributes:
        removed: How many points were removed, ``(k,)``; the first is none.
        losses: Mean test loss, ``(seeds, k)`` float64.
        random: The same where as many points were drawn at random, another draw for each seed.
    """

    removed: tuple[int, ...]
    losses: Float[Tensor, "seeds k"]
    random: Float[Tensor, "seeds k"]

    @property
    def gain(self) -> Float[Tensor, " k"]:
        """Loss without the ranked points less the loss without random ones, mean over the seeds."""
        return (self.losses - self.random).mean(0)


def subset_removal(
    model: nn.Module,
    loss: Loss | Objective,
    x_test: Any,
    y_test: Any,
    x: Any,
    y: Any,
    rankings: Mapping[str, Any],
    *,
    recipe: Recipe,
    fractions: Sequence[float] = (0.05, 0.1, 0.2, 0.3),
    seeds: Sequence[int] = (0,),
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, RemovalCurve]:
    """Mean test loss after the first points of a ranking were removed, beside that of random removal.

    Ranked by the mean score on the test points the loss rises faster than by chance; ranked by minus that, the
    most harmful first, it falls if the data holds wrong labels.

    Args:
        model: The model; it stays as it is.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        x_test: Inputs of the test points.
        y_test: Their targets.
        x: Inputs of all training points.
        y: Their targets.
        rankings: By name, one number for each training point, ``(n_train,)``: the highest go first.
        recipe: How to train.
        fractions: Shares of the training points to remove.
        seeds: Train with each of these.
        folder: Where results are kept; a run that was killed goes on there.
        progress: Show a bar that counts models.

    Raises:
        InvalidInputError: What does not fit, with the remedy.
    """
    retraining = Retraining.of(model, loss, (x_test, y_test), (x, y), recipe)
    size = retraining.size
    removed = (0, *sorted({round(fraction * size) for fraction in fractions} - {0}))
    if len(removed) < 2 or removed[-1] >= size or removed[1] < 0 or not len(seeds) or not rankings:
        raise InvalidInputError(
            "rankings and seeds must not be empty, and fractions between 0 and 1; got "
            f"{list(rankings)}, {list(seeds)} and {list(fractions)}."
        )
    orders = {}
    for name, values in rankings.items():
        array = as_array(values)
        _check_shape(array, (size,))
        orders[name] = [torch.from_numpy(np.argsort(-array, kind="stable"))] * len(seeds)
    chance = [torch.randperm(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    everyone: list[list[Int[Tensor, " n"]]] = [*orders.values(), chance]
    jobs = [
        Job(order[count:].sort().values, seed)
        for count in removed
        for group in everyone
        for order, seed in zip(group, seeds, strict=True)
    ]
    found = retraining.run(
        jobs,
        {"loss": retraining.losses},
        folder=folder,
        progress=progress,
        description="Training without the first",
    )["loss"]
    curves = found.mean(1).reshape(len(removed), len(everyone), len(seeds)).permute(1, 2, 0)
    return {
        name: RemovalCurve(removed, curve, curves[-1]) for name, curve in zip(orders, curves[:-1], strict=True)
    }
