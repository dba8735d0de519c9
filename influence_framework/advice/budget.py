"""What may be spent on influence scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from influence_framework.advice.predictions import Prediction
from influence_framework.costs import in_bytes
from influence_framework.errors import InvalidInputError

SECONDS = 60.0
"""What fit and scores may take where nobody said."""


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes:
        seconds: On the fit and all scores.
        memory: Bytes at any time, beside the model and the data; half of the memory of the machine, or of the
            device that the model is on, where left out.
    """

    seconds: float = SECONDS
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "memory"):
            value = getattr(self, name)
            if name == "memory" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidInputError(f"A budget's {name} is a positive number, got {value!r}.")

    @classmethod
    def parse(cls, budget: Budget | Mapping[str, float] | None) -> Budget:
        """What stands for a budget: one, a mapping of its fields, or nothing.

        Raises:
            InvalidInputError: Anything else.
        """
        if budget is None:
            return cls()
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, Mapping) or not set(budget) <= {"seconds", "memory"}:
            raise InvalidInputError(
                f"budget is inf.Budget(seconds=..., memory=...), or a mapping with these keys; got {budget!r}."
            )
        return cls(**budget)

    def on(self, device: torch.device) -> Budget:
        """With the memory filled in."""
        if self.memory is not None:
            return self
        if device.type == "cuda":
            return replace(self, memory=torch.cuda.get_device_properties(device).total_memory / 2)
        return replace(self, memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)

    def exceeded(self, prediction: Prediction) -> str:
        """What is too much, in words; empty where nothing is."""
        parts = []
        if self.memory is not None and prediction.peak_bytes > self.memory:
            parts.append(f"needs {in_bytes(prediction.peak_bytes)} of {in_bytes(self.memory)}")
        if prediction.seconds > self.seconds:
            parts.append(f"takes {in_seconds(prediction.seconds)} of {in_seconds(self.seconds)}")
        return ", ".join(parts)


def in_seconds(value: float) -> str:
    """With a unit that leaves few digits."""
    if value < 1:
        return f"{1000 * value:.2g} ms"
    if value < 120:
        return f"{value:.2g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
