"""The candidates, the one that is recommended, and the reasons, printable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from influence_framework.advice.budget import Budget, in_seconds
from influence_framework.advice.candidates import in_words
from influence_framework.advice.predictions import Prediction
from influence_framework.compose import compose
from influence_framework.costs import Fidelity, Workload, in_bytes
from influence_framework.errors import InvalidInputError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.regularization import Strength


@dataclass(frozen=True)
class Candidate:
    """A composition and what is known of it beforehand.

    Attributes:
        composition: Arguments of ``compose``.
        prediction: What it would take; ``None`` where that is not known.
        fidelity: How near to the inverse it comes, likewise.
        excess: What of the budget it exceeds, in words; empty where it fits.
        reason: Why it is as it is, or why it cannot be.
    """

    composition: Mapping[str, Any]
    prediction: Prediction | None
    fidelity: Fidelity | None
    excess: str
    reason: str

    @property
    def fits(self) -> bool:
        """Whether it can be done within the budget."""
        return self.prediction is not None and not self.excess

    @property
    def name(self) -> str:
        """Its solver in words."""
        return in_words(self.composition["solver"])

    @property
    def order(self) -> tuple[float, ...]:
        """Smaller is better: within the budget, then near to the inverse, then quick."""
        if self.prediction is None or self.fidelity is None:
            return (2, 0, 0)
        return (0 if self.fits else 1, self.fidelity, self.prediction.seconds)


@dataclass(frozen=True, eq=False)
class Advice:
    """What to use and why; printed, it says so.

    Attributes:
        candidates: The best first; those that cannot be, or of which nothing is known, last.
        regularization: λ that they have in common.
        regularization_reason: Where it comes from.
        workload: What was found out of the problem.
        budget: What may be spent.
        model: The model that was asked about.
        loss: Its loss.
    """

    candidates: tuple[Candidate, ...]
    regularization: Strength
    regularization_reason: str
    workload: Workload
    budget: Budget
    model: nn.Module = field(repr=False)
    loss: Any = field(repr=False)

    @property
    def best(self) -> Candidate:
        """The candidate that is recommended.

        Raises:
            InvalidInputError: None fits the budget; the message says what comes nearest.
        """
        first = self.candidates[0] if self.candidates else None
        if first is not None and first.fits:
            return first
        if first is None or first.prediction is None:
            raise InvalidInputError(f"Nothing can be recommended.\n{self}")
        predicted = [c.prediction for c in self.candidates if c.prediction is not None]
        quickest, smallest = min(p.seconds for p in predicted), min(p.peak_bytes for p in predicted)
        raise InvalidInputError(
            f"No candidate fits the budget of {in_seconds(self.budget.seconds)} and "
            f"{in_bytes(self.budget.memory or math.inf)}: the quickest takes {in_seconds(quickest)}, the "
            f"smallest {in_bytes(smallest)}. Raise the budget, score fewer points, or freeze parameters."
        )

    @property
    def recommended(self) -> Mapping[str, Any]:
        """Arguments for ``compose(model, loss, **recommended)``.

        Raises:
            InvalidInputError: None fits the budget.
        """
        return self.best.composition

    def compose(self, **more: Any) -> TorchInfluenceFunctionModel:
        """The recommended composition of the model, not fitted yet; ``more`` goes to ``compose`` as well.

        Raises:
            InvalidInputError: None fits the budget.
        """
        return compose(self.model, self.loss, **{**self.recommended, **more})

    def __str__(self) -> str:
        asked = self.workload
        lines = [
            f"P = {asked.parameters} parameters, N = {asked.samples} samples, {asked.n_test} x {asked.n_train} "
            f"scores, within {in_seconds(self.budget.seconds)} and {in_bytes(self.budget.memory or math.inf)}.",
            *self._of_spectrum(),
            f"{self.regularization_reason}",
            "",
        ]
        first = self.candidates[0] if self.candidates else None
        if first is not None and first.fits and first.fidelity is not None:
            lines += [f"Recommended: {first.name}. It {first.fidelity.words}; {first.reason}.", ""]
        else:
            lines += ["Recommended: nothing; no candidate fits the budget.", ""]
        rows = [("", "fit", "scores", "memory", "")]
        for candidate in self.candidates:
            found = candidate.prediction
            numbers = ("", "", "")
            if found is not None:
                numbers = (
                    in_seconds(found.fit_seconds),
                    in_seconds(found.score_seconds),
                    in_bytes(found.peak_bytes),
                )
            verdict = "; ".join(filter(None, (candidate.excess, candidate.reason)))
            rows.append((candidate.name, *numbers, verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *measured, verdict in rows:
            cells = (cell.rjust(width) for cell, width in zip(measured, widths[1:4], strict=True))
            lines.append("  ".join((name.ljust(widths[0]), *cells, verdict)).rstrip())
        return "\n".join(lines)

    def _of_spectrum(self) -> Iterator[str]:
        found = self.workload.spectrum
        if found is None:
            return
        strength = self.workload.regularization
        yield (
            f"Eigenvalues up to {found.largest:.2g}, {found.mean:.2g} on average, about "
            f"{found.count(strength):.0f} above λ = {strength:.2g}: estimates from {found.samples} samples."
        )
