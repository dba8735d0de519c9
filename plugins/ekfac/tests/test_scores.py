"""Scores of pairs: every order of contraction is exact, and the staircase within its tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from influence_framework_ekfac import filters, scores
from influence_framework_ekfac.filters import Filter, make_filter
from influence_framework_ekfac.scores import (
    Positions,
    Side,
    Unformed,
    Unrotated,
    join_sides,
    own_scores,
    pair_scores,
    side_of,
)
from influence_framework_ekfac.statistics import Eigenbasis
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.testing import normal
from tests import nets, reference
from tests.reference import assert_close

BUDGET = 2**28
ORDERS = ["_by_gradients", "_by_positions", "_by_staircase", "_by_indices"]


def decaying(size: int, last: float) -> Tensor:
    return torch.logspace(0, last, size, dtype=torch.float64)


def spectrum(groups: int, outputs: int, columns: int, last: float = -8.0) -> Tensor:
    """``Λ`` near a product of two decaying sequences, in no order."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(groups, outputs, columns, generator=generator, dtype=torch.float64) + 0.1
    values = decaying(outputs, last)[:, None] * decaying(columns, last) * rough
    rows, entries = (torch.randperm(size, generator=generator) for size in (outputs, columns))
    return values[:, rows][:, :, entries]


def positions(
    like: Tensor, size: int, count: int, *, seed: int, dtype: torch.dtype = torch.float64, fitted: bool = False
) -> Positions:
    """Samples with any gradients, or with gradients like those that ``Λ`` comes from."""
    groups, outputs, columns = like.shape
    deltas, inputs = (normal(groups, size, count, w, seed=s) for w, s in ((outputs, seed), (columns, -seed)))
    if fitted:
        deltas *= like.mean(2).sqrt()[:, None, None]
        inputs *= like.mean(1).sqrt()[:, None, None]
    return Positions(deltas.to(dtype), inputs.to(dtype), columns)


def indexed(size: int, count: int, outputs: int, columns: int, seed: int) -> Positions:
    index = torch.randint(columns, (size, count), generator=torch.Generator().manual_seed(seed))
    return Positions(normal(1, size, count, outputs, seed=seed), index, columns)


def basis_of(values: Tensor, dtype: torch.dtype = torch.float64) -> Eigenbasis:
    """Any bases with these eigenvalues."""
    groups, *sizes = values.shape
    outputs, inputs = (torch.linalg.qr(normal(groups, size, size))[0].to(dtype) for size in sizes)
    return Eigenbasis(outputs, inputs, values)


def unrotated(side: Positions, basis: Eigenbasis) -> Unrotated:
    return Unrotated(basis.rotate_back(side.gradients()), basis=basis)


def unformed(side: Positions, basis: Eigenbasis) -> Unformed:
    assert basis.inputs is not None
    turned = side.deltas @ basis.outputs[:, None].mT, side.inputs @ basis.inputs[:, None].mT
    return Unformed(Positions(*turned, side.columns), basis=basis)


def matrices(side: Positions) -> Tensor:
    """``G`` of every sample in float64, from the definition."""
    deltas = side.deltas.double()
    inputs = nn.functional.one_hot(side.inputs, side.columns)[None] if side.one_hot else side.inputs
    return torch.stack(
        [
            torch.stack([d.T @ a for d, a in zip(deltas[:, n], inputs[:, n].double(), strict=True)])
            for n in range(side.size)
        ]
    )


