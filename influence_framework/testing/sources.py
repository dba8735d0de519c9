"""Checks of a curvature source, on a small classifier with batch normalisation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.operators import dense_by_columns
from influence_framework.parameters import Blocks, ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import Dense, Diagonal, HessianSource, LinearOperator, Minibatches, Trace
from influence_framework.registry import Kind, Registry
from influence_framework.testing.composition import STRUCTURES, options_make_an_equal_instance
from influence_framework.testing.problems import batches, network, normal, problem
from influence_framework.testing.subjects import DTYPES, devices
from influence_framework.testing.untouched import changed_model, changed_random_states

SIZES = ((20,), (8, 8, 4), (7, 7, 6), (19, 1))
"""Ways to cut 20 samples into batches."""

TRACE_ERROR = 0.05
"""What "a few per cent" of a trace may be."""


@dataclass(frozen=True, eq=False)
class SourceSubject:
    """A source under test.

    Attributes:
        source: The instance.
        registry: Where names are looked up.
    """

    kind: ClassVar[Kind] = "source"

    source: HessianSource
    registry: Registry

    @property
    def method(self) -> HessianSource:
        """The source."""
        return self.source

    @cached_property
    def problem(self) -> Problem:
        """What most checks are made on: batches of 8, 8 and 4 samples, in float64."""
        return problem(network(normalized=True))

    @cached_property
    def operator(self) -> LinearOperator:
        """The curvature with respect to all its parameters."""
        return self.of(self.problem)

    @cached_property
    def matrix(self) -> Float[Tensor, "P P"]:
        """The same, dense, from products with all columns of the identity at once."""
        return dense_by_columns(self.operator)

    def of(self, made: Problem, parameters: ParameterSpace | None = None) -> LinearOperator:
        """The curvature of ``made``, with respect to all parameters where none are named."""
        return self.source.operator(made, parameters or made.parameters)

    def differing(
        self, what: str, matrix: Tensor, expected: Tensor, allowed: float | None = None
    ) -> Iterator[str]:
        """A line where ``matrix`` is not what is expected, relative to the norm of what is."""
        limit = torch.finfo(torch.float64).eps ** 0.5 if allowed is None else allowed
        difference = matrix.detach().to("cpu", torch.float64) - expected
        relative = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected))
        if not relative <= limit:
            yield f"{what}: off by {relative:.1e} of its norm, expected at most {limit:.1e}"


def symmetric(subject: SourceSubject) -> Iterator[str]:
    """The curvature is a symmetric matrix."""
    yield from subject.differing("C − Cᵀ", subject.matrix.T, subject.matrix)


def shape_dtype_and_device(subject: SourceSubject) -> Iterator[str]:
    """Operator and products have the parameters' number, dtype and device, and agree in float32 and float64."""
    for dtype, device in itertools.product(DTYPES, devices()):
        model = network(dtype=dtype, device=device, normalized=True)
        made = problem(model, batches(dtype=dtype, device=device))
        operator, size = subject.of(made), made.parameters.numel
        expected = ((size, size), dtype, made.parameters.device)
        if (operator.shape, operator.dtype, operator.device) != expected:
            yield f"operator {operator.shape} {operator.dtype} on {operator.device}, expected {expected}"
        columns = normal(size, 3, dtype=dtype, device=device)
        product = operator @ columns
        if (product.shape, product.dtype, product.device) != (columns.shape, columns.dtype, columns.device):
            yield f"a product is {tuple(product.shape)} {product.dtype} on {product.device}"
        allowed = torch.finfo(dtype).eps ** 0.5
        yield from subject.differing(str(dtype), product, subject.matrix @ normal(size, 3), allowed)


def products_are_columnwise(subject: SourceSubject) -> Iterator[str]:
    """A product with k columns is that with each of them, for k = 1, for k = P and for k > P."""
    size = len(subject.matrix)
    wide = normal(size, size + 5)
    alone = {index: subject.operator @ wide[:, [index]] for index in (0, 1, size - 1, size, size + 4)}
    for count in (2, size, size + 5):
        together = subject.operator @ wide[:, :count].clone()
        for index in [index for index in alone if index < count]:
            yield from subject.differing(f"k = {count}, column {index}", together[:, [index]], alone[index])


def vectors_and_no_columns(subject: SourceSubject) -> Iterator[str]:
    """A vector ``(P,)`` comes back as a vector, and no columns ``(P, 0)`` as none."""
    size = len(subject.matrix)
    for shape in ((size,), (size, 0)):
        product = subject.operator @ normal(*shape)
        if product.shape != shape:
            yield f"{shape} gave {tuple(product.shape)}"
        elif product.numel():
            yield from subject.differing("vector", product, subject.matrix @ normal(*shape))


def batches_do_not_matter(subject: SourceSubject) -> Iterator[str]:
    """The curvature is the same however the samples are cut into batches, with a ragged last one too."""
    for sizes in SIZES:
        made = problem(network(normalized=True), batches(sizes))
        yield from subject.differing(f"batches of {sizes}", dense_by_columns(subject.of(made)), subject.matrix)


def mean_not_sum(subject: SourceSubject) -> Iterator[str]:
    """The same samples given twice over leave the curvature of their mean loss as it is."""
    made = problem(network(normalized=True), batches(copies=2))
    yield from subject.differing("twice the data", dense_by_columns(subject.of(made)), subject.matrix)


def deterministic(subject: SourceSubject) -> Iterator[str]:
    """Two operators give the same product on the CPU to the last bit, whatever the global random state."""
    columns, products = normal(len(subject.matrix), 3), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        products.append(subject.of(subject.problem) @ columns)
    if not torch.equal(*products):
        yield f"the two differ by up to {float((products[0] - products[1]).abs().max()):.1e}"


