"""Operators, their algebra and their bridges against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from influence_framework import (
    BlockDiagonalOperator,
    Dense,
    DenseOperator,
    Diagonal,
    InvalidInputError,
    LinearOperator,
    MissingCapabilityError,
    NonFiniteError,
    Operator,
    from_scipy,
    to_scipy,
)
from influence_framework.inverses import relative_residuals
from influence_framework.operators import (
    ScaledOperator,
    ShiftedOperator,
    SumOperator,
    require_capabilities,
    to_dense,
)
from tests import cases
from tests.reference import assert_close

EXACT = 1e-12


def symmetric(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return ((matrix + matrix.T) / 2).to(dtype)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Duck:
    """An operator by its products alone, without the base class."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.widths: list[int] = []

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.matrix), len(self.matrix))

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def __matmul__(self, columns: Tensor) -> Tensor:
        self.widths.append(columns.shape[1] if columns.ndim == 2 else 1)
        return self.matrix @ columns


Algebra = Callable[[Any, Any], Any]
ALGEBRA: dict[str, tuple[Algebra, Algebra]] = {
    "itself": (lambda a, b: a, lambda a, b: a),
    "plus": (lambda a, b: a + b, lambda a, b: a + b),
    "minus": (lambda a, b: a - b, lambda a, b: a - b),
    "negated": (lambda a, b: -a, lambda a, b: -a),
    "scaled left": (lambda a, b: 2.5 * a, lambda a, b: 2.5 * a),
    "scaled right": (lambda a, b: a * 3, lambda a, b: a * 3),
    "scaled by zero": (lambda a, b: 0.0 * a, lambda a, b: 0.0 * a),
    "shifted": (lambda a, b: a.shift(0.5), lambda a, b: a + 0.5 * torch.eye(len(a), dtype=a.dtype)),
    "all at once": (
        lambda a, b: 2 * (a - ScaledOperator(b, 0.25)).shift(-1) + b,
        lambda a, b: 2 * (a - 0.25 * b - torch.eye(len(a), dtype=a.dtype)) + b,
    ),
    "sum of three": (lambda a, b: SumOperator((a, b, a)), lambda a, b: 2 * a + b),
    "side by side": (
        lambda a, b: BlockDiagonalOperator({"a": a, "b": b, "again": a}),
        lambda a, b: torch.block_diag(a, b, a),
    ),
}


@given(
    size=st.integers(1, 6),
    width=st.one_of(st.none(), st.integers(0, 9)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@pytest.mark.parametrize("name", ALGEBRA)
def test_algebra_agrees_with_matrices(name: str, size: int, width: int | None, dtype: torch.dtype) -> None:
    composed, plain = ALGEBRA[name]
    a, b = symmetric(size, 0, dtype), symmetric(size, 1, dtype)
    expected = plain(a, b)
    columns = normal(len(expected), *([] if width is None else [width]), dtype=dtype)
    # A sum of at most six terms of P products each.
    tolerance = 10 * 6 * size * torch.finfo(dtype).eps
    for other in (DenseOperator(b), Duck(b)):
        operator = composed(DenseOperator(a), other)
        assert isinstance(operator, LinearOperator)
        assert operator.shape == tuple(expected.shape)
        assert operator.dtype == dtype
        product = operator @ columns
        assert product.shape == columns.shape
        assert product.dtype == dtype
        scale = expected.double().abs() @ columns.double().abs()
        error = (product.double() - expected.double() @ columns.double()).abs()
        assert (error <= tolerance * (scale + 1)).all()


def test_all_columns_go_through_every_term_at_once() -> None:
    duck = Duck(symmetric(4))
    operator = (DenseOperator(symmetric(4)) + duck).shift(1.0) * 2.0
    _ = operator @ normal(4, 7)
    _ = BlockDiagonalOperator({"a": duck, "b": duck}) @ normal(8, 5)
    assert duck.widths == [7, 5, 5]


def test_no_columns_cost_no_product() -> None:
    duck = Duck(symmetric(4))
    assert (ScaledOperator(duck, 2.0) @ normal(4, 0)).shape == (4, 0)
    assert duck.widths == []


def test_products_leave_their_argument_alone() -> None:
    columns = normal(4, 2)
    kept = columns.clone()
    for composed, _ in ALGEBRA.values():
        operator = composed(DenseOperator(symmetric(4)), DenseOperator(symmetric(4, 1)))
        product = operator @ (columns if operator.shape[0] == 4 else columns.repeat(3, 1))
        product.zero_()
        assert torch.equal(columns, kept)
    no_columns = normal(4, 0)
    assert (DenseOperator(symmetric(4)) @ no_columns).data_ptr() == 0


@pytest.mark.parametrize("nonsense", [lambda a: a + 3, lambda a: a - 3, lambda a: a * "2", lambda a: a * a])
def test_other_arithmetic_is_a_type_error(nonsense: Callable[[Operator], object]) -> None:
    with pytest.raises(TypeError):
        nonsense(DenseOperator(symmetric(3)))


def test_capabilities_of_a_dense_operator() -> None:
    matrix = symmetric(4)
    operator = DenseOperator(matrix)
    assert isinstance(operator, Dense)
    assert isinstance(operator, Diagonal)
    # Both are the caller's to overwrite.
    operator.diagonal().zero_()
    operator.to_dense().zero_()
    assert torch.equal(operator.matrix, symmetric(4))
    require_capabilities("A test", operator, (Dense, Diagonal))


def test_a_missing_capability_is_named() -> None:
    with pytest.raises(
        MissingCapabilityError, match=r"A test needs .* offers Diagonal; ShiftedOperator does not"
    ):
        require_capabilities("A test", DenseOperator(symmetric(3)).shift(1.0), (Diagonal,))


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 8, 100])
def test_to_dense_by_blocks_of_columns(block_size: int) -> None:
    duck = Duck(symmetric(7))
    assert torch.equal(to_dense(duck, block_size=block_size), duck.matrix)
    assert max(duck.widths) == min(block_size, 7)
    assert sum(duck.widths) == 7


