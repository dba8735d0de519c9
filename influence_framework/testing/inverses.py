"""Checks of an inverse as a matrix: what it is, what it costs nobody, and that it stays the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.protocols import (
    InverseOperator,
    Persistent,
    Preconditioning,
    Reregularizable,
    Restoring,
    SavedState,
    Sweepable,
)
from influence_framework.testing.subjects import DTYPES, Lenient, SolverSubject, devices
from influence_framework.testing.untouched import changed_random_states


def symmetric(subject: SolverSubject) -> Iterator[str]:
    """The inverse of a symmetric matrix is symmetric."""
    yield from asymmetry(subject, subject.applied)


def asymmetry(subject: SolverSubject, matrix: Float[Tensor, "P P"]) -> Iterator[str]:
    """A line where ``matrix`` is less symmetric than the solver's accuracy makes it."""
    relative = float(torch.linalg.matrix_norm(matrix - matrix.T) / torch.linalg.matrix_norm(matrix))
    # Each column may be off by the accuracy times the norm of the inverse.
    allowed = 2 * len(matrix) ** 0.5 * subject.allowed()
    if not relative <= allowed:
        yield f"‖M − Mᵀ‖ / ‖M‖ = {relative:.1e}, expected at most {allowed:.1e}"


def positive_definite(subject: SolverSubject) -> Iterator[str]:
    """An inverse that is called fixed is positive definite."""
    if getattr(subject.solver, "fixed", False):
        yield from indefiniteness(subject.applied)


def indefiniteness(matrix: Float[Tensor, "P P"]) -> Iterator[str]:
    """A line where the symmetric part of ``matrix`` has an eigenvalue that is not positive."""
    lowest = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
    if not lowest > 0:
        yield f"its least eigenvalue is {lowest:.3g}, expected more than 0"


def agrees_with_dense_inverse(subject: SolverSubject) -> Iterator[str]:
    """At a λ well below the largest eigenvalue, residuals are within the accuracy that the solver states."""
    if subject.accuracy is None:
        return
    for dtype in DTYPES:
        for system in subject.also_dense(subject.system("definite", dtype)):
            columns = system.columns(3)
            worst = float(system.residuals(subject.fit(system) @ columns, columns).max())
            if not worst <= subject.allowed(dtype):
                what = f"{dtype}, {type(system.operator).__name__}"
                yield f"{what}: relative residual {worst:.1e}, expected at most {subject.allowed(dtype):.1e}"


def products_are_columnwise(subject: SolverSubject) -> Iterator[str]:
    """A product with k columns is that with each of them, for k = 1, for k = P and for k > P."""
    system = subject.definite
    size = system.size
    wide = system.columns(size + 5)
    alone = {index: subject.inverse @ wide[:, [index]] for index in (0, 1, size - 1, size, size + 4)}
    for count in (2, size, size + 5):
        columns = wide[:, :count].clone()
        together = subject.inverse @ columns
        if together.shape != columns.shape:
            yield f"k = {count}: shape {tuple(together.shape)}, expected {tuple(columns.shape)}"
            continue
        for index in [index for index in alone if index < count]:
            distance = subject.apart(system, together[:, [index]], alone[index], columns[:, [index]])
            yield from _differing(f"k = {count}, column {index}", distance)


def vectors_stay_vectors(subject: SolverSubject) -> Iterator[str]:
    """A vector ``(P,)`` comes back as a vector, equal to the column that it stands for."""
    system = subject.definite
    vector = system.columns()
    for what, apply in _ways(subject.inverse).items():
        value, column = apply(vector), apply(vector[:, None])
        if value.shape != vector.shape:
            yield f"{what}: shape {tuple(value.shape)}, expected {tuple(vector.shape)}"
        else:
            yield from _differing(what, subject.apart(system, value[:, None], column, vector[:, None]))


def no_columns_give_none(subject: SolverSubject) -> Iterator[str]:
    """A product with no columns has none: ``(P, 0)`` gives ``(P, 0)``."""
    nothing = subject.definite.columns(0)
    for what, apply in _ways(subject.inverse).items():
        value = apply(nothing)
        if value.shape != nothing.shape:
            yield f"{what}: shape {tuple(value.shape)}, expected {tuple(nothing.shape)}"


