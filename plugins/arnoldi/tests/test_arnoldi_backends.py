"""The eigenpairs: every backend against NumPy, multiple eigenvalues, breakdowns, seeds and options."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from influence_framework_arnoldi import ArnoldiInverse, ArnoldiSolver, cuda, lanczos
from influence_framework_arnoldi.pairs import Wanted
from torch import Tensor

from influence_framework import DenseOperator, InvalidInputError, Operator
from influence_framework.testing import ProductsOnly, symmetric

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OPTIONS: list[dict[str, Any]] = [
    *({}, {"block_size": 3}, {"backend": "arpack"}, {"krylov_dimension": 9}, {"krylov_dimension": 70})
]
CASES = [
    (device, options)
    for device in DEVICES
    for options in (OPTIONS if device == "cpu" else [*OPTIONS, {"backend": "cupy"}])
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def fit(matrix: Tensor | Operator, **options: Any) -> ArnoldiInverse:
    """At a λ that makes any spectrum here definite."""
    return ArnoldiSolver(**options).fit(DenseOperator(matrix) if isinstance(matrix, Tensor) else matrix, 1e3)


def largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pairs of largest magnitude by NumPy."""
    values, vectors = np.linalg.eigh(matrix.cpu().double().numpy())
    order = np.argsort(-np.abs(values))[:rank]
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])


@DTYPES
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("device", "options"), CASES, ids=str)
def test_agrees_with_numpy_on_indefinite_matrices(
    options: dict[str, Any], seed: int, device: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(90, 90, generator=generator, dtype=torch.float64)
    matrix = (factor + factor.T).to(device, dtype)
    inverse = fit(matrix, rank=6, tol=1e-8, **options)
    values, vectors = largest(matrix, 6)
    assert inverse.values.dtype == torch.float64
    # The square of the tolerance over the gap to the next eigenvalue, or rounding.
    accuracy = (1e-12 if dtype == torch.float64 else 1e-6) * values[0].abs().item()
    torch.testing.assert_close(inverse.values.cpu(), values, rtol=0.0, atol=accuracy)
    # Eigenvectors: to the residual over the gap to the next eigenvalue.
    assert inverse.vectors.dtype == dtype
    overlaps = (inverse.vectors.cpu().double() * vectors).sum(0).abs()
    torch.testing.assert_close(overlaps, torch.ones(6).double(), rtol=0.0, atol=1e-4)
    gram = inverse.vectors.cpu().double().T @ inverse.vectors.cpu().double()
    torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0.0, atol=20 * torch.finfo(dtype).eps)


def test_float32_eigenvectors_are_orthonormal_to_rounding_for_arpack_too() -> None:
    matrix = torch.diag(torch.logspace(0, -6, 3000, dtype=torch.float64)).float()
    vectors = fit(matrix, rank=30, backend="arpack").vectors.double()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(30).double(), rtol=0.0, atol=5e-7)


@DTYPES
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize(
    "leading", [[10.0] * 3 + [5.0] * 3 + [3.0] * 3, [4.0] * 9, [-7.0] * 2 + [7.0] * 2 + [6.0] * 5], ids=str
)
def test_all_copies_of_multiple_eigenvalues_are_found(
    leading: list[float], block_size: int, dtype: torch.dtype
) -> None:
    matrix = symmetric([*leading, *np.linspace(-1, 1, 291)]).to(dtype)
    inverse = fit(matrix, rank=9, tol=1e-3, block_size=block_size)
    # The error is the square of the residual over the gap.
    torch.testing.assert_close(
        inverse.values.sort().values, torch.tensor(leading).double().sort().values, rtol=1e-5, atol=0.0
    )
    vectors = inverse.vectors.double()
    true = torch.linalg.norm(matrix.double() @ vectors - vectors * inverse.values, dim=0)
    rounding = 20 * torch.finfo(dtype).eps * abs(leading[0])
    torch.testing.assert_close(inverse.pair_residuals, true, rtol=1e-6, atol=rounding)
    gram = inverse.vectors.T @ inverse.vectors
    torch.testing.assert_close(gram, torch.eye(9).to(dtype), rtol=0.0, atol=20 * torch.finfo(dtype).eps)


