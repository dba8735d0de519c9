"""Square roots and random samples of the Hessian of a loss with respect to the model's outputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch, map_leaves, take
from influence_framework.derivatives import gradients_of, pull_back
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.memory import is_out_of_memory
from influence_framework.objective import Objective, SoftmaxLosses

EXACT_ROWS = 1024
"""Rows of an exact square root up to which one backward pass for each is worth its time."""
DENSE_OUTPUTS = 256
"""Outputs of a sample up to which a Hessian without a known structure is formed and factored."""
EIGEN_OUTPUTS = 64
"""Outputs of a sample up to which the eigenpairs of its Hessian are worked out."""


@dataclass(frozen=True, eq=False)
class OutputCurvature(ABC):
    """``H_n = ∇²_out ℓ_n`` of every sample's own loss, as rows ``r_s`` with ``Σ_s r_s r_sᵀ = H_n``.

    Pulled back through the model, rows are pseudo-gradients ``J_nᵀ r_s``, whose outer products sum to the
    Gauss-Newton matrix of the sample. Exact rows are the columns of a square root ``H_n = L_n L_nᵀ``
    (Botev et al. 2017, "Practical Gauss-Newton Optimisation for Deep Learning"). Random ones are
    ``L_n z`` with random signs ``z``, which have the least variance where ``H_n`` is diagonal; for the
    softmax they come from the model's predictive distribution (Martens & Grosse 2015, "Optimizing Neural
    Networks with Kronecker-factored Approximate Curvature").

    Attributes:
        family: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"diagonal"`` or ``"dense"``.
        dtype: Of the outputs as given, and of the rows.
        outputs: In single precision at least.
    """

    family: str
    dtype: torch.dtype
    outputs: Float[Tensor, "n ..."]

    @classmethod
    def of(cls, objective: Objective, outputs: Float[Tensor, "n *shape"], batch: Batch) -> OutputCurvature:
        """Recognise the structure of ``H_n`` from its products with a few random vectors.

        The products, not the type of the loss, tell it, so that any way of writing a loss will do. A
        structure is accepted where it predicts the products of every sample to the square root of the
        precision. Only where none does are the ``H_n`` formed, by one product for each output.

        Raises:
            InvalidInputError: The loss is not convex in the outputs, or of no known structure in more
                than ``DENSE_OUTPUTS`` outputs.
            NonFiniteError: A second derivative is NaN or infinite.
        """
        known = Categorical.known(objective, outputs, batch) if isinstance(objective, SoftmaxLosses) else None
        if known is not None:
            return known
        products = _Products(objective, outputs, batch)
        # The class dimension is the second for the losses of torch, the last for most others.
        axes = sorted({1, outputs.ndim - 1})
        if outputs.ndim == 3:
            # A vocabulary is longer than a sequence, and a wrong guess costs as much as the right one.
            axes.sort(key=lambda axis: -outputs.shape[axis])
        categorical = (Categorical.fit(products, axis) for axis in axes)
        return Elementwise.fit(products) or next(filter(None, categorical), None) or Dense.fit(products)

    def exact(self) -> Float[Tensor, "s n ..."]:
        """Rows with ``Σ_s r_s r_sᵀ = H_n``, one for each output; an error for more than ``EXACT_ROWS``."""
        width = self.outputs[0].numel()
        if width > EXACT_ROWS:
            raise InvalidInputError(
                f"The exact square root of the {self.family} curvature of this loss has {width} rows, one "
                f"backward pass each; at most {EXACT_ROWS} are supported. Use random samples of it instead."
            )
        return self._root(_unit_vectors(self.outputs)).to(self.dtype)

    def draw(self, samples: int, generator: torch.Generator) -> Float[Tensor, "s n ..."]:
        """``s = samples`` random rows of mean zero with ``E Σ_s r_s r_sᵀ = H_n``: each carries ``1/√s``.

        The numbers are drawn on the generator's device, whichever that of the outputs is, and sample by sample:
        on a CPU, a batch that is cut into pieces gets those that it would get whole.
        """
        if samples < 1:
            raise InvalidInputError(f"The number of samples must be at least 1, got {samples}.")
        return (self._random(samples, generator) / math.sqrt(samples)).to(self.dtype)

    def leading(self, generator: torch.Generator) -> Float[Tensor, "s n ..."]:
        """Orthogonal rows ``√w q`` of the eigenpairs of ``H_n``, the largest first: ``Σ_s r_s r_sᵀ = H_n``.

        Of more than ``EIGEN_OUTPUTS`` outputs a sample, one random row of :meth:`draw` instead.
        """
        if self.outputs[0].numel() > EIGEN_OUTPUTS:
            return self.draw(1, generator)
        rows = self._root(_unit_vectors(self.outputs))
        rows = rows.reshape(*rows.shape[:2], -1).transpose(0, 1)
        _, coefficients = torch.linalg.eigh(rows @ rows.mT)
        found: Tensor = (coefficients.flip(-1).mT @ rows).transpose(0, 1)
        return found.reshape(-1, *self.outputs.shape).to(self.dtype)

    @property
    def convex(self) -> bool:
        """Whether its form alone proves the loss convex in the outputs, here and wherever else they are."""
        # A single number fits any family.
        return self.family in ("bernoulli", "gaussian") and self.outputs.numel() > 1

    @abstractmethod
    def _root(self, vectors: Float[Tensor, "s n *shape"]) -> Float[Tensor, "s n *shape"]:
        """``L_n z`` for stacked ``z``."""

    def _random(self, samples: int, generator: torch.Generator) -> Float[Tensor, "s n ..."]:
        """Independent rows with ``E r rᵀ = H_n`` each."""
        return self._root(_signs((samples, *self.outputs.shape), generator, self.outputs))


@dataclass(frozen=True, eq=False)
class Elementwise(OutputCurvature):
    """``H_n = diag h_n``, ``h = second``: losses that act on each output by itself.

    The family is ``"gaussian"`` where ``h`` is constant (squared error), ``"bernoulli"`` where it is
    ``w σ(1-σ)`` with one ``w`` for each sample (BCE with logits), else ``"diagonal"``. Random rows are
    ``√h z`` with normal ``z``, ``√w (σ - y)`` with ``y`` one with probability ``σ``, and ``√h`` with
    random signs.
    """

    second: Float[Tensor, "n ..."]

    @classmethod
    def fit(cls, products: _Products) -> OutputCurvature | None:
        """``None`` unless ``H v = h ∘ v``."""
        probes, found, outputs = products.probes, products.found, products.outputs
        second = (found * probes).sum(0) / probes.square().sum(0)
        if not products.agree(found, second * probes):
            return None
        second = products.nonnegative(second)
        # With a single output one weight for each sample would fit any loss.
        groups = len(second) if second[0].numel() > 1 else 1
        variance = (outputs.sigmoid() * (-outputs).sigmoid()).reshape(groups, -1)
        weights = _ratio(second.reshape(groups, -1).sum(1, keepdim=True), variance.sum(1, keepdim=True))
        known = {"gaussian": second.mean().expand_as(second), "bernoulli": weights * variance}
        names = (name for name, h in known.items() if products.agree(second[None], h.reshape(found[:1].shape)))
        return cls(next(names, "diagonal"), products.dtype, outputs, second)

    def _root(self, vectors: Tensor) -> Tensor:
        return self.second.sqrt() * vectors

    def _random(self, samples: int, generator: torch.Generator) -> Tensor:
        shape = (samples, *self.outputs.shape)
        if self.family == "gaussian":
            # Not from randn, whose numbers depend on how many are drawn at once.
            uniform = _uniform(shape, generator).clamp_min_(2.0**-54)
            return self._root((math.sqrt(2) * torch.erfinv(2 * uniform - 1)).to(self.outputs))
        if self.family == "bernoulli":
            p = self.outputs.sigmoid()
            targets = (_uniform(shape, generator).to(p.device) < p).to(p.dtype)
            return _ratio(self.second, p * (-self.outputs).sigmoid()).sqrt() * (p - targets)
        return super()._random(samples, generator)


@dataclass(frozen=True, eq=False)
class Categorical(OutputCurvature):
    """``H_t = w_t (diag p_t - p_t p_tᵀ)`` with ``p_t`` the softmax of the logits at position ``t``.

    Positions are the dimensions other than that of the samples and that of the classes; there are no
    second derivatives between two of them. ``L_t = √w_t (I - p_t 1ᵀ) diag √p_t``, whose columns are
    ``√(w_t p_y) (e_y - p_t)``. Random rows are ``√w_t (p_t - e_y)`` with ``y ~ p_t`` for each position.

    Attributes:
        probabilities: ``p``, of the shape of the outputs.
        weights: ``w``: zero for ignored targets, and where the softmax is saturated beyond rounding.
        axis: The class dimension.
    """

    probabilities: Float[Tensor, "n *shape"]
    weights: Float[Tensor, "n #*shape"]
    axis: int

    @classmethod
    def fit(cls, products: _Products, axis: int) -> OutputCurvature | None:
        """``None`` unless the Hessian has this form along dimension ``axis``."""
        p, dim, probes = products.outputs.softmax(axis), axis + 1, products.probes

        def unweighted(vectors: Tensor) -> Tensor:
            return p * (vectors - (p * vectors).sum(dim, keepdim=True))

        # H is zero on constants. Probes that vanish at the likeliest class lose no digits by cancellation
        # where its probability is nearly one, and so give weights with a small relative error there too.
        likeliest = products.outputs.argmax(axis, keepdim=True)
        shifted = probes - torch.take_along_dim(probes, likeliest[None], dim)
        precise, unit = products(shifted), unweighted(shifted)
        weights = _ratio(precise.abs().sum((0, dim), keepdim=True), unit.abs().sum((0, dim), keepdim=True))[0]
        if not products.agree(precise, weights * unit):
            return None
        # The shifted probes are blind to the likeliest class itself; the others see it, up to cancellation.
        noise = float(_ratio(precise.abs().sum(), unit.abs().sum()))
        if not products.agree(products.found, weights * unweighted(probes), noise):
            return None
        return cls("categorical", products.dtype, products.outputs, p, weights, axis)

    @classmethod
    def known(cls, objective: SoftmaxLosses, outputs: Tensor, batch: Batch) -> OutputCurvature | None:
        """As the objective says, if the products of the most curved sample do not belie it; else ``None``.

        Raises:
            InvalidInputError: Its weights are not one for each cross-entropy.
        """
        if not _says_for_its_losses(type(objective)):
            return None
        axis, weights = objective.softmax_weights(outputs, batch)
        axis %= outputs.ndim
        expected_shape = (*outputs.shape[:axis], 1, *outputs.shape[axis + 1 :])
        if weights.shape != expected_shape:
            raise InvalidInputError(
                f"softmax_weights of {type(objective).__name__} returned weights of shape "
                f"{tuple(weights.shape)}: for outputs {tuple(outputs.shape)} with classes in dimension {axis} "
                f"it is {expected_shape}."
            )
        wide = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        found = cls("categorical", outputs.dtype, wide, wide.softmax(axis), weights, axis)
        # A sample without a label, or whose softmax is saturated, would bear out any weights.
        curved = (weights * (1 - found.probabilities.amax(axis, keepdim=True))).flatten(1).sum(1)
        first = int(curved.argmax())
        one = slice(first, first + 1)
        products = _Products(cast(Objective, objective), outputs[one], take(batch, one))
        p, probes, dim = found.probabilities[one], products.probes, axis + 1
        expected = weights[one] * p * (probes - (p * probes).sum(dim, keepdim=True))
        # Where the softmax is saturated, terms as large as the weights have cancelled.
        noise = float(weights[one].max())
        return found if products.agree(products.found, expected, noise) else None

    @property
    def convex(self) -> bool:
        # With two classes any curvature that is zero on constants has this form with some w.
        return self.probabilities.shape[self.axis] > 2

    def _root(self, vectors: Tensor) -> Tensor:
        scaled = self.probabilities.sqrt() * vectors
        return self.weights.sqrt() * (scaled - self.probabilities * scaled.sum(self.axis + 1, keepdim=True))

    def _random(self, samples: int, generator: torch.Generator) -> Tensor:
        p, dim = self.probabilities, self.axis + 1
        if p.shape[self.axis] == 2:
            # Of rank one, so that a sign is exact. Moreover any curvature that is zero on constants has this
            # form with some w: labels that hardly ever come would then stand for all of it.
            size = (self.weights * p.prod(self.axis, keepdim=True)).sqrt()
            first = size * _signs((samples, *size.shape), generator, size)
            return torch.cat([first, -first], dim)
        # Single precision would not tell apart the sums of many small probabilities.
        sums = p.double().movedim(self.axis, -1).cumsum(-1)
        shape = (*sums.shape[:-1], samples)
        uniform = torch.rand(shape, generator=generator, dtype=sums.dtype, device=generator.device).to(p.device)
        # The first class whose sum exceeds the number; one of probability zero never does first.
        drawn = torch.searchsorted(sums, uniform * sums[..., -1:], right=True).clamp_(max=sums.shape[-1] - 1)
        labels = drawn.movedim(-1, 0).unsqueeze(dim)
        rows = p.expand(samples, *p.shape).scatter_add(dim, labels, -torch.ones_like(labels, dtype=p.dtype))
        return self.weights.sqrt() * rows


@dataclass(frozen=True, eq=False)
class Dense(OutputCurvature):
    """``L_n = Q_n √Λ_n``, in ``factors``, from the eigendecomposition ``H_n = Q_n Λ_n Q_nᵀ``."""

    factors: Float[Tensor, "n c c"]

    @classmethod
    def fit(cls, products: _Products) -> OutputCurvature:
        """Form and factor ``H_n``; an error where it is too large or not positive semidefinite."""
        n, width = len(products.outputs), products.outputs[0].numel()
        if width > DENSE_OUTPUTS:
            raise InvalidInputError(
                f"The loss couples the {width} outputs of a sample in a way that is not recognised. Above "
                f"{DENSE_OUTPUTS} it must act on each by itself (squared error, BCE with logits) or be the "
                "cross-entropy of logits, classes second or last. Or use the source 'empirical_fisher'."
            )
        columns = products(_unit_vectors(products.outputs))
        hessians = columns.reshape(width, n, width).transpose(0, 1).double()
        values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
        factors = vectors * products.nonnegative(values).sqrt()[:, None]
        return cls("dense", products.dtype, products.outputs, factors)

    def _root(self, vectors: Tensor) -> Tensor:
        flat = vectors.reshape(*vectors.shape[:2], -1).to(self.factors.dtype)
        return torch.einsum("ncd,snd->snc", self.factors, flat).reshape(vectors.shape)


class _Products:
    """``v ↦ H_n v`` for stacked ``v``, and how closely products can be expected to agree.

    ``probes`` are two vectors, the same for all samples, and ``found`` their products. Entries are random
    from ½ to 1½: a mean of zero over many classes would make the curvature of a softmax look diagonal.
    ``dtype`` is that of the outputs as given; ``outputs`` are in single precision at least.
    """

    def __init__(self, objective: Objective, outputs: Tensor, batch: Batch) -> None:
        self.dtype, wide = outputs.dtype, torch.promote_types(outputs.dtype, torch.float32)
        self.outputs = outputs.detach().to(wide)
        try:
            widened = map_leaves(lambda leaf: leaf.to(wide) if leaf.dtype == self.dtype else leaf, batch)
            self._record(objective, self.outputs, widened)
        except RuntimeError as error:
            if wide == self.dtype or is_out_of_memory(error):
                raise
            # The loss holds tensors of the lower precision.
            self._record(objective, outputs, batch)
        generator, shape = torch.Generator(outputs.device).manual_seed(0), (2, 1, *outputs.shape[1:])
        probes = torch.rand(shape, generator=generator, dtype=wide, device=outputs.device) + 0.5
        self.probes = probes.expand(2, *outputs.shape)
        self.found = self(self.probes)

    def _record(self, objective: Objective, outputs: Tensor, batch: Batch) -> None:
        self._leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = objective.sample_losses(self._leaf, batch).sum()
            (self._gradient,) = gradients_of(total, [self._leaf])

    def __call__(self, vectors: Float[Tensor, "k n *shape"]) -> Float[Tensor, "k n *shape"]:
        (products,) = pull_back([self._gradient], [self._leaf], [vectors.to(self._leaf.dtype)])
        if products is None:
            return torch.zeros_like(vectors)
        finite = products.isfinite().transpose(0, 1).flatten(1).all(1)
        if not finite.all():
            raise NonFiniteError(
                "The second derivatives of the loss with respect to the outputs contain NaN or infinity in "
                f"samples {(~finite).nonzero().flatten().tolist()[:8]} (positions within their batch)."
            )
        return products.to(vectors.dtype)

    def agree(self, found: Float[Tensor, "*k_n"], expected: Float[Tensor, "*k_n"], noise: float = 0) -> bool:
        """Whether the largest difference in every sample is small against what was ``found`` for it.

        Both are ``(k, n, …)``. Small is the square root of the precision, far above rounding and far below
        a wrong structure. Rounding errors of the batch's largest sample, and of terms of size ``noise``
        that may have cancelled, are allowed in addition.
        """
        precision = torch.finfo(self._leaf.dtype)
        relative, rounding = precision.eps**0.5, min(64 * precision.eps, precision.eps**0.5)
        size = found.abs().transpose(0, 1).flatten(1).amax(1)
        error = (found - expected).abs().transpose(0, 1).flatten(1).amax(1)
        allowed = relative * size + rounding * (size.max() + noise) + 64 * precision.tiny
        return bool((error <= allowed).all())

    def nonnegative(self, values: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Eigenvalues of ``H_n`` with rounding errors below zero removed; an error for what is more."""
        clamped = values.clamp(min=0)
        if not self.agree(values[None], clamped[None]):
            raise InvalidInputError(
                "The loss is not convex in the model's outputs: its Hessian with respect to them has the "
                f"eigenvalue {values.min():.3g}, and 'gauss_newton' is not positive semidefinite. Use the "
                "source 'empirical_fisher'; if this is rounding, the loss for logits (BCEWithLogitsLoss, …)."
            )
        return clamped


