"""Running out of memory: how it is recognised, and what would have helped."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch

from influence_framework.errors import OutOfMemoryError

P = ParamSpec("P")
R = TypeVar("R")

CPU_ALLOCATOR = ("not enough memory", "can't allocate memory", "cannot allocate memory")
"""How PyTorch's allocators on CPUs put it, in a plain ``RuntimeError``."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in CPU_ALLOCATOR)


@runtime_checkable
class _Budgeted(Protocol):
    """What the advice depends on."""

    memory_budget: int
    blocks: Any


S = TypeVar("S", bound=_Budgeted)


def advises_on_memory(
    points: bool,
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Make a method that runs out of memory raise :class:`OutOfMemoryError`, which says what would help.

    Args:
        points: Whether the method takes points, of which there may be fewer.
    """

    def decorate(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(method)
        def advising(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(_advice(self, method.__name__, error, points)) from error

        return advising

    return decorate


def _advice(owner: _Budgeted, method: str, error: BaseException, points: bool) -> str:
    options = [f"lower memory_budget, which is {owner.memory_budget} bytes now"]
    if points:
        options.append("pass fewer points per call")
    if owner.blocks == "full":
        options.append("use smaller blocks, blocks='per_layer' say")
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{method} ran out of memory ({said}): {', or '.join(options)}."
