"""Which of several processes writes, and what the others have of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from influence_framework.attribution.blocks import Identifiers
from influence_framework.attribution.fingerprints import Survey
from influence_framework.attribution.outputs import Array, Collector, Scored
from influence_framework.attribution.store import Store
from influence_framework.errors import InvalidInputError
from influence_framework.processes import Processes


class Forgetting(Collector):
    """Collects nothing, where another process writes what there is."""

    def add(self, rows: slice, columns: slice, scores: Array) -> None:
        pass

    def state(self) -> Mapping[str, Array]:
        return {}

    def restore(self, state: Mapping[str, Array]) -> None:
        pass

    def columns(self, test: Identifiers, train: Identifiers) -> Mapping[str, Array]:
        raise InvalidInputError("Process 0 has these scores: read the store that it writes.")


@dataclass
class Place:
    """One process among those that compute a result together, or the only one.

    Attributes:
        processes: All of them; ``None`` where there is this one only.
        folder: The store that the first of them writes to.
    """

    processes: Processes | None
    folder: Path | None = field(default=None, init=False)

    @classmethod
    def of(cls, processes: Processes | None, surveys: Mapping[str, Survey]) -> Self:
        """A place from which the same points are seen as from the others.

        Raises:
            InvalidInputError: The processes were given different points.
        """
        if processes is not None:
            seen = {what: survey.digest for what, survey in surveys.items()}
            for number, there in enumerate(processes.gather(seen, "the points")):
                if there != seen:
                    what = " and ".join(what for what in seen if there.get(what) != seen[what])
                    raise InvalidInputError(
                        f"The {what} of process {number} are not those of process {processes.rank}: give all "
                        "the same loaders, without a DistributedSampler. They are divided here."
                    )
        return cls(processes)

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.processes is None or self.processes.rank == 0

    def store(self, path: str | os.PathLike[str] | None, manifest: Mapping[str, Any]) -> Store | None:
        """The store to write to, if that is for this process to do."""
        if path is None:
            return None
        self.folder = Path(path)
        store = Store(path, manifest) if self.leads else None
        if self.processes is None:
            return store
        self.processes.gather(None, "the store")
        if not self.folder.is_dir():
            raise InvalidInputError(
                f"Process {self.processes.rank} does not see {self.folder}, which process 0 has made: choose a "
                "folder on a file system that all of them share."
            )
        return store

    def resumed(
        self, store: Store | None, collector: Collector, beside: Mapping[str, Array]
    ) -> set[tuple[int, int]]:
        """Which blocks are done; ``collector`` and ``beside`` then have what the first process has of them."""
        done = set() if store is None else store.done
        if self.processes is None or self.folder is None:
            return done
        done, state, kept = self.processes.same(
            (done, dict(collector.state()), dict(beside)), "what was done before"
        )
        if store is None:
            for name, array in beside.items():
                array[...] = kept[name]
            collector.restore(state)
        return done

    def concluded(self, scored: Scored) -> Scored:
        """The result, read from the store where another process has written it."""
        if self.processes is None or self.folder is None:
            return scored
        self.processes.gather(None, "the end of the store")
        if not isinstance(scored.collected, Forgetting):
            return scored
        return replace(scored, collected=Store.written(self.folder, scored.output))
