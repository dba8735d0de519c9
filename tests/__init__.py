"""Tests of core; ``typechecked`` is the run-time checker behind ``--jaxtyping-packages``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

from beartype import BeartypeConf, FrozenDict, beartype

Function = TypeVar("Function", bound=Callable[..., Any])

_checked = beartype(
    conf=BeartypeConf(
        # As for static checkers, an int is taken where a float is expected.
        is_pep484_tower=True,
        # Methods are decorated one by one, where beartype cannot know what Self is.
        hint_overrides=FrozenDict({Self: Any}),
    )
)


def typechecked(function: Function) -> Function:
    """Check arguments and results of ``function``, unless it is a closure.

    A closure is made anew on every call of what it is in, and its check would be compiled each time:
    that took half of the time of the tests.
    """
    if "<locals>" in function.__qualname__:
        return function
    return _checked(function)
