"""What is found out before a fit: which parameters take part, and where λ lies in the spectrum of ``C``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from influence_framework.data import random_state_kept
from influence_framework.errors import NonFiniteError, PreflightWarning
from influence_framework.lanczos import NOISE, tridiagonals
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import TRIAL, Problem
from influence_framework.protocols import HessianSource, LinearOperator
from influence_framework.solving import warn_caller

LEAST = 4
"""Samples, and Lanczos steps in a block, at least."""

SAMPLES = 256
"""Samples at most whose curvature stands for that of all data."""

STEPS = 6
"""Lanczos steps at most in each block."""

CLOSER_LOOK = 20
"""Lanczos steps at most where a negative eigenvalue is seen: the first few find hardly more than its sign."""

BLOCKS = 8
"""Blocks at most whose spectra are looked at: those with most parameters."""

PRODUCTS = 32
"""Lanczos steps at most in all blocks together."""

SHARE = 12
"""Samples of the training data for each product with one sample ..."""

FREE_FLOPS = 2**28
"""... unless the forward passes of the samples tried take less than this."""

ABOVE = 10.0
"""λ in units of the largest eigenvalue from where on scores hardly depend on ``C``."""


@dataclass(frozen=True)
class BlockPreflight:
    """One block's λ and the extremes of its spectrum, estimated.

    ``smallest`` and ``largest`` are Ritz values: they lie within the spectrum of the curvature of the
    samples tried, whose own may reach further than that of all data, or less far. ``None`` where they were
    not estimated: blocks beyond the eight largest, or without effect on the loss; models without second
    derivatives; products that overflow.

    Attributes:
        parameters: Elements of the flat vector in this block.
        regularization: λ.
        precision: ``eps`` of the dtype that the solver computes in.
        smallest: Smallest eigenvalue found.
        largest: Largest eigenvalue found.
        indefinite: Whether ``smallest`` is negative beyond rounding, where the operator is not known to be
            positive semidefinite.
        taken: Whether the solver takes negative eigenvalues.
        sought: Whether it looks for them by itself, in the curvature of all data.
    """

    parameters: int
    regularization: float
    precision: float
    smallest: float | None = None
    largest: float | None = None
    indefinite: bool = False
    taken: bool = False
    sought: bool = False

    @property
    def scale(self) -> float | None:
        """Largest magnitude of an eigenvalue found."""
        if self.smallest is None or self.largest is None:
            return None
        return max(abs(self.smallest), abs(self.largest))

    @property
    def suggested(self) -> tuple[float, float] | None:
        """λ between which ``C`` decides and rounding does not; ``None`` where ``C`` is zero or not looked at.

        ``None`` too where the solver has to say it, which looks for the negative eigenvalues by itself.

        From ``√eps`` of the largest eigenvalue, or from twice the magnitude of a negative one if that is
        more, up to the largest eigenvalue, or twice the lower end.
        """
        if not self.scale or (self.indefinite and self.sought):
            return None
        negative = -2 * self.smallest if self.indefinite and self.smallest is not None else 0.0
        low = max(self.precision**0.5 * self.scale, negative)
        return low, max(self.scale, 2 * low)

    @property
    def above(self) -> bool:
        """Whether λ is far above the spectrum."""
        return self.scale is not None and self.regularization > ABOVE * self.scale

    @property
    def below(self) -> bool:
        """Whether λ is lost in the rounding of the largest eigenvalue."""
        return self.scale is not None and 0 < self.regularization < self.precision * self.scale

    @property
    def exceeded(self) -> bool:
        """Whether λ does not make up for a negative eigenvalue, as a solver needs that does not look for it."""
        if self.taken or self.sought or not self.indefinite or self.smallest is None:
            return False
        return self.regularization <= -self.smallest

    def __str__(self) -> str:
        found = None if self.scale is None else f"{self.smallest:.2g} to {self.largest:.2g}"
        known = "" if found is None else f", eigenvalues found {found}"
        advice = "" if self.suggested is None else ", try {:.1e} to {:.1e}".format(*self.suggested)
        return f"λ = {self.regularization:.3g}{known}{advice}"


@dataclass(frozen=True)
class Preflight:
    """What was found out before a fit; ``str()`` of it is a table.

    Attributes:
        parameters: ``P``, elements of the parameters that take part.
        total: Elements of all parameters of the model, frozen ones included.
        unreachable: Parameters that take part without being in the graph of the loss.
        idle: Those in the graph whose gradient is exactly zero for every sample tried.
        reduction: How the loss combines samples, ``"mean"`` or ``"sum"``; ``None`` where an objective of
            one's own decides.
        samples: ``N``, the samples of the training data.
        tried: Samples from which eigenvalues were estimated; 0 where they were not.
        blocks: What was found in each block.
    """

    parameters: int
    total: int
    unreachable: tuple[str, ...]
    idle: tuple[str, ...]
    reduction: str | None
    samples: int
    tried: int
    blocks: Mapping[str, BlockPreflight] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        problem: Problem,
        parts: Mapping[str, ParameterSpace],
        source: HessianSource,
        regularization: Mapping[str, float],
        *,
        taken: bool = False,
        sought: bool = False,
        least_dtype: torch.dtype | None = None,
        probe: bool = True,
    ) -> Self:
        """Look at the parameters and at the spectrum of each block, and warn of what cannot be meant.

        Eigenvalues are Ritz values of the source's own operator on the first samples of the data: of 256 at
        most, of fewer where that would take more than one product with a sample for twelve samples of the
        data, but of four at least, from four to six Lanczos steps in each of the eight largest blocks (twenty
        where an eigenvalue is negative, unless the solver looks for such): a few per cent of a fit of
        Kronecker factors with some hundreds of samples for a block. Few samples
        make the largest eigenvalue larger than it is, and data sorted by class shows the curvature of its
        first classes only.

        Args:
            problem: The whole problem.
            parts: Parameters of each block.
            source: The curvature.
            regularization: λ of each block.
            taken: Whether the solver takes negative eigenvalues of ``C + λI`` (``takes_indefinite``).
            sought: Whether it looks for them by itself (``finds_indefinite``).
            least_dtype: The coarsest precision in which the solver computes, whatever that of the model.
            probe: Also what takes derivatives: parameters without effect, and eigenvalues.
        """
        dtype = problem.parameters.dtype
        precision = torch.finfo(dtype if least_dtype is None else torch.promote_types(dtype, least_dtype)).eps
        blocks = {
            name: BlockPreflight(part.numel, regularization[name], precision, taken=taken, sought=sought)
            for name, part in parts.items()
        }
        unreachable: tuple[str, ...] = ()
        idle: tuple[str, ...] = ()
        tried = 0
        if probe:
            chosen = sorted(parts, key=lambda name: -parts[name].numel)[:BLOCKS]
            steps = min(STEPS, PRODUCTS // len(chosen))
            if _affordable(problem, steps * len(chosen)) == LEAST:
                steps = LEAST  # a product with the fewest samples is a good part of a pass over the data
            count = _affordable(problem, steps * len(chosen))
            few = problem.first(max(count, TRIAL))
            unreachable, idle = without_effect(few.first(TRIAL))
            if problem.twice_differentiable:
                few = few.first(count)
                tried = few.size
                for name in chosen:
                    if set(parts[name].names) <= {*unreachable, *idle}:
                        continue  # said already; its curvature is zero
                    with suppress(NonFiniteError):  # a solver that needs products raises it in its turn
                        # All of the memory budget is this block's, so that its graphs are kept.
                        operator = source.operator(
                            replace(few, parameters=parts[name], whole=few.parameters), parts[name]
                        )
                        blocks[name] = _with_spectrum(blocks[name], operator, steps)
        found = cls(
            parameters=problem.parameters.numel,
            total=sum(p.numel() for p in problem.model.parameters()),
            unreachable=unreachable,
            idle=idle,
            reduction=getattr(problem.objective, "reduction", None),
            samples=problem.size,
            tried=tried,
            blocks=blocks,
        )
        found._warn_of_parameters(min(TRIAL, problem.size))
        found._warn_of_regularization()
        return found

    def at(self, regularization: Mapping[str, float]) -> Self:
        """The same findings at another λ per block, with the warnings that go with it.

        What a solver sought by itself was what matters at the λ of its fit, and at a larger one.
        """
        blocks = {
            name: replace(
                block,
                regularization=regularization[name],
                sought=block.sought and regularization[name] >= block.regularization,
            )
            for name, block in self.blocks.items()
        }
        found = replace(self, blocks=blocks)
        found._warn_of_regularization()
        return found

    def _warn_of_parameters(self, tried: int) -> None:
        causes = {
            "not part of its graph": self.unreachable,
            f"gradient exactly zero for each of {tried} samples tried": self.idle,
        }
        named = "; ".join(
            f"{_listed(list(map(repr, names)))} ({why})" for why, names in causes.items() if names
        )
        if named:
            warn_caller(
                f"The loss does not depend on these trainable parameters: {named}. They add nothing to any "
                "score and, with λ = 0, make C singular: freeze them with requires_grad_(False).",
                PreflightWarning,
            )

    def _warn_of_regularization(self) -> None:
        findings = {
            "is so far above the curvature that scores are hardly more than ∇ℓᵀ∇ℓ/λ: lower it, or "
            "use another source if the curvature is zero": "above",
            "is lost in the rounding of the largest eigenvalue: raise it, or use float64": "below",
            "does not make up for a negative eigenvalue, so that solvers for positive definite matrices fail: "
            "raise it, or use the source 'gauss_newton'": "exceeded",
        }
        for what, flag in findings.items():
            named = [f"{name!r} ({block})" for name, block in self.blocks.items() if getattr(block, flag)]
            if named:
                warn_caller(
                    f"The regularisation of block {_listed(named)} {what}. {self._origin}",
                    PreflightWarning,
                )

    @property
    def _origin(self) -> str:
        return (
            f"Eigenvalues are estimates by a few Lanczos steps on {self.tried} of {self.samples} samples; "
            "preflight=False leaves them out."
        )

    def __str__(self) -> str:
        loss = "an objective of its own" if self.reduction is None else f"the {self.reduction} over samples"
        lines = [
            f"{self.parameters} of {self.total} parameters take part; the loss is {loss}, of {self.samples}.",
        ]
        for what, names in (("not in the graph", self.unreachable), ("zero gradient", self.idle)):
            if names:
                lines.append(f"Without effect, {what}: {', '.join(names)}.")
        header = ("block", "parameters", "λ", "smallest", "largest", "suggested λ")
        rows = [header, *(_row(name, block) for name, block in self.blocks.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *cells in rows:
            padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join((name.ljust(widths[0]), *padded)))
        if self.tried:
            lines.append(self._origin)
        return "\n".join(lines)


def _row(name: str, block: BlockPreflight) -> tuple[str, ...]:
    extremes = ("" if value is None else f"{value:.2e}" for value in (block.smallest, block.largest))
    suggested = "" if block.suggested is None else "{:.1e} to {:.1e}".format(*block.suggested)
    return (name, str(block.parameters), f"{block.regularization:.3g}", *extremes, suggested)


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _affordable(problem: Problem, products: int) -> int:
    """Samples with which so many products cost little beside any fit."""
    free = FREE_FLOPS // (products * max(1, problem.sample_flops))
    return min(SAMPLES, max(LEAST, free, problem.size // (SHARE * products)))


def _with_spectrum(block: BlockPreflight, operator: LinearOperator, steps: int) -> BlockPreflight:
    found = ritz_values(operator)
    *_, (smallest, largest) = islice(found, steps)
    rounding = torch.finfo(operator.dtype).eps
    negative = smallest < -NOISE * rounding * max(abs(smallest), abs(largest))
    # Asked last: some operators run the model to answer it.
    indefinite = negative and not getattr(operator, "positive_semidefinite", False)
    if indefinite and not block.sought:
        *_, (smallest, largest) = (smallest, largest), *islice(found, CLOSER_LOOK - steps)
    return replace(block, smallest=smallest, largest=largest, indefinite=indefinite)


def ritz_values(operator: LinearOperator) -> Iterator[tuple[float, float]]:
    """Smallest and largest Ritz value after each Lanczos step from a random vector, always the same.

    Raises:
        NonFiniteError: A product with NaN or infinity in it.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(operator.shape[0], generator=generator, dtype=torch.float32, device="cpu")
    for matrix in tridiagonals(operator, start.to(operator.device, operator.dtype)):
        values = torch.linalg.eigvalsh(matrix)
        yield values[0].item(), values[-1].item()


def without_effect(problem: Problem) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parameters outside the graph of the loss, and those in it with zero gradient for every sample.

    Where no parameter has a gradient (a model that fits these samples exactly, say), none is blamed.
    """
    names = problem.parameters.names
    reached, moved = set[str](), set[str]()
    for batch, size in problem.batches():
        named = problem.parameters.leaves(problem.model)
        with torch.enable_grad(), random_state_kept():
            losses = problem.sample_losses(named, batch)
        if not losses.requires_grad:
            continue
        # Weights of their own, so that the gradients of two samples do not cancel.
        weights = torch.linspace(1, 2, size, dtype=losses.dtype, device=losses.device)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            losses, list(named.values()), weights, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                reached.add(name)
                if gradient.any():
                    moved.add(name)
    unreachable = tuple(name for name in names if name not in reached)
    idle = tuple(name for name in names if name in reached and name not in moved) if moved else ()
    return unreachable, idle
