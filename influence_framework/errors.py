"""Exceptions and warnings. Each message says what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from influence_framework.reports import SolveReport


class InfluenceError(Exception):
    """Base class of every exception this package raises on purpose."""


class InvalidInputError(InfluenceError, ValueError):
    """A value, shape, dtype or device that cannot be worked with."""


class NonFiniteError(InvalidInputError):
    """NaN or infinity in data, parameters, gradients or a product."""


class NotFittedError(InfluenceError, RuntimeError):
    """Scores were asked of a model before ``fit``."""


class UnknownMethodError(InfluenceError, KeyError):
    """No solver or source of that name is installed."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would print line breaks as \n.
        return str(self.args[0]) if self.args else ""


class UnknownOptionError(InfluenceError, TypeError):
    """A method was given an option it does not have."""


class PluginConflictError(InfluenceError, RuntimeError):
    """Two plugins claim the same name."""


class PluginError(InfluenceError, TypeError):
    """A plugin registers something that is not what its hook takes."""


class MissingCapabilityError(InfluenceError, TypeError):
    """A solver needs something of its operator that the operator does not offer."""


class OutOfMemoryError(InfluenceError, MemoryError):
    """There was not enough memory; the message names the options that would help."""


class DistributedError(InfluenceError, RuntimeError):
    """Work that several processes share cannot go on, since one of them failed or does something else.

    Attributes:
        said: What the processes concerned said, by their numbers.
    """

    def __init__(self, message: str, said: Mapping[int, str]) -> None:
        super().__init__(message)
        self.said = dict(said)


class SingularOperatorError(InfluenceError, ArithmeticError):
    """``C + λI`` is singular, or too badly conditioned for its dtype.

    Attributes:
        condition: Estimate of the 1-norm condition number of ``C + λI``.
        suggested_regularization: A λ at which the system is safely solvable.
    """

    def __init__(self, message: str, condition: float, suggested_regularization: float) -> None:
        super().__init__(message)
        self.condition = condition
        self.suggested_regularization = suggested_regularization


class ConvergenceError(InfluenceError, ArithmeticError):
    """Right-hand sides were not solved, and ``on_failure`` is ``"raise"``.

    Attributes:
        report: The :class:`SolveReport` of the call.
    """

    def __init__(self, message: str, report: SolveReport) -> None:
        super().__init__(message)
        self.report = report


class ConvergenceWarning(UserWarning):
    """Some right-hand sides were not solved to the tolerance asked for."""


class PreflightWarning(UserWarning):
    """Something about model, data or λ that can hardly be meant, found before the fit."""


class SmallerBatchWarning(UserWarning):
    """Memory ran out, and the work went on with fewer samples at a time."""


class IndefiniteOperatorWarning(UserWarning):
    """``C + λI`` is not positive definite where the theory wants it to be."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    matches = get_close_matches(str(given).lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
