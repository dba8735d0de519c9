"""Memory that runs out in the middle: the work goes on with smaller batches, and gives the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.memory import SINGLE, Room, in_pieces
from tests import small
from tests.reference import assert_close
from tests.test_faults import EXHAUSTED

pytestmark = pytest.mark.usefixtures("as_user")


class Limited(torch.autograd.Function):
    """The identity, with room for so many samples in its passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, room: Limit, where: str) -> Tensor:
        ctx.room, ctx.where = room, where
        if where == "forward":
            room.check(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.where == "backward":
            ctx.room.check(gradient)
        return gradient, None, None


class Limit:
    """How many samples there is room for."""

    def __init__(self, kind: str = "accelerator") -> None:
        self.most, self.kind, self.seen = 10**9, kind, 0

    def check(self, x: Tensor) -> None:
        if len(x) > self.most:
            raise EXHAUSTED[self.kind]()
        self.seen = max(self.seen, len(x))


class Net(nn.Module):
    def __init__(self, limit: Limit, where: str) -> None:
        super().__init__()
        self.first, self.second, self.limit, self.where = nn.Linear(3, 4), nn.Linear(4, 2), limit, where

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.where == "alone":  # what torch.func can batch
            self.limit.check(hidden)
        else:
            hidden = Limited.apply(hidden, self.limit, self.where)  # type: ignore[no-untyped-call]
        result: Tensor = self.second(hidden)
        return result


class Scaled(Net):
    """Not a chain of linear layers, so that products go through graphs."""

    def __init__(self, limit: Limit, where: str) -> None:
        super().__init__(limit, where)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale.exp())


DATA = [small.points(8), small.points(7, 2)]
TEST, TRAIN = small.points(6, 5), small.points(13, 6)
SOLVERS: dict[str, Any] = {
    "ekfac": {"name": "ekfac", "samples": 1, "score_rtol": 0.0},
    "ekfac, two draws": {"name": "ekfac", "samples": 2, "score_rtol": 0.0, "partitions": 2},
    # Of the same products come the same steps, however soon they end.
    "cg": {"name": "cg", "rtol": 1e-3, "atol": 0.0},
    "direct": "direct",
}


def model(limit: Limit, solver: str, where: str) -> inf.TorchInfluenceFunctionModel:
    torch.manual_seed(0)
    net = Net(limit, where).double().eval()
    return inf.compose(
        net, nn.CrossEntropyLoss(), solver=SOLVERS[solver], hessian_regularization=0.1, preflight=False
    )


CALLS: list[Callable[[inf.TorchInfluenceFunctionModel], Tensor]] = [
    lambda m: m.influences(*TEST, *TRAIN),
    lambda m: m.influences(*TRAIN, *TEST),
    lambda m: m.self_influences(*TRAIN),
    lambda m: m.influence_factors(*TRAIN),
    lambda m: torch.from_numpy(inf.attribute(m, [TEST], [TRAIN]).array),
]


@pytest.mark.parametrize(
    ("solver", "where", "kind"),
    [
        ("ekfac", "forward", "accelerator"),
        ("ekfac", "backward", "cpu"),
        ("ekfac, two draws", "backward", "python"),
        ("cg", "alone", "accelerator"),
        ("direct", "alone", "windows"),
    ],
)
def test_smaller_batches_give_the_same(solver: str, where: str, kind: str) -> None:
    limit = Limit(kind)
    plenty = model(limit, solver, where).fit(DATA)
    wanted = [call(plenty) for call in CALLS]
    assert limit.seen > 3
    scarce = model(limit, solver, where)
    limit.most, limit.seen = 3, 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scarce.fit(DATA)
        found = [call(scarce) for call in CALLS]
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs, 1e-10 if solver == "cg" else 1e-12)
    assert limit.seen <= 3
    # Once, whatever was tried in between, and where the caller stands.
    (said,) = [warning for warning in caught if warning.category is inf.SmallerBatchWarning]
    assert re.search("with more than [23] samples at a time", str(said.message))
    assert said.filename == __file__


