"""How well a ranking of training points finds those with wrong labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from influence_framework.data import split
from influence_framework.errors import InvalidInputError
from influence_framework.evaluation.statistics import Estimate, Floats, as_array, bootstrap, ranks
from influence_framework.objective import Loss, Objective
from influence_framework.problem import Problem

BASELINES = ("loss", "margin")


@dataclass(frozen=True, eq=False)
class DetectionCurve:
    """What share of the wrong labels is among the first points of a ranking.

    Attributes:
        inspected: Share of the points looked at, ``(n + 1,)`` from 0 to 1.
        found: Share of the wrong labels among them; of equally suspicious points, what a random order finds on
            average.
        area: Area under the curve, with its bootstrap interval over the points: ``1 − p/2`` where all wrong
            labels come first, ``p`` their share, and ``1/2`` for a random order.
        auroc: Probability that a wrong label is ranked before a right one: ``1/2`` by chance, 1 at best.
    """

    inspected: Floats
    found: Floats
    area: Estimate
    auroc: Estimate


def detection_curve(suspicion: Any, wrong: Any, *, resamples: int = 1000, seed: int = 0) -> DetectionCurve:
    """Curve and area of a ranking by ``suspicion``, ``(n,)``: the highest first.

    Args:
        suspicion: Of each training point, such as its self-influence, or minus its mean score.
        wrong: Which labels are wrong, ``(n,)`` booleans.
        resamples: Of the bootstrap, within the wrong and within the right labels.
        seed: Of the bootstrap.

    Raises:
        InvalidInputError: Shapes differ, a suspicion is NaN, or all labels are of one kind.
    """
    values, mask = as_array(suspicion), np.asarray(torch.as_tensor(wrong).cpu())
    if values.ndim != 1 or values.shape != mask.shape or mask.dtype != np.bool_:
        raise InvalidInputError(
            f"suspicion holds one number and wrong one boolean for each training point, got {values.shape} and "
            f"{mask.shape} of {mask.dtype}."
        )
    if np.isnan(values).any():
        raise InvalidInputError("suspicion contains NaN.")
    if mask.all() or not mask.any():
        raise InvalidInputError("Some labels must be wrong and some right; wrong is the same for all points.")
    # Ends of the groups of equal suspicion, between which the expected curve is straight.
    _, sizes = np.unique(-values, return_counts=True)
    ends = np.concatenate([[0], sizes.cumsum()])
    hits = np.concatenate([[0], mask[np.argsort(-values, kind="stable")].cumsum()])
    steps = np.arange(len(values) + 1)
    found = np.interp(steps, ends, hits[ends]) / mask.sum()
    share = mask.mean()
    bad, good = values[mask], values[~mask]

    def area(auroc: float) -> float:
        return float(share / 2 + (1 - share) * auroc)

    def statistic(generator: np.random.Generator) -> float:
        drawn = (part[generator.integers(len(part), size=len(part))] for part in (bad, good))
        return _auroc(*drawn)

    auroc = bootstrap(statistic, _auroc(bad, good), resamples=resamples, seed=seed)
    estimate = Estimate(area(auroc.value), area(auroc.low), area(auroc.high))
    return DetectionCurve(steps / len(values), found, estimate, auroc)


def _auroc(bad: Floats, good: Floats) -> float:
    """Probability that one of ``bad`` exceeds one of ``good``, ties counted half: Mann and Whitney (1947)."""
    total = ranks(np.concatenate([bad, good]))[: len(bad)].sum()
    return float((total - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good)))


def mislabel_detection(
    model: nn.Module,
    loss: Loss | Objective,
    x: Any,
    y: Any,
    wrong: Bool[Tensor, " n"],
    suspicion: Mapping[str, Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, DetectionCurve]:
    """How well rankings find wrong labels, beside what the model itself knows without any influence.

    The baselines are ``"loss"``, the training loss of each point, and ``"margin"``, the largest logit of
    another class less that of the label: high where the model disagrees with it. Their names are reserved.

    Args:
        model: The model that was trained on ``(x, y)``, wrong labels included.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        x: Inputs of the training points.
        y: Their labels as given, some of them wrong.
        wrong: Which, ``(n,)`` booleans.
        suspicion: By name, one number for each training point, high for suspicious ones: such as
            ``{"self-influence": model.self_influences(x, y)}``, or minus the mean score on clean test points.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        A curve for each name and each baseline. Without ``"margin"`` where the model is no classifier with
        outputs ``(n, classes)`` or ``(n,)`` logits.

    Raises:
        InvalidInputError: What does not fit, with the remedy.
    """
    if taken := [name for name in suspicion if name in BASELINES]:
        raise InvalidInputError(f"{taken} are the names of the baselines: choose others.")
    problem = Problem.build(model, loss, [(x, y)])
    losses, margins = [], []
    with torch.no_grad():
        for batch in split((x, y), problem.size, problem.max_batch):
            outputs = problem.outputs({}, batch)
            losses.append(problem.objective.sample_losses(outputs, batch))
            margins.append(_margins(outputs, batch[1]))
    found = {**suspicion, "loss": torch.cat(losses)}
    if all(margin is not None for margin in margins):
        found["margin"] = torch.cat([margin for margin in margins if margin is not None])
    return {
        name: detection_curve(values, wrong, resamples=resamples, seed=seed) for name, values in found.items()
    }


def _margins(outputs: Float[Tensor, "n *c"], labels: Any) -> Float[Tensor, " n"] | None:
    """Largest logit of another class less that of the label; ``None`` where there are no classes."""
    if not isinstance(labels, Tensor):
        return None
    if outputs.ndim == 2 and outputs.shape[1] > 1 and labels.ndim == 1 and not labels.is_floating_point():
        own = outputs.gather(1, labels[:, None])[:, 0]
        return outputs.scatter(1, labels[:, None], -torch.inf).amax(1) - own
    logits, target = outputs.reshape(len(outputs), -1), labels.reshape(len(labels), -1)
    if logits.shape[1] == 1 and target.shape[1] == 1 and bool(((target == 0) | (target == 1)).all()):
        return (logits * (1 - 2 * target))[:, 0]
    return None
