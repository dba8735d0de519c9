"""What is measured at the test points where that is something else than the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.objective import Checking, Masking, Objective, Pointing
from influence_framework.problem import Problem

Measurement = Callable[[Tensor, Batch], Tensor]
"""From the outputs ``(n, …)`` and the batch to a number for every sample, ``(n,)``."""


@dataclass(frozen=True)
class MeasuredObjective:
    """``m(outputs, batch)`` in place of the losses of another objective, with everything else its own.

    Attributes:
        base: How a batch becomes outputs.
        measurement: ``m``; a sample's number depends on that sample alone.
    """

    base: Objective
    measurement: Measurement

    def size(self, batch: Batch) -> int:
        return self.base.size(batch)

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        return self.base.outputs(model, batch)

    def sample_losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " n"]:
        return self.measurement(outputs, batch)

    def mean_loss(self, outputs: Tensor, batch: Batch) -> Float[Tensor, ""]:
        return self.measurement(outputs, batch).mean()

    def check(self, batch: Batch) -> None:
        """As the other objective does."""
        if isinstance(self.base, Checking):
            self.base.check(batch)

    def points(self, x: Any, y: Any) -> Batch:
        """As the other objective does; without ``y`` where the measurement needs none."""
        return self.base.points(x, y) if isinstance(self.base, Pointing) else (x, y)

    def present(self, batch: Batch) -> Sequence[Bool[Tensor, "n _t"]]:
        """As the other objective does."""
        return self.base.present(batch) if isinstance(self.base, Masking) else []

    def validate(self, outputs: Tensor, batch: Batch) -> Self:
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            measured = self.measurement(leaf, batch)
        if not isinstance(measured, Tensor) or measured.shape != outputs.shape[:1]:
            got = tuple(measured.shape) if isinstance(measured, Tensor) else type(measured).__name__
            raise InvalidInputError(
                f"measurement(outputs, batch) must return one number for each of the {len(outputs)} samples, "
                f"({len(outputs)},); got {got}."
            )
        if not measured.requires_grad:
            raise InvalidInputError(
                "The measurement does not depend on the outputs in a way that has a gradient: use no argmax, "
                "item() or no_grad() in it."
            )
        if not torch.isfinite(measured).all():
            raise NonFiniteError("The measurement is NaN or infinite.")
        if len(measured) > 1:
            (gradient,) = gradients_of(measured[0], [leaf])
            if gradient[1:].any():
                raise InvalidInputError(
                    "The number measured for a sample depends on the outputs of other samples: measure each "
                    "by itself, and average scores afterwards."
                )
        return self


def measured(problem: Problem, measurement: Measurement | None) -> Problem:
    """The problem with the gradients of ``measurement`` in place of those of its loss.

    Raises:
        InvalidInputError: Something that cannot be called.
    """
    if measurement is None:
        return problem
    if not callable(measurement) or isinstance(measurement, type):
        raise InvalidInputError(f"measurement is a function of (outputs, batch), got {measurement!r}.")
    return replace(problem, objective=MeasuredObjective(problem.objective, measurement))
