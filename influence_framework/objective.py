"""How a batch becomes an output and a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from influence_framework.data import Batch, in_one_batch, leaves
from influence_framework.errors import InvalidInputError
from influence_framework.memory import is_out_of_memory

Loss = Callable[[Any, Any], Tensor]
ELEMENTWISE_LOSSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


@runtime_checkable
class Objective(Protocol):
    """How a batch of ``n`` samples becomes outputs and losses.

    The training loss is ``1/N Σ_i ℓ_i`` over all samples; ``mean_loss`` is that mean over one batch and
    must equal the mean of ``sample_losses``.

    Optional attribute: ``convex``, ``True`` where each ``ℓ_i`` is a convex function of the outputs wherever
    they are, which makes the Gauss-Newton matrix positive semidefinite. Left out, the loss is recognised by
    its second derivatives where that is possible.

    What else an objective may offer is in the protocols after this one, each looked for by its method:
    :class:`Preparing`, :class:`Checking`, :class:`Pointing`, :class:`Masking` and :class:`TokenLosses`.
    """

    def size(self, batch: Batch) -> int:
        """``n``, the number of samples."""
        ...

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The model's output for the batch, ``(n, …)``."""
        ...

    def mean_loss(self, outputs: Tensor, batch: Batch) -> Float[Tensor, ""]:
        """``1/n Σ_i ℓ_i``."""
        ...

    def sample_losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " n"]:
        """Each sample's own loss ``ℓ_i``."""
        ...

    def validate(self, outputs: Tensor, batch: Batch) -> Self:
        """Check one batch, raise on what cannot be right, and return the objective to go on with."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """An objective that wants to know something of the model."""

    def prepared(self, model: nn.Module) -> Any:
        """The objective to go on with; ``model`` is not changed."""
        ...


@runtime_checkable
class Checking(Protocol):
    """An objective that looks at batches before the model does."""

    def check(self, batch: Batch) -> None:
        """Raise :class:`InvalidInputError` for what the model must not be given."""
        ...


@runtime_checkable
class SoftmaxLosses(Protocol):
    """An objective that knows its losses as cross-entropies of a softmax, which then need not be found out.

    It is believed where one sample of a batch bears it out. A subclass with ``sample_losses`` of its own is
    not, unless it says its own weights.
    """

    def softmax_weights(self, outputs: Tensor, batch: Batch) -> tuple[int, Tensor]:
        """The class dimension of the logits, and what each cross-entropy counts.

        The weights have the shape of ``outputs`` with one class, and are zero where there is no label.
        """
        ...


@runtime_checkable
class Pointing(Protocol):
    """An objective whose points need not be pairs ``(x, y)``."""

    def points(self, x: Any, y: Any) -> Batch:
        """The batch that ``x`` and ``y`` stand for where points are given so; ``y`` may be ``None``."""
        ...


@runtime_checkable
class Masking(Protocol):
    """An objective that knows which positions of a sample are padding.

    Kronecker factors leave those out of the inputs of every layer with as many positions, provided that no
    gradient comes from them.
    """

    def present(self, batch: Batch) -> Sequence[Bool[Tensor, "n _t"]]:
        """For each kind of sequence in the batch, which of its positions are no padding."""
        ...


@runtime_checkable
class TokenLosses(Protocol):
    """An objective whose losses are sums over the positions of a sample."""

    def token_losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, "n t"]:
        """What every position adds: rows sum to the samples' losses."""
        ...


def logits_of(returned: Any) -> Tensor:
    """The tensor that a model returned, by itself or as the ``logits`` of something larger."""
    outputs = returned if isinstance(returned, Tensor) else getattr(returned, "logits", None)
    if not isinstance(outputs, Tensor):
        raise InvalidInputError(
            f"The model returned {type(returned).__name__}; a single tensor (n, …) was expected, or an object "
            "with one as its 'logits'. Wrap the model, or pass an Objective whose `outputs` picks the tensor."
        )
    return outputs


