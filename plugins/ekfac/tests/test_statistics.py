"""Kronecker factors: where they are exact, what draws of labels stand for, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from influence_framework_ekfac import EkfacInverse
from influence_framework_ekfac.statistics import Covariances, gram
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.layers import LayerBatch
from plugins.ekfac.tests import dense
from tests import reference
from tests.cases import CASES, Case, Instance, labels, normal
from tests.reference import assert_close

STRENGTH = 1e-3


def fitted(
    instance: Instance, solver: Mapping[str, Any], source: str = "gauss_newton", budget: int = 2**28
) -> EkfacInverse:
    influence = inf.compose(
        instance.model,
        instance.loss,
        solver=solver,
        source=source,
        hessian_regularization=STRENGTH,
        memory_budget=budget,
        preflight=False,
    )
    return cast(EkfacInverse, influence.fit(instance.data).inverses["full"])


def applied(inverse: EkfacInverse) -> Tensor:
    product: Tensor = inverse @ torch.eye(inverse.shape[0], dtype=inverse.dtype)
    return product


def curvature(inverse: EkfacInverse) -> Tensor:
    """The matrix that is inverted, less λ."""
    damping = STRENGTH * torch.eye(inverse.shape[0], dtype=torch.float64)
    matrix: Tensor = torch.linalg.inv(applied(inverse).double()) - damping
    return matrix


def exact_inverse(instance: Instance, source: str) -> Tensor:
    matrix = reference.CURVATURES[source](instance.model, instance.loss, instance.data)
    inverse: Tensor = torch.linalg.inv(matrix + STRENGTH * torch.eye(len(matrix), dtype=torch.float64))
    return inverse


def linear(outputs: int, size: int, *, bias: bool = False, loss: Any = None, y: Any = None) -> Instance:
    case = Case(
        lambda: nn.Linear(3, outputs, bias=bias), loss or nn.MSELoss(), y=y or normal(outputs), sizes=[size]
    )
    return dense.made(case)[0]


SOLVERS = pytest.mark.parametrize("solver", ["ekfac", "kfac"])


@SOLVERS
@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_and_one_sample_is_the_fisher_inverse(solver: str, bias: bool) -> None:
    """The gradient is one outer product, and so is the Fisher: of one output, or for the true label."""
    options = {"name": solver, "samples": "exact"}
    instance = linear(1, 1, bias=bias)
    assert_close(applied(fitted(instance, options)), exact_inverse(instance, "gauss_newton"), 1e-10)
    instance = linear(4, 1, bias=bias, loss=nn.CrossEntropyLoss(), y=labels(4))
    found = applied(fitted(instance, options, "empirical_fisher"))
    assert_close(found, exact_inverse(instance, "empirical_fisher"), 1e-10)


@SOLVERS
@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_and_many_samples_has_the_exact_kronecker_form(solver: str, bias: bool) -> None:
    """For squared error the curvature in the outputs is ``2/c I`` for all samples."""
    instance = linear(2, 9, bias=bias)
    inverse = applied(fitted(instance, {"name": solver, "samples": "exact"}))
    assert_close(inverse, exact_inverse(instance, "gauss_newton"), 1e-10)


def test_kfac_is_the_kronecker_product_of_the_covariances() -> None:
    instance, _ = dense.made(CASES["linear_classifier"])
    layer, samples = dense.recorded(instance.model, instance.data, dense.exact_rows(instance.loss))[0]
    deltas = torch.stack([sample.deltas[:, 0, 0] for sample in samples])
    inputs = torch.stack([sample.inputs[0, 0] for sample in samples])
    product = torch.kron(
        torch.einsum("nso,nsp->op", deltas, deltas) / len(samples), inputs.T @ inputs / len(samples)
    )
    at = layer.places.flatten()
    expected = torch.linalg.inv(product + STRENGTH * torch.eye(len(at), dtype=torch.float64))
    found = applied(fitted(instance, {"name": "kfac", "samples": "exact"}))
    assert_close(found[at[:, None], at], expected, 1e-10)
    # Without the correction it is another matrix than with it.
    corrected = applied(fitted(instance, {"name": "ekfac", "samples": "exact"}))
    assert not torch.allclose(found, corrected, rtol=1e-2)


@pytest.mark.parametrize("width", [5, 128, 300])
def test_sums_of_squares_of_wide_rows_are_whole_and_symmetric(width: int) -> None:
    rows = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gram(rows)
    assert_close(found, found.mT, 1e-15)
    assert_close(found, torch.einsum("gni,gnj->gij", rows, rows), 1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_covariances_of_single_precision_are_precise_at_any_scale(scale: float) -> None:
    """Squares of 1e±25 are beyond float32. A hundred thousand rows: one float32 sum would lose three digits."""
    generator = torch.Generator().manual_seed(0)
    rows = scale * torch.rand(1, 100_000, 1, 3, generator=generator)
    deltas = scale * torch.rand(1, 1, 100_000, 1, 2, generator=generator)
    base = cast(inf.LayerStatistics, fitted(linear(2, 4), {"name": "ekfac"}).base)
    (layer,) = base.cover().layers
    sums = Covariances(layer, "expand", torch.float64)
    sums.add(LayerBatch(rows, deltas, 3))
    outer, inner, _ = sums.sums
    for found, vectors in ((inner, rows[0, :, 0]), (outer, deltas[0, 0, :, 0])):
        assert_close(found[0], vectors.double().T @ vectors.double(), 1e-6)


@SOLVERS
def test_exact_statistics_are_those_of_all_labels_with_their_probabilities(solver: str) -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    samples = dense.recorded(instance.model, instance.data, dense.enumerated_rows(instance.loss))
    expected = dense.inverse(instance.model, samples, STRENGTH, refit=solver == "ekfac")
    assert_close(applied(fitted(instance, {"name": solver, "samples": "exact"})), expected, 1e-10)


def test_true_labels_are_not_drawn_ones() -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    drawn, exact, true = (
        curvature(fitted(instance, {"name": "kfac", "samples": samples}, source))
        for samples, source in ((2000, "gauss_newton"), ("exact", "gauss_newton"), (1, "empirical_fisher"))
    )
    assert reference.relative_error(drawn, exact) < 0.1 < reference.relative_error(true, exact)


FAMILIES = {
    "categorical": CASES["ragged_last_batch"],
    "gaussian": CASES["mse"],
    "bernoulli": CASES["bce_with_logits"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_statistics_converge_at_the_monte_carlo_rate(family: str) -> None:
    instance, _ = dense.made(FAMILIES[family])
    exact = curvature(fitted(instance, {"name": "kfac", "samples": "exact"}))

    def drawn(samples: int, seeds: int) -> Tensor:
        solver = {"name": "kfac", "samples": samples}
        return torch.stack([curvature(fitted(instance, solver | {"seed": seed})) for seed in range(seeds)])

    few, many = drawn(1, 40), drawn(64, 10)
    assert reference.relative_error(few.mean(0), exact) < 0.5
    ratio = (few - exact).square().sum((1, 2)).mean() / (many - exact).square().sum((1, 2)).mean()
    assert 64 / 2.5 < ratio < 64 * 2.5
    corrected = curvature(fitted(instance, {"name": "ekfac", "samples": 4000}))
    expected = curvature(fitted(instance, {"name": "ekfac", "samples": "exact"}))
    assert reference.relative_error(corrected, expected) < 0.1


def test_uniform_predictions_have_curvature() -> None:
    instance = linear(3, 20, loss=nn.CrossEntropyLoss(), y=labels(3))
    nn.init.zeros_(cast(Tensor, instance.model.weight))
    values = fitted(instance, {"name": "ekfac"}).eigenvalues()["(root)"]
    exact = reference.gauss_newton(instance.model, instance.loss, instance.data)
    assert values.sum() == pytest.approx(exact.trace().item(), rel=0.3)


def test_both_passes_see_the_same_draws() -> None:
    """One sample and one draw make one outer product, whose eigenvalues there is nothing to correct in."""
    instance = linear(5, 1, loss=nn.CrossEntropyLoss(), y=labels(5))
    for seed in range(5):
        corrected, plain = (applied(fitted(instance, {"name": n, "seed": seed})) for n in ("ekfac", "kfac"))
        assert_close(corrected, plain, 1e-10)


def test_the_seed_decides_the_draws_and_nothing_else_does() -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    one, other = (applied(fitted(instance, {"name": "ekfac", "seed": seed})) for seed in (0, 1))
    assert not torch.allclose(one, other)
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(applied(fitted(instance, {"name": "ekfac"})), one)
    assert torch.equal(torch.get_rng_state(), state)


def cut(instance: Instance, sizes: Sequence[int], *, reverse: bool = False) -> Instance:
    x, y = (torch.cat([batch[i] for batch in instance.data]) for i in (0, 1))
    if reverse:
        x, y = x.flip(0), y.flip(0)
    parts = zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)
    return Instance(instance.model, instance.loss, list(parts))


@SOLVERS
@pytest.mark.parametrize("name", ["ragged_last_batch", "conv", "embedding", "module_used_twice"])
def test_batches_and_order_change_nothing(name: str, solver: str) -> None:
    instance, _ = dense.made(CASES[name])
    for source in ("gauss_newton", "empirical_fisher"):
        options = {"name": solver, "samples": "exact"}
        whole = applied(fitted(instance, options, source))
        for sizes, reverse in (([11], False), ([1] * 11, False), ([2, 6, 3], True)):
            # Batches that fit the budget are joined, those that do not are cut.
            budget = 1 if reverse else 2**28
            again = fitted(cut(instance, sizes, reverse=reverse), options, source, budget)
            assert_close(applied(again), whole, 1e-9)


def test_the_dtype_of_the_statistics() -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    precise, coarse = (
        fitted(instance, {"name": "ekfac", "samples": "exact", "dtype": dtype})
        for dtype in (torch.float64, torch.float32)
    )
    assert all(values.dtype is torch.float32 for values in coarse.eigenvalues().values())
    error = reference.relative_error(applied(coarse), applied(precise))
    assert 1e-12 < error < 1e-3
    # Statistics are in double precision whatever the model is in.
    half = instance.to(torch.bfloat16)
    assert all(v.dtype is torch.float64 for v in fitted(half, {"name": "ekfac"}).eigenvalues().values())


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_rows_of_half_precision_add_up_in_single_precision(kept: torch.dtype, device: str) -> None:
    base = cast(inf.LayerStatistics, fitted(linear(200, 4), {"name": "ekfac"}).base)
    (layer,) = base.cover().layers
    sums = Covariances(layer, "expand", kept)
    sums.sums = [part.to(device) if part.ndim else part for part in sums.sums]
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 1, 600, 9, 200), (1, 600, 9, 3)
    deltas, inputs = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    sums.add(LayerBatch(inputs.to(device), deltas.to(device), 3))
    for found, rows in zip(sums.sums, (deltas[0], inputs), strict=False):
        flat = rows.double().flatten(1, 2)
        assert found.dtype is kept
        assert_close(found.cpu().double(), flat.mT @ flat, 1e-5)


class Idle(nn.Module):
    """A layer that is never applied."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.head = nn.Conv2d(2, 2, 2, groups=2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x)
        return result


