"""``influence top``: the most influential points of a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from influence_framework.attribution.outputs import Array
from influence_framework.attribution.reading import Stored
from influence_framework.errors import InvalidInputError

LISTED = 8
"""Identifiers that a message lists."""


def top(path: Path, test: str | None, count: int) -> str:
    """The training points with the largest and the smallest scores, as tables.

    Args:
        path: Of the store.
        test: Identifier of the test point, where the store holds scores of single ones.
        count: How many of each.

    Raises:
        InvalidInputError: No finished store, or no such test point.
    """
    stored = Stored.read(path)
    single = stored.manifest["output"]["name"] in ("matrix", "top_k")
    if not single and stored.manifest["output"]["name"] not in ("mean", "self_influence"):
        raise InvalidInputError(f"{path} holds {stored.manifest['output']['name']}, and no scores.")
    if not single and test is not None:
        raise InvalidInputError(
            f"{path} holds the output {stored.manifest['output']['name']!r}, one score for each training "
            "point: leave --test out."
        )
    number = _number(stored.test_ids, test) if single else None
    scores, positions = _scores(stored, number)
    order = np.lexsort((positions, -scores)).tolist()
    helpful = [i for i in order if scores[i] > 0][:count]
    harmful = [i for i in order[::-1] if scores[i] < 0][:count]
    what = _what(stored.manifest, None if number is None else stored.test_ids[number])
    lines = [what, *_reading(stored.manifest, len(stored.train_ids)), ""]
    for title, chosen in (("Most helpful", helpful), ("Most harmful", harmful)):
        lines += [f"{title}:", *_table(chosen, scores, positions, stored.train_ids), ""]
    return "\n".join(lines[:-1])


def _number(ids: Array, test: str | None) -> int:
    some = ", ".join(map(str, ids[:LISTED])) + (", …" if len(ids) > LISTED else "")
    if test is None:
        if len(ids) == 1:
            return 0
        raise InvalidInputError(f"Which of {len(ids)} test points? Name one by --test: {some}.")
    (found,) = np.nonzero(np.asarray(list(map(str, ids))) == test)
    if not len(found):
        raise InvalidInputError(f"There is no test point {test!r}: their identifiers are {some}.")
    return int(found[0])


def _scores(stored: Stored, test: int | None) -> tuple[Array, Array]:
    """Scores that were kept, and the positions of their training points."""
    if stored.matrix is not None:
        scores = np.asarray(stored.matrix[test])
        return scores, np.arange(len(scores))
    columns = stored.columns
    if test is None:
        return columns["score"], np.arange(len(columns["score"]))
    # Each test point has as many rows on either side; identifiers need not be unique.
    count = len(stored.test_ids)
    sides = columns["score"].reshape(2, count, -1), columns["position"].reshape(2, count, -1)
    scores, positions = (side[:, test].reshape(-1) for side in sides)
    positions, first = np.unique(positions, return_index=True)
    return scores[first], positions


def _what(manifest: Mapping[str, Any], test: object) -> str:
    output = manifest["output"]
    of = {
        "mean": "the mean loss of all test points",
        "self_influence": "each training point's own loss",
    }.get(output["name"], f"the loss of test point {test}")
    solver, source = (manifest[key].partition("(")[0] for key in ("solver", "source"))
    return f"Influence of training points on {of} ({solver}, {source})."


def _reading(manifest: Mapping[str, Any], count: int) -> list[str]:
    lines = [
        "Positive: the point helps, for up-weighting it lowers that loss; negative: it harms.",
        f"Units: removing a point from {count} changes the loss by about +score/{count}.",
    ]
    if manifest["output"].get("normalize"):
        lines[1] = (
            f"Units: scores are divided by a size of each point's own ({manifest['output']['normalize']})."
        )
    return lines


def _table(chosen: list[int], scores: Array, positions: Array, ids: Array) -> list[str]:
    if not chosen:
        return ["  none"]
    rows = [("rank", "identifier", "position", "score")]
    rows += [
        (str(rank), str(ids[positions[i]]), str(positions[i]), f"{scores[i]:+.4g}")
        for rank, i in enumerate(chosen, start=1)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
