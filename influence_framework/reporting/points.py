"""Test and training points as a page shows them: pictures, texts, sequences of tokens, or rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from influence_framework.attribution.blocks import Identifiers, blocks
from influence_framework.data import take
from influence_framework.errors import InvalidInputError, did_you_mean
from influence_framework.reporting.pictures import is_picture, picture

Kind = Literal["picture", "text", "tokens", "row", "none"]

TEXT = 2000
"""Characters of a text that are shown at most."""

TOKENS = 1000
"""Tokens of a sequence that are shown at most."""

COLUMNS = 60
"""Columns of a row that are shown at most."""

READ = 256
"""Samples of a loader read at a time."""

CUT = " …"


@dataclass(frozen=True, eq=False)
class Points:
    """Points to be shown, in the order of their scores.

    Attributes:
        data: A sequence with one entry for each point; a pandas data frame, a tensor or an array, whose first
            dimension counts points; or a loader of batches ``(x, y)`` or ``(x, y, identifiers)``, as scores are
            computed from. An entry is a picture (a PIL image, or a tensor or array ``(H, W)``, ``(C, H, W)`` or
            ``(H, W, C)``), a text, a row (a mapping from column to value, or numbers), or the tokens of a
            sequence (strings; or ids, with ``decode``). ``None`` shows identifiers alone.
        labels: A sequence that says what each point is, in a word or two. Left out with a loader, targets that
            are single numbers.
        marks: A sequence of what is to be noted about some points, such as a label known to be wrong; ``None``
            for others.
        kind: What the entries are: ``"picture"``, ``"text"``, ``"tokens"`` or ``"row"``. Left out, what the
            first one looks like.
        columns: Names of the columns of rows that have none.
        decode: The text of one token id, spaces and all; the texts of the tokens of a sequence are put together
            as they are.
        padding: The token id that is not shown, at the end of a sequence.
    """

    data: Any = None
    labels: Any = field(default=None, kw_only=True)
    marks: Any = field(default=None, kw_only=True)
    kind: Kind | None = field(default=None, kw_only=True)
    columns: Sequence[str] | None = field(default=None, kw_only=True)
    decode: Callable[[int], str] | None = field(default=None, kw_only=True)
    padding: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise InvalidInputError(
                f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, got {self.kind!r}."
                f"{did_you_mean(str(self.kind), get_args(Kind))}"
            )

    @classmethod
    def of(cls, data: Any) -> Points:
        """``data`` itself if it is of this class, else points with it."""
        return data if isinstance(data, cls) else cls(data)

    def shown(self, ids: Identifiers, wanted: Sequence[int], what: str) -> Shown:
        """The points at the positions ``wanted``.

        Args:
            ids: Identifiers of all points that there are scores of.
            wanted: Positions, in increasing order.
            what: What the points are, for messages.

        Raises:
            InvalidInputError: The points are not as many as the scores are of, or cannot be shown.
        """
        count = len(ids)
        for name in ("labels", "marks"):
            given = getattr(self, name)
            if given is not None and len(given) != count:
                raise InvalidInputError(f"The scores are of {count} {what}, but there are {len(given)} {name}.")
        labels = None if self.labels is None else [_word(self.labels[i]) for i in wanted]
        marks = None if self.marks is None else [_mark(self.marks[i]) for i in wanted]
        entries: Sequence[Any]
        if self.data is None:
            return Shown("none", (), [None] * len(wanted), labels, marks)
        if _is_loader(self.data):
            entries, targets = self._loaded(ids, wanted, what)
            labels = targets if labels is None else labels
        else:
            entries = _chosen(self.data, count, wanted, what)
        if not entries:
            return Shown("none", (), [], labels, marks)
        kind = self.kind or self._kind_of(entries[0], what)
        try:
            if kind == "row":
                columns, rows = self._rows(entries)
                return Shown(kind, columns, rows, labels, marks)
            return Shown(kind, (), [self._item(kind, entry) for entry in entries], labels, marks)
        except InvalidInputError as error:
            raise InvalidInputError(f"The {what} cannot be shown as {kind}s: {error}") from None

    def _loaded(self, ids: Identifiers, wanted: Sequence[int], what: str) -> tuple[list[Any], list[str] | None]:
        """Inputs of the samples that are wanted, and their targets where these are single numbers."""
        found: list[Any] = []
        targets: list[str] = []
        seen, kept = 0, set(wanted)
        for block in blocks(self.data, READ):
            if not np.array_equal(block.ids.astype(str), ids[seen : seen + len(block)].astype(str)):
                raise InvalidInputError(
                    f"The loader of the {what} does not yield the {len(ids)} points that the scores are of: it "
                    f"differs from position {seen} on. Pass the loader that they were computed from."
                )
            for batch in block.batches:
                for i in range(len(_inputs(batch))):
                    if seen in kept:
                        x, y = take((_inputs(batch), _targets(batch)), slice(i, i + 1))
                        found.append(x[0])
                        if y is not None and y.numel() == 1:
                            targets.append(_word(y.reshape(()).item()))
                    seen += 1
        if seen != len(ids):
            raise InvalidInputError(f"The scores are of {len(ids)} {what}, but the loader yields {seen}.")
        return found, targets if len(targets) == len(found) else None

    def _kind_of(self, entry: Any, what: str) -> Kind:
        if isinstance(entry, str):
            return "text"
        if isinstance(entry, Mapping) or hasattr(entry, "to_dict"):
            return "row"
        if self.decode is not None:
            return "tokens"
        if isinstance(entry, Sequence) and entry and all(isinstance(part, str) for part in entry):
            return "tokens"
        if is_picture(entry):
            return "picture"
        if isinstance(entry, Number) or (isinstance(entry, Tensor | np.ndarray) and entry.ndim < 2):
            return "row"
        if isinstance(entry, Sequence) and all(isinstance(part, Number | str | None) for part in entry):
            return "row"
        shape = f" of shape {tuple(entry.shape)}" if hasattr(entry, "shape") else ""
        raise InvalidInputError(
            f"The {what} hold a {type(entry).__name__}{shape}, which is no picture, text, row or sequence of "
            "tokens: pass one of these, or name it by kind=."
        )

    def _item(self, kind: Kind, entry: Any) -> Any:
        if kind == "picture":
            return picture(entry)
        if kind == "none":
            return None
        if kind == "text":
            text = str(entry)
            return text if len(text) <= TEXT else text[:TEXT] + CUT
        return self._tokens(entry)

    def _tokens(self, entry: Any) -> list[str]:
        parts = entry.tolist() if isinstance(entry, Tensor | np.ndarray) else list(entry)
        while self.padding is not None and parts and parts[-1] == self.padding:
            parts.pop()
        parts = parts[:TOKENS]
        if all(isinstance(part, str) for part in parts):
            return parts
        if self.decode is None:
            raise InvalidInputError(f"{type(entry).__name__} of token ids: pass decode=, the text of an id.")
        texts = [self.decode(part) for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidInputError("decode has to return the text of one token id as a string.")
        return texts

    def _rows(self, entries: Sequence[Any]) -> tuple[tuple[str, ...], list[list[str]]]:
        rows = [_cells(entry) for entry in entries]
        columns: tuple[str, ...] = tuple(dict.fromkeys(name for row in rows for name in row))
        if self.columns is not None:
            if len(self.columns) != len(columns):
                raise InvalidInputError(f"they have {len(columns)} columns, and {len(self.columns)} names.")
            names = tuple(map(str, self.columns))
        else:
            names = columns
        shown = columns[:COLUMNS]
        return names[:COLUMNS], [[_word(row.get(name, "")) for name in shown] for row in rows]


@dataclass(frozen=True)
class Shown:
    """Points as they are written into a page.

    Attributes:
        kind: What they are.
        columns: Names of columns, of rows.
        items: One for each point: a data URI, a text, texts of tokens, or texts of cells.
        labels: One for each, or ``None``.
        marks: One for each, or ``None``.
    """

    kind: Kind
    columns: tuple[str, ...]
    items: list[Any]
    labels: list[str] | None
    marks: list[str | None] | None

    def fields(self, place: int) -> Iterator[tuple[str, Any]]:
        """What is written of one of them."""
        if self.items[place] is not None:
            yield "item", self.items[place]
        if self.labels is not None:
            yield "label", self.labels[place]
        if self.marks is not None and self.marks[place] is not None:
            yield "mark", self.marks[place]


def _is_loader(data: Any) -> bool:
    """Whether ``data`` yields batches: a ``DataLoader``, or what has pairs or fields of tensors in it."""
    if isinstance(data, Tensor | np.ndarray | str) or hasattr(data, "iloc"):
        return False
    if not hasattr(data, "__getitem__"):
        return hasattr(data, "__iter__")
    if not isinstance(data, Sequence):
        return False
    first = data[0] if len(data) else None
    if isinstance(first, Mapping):
        return any(isinstance(value, Tensor) and value.ndim for value in first.values())
    if not isinstance(first, tuple | list) or len(first) not in (2, 3):
        return False
    inputs, targets = first[:2]
    if isinstance(inputs, Mapping):
        return True
    return isinstance(inputs, Tensor) and inputs.ndim > 0 and isinstance(targets, Tensor | None)


def _inputs(batch: Any) -> Tensor:
    """The inputs of a batch: of fields the token ids, or the first of them."""
    x = batch[0]
    if isinstance(x, Mapping):
        x = x.get("input_ids", next(iter(x.values())))
    while isinstance(x, tuple | list):
        x = x[0]
    if not isinstance(x, Tensor):
        raise InvalidInputError(f"The inputs of a batch are a {type(x).__name__}, not a tensor.")
    return x


def _targets(batch: Any) -> Tensor | None:
    y = batch[1]
    if y is None and isinstance(batch[0], Mapping):
        y = batch[0].get("labels")
    return y if isinstance(y, Tensor) else None


def _chosen(data: Any, count: int, wanted: Sequence[int], what: str) -> list[Any]:
    if not hasattr(data, "__len__") or isinstance(data, str | bytes | Mapping):
        raise InvalidInputError(
            f"Expected a sequence of {what}, a data frame, a tensor, an array or a loader, got "
            f"{type(data).__name__}."
        )
    if len(data) != count:
        raise InvalidInputError(f"The scores are of {count} {what}, but {len(data)} were given to be shown.")
    if hasattr(data, "iloc"):
        entries = [data.iloc[i] for i in wanted]
        return entries if data.ndim == 1 else [entry.to_dict() for entry in entries]
    return [data[i] for i in wanted]


def _cells(entry: Any) -> Mapping[str, Any]:
    if isinstance(entry, Mapping):
        return {str(name): value for name, value in entry.items()}
    if hasattr(entry, "to_dict"):
        return {str(name): value for name, value in entry.to_dict().items()}
    if isinstance(entry, Tensor | np.ndarray):
        entry = entry.reshape(-1).tolist()
    values = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
    return {str(i): value for i, value in enumerate(values)}


def _mark(value: Any) -> str | None:
    return None if value is None else _word(value)


def _word(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, Tensor | np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    text = str(value)
    return text if len(text) <= 200 else text[:200] + CUT
