"""What the tokens of a sequence add to its score, as colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from influence_framework.attribution.outputs import Array
from influence_framework.attribution.reading import Stored
from influence_framework.errors import InvalidInputError

TokenScores = Tensor | Array | Callable[[int, list[int]], Any]
"""Of pairs ``(n_test, n_train, T)``; or a function of a test point and ``k`` training points, ``(k, T)``."""

LEVELS = 9


def levels(
    name: str,
    scores: TokenScores,
    test: int,
    positions: list[int],
    tokens: Sequence[Sequence[str]],
    stored: Stored,
) -> list[str]:
    """A character for each token: ``0``, ``1`` to ``9`` above zero, ``a`` to ``i`` below.

    The largest magnitude beside the test point is 9.

    Args:
        name: Of the argument that the scores are, for messages.
        scores: Of tokens.
        test: Position of the test point.
        positions: Of the training points.
        tokens: Of the sequence to be coloured for each of them: its own, or the test point's.
        stored: The scores of the sequences.

    Raises:
        InvalidInputError: Scores of another shape, fewer than there are tokens, or not finite.
    """
    if not positions:
        return []
    found = _rows(name, scores, test, positions, (len(stored.test_ids), len(stored.train_ids)))
    longest = max(map(len, tokens))
    if found.shape[1] < longest:
        raise InvalidInputError(
            f"{name} have {found.shape[1]} tokens, but a sequence shown has {longest}: pass the sequences that "
            "the scores are of."
        )
    parts = [row[: len(sequence)] for row, sequence in zip(found, tokens, strict=True)]
    largest = max((float(np.abs(part).max()) for part in parts if part.size), default=0.0)
    if not np.isfinite(largest):
        raise InvalidInputError(f"{name} of test point {test} are not finite.")
    return [
        "".join(map(_code, np.rint(LEVELS * part / (largest or 1.0)).astype(int).tolist())) for part in parts
    ]


def _rows(name: str, scores: TokenScores, test: int, positions: list[int], pairs: tuple[int, int]) -> Any:
    if isinstance(scores, Tensor | np.ndarray):
        if scores.ndim != 3 or tuple(scores.shape[:2]) != pairs:
            raise InvalidInputError(
                f"{name}: expected shape ({pairs[0]}, {pairs[1]}, T), got {tuple(scores.shape)}."
            )
        found = scores[test][positions]
    elif callable(scores):
        found = scores(test, positions)
    else:
        raise InvalidInputError(
            f"{name}: expected scores (n_test, n_train, T), or a function of the position of a test point and "
            f"those of training points, got {type(scores).__name__}."
        )
    rows = found.detach().cpu().double().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if rows.ndim != 2 or len(rows) != len(positions):
        raise InvalidInputError(
            f"{name} of test point {test}: expected shape ({len(positions)}, T), got {rows.shape}."
        )
    return rows


def _code(level: int) -> str:
    return chr(ord("0") + level) if level >= 0 else chr(ord("a") - 1 - level)
