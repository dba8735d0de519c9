"""The executor ``dask`` against the sequential one: results, failures, threads, and workers that are lost."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import torch
from distributed import Client
from influence_framework_dask import DaskExecutor, shipping
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.testing import check_executor

Points = tuple[Tensor, Tensor]


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


CASES: list[tuple[str, int, Any]] = [
    ("direct", 2**28, "matrix"),
    ("direct", 20_000, "matrix"),
    ("direct", 20_000, "top_k"),
    ("direct", 20_000, "self_influence"),
    ("ekfac", 20_000, {"name": "mean", "normalize": "l_relatif"}),
    ("ekfac", 20_000, "matrix"),
]
"""With the smaller budget there are several groups of test points."""

TRAIN, TEST = points(90, 1), points(17, 2)


def batches(data: Points, size: int) -> list[Points]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def fitted(solver: Any = "direct", budget: int = 2**28, model: nn.Module | None = None, **options: Any) -> Any:
    composed = inf.compose(
        model or net(),
        nn.CrossEntropyLoss(),
        solver=solver,
        hessian_regularization=1e-2,
        memory_budget=budget,
        preflight=False,
        **options,
    )
    return composed.fit(batches(TRAIN, 40))


def scored(model: Any, executor: Any = "dask", output: Any = "matrix", **options: Any) -> inf.Scored:
    test = None if output == "self_influence" else batches(TEST, 5)
    return inf.attribute(model, test, batches(TRAIN, 13), output=output, executor=executor, **options)


def workers_hold(client: Client, *tokens: str) -> bool:
    """Whether they come to hold these objects and nothing else; it takes a moment after a model is gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        gc.collect()
        if all(held == list(tokens) for held in client.run(lambda: list(shipping._held)).values()):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize(("solver", "budget", "output"), CASES, ids=str)
def test_results_are_those_of_the_sequential_executor(solver: str, budget: int, output: Any) -> None:
    model = fitted(solver, budget)
    ours, theirs = scored(model, output=output).columns, scored(model, "sequential", output).columns
    assert list(ours) == list(theirs)
    for name, column in theirs.items():
        if name == "score":
            # Solved for in other groups: the same sums in another order.
            np.testing.assert_allclose(ours[name], column, rtol=1e-12, atol=1e-14)
        else:
            np.testing.assert_array_equal(ours[name], column)


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("solver", ["direct", "ekfac"])
def test_factors_of_test_points_are_compressed_where_they_are_solved_for(solver: str) -> None:
    model = fitted(solver)
    ours, theirs = scored(model, query_rank=100), scored(model, "sequential")
    np.testing.assert_allclose(ours.array, theirs.array, rtol=1e-10, atol=1e-12)
    lost = scored(model, query_rank=1).query_error
    assert lost is not None
    assert (lost > 0).all()


@pytest.mark.usefixtures("current", "as_user")
def test_the_executor_passes_every_check_of_the_kit() -> None:
    check_executor("dask")


@pytest.mark.usefixtures("current")
def test_iterative_solvers_agree_to_their_tolerance() -> None:
    model = fitted({"name": "cg", "rtol": 1e-10})
    ours, theirs = scored(model).array, scored(model, "sequential").array
    # The condition number is a few hundred.
    np.testing.assert_allclose(ours, theirs, atol=1e-7 * abs(theirs).max())
    assert model.report.blocks[0].converged.all()
    assert len(model.report.blocks[0].converged) == len(TEST[0])