def global_random_state_untouched(subject: SourceSubject) -> Iterator[str]:
    """A product leaves the global random states of Python, NumPy and torch alone."""
    columns = normal(len(subject.matrix), 3)
    yield from changed_random_states(lambda: subject.of(subject.problem) @ columns)


def model_left_as_found(subject: SourceSubject) -> Iterator[str]:
    """A product leaves the model's parameters, gradients, buffers, modes and hooks as they were."""
    # A model of its own: the others have been multiplied with already.
    made = problem(network(normalized=True))

    def used() -> None:
        operator = subject.of(made)
        dense_by_columns(operator)
        if isinstance(operator, Diagonal):
            operator.diagonal()

    yield from changed_model(made.model, used)


def positive_semidefinite_is_true(subject: SourceSubject) -> Iterator[str]:
    """An operator that claims to be positive semidefinite has no negative eigenvalue."""
    if not getattr(subject.operator, "positive_semidefinite", False):
        return
    spectrum = torch.linalg.eigvalsh((subject.matrix + subject.matrix.T) / 2)
    rounding = 1e2 * torch.finfo(torch.float64).eps * float(spectrum.abs().max())
    if not spectrum[0] >= -rounding:
        yield f"its least eigenvalue is {float(spectrum[0]):.3g}"


def diagonal_is_exact(subject: SourceSubject) -> Iterator[str]:
    """Where ``diagonal()`` is offered, it is that of the matrix."""
    if isinstance(subject.operator, Diagonal):
        yield from subject.differing("diagonal", subject.operator.diagonal(), subject.matrix.diagonal())


def trace_is_close(subject: SourceSubject) -> Iterator[str]:
    """Where ``trace()`` is offered, it is that of the matrix to within a few per cent."""
    if isinstance(subject.operator, Trace):
        expected = subject.matrix.trace()
        trace = torch.tensor(subject.operator.trace(), dtype=torch.float64, device="cpu")
        yield from subject.differing("trace", trace, expected, TRACE_ERROR)


def dense_is_exact(subject: SourceSubject) -> Iterator[str]:
    """Where ``to_dense()`` is offered, it is the matrix, in a tensor that the caller may overwrite."""
    if isinstance(subject.operator, Dense):
        yield from subject.differing("to_dense()", subject.operator.to_dense(), subject.matrix)
        subject.operator.to_dense().zero_()
        yield from subject.differing("to_dense(), overwritten", subject.operator.to_dense(), subject.matrix)


def minibatches_average_to_it(subject: SourceSubject) -> Iterator[str]:
    """Where mini-batches are offered, those of a pass average to the matrix; the generator orders them."""
    sizes = (5, 5, 5, 5)
    operator = subject.of(problem(network(normalized=True), batches(sizes)))
    if not isinstance(operator, Minibatches):
        return

    def one_pass(seed: int) -> list[Tensor]:
        stream = operator.minibatches(torch.Generator("cpu").manual_seed(seed))
        return [dense_by_columns(batch) for batch in itertools.islice(stream, len(sizes))]

    first = torch.stack(one_pass(1))
    yield from subject.differing("mean of one pass", first.mean(0), dense_by_columns(operator))
    torch.manual_seed(3)
    if not torch.equal(first, torch.stack(one_pass(1))):
        yield "generators of the same seed gave different batches"


def blocks_are_principal_submatrices(subject: SourceSubject) -> Iterator[str]:
    """The curvature with respect to some parameters is their part of the matrix, in the order given."""
    made = problem()
    whole = dense_by_columns(subject.of(made))
    for structure, spec in STRUCTURES.items():
        if structure == "full":
            continue
        groups = Blocks.resolve(spec, made.parameters)
        for block, names in groups.items():
            part = made.parameters.subset(names)
            index = made.parameters.indices_of(part)
            matrix = dense_by_columns(subject.of(made, part))
            yield from subject.differing(f"{structure}, block {block!r}", matrix, whole[index][:, index])


def frozen_parameters_are_left_out(subject: SourceSubject) -> Iterator[str]:
    """Freezing a parameter takes its rows and columns out, and changes nothing else."""
    made, model = problem(), network()
    next(iter(model.parameters())).requires_grad_(False)
    frozen = problem(model)
    index = made.parameters.indices_of(frozen.parameters)
    whole = dense_by_columns(subject.of(made))
    matrix = dense_by_columns(subject.of(frozen))
    yield from subject.differing("without the first parameter", matrix, whole[index][:, index])


def columns_not_written_to(subject: SourceSubject) -> Iterator[str]:
    """The columns that are multiplied are not written to."""
    columns = normal(len(subject.matrix), 3)
    kept = columns.clone()
    _ = subject.operator @ columns
    if not torch.equal(columns, kept):
        yield f"they were changed by up to {float((columns - kept).abs().max()):.1e}"


SOURCE_CHECKS = (
    symmetric,
    shape_dtype_and_device,
    products_are_columnwise,
    vectors_and_no_columns,
    batches_do_not_matter,
    mean_not_sum,
    deterministic,
    global_random_state_untouched,
    model_left_as_found,
    positive_semidefinite_is_true,
    diagonal_is_exact,
    trace_is_close,
    dense_is_exact,
    minibatches_average_to_it,
    blocks_are_principal_submatrices,
    frozen_parameters_are_left_out,
    columns_not_written_to,
    options_make_an_equal_instance,
)
