"""Several influence models as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import influence_framework as inf
from tests import small


def members(count: int = 3) -> list[inf.TorchInfluenceFunctionModel]:
    found = []
    for seed in range(count):
        net = small.net()
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found.append(small.model(net))
    return found


def fitted(count: int = 3) -> inf.EnsembleModel:
    return inf.ensemble(members(count)).fit(small.batches())


TEST, TRAIN = small.points(2, 5), small.points(6, 6)


@pytest.mark.parametrize("mode", list(inf.InfluenceMode))
def test_scores_are_the_mean_of_the_members(mode: inf.InfluenceMode) -> None:
    each = [model.fit(small.batches()).influences(*TEST, *TRAIN, mode) for model in members()]
    model = fitted()
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(model.influences(*TEST, *TRAIN, mode), expected)
    torch.testing.assert_close(
        model.influences_from_factors(model.influence_factors(*TEST), *TRAIN, mode), expected
    )
    assert (each[0] - expected).abs().max() > 0.1 * expected.abs().max()
    for name, part in zip("012", each, strict=True):
        torch.testing.assert_close(model.influences_by_member(*TEST, *TRAIN, mode)[name], part)


def test_self_influences_are_the_diagonal() -> None:
    model = fitted()
    torch.testing.assert_close(model.self_influences(*TEST), model.influences(*TEST).diagonal())


def test_members_have_the_names_they_were_given() -> None:
    one, two = members(2)
    model = inf.ensemble({"epoch 1": one, "epoch 2": two})
    assert list(model.models) == ["epoch 1", "epoch 2"]
    assert "epoch 2" in repr(model)
    assert not model.is_fitted
    one.fit(small.batches())
    assert not model.is_fitted
    assert model.fit(small.batches()) is model
    assert model.is_fitted
    assert list(model.influences_by_member(*TEST)) == ["epoch 1", "epoch 2"]


def test_an_ensemble_is_an_influence_model() -> None:
    assert isinstance(fitted(), inf.InfluenceFunctionModel)


def test_another_regularization_is_that_of_every_member() -> None:
    model = fitted()
    before = model.influences(*TEST, *TRAIN)
    other = model.with_regularization(0.5)
    expected = [m.with_regularization(0.5).influences(*TEST, *TRAIN) for m in model.models.values()]
    torch.testing.assert_close(other.influences(*TEST, *TRAIN), torch.stack(expected).mean(0))
    assert torch.equal(model.influences(*TEST, *TRAIN), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inf.ensemble([]), "at least one influence model"),
        (lambda: inf.ensemble([small.net()]), "'0' is a Sequential; expected influence models"),
        (lambda: inf.ensemble(members(1)).influences(*TEST), "not fitted"),
        (lambda: fitted(2).influences_from_factors(torch.zeros(1, 3), *TEST), r"\(m, 52\).*got \(1, 3\)"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(inf.InfluenceError, match=message):
        make()