def expected(test: Positions, train: Positions, dense: Tensor) -> Tensor:
    return (matrices(test) * dense).flatten(1) @ matrices(train).flatten(1).T


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes which order of contraction is taken."""
    names: list[str] = []

    def noting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            names.append(name)
            return function(*arguments)

        return run

    for name in ORDERS:
        monkeypatch.setattr(scores, name, noting(name, getattr(scores, name)))
    return names


SHAPES: dict[str, tuple[Callable[[], tuple[Positions, Positions, int]], float, str]] = {
    # groups, outputs, columns; test samples and positions, train samples and positions
    "vectors": (lambda: ragged((1, 9, 7), (3, 1), (40, 1)), 0.0, "_by_positions"),
    "vectors, with a tolerance": (lambda: ragged((1, 90, 70), (3, 1), (5, 1)), 1e-12, "_by_staircase"),
    "groups, with a tolerance": (lambda: ragged((3, 90, 70), (3, 1), (5, 1)), 1e-12, "_by_staircase"),
    "few positions, with a tolerance": (lambda: ragged((1, 90, 70), (3, 2), (5, 3)), 1e-12, "_by_staircase"),
    "sequences": (lambda: ragged((1, 6, 5), (4, 8), (7, 9)), 0.0, "_by_gradients"),
    "groups": (lambda: ragged((3, 4, 5), (4, 6), (7, 6)), 1e-12, "_by_gradients"),
    "few test points": (lambda: ragged((2, 4, 5), (1, 6), (40, 1)), 0.0, "_by_positions"),
    "many indices": (lambda: (indexed(3, 4, 5, 50, 1), indexed(6, 3, 5, 50, 2), 50), 0.0, "_by_indices"),
    "few indices": (lambda: (indexed(30, 9, 5, 4, 1), indexed(60, 8, 5, 4, 2), 4), 0.0, "_by_gradients"),
}


def ragged(shape: tuple[int, int, int], test: tuple[int, int], train: tuple[int, int]) -> Any:
    values = spectrum(*shape)
    return positions(values, *test, seed=1), positions(values, *train, seed=2), shape[2]


@pytest.mark.parametrize("budget", [BUDGET, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_every_order_is_taken_and_exact(name: str, budget: int, taken: list[str]) -> None:
    make, rtol, order = SHAPES[name]
    test, train, columns = make()
    groups, outputs = test.deltas.shape[0], test.deltas.shape[3]
    dense = 1 / (spectrum(groups, outputs, columns, last=-40) + 1e-2)
    # Entries within 1e-12 of the constant are taken for it, far below what is asserted.
    found = pair_scores(test, train, make_filter(dense, rtol, torch.float64), budget)
    assert_close(found, expected(test, train, dense), 1e-10)
    assert taken == [order]


@pytest.mark.parametrize("order", ORDERS[:3])
def test_all_orders_agree_on_the_same_samples(order: str) -> None:
    values = spectrum(2, 12, 9)
    test, train = (positions(values, n, t, seed=n, fitted=True) for n, t in ((4, 3), (5, 2)))
    for strength in (1e-6, 1e-1):
        spectral = make_filter(1 / (values + strength), 1e-13, torch.float64)
        stairs = (spectral.stairs,) if order == "_by_staircase" else ()
        found = getattr(scores, order)(test, train, spectral, *stairs, BUDGET)
        assert_close(found, expected(test, train, spectral.dense), 1e-10)


@pytest.mark.parametrize("budget", [BUDGET, 1])
@pytest.mark.parametrize("form", ["positions", "one position", "gradients", "positions of its own", "indices"])
def test_self_scores_are_the_diagonal_and_change_nothing(form: str, budget: int) -> None:
    values = spectrum(1, 6, 5)
    side: Any = indexed(7, 4, 6, 5, 1)
    if form != "indices":
        side = positions(values, 7, 1 if form == "one position" else 4, seed=1)
    dense, wanted = 1 / (values + 1e-2), expected(side, side, 1 / (values + 1e-2)).diagonal()
    others = {"gradients": unrotated, "positions of its own": unformed}
    given: Side = others[form](side, basis_of(values)) if form in others else side
    for _ in range(2):
        assert_close(own_scores(given, dense, budget), wanted, 1e-10)


def test_sides_of_different_forms_are_joined() -> None:
    values = spectrum(1, 6, 5)
    short, long = (positions(values, 3, t, seed=t) for t in (2, 4))
    dense = make_filter(1 / (values + 1e-2), 0.0, torch.float64)
    every = torch.cat([matrices(short), matrices(long)])
    wanted = (every * dense.dense).flatten(1) @ every.flatten(1).T
    basis = basis_of(values)
    cases: list[list[Side]] = [
        [short, long],
        [short, unrotated(long, basis)],
        [unrotated(short, basis), unrotated(long, basis)],
        [unformed(short, basis), unformed(long, basis)],
        [unformed(short, basis), long],
    ]
    for sides in cases:
        joined = join_sides(sides, basis)
        assert isinstance(joined, Unrotated)
        assert_close(pair_scores(joined, joined, dense, BUDGET), wanted, 1e-10)
        assert_close(pair_scores(joined, short, dense, BUDGET), wanted[:, : short.size], 1e-10)
    assert isinstance(join_sides([short, short], basis), Positions)
    twice = join_sides([unformed(short, basis)] * 2, basis)
    assert isinstance(twice, Unformed)
    assert_close(pair_scores(twice, joined, dense, BUDGET)[: short.size], wanted[: short.size], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_not_rotated_give_the_same(dtype: torch.dtype) -> None:
    values = spectrum(2, 9, 6)
    exact, basis = basis_of(values), basis_of(values, dtype)
    left, right = (positions(values, n, 3, seed=n, fitted=True) for n in (3, 4))
    test, train = (Unrotated(unrotated(side, exact).matrices.to(dtype), basis=basis) for side in (left, right))
    # One after the other, and again: what is kept belongs to one filter.
    for strength in (*STRENGTHS, *STRENGTHS[::-1]):
        dense = 1 / (values + strength)
        found = pair_scores(test, train, make_filter(dense, 0.0, dtype), BUDGET).double()
        error = (found - expected(left, right, dense)).abs() / bound(left, right, dense)
        assert error.max() <= (1e-10 if dtype is torch.float64 else 1e-4)
        # From positions as they are, cut into parts of one sample and not.
        cast = [unformed(positions(values, n, 3, seed=n, fitted=True, dtype=dtype), basis) for n in (3, 4)]
        for budget in (BUDGET, 1):
            again = pair_scores(cast[0], cast[1], make_filter(dense, 0.0, dtype), budget).double()
            assert ((again - found).abs() / bound(left, right, dense)).max() <= 1e-4
        rotated = positions(values, 3, 3, seed=3, fitted=True, dtype=dtype)
        mixed = pair_scores(rotated, train, make_filter(dense, 0.0, dtype), BUDGET)
        assert ((mixed.double() - found).abs() / bound(left, right, dense)).max() <= 1e-4


@pytest.mark.parametrize(
    ("count", "form"), [(1, Positions), (2, Positions), (3, Unformed), (4, Unformed), (5, Unrotated)]
)
def test_a_side_is_held_in_the_form_that_costs_least(count: int, form: type) -> None:
    """Of 9 x 9: two positions' products with two others take 4·18 of 81, five positions hold 90 numbers."""
    basis = basis_of(spectrum(1, 9, 9))
    batch = inf.layers.LayerBatch(normal(1, 4, count, 9), normal(1, 1, 4, count, 9), 9)
    side = side_of(basis, batch)
    assert type(side) is form
    assert_close(side.gradients(), basis.rotate(batch.gradients()[0]), 1e-10)


