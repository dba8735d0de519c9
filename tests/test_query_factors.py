"""Factors of queries that are compressed to low rank: the orders of contraction, and scores between loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import influence_framework as inf
from influence_framework.attribution import attribute, store
from influence_framework.attribution.reading import Stored
from influence_framework.layers import LayerBatch
from influence_framework.query_factors import LayerFactors
from tests import nets
from tests.reference import assert_close
from tests.test_attribution import ROOMY, TEST, TIGHT, TRAIN, Passes, batches, fitted_once

QUERIES, SAMPLES = 5, 7


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def of_layer(
    positions: int, outputs: int, columns: int, groups: int, rank: int, *, one_hot: bool = False
) -> tuple[LayerFactors, LayerBatch]:
    factors = LayerFactors(normal(QUERIES, groups, outputs, rank), normal(QUERIES, groups, columns, rank))
    inputs = normal(groups, SAMPLES, positions, columns)
    if one_hot:
        inputs = torch.randint(
            columns, (SAMPLES, positions), generator=torch.Generator().manual_seed(positions)
        )
    return factors, LayerBatch(inputs, normal(1, groups, SAMPLES, positions, outputs), columns)


@pytest.mark.parametrize("budget", [1, 2**30])
@pytest.mark.parametrize(
    ("positions", "outputs", "columns", "groups", "one_hot"),
    [
        *[(1, 12, 9, 1, False), (30, 12, 9, 1, False), (2, 6, 8, 3, False), (40, 6, 8, 3, False)],
        *[(1, 12, 9, 1, True), (30, 12, 9, 1, True)],
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_every_order_gives_the_scores(
    positions: int, outputs: int, columns: int, groups: int, one_hot: bool, budget: int, whole: bool
) -> None:
    factors, batch = of_layer(positions, outputs, columns, groups, 2, one_hot=one_hot)
    assert factors.right is not None
    dense = factors.left @ factors.right.mT
    expected = dense.flatten(1) @ batch.gradients()[0].flatten(1).T
    if whole:
        assert_close(LayerFactors(dense, None).scores(batch, budget), expected, 1e-12)
        return
    assert_close(factors.scores(batch, budget), expected, 1e-12)
    assert_close(factors._by_positions(batch, budget), expected, 1e-12)
    assert_close(factors._by_matrices(batch, budget), expected, 1e-12)


@pytest.mark.parametrize("positions", [1, 2, 8, 64])
def test_the_order_that_is_taken_has_the_fewest_flops(positions: int) -> None:
    factors, batch = of_layer(positions, 48, 40, 1, 3)

    def flops(work: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            work(batch, 2**30)
        return int(counter.get_total_flops())

    both = [flops(factors._by_positions), flops(factors._by_matrices)]
    assert max(both) > 1.2 * min(both)
    assert flops(factors.scores) == min(both)


@pytest.mark.parametrize("budget", [ROOMY, TIGHT])
@pytest.mark.parametrize("solver", ["direct", "ekfac"])
def test_of_full_rank_scores_between_loaders_are_those_without(solver: str, budget: int) -> None:
    fitted = fitted_once(solver, budget)
    found = attribute(fitted, batches(TEST, 4), batches(TRAIN, 17), query_rank=100)
    expected = fitted.influences(*TEST, *TRAIN)
    torch.testing.assert_close(torch.from_numpy(found.array), expected, rtol=1e-7, atol=1e-9)
    assert found.query_error is not None
    assert found.query_error.shape == (len(TEST[0]),)
    assert not found.query_error.any()


def test_of_low_rank_scores_are_within_what_is_said_to_be_lost() -> None:
    fitted = fitted_once("direct")
    found = attribute(fitted, batches(TEST, 4), batches(TRAIN, 17), query_rank=1)
    exact = fitted.influences(*TEST, *TRAIN).numpy()
    factors = fitted.influence_factors(*TEST).norm(dim=1).numpy()
    gradients = torch.stack([fitted_gradient(x, y) for x, y in zip(*TRAIN, strict=True)]).norm(dim=1).numpy()
    assert found.query_error is not None
    assert (found.query_error > 1e-3).all()
    off = np.abs(found.array - exact)
    assert off.max() > 1e-3 * np.abs(exact).max()
    assert (off <= (found.query_error * factors)[:, None] * gradients).all()
    assert attribute(fitted, batches(TEST, 4), batches(TRAIN, 17)).query_error is None


def test_scores_of_a_model_in_half_precision_are_added_up_in_single_precision() -> None:
    net = nets.mlp(4, 6, 3).eval().to(torch.bfloat16)
    half = [(x.to(torch.bfloat16), y) for x, y in batches(TRAIN, 40)]
    fitted = inf.compose(
        net, torch.nn.CrossEntropyLoss(), solver="ekfac", hessian_regularization=1e-2, preflight=False
    ).fit(half)
    found = attribute(fitted, half[:1], half, query_rank=100).array
    wanted = attribute(fitted, half[:1], half).array
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()
    # Not all of them are numbers of half precision.
    assert (found != torch.from_numpy(found).bfloat16().float().numpy()).any()
    x, y = half[0]
    factors = fitted.query_factors(x, y, rank=100)
    assert fitted.influences_from_query(factors, x, y).dtype is torch.bfloat16


def fitted_gradient(x: Tensor, y: Tensor) -> Tensor:
    net = fitted_once("direct").model
    loss = torch.nn.functional.cross_entropy(net(x[None]), y[None])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()])])


def test_more_test_points_share_a_pass_over_the_training_data() -> None:
    fitted, passes = fitted_once("direct", TIGHT), {}
    for rank in (None, 1):
        train = Passes(batches(TRAIN, 17))
        attribute(fitted, batches(TEST, 4), train, output="mean", query_rank=rank)
        passes[rank] = train.passes - 1
        assert inf.plan(fitted, train, batches(TEST, 4), output="mean", query_rank=rank).passes == passes[rank]
    assert passes == {None: 3, 1: 1}


@pytest.mark.parametrize("output", ["matrix", {"name": "top_k", "k": 5}], ids=str)
def test_a_store_goes_on_with_what_was_lost_and_refuses_another_rank(
    output: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lost of a group of test points that was done before is read, not worked out again."""
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    fitted = fitted_once("direct", TIGHT // 3)

    def run(path: Path, data: Any, rank: int | None = 1) -> inf.Scored:
        return attribute(fitted, batches(TEST, 4), data, output=output, store=path, query_rank=rank)

    whole = run(tmp_path / "whole", batches(TRAIN, 17))
    assert whole.query_error is not None
    assert (whole.query_error > 0).all()

    class Broken(Passes):
        def __iter__(self) -> Any:
            if self.passes == 2:
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Broken(batches(TRAIN, 17)))
    solved = len(fitted.report)
    again = run(tmp_path / "cut", batches(TRAIN, 17))
    assert 0 < solved < len(TEST[0])
    assert len(fitted.report) < len(TEST[0])
    np.testing.assert_array_equal(again.query_error, whole.query_error)
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)
    stored = Stored.read(tmp_path / "cut")
    np.testing.assert_array_equal(stored.query_error, whole.query_error)
    assert "Compression lost up to" in stored.how_to_read()[1]
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["query_rank"] == 1
    with pytest.raises(inf.InvalidInputError, match="query_rank: 1 there, None here"):
        run(tmp_path / "cut", batches(TRAIN, 17), rank=None)


