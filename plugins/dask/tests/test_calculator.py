"""Lazy factors and scores of Dask arrays against the model's own methods."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from dask.callbacks import Callback
from distributed import Client
from influence_framework_dask import DaskInfluenceCalculator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import influence_framework as inf

Points = tuple[Tensor, Tensor]


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, TEST = points(60, 1), points(11, 2)


def fitted(solver: Any = "direct", **options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    composed = inf.compose(
        net, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=1e-2, preflight=False, **options
    )
    return composed.fit([TRAIN])


def arrays(data: Points, size: int) -> tuple[da.Array, da.Array]:
    x, y = (part.numpy() for part in data)
    return da.from_array(x, chunks=(size, 1, 4)), da.from_array(y, chunks=size)


TOLERANCES: dict[str, float] = {"direct": 1e-11, "ekfac": 1e-11, "cg": 1e-6}
"""Rounding; for ``cg`` its own tolerance, chunk by chunk."""


@pytest.mark.parametrize("solver", TOLERANCES)
class TestAgainstTheModel:
    def close(self, solver: str, ours: da.Array, theirs: Tensor) -> None:
        assert ours.shape == tuple(theirs.shape)
        assert ours.dtype == np.float64
        found = ours.compute()
        assert found.dtype == np.float64
        rtol = TOLERANCES[solver]
        np.testing.assert_allclose(found, theirs.numpy(), rtol=rtol, atol=rtol * theirs.abs().max().item())

    @pytest.mark.parametrize("mode", ["up", "perturbation"])
    def test_influences(self, solver: str, mode: str, current: Client) -> None:
        model = fitted(solver)
        found = DaskInfluenceCalculator(model).influences(*arrays(TEST, 4), *arrays(TRAIN, 25), mode)
        assert found.chunks[:2] == ((4, 4, 3), (25, 25, 10))
        self.close(solver, found, model.influences(*TEST, *TRAIN, mode))

    @pytest.mark.parametrize("mode", ["up", "perturbation"])
    def test_with_a_measurement(self, solver: str, mode: str, current: Client) -> None:
        def first(outputs: Tensor, batch: Points) -> Tensor:
            return outputs[:, 0]

        model = fitted(solver)
        calculator = DaskInfluenceCalculator(model)
        found = calculator.influences(*arrays(TEST, 4), *arrays(TRAIN, 25), mode, measurement=first)
        expected = model.influences(*TEST, *TRAIN, mode, measurement=first)
        self.close(solver, found, expected)
        of_loss = calculator.influences(*arrays(TEST, 4), *arrays(TRAIN, 25), mode)
        assert of_loss.name != found.name
        factors = calculator.influence_factors(*arrays(TEST, 4), measurement=first)
        self.close(solver, factors, model.influence_factors(*TEST, measurement=first))

    def test_influences_of_test_points_on_each_other(self, solver: str, current: Client) -> None:
        model = fitted(solver)
        self.close(solver, DaskInfluenceCalculator(model).influences(*arrays(TEST, 4)), model.influences(*TEST))

    @pytest.mark.parametrize("mode", ["up", "perturbation"])
    def test_factors_and_what_comes_of_them(self, solver: str, mode: str, client: Client) -> None:
        model = fitted(solver)
        calculator = DaskInfluenceCalculator(model, client)
        with client.as_current():
            factors = calculator.influence_factors(*arrays(TEST, 4))
            self.close(solver, factors, model.influence_factors(*TEST))
            found = calculator.influences_from_factors(factors, *arrays(TRAIN, 25), mode)
            self.close(solver, found, model.influences(*TEST, *TRAIN, mode))


class TestLaziness:
    def test_nothing_is_computed_before_it_is_asked_for_and_then_once(self) -> None:
        read: list[int] = []

        def reading(part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            read.append(len(part))
            return part

        x, y = arrays(TRAIN, 25)
        x = x.map_blocks(reading, meta=np.empty((0, 1, 4)))
        model = fitted()
        scores = DaskInfluenceCalculator(model).influences(*arrays(TEST, 4), x, y)
        assert read == []
        started: list[str] = []
        with Callback(pretask=lambda key, *_: started.append(key[0] if isinstance(key, tuple) else key)):
            found = scores.compute(scheduler="synchronous")
        np.testing.assert_allclose(found, model.influences(*TEST, *TRAIN).numpy(), rtol=1e-11)
        assert sorted(read) == [10, 25, 25]
        assert sum(name.startswith("influence-solve") for name in started) == 3
        assert sum(name.startswith("influence-scores") for name in started) == 9

    @pytest.mark.parametrize("from_factors", [False, True])
    @pytest.mark.parametrize(("budget", "groups"), [(2**28, 1), (20_000, 3)])
    def test_test_points_are_scored_together_as_far_as_memory_goes(
        self, budget: int, groups: int, from_factors: bool
    ) -> None:
        model = fitted(memory_budget=budget)
        calculator = DaskInfluenceCalculator(model)
        test, train = arrays(TRAIN, 4), arrays(TRAIN, 10)
        if from_factors:
            scores = calculator.influences_from_factors(calculator.influence_factors(*test), *train)
        else:
            scores = calculator.influences(*test, *train)
        assert scores.chunks == ((4,) * 15, (10,) * 6)
        started: list[str] = []
        with Callback(pretask=lambda key, *_: started.append(key[0] if isinstance(key, tuple) else key)):
            found = scores.compute(scheduler="synchronous")
        np.testing.assert_allclose(found, model.influences(*TRAIN).numpy(), rtol=1e-9, atol=1e-10)
        # 20,000 bytes hold 24 test points of 51 parameters twice: six chunks of four.
        assert sum(name.startswith("influence-scores") for name in started) == groups * 6

    def test_a_part_takes_a_part_of_the_work(self) -> None:
        scores = DaskInfluenceCalculator(fitted()).influences(*arrays(TEST, 4), *arrays(TRAIN, 25))
        started: list[Any] = []
        with Callback(pretask=lambda key, *_: started.append(key)):
            scores[:4, 30:40].compute(scheduler="synchronous")
        assert sum(str(key[0]).startswith("influence-scores") for key in started if isinstance(key, tuple)) <= 1

    def test_the_same_arrays_give_the_same_names(self) -> None:
        model, other = fitted(), fitted()
        test, train = arrays(TEST, 4), arrays(TRAIN, 25)
        names = [DaskInfluenceCalculator(m).influences(*test, *train).name for m in (model, model, other)]
        assert names[0] == names[1] != names[2]


LAYOUTS: dict[str, tuple[Any, str]] = {
    "along features": (
        lambda x, y: (x.rechunk({2: 2}), y),
        r"cut along dimension 2.*x = x\.rechunk\(\{2: -1\}\)",
    ),
    "cut differently": (lambda x, y: (x, y.rechunk(20)), r"y = y\.rechunk\(\{0: x\.chunks\[0\]\}\)"),
    "unknown": (lambda x, y: (x[x[:, 0, 0] > 0], y), r"x = x\.compute_chunk_sizes\(\)"),
    "another number": (lambda x, y: (x, y[:50]), "x has 60 samples and y 50"),
    "no sample": (lambda x, y: (x[:0], y[:0]), "x has no sample"),
    "no array": (lambda x, y: (x.compute(), y), "must be a Dask array, got ndarray"),
    "another dtype": (lambda x, y: (x.astype("float32"), y), r"x\.astype\('float64'\)"),
}


def test_the_layout_of_many_points_on_both_sides_is_a_small_graph_that_completes(current: Client) -> None:
    """10 chunks of test points by 40 of training points, as of 2,000 by 200,000 in chunks of 200 by 5,000."""
    model = fitted()

    def made(count: int, size: int, seed: int) -> tuple[da.Array, da.Array]:
        x = da.random.default_rng(seed).standard_normal((count, 1, 4), chunks=(size, 1, 4))
        return x, (x[:, 0, 0] > 0).astype(int)

    (x_test, y_test), (x, y) = made(40, 4, 1), made(4_000, 100, 2)
    calculator = DaskInfluenceCalculator(model)
    scores = calculator.influences(x_test, y_test, x, y)
    assert scores.chunks == ((4,) * 10, (100,) * 40)
    # Neither the model nor data is in it.
    assert len(pickle.dumps(scores)) < 200 * len(scores.__dask_graph__()) + 50_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores.compute()
    part = [torch.from_numpy(array[:10].compute()) for array in (x_test, y_test, x, y)]
    np.testing.assert_allclose(found[:10, :10], model.influences(*part).numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("case", LAYOUTS)
def test_chunks_that_cannot_work_are_refused_at_once(case: str) -> None:
    change, message = LAYOUTS[case]
    x, y = change(*arrays(TRAIN, 25))
    calculator = DaskInfluenceCalculator(fitted())
    with pytest.raises(inf.InvalidInputError, match=message):
        calculator.influence_factors(x, y)
    with pytest.raises(inf.InvalidInputError, match=message):
        calculator.influences(*arrays(TEST, 4), x, y)
    with pytest.raises(inf.InvalidInputError, match=message):
        calculator.influences_from_factors(da.zeros((3, 51)), x, y)


def test_chunks_of_a_result_that_no_worker_has_memory_for_are_refused_at_once(current: Client) -> None:
    calculator = DaskInfluenceCalculator(fitted())

    def points(count: int, size: int) -> tuple[da.Array, da.Array]:
        return da.zeros((count, 1, 4), chunks=(size, 1, 4)), da.zeros(count, dtype=int, chunks=size)

    most = max(worker["memory_limit"] for worker in current.scheduler_info()["workers"].values())
    # As many samples as make a square, of four features, of twice that memory; their inputs need hardly any.
    side = int((2 * most / (8 * 4)) ** 0.5)
    large, small = points(2 * side, side), points(2 * side, side // 2)
    with pytest.raises(
        inf.InvalidInputError, match=rf"would be {side} x {side} x 1 x 4 of float64.* of memory"
    ):
        calculator.influences(*large, *large, "perturbation")
    calculator.influences(*small, *large, "perturbation")
    calculator.influences(*large, *large)
    many = most // (8 * 51) + 1
    with pytest.raises(inf.InvalidInputError, match=rf"would be {many} x 51 of float64"):
        calculator.influence_factors(*points(many, many))


def test_other_arguments_that_cannot_work() -> None:
    calculator = DaskInfluenceCalculator(fitted())
    test, train = arrays(TEST, 4), arrays(TRAIN, 25)
    with pytest.raises(inf.InvalidInputError, match="Pass both x and y"):
        calculator.influences(*test, train[0])
    with pytest.raises(inf.InvalidInputError, match="Unknown influence mode 'upp'"):
        calculator.influences(*test, *train, "upp")
    with pytest.raises(inf.InvalidInputError, match=r"z_test_factors must be \(m, 51\)"):
        calculator.influences_from_factors(da.zeros((3, 50)), *train)
    with pytest.raises(inf.InvalidInputError, match=r"rechunk\(\{1: -1\}\)"):
        calculator.influences_from_factors(da.zeros((3, 51), chunks=(3, 10)), *train)
    unfitted = inf.compose(nn.Linear(4, 3), nn.CrossEntropyLoss(), solver="direct")
    with pytest.raises(inf.NotFittedError):
        DaskInfluenceCalculator(unfitted)


def test_another_cluster_than_the_calculators_says_what_is_missing(client: Client) -> None:
    scores = DaskInfluenceCalculator(fitted()).influences(*arrays(TEST, 4))
    with pytest.raises(inf.InvalidInputError, match="not on this worker: make the calculator with client="):
        client.compute(scores).result()


class TestLoaders:
    def test_arrays_of_a_loader(self, current: Client) -> None:
        loader = DataLoader(TensorDataset(*TRAIN), batch_size=25)
        model = fitted()
        calculator = DaskInfluenceCalculator(model)
        x, y = calculator.arrays(loader)
        assert x.chunks == ((25, 25, 10), (1,), (4,))
        np.testing.assert_array_equal(x.compute(), TRAIN[0].numpy())
        np.testing.assert_array_equal(y.compute(), TRAIN[1].numpy())
        found = calculator.influences(*calculator.arrays(DataLoader(TensorDataset(*TEST), batch_size=4)), x, y)
        np.testing.assert_allclose(found.compute(), model.influences(*TEST, *TRAIN).numpy(), rtol=1e-11)

    def test_loaders_that_cannot_work(self) -> None:
        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return iter([TRAIN])

        data = TensorDataset(*TRAIN)
        named = TensorDataset(*TRAIN, torch.arange(60))
        for loader, message in (
            (DataLoader(data, shuffle=True), "pass shuffle=False"),
            (DataLoader(Stream()), "executor='dask'"),
            ([TRAIN], "executor='dask'"),
            (DataLoader(data, batch_size=None), "give it a batch_size"),
            (DataLoader(named), "two tensors"),
            (DataLoader(data, batch_size=100, drop_last=True), "yields no batch"),
        ):
            with pytest.raises(inf.InvalidInputError, match=message):
                DaskInfluenceCalculator(fitted()).arrays(loader)


class TestFailures:
    def failing(self, policy: str) -> Any:
        return fitted({"name": "cg", "maxiter": 1, "rtol": 1e-12}, on_failure=policy)

    def test_raised_where_they_are_to_be(self, current: Client) -> None:
        scores = DaskInfluenceCalculator(self.failing("raise")).influences(*arrays(TEST, 11))
        with pytest.raises(inf.ConvergenceError, match="11 of 11"):
            scores.compute()

    def test_told_where_they_are_to_be(self) -> None:
        scores = DaskInfluenceCalculator(self.failing("warn")).influences(*arrays(TEST, 11))
        with pytest.warns(inf.ConvergenceWarning, match="11 of 11"):
            scores.compute(scheduler="synchronous")

    def test_points_that_are_not_finite(self, current: Client) -> None:
        x, y = arrays(TRAIN, 25)
        scores = DaskInfluenceCalculator(fitted()).influences(*arrays(TEST, 4), x * np.nan, y)
        with pytest.raises(inf.InvalidInputError, match="is NaN or infinity"):
            scores.compute()


def test_a_worker_that_is_killed_in_the_middle_is_survived(client: Client, current: Client) -> None:
    model = fitted()
    calculator = DaskInfluenceCalculator(model)

    def slowly(part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        time.sleep(0.1)
        return part

    x, y = arrays(TRAIN, 3)
    future = client.compute(
        calculator.influences(*arrays(TEST, 4), x.map_blocks(slowly, meta=np.empty((0, 1, 4))), y)
    )
    time.sleep(0.4)
    assert not future.done()
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    np.testing.assert_allclose(future.result(), model.influences(*TEST, *TRAIN).numpy(), rtol=1e-11)


@pytest.mark.parametrize("where", ["cluster", "here"])
def test_a_bar_counts_chunks(where: str, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    model = fitted()
    calculator = DaskInfluenceCalculator(model, client if where == "cluster" else None)
    found = calculator.compute(calculator.influences(*arrays(TEST, 4), *arrays(TRAIN, 25)))
    np.testing.assert_allclose(found, model.influences(*TEST, *TRAIN).numpy(), rtol=1e-11)
    assert "9/9" in capsys.readouterr().err
    calculator.compute(calculator.influence_factors(*arrays(TEST, 4)), progress=False)
    assert capsys.readouterr().err == ""