def test_the_model_goes_to_each_worker_once_and_jobs_are_taken_back(
    client: Client, current: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    register = Client.register_plugin

    def noting(self: Client, plugin: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(plugin.token)
        return register(self, plugin, *args, **kwargs)

    assert workers_hold(client)
    monkeypatch.setattr(Client, "register_plugin", noting)
    model = fitted(budget=3_000)
    for _ in range(2):
        scored(model)
    token = shipping.token_of(model.fitted)
    assert sent.count(token) == 1
    assert len(sent) > 5
    opened = client.run(lambda: sum(held.opened for held in shipping._held.values()))
    assert set(opened.values()) == {1}
    assert workers_hold(client, token)
    del model
    assert workers_hold(client)


def test_what_is_sent_is_no_larger_than_what_is_in_it() -> None:
    whole = torch.zeros(100_000)
    content, _ = shipping.dumps([whole[:10], whole[10:20]])
    assert len(content) < 2_000
    assert torch.equal(shipping.loads(content)[1], whole[10:20])


def test_without_a_client_the_remedy_is_named() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"distributed\.Client\(n_workers"):
        scored(fitted())


def test_a_scheduler_may_be_named(client: Client) -> None:
    model, address = fitted(), client.scheduler_info()["address"]
    executor = {"name": "dask", "address": address}
    np.testing.assert_allclose(scored(model, executor).array, scored(model, "sequential").array, rtol=1e-12)
    other = shipping_client(address)
    assert other is shipping_client(address)
    other.close()


def shipping_client(address: str) -> Client:
    from influence_framework_dask.executor import client_at

    return client_at(address)


def test_results_and_units_are_streamed(current: Client) -> None:
    """No unit is read before there is a worker for it, and closing leaves nothing behind."""
    executor, read = DaskExecutor(), []

    def units() -> Iterator[int]:
        for unit in range(1000):
            read.append(unit)
            yield unit

    results = executor.run(lambda unit: unit**2, units())
    found = [next(results) for _ in range(20)]
    assert executor.workers == 2
    assert len(read) <= 20 + 2 * 2
    assert sorted(found)[:4] == [(0, 0), (1, 1), (2, 4), (3, 9)]
    results.close()  # type: ignore[attr-defined]
    assert not any(
        key.startswith("influence") for keys in current.processing().values() for key in map(str, keys)
    )
    assert len(read) <= 20 + 2 * 2


class TestFailures:
    @pytest.mark.usefixtures("current")
    def test_of_a_job_come_through_as_they_are(self) -> None:
        bad = [*batches(TRAIN, 13), (TRAIN[0][:2] * float("nan"), TRAIN[1][:2])]
        with pytest.raises(inf.InvalidInputError, match="NaN or infinity in the points from 0 on"):
            inf.attribute(fitted(), batches(TEST, 5), bad, executor="dask")

    @pytest.mark.usefixtures("current")
    def test_of_a_loader_come_through_as_they_are(self) -> None:
        def units() -> Iterator[int]:
            yield 1
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            list(DaskExecutor().run(abs, units()))

    @pytest.mark.usefixtures("current")
    @pytest.mark.parametrize("policy", ["raise", "warn"])
    def test_of_a_solver_are_told_as_the_policy_has_it(self, policy: str) -> None:
        model = fitted({"name": "cg", "maxiter": 1, "rtol": 1e-12}, on_failure=policy)
        expected = pytest.raises(inf.ConvergenceError, match="17 of 17") if policy == "raise" else None
        with expected or pytest.warns(inf.ConvergenceWarning, match="17 of 17 right-hand sides"):
            scored(model)


@pytest.mark.usefixtures("current")
def test_threads_of_a_worker_never_share_the_model() -> None:
    """Each worker has two threads, and every one of them is given units."""

    class Alone(nn.Module):
        inside = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            Alone.inside += 1
            time.sleep(0.002)
            alone = Alone.inside == 1
            Alone.inside -= 1
            if not alone:
                raise RuntimeError("two threads are in the model")
            result: Tensor = self.inner(x)
            return result

    model = fitted(model=Alone().double().eval(), budget=30_000)
    np.testing.assert_allclose(scored(model).array, scored(model, "sequential").array, rtol=1e-12)


@pytest.mark.usefixtures("current")
def test_a_lost_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    flag = tmp_path / "killed"

    class Fatal(nn.Module):
        """Kills the first worker that gets to score training points."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            try:
                distributed.get_worker()
            except ValueError:
                pass
            else:
                if not flag.exists():
                    flag.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)
            result: Tensor = self.inner(x)
            return result

    model = fitted(model=Fatal().double().eval(), budget=10_000)
    found = scored(model)
    assert flag.exists()
    np.testing.assert_allclose(found.array, scored(model, "sequential").array, rtol=1e-12)


@pytest.mark.usefixtures("current")
def test_a_bar_counts_scores(capsys: pytest.CaptureFixture[str]) -> None:
    scored(fitted(), progress=True)
    assert "1.53k/1.53k" in capsys.readouterr().err