def test_to_dense_of_a_dense_operator_is_a_copy() -> None:
    operator = DenseOperator(symmetric(3))
    to_dense(operator).zero_()
    assert torch.equal(operator.matrix, symmetric(3))


ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a NumPy array": (lambda: np.ones(3), r"torch tensors, not ndarray; .*to_scipy"),
    "a list": (lambda: [1.0, 2.0, 3.0], "torch tensors, not list"),
    "a short vector": (lambda: torch.ones(2).double(), r"vector \(3,\) or columns \(3, k\), got shape \(2,\)"),
    "rows": (lambda: torch.ones(2, 3).double(), r"\(2, 3\).*pass the transpose"),
    "a number": (lambda: torch.tensor(1.0).double(), r"got shape \(\)"),
    "three dimensions": (lambda: torch.ones(3, 3, 3).double(), r"got shape \(3, 3, 3\)"),
    "float32": (lambda: torch.ones(3), r"works in torch.float64 .* columns are torch.float32 .*\.to\("),
    "integers": (lambda: torch.ones(3, dtype=torch.int64), "columns are torch.int64"),
    "another device": (lambda: torch.ones(3, device="meta").double(), "on cpu, .* on meta"),
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("what", ARGUMENTS)
def test_a_wrong_argument_is_explained(what: str) -> None:
    make, message = ARGUMENTS[what]
    a = DenseOperator(symmetric(3))
    duck = Duck(symmetric(3))
    operators = [a, a + a, 2 * a, a.shift(1.0), BlockDiagonalOperator({"a": a}), ScaledOperator(duck, 1.0)]
    for operator in [*operators, from_scipy(symmetric(3).numpy())]:
        with pytest.raises(InvalidInputError, match=message):
            operator @ make()
    assert duck.widths == []


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseOperator(torch.ones(2, 3)), r"square matrix, got shape \(2, 3\)"),
        (lambda: DenseOperator(torch.ones(3)), r"square matrix, got shape \(3,\)"),
        (lambda: DenseOperator(torch.ones(2, 2, dtype=torch.int64)), "floating-point matrix, got torch.int64"),
        (lambda: DenseOperator(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), r"symmetric, but .*\(A \+ A.mT\) / 2"),
        (lambda: DenseOperator(symmetric(2)) + DenseOperator(symmetric(3)), r"must agree: got \(2, 2\)"),
        (lambda: DenseOperator(symmetric(2)) + DenseOperator(symmetric(2).float()), "must agree.*float32"),
        (
            lambda: BlockDiagonalOperator(
                {"a": DenseOperator(symmetric(2)), "b": DenseOperator(symmetric(2).float())}
            ),
            "must agree.*float32",
        ),
        (lambda: SumOperator(()), "at least one operator"),
        (lambda: BlockDiagonalOperator({}), "at least one operator"),
        (lambda: from_scipy(np.ones((2, 3))), r"square operator, got shape \(2, 3\)"),
        (lambda: from_scipy(np.eye(2, dtype=np.int64)), "real floating-point operator, got torch.int64"),
        (
            lambda: from_scipy(np.eye(2, dtype=np.complex128)),
            "real floating-point operator, got torch.complex128",
        ),
    ],
)
def test_a_wrong_operator_is_explained(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_shapes_are_checked_while_testing() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="P P"):
        DenseOperator(torch.ones(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"P \*k"):
        DenseOperator(symmetric(3)) @ torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dense_operator_is_finite(value: float) -> None:
    matrix = symmetric(3)
    matrix[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        DenseOperator(matrix)


def test_rounding_is_no_asymmetry() -> None:
    rows = normal(400, 30, dtype=torch.float32)
    uneven = rows.T @ rows
    uneven += uneven.abs().max() * 1e-7 * normal(30, 30, dtype=torch.float32).sign()
    DenseOperator(uneven)


@given(size=st.integers(1, 6), width=st.integers(1, 8), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_scipy_round_trip(size: int, width: int, dtype: torch.dtype) -> None:
    matrix, columns = symmetric(size, dtype=dtype), normal(size, width, dtype=dtype)
    duck = Duck(matrix)
    bridge = to_scipy(duck)
    assert bridge.dtype == matrix.numpy().dtype
    assert bridge.shape == (size, size)
    assert np.array_equal(bridge.matmat(columns.numpy()), (matrix @ columns).numpy())
    assert np.array_equal(bridge.rmatmat(columns.numpy()), (matrix @ columns).numpy())
    assert duck.widths == [width, width]
    vector = columns[:, 0].contiguous()
    for product in (bridge.matvec(vector.numpy()), bridge.rmatvec(vector.numpy())):
        assert np.array_equal(product, (matrix @ vector).numpy())
    assert bridge.matvec(vector.numpy()[:, None]).shape == (size, 1)
    back = from_scipy(bridge)
    assert back.dtype == dtype
    assert torch.equal(back @ columns, matrix @ columns)
    assert torch.equal(back @ vector, (matrix @ columns[:, :1])[:, 0])


def test_scipy_sees_half_precision_as_single() -> None:
    operator = DenseOperator(symmetric(3, dtype=torch.bfloat16))
    bridge = to_scipy(operator)
    assert bridge.dtype == np.float32
    product = bridge.matvec(np.ones(3))
    assert product.dtype == np.float32
    assert np.array_equal(product, (operator @ torch.ones(3, dtype=torch.bfloat16)).float().numpy())
    assert from_scipy(bridge, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_read_only_array_is_fine() -> None:
    vector = np.ones(3)
    vector.flags.writeable = False
    assert to_scipy(DenseOperator(symmetric(3))).matvec(vector).shape == (3,)


@pytest.mark.parametrize("wrap", [np.asarray, scipy.sparse.csr_array, scipy.sparse.linalg.aslinearoperator])
def test_from_any_scipy_matrix(wrap: Callable[[Any], Any]) -> None:
    matrix = symmetric(5)
    operator = from_scipy(wrap(matrix.numpy()))
    columns = normal(5, 3)
    assert_close(operator @ columns, matrix @ columns, EXACT)
    assert_close(operator @ columns[:, 0], matrix @ columns[:, 0], EXACT)
    single = from_scipy(wrap(matrix.numpy()), dtype=torch.float32)
    assert (single @ columns.float()).dtype == torch.float32


def test_eigenvalues_through_the_bridge() -> None:
    operator = cases.operator("hessian", cases.problem(cases.make("ragged_last_batch")))
    start = np.random.default_rng(0).normal(size=operator.shape[0])
    values = scipy.sparse.linalg.eigsh(to_scipy(operator), k=4, v0=start, return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(cases.dense("ragged_last_batch", "hessian"))
    largest = expected[expected.abs().argsort(descending=True)[:4]].sort().values
    assert_close(torch.from_numpy(np.sort(values)), largest, 1e-9)


def test_solving_through_the_bridge() -> None:
    matrix = symmetric(6) @ symmetric(6)
    shifted = ShiftedOperator(DenseOperator((matrix + matrix.T) / 2), 1.0)
    rhs = normal(6)
    solution, code = scipy.sparse.linalg.cg(to_scipy(shifted), rhs.numpy(), rtol=1e-12)
    assert code == 0
    assert_close(shifted @ torch.from_numpy(solution), rhs, 1e-10)


@pytest.mark.parametrize("size", [1e-250, 1e-3, 1e200])
def test_relative_residuals_are_those_of_right_hand_sides_of_any_size(size: float) -> None:
    operator = DenseOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    columns = size * torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    value = columns / torch.tensor([[2.0], [8.0]], dtype=torch.float64)
    found = relative_residuals(operator, 1.0, value, columns)
    torch.testing.assert_close(found, torch.tensor([0.5 / 2**0.5, 0.0], dtype=torch.float64))