def test_what_does_not_fit_is_refused() -> None:
    fitted = fitted_once("direct")
    with pytest.raises(inf.InvalidInputError, match="query_rank is a whole number, at least 1; got 0"):
        attribute(fitted, batches(TEST, 4), batches(TRAIN, 17), query_rank=0)
    with pytest.raises(inf.InvalidInputError, match="leave query_rank out"):
        attribute(fitted, None, batches(TRAIN, 17), output="self_influence", query_rank=2)
    with pytest.raises(inf.InvalidInputError, match="query_rank is a whole number, at least 1; got 0"):
        inf.plan(fitted, batches(TRAIN, 17), batches(TEST, 4), query_rank=0)
    with pytest.raises(inf.InvalidInputError, match="leave query_rank out"):
        inf.plan(fitted, batches(TRAIN, 17), output="self_influence", query_rank=2)
    unfitted = inf.compose(fitted.model, fitted.loss, solver="direct")
    with pytest.raises(inf.InvalidInputError, match="plan the fit first"):
        inf.plan(unfitted, batches(TRAIN, 17), query_rank=2)


def test_with_little_room_for_matrices_those_that_are_formed_again_count() -> None:
    """``L Rᵀ`` is formed for each part of the samples: with room for one at a time, as often as there are."""
    factors, batch = of_layer(64, 48, 40, 1, 3)
    roomy, tight = 2**30, 4 * 48 * 40 * 8
    assert factors._matrices_cost(batch, tight) > factors._matrices_cost(batch, roomy)
    assert factors._matrices_at_once(batch, tight) == 1
