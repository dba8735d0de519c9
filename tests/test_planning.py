"""What a fit and scores are said to take, against what they take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import influence_framework as inf
from influence_framework import planning
from influence_framework.attribution.queries import LayerScores
from tests.test_attribution import TEST, TRAIN, Counting, batches, model
from tests.traces import assert_same, trace

# The run-time checks of the tests draw from Python's random numbers themselves.
pytestmark = pytest.mark.usefixtures("as_user")


def composed(net: Counting | None = None, solver: Any = "ekfac", **options: Any) -> Any:
    torch.manual_seed(0)
    chosen = net or Counting().eval()
    return inf.compose(
        chosen, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=1e-2, preflight=False, **options
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A clock by which everything takes two seconds."""
    monkeypatch.setattr(planning, "_timed", lambda work, problem: (work(), 2.0)[1])
    return []


@pytest.mark.usefixtures("clock")
def test_the_plan_of_a_fit(tmp_path: Path) -> None:
    data = batches(TRAIN, 40)
    for partitions, storage in ((1, "device"), (2, "host"), (2, str(tmp_path))):
        solver = {"name": "ekfac", "partitions": partitions, "storage": storage}
        influence = composed(solver=solver, blocks="per_layer")
        plan = inf.plan(influence, data)
        assert not influence.is_fitted
        assert plan.passes == 2 * partitions
        assert plan.tried == 64
        assert plan.seconds == pytest.approx(2.0 / 64 * 150, abs=0.5)  # and eigendecompositions
        influence.fit(data)
        kept = sum(
            part.nbytes
            for inverse in influence.inverses.values()
            for layer in inverse.layers.values()
            for part in layer.basis.tensors().values()
        )
        assert (plan.host, plan.disk) == (kept * (storage == "host"), kept * (storage == str(tmp_path)))
        assert plan.held <= plan.peak
        assert f"{2 * partitions} passes over the training data" in str(plan)


def test_a_plan_of_a_fit_goes_through_few_samples_and_leaves_nothing_behind() -> None:
    net = Counting().eval()
    influence = composed(net)
    data = [(x.repeat(20, 1), y.repeat(20)) for x, y in batches(TRAIN, 40)]
    before = trace(net.inner)
    plan = inf.plan(influence, data)
    assert_same(before, trace(net.inner))
    assert "to 3000 samples" in plan.what
    assert plan.seconds is not None
    assert plan.seconds > 0
    seen, net.seen = net.seen, 0
    influence.fit(data)
    assert seen < net.seen


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("budget", [2**28, 8_000])
def test_the_plan_of_scores(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    influence = composed(memory_budget=budget).fit(batches(TRAIN, 40))
    for store in (False, True):
        plan = inf.plan(influence, batches(TRAIN, 40), batches(TEST, 10), store=store)
        numbers = 150 * 29 * 8
        assert (plan.host, plan.disk) == ((0, numbers) if store else (numbers, 0))
    passed: list[int] = []
    scores = LayerScores.__call__
    monkeypatch.setattr(
        LayerScores, "__call__", lambda job, block: (passed.append(len(block)), scores(job, block))[1]
    )
    inf.attribute(influence, batches(TEST, 10), batches(TRAIN, 40))
    assert plan.passes is not None
    assert sum(passed) == 150 * plan.passes
    assert (plan.passes > 1) is (budget < 2**28)
    # Eight test points are solved for in two seconds; and a block takes as long with one as with eight.
    at_once = int(plan.what.split(", ")[1].split()[0])
    solved, taken = 29 * 2.0 / min(8, at_once), 150 * plan.passes * 2.0 / plan.tried
    assert plan.seconds == pytest.approx(solved + taken)


@pytest.mark.usefixtures("clock")
def test_the_plan_of_scores_of_single_points() -> None:
    influence = composed().fit(batches(TRAIN, 40))
    plan = inf.plan(influence, batches(TRAIN, 40), output="self_influence")
    assert plan.passes == 1
    assert plan.seconds == pytest.approx(150 * 2.0 / plan.tried)
    with pytest.raises(inf.InvalidInputError, match="pass test points too"):
        inf.plan(influence, batches(TRAIN, 40))
    with pytest.raises(inf.InvalidInputError, match="pass test=None"):
        inf.plan(influence, batches(TRAIN, 40), batches(TEST, 10), output="self_influence")
    with pytest.raises(inf.InvalidInputError, match="yielded no point"):
        inf.plan(influence, [], output="self_influence")


def test_any_solver_has_a_plan() -> None:
    """Of a fit it says that the iterations decide; of scores, what it says of them."""
    unfitted = composed(solver="cg")
    plan = inf.plan(unfitted, batches(TRAIN, 40))
    assert (plan.passes, plan.seconds) == (None, None)
    assert "iterations decide" in str(plan)
    assert "not known beforehand" in str(plan)
    scores = inf.plan(model(), batches(TRAIN, 40), batches(TEST, 10))
    assert scores.passes == 1
    assert scores.seconds is not None
    assert scores.seconds > 0
    with pytest.raises(inf.InvalidInputError, match="not fitted"):
        inf.plan(unfitted, batches(TRAIN, 40), batches(TEST, 10))


def test_a_plan_is_in_words() -> None:
    plan = inf.Plan("Fit of X to 9 samples", 1, 7500.0, 5 * 10**9, 12_300, 0, 7 * 10**6, 4)
    assert str(plan).splitlines() == [
        "Fit of X to 9 samples: 1 pass over the training data.",
        "  time     about 2.1 hours, by 4 samples tried",
        "  memory   5 GB on the device, of which 12.3 kB factors; 0 B on the host",
        "  disk     7 MB",
    ]
    assert "about 3.0 min" in str(dataclasses.replace(plan, seconds=180.0))
    assert "about 1.5 s" in str(dataclasses.replace(plan, seconds=1.5))
