"""Running out of memory: how it is recognised, smaller batches, and what would have helped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch

from influence_framework.data import Batch, split
from influence_framework.errors import OutOfMemoryError, SmallerBatchWarning
from influence_framework.solving import warn_caller

P = ParamSpec("P")
R = TypeVar("R")

ALLOCATORS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed")
"""How PyTorch's allocators on CPUs, and libraries on accelerators, put it, in a plain ``RuntimeError``."""

GRAPH = 3
"""What a gradient's graph, or another backward pass through it, takes in units of the forward pass."""

SINGLE = "a single sample at a time too"
"""Noted on an error where fewer samples at a time cannot help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in ALLOCATORS)


@dataclass(eq=False)
class Room:
    """How many samples at a time memory has room for, learnt where it runs out; one for all work on a problem.

    Attributes:
        most: As many were worked on; ``None`` where memory has not run out.
        last: Samples of the batch that was worked on last.
    """

    most: int | None = None
    last: int = 0
    _told: int | None = None

    def to(self, device: Any) -> Room:
        """That of another device, of which nothing is known."""
        return Room()

    def at_most(self, count: int) -> int:
        """``count`` samples, or as many as there is room for."""
        return count if self.most is None else min(count, self.most)

    def retried(self, work: Callable[[], R]) -> R:
        """What ``work`` returns: from its beginning with batches half as large where memory runs out.

        ``work`` asks :meth:`at_most` for the size of its batches and notes it as :attr:`last`.
        """
        while True:
            try:
                found = work()
            except (MemoryError, RuntimeError) as error:
                if not self._gives_way(error, self.last):
                    raise
            else:
                self._tell()
                return found
            _release()

    def attempt(self, work: Callable[[], R], size: int) -> list[R]:
        """What ``work`` on ``size`` samples returns, as the only entry; no entry where memory runs out.

        A list, so that the caller can hand on what is in it and hold it no longer.
        """
        self.last = size
        try:
            found = [work()]
        except (MemoryError, RuntimeError) as error:
            if not self._gives_way(error, size):
                raise
        else:
            self._tell()
            return found
        _release()
        return []

    def _gives_way(self, error: Exception, size: int) -> bool:
        """Whether there is less to try; then it is noted."""
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            return False
        size = self.at_most(size)
        if size > 1:
            self.most = size // 2
        elif size == 1:
            error.add_note(SINGLE)
            # Fewer samples did not help: what is known is what it was at the last success.
            self.most = self._told
        return size > 1

    def _tell(self) -> None:
        if self.most == self._told:
            return
        self._told = self.most
        warn_caller(
            f"Memory ran out with more than {self.most} samples at a time: the work goes on with at most so "
            "many, and results are the same. A smaller memory_budget starts with fewer.",
            SmallerBatchWarning,
        )


def _release() -> None:
    """Give what the failed attempt held back to the device, where it would stay in pieces of other sizes."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_pieces(
    room: Room,
    batch: Batch,
    size_of: Callable[[Batch], int],
    at_most: int,
    work: Callable[[Batch], R],
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Batch, R]]:
    """``work`` of a batch in pieces of at most ``at_most`` samples, and of fewer where memory runs out.

    Args:
        room: What is known of the memory, and learnt.
        batch: Its samples, in order.
        size_of: Samples of a batch.
        at_most: Samples at a time.
        work: From a piece to its result; it adds to nothing.
        generator: What ``work`` draws from; wound back where it fails.

    Yields:
        Every piece with its result, in order.
    """
    waiting = deque([batch])
    while waiting:
        piece = waiting.popleft()
        size, limit = size_of(piece), room.at_most(max(1, at_most))
        if size > limit:
            waiting.extendleft(reversed(list(split(piece, size, limit))))
            continue
        state = None if generator is None else generator.get_state()
        done = room.attempt(partial(work, piece), size)
        if done:
            yield piece, done.pop()
            continue
        waiting.appendleft(piece)
        if generator is not None and state is not None:
            generator.set_state(state)


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
    single = SINGLE in getattr(error, "__notes__", ())
    if single:
        options += ["use shorter samples, a lower precision or a device with more memory"]
    return f"{method} ran out of memory ({said}){f', {SINGLE}' if single else ''}: {', or '.join(options)}."
