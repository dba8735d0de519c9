"""What a plugin author reads: the protocols between problem, operator, inverse and scores.

Data flows one way::

    Problem --HessianSource.operator--> LinearOperator --Solver.fit--> InverseOperator --> scores

Nothing here imports a concrete class, so a plugin may implement any of these by duck typing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence_framework.errors import InvalidInputError, did_you_mean

if TYPE_CHECKING:
    from influence_framework.layers import Cover, Layer, LayerBatch, Samples
    from influence_framework.parameters import ParameterSpace
    from influence_framework.problem import Problem
    from influence_framework.processes import Processes
    from influence_framework.rows import RootRows


@runtime_checkable
class LinearOperator(Protocol):
    """A symmetric ``P × P`` matrix known through its products.

    ``A @ v`` takes ``(P,)`` or ``(P, k)`` columns of the operator's own dtype and device and returns
    the same shape. All ``k`` columns are worked on together; ``k`` may be zero and may exceed ``P``.

    An optional attribute: ``positive_semidefinite``, ``True`` where the way the matrix is made rules out
    negative eigenvalues, which solvers then need not look for. Left out it is ``False``.
    Another one: ``divided``, ``True`` where other processes work out its products, so that it cannot be used in
    one of them.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, columns: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]: ...


@runtime_checkable
class Diagonal(Protocol):
    """Capability: the exact diagonal ``(P,)`` at a cost far below ``P`` products."""

    def diagonal(self) -> Float[Tensor, " P"]: ...


@runtime_checkable
class Trace(Protocol):
    """Capability: the trace at a cost far below ``P`` products, exact or with an error of a few per cent."""

    def trace(self) -> float: ...


@runtime_checkable
class JointTrace(Protocol):
    """Capability: the traces of several operators of one source over one problem, from the same pass.

    ``operators`` are by name and include the one that is asked; the traces are as of :class:`Trace`.
    """

    def traces(self, operators: Mapping[str, LinearOperator]) -> dict[str, float]: ...


@runtime_checkable
class Dense(Protocol):
    """Capability: the full ``(P, P)`` matrix at a cost below ``P`` products."""

    def to_dense(self) -> Float[Tensor, "P P"]: ...


@runtime_checkable
class Minibatches(Protocol):
    """Capability: an endless stream of random operators ``C_b`` whose mean over one pass is ``C``.

    Averaged over the batches of one pass with their sample counts as weights, they give exactly
    ``C``. ``generator`` alone decides the order.
    """

    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]: ...


