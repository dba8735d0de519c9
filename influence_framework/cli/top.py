"""``influence top``: the most influential points of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from influence_framework.attribution.outputs import Array
from influence_framework.attribution.reading import SINGLE, Stored, extremes
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
    single = stored.output in SINGLE
    if stored.output == "factors":
        raise InvalidInputError(f"{path} holds factors, and no scores.")
    if not single and test is not None:
        raise InvalidInputError(
            f"{path} holds the output {stored.output!r}, one score for each training point: leave --test out."
        )
    number = _number(stored.test_ids, test) if single else None
    scores, positions = stored.row(number)
    helpful, harmful = extremes(scores, positions, count)
    what = _what(stored, None if number is None else stored.test_ids[number])
    lines = [what, *stored.how_to_read(), ""]
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


def _what(stored: Stored, test: object) -> str:
    manifest, quantity = stored.manifest, stored.quantity
    output = manifest["output"]
    of = {
        "mean": f"the mean {quantity} of all test points",
        "self_influence": "each training point's own loss",
    }.get(output["name"], f"the {quantity} of test point {test}")
    solver, source = (manifest[key].partition("(")[0] for key in ("solver", "source"))
    return f"Influence of training points on {of} ({solver}, {source})."


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
