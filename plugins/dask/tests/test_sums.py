"""Fits as sums over parts of the data on workers, against fits in one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from dask.utils import key_split
from distributed import Client, get_task_stream
from influence_framework_dask import DaskBatches, DaskInfluenceCalculator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf

Points = tuple[Tensor, Tensor]


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, TEST = points(60, 1), points(7, 2)
UNEVEN = [(TRAIN[0][:37], TRAIN[1][:37]), (TRAIN[0][37:], TRAIN[1][37:])]
CG, EKFAC = {"name": "cg", "rtol": 1e-12}, {"name": "ekfac", "samples": "exact"}


def fitted(solver: Any, source: Any, data: Any = UNEVEN, strength: Any = 0.3, **options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    composed = inf.compose(
        net,
        nn.CrossEntropyLoss(),
        solver=solver,
        source=source,
        hessian_regularization=strength,
        preflight=False,
        **options,
    )
    return composed.fit(data)


def summed(source: str) -> dict[str, Any]:
    return {"name": "dask", "source": source, "least": 1}


def assert_same_scores(ours: Any, theirs: Any) -> None:
    found, expected = (model.influences(*TEST, *TRAIN) for model in (ours, theirs))
    # Sums in another order; EK-FAC's eigenvectors follow them.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher", "hessian"])
def test_the_matrix_is_that_of_the_source_in_all_that_it_offers(source: str) -> None:
    models = [fitted("direct", chosen, blocks="per_layer") for chosen in (summed(source), source)]
    ours, theirs = (next(iter(model.fitted.blocks.values())).operator for model in models)
    columns = torch.randn(ours.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    torch.testing.assert_close(ours @ columns, theirs @ columns)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(ours.to_dense(), theirs.to_dense())
    for capability in (inf.Diagonal, inf.Trace):
        assert isinstance(ours, capability) == isinstance(theirs, capability) == (source != "hessian")
    assert not isinstance(ours, inf.Minibatches)
    if isinstance(theirs, inf.Diagonal):
        torch.testing.assert_close(ours.diagonal(), theirs.diagonal())
        assert ours.trace() == pytest.approx(theirs.trace())
        assert ours.positive_semidefinite == theirs.positive_semidefinite


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize(
    ("solver", "source"), [(CG, "hessian"), (EKFAC, "gauss_newton"), (EKFAC, "empirical_fisher")]
)
def test_scores_are_those_of_one_process(solver: Any, source: str) -> None:
    assert_same_scores(fitted(solver, summed(source)), fitted(solver, source))


@pytest.mark.usefixtures("current")
def test_a_relative_strength() -> None:
    relative = inf.RelativeRegularization(0.5)
    ours = fitted("direct", summed("gauss_newton"), strength=relative)
    assert_same_scores(ours, fitted("direct", "gauss_newton", strength=relative))


@pytest.mark.usefixtures("current")
def test_what_is_drawn_differs_from_part_to_part() -> None:
    """In expectation they are the exact ones."""
    solver = {"name": "ekfac", "samples": 200}
    ours, exact = fitted(solver, summed("gauss_newton")), fitted(EKFAC, "gauss_newton")
    found, expected = ours.influences(*TEST, *TRAIN), exact.influences(*TEST, *TRAIN)
    assert (found - expected).norm() < 0.05 * expected.norm()


def arrays(count: int = 60, chunk: int = 25) -> tuple[da.Array, da.Array]:
    x, y = (part[:count].numpy() for part in TRAIN)
    return da.from_array(x, chunks=(chunk, 4)), da.from_array(y, chunks=chunk)


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("kind", ["arrays", "loader", "in memory"])
def test_data_beyond_the_budget_is_read_by_the_workers(kind: str) -> None:
    few = [(TRAIN[0][:16], TRAIN[1][:16])]
    data = DaskBatches(*arrays(16, 6))
    loader = DataLoader(TensorDataset(*few[0]), batch_size=6)
    # Less than the 640 bytes of the data.
    budget = 2**28 if kind == "in memory" else 600
    model = fitted(EKFAC, summed("gauss_newton"), loader if kind == "loader" else data, memory_budget=budget)
    assert model.fitted.problem.cached == (kind == "in memory")
    assert_same_scores(model, fitted(EKFAC, "gauss_newton", few))


@pytest.mark.usefixtures("current")
def test_data_that_workers_cannot_read_is_refused() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"exceeds memory_budget, 1000 bytes.*pass DaskBatches"):
        fitted("direct", summed("gauss_newton"), memory_budget=1000)
    x, y = arrays()
    with pytest.raises(inf.InvalidInputError, match=r"y\.rechunk"):
        DaskBatches(x, y.rechunk(20))


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("solver", [CG, EKFAC], ids=["cg", "ekfac"])
@pytest.mark.parametrize("output", ["matrix", "self_influence"])
def test_what_was_fitted_there_scores_there(solver: Any, output: str) -> None:
    model = fitted(solver, summed("gauss_newton"))
    test = [TEST] if output == "matrix" else None
    ours = inf.attribute(model, test, [TRAIN], output=output, executor="dask")
    theirs = inf.attribute(fitted(solver, "gauss_newton"), test, [TRAIN], output=output)
    np.testing.assert_allclose(ours.columns["score"], theirs.columns["score"], rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("current")
def test_a_calculator_says_who_can_solve() -> None:
    test = [da.from_array(part.numpy(), chunks=-1) for part in TEST]
    model = fitted(CG, summed("gauss_newton"))
    calculator = DaskInfluenceCalculator(model)
    with pytest.raises(inf.InvalidInputError, match="whose workers cannot solve"):
        calculator.influences(*test)
    factors = da.from_array(model.influence_factors(*TEST).numpy(), chunks=-1)
    found = calculator.influences_from_factors(factors, *arrays()).compute()
    np.testing.assert_allclose(found, model.influences(*TEST, *TRAIN).numpy(), rtol=1e-10)
    layered = fitted(EKFAC, summed("gauss_newton"))
    found = DaskInfluenceCalculator(layered).influences(*test).compute()
    np.testing.assert_allclose(found, layered.influences(*TEST).numpy(), rtol=1e-10)


def test_few_samples_are_summed_here_without_a_cluster() -> None:
    assert_same_scores(fitted("direct", "dask"), fitted("direct", "gauss_newton"))


def test_parts_lost_with_their_worker_are_made_again(client: Client, current: Client) -> None:
    ours, theirs = fitted(CG, summed("gauss_newton")), fitted(CG, "gauss_newton")
    assert_same_scores(ours, theirs)
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    assert_same_scores(ours, theirs)


@pytest.mark.parametrize("solver", ["direct", "ekfac", "cg"])
def test_what_was_fitted_on_a_cluster_is_saved_and_loaded_also_without_one(
    solver: str, client: Client, tmp_path: Path
) -> None:
    options = {"direct": "direct", "ekfac": EKFAC, "cg": CG}[solver]
    with client.as_current():
        model = fitted(options, summed("gauss_newton"))
        expected = model.influences(*TEST, *TRAIN)
        model.save(tmp_path / "saved")
        there = inf.load(tmp_path / "saved", model.model, model.loss, UNEVEN)
        torch.testing.assert_close(there.influences(*TEST, *TRAIN), expected)
    if solver == "cg":
        with pytest.raises(inf.InvalidInputError, match="needs the training data again"):
            inf.load(tmp_path / "saved", model.model, model.loss)
        with pytest.raises(inf.InvalidInputError, match="There is no Dask client"):
            inf.load(tmp_path / "saved", model.model, model.loss, UNEVEN)
        return
    alone = inf.load(tmp_path / "saved", model.model, model.loss)
    assert torch.equal(alone.influences(*TEST, *TRAIN), expected)
    with pytest.raises(inf.InvalidInputError, match="loaded without its training data"):
        next(iter(alone.fitted.blocks.values())).operator @ torch.ones(51, 1, dtype=torch.float64)


LOADER = DataLoader(TensorDataset(*TRAIN), batch_size=20)
SUMS = ("product", "layers", "matrix")
WORDS = {
    *(f"influence-{what}{stage}" for what in SUMS for stage in ("-sent", "", "-sum")),
    *("influence-data", "influence-solve", "influence-scores"),
    *("influence-self-influences", "influence-factors"),
}


@pytest.mark.usefixtures("current")
def test_the_dashboard_shows_tasks_by_what_they_do(current: Client) -> None:
    with get_task_stream(current) as stream:
        for solver in (EKFAC, CG, "direct"):
            model = fitted(solver, summed("gauss_newton"))
            model.influences(*TEST)
        inf.attribute(model, None, LOADER, output="self_influence", executor="dask")
        model = fitted("direct", "gauss_newton")
        for output in ("matrix", "self_influence", "factors", {"name": "mean", "normalize": "l_relatif"}):
            test = None if output in ("self_influence", "factors") else LOADER
            inf.attribute(model, test, LOADER, output=output, executor="dask")
    assert {key_split(task["key"]) for task in stream.data} == WORDS
