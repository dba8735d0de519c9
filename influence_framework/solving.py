"""Collecting what a call solves, and saying once what failed."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from influence_framework.errors import ConvergenceError, ConvergenceWarning, InvalidInputError, did_you_mean
from influence_framework.inverses import approximation, describe_failures
from influence_framework.protocols import InverseOperator, Solution, StopReason
from influence_framework.reports import BlockReport, SolveReport

FailurePolicy = Literal["raise", "warn", "ignore"]
"""What to do where right-hand sides were not solved to what their solver promises."""


def check_policy(policy: str) -> FailurePolicy:
    """The policy of that name; an unknown one raises :class:`InvalidInputError`."""
    known = get_args(FailurePolicy)
    if policy not in known:
        raise InvalidInputError(
            f"on_failure must be one of {', '.join(map(repr, known))}, got {policy!r}."
            f"{did_you_mean(policy, known)}"
        )
    return policy  # type: ignore[return-value]


@dataclass
class SolveLog:
    """Collects what a call solves; :meth:`report` is what became of it."""

    _parts: dict[tuple[str, float], list[BlockReport]] = field(default_factory=dict)
    _hints: dict[str, None] = field(default_factory=dict)

    def solve(
        self,
        block: str,
        solver: str,
        regularizations: Sequence[float],
        inverse: InverseOperator,
        work: Callable[[], Sequence[Solution]],
    ) -> Sequence[Solution]:
        """Call ``work``, which solves with ``inverse`` once for each λ, and note what came of it.

        An inverse warns whoever calls it of right-hand sides that failed. Here one line is to speak for all
        of a call's, so those warnings are kept back; others go on to the caller.
        """
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solutions = work()
        seconds = (time.perf_counter() - start) / len(solutions)
        quiet: frozenset[StopReason] = getattr(inverse, "quiet", frozenset())
        for regularization, solution in zip(regularizations, solutions, strict=True):
            self._add(BlockReport.of(block, regularization, solver, solution, seconds, quiet))
        restated = {describe_failures(solution, quiet) for solution in solutions}
        failed = not all(bool(solution.converged.all()) for solution in solutions)
        for warning in caught:
            text = str(warning.message)
            if not failed or not issubclass(warning.category, ConvergenceWarning):
                warn_caller(text, warning.category)
            elif text not in restated:
                self._hints[text] = None
        return solutions

    def note(
        self,
        block: str,
        solver: str,
        regularization: float,
        inverse: InverseOperator,
        count: int,
        seconds: float,
    ) -> None:
        """Note the scores of ``count`` samples that ``inverse`` gave without a right-hand side."""
        nothing = torch.empty(0, count, dtype=inverse.dtype, device="cpu")
        singular = bool(getattr(inverse, "singular", False))
        solution = approximation(nothing, getattr(inverse, "spectrum", None), singular=singular)
        self._add(BlockReport.of(block, regularization, solver, solution, seconds))

    def absorb(self, report: SolveReport) -> None:
        """Add what was collected elsewhere."""
        for part in report.blocks:
            self._add(part)
        self._hints.update(dict.fromkeys(report.hints))

    def report(self) -> SolveReport:
        """All that was collected."""
        return SolveReport(tuple(map(_joined, self._parts.values())), tuple(self._hints))

    def _add(self, part: BlockReport) -> None:
        self._parts.setdefault((part.block, part.regularization), []).append(part)


def _joined(parts: Sequence[BlockReport]) -> BlockReport:
    return replace(
        parts[0],
        iterations=torch.cat([part.iterations for part in parts]),
        residual=torch.cat([part.residual for part in parts]),
        converged=torch.cat([part.converged for part in parts]),
        reason=tuple(reason for part in parts for reason in part.reason),
        curvature=torch.cat([part.curvature for part in parts]),
        seconds=torch.cat([part.seconds for part in parts]),
    )


def act_on_failures(report: SolveReport, policy: FailurePolicy) -> None:
    """Say once what failed: raise, warn or be silent, as the policy has it.

    Reasons that a solver was told not to warn of (``warn_on_max_iteration=False``) give no warning, but are
    failures to the policy ``"raise"`` too.

    Raises:
        ConvergenceError: With the report, under the policy ``"raise"``.
    """
    if policy == "ignore":
        return
    message = report.failures(quiet=policy == "raise")
    if message and policy == "raise":
        raise ConvergenceError(message, report)
    if message:
        warn_caller(message, ConvergenceWarning)


INNER = ("influence_framework", "contextlib", "jaxtyping")
"""How packages begin that stand between a warning and the caller it is meant for: plugins are among them."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the first line outside this package, however deep in it we are."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(INNER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
