"""The solver ``arnoldi``: the largest eigenpairs of the curvature, and the inverse they give."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from influence_framework.costs import Cost, Workload
from influence_framework.errors import (
    ConvergenceWarning,
    IndefiniteOperatorWarning,
    InvalidInputError,
    NonFiniteError,
    did_you_mean,
)
from influence_framework.lowrank import LowRankInverse
from influence_framework.operators import DerivedOperator, to_dense
from influence_framework.protocols import LinearOperator, SavedState
from influence_framework_arnoldi.arpack import arpack
from influence_framework_arnoldi.cost import cost_of_arnoldi, rank_for
from influence_framework_arnoldi.cuda import cupy, cupy_for
from influence_framework_arnoldi.lanczos import lowest_beside, thick_restart_lanczos
from influence_framework_arnoldi.pairs import ATTAINABLE, Backend, Eigenpairs, Wanted

BACKENDS: Mapping[str, Backend] = {"torch": thick_restart_lanczos, "arpack": arpack, "cupy": cupy}
LEAST = {"rank": 1, "krylov_dimension": 2, "max_iter": 1, "seed": 0, "block_size": 1}
"""The least value of each option that is an integer."""


@dataclass(frozen=True)
class ArnoldiSolver:
    """The ``rank`` eigenpairs ``(Θ, U)`` of largest magnitude, and ``1/λ`` for all that is left.

    The inverse is ``U (Θ + λI)⁻¹ Uᵀ + λ⁻¹ (I − U Uᵀ)``, exact where the rest of the spectrum is zero. An
    eigenvalue ``θ`` that was left out is inverted as ``1/λ`` in place of ``1/(θ + λ)``: choose a rank at
    which ``|θ|`` has fallen below λ. Nothing is said where it has not: ``values[-1]`` of the inverse tells.
    Only one below ``−λ`` is warned of, if the search for the pairs comes upon it. Without regularisation, or
    with ``complement=False``, nothing of a right-hand side outside the span of ``U`` comes through, as in
    Schioppa, Zablotskaia, Vilar and Sokolov (2022), "Scaling Up Influence Functions".

    A pair has converged when ``‖C u − θ u‖ ≤ tol·|θ|``, as in ARPACK (Lehoucq, Sorensen and Yang 1998,
    "ARPACK Users' Guide", §4.6), or ``≤ 20 ε |θ₁|`` with the precision ε of the dtype, below which it
    cannot be told from rounding. There is then an eigenvalue within this distance of ``θ``. Eigenvalues
    that rounding does not tell from zero are returned as zero.

    The matrix is formed and decomposed whole where the basis would fill it, that is for small blocks
    and for a ``rank`` of about half of their size.

    Attributes:
        rank: Number of eigenpairs, ``r``; all of them where the operator is smaller.
        krylov_dimension: Basis vectors kept at a time, ``m > r``, which take ``m·P`` numbers; where left out
            ``max(2·r + 1, 20)``, or ``r + 10·block_size`` if that is more. Never below ``r + block_size``.
        tol: Residual of a pair relative to its eigenvalue.
        max_iter: How often the basis may be filled, the iterations of ARPACK; ``10·P`` where left out.
        backend: ``"torch"`` (block Lanczos on any device), ``"arpack"`` (SciPy, on the CPU) or ``"cupy"``
            (on an NVIDIA GPU). Only ``"torch"`` goes on to look for copies of multiple eigenvalues, at the
            price of some ten products; the others spend as many on negative eigenvalues alone, where the
            operator does not claim to have none.
        complement: Apply ``1/λ`` outside the span of the eigenvectors.
        seed: Of the random start vectors.
        block_size: Columns a product, for ``"torch"`` only; where left out 1 on the CPU, where further
            columns cost as much as the first and converge more slowly, and 4 elsewhere.
        progress: Show a bar that counts columns multiplied.
    """

    rank: int = 10
    krylov_dimension: int | None = None
    tol: float = 1e-6
    max_iter: int | None = None
    backend: str = "torch"
    complement: bool = True
    seed: int = 0
    block_size: int | None = None
    progress: bool = False

    accuracy: ClassVar[None] = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInputError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("complement", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.krylov_dimension is not None and self.krylov_dimension <= self.rank:
            raise InvalidInputError(
                f"krylov_dimension={self.krylov_dimension} leaves no room for rank={self.rank} eigenpairs: use "
                f"at least {2 * self.rank + 1}, or leave it out."
            )
        if isinstance(self.tol, bool) or not isinstance(self.tol, int | float) or not 0 <= self.tol < 1:
            raise InvalidInputError(f"tol is relative and must lie in [0, 1), got {self.tol!r}.")
        if self.backend not in BACKENDS:
            raise InvalidInputError(
                f"Unknown backend {self.backend!r}; expected one of {list(BACKENDS)}."
                f"{did_you_mean(self.backend, BACKENDS)}"
            )

    def fit(self, operator: LinearOperator, regularization: float) -> ArnoldiInverse:
        """Find the eigenpairs, and check their residuals with one more product.

        Raises:
            InvalidInputError: The dtype is neither float32 nor float64, or the backend cannot run here.
            NonFiniteError: A product contains NaN or infinity.
            SingularOperatorError: λ cancels a negative eigenvalue.

        Warns:
            ConvergenceWarning: Some pairs miss the tolerance; they are kept as they are.
            IndefiniteOperatorWarning: ``C + λI`` has a negative eigenvalue, among the pairs or beside them.
        """
        if operator.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(
                f"'arnoldi' works in float32 and float64, not {operator.dtype}: convert model and data."
            )
        if self.backend == "cupy":
            cupy_for(operator)  # before small matrices are decomposed without it
        size = operator.shape[0]
        wanted = self._wanted(operator)
        with tqdm(desc="Arnoldi", unit="product", disable=not self.progress) as bar:
            watched = WatchedOperator(operator, bar)
            if wanted.krylov_dimension + wanted.block_size >= size:
                pairs = _decompose(operator, wanted.rank)
            else:
                pairs = BACKENDS[self.backend](watched, wanted)
            pairs, errors = _measured(watched, pairs, self.seed)
            lowest = _lowest(watched, wanted, pairs)
        magnitudes = pairs.values.abs()
        self._report(wanted, magnitudes, errors, operator.dtype)
        rounding = ATTAINABLE * torch.finfo(operator.dtype).eps * max(magnitudes.tolist(), default=0.0)
        return ArnoldiInverse(
            operator,
            regularization,
            values=torch.where(magnitudes <= rounding, 0.0, pairs.values),
            vectors=pairs.vectors,
            # All eigenvectors leave no complement.
            tail=0.0 if self.complement and len(magnitudes) < size else None,
            errors=errors,
            lowest=lowest if lowest < -rounding else 0.0,
        )

    def cost(self, workload: Workload) -> Cost:
        """Products of a few times the rank, and what keeps the basis orthonormal."""
        return cost_of_arnoldi(workload, self._sized(workload.parameters, workload.device))

    @staticmethod
    def advised(workload: Workload) -> list[dict[str, Any]]:
        """With a rank that reaches down to λ, as far as the spectrum tells."""
        return [{"rank": rank_for(workload), "tol": 1e-3}]

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> ArnoldiInverse:
        """The eigenpairs as they were."""
        return ArnoldiInverse.restored(operator, regularization, state, lowest=state.values["lowest"])

    def _wanted(self, operator: LinearOperator) -> Wanted:
        return self._sized(operator.shape[0], operator.device.type)

    def _sized(self, size: int, device: str) -> Wanted:
        rank = min(self.rank, size)
        block_size = self.block_size or (1 if device == "cpu" else 4)
        dimension = self.krylov_dimension or max(2 * rank + 1, 20, rank + 10 * block_size)
        return Wanted(
            rank=rank,
            krylov_dimension=min(max(dimension, rank + block_size), size),
            tol=self.tol,
            max_iter=self.max_iter or 10 * size,
            block_size=block_size,
            seed=self.seed,
        )

    def _report(self, wanted: Wanted, magnitudes: Tensor, errors: Tensor, dtype: torch.dtype) -> None:
        """Warn of pairs that are missing, or whose residuals are above the tolerance."""
        missed = errors > wanted.limits(magnitudes, dtype)
        converged = len(errors) - int(missed.sum())
        if converged == wanted.rank:
            return
        worst = (errors / magnitudes)[missed].max().item() if missed.any() else 0.0
        warnings.warn(
            f"{converged} of {wanted.rank} eigenpairs converged to tol = {self.tol:g}. The inverse consists of "
            f"{len(errors)}, the others with relative residuals of up to {worst:.1e}. Raise max_iter or "
            "krylov_dimension, or loosen tol.",
            ConvergenceWarning,
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class ArnoldiInverse(LowRankInverse):
    """The inverse on the span of eigenvectors, and one value outside of it.

    Attributes:
        errors: ``‖C u − θ u‖`` of each pair, ``(r,)`` float64, from products with ``C`` itself.
        lowest: The least Ritz value of ``C`` seen, within the pairs or not; 0 where it is not negative.
    """

    errors: Float[Tensor, " r"] = field(kw_only=True)
    lowest: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A Rayleigh quotient below zero proves that there is such an eigenvalue, whatever its residual.
        lowest = min([self.lowest, *self.values.tolist()])
        if lowest + self.regularization >= 0:
            return
        count = int((self.values + self.regularization < 0).sum())
        warnings.warn(
            f"C + λI is not positive definite at λ = {self.regularization:g}: of the {len(self.values)} "
            f"eigenvalues of C that the inverse is made of, {count} lie below −λ, and the most negative of all "
            f"is at most {lowest:.4g}. Scores along such directions have the opposite sign of a minimum's. Use "
            f"the source 'gauss_newton', or hessian_regularization ≥ {-2 * lowest:.3g}.",
            IndefiniteOperatorWarning,
            stacklevel=5,
        )

    def state(self) -> SavedState:
        """The eigenpairs, and the least Ritz value."""
        return super().state() | SavedState(values={"lowest": self.lowest})

    @property
    def pair_residuals(self) -> Float[Tensor, " r"]:
        """``‖C u − θ u‖`` of each pair, to rounding; so near to ``θ`` lies an eigenvalue of ``C``."""
        return self.errors


@dataclass(frozen=True, eq=False)
class WatchedOperator(DerivedOperator):
    """An operator whose products are counted and checked.

    Attributes:
        base: The operator.
        bar: Advanced by the columns multiplied.
    """

    base: LinearOperator
    bar: tqdm[Any]

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        product = (self.base @ columns).detach()
        if not torch.isfinite(product).all():
            raise NonFiniteError("A curvature product contains NaN or infinity: check data and parameters.")
        self.bar.update(columns.shape[1])
        return product


def _decompose(operator: LinearOperator, rank: int) -> Eigenpairs:
    """The ``rank`` pairs of largest magnitude from the whole matrix."""
    matrix = to_dense(operator).double()
    if not torch.isfinite(matrix).all():
        raise NonFiniteError("The curvature matrix contains NaN or infinity: check data and parameters.")
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return replace(Eigenpairs.largest(rank, values, vectors.to(operator.dtype)), lowest=values[0].item())


def _lowest(operator: WatchedOperator, wanted: Wanted, pairs: Eigenpairs) -> float:
    """The least Ritz value: the backend's own, else from further products unless ``C`` claims to have none."""
    if pairs.lowest is not None:
        return pairs.lowest
    if getattr(operator.base, "positive_semidefinite", False):
        return 0.0
    return lowest_beside(operator, wanted, pairs)