def _says_for_its_losses(objective: type) -> bool:
    """Whether what is said of the losses was said by the class that computes them, or by one derived from it.

    One sample cannot tell what a subclass does to the losses of others, such as weights of its own.
    """
    for cls in objective.__mro__:
        said, computed = (name in vars(cls) for name in ("softmax_weights", "sample_losses"))
        if said or computed:
            return said
    return False


def _unit_vectors(outputs: Float[Tensor, "n *shape"]) -> Float[Tensor, "c n *shape"]:
    """One for each output of a sample, the same for all samples."""
    width = outputs[0].numel()
    unit = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    return unit.reshape(width, 1, *outputs.shape[1:]).expand(width, *outputs.shape)


def _signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """``±1`` with equal probability, of the dtype and on the device of ``like``."""
    bits = torch.randint(
        2, _sample_first(shape), generator=generator, device=generator.device, dtype=torch.int8
    )
    return (2 * bits - 1).transpose(0, 1).to(like.device, like.dtype)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "s n *shape"]:
    """From zero to one, in double precision."""
    first = _sample_first(shape)
    return torch.rand(first, generator=generator, dtype=torch.float64, device=generator.device).transpose(0, 1)


def _sample_first(shape: Sequence[int]) -> tuple[int, ...]:
    draws, size, *rest = shape
    return (size, draws, *rest)


def _ratio(numerator: Float[Tensor, "*shape"], denominator: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``numerator / denominator``, zero where the denominator is."""
    return torch.where(denominator > 0, numerator / denominator, 0)
