"""What came of every right-hand side of a call: collected block by block, shown as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence_framework.inverses import describe_failures
from influence_framework.protocols import Solution, StopReason

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "block",
    "regularization",
    "position",
    "solver",
    "iterations",
    "residual",
    "converged",
    "reason",
    "smallest_curvature",
    "largest_curvature",
    "seconds",
)
LISTED = 8
"""Right-hand sides that a table lists by themselves, the worst of those that failed."""


@dataclass(frozen=True)
class BlockReport:
    """The right-hand sides of one block at one λ, in the order in which they were solved.

    Attributes:
        block: Name of the block.
        regularization: λ.
        solver: Name of the solver's class.
        iterations: Products spent on each, ``(k,)``.
        residual: True relative residuals ``‖b − (C + λI)x‖ / ‖b‖``, ``(k,)``; NaN where not measured.
        converged: Whether each is what the solver promises, ``(k,)``.
        reason: Why the solver stopped, ``k`` of them.
        curvature: Smallest and largest curvature ``vᵀCv / vᵀv`` that the solver saw, ``(k, 2)``; NaN where it
            tells none.
        seconds: Each one's share of the wall-clock time of the solve that it was part of, ``(k,)``.
        quiet: Reasons that are no cause for a warning.
    """

    block: str
    regularization: float
    solver: str
    iterations: Int[Tensor, " k"]
    residual: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    reason: tuple[StopReason, ...]
    curvature: Float[Tensor, "k 2"]
    seconds: Float[Tensor, " k"]
    quiet: frozenset[StopReason] = frozenset()

    @classmethod
    def of(
        cls,
        block: str,
        regularization: float,
        solver: str,
        solution: Solution,
        seconds: float,
        quiet: frozenset[StopReason] = frozenset(),
    ) -> Self:
        """The report on one solve, which took ``seconds`` in all."""
        count = len(solution.reason)
        curvature = solution.curvature
        if curvature is None:
            curvature = torch.full((count, 2), float("nan"), dtype=torch.float64, device="cpu")
        return cls(
            block=block,
            regularization=regularization,
            solver=solver,
            iterations=solution.iterations,
            residual=solution.residual,
            converged=solution.converged,
            reason=solution.reason,
            curvature=curvature,
            seconds=torch.full((count,), seconds / max(1, count), dtype=torch.float64, device="cpu"),
            quiet=quiet,
        )

    def __len__(self) -> int:
        return len(self.reason)

    def failures(self, *, quiet: bool = False) -> str | None:
        """One line on the right-hand sides that failed, or ``None``; without quiet ones unless asked for."""
        return describe_failures(self, frozenset() if quiet else self.quiet)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """One tuple for each right-hand side, in the order of :data:`COLUMNS`."""
        for i in range(len(self)):
            low, high = self.curvature[i].tolist()
            yield (
                self.block,
                self.regularization,
                i,
                self.solver,
                int(self.iterations[i]),
                float(self.residual[i]),
                bool(self.converged[i]),
                self.reason[i].value,
                low,
                high,
                float(self.seconds[i]),
            )

    def totals(self) -> BlockTotals:
        """All right-hand sides in few numbers."""
        measured = self.residual[~self.residual.isnan()]
        low, high = self.curvature[:, 0], self.curvature[:, 1]
        seen = bool(len(self)) and not bool(low.isnan().all())
        return BlockTotals(
            block=self.block,
            regularization=self.regularization,
            solver=self.solver,
            solved=len(self),
            failed=int((~self.converged).sum()),
            iterations=int(self.iterations.max()) if len(self) else 0,
            residual=float(measured.max()) if len(measured) else None,
            curvature=(
                (float(low.nan_to_num(torch.inf).min()), float(high.nan_to_num(-torch.inf).max()))
                if seen
                else None
            ),
            seconds=float(self.seconds.sum()),
        )

    def summary(self) -> tuple[str, ...]:
        """The cells of this block's line in a table."""
        return self.totals().cells()