@pytest.mark.filterwarnings(dense.LEFT_OUT)
def test_a_layer_that_is_never_applied_has_no_curvature() -> None:
    instance, test = dense.made(Case(Idle))
    inverse = fitted(instance, {"name": "ekfac", "samples": "exact"})
    size = sum(parameter.numel() for parameter in instance.model.get_submodule("idle").parameters())
    assert_close(applied(inverse)[:size, :size], torch.eye(size, dtype=torch.float64) / STRENGTH, 1e-10)
    assert not applied(inverse.with_regularization(0.0))[:size].any()
    influence = inf.compose(instance.model, instance.loss, solver="ekfac", preflight=False)
    assert influence.fit(instance.data).influences(*test).isfinite().all()


def test_batches_that_skip_a_layer_join_those_that_do_not() -> None:
    instance, _ = dense.made(CASES["ragged_last_batch"])
    inverse = fitted(instance, {"name": "ekfac", "samples": "exact", "score_rtol": 0.0})
    generator = torch.Generator().manual_seed(0)

    def batch(name: str, size: int) -> LayerBatch:
        _, outputs, columns = inverse.layers[name].places.shape
        inputs, deltas = (
            torch.randn(1, size, 1, width, generator=generator, dtype=torch.float64)
            for width in (columns, outputs)
        )
        return LayerBatch(inputs, deltas[None], columns)

    both = {name: batch(name, 2) for name in inverse.layers}
    one = {"0": batch("0", 3)}
    sides = [inverse.side(both, 2), inverse.side(one, 3), inverse.side({}, 1)]
    flat = torch.zeros(6, inverse.shape[0], dtype=torch.float64)
    for start, layers in ((0, both), (2, one)):
        for name, part in layers.items():
            rows = part.gradients()[0].flatten(1)
            flat[start : start + len(rows), inverse.layers[name].places.flatten()] = rows
    assert_close(inverse.scores(sides[0], sides[1]), flat[:2] @ applied(inverse) @ flat[2:5].T, 1e-10)
    assert_close(inverse.self_scores(sides[1]), (flat @ applied(inverse) @ flat.T).diagonal()[2:5], 1e-10)
    joined = inverse.join(sides)
    assert joined.size == 6
    assert_close(inverse.scores(joined, joined), flat @ applied(inverse) @ flat.T, 1e-10)
    # What was joined has given up its layers, and is no side without gradients.
    with pytest.raises((AttributeError, TypeError)):
        inverse.scores(sides[0], joined)
