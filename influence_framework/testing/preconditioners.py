"""Checks of a solver that serves as a preconditioner: one fixed symmetric positive definite matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.operators import dense_by_columns
from influence_framework.protocols import InverseOperator, LinearOperator, Preconditioning
from influence_framework.testing.composition import options_make_an_equal_instance
from influence_framework.testing.inverses import (
    asymmetry,
    deterministic,
    dtype_and_device_kept,
    global_random_state_untouched,
    indefiniteness,
    inputs_not_written_to,
    no_columns_give_none,
    positive_definite,
    products_are_columnwise,
    products_asked_in_own_dtype,
    symmetric,
    vectors_stay_vectors,
)
from influence_framework.testing.subjects import SolverSubject


def called_fixed(subject: SolverSubject) -> Iterator[str]:
    """The solver has ``fixed = True``."""
    if getattr(subject.solver, "fixed", False) is not True:
        yield f"fixed is {getattr(subject.solver, 'fixed', 'left out')}"


def linear(subject: SolverSubject) -> Iterator[str]:
    """A product with ``αx + βy`` is ``α`` times that with ``x`` and ``β`` times that with ``y``."""
    system, inverse = subject.definite, subject.inverse
    x, y = system.columns(2), system.columns(2, seed=2)
    for alpha, beta in ((2.0, -3.0), (1e-6, 0.0), (1e6, 0.0)):
        combined = alpha * x + beta * y
        distance = subject.apart(
            system, inverse @ combined, alpha * (inverse @ x) + beta * (inverse @ y), combined
        )
        if not distance <= 1:
            yield f"α = {alpha:g}, β = {beta:g}: apart by {distance:.1e} times what is allowed"


def preconditioned_spectrum_is_positive(subject: SolverSubject) -> Iterator[str]:
    """The preconditioned matrix has real and positive eigenvalues, however badly ``C`` is scaled."""
    for condition in ("definite", "badly scaled"):
        system = subject.system(condition)
        matrix = dense_by_columns(used(subject.fit(system))) @ system.shifted
        values = torch.linalg.eigvals(matrix)
        largest = float(values.abs().max())
        lowest, turned = float(values.real.min()), float(values.imag.abs().max())
        # Eigenvalues of an unsymmetric matrix are known to the rounding of the largest times its condition.
        if not (lowest > 0 and turned <= torch.finfo(torch.float64).eps ** 0.5 * largest):
            yield f"{condition}: real parts from {lowest:.1e} to {largest:.1e}, imaginary up to {turned:.1e}"


def preconditioner_form_is_positive_definite(subject: SolverSubject) -> Iterator[str]:
    """Where ``preconditioner()`` is offered, it is symmetric positive definite, for singular C at λ = 0 too."""
    inverse = subject.inverse
    if not isinstance(inverse, Preconditioning):
        return
    yield from _not_definite(subject, "definite", inverse.preconditioner())
    try:
        singular = subject.fit(subject.system("singular"))
    except Exception:  # refused
        return
    if isinstance(singular, Preconditioning):
        yield from _not_definite(subject, "singular", singular.preconditioner())


def _not_definite(subject: SolverSubject, what: str, operator: LinearOperator) -> Iterator[str]:
    matrix: Float[Tensor, "P P"] = dense_by_columns(operator)
    for line in (*asymmetry(subject, matrix), *indefiniteness(matrix)):
        yield f"{what}: {line}"


def used(inverse: InverseOperator) -> LinearOperator:
    """What an iterative solver applies: the form made for it where there is one."""
    return inverse.preconditioner() if isinstance(inverse, Preconditioning) else inverse


PRECONDITIONER_CHECKS = (
    called_fixed,
    symmetric,
    positive_definite,
    linear,
    preconditioned_spectrum_is_positive,
    preconditioner_form_is_positive_definite,
    products_are_columnwise,
    vectors_stay_vectors,
    no_columns_give_none,
    deterministic,
    global_random_state_untouched,
    dtype_and_device_kept,
    products_asked_in_own_dtype,
    inputs_not_written_to,
    options_make_an_equal_instance,
)
