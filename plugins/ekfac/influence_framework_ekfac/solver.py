"""The solvers ``ekfac`` and ``kfac``: options, and the two passes over the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from influence_framework.costs import Cost, Workload
from influence_framework.errors import InvalidInputError, MissingCapabilityError
from influence_framework.layers import Cover, Layer, LayerBatch, Samples
from influence_framework.protocols import Diagonal, LayerStatistics, LinearOperator, Needs, SavedState
from influence_framework_ekfac.cost import cost_of_kronecker
from influence_framework_ekfac.inverse import EkfacInverse, EkfacLayer
from influence_framework_ekfac.partitions import basis_bytes, cubes, factor_bytes, grouped
from influence_framework_ekfac.statistics import (
    Covariances,
    Eigenbasis,
    SecondMoments,
    WeightSharing,
    compute_dtype,
    identity,
    seconds_of_eigh,
)
from influence_framework_ekfac.storage import (
    DEVICE,
    HOST,
    ROUNDED,
    Shelf,
    Stored,
    check_folder,
)

ALONE = "only"
"""Name of the block where a single operator is fitted."""


Sums = TypeVar("Sums", Covariances, SecondMoments)
"""What is added up over the batches of one layer."""

Makers = Mapping[Layer, Callable[..., Sums]]
"""Of each layer, what makes its sums: those of no sample, or of those given as ``sums``."""


@dataclass(frozen=True)
class Collect(Generic[Sums]):
    """Adds up the batches of a share of the data; no closure, so that it can be sent to another process.

    Attributes:
        makers: What makes the sums, by layer.
        what: They are, for a bar.
        progress: Whether to show it.
    """

    makers: Makers[Sums]
    what: str
    progress: bool

    def __call__(self, passed: Iterator[tuple[Mapping[Layer, LayerBatch], int]]) -> list[Tensor]:
        """The number of samples, then the sums of each layer."""
        found: dict[Layer, Sums] = {layer: make() for layer, make in self.makers.items()}
        count = torch.zeros((), dtype=torch.float64, device="cpu")
        with tqdm(desc=self.what, unit=" batches", disable=not self.progress) as bar:
            for batches, size in passed:
                count += size
                _add(found, batches)
                bar.update()
                # Else they were held until the next ones have been worked out.
                del batches
        return [count, *(part for kept in found.values() for part in kept.sums)]


def _add(found: Mapping[Layer, Sums], batches: Mapping[Layer, LayerBatch]) -> None:
    for layer, batch in batches.items():
        found[layer].add(batch)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class KroneckerSolver:
    """What ``ekfac`` and ``kfac`` share: options, and everything but the choice of eigenvalues."""

    samples: Samples = 1
    weight_sharing: WeightSharing = "expand"
    uncovered: Literal["error", "diagonal", "identity"] = "error"
    score_rtol: float = 1e-4
    dtype: torch.dtype = torch.float64
    seed: int = 0
    memory_budget: int = 256 * 2**20
    progress: bool = False
    partitions: int | Literal["auto"] = 1
    storage: str = DEVICE
    storage_dtype: torch.dtype | None = None
    score_dtype: torch.dtype | None = None

    fixed: ClassVar[bool] = True
    takes_indefinite: ClassVar[bool] = True
    least_dtype: ClassVar[torch.dtype] = torch.float32
    accuracy: ClassVar[None] = None
    requires: ClassVar[tuple[type[Any], ...]] = (LayerStatistics,)
    default_source: ClassVar[str] = "gauss_newton"

    def __post_init__(self) -> None:
        samples = self.samples
        if samples != "exact" and not _is_whole(samples, 1):
            raise InvalidInputError(
                f"samples is a positive number of draws for every sample, or 'exact'; got {samples!r}."
            )
        if not _is_whole(self.seed, 0):
            raise InvalidInputError(f"seed is a whole number, at least 0; got {self.seed!r}.")
        if self.weight_sharing not in ("expand", "reduce"):
            raise InvalidInputError(f"weight_sharing is 'expand' or 'reduce', got {self.weight_sharing!r}.")
        if self.uncovered not in ("error", "diagonal", "identity"):
            raise InvalidInputError(f"uncovered is 'error', 'diagonal' or 'identity', got {self.uncovered!r}.")
        rtol = self.score_rtol
        if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 <= rtol < 1:
            raise InvalidInputError(f"score_rtol is a number, at least 0 and below 1; got {rtol!r}.")
        if self.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(f"dtype is torch.float32 or torch.float64, got {self.dtype}.")
        if self.memory_budget <= 0:
            raise InvalidInputError(f"memory_budget is a positive number of bytes, got {self.memory_budget}.")
        if self.partitions != "auto" and not _is_whole(self.partitions, 1):
            raise InvalidInputError(
                f"partitions is a positive number of groups of layers, or 'auto'; got {self.partitions!r}."
            )
        if not isinstance(self.storage, str) or not self.storage:
            raise InvalidInputError(f"storage is 'device', 'host' or a folder's path; got {self.storage!r}.")
        if self.storage not in (DEVICE, HOST):
            check_folder(self.storage)
        for option in ("storage_dtype", "score_dtype"):
            if (dtype := getattr(self, option)) not in ROUNDED:
                raise InvalidInputError(
                    f"{option} is torch.bfloat16, torch.float32, torch.float64 or None, for no rounding; got "
                    f"{dtype!r}."
                )

    @property
    @abstractmethod
    def refits(self) -> bool:
        """Whether eigenvalues are refitted in the eigenbasis."""

    def cost(self, workload: Workload) -> Cost:
        """Passes over the data, and eigendecompositions as large as layers are wide."""
        if "LayerStatistics" not in workload.capabilities:
            raise MissingCapabilityError("the curvature gives no inputs and output gradients (LayerStatistics)")
        if workload.uncovered and self.uncovered == "error":
            reasons = "; ".join(f"{name}: {reason}" for name, reason in workload.uncovered.items())
            raise InvalidInputError(f"no LayerStatistics for {reasons}")
        draws = workload.outputs if self.samples == "exact" else self.samples
        element = torch.empty(0, dtype=self.dtype).element_size()
        return cost_of_kronecker(
            workload, draws, element, self.uncovered, refits=self.refits, exact=self.score_rtol == 0
        )

    @staticmethod
    def advised(workload: Workload) -> list[dict[str, Any]]:
        """As it is; and with the diagonal of parameters that no layer covers."""
        return [{}, {"uncovered": "diagonal"}] if workload.uncovered else [{}]

    def fit(self, operator: LinearOperator, regularization: float) -> EkfacInverse:
        """Factor the layers of one operator.

        Raises:
            InvalidInputError: Parameters that no layer covers, under ``uncovered="error"``.
            MissingCapabilityError: ``uncovered="diagonal"`` over an operator without a diagonal.
            NonFiniteError: Inputs or output gradients with NaN or infinity.
        """
        return self.fit_jointly({ALONE: operator}, {ALONE: regularization})[ALONE]

    def fit_jointly(
        self, operators: Mapping[str, LinearOperator], regularizations: Mapping[str, float]
    ) -> dict[str, EkfacInverse]:
        """Factor the layers of several operators over one problem, by two passes for all of a partition."""
        covers = {name: self._cover(operator) for name, operator in operators.items()}
        layers = [layer for cover in covers.values() for layer in cover.layers]
        first = next(iter(operators.values()))
        bases = self._bases(cast(LayerStatistics, first), layers, compute_dtype(first.dtype))
        found = {}
        for name, operator in operators.items():
            fitted = {x.name: EkfacLayer(x.form.places, bases[x]) for x in covers[name].layers}
            rest = self._rest(operator, fitted)
            found[name] = EkfacInverse(
                operator,
                regularizations[name],
                fitted,
                rest,
                self.score_rtol,
                self.memory_budget,
                self.score_dtype,
            )
        return found

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> EkfacInverse:
        """Bases and eigenvalues as they were.

        Raises:
            InvalidInputError: The layers in matrix form are not those of the fit.
        """
        tensors, names = state.tensors, state.values["layers"]
        places = {layer.name: layer.form.places for layer in self._cover(operator).layers}
        shapes = [tuple(tensors[f"{index}.values"].shape) for index in range(len(names))]
        if {name: tuple(at.shape) for name, at in places.items()} != dict(zip(names, shapes, strict=True)):
            raise InvalidInputError(
                f"The layers in matrix form are {list(places)} here and were {names} at the fit: register the "
                "same forms of layers (register_layer), or fit again."
            )
        work, device = compute_dtype(operator.dtype), operator.device
        bases = []
        for i in range(len(names)):
            parts = tensors[f"{i}.outputs"], tensors.get(f"{i}.inputs"), tensors[f"{i}.values"]
            bases.append(self._shelf.keep(Eigenbasis(*parts), work, self.dtype, device))
        fitted = {name: EkfacLayer(places[name], basis) for name, basis in zip(names, bases, strict=True)}
        return EkfacInverse(
            operator,
            regularization,
            fitted,
            (self._free(operator, fitted), tensors["rest"]),
            self.score_rtol,
            self.memory_budget,
            self.score_dtype,
            state.values["definite"],
        )

    def _cover(self, operator: LinearOperator) -> Cover:
        if not isinstance(operator, LayerStatistics):
            raise MissingCapabilityError(
                f"{type(self).__name__} needs the inputs and output gradients of layers (LayerStatistics), "
                f"which {type(operator).__name__} does not offer: use the source 'gauss_newton' or "
                "'empirical_fisher'."
            )
        cover = operator.cover()
        if cover.uncovered and self.uncovered == "error":
            covered = sum(layer.form.places.numel() for layer in cover.layers)
            reasons = "; ".join(f"{name}: {reason}" for name, reason in cover.uncovered.items())
            raise InvalidInputError(
                f"Kronecker factors cover {covered} of {operator.shape[0]} parameters "
                f"({covered / operator.shape[0]:.1%}). Not covered: {reasons}. Freeze these parameters, "
                "register a form for the layer with influence_framework.register_layer, or choose "
                "uncovered='diagonal' (their exact diagonal) or 'identity' (λ alone)."
            )
        return cover

    @property
    def _shelf(self) -> Shelf:
        return Shelf(self.storage, self.storage_dtype)

    def _bases(
        self, operator: LayerStatistics, layers: Sequence[Layer], dtype: torch.dtype
    ) -> dict[Layer, Eigenbasis | Stored]:
        """The bases of all layers, put away group by group: no other group's factors are held beside one's."""
        found: dict[Layer, Eigenbasis | Stored] = {}
        for group in self._groups(layers, dtype):
            found |= self._put_away(operator, group, dtype)
        return found

    def _groups(self, layers: Sequence[Layer], work: torch.dtype) -> list[Sequence[Layer]]:
        return grouped(layers, self.partitions, self.memory_budget, self.dtype, work)

    def needs(self, operators: Mapping[str, LinearOperator]) -> Needs:
        """What a fit takes: exactly, but for the workspace of an eigendecomposition.

        Raises:
            InvalidInputError: As :meth:`fit`.
        """
        work = compute_dtype(next(iter(operators.values())).dtype)
        layers = [layer for operator in operators.values() for layer in self._cover(operator).layers]
        groups = self._groups(layers, work)
        vectors, values = self.storage_dtype or work, self.storage_dtype or self.dtype
        put_away = [sum(basis_bytes(layer, values, vectors) for layer in group) for group in groups]
        peak = before = 0
        for group, kept in zip(groups, put_away, strict=True):
            peak = max(peak, before + sum(factor_bytes(layer, self.dtype, work) for layer in group))
            before += kept if self.storage == DEVICE else 0
        return Needs(
            passes=(1 + self.refits) * len(groups),
            peak=peak,
            device=before,
            host=sum(put_away) if self.storage == HOST else 0,
            disk=sum(put_away) if self.storage not in (DEVICE, HOST) else 0,
        )

    def trial(self, operators: Mapping[str, LinearOperator]) -> float:
        """All passes of a fit, with identities for eigenvectors: these are timed on a small matrix."""
        if self.progress:
            return replace(self, progress=False).trial(operators)
        first = next(iter(operators.values()))
        statistics, work = cast(LayerStatistics, first), compute_dtype(first.dtype)
        layers = [layer for operator in operators.values() for layer in self._cover(operator).layers]
        for group in self._groups(layers, work):
            self._summed(
                statistics,
                {x: partial(Covariances, x, self.weight_sharing, self.dtype) for x in group},
                "Covariances",
            )
            if self.refits:
                bases = {x: identity(x, work, self.dtype) for x in group}
                self._summed(
                    statistics,
                    {x: partial(SecondMoments, basis, self.memory_budget) for x, basis in bases.items()},
                    "Eigenvalues",
                )
        return seconds_of_eigh(self.dtype, first.device) * sum(map(cubes, layers))

    def _put_away(
        self, operator: LayerStatistics, layers: Sequence[Layer], dtype: torch.dtype
    ) -> dict[Layer, Eigenbasis | Stored]:
        return {
            layer: self._shelf.keep(basis, dtype, self.dtype, layer.form.places.device)
            for layer, basis in self._factored(operator, layers, dtype)
        }

    def _factored(
        self, operator: LayerStatistics, layers: Sequence[Layer], dtype: torch.dtype
    ) -> Iterator[tuple[Layer, Eigenbasis]]:
        """The bases of some layers, of which those that were passed on are not held here any more."""
        makers: Makers[Covariances] = {
            layer: partial(Covariances, layer, self.weight_sharing, self.dtype) for layer in layers
        }
        covariances, total = self._summed(operator, makers, "Covariances")
        bases = {
            layer: covariances.pop(layer).decompose(layer.name, total, dtype, layer.form.places.device)
            for layer in layers
        }
        if self.refits:
            squares: Makers[SecondMoments] = {
                layer: partial(SecondMoments, basis, self.memory_budget) for layer, basis in bases.items()
            }
            moments, _ = self._summed(operator, squares, "Eigenvalues")
            del squares
            bases = {layer: moments.pop(layer).eigenbasis(total) for layer in layers}
        for layer in layers:
            yield layer, bases.pop(layer)

    def _summed(
        self, operator: LayerStatistics, makers: Makers[Sums], what: str
    ) -> tuple[dict[Layer, Sums], int]:
        """Sums over the data of every layer, and the number of samples."""
        # All passes see the same draws.
        generator = torch.Generator("cpu").manual_seed(self.seed)
        collect = Collect(makers, what, self.progress)
        count, *sums = operator.layer_sums(list(makers), self.samples, generator, collect)
        parts = len(sums) // len(makers) if makers else 0
        each = (sums[start : start + parts] for start in range(0, len(sums), max(1, parts)))
        totals = {layer: make(sums=own) for (layer, make), own in zip(makers.items(), each, strict=True)}
        return totals, int(count)

    def _rest(
        self, operator: LinearOperator, layers: Mapping[str, EkfacLayer]
    ) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"]]:
        """Positions of parameters in no layer, and the curvature they are given."""
        index = self._free(operator, layers)
        if not len(index) or self.uncovered == "identity":
            return index, torch.zeros(len(index), dtype=operator.dtype, device=operator.device)
        if not isinstance(operator, Diagonal):
            raise MissingCapabilityError(
                "uncovered='diagonal' needs the exact diagonal (Diagonal), which "
                f"{type(operator).__name__} does not offer: use the source 'gauss_newton' or "
                "'empirical_fisher', or uncovered='identity'."
            )
        return index, operator.diagonal()[index]

    @staticmethod
    def _free(operator: LinearOperator, layers: Mapping[str, EkfacLayer]) -> Int[Tensor, " r"]:
        free = torch.ones(operator.shape[0], dtype=torch.bool, device=operator.device)
        for layer in layers.values():
            free[layer.places.flatten()] = False
        return torch.nonzero(free)[:, 0]


@dataclass(frozen=True)
class EkfacSolver(KroneckerSolver):
    """Eigenvalue-corrected Kronecker-factored curvature, one block a layer.

    A layer's gradient is ``G_n = Σ_t δ_nt ⊗ ā_nt`` over the positions ``t`` at which it is applied, with its
    input ``ā`` (a one appended for the bias) and the gradient ``δ`` of the sample's loss in its output. With
    the eigenvectors ``Q_A`` of ``E ā āᵀ`` and ``Q_G`` of ``E δ δᵀ``::

        C ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ        Λ = 1/N Σ_n (Q_Gᵀ G_n Q_A)²

    George et al. (2018), "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
    §3; for influence functions Grosse et al. (2023), "Studying Large Language Model Generalization with
    Influence Functions", §3.1. Curvature between layers is left out. Two passes over the data, of one
    forward and ``samples`` backward passes each; for layers applied once per sample no gradient is formed.

    With the source ``gauss_newton``, or ``hessian``, whose Gauss-Newton part it then approximates, ``δ``
    comes from targets drawn from the model's own predictive distribution; with ``empirical_fisher``
    from the true ones.

    Attributes:
        samples: Targets drawn for every sample; or ``"exact"``: the expectation over them, with a backward
            pass for every output (class).
        weight_sharing: What a position is to the factors, where a layer has several: ``"expand"``, a case of
            its own; ``"reduce"``, part of a sample's mean input and summed gradient. Eschenhagen et al.
            (2023), "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", §3.
            The refitted eigenvalues are of whole samples either way.
        uncovered: What becomes of parameters without a matrix form: ``"error"``; ``"diagonal"``, their exact
            diagonal curvature; ``"identity"``, none, so that λ alone acts.
        score_rtol: How far a score of a pair may be off, relative to the geometric mean of the two
            self-influences, in return for fewer flops; 0 for none.
        dtype: Of covariances and eigendecompositions.
        seed: Of the drawn targets.
        memory_budget: Bytes for intermediate results.
        progress: Show a bar for each pass.
        partitions: Groups that the layers are worked on in, one after the other, at most one a layer: each has
            its own passes over the data, and only its covariances are held meanwhile. ``"auto"``: as few as
            keep those of a group within ``memory_budget``. The result is the same, whatever their number.
        storage: Where eigenbases are kept: ``"device"``, with the model; ``"host"``, in the memory of the
            host; or a folder, in files that are mapped and that are removed with the fitted model. Those of one
            layer at a time are brought to the device where they are used.
        storage_dtype: What eigenvectors and eigenvalues are rounded to where they are kept, such as
            ``torch.bfloat16``; ``None``: not at all. Work is done in the precision that it is done in without.
        score_dtype: What gradients of samples are formed in for scores, and factors of test points kept and
            multiplied, in layers at many positions; ``None``: what the model computes in, single precision at
            least. In ``torch.bfloat16`` twice as many test points share a pass, which takes accelerators a
            fraction of the time.
        update_diagonal: Refit the eigenvalues in the eigenbasis, as above. ``False``: ``Λ = λ_G ⊗ λ_A``, which
            is K-FAC.
    """

    update_diagonal: bool = True

    @property
    def refits(self) -> bool:
        return self.update_diagonal


@dataclass(frozen=True)
class KfacSolver(KroneckerSolver):
    """Kronecker-factored curvature ``C ≈ E δ δᵀ ⊗ E ā āᵀ``, one block a layer.

    What ``ekfac`` is without its correction of the eigenvalues; the options mean the same. One pass over
    the data. Martens and Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", §3. λ is added to the eigenvalues of the product, not to the factors.
    """

    @property
    def refits(self) -> bool:
        return False
