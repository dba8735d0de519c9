"""The loss of one label for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.objectives.fields import IGNORED, FieldObjective, check_labels, labels_of


@dataclass(frozen=True)
class SequenceClassification(FieldObjective):
    """Cross-entropy of one label for each sample: ``ℓ_i = logsumexp z_i - z_i[y_i]``, ``N`` samples.

    Batches hold what the model takes (``input_ids`` and an ``attention_mask``, ``pixel_values``) and
    ``labels`` ``(n,)``; the model returns logits ``(n, classes)``.
    """

    convex: ClassVar[bool] = True
    name: ClassVar[str] = "sequence_classification"

    def sample_losses(self, outputs: Float[Tensor, "n c"], batch: Batch) -> Float[Tensor, " n"]:
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return nn.functional.cross_entropy(wide, labels_of(batch, self.name), reduction="none")

    def mean_loss(self, outputs: Float[Tensor, "n c"], batch: Batch) -> Float[Tensor, ""]:
        return self.sample_losses(outputs, batch).mean()

    def validate(self, outputs: Tensor, batch: Batch) -> Self:
        labels = labels_of(batch, self.name)
        if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
            raise InvalidInputError(
                f"{self.name} expects logits (n, classes) and labels (n,), got {tuple(outputs.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if (labels == IGNORED).any():
            raise InvalidInputError(f"A sample has the label {IGNORED}, which stands for none: leave it out.")
        check_labels(labels, outputs.shape[1], "classes")
        return self
