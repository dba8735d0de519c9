"""The base of inverse operators, and what is said when a solve did not succeed."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from influence_framework.errors import ConvergenceWarning
from influence_framework.finite import finite_rows
from influence_framework.operators import DerivedOperator, check_columns
from influence_framework.protocols import LinearOperator, Solution, StopReason


class Inverse(DerivedOperator):
    """Base of ``≈ (C + λI)⁻¹``: a subclass writes ``_solve`` on columns, or ``_matmat`` as well.

    ``solve`` reports on every right-hand side and warns once, in one line, of those that failed.
    ``@`` applies the inverse: by default through ``solve``; a subclass whose inverse is one fixed
    matrix overrides ``_matmat`` so that ``@`` costs no residual.

    Attributes:
        base: The operator ``C``.
        regularization: ``λ``.
    """

    base: LinearOperator
    regularization: float

    @property
    def quiet(self) -> frozenset[StopReason]:
        """Reasons to stop that are not worth a warning to this solver's user."""
        return frozenset()

    @property
    def spectrum(self) -> tuple[float, float] | None:
        """Smallest and largest curvature that a fixed approximation is made of."""
        return None

    @property
    def singular(self) -> bool:
        """Whether a fixed approximation is a pseudo-inverse, which gives nothing in some directions."""
        return False

    @abstractmethod
    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        """Solve for ``(P, k)`` columns, ``k ≥ 1``."""

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.solve(columns).value

    def solve(self, columns: Float[Tensor, "P *k"]) -> Solution:
        """Solve ``(C + λI) X = columns`` and report on each column.

        Raises:
            InvalidInputError: Wrong shape, dtype or device.
        """
        check_columns(self, columns)
        if columns.numel() == 0:
            return make_solution(
                columns.clone(), torch.zeros(columns.shape[1], dtype=torch.float64, device="cpu"), []
            )
        solution = self._solve(columns[:, None] if columns.ndim == 1 else columns)
        self.report(solution)
        return replace(solution, value=solution.value[:, 0]) if columns.ndim == 1 else solution

    def report(self, solution: Solution) -> None:
        """Warn, in one line, of the right-hand sides that failed."""
        message = describe_failures(solution, self.quiet)
        if message:
            warnings.warn(message, ConvergenceWarning, stacklevel=3)


def make_solution(
    value: Float[Tensor, "P k"],
    residual: Float[Tensor, " k"],
    reason: list[StopReason],
    iterations: list[int] | None = None,
    curvature: Float[Tensor, "k 2"] | None = None,
) -> Solution:
    """A :class:`Solution` whose ``converged`` follows from the reasons; NaN is never a success."""
    succeeded = (StopReason.CONVERGED, StopReason.APPROXIMATION)
    finite = finite_rows(value.T).tolist()
    reason = [
        StopReason.NOT_FINITE if why in succeeded and not good else why
        for why, good in zip(reason, finite, strict=True)
    ]
    return Solution(
        value=value,
        converged=torch.tensor([r in succeeded for r in reason], dtype=torch.bool, device="cpu"),
        iterations=torch.tensor(iterations or [0] * len(reason), dtype=torch.int64, device="cpu"),
        residual=residual.detach().to("cpu", torch.float64),
        reason=tuple(reason),
        curvature=None if curvature is None else curvature.detach().to("cpu", torch.float64),
    )


def approximation(
    value: Float[Tensor, "P k"], spectrum: tuple[float, float] | None = None, *, singular: bool = False
) -> Solution:
    """The :class:`Solution` of an inverse that is one fixed matrix: its residuals are not measured.

    Args:
        value: The columns that it gives.
        spectrum: Smallest and largest curvature that the matrix was made of.
        singular: Whether it is a pseudo-inverse, which solves for no column with a part outside its span.
    """
    reason = StopReason.SINGULAR if singular else StopReason.APPROXIMATION
    count = value.shape[1]
    unmeasured = torch.full((count,), float("nan"), dtype=torch.float64, device="cpu")
    curvature = None
    if spectrum is not None:
        curvature = torch.tensor(spectrum, dtype=torch.float64, device="cpu").expand(count, 2)
    return make_solution(value, unmeasured, [reason] * count, curvature=curvature)


def relative_residuals(
    operator: LinearOperator,
    regularization: float,
    value: Float[Tensor, "P k"],
    columns: Float[Tensor, "P k"],
) -> Float[Tensor, " k"]:
    """``‖b − (C + λI)x‖ / ‖b‖`` of each column, at the cost of one product; 0 where ``b = x = 0``."""
    remainder = torch.sub(columns - operator @ value, value, alpha=regularization)
    # Squares of tiny entries would be zero, and those of huge ones infinite.
    unit = columns.abs().amax(dim=0)
    unit = torch.where((unit > 0) & torch.isfinite(unit), unit, 1.0)
    norms = torch.linalg.vector_norm(remainder / unit, dim=0, dtype=torch.float64)
    scale = torch.linalg.vector_norm(columns / unit, dim=0, dtype=torch.float64)
    return torch.where(norms == 0, 0.0, norms / scale)


@runtime_checkable
class Outcomes(Protocol):
    """What is known of some right-hand sides: a :class:`Solution`, or several of them joined."""

    @property
    def converged(self) -> Bool[Tensor, " k"]: ...

    @property
    def residual(self) -> Float[Tensor, " k"]: ...

    @property
    def reason(self) -> tuple[StopReason, ...]: ...


def scaled_rows(columns: Float[Tensor, "P k"]) -> tuple[Float[Tensor, "k P"], Float[Tensor, "k 1"]]:
    """Columns as rows whose largest entries lie in ``[1, 2)``, and the powers of two that they were divided by.

    Squares of tiny entries would be zero, and those of huge ones infinite; dividing by a power of two is
    exact. A column of zeros, or with NaN or infinity, is divided by 1.
    """
    largest = columns.abs().amax(dim=0)[:, None]
    unit = largest / (2 * torch.frexp(largest).mantissa)
    unit = torch.where(torch.isfinite(unit), unit, 1.0)
    return (columns.T / unit).contiguous(), unit


def row_norms(rows: Float[Tensor, "k P"]) -> Float[Tensor, " k"]:
    """Euclidean norm of each row."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def describe_failures(
    solution: Outcomes, quiet: frozenset[StopReason] = frozenset(), *, listed: int = 8
) -> str | None:
    """One line on the right-hand sides that failed, or ``None`` where there is nothing to say."""
    failed = [
        index
        for index, (good, reason) in enumerate(zip(solution.converged.tolist(), solution.reason, strict=True))
        if not good and reason not in quiet
    ]
    if not failed:
        return None
    reasons = Counter(solution.reason[index] for index in failed)
    measured = solution.residual[failed]
    worst = measured.nan_to_num(nan=float("inf")).max().item()
    how_far = "residuals not measured" if measured.isnan().all() else f"largest relative residual {worst:.1e}"
    names = ", ".join(map(str, failed[:listed])) + (", …" if len(failed) > listed else "")
    causes = "; ".join(f"{count} {reason.value}" for reason, count in reasons.most_common())
    return (
        f"{len(failed)} of {len(solution.reason)} right-hand sides were not solved "
        f"(columns {names}; {how_far}): {causes}."
    )