@runtime_checkable
class LayerStatistics(Protocol):
    """Capability: inputs and output gradients of the layers whose gradients have a matrix form.

    Over one pass, ``1/N Σ_n Σ_s vec(G[s,n]) vec(G[s,n])ᵀ`` of the gradients
    ``G[s,n] = Σ_t δ[s,n,t] ⊗ ā[n,t]`` of each layer is that layer's block of the curvature in the
    outputs' own metric: of the Gauss-Newton matrix, exactly (``samples="exact"``) or in expectation over
    ``samples`` draws; of the empirical Fisher, from the true labels.
    """

    def cover(self) -> Cover:
        """The layers, and the parameters that are in none of them."""
        ...

    def layer_sums(
        self,
        layers: Sequence[Layer],
        samples: Samples,
        generator: torch.Generator,
        collect: Callable[[Iterator[tuple[Mapping[Layer, LayerBatch], int]]], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """What ``collect`` adds up over one pass over the data, which may be divided between processes.

        ``collect`` is given the batches of a share of the data, each with its sample count; layers that the
        model skips are absent. It returns sums over them, as many and of the same shapes for every share; the
        result is the sum of what it returned for all shares. ``layers`` may come from several operators
        over the same problem: one pass then serves them all.
        """
        ...


@runtime_checkable
class LeadingRows(Protocol):
    """Capability: what a few samples contribute most to the curvature, at the cost of their gradients.

    Rows of an ``A`` with ``AᵀA = C``, but for terms of ``C`` that may be negative: the second derivatives of
    the model, which the Hessian has beside its Gauss-Newton part.
    """

    def leading_rows(self, count: int) -> RootRows:
        """The ``m ≤ count`` rows with the largest ``w``, those first.

        Rows are ``√w qᵀ J_n / √N``, with an eigenpair ``(w, q)`` of the Hessian of sample ``n``'s loss in the
        outputs. Of many outputs it is one row for a random target of each sample, and for the empirical Fisher
        the loss gradient of each sample; both are ordered by the norm in the outputs too.
        """
        ...


@runtime_checkable
class LayerScoring(Protocol):
    """Capability of an inverse: scores from layer inputs and output gradients, without per-sample gradients."""

    @property
    def scores_layers(self) -> bool:
        """Whether it can: whether its layers have all its parameters, say."""
        ...

    def side(self, layers: Mapping[str, LayerBatch], size: int) -> Any:
        """What scores need of ``size`` samples, by layer name; layers the model skipped are absent.

        An object with ``nbytes``, the memory it holds.
        """
        ...

    def join(self, sides: Sequence[Any]) -> Any:
        """Several such objects as one; they may give up what they hold, and are not used again."""
        ...

    def scores(self, test: Any, train: Any) -> Float[Tensor, "m n"]:
        """``g_mᵀ (C + λI)⁻¹ g_n`` of every pair; λ may differ from that of the inverse that made the sides."""
        ...

    def self_scores(self, side: Any) -> Float[Tensor, " n"]:
        """``g_nᵀ (C + λI)⁻¹ g_n`` of every sample."""
        ...


@runtime_checkable
class Weighing(Protocol):
    """Capability of an inverse with :class:`LayerScoring`: a test side that holds less, for its own λ alone."""

    def weighed(self, side: Any) -> Any:
        """What ``scores`` and ``join`` of this inverse take in place of the test ``side``."""
        ...


@runtime_checkable
class JointSolver(Protocol):
    """Capability of a solver: fit the blocks of one problem together, in as many passes as one takes."""

    def fit_jointly(
        self, operators: Mapping[str, LinearOperator], regularizations: Mapping[str, float]
    ) -> Mapping[str, InverseOperator]: ...


@dataclass(frozen=True)
class Needs:
    """What a fit takes, counted beforehand; bytes beside the model, the data and the work on a batch.

    Attributes:
        passes: Over the training data.
        peak: Bytes on the device at any one time of the fit.
        device: Bytes on the device that the fit leaves there.
        host: The same in the memory of the host, where that is another.
        disk: The same in files.
    """

    passes: int
    peak: int
    device: int
    host: int = 0
    disk: int = 0


@runtime_checkable
class Planning(Protocol):
    """Capability of a solver: say what a fit takes without one."""

    def needs(self, operators: Mapping[str, LinearOperator]) -> Needs:
        """What a fit to these operators, all of one problem, takes."""
        ...

    def trial(self, operators: Mapping[str, LinearOperator]) -> float:
        """Do what grows with the data of a fit, over that of these operators, and forget it.

        Returns:
            The seconds that the rest of a fit takes, whatever the data, as far as can be said.
        """
        ...


class StopReason(Enum):
    """Why a solver stopped working on a right-hand side; the value says what to do about it."""

    CONVERGED = "reached the tolerance"
    APPROXIMATION = "fixed approximation, held to no tolerance"
    SINGULAR = "left out directions of no curvature: raise the regularisation, with which none is left out"
    ITERATION_LIMIT = "reached the iteration limit: raise maxiter, loosen rtol or add a preconditioner"
    NEGATIVE_CURVATURE = (
        "met a direction of non-positive curvature: raise the regularisation above the magnitude of "
        "the most negative eigenvalue, or use the source 'gauss_newton'"
    )
    STAGNATED = "reached the accuracy this dtype can give: loosen rtol, use float64 or raise the regularisation"
    DIVERGED = "diverged: raise the scale (the solver's warning names one), or use 'cg'"
    NOT_FINITE = "met NaN or infinity: check the right-hand side and the operator"


@dataclass(frozen=True)
class Solution:
    """What came out of a solve, per right-hand side.

    Attributes:
        value: ``(P, k)``, or ``(P,)`` where one vector was given.
        converged: ``(k,)``; whether each column is what the solver promises.
        iterations: ``(k,)``; products spent on each column (0 for direct methods).
        residual: ``(k,)`` float64; the true relative residual ``‖b − (C + λI)x‖ / ‖b‖``, computed from
            the returned value and not by a recursion (0 where b = 0); NaN where it was not measured.
        reason: ``k`` stop reasons.
        curvature: ``(k, 2)`` float64; the smallest and the largest curvature ``vᵀCv / vᵀv`` that the solver saw
            while it worked on each column, NaN where it saw none; ``None`` where it does not tell.
    """

    value: Float[Tensor, "P *k"]
    converged: Bool[Tensor, " k"]
    iterations: Int[Tensor, " k"]
    residual: Float[Tensor, " k"]
    reason: tuple[StopReason, ...]
    curvature: Float[Tensor, "k 2"] | None = None


@runtime_checkable
class InverseOperator(LinearOperator, Protocol):
    """``≈ (C + λI)⁻¹``, as an operator and with a report for every right-hand side.

    Optional attribute: ``quiet``, a set of :class:`StopReason` that are no cause for a warning.
    """

    def solve(self, columns: Float[Tensor, "P *k"]) -> Solution: ...


@runtime_checkable
class Reregularizable(Protocol):
    """Capability of an inverse: another λ without fitting again."""

    def with_regularization(self, regularization: float) -> InverseOperator: ...


@runtime_checkable
class Sweepable(Protocol):
    """Capability of an inverse: solve for several λ together, for less than one solve each."""

    def solve_sweep(
        self, columns: Float[Tensor, "P k"], regularizations: Sequence[float]
    ) -> Sequence[Solution]: ...


@runtime_checkable
class WarmStart(Protocol):
    """Capability of an inverse: solve from a first guess for every right-hand side."""

    def solve_from(self, columns: Float[Tensor, "P k"], start: Float[Tensor, "P k"]) -> Solution:
        """The solution for ``columns``; a ``start`` that is worse than zero does no harm."""
        ...


@runtime_checkable
class Preconditioning(Protocol):
    """Capability of an inverse: another form of it, which is the better preconditioner."""

    def preconditioner(self) -> InverseOperator: ...


@dataclass(frozen=True)
class SavedState:
    """What an inverse is made of beside its operator, its λ and its solver's options.

    Attributes:
        tensors: By name. Their values, strides and device's order of dimensions come back as they were.
        values: What JSON holds: strings, finite numbers, booleans, ``None``, and lists and mappings of these.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def under(self, name: str) -> SavedState:
        """The same as a part, called ``name``, of what a larger inverse is made of."""
        return SavedState({f"{name}.{key}": t for key, t in self.tensors.items()}, {name: dict(self.values)})

    def __or__(self, other: SavedState) -> SavedState:
        return SavedState({**self.tensors, **other.tensors}, {**self.values, **other.values})

    def part(self, name: str) -> SavedState | None:
        """What :meth:`under` made a part of this; ``None`` where there is no part of that name."""
        if name not in self.values:
            return None
        prefix = f"{name}."
        tensors = {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}
        return SavedState(tensors, self.values[name])


@runtime_checkable
class Persistent(Protocol):
    """Capability of an inverse: it can be written to disk, where its solver offers :class:`Restoring`.

    Optional attribute: ``multiplies``, ``True`` where every solve multiplies with the operator, so that a model
    that is loaded needs its training data again. Left out it is ``False``.
    """

    def state(self) -> SavedState:
        """What :meth:`Restoring.restore` makes the same inverse of; tensors are not copied."""
        ...


@runtime_checkable
class Restoring(Protocol):
    """Capability of a solver: make an inverse again of what was written to disk, without fitting."""

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> InverseOperator:
        """The inverse that ``state`` was taken of, equal to the last bit.

        The solver has the options it was fitted with, ``operator`` is the same curvature, and tensors are on
        its device. Of a model that was loaded without its data, ``operator`` has no products. An inverse that
        offers :class:`Preconditioning` is restored in either form.
        """
        ...


@runtime_checkable
class Solver(Protocol):
    """A method of inverting: frozen options, no state.

    A solver never sees models, data, blocks or scores. Its randomness comes from a ``seed`` option
    through a local ``torch.Generator``. Optional class attributes:

    - ``requires``: capability protocols the operator must offer, checked before ``fit`` is called;
    - ``fixed``: ``True`` where the inverse is one fixed symmetric positive definite matrix, so that
      the solver can serve as a preconditioner;
    - ``default_source``: name of the curvature source this method is made for;
    - ``refines``: ``True`` where its inverse offers :class:`WarmStart`, so that it can refine the
      solutions of another solver. An option ``preconditioner`` gets that solver's inverse, if it is ``fixed``;
    - ``takes_indefinite``: ``True`` where negative eigenvalues of ``C + λI`` are no failure of the method: it
      solves such systems like any, or puts something positive definite in the place of ``C`` whatever that is.
      Nobody is warned of them beforehand; left out, a solver that meets them has to report it;
    - ``finds_indefinite``: ``True`` where ``fit`` looks for them by itself, in the curvature of all data:
      nobody is warned beforehand of what a sample shows;
    - ``least_dtype``: the coarsest precision in which it computes, whatever that of the operator: a λ that is
      lost in the rounding of the operator's dtype may not be in this one. Left out, that of the operator;
    - ``accuracy``: the largest relative residual ``‖b − (C + λI)x‖ / ‖b‖``, for ``‖b‖ ≥ 1``, of a
      right-hand side that it calls solved, as far as the dtype allows; ``None`` where the inverse is that
      of another matrix, an approximation of ``C``. Left out, the conformance kit asks for 1e-6.
    """

    def fit(self, operator: LinearOperator, regularization: float) -> InverseOperator: ...


@runtime_checkable
class HessianSource(Protocol):
    """A choice of curvature: frozen options, no state."""

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The curvature matrix of the mean loss of ``problem`` with respect to ``parameters``."""
        ...


Unit = TypeVar("Unit")
Result = TypeVar("Result")


@runtime_checkable
class Executor(Protocol):
    """Where work is done: frozen options, no state.

    A unit is a block of training points, and ``job`` gives its scores with a group of test points; or a unit
    is a few test points, and ``job`` solves for them. ``job`` and units can be pickled, and each unit is worked
    on by itself, so that results do not depend on where and in which order that is.

    Under an executor for many processes that all run the same program, such as those that ``torchrun`` starts,
    ``run`` is called in every one of them with the same units in the same order, and gives all
    results to each.

    Optional attribute: ``workers``, how many units are worked on at the same time; 1 where it is left out. Test
    points are solved for in as many parts.

    A job may have the attribute ``alone``. Where that is ``False``, the job takes products with a curvature
    whose data is divided between processes, and has to be done in this one: for all units, in their order. It
    may have a ``label``, a word for what it does.
    """

    def run(self, job: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Every unit with its result, once each, in whatever order they are done.

        ``units`` is to be read no further ahead than the workers need, since each unit holds data. What
        ``job`` or ``units`` raises is raised here as it is, and no work goes on after that, or after the
        iterator was closed.
        """
        ...


@runtime_checkable
class Fitting(Protocol):
    """Capability of an executor: a fit with it takes place where it works."""

    def processes(self) -> Processes | None:
        """The processes between which the training data is divided; ``None``: this one has all of it."""
        ...


class InfluenceMode(str, Enum):
    """What a training point is varied in.

    ``Up``: its weight in the training loss. ``Perturbation``: its input, one score per feature.
    Wherever a mode is taken, the strings ``"up"`` and ``"perturbation"`` are taken too.
    """

    Up = "up"
    Perturbation = "perturbation"

    @classmethod
    def parse(cls, mode: InfluenceMode | str) -> InfluenceMode:
        """The mode of that name; an unknown one raises :class:`InvalidInputError`."""
        try:
            return cls(mode)
        except ValueError:
            known = [member.value for member in cls]
            raise InvalidInputError(
                f"Unknown influence mode {mode!r}; expected one of {known} or a member of "
                f"InfluenceMode.{did_you_mean(mode, known)}"
            ) from None


@runtime_checkable
class InfluenceFunctionModel(Protocol):
    """The framework-neutral face of an influence model: arrays in, arrays out.

    ``score(z_test, z) = ∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ℓ(z)`` in mode Up, with ``∇ₓ∇ℓ(z)`` in place of
    ``∇ℓ(z)`` in mode Perturbation.
    """

    @property
    def is_fitted(self) -> bool: ...

    def fit(self, data: Any) -> Self: ...

    def influences(
        self, x_test: Any, y_test: Any, x: Any = None, y: Any = None, mode: InfluenceMode | str = ...
    ) -> Any: ...

    def influence_factors(self, x: Any, y: Any) -> Any: ...

    def influences_from_factors(
        self, z_test_factors: Any, x: Any, y: Any, mode: InfluenceMode | str = ...
    ) -> Any: ...