def solve_equals_product(subject: SolverSubject) -> Iterator[str]:
    """``solve`` and ``@`` give the same."""
    columns = subject.definite.columns(3)
    value = subject.inverse.solve(columns).value
    yield from _differing("solve", subject.apart(subject.definite, value, subject.inverse @ columns, columns))


def each_column_by_its_own_norm(subject: SolverSubject) -> Iterator[str]:
    """A right-hand side is solved as accurately beside one that is a million times larger as it is alone."""
    system = subject.definite
    columns = system.columns(3)
    columns[:, 1] *= 1e6
    alone = torch.cat([subject.inverse @ columns[:, [index]] for index in range(3)], dim=1)
    yield from _differing("", subject.apart(system, subject.inverse @ columns, alone, columns))


def deterministic(subject: SolverSubject) -> Iterator[str]:
    """Two fits and solves on the CPU give the same to the last bit, whatever the global random states."""
    columns = subject.definite.columns(3)
    values = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        values.append(subject.fit(subject.definite).solve(columns).value)
    if not torch.equal(*values):
        yield f"the two differ by up to {float((values[0] - values[1]).abs().max()):.1e}"


def global_random_state_untouched(subject: SolverSubject) -> Iterator[str]:
    """A fit and a solve leave the global random states of Python, NumPy and torch alone."""
    yield from changed_random_states(lambda: subject.fit(subject.definite).solve(subject.definite.columns(3)))


def another_regularization(subject: SolverSubject) -> Iterator[str]:
    """Where ``with_regularization`` is offered, it equals a new fit, and leaves what it was called on alone."""
    system = subject.definite
    inverse = subject.fit(system)
    if not isinstance(inverse, Reregularizable):
        return
    columns = system.columns(3)
    before = inverse @ columns
    for factor in (0.5, 10.0):
        other = system.at(factor * system.regularization)
        moved, refitted = inverse.with_regularization(other.regularization), subject.fit(other)
        distance = subject.apart(other, moved @ columns, refitted @ columns, columns)
        yield from _differing(f"{factor:g}·λ", distance)
    yield from _differing("afterwards at λ", subject.apart(system, inverse @ columns, before, columns))


def sweep(subject: SolverSubject) -> Iterator[str]:
    """Where ``solve_sweep`` is offered, it equals a solve at each λ, in the order they were given."""
    system, inverse = subject.definite, subject.inverse
    if not isinstance(inverse, Sweepable):
        return
    columns = system.columns(3)
    strengths = [factor * system.regularization for factor in (10.0, 1.0, 3.0)]
    solutions = inverse.solve_sweep(columns, strengths)
    if len(solutions) != len(strengths):
        yield f"{len(solutions)} solutions for {len(strengths)} values of λ"
    for strength, solution in zip(strengths, solutions, strict=False):
        other = system.at(strength)
        alone = subject.fit(other).solve(columns)
        distance = subject.apart(other, solution.value, alone.value, columns)
        yield from _differing(f"λ = {strength:.3g}", distance)


def restored_equals_saved(subject: SolverSubject) -> Iterator[str]:
    """Where an inverse can be saved, what is restored gives the same to the last bit, and at another λ too."""
    system, inverse = subject.definite, subject.inverse
    if isinstance(inverse, Persistent) != isinstance(subject.solver, Restoring):
        yield "of the inverse's state() and the solver's restore(operator, λ, state) only one is there"
    if not isinstance(inverse, Persistent) or not isinstance(subject.solver, Restoring):
        return
    forms: dict[str, InverseOperator] = {"": inverse}
    if isinstance(inverse, Preconditioning) and getattr(subject.solver, "fixed", False):
        forms["as a preconditioner"] = inverse.preconditioner()
    columns = system.columns(3)
    for what, form in forms.items():
        if not isinstance(form, Persistent):
            yield f"{what}: it has no state()"
            continue
        state = form.state()
        # What a file holds: values as JSON gives them back, and tensors in memory of their own.
        tensors = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
        saved = SavedState(tensors, json.loads(json.dumps(dict(state.values), allow_nan=False)))
        again = subject.solver.restore(system.operator, system.regularization, saved)
        pairs: dict[str, tuple[InverseOperator, InverseOperator]] = {"": (form, again)}
        if isinstance(form, Reregularizable) and isinstance(again, Reregularizable):
            other = 3 * system.regularization
            pairs["at another λ"] = (form.with_regularization(other), again.with_regularization(other))
        for where, (before, after) in pairs.items():
            value, expected = after.solve(columns).value, before.solve(columns).value
            if not torch.equal(value, expected):
                off = float((value - expected).abs().max())
                yield f"{' '.join(filter(None, (what, where)))} off by up to {off:.1e}".strip()


