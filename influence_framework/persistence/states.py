"""What an inverse is made of, asked for and made use of with an error that says what is missing."""

from __future__ import annotations

from influence_framework.errors import InvalidInputError, MissingCapabilityError
from influence_framework.protocols import (
    InverseOperator,
    LinearOperator,
    Persistent,
    Restoring,
    SavedState,
    Solver,
)


def state_of(solver: Solver, inverse: object) -> SavedState:
    """What ``inverse``, made by ``solver``, is made of.

    Raises:
        MissingCapabilityError: One of the two does not take part.
    """
    if not isinstance(inverse, Persistent) or not isinstance(solver, Restoring):
        missing = [
            f"{type(thing).__name__} has no method {method!r}"
            for thing, protocol, method in ((inverse, Persistent, "state"), (solver, Restoring, "restore"))
            if not isinstance(thing, protocol)
        ]
        raise MissingCapabilityError(
            f"What {type(solver).__name__} fits cannot be saved: {' and '.join(missing)}. Its authors add "
            "them (Persistent and Restoring of influence_framework.protocols), or you choose another solver."
        )
    return inverse.state()


def restored(
    solver: Solver, operator: LinearOperator, regularization: float, state: SavedState | None
) -> InverseOperator:
    """The inverse that ``state`` was taken of.

    Raises:
        InvalidInputError: The solver does not take part (any more), or cannot make anything of ``state``.
    """
    name = type(solver).__name__
    if not isinstance(solver, Restoring):
        raise InvalidInputError(f"{name} has no method 'restore': install the version that saved this model.")
    try:
        if state is None:
            raise KeyError("a part of the saved inverse")
        inverse = solver.restore(operator, regularization, state)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{name} cannot make anything of what was saved ({type(error).__name__}: {error}): install the "
            "version of it that saved this model, or fit again."
        ) from error
    if not isinstance(inverse, InverseOperator) or inverse.shape != operator.shape:
        raise InvalidInputError(
            f"{name}.restore returned {type(inverse).__name__} where an inverse operator of shape "
            f"{operator.shape} was expected: the solver is faulty."
        )
    return inverse


def multiplies(inverse: object) -> bool:
    """Whether every solve multiplies with the operator."""
    return bool(getattr(inverse, "multiplies", False))
