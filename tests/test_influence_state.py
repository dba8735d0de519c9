"""What a fit and scores leave behind: nothing on the model, and all tensors on one device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf
from influence_framework.checks import check_unchanged, model_state
from influence_framework.data import RandomState
from tests import cases, nets, small
from tests.cases import Instance
from tests.fits import compose, fitted
from tests.traces import assert_same, trace

# The run-time checks of the tests draw from Python's random numbers themselves.
pytestmark = pytest.mark.usefixtures("as_user")


def shuffling(instance: Instance) -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*instance.data, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


SOLVERS = {"direct": "direct", "cg": {"name": "cg", "preconditioner": "jacobi"}}
EVERYTHING: list[Callable[[inf.TorchInfluenceFunctionModel, str], object]] = [
    lambda m, name: m.influences(*cases.points(name, 2, 1), *cases.points(name, 3, 2)),
    lambda m, name: m.influences(*cases.points(name, 2, 1), mode="perturbation"),
    lambda m, name: m.influences_from_factors(
        m.influence_factors(*cases.points(name, 2, 1)), *cases.points(name, 3, 2)
    ),
    lambda m, name: m.with_regularization(1.5),
    lambda m, name: m.to("cpu"),
]


@pytest.mark.parametrize("budget", [1, 2**20])
@pytest.mark.parametrize("source", ["hessian", "gauss_newton", "empirical_fisher"])
@pytest.mark.parametrize(
    ("name", "solver"), [("batch_norm", "direct"), ("frozen_bias", "cg"), ("recurrent", "direct")]
)
def test_nothing_is_left_on_the_model(name: str, solver: str, source: str, budget: int) -> None:
    instance = cases.make(name)
    first, *_, last = instance.model.parameters()
    # One gradient exists already, and one layer is in train mode; both are the user's.
    last.grad = torch.ones_like(last)
    next(m for m in instance.model.modules() if isinstance(m, nn.Linear)).train()
    influence = compose(
        instance, solver=SOLVERS[solver], source=source, hessian_regularization=2.0, memory_budget=budget
    )
    before = trace(instance.model)
    influence.fit(shuffling(instance))
    assert_same(before, trace(instance.model))
    for scores in EVERYTHING:
        scores(influence, name)
        assert_same(before, trace(instance.model))
    assert first.grad is None
    if isinstance(instance.model, nets.Recurrent):
        # A recurrent layer keeps a second list of its weights, which must be the parameters again.
        cell = instance.model.cell
        assert all(
            w is getattr(cell, n) for w, n in zip(cell._flat_weights, cell._flat_weights_names, strict=True)
        )


class Alarm(nn.Module):
    """As a layer the identity, as a loss cross-entropy; stops everything at one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def forward(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt("stopped by hand")
        return output if target is None else nn.functional.cross_entropy(output, target)


@pytest.mark.parametrize("where", ["loss", "model"])
@pytest.mark.parametrize("source", ["hessian", "gauss_newton", "empirical_fisher"])
def test_nothing_is_left_after_an_exception(source: str, where: str) -> None:
    name, stopped = "ragged_last_batch", 0
    for at in range(1, 100):
        instance = cases.make(name)
        alarm = Alarm(at)
        model = nn.Sequential(instance.model, alarm) if where == "model" else instance.model
        loss = alarm if where == "loss" else instance.loss
        influence = inf.compose(model, loss, solver="direct", source=source, hessian_regularization=2.0)
        before = trace(model)
        try:
            influence.fit(shuffling(instance))
            influence.influences(*cases.points(name, 2, 1), mode="perturbation")
        except KeyboardInterrupt:
            stopped += 1
        assert_same(before, trace(model))
        if alarm.left > 0:
            break
    assert stopped > 5


def test_pitfall_a_shuffling_loader_gives_the_same_scores() -> None:
    instance, expected = fitted("conv", "per_layer", hessian_regularization=0.1)
    test = cases.points("conv", 3, 1)
    for budget in (1, 2**20):
        other = compose(instance, blocks="per_layer", hessian_regularization=0.1, memory_budget=budget)
        scores = other.fit(shuffling(instance)).influences(*test)
        torch.testing.assert_close(scores, expected.influences(*test), rtol=1e-10, atol=1e-12)
        assert torch.equal(other.influences(*test), scores)


@pytest.mark.parametrize("budget", [1, 2**20])
def test_inputs_that_require_gradients_are_taken_out_of_their_graph(budget: int) -> None:
    test = cases.points("conv", 3, 1)
    _, expected = fitted("conv", hessian_regularization=0.1)
    instance = cases.make("conv")
    data = [(x.requires_grad_(), y) for x, y in instance.data]
    influence = compose(instance, hessian_regularization=0.1, memory_budget=budget).fit(data)
    x = test[0].clone().requires_grad_()
    for mode in inf.InfluenceMode:
        scores = influence.influences(x, test[1], mode=mode)
        assert not scores.requires_grad
        torch.testing.assert_close(scores, expected.influences(*test, mode=mode), rtol=1e-10, atol=1e-12)
    assert not influence.influence_factors(x, test[1]).requires_grad
    assert x.grad is None
    assert all(part.requires_grad and part.grad is None for part, _ in data)


@pytest.mark.parametrize("change", ["step", "buffer", "load", "data"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_pitfall_a_model_that_changed_after_the_fit_is_refused(solver: str, change: str) -> None:
    _, influence = fitted("batch_norm", solver=SOLVERS[solver], hessian_regularization=0.1)
    model = influence.model
    test = cases.points("batch_norm", 2, 1)
    factors = influence.influence_factors(*test)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        if change == "step":
            next(model.parameters()).add_(1e-3)
        elif change == "buffer":
            next(model.buffers()).add_(1e-3)
        elif change == "data":
            next(model.parameters()).data = next(model.parameters()) + 1e-3
        else:
            model.load_state_dict({name: t * 1.001 if t.is_floating_point() else t for name, t in kept.items()})
    for scores in (
        lambda: influence.influences(*test),
        lambda: influence.influence_factors(*test),
        lambda: influence.influences_from_factors(factors, *test),
    ):
        with pytest.raises(inf.InvalidInputError, match=r"of the model has changed since the fit.*fit again"):
            scores()
    model.load_state_dict(kept)
    assert torch.equal(influence.influence_factors(*test), factors)


def test_pitfall_a_model_that_moved_after_the_fit_is_refused() -> None:
    _, influence = fitted("mse", hessian_regularization=0.1)
    influence.model.float()
    x, y = cases.points("mse", 2, 1)
    with pytest.raises(
        inf.InvalidInputError, match=r"'0.weight' of the model was .*float64 .*float32.*fit again"
    ):
        influence.influences(x.float(), y.float())
    # Another device, of which there is none to run on here.
    state = {name: tensor.to("meta") for name, tensor in model_state(influence.model).items()}
    with pytest.raises(inf.InvalidInputError, match=r"on meta at the fit and is .* on cpu now: fit again"):
        check_unchanged(influence.model, state)


def tensors(thing: Any, path: str = "fit", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be reached from ``thing`` through attributes and containers."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type | RandomState):  # the random state is the host's
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield path, thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors(value, f"{path}[{key!r}]", seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for index, value in enumerate(thing):
            yield from tensors(value, f"{path}[{index}]", seen)
    elif (
        dataclasses.is_dataclass(thing)
        or isinstance(thing, nn.Module)
        or type(thing).__module__.startswith("influence")
    ):
        for name, value in vars(thing).items():
            yield from tensors(value, f"{path}.{name}", seen)


@pytest.mark.parametrize("blocks", ["full", "per_layer"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_fitted_tensor_is_moved(solver: str, blocks: str) -> None:
    spec = {"name": "cg", "preconditioner": "jacobi", "x0": None} if solver == "cg" else solver
    for source in ("hessian", "gauss_newton"):
        precompute = {"name": source, "precompute_grad": True}
        _, influence = fitted("sum", blocks, solver=spec, source=precompute, hessian_regularization=2.0)
        influence.influences(*cases.points("sum", 2, 1))
        found = dict(tensors(influence._fit))
        assert len(found) > 10
        assert {tensor.device.type for tensor in found.values()} == {"cpu"}
        assert influence.to("meta") is influence
        stayed = [path for path, tensor in tensors(influence._fit) if tensor.device.type != "meta"]
        assert stayed == []
        fit: Any = influence._fit
        devices = [fit.problem.parameters.device] + [block.operator.device for block in fit.blocks.values()]
        assert {device.type for device in devices} == {"meta"}
        assert fit.problem.state.of_torch.device.type == "cpu"
        assert {p.device.type for p in influence.model.parameters()} == {"meta"}
        # The data is shared by all blocks and stays shared.
        assert len({id(block.operator.problem) for block in fit.blocks.values()} | {id(fit.problem)}) == 1


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_data_of_any_nesting_is_moved() -> None:
    instance = cases.make("mapping_inputs")
    data = [Pair(OrderedDict(x), y) for x, y in instance.data[:1]]  # type: ignore[arg-type]
    influence = compose(instance, hessian_regularization=0.1).fit(data).to("meta")
    fit: Any = influence._fit
    assert fit.problem.cached
    batches = list(tensors([[dict(x), y] for x, y in fit.problem.data]))
    assert len(batches) == 3
    assert {tensor.device.type for _, tensor in batches} == {"meta"}


@pytest.mark.parametrize("solver", SOLVERS)
def test_moving_to_where_it_is_keeps_it_working(solver: str, device: torch.device) -> None:
    _, influence = fitted("conv", "per_layer", solver=SOLVERS[solver], hessian_regularization=0.1)
    test, train = cases.points("conv", 2, 1), cases.points("conv", 3, 2)
    expected = [influence.influences(*test, *train, mode) for mode in inf.InfluenceMode]
    assert influence.to("cpu") is influence
    influence.to(device)
    for mode, before in zip(inf.InfluenceMode, expected, strict=True):
        moved = [tensor.to(device) for tensor in (*test, *train)]
        scores = influence.influences(*moved, mode=mode)
        assert scores.device.type == device.type
        torch.testing.assert_close(scores.cpu(), before, rtol=1e-6, atol=1e-8)
    # Streamed data and its random state survive the move as well.
    streamed = compose(cases.make("conv"), hessian_regularization=0.1, memory_budget=1)
    streamed.fit(cases.make("conv").data).to("cpu")
    assert torch.isfinite(streamed.with_regularization(0.3).influences(*test)).all()


def test_what_it_is_and_says() -> None:
    instance = cases.make("mse")
    influence = compose(instance, hessian_regularization=0.25, blocks="per_layer")
    assert isinstance(influence, inf.InfluenceFunctionModel)
    assert not influence.is_fitted
    assert "not fitted" in repr(influence)
    assert influence.fit(instance.data) is influence
    assert influence.is_fitted
    text = repr(influence)
    for part in ("Sequential", "DirectSolver", "GaussNewton", "'per_layer'", "0.25", "fitted"):
        assert part in text
    assert "not fitted" not in text
    assert "\n" not in text


def test_the_inverses_are_there_to_be_looked_at() -> None:
    with pytest.raises(inf.NotFittedError):
        _ = small.model().inverses
    influence = small.fitted(blocks="per_layer")
    assert list(influence.inverses) == ["0", "2"]
    assert all(isinstance(inverse, inf.InverseOperator) for inverse in influence.inverses.values())
