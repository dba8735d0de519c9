"""Matrix forms: a layer's per-sample gradient as a sum of outer products, one per position.

For sample ``n`` and each group ``g`` of channels

    G_n = Σ_t δ[n,t] ⊗ ā[n,t]        (o, e)

with ``t`` over the positions at which the layer is applied to the sample (tokens, pixels; one for a plain
vector), ``δ`` the gradient of the sample's loss with respect to the layer's output, and ``ā`` the layer's
input with a one appended where the bias takes part. Where the bias alone takes part ``ā`` is the one, where
the weight alone does it has none. Kronecker-factored curvature is built of second moments of ``ā`` and ``δ``
(Martens and Grosse 2015, arXiv:1503.05671; for convolutions Grosse and Martens 2016, arXiv:1602.01407).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.func import functional_call

from influence_framework.errors import InvalidInputError, PluginConflictError
from influence_framework.layers.convolution import Convolution, padded_patches, patch_rows


class UnsupportedLayerError(InvalidInputError):
    """A layer, or a way of using it, whose per-sample gradients have no matrix form here."""


class MatrixForm(ABC):
    """How the gradients of one layer's parameters are arranged as matrices.

    Constructed from the module and ``places``, which maps the module's own names of the parameters that
    take part (``"weight"``, ``"bias"``) to the positions of their entries in the flat parameter vector, int64
    tensors of the parameters' shapes.

    Attributes:
        places: Position in the flat vector of every entry of ``G``.
        one_hot: Whether ``inputs`` are indices, each in place of the unit vector ``ā`` of that index.
        unfolds: Whether ``inputs`` may take several times what the module was applied to, as patches do.

    Raises:
        UnsupportedLayerError: On construction, where the form does not hold for the module's options or
            parameters; from ``inputs``, where the module was applied to one sample without a batch.
    """

    places: Int[Tensor, "g o e"]
    one_hot: bool = False
    unfolds: bool = True

    @abstractmethod
    def __init__(self, module: nn.Module, places: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def inputs(self, x: Tensor) -> Float[Tensor, "g n t e"] | Int64[Tensor, "n t"]:
        """``ā`` for what the module was called with, samples first."""

    @abstractmethod
    def output_gradients(self, x: Tensor, gradients: Tensor) -> Float[Tensor, "s g n t o"]:
        """``δ`` of ``s`` draws, for gradients with respect to the module's output, ``(s, n, …)``.

        These may be strided, and share memory with those of other modules: nothing is written into them.
        """


def _check_names(module: nn.Module, places: Mapping[str, Tensor]) -> None:
    unknown = sorted(places.keys() - {"weight", "bias"})
    if unknown:
        raise UnsupportedLayerError(
            f"{type(module).__name__} has parameters {unknown} besides the weight and bias of its matrix form"
        )
    if not places:
        raise UnsupportedLayerError(f"no parameter of this {type(module).__name__} takes part")


def _check_dimensions(x: Tensor, least: int, kind: str) -> None:
    if x.ndim < least:
        raise UnsupportedLayerError(
            f"a {kind} was applied to a tensor of shape {tuple(x.shape)}, which has no batch dimension: "
            "its inputs must have samples first"
        )


def _by_position(values: Float[Tensor, "..."], samples: int) -> Float[Tensor, "..."]:
    """``(*leading, *t, features)`` as ``(*leading, t, features)``, with ``samples`` the last leading axis."""
    return values.unsqueeze(samples + 1).flatten(samples + 1, -2)


def _columns(places: Mapping[str, Tensor]) -> list[Tensor]:
    """Weight before bias, the bias as one column."""
    return [places[name].reshape(len(places[name]), -1) for name in ("weight", "bias") if name in places]


class _AffineMapForm(MatrixForm):
    """``y = W a + b`` at every position, for each group: ``ā = (a, 1)``."""

    def __init__(self, module: nn.Module, places: Mapping[str, Tensor], groups: int = 1) -> None:
        _check_names(module, places)
        # Channels of one group are consecutive, in the weight as in the bias.
        matrices = [place.unflatten(0, (groups, -1)).flatten(2) for place in _columns(places)]
        self.places = torch.cat(matrices, dim=2)
        self._weight, self._bias = "weight" in places, "bias" in places


class LinearForm(_AffineMapForm):
    """``nn.Linear``, with any number of dimensions between samples and features."""

    unfolds = False

    def inputs(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "1 n t e"]:
        _check_dimensions(x, 2, "linear layer")
        features = _by_position(x, 0)[None]
        if not self._weight:
            return x.new_ones(()).expand(*features.shape[:3], 1)
        return nn.functional.pad(features, (0, 1), value=1.0) if self._bias else features

    def output_gradients(
        self, x: Float[Tensor, "n ..."], gradients: Float[Tensor, "s n ..."]
    ) -> Float[Tensor, "s 1 n t o"]:
        return _by_position(gradients, 1)[:, None]


class TransposedLinearForm(LinearForm):
    """``y = x W + b`` with a weight ``(i, o)``, as GPT-2 of ``transformers`` has it."""

    def __init__(self, module: nn.Module, places: Mapping[str, Tensor]) -> None:
        super().__init__(module, {name: place.t() for name, place in places.items()})


class ConvolutionForm(_AffineMapForm):
    """Convolutions: ``a`` is the patch of the padded input that an output pixel sees, in ``g`` groups."""

    def __init__(self, module: Convolution, places: Mapping[str, Tensor]) -> None:
        super().__init__(module, places, module.groups)
        self._module = module

    def inputs(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "g n t e"]:
        _check_dimensions(x, 2 + len(self._module.kernel_size), type(self._module).__name__)
        patches = padded_patches(self._module, x)
        if self._weight:
            return patch_rows(patches, self._module.groups, append_one=self._bias)
        positions = prod(patches.shape[2 : patches.ndim // 2 + 1])
        return x.new_ones(()).expand(self._module.groups, len(x), positions, 1)

    def output_gradients(
        self, x: Float[Tensor, "n ..."], gradients: Float[Tensor, "s n ..."]
    ) -> Float[Tensor, "s g n t o"]:
        grouped: Tensor = gradients.unflatten(2, (self._module.groups, -1))  # (s, n, g, o, *t)
        return grouped.flatten(4).permute(0, 2, 1, 4, 3)


class EmbeddingForm(MatrixForm):
    """``nn.Embedding``: ``ā`` is the unit vector of the index, and the gradient at ``padding_idx`` is zero."""

    one_hot = True
    unfolds = False

    def __init__(self, module: nn.Embedding, places: Mapping[str, Tensor]) -> None:
        _check_names(module, places)
        reasons = {
            "max_norm": "changes its weight whenever it is applied",
            "scale_grad_by_freq": "has per-sample gradients that depend on the other samples of the batch",
            "sparse": "has gradients that are sparse tensors",
        }
        for option, reason in reasons.items():
            if getattr(module, option) not in (None, False):
                raise UnsupportedLayerError(f"an Embedding with {option} {reason}")
        self.places = places["weight"].t()[None]
        self._padding = module.padding_idx

    def inputs(self, x: Int[Tensor, "..."]) -> Int64[Tensor, "n t"]:
        _check_dimensions(x, 1, "Embedding")
        return x.unsqueeze(1).flatten(1).long()

    def output_gradients(
        self, x: Int[Tensor, "n *t"], gradients: Float[Tensor, "s n *t o"]
    ) -> Float[Tensor, "s 1 n _t o"]:
        if self._padding is not None:
            gradients = gradients.masked_fill((x == self._padding)[..., None], 0)
        return _by_position(gradients, 1)[:, None]


class _ScaleForm(MatrixForm):
    """``y = w ∘ x̂ + b``: the per-sample gradient is the vector ``(Σ_t δ[t] ∘ x̂[t], Σ_t δ[t])``.

    It is the one ``δ`` of a form with ``t = e = 1`` and ``ā = 1``, whose Kronecker factors therefore give the
    exact second moment.
    """

    unfolds = False

    def __init__(self, module: nn.Module, places: Mapping[str, Tensor]) -> None:
        _check_names(module, places)
        self.places = torch.cat([place.reshape(1, -1, 1) for place in _columns(places)], dim=1)
        self._weight, self._bias = "weight" in places, "bias" in places

    def inputs(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "1 n 1 1"]:
        return x.new_ones(()).expand(1, len(x), 1, 1)

    def output_gradients(
        self, x: Float[Tensor, "n *features"], gradients: Float[Tensor, "s n *features"]
    ) -> Float[Tensor, "s 1 n 1 o"]:
        weight = [self._sum(gradients * self._normalized(x))] if self._weight else []
        bias = [self._sum(gradients)] if self._bias else []
        return torch.cat([*weight, *bias], dim=2)[:, None, :, None]

    @abstractmethod
    def _normalized(self, x: Tensor) -> Tensor:
        """``x̂``."""

    @abstractmethod
    def _sum(self, values: Float[Tensor, "s n ..."]) -> Float[Tensor, "s n p"]:
        """Over the positions that share an entry of the parameter."""


class LayerNormForm(_ScaleForm):
    """``nn.LayerNorm`` and ``nn.RMSNorm``: one entry for each element of the normalised shape."""

    def __init__(self, module: nn.LayerNorm | nn.RMSNorm, places: Mapping[str, Tensor]) -> None:
        super().__init__(module, places)
        self._module = module

    def inputs(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "1 n 1 1"]:
        _check_dimensions(x, 1 + len(self._module.normalized_shape), type(self._module).__name__)
        return super().inputs(x)

    def _normalized(self, x: Tensor) -> Tensor:
        module, shape = self._module, list(self._module.normalized_shape)
        if isinstance(module, nn.RMSNorm):
            return nn.functional.rms_norm(x, shape, eps=module.eps)
        return nn.functional.layer_norm(x, shape, eps=module.eps)

    def _sum(self, values: Float[Tensor, "s n ..."]) -> Float[Tensor, "s n p"]:
        entries = values.flatten(-len(self._module.normalized_shape))
        return _by_position(entries, 1).sum(2)


class NormForm(_ScaleForm):
    """Norms of other packages, ``y = x̂ ∘ (c + w)`` with one entry of ``w`` for each of the last dimension.

    ``x̂`` is what the module returns for ``w = 1`` less what it returns for ``w = 0``.
    """

    def __init__(self, module: nn.Module, places: Mapping[str, Tensor]) -> None:
        super().__init__(module, places)
        if self._bias or [place.ndim for place in places.values()] != [1]:
            raise UnsupportedLayerError(f"this {type(module).__name__} has more than one vector of weights")
        self._module = module

    def _normalized(self, x: Tensor) -> Tensor:
        weight = x.new_ones(self.places.shape[1])
        with torch.no_grad():
            one, none = (functional_call(self._module, {"weight": w}, (x,)) for w in (weight, 0 * weight))
        normalized: Tensor = one - none
        return normalized

    def _sum(self, values: Float[Tensor, "s n ..."]) -> Float[Tensor, "s n p"]:
        return _by_position(values, 1).sum(2)


class _ChannelForm(_ScaleForm):
    """One entry for each channel, the dimension after the samples."""

    def _sum(self, values: Float[Tensor, "s n ..."]) -> Float[Tensor, "s n p"]:
        return values.unsqueeze(3).flatten(3).sum(3)


class GroupNormForm(_ChannelForm):
    """``nn.GroupNorm``."""

    def __init__(self, module: nn.GroupNorm, places: Mapping[str, Tensor]) -> None:
        super().__init__(module, places)
        self._module = module

    def _normalized(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, self._module.num_groups, eps=self._module.eps)


BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class BatchNormForm(_ChannelForm):
    """``nn.BatchNorm1d``, ``2d``, ``3d`` with running statistics: in training mode samples are not separate."""

    def __init__(self, module: BatchNorm, places: Mapping[str, Tensor]) -> None:
        super().__init__(module, places)
        if module.training or module.running_mean is None:
            raise UnsupportedLayerError(
                f"a {type(module).__name__} in training mode or without running statistics mixes the samples "
                "of a batch: call model.eval()"
            )
        self._module = module

    def _normalized(self, x: Tensor) -> Tensor:
        module = self._module
        return nn.functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


FORMS: dict[type | str, type[MatrixForm]] = {
    nn.Linear: LinearForm,
    "transformers.pytorch_utils.Conv1D": TransposedLinearForm,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvolutionForm),
    nn.Embedding: EmbeddingForm,
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), LayerNormForm),
    nn.GroupNorm: GroupNormForm,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BatchNormForm),
    # Each architecture has a class of its own for the same norm.
    **dict.fromkeys(("transformers.models.*RMSNorm", "transformers.models.*T5LayerNorm"), NormForm),
}
"""The forms of classes, or of the dotted names, or patterns of them, of classes that need not be importable."""


def form_of(module: nn.Module, table: Mapping[type | str, type[MatrixForm]]) -> type[MatrixForm] | None:
    """The form of the module's class, or else of its nearest base class in ``table``.

    A subclass may compute something else than its base: compare with autograd before relying on the form.
    """
    for kind in type(module).__mro__:
        form = table.get(kind) or table.get(dotted := f"{kind.__module__}.{kind.__qualname__}")
        if form is not None:
            return form
        patterns = (key for key in table if isinstance(key, str) and fnmatchcase(dotted, key))
        for pattern in patterns:
            return table[pattern]
    return None


def register_layer(kind: Any, form: Any) -> None:
    """Announce the matrix form of a type of layer, for curvature in Kronecker factors.

    Call it where the layer is defined, or where a plugin is imported. Whether gradients in that form are
    those of autograd is checked at every fit, so a form that does not hold is refused and not believed.

    Args:
        kind: The layer's class, or its dotted name where that need not be importable.
        form: A subclass of :class:`MatrixForm`.

    Raises:
        InvalidInputError: Something else than a class of layers and a form.
        PluginConflictError: The class has another form already.
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InvalidInputError(f"Expected a subclass of torch.nn.Module or its dotted name, got {kind!r}.")
    if not (isinstance(form, type) and issubclass(form, MatrixForm)):
        raise InvalidInputError(f"Expected a subclass of MatrixForm, got {form!r}.")
    if FORMS.get(kind, form) is not form:
        raise PluginConflictError(f"{kind!r} has the matrix form {FORMS[kind].__qualname__} already.")
    FORMS[kind] = form
