"""Losses of token sequences: cross-entropy at every token that has a label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.objective import logits_of
from influence_framework.objectives.fields import IGNORED, FieldObjective, check_labels, fields, labels_of


@dataclass(frozen=True)
class TokenObjective(FieldObjective):
    """What losses of token sequences share.

    With the logits ``z`` of a sequence, its ``T_i`` counted tokens ``t`` and their labels ``y``::

        ℓ_i = 1/T_i Σ_t (logsumexp z_t - z_t[y_t])        reduction "mean"
        ℓ_i =       Σ_t (logsumexp z_t - z_t[y_t])        reduction "sum"

    The training loss is ``1/N Σ_i ℓ_i`` with ``N`` the number of *sequences*. Under ``"mean"`` every sequence
    weighs the same, however long; under ``"sum"`` every token does, and ``ℓ_i`` is the negative logarithm of
    the probability of the sequence. The mean over all tokens of a batch, which ``transformers`` trains with,
    is neither: a sequence would weigh differently in other company. That over all tokens of the data is
    ``"sum"`` times ``N / Σ_i T_i``: curvature, λ and scores scale with it.

    A token counts if its label is not -100 and no mask says that it is padding. Losses are computed in single
    precision at least.

    Attributes:
        reduction: ``"mean"`` or ``"sum"`` of a sequence's tokens.
    """

    reduction: Literal["mean", "sum"] = "mean"

    convex: ClassVar[bool] = True
    name: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("mean", "sum"):
            raise InvalidInputError(f"reduction is 'mean' or 'sum', got {self.reduction!r}.")

    def targets(self, batch: Batch) -> Int[Tensor, "n t"]:
        """The label of every output position, -100 where it does not count."""
        return labels_of(batch, self.name)

    def sample_losses(self, outputs: Float[Tensor, "n t v"], batch: Batch) -> Float[Tensor, " n"]:
        return _by_position(self, outputs, batch).sum(1)

    def mean_loss(self, outputs: Float[Tensor, "n t v"], batch: Batch) -> Float[Tensor, ""]:
        return self.sample_losses(outputs, batch).mean()

    def token_losses(self, outputs: Float[Tensor, "n t v"], batch: Batch) -> Float[Tensor, "n t"]:
        """What every label adds to its sequence's loss: rows sum to ``ℓ_i``; zero for what does not count."""
        return _by_position(self, outputs, batch)

    def softmax_weights(
        self, outputs: Float[Tensor, "n t v"], batch: Batch
    ) -> tuple[int, Float[Tensor, "n t 1"]]:
        """Classes are the last dimension; a label weighs one, or one over those of its sequence."""
        counted = (self.targets(batch) != IGNORED).to(torch.promote_types(outputs.dtype, torch.float32))
        if self.reduction == "mean":
            counted = counted / counted.sum(1, keepdim=True)
        return 2, counted[..., None]

    def validate(self, outputs: Tensor, batch: Batch) -> Self:
        targets = self.targets(batch)
        if outputs.ndim != 3 or outputs.shape[:2] != targets.shape:
            raise InvalidInputError(
                f"{self.name} expects logits (n, T, vocabulary) at its labels, {tuple(targets.shape)}; "
                f"the model returned {tuple(outputs.shape)}."
            )
        check_labels(targets, outputs.shape[2], "tokens")
        without = (~(targets != IGNORED).any(1)).nonzero().flatten().tolist()
        if without:
            raise InvalidInputError(
                f"Rows {without[:8]} have no token that counts: all labels are {IGNORED} or padding, or a "
                "sequence is too short to predict any. Leave them out."
            )
        return self


@dataclass(frozen=True)
class CausalLM(TokenObjective):
    """Cross-entropy of every token given those before it, averaged over each sequence's own tokens.

    Batches hold ``input_ids`` ``(n, T)``, an ``attention_mask`` where there is padding, and whatever else the
    model takes. ``labels`` are the ids where left out; a label of -100 leaves its token out, so that a prompt
    with these labels gives the loss of its completion. Labels stand at their tokens: the logits at one token
    are compared with the label of the next, and neither of the two may be padding. See
    :class:`TokenObjective` for the normalisation.
    """

    name: ClassVar[str] = "causal_lm"

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Float[Tensor, "n t v"]:
        """Logits at all tokens but the last, which predicts nothing."""
        return super().outputs(model, batch)[:, :-1]

    def targets(self, batch: Batch) -> Int[Tensor, "n t"]:
        values = fields(batch)
        labels = labels_of(batch, self.name) if "labels" in values else self._ids(batch)
        mask = values.get("attention_mask")
        targets = labels[:, 1:]
        if not isinstance(mask, Tensor):
            return targets
        both = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        return torch.where(both, targets, IGNORED)

    def _ids(self, batch: Batch) -> Tensor:
        ids = fields(batch).get("input_ids")
        if not isinstance(ids, Tensor):
            raise InvalidInputError(
                f"causal_lm needs 'input_ids', or 'labels' beside embeddings; found {list(fields(batch))}."
            )
        return ids.long()

    def token_losses(self, outputs: Float[Tensor, "n t v"], batch: Batch) -> Float[Tensor, "n u"]:
        """At every token of the sequence; the first one is never predicted, and has none."""
        return nn.functional.pad(_by_position(self, outputs, batch), (1, 0))


@dataclass(frozen=True)
class MaskedLM(TokenObjective):
    """Cross-entropy at the tokens that were masked, those whose label is not -100.

    Batches hold ``input_ids`` ``(n, T)`` with the masks in them, ``labels`` ``(n, T)`` and an
    ``attention_mask`` where there is padding; the logits at a token are compared with its own label. See
    :class:`TokenObjective` for the normalisation.
    """

    name: ClassVar[str] = "masked_lm"

    def targets(self, batch: Batch) -> Int[Tensor, "n t"]:
        labels, mask = labels_of(batch, self.name), fields(batch).get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != labels.shape:
            return labels
        return torch.where(mask != 0, labels, IGNORED)


@dataclass(frozen=True)
class Seq2SeqLM(TokenObjective):
    """Cross-entropy of every token of the target sequence, for models with an encoder and a decoder.

    Batches hold ``input_ids``, an ``attention_mask`` and ``labels`` with -100 at their padding. Without
    ``decoder_input_ids`` the model is given the labels too, from which it makes its own. See
    :class:`TokenObjective` for the normalisation.
    """

    name: ClassVar[str] = "seq2seq_lm"

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Float[Tensor, "n t v"]:
        values = dict(fields(batch))
        if "decoder_input_ids" in values:
            return super().outputs(model, batch)
        return logits_of(model(**values))

    def present(self, batch: Batch) -> Sequence[Bool[Tensor, "n _t"]]:
        decoder = fields(batch).get("decoder_attention_mask")
        known = decoder != 0 if isinstance(decoder, Tensor) else self.targets(batch) != IGNORED
        return [*super().present(batch), known]


def _by_position(objective: TokenObjective, outputs: Tensor, batch: Batch) -> Float[Tensor, "n t"]:
    targets = objective.targets(batch)
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    losses: Tensor = nn.functional.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).unflatten(0, targets.shape)
    if objective.reduction == "sum":
        return losses
    return losses / (targets != IGNORED).sum(1, keepdim=True)
