"""What a call is asked for, points and factors, checked against the fit."""

from __future__ import annotations

from typing import Any

import torch

from influence_framework.checks import check_differentiable, check_leaves, check_model, check_unchanged
from influence_framework.data import Batch, detached, split
from influence_framework.errors import InvalidInputError
from influence_framework.finite import all_finite
from influence_framework.fitted import Fitted
from influence_framework.measurement import Measurement, measured
from influence_framework.objective import Checking, Pointing
from influence_framework.protocols import InfluenceMode


def checked_points(
    fitted: Fitted,
    x: Any,
    y: Any,
    what: str,
    measurement: Measurement | None = None,
    *,
    outputs: bool = True,
) -> Batch:
    """The points ``(x, y)``: finite, of the model's dtype and device, and the model as it was at the fit.

    Args:
        fitted: What they are asked of.
        x: Inputs.
        y: Targets.
        what: What they are, for messages.
        measurement: What is measured at them in place of the loss.
        outputs: Whether to check the model's outputs and the losses too, at a forward pass; not where the pass
            that uses the points does, :class:`LayerScorer`'s.

    Raises:
        InvalidInputError: What does not fit, with the remedy.
    """
    problem = measured(fitted.problem, measurement)
    objective = problem.objective
    if x is None:
        raise InvalidInputError(f"x of the {what} is missing: pass both x and y.")
    if y is None and not isinstance(objective, Pointing):
        raise InvalidInputError(f"y of the {what} is missing: pass both x and y.")
    batch = objective.points(x, y) if isinstance(objective, Pointing) else (x, y)
    check_model(problem.model)
    check_unchanged(problem.model, fitted.state)
    check_leaves(batch, problem.parameters, what)
    if isinstance(objective, Checking):
        # Whatever comes of the outputs: the model itself must not be given these.
        objective.check(batch)
    size = problem.objective.size(batch)
    for piece in split(batch, size, problem.max_batch) if outputs or not size else ():
        problem.validated(piece, what)
    return detached(batch)


def checked_pairs(
    fitted: Fitted,
    x_test: Any,
    y_test: Any,
    x: Any,
    y: Any,
    mode: InfluenceMode | str,
    measurement: Measurement | None = None,
) -> tuple[InfluenceMode, Batch, Batch]:
    """The mode, test and training points; where no training points are given, both are one object.

    Raises:
        InvalidInputError: What does not fit, with the remedy.
    """
    mode = InfluenceMode.parse(mode)
    outputs = mode is not InfluenceMode.Up or fitted.layer_scorer() is None
    test = checked_points(fitted, x_test, y_test, "test data", measurement, outputs=outputs)
    alone = isinstance(fitted.problem.objective, Pointing)
    if (x is None) != (y is None) and not (alone and y is None):
        given, missing = ("x", "y") if y is None else ("y", "x")
        raise InvalidInputError(
            f"Got {given} without {missing}: pass both, or neither to score the test points on each other."
        )
    if x is None and measurement is not None:
        # What is measured is no loss: the same points are another thing as training points.
        x, y = x_test, y_test
    train = test if x is None else checked_points(fitted, x, y, "training points", outputs=outputs)
    if mode is InfluenceMode.Perturbation:
        check_differentiable(train)
    return mode, test, train


def check_factors(fitted: Fitted, factors: Any, size: int, name: str) -> None:
    """Raise :class:`InvalidInputError` unless ``factors`` are finite, ``size`` wide and like the model."""
    parameters = fitted.problem.parameters
    if not isinstance(factors, torch.Tensor) or factors.ndim != 2 or factors.shape[1] != size:
        got = tuple(factors.shape) if isinstance(factors, torch.Tensor) else type(factors).__name__
        raise InvalidInputError(
            f"{name} must be (m, {size}), the rows that influence_factors returns; got {got}."
        )
    if factors.dtype != parameters.dtype or factors.device != parameters.device:
        raise InvalidInputError(
            f"{name} is {factors.dtype} on {factors.device}, the model {parameters.dtype} on "
            f"{parameters.device}: convert with .to(...)."
        )
    if not all_finite(factors):
        raise InvalidInputError(f"{name} contains NaN or infinity.")
