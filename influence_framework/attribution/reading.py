"""Scores that were written to a store."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from influence_framework.attribution.blocks import Identifiers
from influence_framework.attribution.outputs import Array, resolve_output
from influence_framework.attribution.store import IDENTIFIERS, MANIFEST, SCORES, TABLE, Store
from influence_framework.errors import InvalidInputError


@dataclass(frozen=True)
class Stored:
    """What is in a store.

    Attributes:
        manifest: What the scores are of: composition, fingerprints, versions, shapes, units.
        test_ids: Identifiers of the test points; empty where there are none.
        train_ids: Of the training points.
        matrix: The array on disk, of the output ``"matrix"``; else ``None``.
        columns: The table, of the other outputs; else empty.
    """

    manifest: Mapping[str, Any]
    test_ids: Identifiers
    train_ids: Identifiers
    matrix: Any
    columns: Mapping[str, Array]

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
            return cls(
                manifest=manifest,
                test_ids=ids["test"],
                train_ids=ids["train"],
                matrix=Store.written(folder, resolve_output(manifest["output"])).scores if whole else None,
                columns={} if whole else _arrays(folder / f"{TABLE}.npz"),
            )
        except (OSError, ValueError, KeyError) as error:
            raise InvalidInputError(f"{folder} is damaged: {error}.") from error


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}
