"""Scores that were written to a store."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from influence_framework.attribution.blocks import Identifiers
from influence_framework.attribution.outputs import Array, MatrixCollector, Scored, resolve_output
from influence_framework.attribution.store import IDENTIFIERS, MANIFEST, SCORES, SOLVES, STATE, TABLE, Store
from influence_framework.errors import InvalidInputError
from influence_framework.reports import BlockTotals

SINGLE = ("matrix", "top_k")
"""Outputs with scores of single test points."""


@dataclass(frozen=True)
class Stored:
    """What is in a store.

    Attributes:
        manifest: What the scores are of: composition, fingerprints, versions, shapes, units.
        test_ids: Identifiers of the test points; empty where there are none.
        train_ids: Of the training points.
        matrix: The array on disk, of the output ``"matrix"``; else ``None``.
        columns: The table, of the other outputs; else empty.
        solves: What came of the solves for each block and λ.
        failures: What failed among them, one line for each run that has something to say.
        query_error: Of every test point, what compression lost of its factor; see :class:`Scored`.
    """

    manifest: Mapping[str, Any]
    test_ids: Identifiers
    train_ids: Identifiers
    matrix: Any
    columns: Mapping[str, Array]
    solves: tuple[BlockTotals, ...] = ()
    failures: tuple[str, ...] = ()
    query_error: Array | None = None

    @classmethod
    def of(cls, scored: Scored) -> Self:
        """What a store of these scores would hold, but for composition, fingerprints and solves.

        Raises:
            InvalidInputError: Another process holds them.
        """
        whole = isinstance(scored.collected, MatrixCollector)
        return cls(
            manifest={
                "output": {"name": scored.output.name, **asdict(scored.output)},
                "units": scored.units,
                "measurement": scored.measurement,
            },
            test_ids=scored.test_ids,
            train_ids=scored.train_ids,
            matrix=scored.array if whole else None,
            columns={} if whole else scored.columns,
            query_error=scored.query_error,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read the store at ``path``; scores of a full matrix stay on disk.

        Raises:
            InvalidInputError: There is no store, or one that was never finished or is damaged.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            what = "is no store of scores" if folder.exists() else "does not exist"
            raise InvalidInputError(f"{folder} {what}: expected a folder that influence run has written.")
        if not (folder / IDENTIFIERS).is_file():
            raise InvalidInputError(
                f"The scores in {folder} are not finished: call attribute again with the same store, or "
                "influence run with --resume."
            )
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            ids = _arrays(folder / IDENTIFIERS)
            whole = (folder / SCORES).is_dir()
            solves, failures = _solves(folder / SOLVES)
            return cls(
                manifest=manifest,
                test_ids=ids["test"],
                train_ids=ids["train"],
                matrix=Store.written(folder, resolve_output(manifest["output"])).scores if whole else None,
                columns={} if whole else _arrays(folder / f"{TABLE}.npz"),
                solves=solves,
                failures=failures,
                query_error=_arrays(folder / STATE)["query_error"] if "query_rank" in manifest else None,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{folder} is damaged: {error}.") from error

    @property
    def output(self) -> str:
        """Name of the output."""
        return str(self.manifest["output"]["name"])

    def row(self, test: int | None) -> tuple[Array, Array]:
        """Scores that were kept, and the positions of their training points.

        Args:
            test: Position of the test point, of the outputs ``"matrix"`` and ``"top_k"``; else ``None``.
        """
        if self.matrix is not None:
            scores = np.asarray(self.matrix[test])
            return scores, np.arange(len(scores))
        columns = self.columns
        if test is None:
            return columns["score"], np.arange(len(columns["score"]))
        # Each test point has as many rows on either side; identifiers need not be unique.
        count = len(self.test_ids)
        sides = columns["score"].reshape(2, count, -1), columns["position"].reshape(2, count, -1)
        scores, positions = (side[:, test].reshape(-1) for side in sides)
        positions, first = np.unique(positions, return_index=True)
        return scores[first], positions

    @property
    def quantity(self) -> str:
        """What the scores are of: the loss, or what was measured in its place, by its name where it has one."""
        found = self.manifest.get("measurement")
        if found is None:
            return "loss"
        name = str(found["name"]).rpartition(".")[2]
        return name if name.isidentifier() else "measurement"

    @property
    def of_loss(self) -> bool:
        """Whether nothing was measured in place of the loss."""
        return self.manifest.get("measurement") is None

    def how_to_read(self) -> tuple[str, str]:
        """What the sign of a score says, and its units."""
        count = len(self.train_ids)
        units = f"removing a point from {count} changes the {self.quantity} by about +score/{count}."
        if normalize := self.manifest["output"].get("normalize"):
            units = f"scores are divided by a size of each point's own ({normalize})."
        if self.query_error is not None:
            units += (
                f" Compression lost up to {np.max(self.query_error, initial=0):.1%} of a test point's factor."
            )
        sign = "Positive: the point helps, for up-weighting it lowers that loss; negative: it harms."
        if not self.of_loss:
            sign = f"Positive: up-weighting the point lowers that {self.quantity}; negative: it raises it."
        return sign, f"Units: {units}"


def extremes(scores: Array, positions: Array, count: int) -> tuple[list[int], list[int]]:
    """Where the largest positive and the smallest negative scores stand, at most ``count`` of each.

    Of equal scores the one of the earlier point counts as the more extreme; what is not finite is neither.
    """
    order = np.lexsort((positions, -scores))
    helpful = order[(scores[order] > 0) & np.isfinite(scores[order])][:count]
    order = np.lexsort((positions, scores))
    harmful = order[(scores[order] < 0) & np.isfinite(scores[order])][:count]
    return helpful.tolist(), harmful.tolist()


def _solves(path: Path) -> tuple[tuple[BlockTotals, ...], tuple[str, ...]]:
    """Of all runs that wrote to the store together; stores of earlier versions tell none."""
    totals: dict[tuple[str, float], BlockTotals] = {}
    failures = []
    for run in json.loads(path.read_text()) if path.exists() else ():
        for block in run["blocks"]:
            curvature = block["curvature"] and tuple(block["curvature"])
            one = BlockTotals(**{**block, "curvature": curvature})
            key = (one.block, one.regularization)
            totals[key] = totals[key] + one if key in totals else one
        if run["failures"]:
            failures.append(run["failures"])
    return tuple(totals.values()), tuple(failures)


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}