@dataclass(frozen=True)
class SupervisedObjective:
    """Batches ``(x, y)`` and ``loss(output, target)``.

    ``x`` may be a tensor, a tuple (passed as positional arguments) or a mapping (as keyword arguments). The
    output is what the model returns, or the ``logits`` of it.
    Each sample's loss is ``loss(output[i:i+1], y[i:i+1])``. The loss of a batch must be the mean of
    these or their sum; which of the two is found out from the data. A sum is divided by the number of
    samples, and that of a loss of torch by the number of terms that its mean would be over, so that the
    two give the same result. A loss that is neither (class weights with ``reduction="mean"``, say) raises:
    its value would depend on how the data is cut into batches.

    Attributes:
        loss: Takes output and target, returns a scalar.
        reduction: How ``loss`` combines samples; ``None`` as long as the data has not told.
        vectorize: Whether the samples' own losses are computed by ``torch.func.vmap``, or one by one
            because the loss does not allow it.
        hard: Whether the targets seen so far are labels and not numbers.
    """

    loss: Loss
    reduction: Literal["mean", "sum"] | None = None
    vectorize: bool = True
    hard: bool = True

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise InvalidInputError(
                f"The loss must be callable as loss(output, target), got {type(self.loss).__name__}."
            )
        if isinstance(self.loss, type):
            raise InvalidInputError(
                f"Got the class {self.loss.__name__} as loss: pass an instance, {self.loss.__name__}()."
            )
        if getattr(self.loss, "reduction", None) == "none":
            raise InvalidInputError(
                f"{type(self.loss).__name__}(reduction='none') returns one value per element; influence "
                "needs a scalar loss: use reduction='mean' or reduction='sum'."
            )

    @property
    def convex(self) -> bool:
        """Whether the loss is one of PyTorch's that are convex in the outputs by their formula."""
        if type(self.loss) is nn.CrossEntropyLoss:
            # Soft labels may be anything, negative too; the smoothing of hard ones is within [0, 1].
            weight = self.loss.weight
            return self.hard and (weight is None or bool((weight >= 0).all()))
        return type(self.loss) in (*ELEMENTWISE_LOSSES, nn.SoftMarginLoss)

    def size(self, batch: Batch) -> int:
        x, y = _pair(batch)
        for name, part in (("x", x), ("y", y)):
            if next(leaves(part), None) is None:
                raise InvalidInputError(
                    f"{name} holds no tensor, got {type(part).__name__}: convert arrays with torch.as_tensor; "
                    "points of a DataLoader are scored by inf.attribute."
                )
        sizes = {tuple(t.shape[:1]) for t in leaves(x)} | {tuple(t.shape[:1]) for t in leaves(y)}
        if () in sizes:
            raise InvalidInputError(
                "Found a tensor without a batch dimension: the first dimension counts samples; for one "
                "sample use unsqueeze(0)."
            )
        if len(sizes) != 1:
            raise InvalidInputError(
                "All tensors of x and y must hold the same number of samples in their first dimension, "
                f"found shapes x: {_shapes(x)}, y: {_shapes(y)}. One sample alone is x[i : i + 1]."
            )
        return int(sizes.pop()[0])

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        x, _ = _pair(batch)
        if isinstance(x, Mapping):
            return logits_of(model(**x))
        return logits_of(model(*x) if isinstance(x, tuple | list) else model(x))

    def mean_loss(self, outputs: Tensor, batch: Batch) -> Float[Tensor, ""]:
        target = _pair(batch)[1]
        value = self.loss(outputs, target)
        if self.reduction != "sum":
            return value
        return value / (outputs.shape[0] * self._terms(outputs, target))

    def sample_losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " n"]:
        target = _pair(batch)[1]
        terms = self._terms(outputs, target) if self.reduction == "sum" else 1
        return self._alone(outputs, target) / terms

    def _terms(self, outputs: Tensor, target: Tensor) -> int:
        """How many terms of one sample the loss averages over where it averages."""
        if isinstance(self.loss, (*ELEMENTWISE_LOSSES, nn.BCELoss, nn.BCEWithLogitsLoss)):
            return outputs[0].numel()
        if isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) and not target.is_floating_point():
            return target[0].numel()
        return 1

    def _alone(self, outputs: Tensor, target: Tensor) -> Float[Tensor, " n"]:
        """``loss`` of each sample by itself."""

        def one(output: Tensor, label: Tensor) -> Tensor:
            return self.loss(output[None], label[None])

        if self.vectorize:
            return torch.func.vmap(one)(outputs, target)
        return torch.stack([one(o, t) for o, t in zip(outputs, target, strict=True)])

    def validate(self, outputs: Tensor, batch: Batch) -> Self:
        target = _pair(batch)[1]
        if not isinstance(target, Tensor):
            raise InvalidInputError(
                f"The target y must be a tensor, got {type(target).__name__}; for other targets pass an "
                "Objective of your own."
            )
        if target.is_floating_point() and target.dtype != outputs.dtype:
            raise InvalidInputError(
                f"y is {target.dtype}, the model's output {outputs.dtype}: convert y with "
                f"y.to({outputs.dtype})."
            )
        if isinstance(self.loss, ELEMENTWISE_LOSSES) and target.shape != outputs.shape:
            raise InvalidInputError(self._broadcast_message(outputs, target))
        whole = self._probe(outputs.detach(), target)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._check_scalar(self.loss(outputs[:1], target[:1]))
            try:
                objective, each = self, self._alone(outputs, target)
            except RuntimeError as error:  # control flow on values, .item(): not for vmap
                if is_out_of_memory(error):
                    raise
                objective = replace(self, vectorize=False)
                each = objective._alone(outputs, target)
        objective = replace(objective, hard=objective.hard and not target.is_floating_point())
        return objective._recognise(whole, each, outputs, target)

    def _probe(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, with an error for what it must not do."""
        with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = self.loss(outputs, target)
            except (RuntimeError, ValueError, IndexError) as error:
                if is_out_of_memory(error):
                    raise
                raise InvalidInputError(
                    f"The loss failed on outputs of shape {tuple(outputs.shape)} and targets of shape "
                    f"{tuple(target.shape)}: {error}"
                ) from error
        if any("target size" in str(warning.message) for warning in caught):
            raise InvalidInputError(self._broadcast_message(outputs, target))
        self._check_scalar(value)
        if value.requires_grad:
            raise InvalidInputError(
                "The loss depends on trainable parameters other than through the model's output (a weight "
                "penalty, say), which its derivatives would miss: leave the penalty out, and add twice its "
                "factor to hessian_regularization; or move the parameters into the model."
            )
        return value.detach()

    def settled(self) -> Self:
        """With the reduction decided even where the data left it open (one sample a batch)."""
        if self.reduction is not None:
            return self
        declared = getattr(self.loss, "reduction", "mean")
        return replace(self, reduction="sum" if declared == "sum" else "mean")

    def _check_scalar(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(
                f"The loss must return a scalar tensor for a batch, got {got}: average over the batch, "
                "e.g. with reduction='mean'."
            )

    def _recognise(self, whole: Tensor, each: Tensor, outputs: Tensor, target: Tensor) -> Self:
        total, mean = each.sum(), each.mean()
        # Square root of the precision: far above rounding, far below any wrong normalisation. Losses of sure
        # predictions are differences of outputs, and have the rounding of these.
        precision = torch.finfo(outputs.dtype).eps
        tolerance = precision**0.5 * each.abs().mean() + 8 * precision * outputs.abs().amax()
        fits = {
            "mean": bool((whole - mean).abs() <= tolerance),
            "sum": bool((whole - total).abs() <= tolerance * each.shape[0]),
        }
        if not whole.isfinite():
            return self  # reported by the check for finite losses, with a better message
        allowed = [name for name, fit in fits.items() if fit and self.reduction in (None, name)]
        if not allowed:
            if target.is_floating_point() and target.shape != outputs.shape:
                raise InvalidInputError(self._broadcast_message(outputs, target))
            if any(fits.values()):
                found = next(name for name, fit in fits.items() if fit)
                raise InvalidInputError(
                    f"The loss of a batch is the {found} of the losses of its samples, where their "
                    f"{self.reduction} was expected: say which it is with "
                    "SupervisedObjective(loss, reduction=...)."
                )
            raise InvalidInputError(
                f"The loss of a batch ({whole:.6g}) is neither the mean ({mean:.6g}) nor the sum "
                f"({total:.6g}) of the losses of its samples, so the training loss would depend on the "
                "batch size. Class weights or ignored targets under reduction='mean' do this: use "
                "reduction='sum', or pass an Objective that defines the loss of one sample."
            )
        if len(allowed) == 2:
            return self
        return replace(self, reduction="mean" if allowed[0] == "mean" else "sum")

    def _broadcast_message(self, outputs: Tensor, target: Tensor) -> str:
        return (
            f"y of shape {tuple(target.shape)} does not match the output of shape "
            f"{tuple(outputs.shape)}: the loss would broadcast one against the other and compare every "
            f"sample with every other. Reshape it: y.reshape({tuple(outputs.shape)})."
        )


def _remedy(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return " Batches that are mappings take an objective in place of a loss, by name such as 'causal_lm'."
    return in_one_batch(batch)


def _pair(batch: Batch) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise InvalidInputError(f"Expected batches (x, y), got {got}.{_remedy(batch)}")
    x, y = batch
    return x, y


def _shapes(batch: Batch) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in leaves(batch)) or "no tensor"