@pytest.mark.parametrize("source", ["gauss_newton", "hessian"])
def test_graphs_that_were_kept_are_made_again_for_smaller_batches(source: str) -> None:
    limit = Limit()
    torch.manual_seed(0)
    net = Scaled(limit, "backward").double().eval()
    fitted = inf.compose(
        net, nn.CrossEntropyLoss(), solver=SOLVERS["cg"], source=source, hessian_regularization=1.0
    ).fit(DATA)
    wanted = fitted.influences(*TEST)
    assert limit.seen == 15
    limit.most = 6
    with pytest.warns(inf.SmallerBatchWarning, match="more than 7 samples"):
        found = fitted.influences(*TEST)
    assert_close(found, wanted, 1e-10)


def test_a_mini_batch_is_cut() -> None:
    limit = Limit()
    torch.manual_seed(0)
    net = Net(limit, "alone").double().eval()
    problem = inf.Problem.build(net, nn.CrossEntropyLoss(), DATA)
    whole: Any = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
    operator = next(whole.minibatches(torch.Generator().manual_seed(0)))
    vectors = torch.randn(problem.parameters.numel, 2, dtype=torch.float64)
    wanted, limit.most = operator @ vectors, 3
    with pytest.warns(inf.SmallerBatchWarning, match="more than 2 samples"):
        found = operator @ vectors
    assert_close(found, wanted, 1e-12)


def test_a_single_sample_that_is_too_much_says_what_to_do() -> None:
    limit = Limit()
    fitted = model(limit, "ekfac", "forward").fit(DATA)
    limit.most = 0
    for call in (lambda: fitted.influences(*TEST), lambda: model(limit, "cg", "forward").fit(DATA)):
        with pytest.raises(inf.OutOfMemoryError, match=rf"{SINGLE}: lower memory_budget.* or use shorter"):
            call()
    # Nothing was learnt of it: where something else held the memory, all is as before.
    assert fitted.fitted.problem.room.most is None


def test_pieces_are_in_order_and_draws_are_wound_back() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(10, generator=torch.Generator().manual_seed(0))
    tried: list[int] = []

    def work(piece: Tensor) -> Tensor:
        tried.append(len(piece))
        drawn = torch.rand(len(piece), generator=generator)
        if len(piece) > 2:
            raise MemoryError
        return drawn

    room = Room()
    with pytest.warns(inf.SmallerBatchWarning):
        done = list(in_pieces(room, torch.arange(10), len, 9, work, generator))
    assert torch.equal(torch.cat([piece for piece, _ in done]), torch.arange(10))
    assert torch.equal(torch.cat([drawn for _, drawn in done]), expected)
    assert tried[:2] == [5, 2]
    assert room.most == 2
    tried.clear()
    # What was learnt is kept, and said once.
    list(in_pieces(room, torch.arange(4), len, 9, work))
    assert tried == [2, 2]
    assert room.to("cpu").most is None


def test_other_errors_are_raised_as_they_are() -> None:
    tried: list[int] = []

    def work(piece: Tensor) -> None:
        tried.append(len(piece))
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_pieces(Room(), torch.arange(4), len, 4, work))
    assert tried == [4]


def test_a_sum_begins_again_from_nothing() -> None:
    """Memory runs out after half of the data has been added up."""
    problem = inf.Problem.build(model(Limit(), "cg", "alone").model, nn.CrossEntropyLoss(), DATA)
    total, failed = torch.zeros(1), []

    def work(share: inf.Problem) -> list[Tensor]:
        added = torch.zeros(1)
        for at, (_, size) in enumerate(share.batches()):
            if at and size > 4:
                failed.append(size)
                raise MemoryError
            added += size
        return [added]

    small_enough = inf.Problem.build(
        problem.model, problem.objective, DATA, memory_budget=8 * 7 * problem.sample_bytes
    )
    with pytest.warns(inf.SmallerBatchWarning):
        (total,) = small_enough.total(work, "a test")
    assert failed
    assert total.item() == 15