STRENGTHS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]


def bound(test: Positions, train: Positions, dense: Tensor) -> Tensor:
    """The geometric mean of the two self-influences."""
    own = [(matrices(side).square() * dense).sum((1, 2, 3)).sqrt() for side in (test, train)]
    return own[0][:, None] * own[1]


@pytest.mark.parametrize("fitted", [True, False], ids=["points of the training data", "any points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10, 65), (64, 129), (512, 1025)], ids=str)
@pytest.mark.parametrize("last", [-4.0, -16.0])
def test_the_staircase_keeps_its_tolerance(
    shape: tuple[int, int], dtype: torch.dtype, fitted: bool, last: float
) -> None:
    """In single precision too, where subtracting the constant again would cost all digits."""
    values = spectrum(1, *shape, last=last)
    test, train = (positions(values, n, 1, seed=n, dtype=dtype, fitted=fitted) for n in (3, 4))
    approximate = False
    for strength in STRENGTHS:
        dense = 1 / (values + strength)
        spectral = make_filter(dense, 1e-4, dtype)
        assert spectral.stairs is not None
        found = scores._by_staircase(test, train, spectral, spectral.stairs, BUDGET)
        error = (found.double() - expected(test, train, dense)).abs() / bound(test, train, dense)
        assert error.max() <= 1e-4
        approximate |= bool(error.max() > 1e-12)
    assert approximate


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-8])
def test_every_entry_of_a_filter_is_within_the_tolerance(rtol: float) -> None:
    values = spectrum(3, 40, 30, last=-6)
    for strength in (*STRENGTHS, 10.0):
        spectral = make_filter(1 / (values + strength), rtol, torch.float64)
        whole = restored(spectral)
        assert ((whole - spectral.dense).abs() <= (rtol + 1e-15) * spectral.dense).all()
        assert spectral.area <= spectral.dense.numel()
    # λ above all: the constant alone.
    assert make_filter(1 / (values + 1e6), 1e-4, torch.float64).area == 0


