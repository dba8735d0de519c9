"""A folder that a run writes into, and can go on with after it was killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from influence_framework.attribution.blocks import Identifiers
from influence_framework.attribution.outputs import (
    Array,
    Collector,
    Factors,
    FactorsCollector,
    MatrixCollector,
    Output,
)
from influence_framework.data import Fingerprint
from influence_framework.errors import InvalidInputError
from influence_framework.solving import SolveLog
from influence_framework.versions import versions

FORMAT = 1
MANIFEST, STATE, SCORES, TABLE, IDENTIFIERS = "manifest.json", "state.npz", "scores.zarr", "table", "ids.npz"
SOLVES = "solves.json"
SAVE_EVERY = 1.0
"""Seconds between two saves of the state: what is recomputed at most after a run was killed."""


class Store:
    """Scores on disk, block by block, with all that tells what they are.

    The folder holds ``manifest.json`` (composition, fingerprints, versions, shapes, units), ``ids.npz``, the
    array ``scores.zarr`` of a full matrix or of factors, ``state.npz`` with the blocks that are done and what
    an output keeps between them, ``solves.json`` with what came of the solves of every run so far, and at the
    end, for other outputs than these, ``table.npz`` and, where pyarrow is installed, ``table.parquet``.

    Args:
        path: The folder; made where it does not exist.
        manifest: What the scores are of. Where the folder has one already, all but the versions must agree.

    Raises:
        InvalidInputError: The folder holds something else, or scores of something else.
        ModuleNotFoundError: zarr is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = json.loads(json.dumps(manifest))
        self.done: set[tuple[int, int]] = set()
        self._beside: Mapping[str, Array] = {}
        self._saved = 0.0
        self._solves: list[Any] = []
        if (self.path / MANIFEST).exists():
            self._check()
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InvalidInputError(
                f"{self.path} exists and is no store of scores (it has no {MANIFEST}): choose another path."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(MANIFEST, json.dumps(self.manifest | {"versions": versions("zarr")}, indent=2).encode())

    def _check(self) -> None:
        try:
            found = json.loads((self.path / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{self.path / MANIFEST} cannot be read: {error}.") from error
        found.pop("versions", None)
        differences = [
            f"{key}: {found.get(key)!r} there, {self.manifest.get(key)!r} here"
            for key in dict.fromkeys([*self.manifest, *found])
            if not _agree(key, found.get(key), self.manifest.get(key))
        ]
        if differences:
            raise InvalidInputError(
                f"{self.path} holds scores of something else: {'; '.join(differences)}. Choose another path."
            )

    def matrix(
        self, output: Output, shape: tuple[int, int], chunks: tuple[int, int], dtype: np.dtype[Any]
    ) -> MatrixCollector:
        """The array of a full matrix or of factors, made where it does not exist."""
        zarr = _zarr()
        location = self.path / SCORES
        if location.exists() and (self.path / STATE).exists():
            # zarr writes a chunk under another name first: what a run that was killed left of one.
            for unfinished in location.rglob("*.partial"):
                unfinished.unlink()
            array = zarr.open_array(location, mode="r+")
        else:
            factors = isinstance(output, Factors)
            array = zarr.create_array(
                location,
                shape=shape[::-1] if factors else shape,
                chunks=chunks[::-1] if factors else chunks,
                dtype=dtype,
                dimension_names=("point", "parameter") if factors else ("test", "train"),
                attributes=self.manifest,
                overwrite=True,
            )
        return FactorsCollector(array) if isinstance(output, Factors) else MatrixCollector(array)

    @staticmethod
    def written(path: Path, output: Output) -> MatrixCollector:
        """The array of a full matrix or of factors that was written to ``path``, to be read."""
        array = _zarr().open_array(path / SCORES, mode="r")
        return FactorsCollector(array) if isinstance(output, Factors) else MatrixCollector(array)

    def resume(self, collector: Collector, beside: Mapping[str, Array]) -> None:
        """Go on from where the last run was saved, with arrays that are kept ``beside`` what is collected."""
        self._beside = beside
        location = self.path / STATE
        if not location.exists():
            return
        with np.load(location, allow_pickle=False) as saved:
            state = {name: saved[name] for name in saved.files}
        self.done = {(int(row), int(column)) for row, column in state.pop("done")}
        for name, array in beside.items():
            array[...] = state.pop(name)
        collector.restore(state)
        if (self.path / SOLVES).exists():
            self._solves = json.loads((self.path / SOLVES).read_text())

    def finished(self, rows: slice, columns: slice, collector: Collector, log: SolveLog) -> None:
        """Note that a block has been collected; saved from time to time."""
        self.done.add((rows.start, columns.start))
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save(collector, log)

    def save(self, collector: Collector, log: SolveLog) -> None:
        """Save what is done and what was collected, at once or not at all."""
        report = log.report()
        if len(report):
            totals = [asdict(block.totals()) for block in report.blocks]
            here = {"blocks": totals, "failures": report.failures(quiet=True)}
            self._write(SOLVES, json.dumps([*self._solves, here]).encode())
        done = np.array(sorted(self.done), dtype=np.int64).reshape(-1, 2)
        self._write_arrays(STATE, {"done": done, **self._beside, **collector.state()})
        self._saved = time.monotonic()

    def conclude(self, collector: Collector, test: Identifiers, train: Identifiers, log: SolveLog) -> None:
        """Write identifiers and, where the result is no matrix, the table."""
        self.save(collector, log)
        self._write_arrays(IDENTIFIERS, {"test": test, "train": train})
        if isinstance(collector, MatrixCollector):
            return
        columns = collector.columns(test, train)
        self._write_arrays(f"{TABLE}.npz", columns)
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError:
            return
        temporary = self.path / f"{TABLE}.parquet.new"
        parquet.write_table(pyarrow.table(dict(columns)), temporary)
        temporary.replace(self.path / f"{TABLE}.parquet")

    def _write_arrays(self, name: str, arrays: Mapping[str, Array]) -> None:
        temporary = self.path / f"{name}.new"
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(self.path / name)

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.path / f"{name}.new"
        temporary.write_bytes(content)
        temporary.replace(self.path / name)


def _agree(key: str, there: Any, here: Any) -> bool:
    if None in (there, here) or key not in ("fitted to", "measurement"):
        return bool(there == here)
    if key == "measurement":
        # The machine that goes on may round otherwise than the one that began.
        same = isclose(there["value"], here["value"], rel_tol=1e-3, abs_tol=1e-12)
        return bool(there["name"] == here["name"]) and same
    # Sums over the same data in another order, or in other batches, are rounded otherwise.
    return Fingerprint.of_json(there).agrees(Fingerprint.of_json(here))


def _zarr() -> Any:
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A store needs zarr: pip install 'influence-framework[store]'", name="zarr"
        ) from error
    return zarr