@dataclass(frozen=True)
class BlockTotals:
    """What came of all right-hand sides of one block at one λ.

    Attributes:
        block: Name of the block.
        regularization: λ.
        solver: Name of the solver's class.
        solved: How many right-hand sides there were.
        failed: How many of them are not what the solver promises.
        iterations: The most that one took.
        residual: The largest true relative residual; ``None`` where none was measured.
        curvature: The smallest and the largest that was seen; ``None`` where none was.
        seconds: Wall-clock time of all.
    """

    block: str
    regularization: float
    solver: str
    solved: int
    failed: int
    iterations: int
    residual: float | None
    curvature: tuple[float, float] | None
    seconds: float

    def __add__(self, other: BlockTotals) -> BlockTotals:
        """Of the right-hand sides of both."""
        residuals = [total.residual for total in (self, other) if total.residual is not None]
        seen = [total.curvature for total in (self, other) if total.curvature is not None]
        return replace(
            self,
            solved=self.solved + other.solved,
            failed=self.failed + other.failed,
            iterations=max(self.iterations, other.iterations),
            residual=max(residuals, default=None),
            curvature=(min(low for low, _ in seen), max(high for _, high in seen)) if seen else None,
            seconds=self.seconds + other.seconds,
        )

    def cells(self) -> tuple[str, ...]:
        """The line in a table, under :data:`SUMMARY`."""
        start = (self.block, f"{self.regularization:.3g}", self.solver, str(self.solved), str(self.failed))
        if not self.solved:
            return (*start, "", "", "", "")
        return (
            *start,
            str(self.iterations),
            "not measured" if self.residual is None else f"{self.residual:.1e}",
            "not seen" if self.curvature is None else "{:.3g} to {:.3g}".format(*self.curvature),
            f"{self.seconds:.3f}",
        )


SUMMARY = ("block", "λ", "solver", "solved for", "failed", "iterations", "residual", "curvature", "seconds")


@dataclass(frozen=True)
class SolveReport:
    """What came of every right-hand side of one call of an influence model.

    Printed, it is a table: a line for each block and λ with the most iterations, the largest true relative
    residual and the extreme curvatures of its right-hand sides, then the worst of those that failed.

    Attributes:
        blocks: One :class:`BlockReport` for each block and λ.
        hints: What solvers said of their failures, each once.
    """

    blocks: tuple[BlockReport, ...] = ()
    hints: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Right-hand sides, those of every block and λ counted."""
        return sum(map(len, self.blocks))

    @property
    def converged(self) -> bool:
        """Whether every right-hand side is what its solver promises."""
        return all(bool(block.converged.all()) for block in self.blocks)

    def failures(self, *, quiet: bool = False) -> str | None:
        """One line on all that failed, or ``None`` where there is nothing to say."""
        said = [
            f"block {block.block!r} at λ = {block.regularization:.3g}: {line}"
            for block in self.blocks
            if (line := block.failures(quiet=quiet))
        ]
        if not said:
            return None
        hints = [*self.hints[:2], *(["…"] if len(self.hints) > 2 else [])]
        rest = [f"({len(said) - 1} more blocks likewise; see model.report.)"] if len(said) > 1 else []
        first = said[0] if len(self.blocks) > 1 else said[0].partition(": ")[2]
        return " ".join([first, *rest, *hints])

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """One tuple for each right-hand side, in the order of :data:`COLUMNS`."""
        for block in self.blocks:
            yield from block.rows()

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with a row for each right-hand side.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas", name="pandas") from error
        return pd.DataFrame(list(self.rows()), columns=list(COLUMNS))

    def __str__(self) -> str:
        if not self.blocks:
            return "Nothing has been solved yet."
        lines = list(_aligned([SUMMARY, *(block.summary() for block in self.blocks)]))
        failed = [row for row in self.rows() if not row[COLUMNS.index("converged")]]
        if failed:
            worst = COLUMNS.index("residual")
            failed.sort(key=lambda row: (row[worst] == row[worst], -row[worst]))
            lines.append("")
            lines += [f"{r[0]!r}, right-hand side {r[2]}: residual {r[5]:.1e}, {r[7]}" for r in failed[:LISTED]]
            if len(failed) > LISTED:
                lines.append(f"… and {len(failed) - LISTED} more")
        return "\n".join([*lines, *self.hints])


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
