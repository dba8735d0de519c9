"""What a conformance check is, how checks are run, and the report that they end in."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from influence_framework.data import random_state_kept

Subject = TypeVar("Subject")
Check = Callable[[Subject], Iterator[str]]
"""A named function whose docstring is the requirement; it yields a line, with numbers, for each violation."""

WIDTH = 110
"""Columns that a report is wrapped to."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        name: Of the check.
        requirement: What is required, in one sentence.
        passed: Whether it holds.
        numbers: What was measured where it does not hold, one line for each violation; empty where it does.
    """

    name: str
    requirement: str
    passed: bool
    numbers: str


@dataclass(frozen=True)
class ConformanceReport:
    """The outcome of all checks of one method; ``str()`` of it is a table.

    Attributes:
        subject: The method in words, as ``solver CgSolver(rtol=1e-07, …)``.
        results: One for each check, in the order they were made.
    """

    subject: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every requirement holds."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if not result.passed)

    def require(self) -> None:
        """Raise :class:`ConformanceError` unless every check passed."""
        if not self.passed:
            raise ConformanceError(self)

    def __str__(self) -> str:
        held = len(self.results) - len(self.failures)
        title = textwrap.shorten(self.subject, WIDTH, placeholder=" …")
        lines = [title, f"{held} of {len(self.results)} checks passed", ""]
        indent = max((len(result.name) for result in self.results), default=0) + len("FAILED") + 4
        for result in self.results:
            mark = "passed" if result.passed else "FAILED"
            head = f"{mark}  {result.name}".ljust(indent)
            lines += textwrap.wrap(
                result.requirement, WIDTH, initial_indent=head, subsequent_indent=" " * indent
            )
            for number in result.numbers.splitlines():
                margin = " " * indent + "> "
                lines += textwrap.wrap(number, WIDTH, initial_indent=margin, subsequent_indent=margin)
        return "\n".join(lines)


class ConformanceError(AssertionError):
    """A method does not do what its protocol asks; the message is the table of all checks.

    Attributes:
        report: The outcome of every check.
    """

    def __init__(self, report: ConformanceReport) -> None:
        super().__init__(f"\n{report}")
        self.report = report


def run(description: str, subject: Subject, checks: Iterable[Check[Subject]]) -> ConformanceReport:
    """Make every check, whatever becomes of the others; an exception fails the check it was raised in.

    Warnings are for the checks to look at, and global random states are as before afterwards.
    """
    return ConformanceReport(description, tuple(_result(check, subject) for check in checks))


def _result(check: Check[Subject], subject: Subject) -> CheckResult:
    with warnings.catch_warnings(), random_state_kept():
        warnings.simplefilter("ignore")
        try:
            violations = list(check(subject))
        except Exception as error:  # whatever it is, the method must not raise it here
            violations = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
    requirement = " ".join((check.__doc__ or "").split())
    return CheckResult(check.__name__, requirement, not violations, "\n".join(violations))