def _measured(operator: LinearOperator, pairs: Eigenpairs, seed: int) -> tuple[Eigenpairs, Float[Tensor, " r"]]:
    """The pairs and their residuals: the backend's own, if one more product bears them out, else measured.

    With random signs ``s`` the residual of the combination ``U s`` has the mean square ``Σᵢ ‖C uᵢ − θᵢ uᵢ‖²``.
    """
    vectors, values = pairs.vectors, pairs.values.to(pairs.vectors)
    if pairs.residuals is not None:
        generator = torch.Generator("cpu").manual_seed(seed)
        signs = torch.randint(0, 2, values.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(values)
        combined = _norms(operator @ (vectors @ signs) - vectors @ (values * signs))
        rounding = ATTAINABLE * torch.finfo(values.dtype).eps * torch.linalg.vector_norm(pairs.values)
        if combined <= 3 * torch.linalg.vector_norm(pairs.residuals) + rounding:
            return pairs, pairs.residuals
    # In float32 a backend's vectors and values have errors of their own. One step of Newton and Schulz makes
    # the vectors orthonormal; their Rayleigh quotients have the least residuals.
    vectors = torch.addmm(vectors, vectors, vectors.T @ vectors, beta=1.5, alpha=-0.5)
    images = operator @ vectors
    values = (vectors * images).sum(0)
    return replace(pairs, values=values.double(), vectors=vectors), _norms(images - vectors * values)


def _norms(columns: Float[Tensor, "P *k"]) -> Float[Tensor, " *k"]:
    norms: Tensor = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
    return norms
