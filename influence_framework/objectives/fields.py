"""Batches as mappings from field to tensor, as ``transformers`` has them, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.objective import logits_of

IGNORED = -100
"""The label of what has no target, as in ``torch.nn.CrossEntropyLoss``."""

IDS = ("input_ids", "decoder_input_ids")
"""Fields that hold token ids."""


@dataclass(frozen=True)
class FieldObjective:
    """Batches that are mappings, passed to the model as keyword arguments but for ``labels``.

    A batch may also be a pair ``(fields, labels)``. Outputs are the model's, or the ``logits`` of what it
    returns.

    Attributes:
        vocabulary: Token ids that the model knows; left out, what its input embedding has.
        pad_token_id: Padding, where a batch has no mask that tells; left out, that of the model's ``config``.
    """

    vocabulary: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("vocabulary", 1), ("pad_token_id", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InvalidInputError(f"{name} is a whole number, at least {least}; got {value!r}.")

    def prepared(self, model: nn.Module) -> Self:
        """With what ``model`` knows of its vocabulary and padding, where that was left open."""
        vocabulary, padding = self.vocabulary, self.pad_token_id
        if vocabulary is None:
            vocabulary = _embedded(model)
        if padding is None:
            found = getattr(getattr(model, "config", None), "pad_token_id", None)
            padding = found if isinstance(found, int) and found >= 0 else None
        return replace(self, vocabulary=vocabulary, pad_token_id=padding)

    def points(self, x: Any, y: Any) -> Batch:
        """Points as a batch: ``x`` the fields, ``y`` the labels where they are not among them."""
        return x if y is None else (x, y)

    def size(self, batch: Batch) -> int:
        values = fields(batch)
        for name, value in values.items():
            if isinstance(value, list | tuple):
                raise InvalidInputError(
                    f"{name!r} is a {type(value).__name__} of {len(value)}, not one tensor: pad sequences of "
                    "unequal length to (n, T) and pass an attention_mask that is 0 at the padding."
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in values.items() if isinstance(tensor, Tensor)}
        sizes = {shape[:1] for shape in shapes.values()}
        if not sizes or () in sizes or len(sizes) != 1:
            raise InvalidInputError(
                "All tensors of a batch must hold the same number of samples in their first dimension, found "
                f"{shapes}."
            )
        return int(sizes.pop()[0])

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        inputs = {name: value for name, value in fields(batch).items() if name != "labels"}
        return logits_of(model(**inputs))

    def check(self, batch: Batch) -> None:
        """Raise :class:`InvalidInputError` for what the model must not be given."""
        values = fields(batch)
        for name in IDS:
            if isinstance(ids := values.get(name), Tensor):
                self._check_ids(name, ids, values.get(name.replace("input_ids", "attention_mask")))
        for name, mask in values.items():
            if name.endswith("attention_mask") and isinstance(mask, Tensor):
                _check_mask(name, mask)

    def present(self, batch: Batch) -> Sequence[Bool[Tensor, "n _t"]]:
        """For each kind of sequence in the batch, which of its tokens are no padding."""
        mask = fields(batch).get("attention_mask")
        return [mask != 0] if isinstance(mask, Tensor) and mask.ndim == 2 else []

    def _check_ids(self, name: str, ids: Tensor, mask: Tensor | None) -> None:
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InvalidInputError(f"{name} are token ids (n, T), got {ids.dtype} {tuple(ids.shape)}.")
        if mask is not None and mask.shape[:2] != ids.shape:
            raise InvalidInputError(
                f"The mask of {name} is {tuple(mask.shape)}, the ids are {tuple(ids.shape)}: one entry a token."
            )
        low, high = (int(extreme) for extreme in torch.aminmax(ids))
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            raise InvalidInputError(
                f"{name} holds the ids {low} to {high}, the model's embedding has {self.vocabulary} rows: the "
                "tokenizer is another model's, or has tokens that were added without "
                "model.resize_token_embeddings(len(tokenizer))."
            )
        if mask is None and self.pad_token_id is not None and name == "input_ids":
            self._check_unpadded(name, ids)

    def _check_unpadded(self, name: str, ids: Tensor) -> None:
        padding = torch.eq(ids, self.pad_token_id or 0)
        # Tokens from an edge of the row to the first that is none.
        ends = padding.flip(1).long().cumprod(1).sum(1) + padding.long().cumprod(1).sum(1)
        if len(ends.unique()) > 1:
            raise InvalidInputError(
                f"The rows of {name} begin or end with different numbers of the padding token "
                f"{self.pad_token_id} and the batch has no attention_mask: sequences of unequal length need "
                "one. Pass it as the tokenizer returns it, or all ones where these tokens are real."
            )


def fields(batch: Batch) -> Mapping[str, Any]:
    """The fields of a batch, labels included."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Mapping):
        x: Mapping[str, Any] = batch[0]
        y = batch[1]
        if y is None:
            return x
        if "labels" in x:
            raise InvalidInputError("There are labels in the fields and labels beside them: pass them once.")
        return {**x, "labels": y}
    raise InvalidInputError(
        "Expected a batch that is a mapping such as {'input_ids': ..., 'attention_mask': ..., 'labels': ...}, "
        f"or a pair of one and its labels; got {type(batch).__name__}. For (x, y) use the objective "
        "'supervised'."
    )


def labels_of(batch: Batch, objective: str) -> Tensor:
    """The labels; an error where there are none, or not of whole numbers."""
    labels = fields(batch).get("labels")
    if isinstance(labels, Mapping):
        raise InvalidInputError(
            f"{objective} takes labels as a tensor, got {type(labels).__name__}. Where points are mappings, "
            "those of the training side go by name, as one batch: influences(test, x=train)."
        )
    if not isinstance(labels, Tensor):
        raise InvalidInputError(f"{objective} needs 'labels' in every batch, found {list(fields(batch))}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InvalidInputError(f"Labels are whole numbers, got {labels.dtype}.")
    return labels.long()


def check_labels(labels: Tensor, classes: int, what: str) -> None:
    """Raise unless every label is :data:`IGNORED` or one of the ``classes``."""
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise InvalidInputError(
            f"The label {int(labels[wrong][0])} is outside the {classes} {what} that the model's output has; "
            f"labels are 0 to {classes - 1}, or {IGNORED} for none."
        )


def _check_mask(name: str, mask: Tensor) -> None:
    rows = mask.reshape(len(mask), -1)
    empty = (~(rows != 0).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InvalidInputError(
            f"Rows {empty[:8]} of {name} are all zero: these sequences are nothing but padding. Leave them out."
        )


def _embedded(model: nn.Module) -> int | None:
    """Rows of the input embedding, where the model tells."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embedding, "num_embeddings", None)
    return rows if isinstance(rows, int) else None
