"""Where the blocks of a job are computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from influence_framework.attribution.blocks import Block
from influence_framework.attribution.queries import Computed, Job


@runtime_checkable
class Executor(Protocol):
    """Computes a job for every block: frozen options, no state."""

    def run(self, job: Job, blocks: Iterable[Block]) -> Iterator[tuple[Block, Computed]]:
        """Every block with its result, once each, in whatever order they are done.

        ``blocks`` is to be read no further ahead than the workers need, since each holds data.
        """
        ...


@dataclass(frozen=True)
class SequentialExecutor:
    """One block after the other, in this process."""

    def run(self, job: Job, blocks: Iterable[Block]) -> Iterator[tuple[Block, Computed]]:
        """Every block with its result, in order."""
        for block in blocks:
            yield block, job(block)