def restored(spectral: Filter) -> Tensor:
    """The entries that constant and steps stand for."""
    assert spectral.stairs is not None
    whole = torch.full_like(spectral.dense, spectral.constant)
    for group, stair in zip(whole, spectral.stairs, strict=True):
        reach = group.shape[1]
        for step in stair.steps:
            assert step.values.shape[1] <= reach
            reach = step.values.shape[1]
            group[stair.rows[step.rows][:, None], stair.columns[:reach]] = step.values
    return whole


@pytest.mark.parametrize("dense", [torch.zeros(1, 3, 4), torch.eye(3)[None]], ids=["zero", "pseudo-inverse"])
def test_what_a_pseudo_inverse_leaves_out_is_left_out_exactly(dense: Tensor) -> None:
    assert make_filter(dense.double(), 1e-4, torch.float64).stairs is None


def test_a_real_net_keeps_the_tolerance_and_takes_the_staircase(taken: list[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nets.mlp(40, 60, 10, activation=nn.ReLU).eval()
        x, y = torch.randn(60, 40) * decaying(40, -3).float(), torch.randint(10, (60,))
    for dtype, strength in ((torch.float32, 1e-6), (torch.float64, 1e-3), (torch.float32, 1e-1)):
        model, inputs = net.to(dtype), x.to(dtype)
        exact, quick = (
            inf.compose(
                model,
                nn.CrossEntropyLoss(),
                solver={"name": "ekfac", "samples": "exact", "score_rtol": rtol},
                hessian_regularization=strength,
            ).fit([(inputs, y)])
            for rtol in (0.0, 1e-4)
        )
        gradients = reference.gradients(model, nn.CrossEntropyLoss(), [(inputs, y)])
        wanted = gradients @ exact.influence_factors(inputs, y).T
        assert_close(exact.influences(inputs, y), wanted, 1e-10 if dtype is torch.float64 else 1e-3)
        own = exact.self_influences(inputs, y).sqrt()
        taken.clear()
        error = (quick.influences(inputs, y) - exact.influences(inputs, y)).abs() / (own[:, None] * own)
        assert error.max() <= 1e-4
        assert strength < 1e-1 or "_by_staircase" in taken


def test_steps_double() -> None:
    stair = (make_filter(1 / (spectrum(1, 100, 20, last=-1) + 1e-6), 1e-4, torch.float64).stairs or ())[0]
    sizes = [step.rows.stop - step.rows.start for step in stair.steps]
    assert sizes[:3] == [filters.FIRST_STEP * 2**k for k in range(3)]


def test_a_net_whose_curvature_is_the_same_everywhere_needs_no_stairs() -> None:
    """With equal weights all hidden units are alike, and λ outweighs what is left: the filter is a constant."""
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    x, y = normal(60, 4, seed=1), torch.arange(60) % 3
    for strength in (1e-2, 1e3):
        model = inf.compose(
            net,
            nn.CrossEntropyLoss(),
            solver={"name": "ekfac", "samples": "exact"},
            hessian_regularization=strength,
            preflight=False,
        ).fit([(x, y)])
        expected = model.influence_factors(x, y) @ reference.gradients(net, nn.CrossEntropyLoss(), [(x, y)]).T
        assert_close(model.influences(x, y), expected, 1e-4)