def dtype_and_device_kept(subject: SolverSubject) -> Iterator[str]:
    """The inverse and its products have the operator's shape, dtype and device."""
    for dtype, device in product(DTYPES, devices()):
        system = subject.system("definite", dtype, device)
        inverse, columns = subject.fit(system), system.columns(2)
        expected = (system.operator.shape, dtype, device.type)
        if (inverse.shape, inverse.dtype, inverse.device.type) != expected:
            yield f"the inverse is {inverse.shape} {inverse.dtype} on {inverse.device}, expected {expected}"
        for what, apply in _ways(inverse).items():
            value = apply(columns)
            if (value.dtype, value.device) != (columns.dtype, columns.device):
                yield f"{what} gave {value.dtype} on {value.device}, expected {dtype} on {columns.device}"


def products_asked_in_own_dtype(subject: SolverSubject) -> Iterator[str]:
    """The operator is asked for products of its own dtype and device only, and of columns of its own length."""
    for dtype, device in product(DTYPES, devices()):
        system = subject.system("definite", dtype, device)
        if not isinstance(system.operator, Lenient):  # operators of core refuse what is wrong
            continue
        subject.fit(system).solve(system.columns(2))
        asked = {(columns.dtype, columns.device.type, columns.shape[0]) for columns in system.operator.columns}
        wrong = asked - {(dtype, device.type, system.size)}
        if wrong:
            yield f"an operator of {dtype} on {device} was asked for {sorted(map(str, wrong))}"


def inputs_not_written_to(subject: SolverSubject) -> Iterator[str]:
    """The right-hand sides are not written to."""
    for system in subject.also_dense(subject.system("definite")):
        columns = system.columns(3)
        kept = columns.clone()
        inverse = subject.fit(system)
        for what, apply in _ways(inverse).items():
            apply(columns)
            if not torch.equal(columns, kept):
                yield f"{what} changed its columns by up to {float((columns - kept).abs().max()):.1e}"
                columns.copy_(kept)


def results_are_the_callers(subject: SolverSubject) -> Iterator[str]:
    """What a product returned may be written to: the next one is none the worse for it."""
    system = subject.definite
    columns = system.columns(3)
    for what, apply in _ways(subject.fit(system)).items():
        first = apply(columns)
        kept = first.clone()
        first.zero_()
        distance = subject.apart(system, apply(columns), kept, columns)
        yield from _differing(f"{what}, its first result overwritten", distance)


def _ways(inverse: InverseOperator) -> dict[str, Callable[[Tensor], Tensor]]:
    return {"@": lambda columns: inverse @ columns, "solve": lambda columns: inverse.solve(columns).value}


def _differing(what: str, distance: float) -> Iterator[str]:
    """A line where two results are further apart than allowed, ``distance`` being 1."""
    if not distance <= 1:
        yield f"{what + ': ' if what else ''}apart by {distance:.1e} times what is allowed"


INVERSE_CHECKS = (
    symmetric,
    positive_definite,
    agrees_with_dense_inverse,
    products_are_columnwise,
    vectors_stay_vectors,
    no_columns_give_none,
    solve_equals_product,
    each_column_by_its_own_norm,
    deterministic,
    global_random_state_untouched,
    another_regularization,
    sweep,
    restored_equals_saved,
    dtype_and_device_kept,
    products_asked_in_own_dtype,
    inputs_not_written_to,
    results_are_the_callers,
)