def test_curvature_of_several_outputs_has_multiple_eigenvalues() -> None:
    """``I ⊗ E[xxᵀ]``, the curvature of a linear model with squared error: every eigenvalue comes c times."""
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(0, -2, 40, dtype=torch.float64)
    matrix = torch.block_diag(*[x.T @ x / 50] * 5)
    inverse = fit(matrix, rank=15)
    exact = torch.linalg.eigvalsh(x.T @ x / 50).flip(0)[:3]
    torch.testing.assert_close(inverse.values, exact.repeat_interleave(5), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_multiples_of_the_identity(value: float, block_size: int) -> None:
    """Every product lies in the basis already: each next direction is a random one."""
    inverse = fit(value * torch.eye(200, dtype=torch.float64), rank=7, block_size=block_size)
    torch.testing.assert_close(inverse.values, torch.full((7,), value).double())
    torch.testing.assert_close(inverse.vectors.T @ inverse.vectors, torch.eye(7).double())
    assert (inverse.pair_residuals <= 1e-13).all()


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_start_inside_an_invariant_subspace_finds_what_is_outside(
    block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.diag(torch.arange(100, 0, -1).double())
    draw, starts = lanczos.random_vector, []

    def inside_first(operator: Any, generator: torch.Generator) -> Tensor:
        starts.append(draw(operator, generator))
        if len(starts) <= block_size:
            starts[-1][torch.arange(100) != 40 + len(starts)] = 0.0
        return starts[-1]

    monkeypatch.setattr(lanczos, "random_vector", inside_first)
    inverse = fit(matrix, rank=5, block_size=block_size)
    torch.testing.assert_close(inverse.values, torch.arange(100, 95, -1).double())


@DTYPES
def test_many_restarts_keep_the_basis_orthonormal(dtype: torch.dtype) -> None:
    matrix = symmetric(torch.linspace(0, 1, 300)).to(dtype)
    operator = ProductsOnly(matrix)
    inverse = fit(operator, rank=4, krylov_dimension=7)
    assert len(operator.columns) > 200
    gram = inverse.vectors.double().T @ inverse.vectors.double()
    torch.testing.assert_close(gram, torch.eye(4).double(), rtol=0.0, atol=20 * torch.finfo(dtype).eps)
    torch.testing.assert_close(inverse.values, largest(matrix, 4)[0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", ["torch", "arpack"])
def test_pitfall_the_seed_is_what_starts_differ_by(backend: str) -> None:
    matrix = symmetric([9.0, -7.0, 4.0, 2.0, *np.linspace(0, 0.5, 60)])
    operators = [ProductsOnly(matrix) for _ in range(3)]
    state = torch.get_rng_state()
    first, again, other = (
        fit(operator, rank=4, tol=1e-9, backend=backend, seed=seed)
        for operator, seed in zip(operators, (3, 3, 4), strict=True)
    )
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(operators[0].columns[0], operators[2].columns[0])
    torch.testing.assert_close(first.values, other.values)
    columns = torch.ones(64, 2, dtype=torch.float64)
    torch.testing.assert_close(first @ columns, other @ columns)
    assert torch.equal(torch.get_rng_state(), state)


def test_rank_tolerance_and_dimension_decide_the_work() -> None:
    matrix = symmetric(torch.logspace(1, -4, 200))

    def products(**options: Any) -> int:
        operator = ProductsOnly(matrix)
        fit(operator, **options)
        return sum(operator.widths)

    work = products(rank=8)
    assert products(rank=8, tol=1e-3) < work < products(rank=8, tol=1e-11)
    assert products(rank=3) < work < products(rank=20)
    assert products(rank=8, krylov_dimension=9) > work
    assert len(fit(matrix, rank=3).values) == 3


@pytest.mark.parametrize("block_size", [1, 5])
def test_block_size_is_the_columns_of_a_product(block_size: int) -> None:
    operator = ProductsOnly(symmetric(torch.logspace(1, -4, 200)))
    fit(operator, rank=8, block_size=block_size)
    # The last product is the check of the residuals.
    assert set(operator.widths[:-1]) == {block_size}
    assert operator.widths[-1] == 1


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = symmetric(torch.logspace(1, -4, 100))
    fit(matrix, rank=3)
    assert capsys.readouterr().err == ""
    fit(matrix, rank=3, progress=True)
    assert "Arnoldi" in capsys.readouterr().err


def test_steps_of_the_search_keep_the_probability_that_is_promised() -> None:
    for size in (30, 10**4, 10**8):
        for block_size in (1, 4):
            steps = lanczos.search_steps(size, block_size)
            missed = 1.648 * math.sqrt(size) * math.exp(-math.sqrt(1 / 3) * (2 * steps - 1))
            assert missed**block_size <= 0.01
    assert lanczos.search_steps(10**4, 4) < lanczos.search_steps(10**4, 1)


class OnCuda(ProductsOnly):
    """Claims to be on a CUDA device; never multiplied."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize(
    ("available", "operator", "message"),
    [
        (False, ProductsOnly, "needs a CUDA device, and PyTorch finds none"),
        (True, ProductsOnly, r"the curvature is on cpu: move the model and its data with .to\('cuda'\)"),
        (True, OnCuda, "needs CuPy, which cannot be imported .*Install the package .*cupy-cuda12x"),
    ],
    ids=["no CUDA", "on the CPU", "no CuPy"],
)
def test_cupy_says_what_it_lacks(
    available: bool, operator: type[ProductsOnly], message: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InvalidInputError, match=message + ".*backend 'torch'"):
        fit(operator(torch.eye(size)), rank=2, backend="cupy")


@DTYPES
@pytest.mark.parametrize("max_iter", [1, 50])
def test_steps_of_cupy_with_numpy_in_its_place(
    max_iter: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy and SciPy have the interfaces that the backend uses of CuPy, but for the units of ``tol``."""
    namespace = SimpleNamespace(from_dlpack=np.from_dlpack, cuda=SimpleNamespace(Device=nullcontext))
    calls: list[dict[str, Any]] = []

    def eigsh(matrix: Any, **options: Any) -> Any:
        calls.append(options)
        relative = min(options["tol"] / 9.0, 0.5)
        return scipy.sparse.linalg.eigsh(matrix, **(options | {"tol": relative, "maxiter": None}))

    linalg = SimpleNamespace(LinearOperator=scipy.sparse.linalg.LinearOperator, eigsh=eigsh)
    monkeypatch.setattr(cuda, "cupy_for", lambda operator: (namespace, linalg))
    matrix = symmetric([9.0, -7.0, 4.0, 2.0, *np.linspace(0, 0.5, 60)]).to(dtype)
    wanted = Wanted(rank=4, krylov_dimension=20, tol=1e-4, max_iter=max_iter, block_size=1, seed=0)
    pairs = cuda.cupy(DenseOperator(matrix), wanted)
    torch.testing.assert_close(pairs.values, torch.tensor([9.0, -7.0, 4.0, 2.0]).double(), rtol=1e-5, atol=0.0)
    assert pairs.vectors.dtype == dtype
    assert calls[0]["tol"] == float("inf")
    assert calls[0]["maxiter"] == 20
    if max_iter > 1:
        assert calls[1]["tol"] == pytest.approx(0.5 * 1e-4 * 2.0, rel=1e-2)
        assert calls[1]["maxiter"] == 49 * 20
    assert len(calls) == min(max_iter, 2)
