"""Scores between loaders: those of tensors, in any number of groups and blocks, with identifiers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf
from influence_framework.attribution import attribute
from tests import nets

Points = tuple[Tensor, Tensor]
ROOMY, TIGHT = 2**28, 10_000


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, TEST = points(150, 1), points(29, 2)


def batches(data: Points, size: int) -> list[Points]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


class Counting(nn.Module):
    """Counts the samples of its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nets.mlp(4, 6, 3).double()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        result: Tensor = self.inner(x)
        return result


def model(solver: Any = "cg", budget: int = ROOMY, net: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    chosen = net or nets.mlp(4, 6, 3).double().eval()
    composed = inf.compose(
        chosen, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=1e-2, memory_budget=budget
    )
    return composed.fit(batches(TRAIN, 40))


fitted_once = cache(model)
"""For tests that leave the model as it is."""


@pytest.mark.parametrize("budget", [ROOMY, TIGHT])
@pytest.mark.parametrize("solver", ["direct", "ekfac"])
class TestEveryOutput:
    """Against the scores of tensors, with test batches, training batches and blocks of unlike sizes."""

    def scored(self, solver: Any, budget: int, output: Any, test: bool = True) -> tuple[Any, inf.Scored]:
        fitted = fitted_once(solver, budget)
        loaders = batches(TEST, 4) if test else None, batches(TRAIN, 17)
        return fitted, attribute(fitted, *loaders, output=output)

    def test_matrix(self, solver: Any, budget: int) -> None:
        fitted, scored = self.scored(solver, budget, "matrix")
        expected = fitted.influences(*TEST, *TRAIN)
        torch.testing.assert_close(torch.from_numpy(scored.array), expected, rtol=1e-8, atol=1e-10)

    def test_top_k(self, solver: Any, budget: int) -> None:
        fitted, scored = self.scored(solver, budget, {"name": "top_k", "k": 7})
        expected = fitted.influences(*TEST, *TRAIN)
        frame = scored.to_pandas()
        for side, sign in (("helpful", 1), ("harmful", -1)):
            best = (sign * expected).sort(dim=1, descending=True)
            rows = frame[frame["side"] == side]
            assert rows["train"].to_list() == best.indices[:, :7].flatten().tolist()
            found = torch.tensor(rows["score"].to_numpy()).reshape(len(TEST[0]), 7)
            torch.testing.assert_close(sign * found, best.values[:, :7], rtol=1e-8, atol=1e-10)
            assert rows["test"].to_list() == [i for i in range(len(TEST[0])) for _ in range(7)]
            assert rows["rank"].to_list() == list(range(7)) * len(TEST[0])

    def test_mean(self, solver: Any, budget: int) -> None:
        fitted, scored = self.scored(solver, budget, "mean")
        expected = fitted.influences(*TEST, *TRAIN).mean(0)
        found = torch.from_numpy(scored.columns["score"])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)

    def test_self_influence(self, solver: Any, budget: int) -> None:
        fitted, scored = self.scored(solver, budget, "self_influence", test=False)
        found = torch.from_numpy(scored.columns["score"])
        torch.testing.assert_close(found, fitted.self_influences(*TRAIN), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("normalize", ["l_relatif", "theta_relatif"])
    def test_relative_influence(self, solver: Any, budget: int, normalize: str) -> None:
        fitted, scored = self.scored(solver, budget, {"name": "matrix", "normalize": normalize})
        factors = fitted.influence_factors(*TRAIN)
        own = {"l_relatif": fitted.self_influences(*TRAIN).sqrt(), "theta_relatif": factors.norm(dim=1)}
        expected = fitted.influences(*TEST, *TRAIN) / own[normalize]
        torch.testing.assert_close(torch.from_numpy(scored.array), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["cg", "ekfac"])
def test_the_test_side_is_solved_for_once_and_the_training_data_passed_once(solver: str) -> None:
    net = Counting().eval()
    fitted = model(solver, net=net)
    net.seen = 0
    attribute(fitted, batches(TEST, 4), batches(TRAIN, 17), output="mean")
    per_test, extra = len(TEST[0]), 4 * (len(TEST[0]) + len(TRAIN[0]))
    once = net.seen
    net.seen = 0
    attribute(fitted, batches(TEST, 4), [*batches(TRAIN, 17), *batches(TRAIN, 17)], output="mean")
    # Twice the training data costs one more pass over it, and nothing on the test side.
    assert net.seen - once < once
    assert once < (len(TRAIN[0]) + per_test) + extra
    if solver == "cg":
        assert len(fitted.report) == len(TEST[0])


class Passes:
    """Counts the passes over batches."""

    def __init__(self, data: list[Points]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[Points]:
        self.passes += 1
        return iter(self.data)


@pytest.mark.parametrize(("budget", "groups"), [(ROOMY, 1), (TIGHT, 3)])
def test_the_loaders_are_passed_once_to_survey_them_and_the_training_data_once_a_group(
    budget: int, groups: int
) -> None:
    test, train = Passes(batches(TEST, 4)), Passes(batches(TRAIN, 17))
    fitted = fitted_once("direct", budget)
    attribute(fitted, test, train, output="mean")
    assert (test.passes, train.passes) == (2, 1 + groups)
    assert len(fitted.report) == len(TEST[0])


@pytest.mark.parametrize("normalize", ["l_relatif", "theta_relatif"])
def test_what_normalised_scores_are_divided_by_is_worked_out_once_for_all_groups(normalize: str) -> None:
    test, train = Passes(batches(TEST, 4)), Passes(batches(TRAIN, 17))
    fitted = fitted_once("direct", TIGHT)
    attribute(fitted, test, train, output={"name": "mean", "normalize": normalize})
    assert (test.passes, train.passes) == (2, 1 + 3 + 1)
    assert len(fitted.report) == len(TEST[0]) + len(TRAIN[0])


def test_a_group_of_test_points_at_a_time_is_what_the_budget_holds() -> None:
    fitted = model("direct", TIGHT)
    attribute(fitted, batches(TEST, 4), batches(TRAIN, 17), output="mean")
    assert len(fitted.report) == len(TEST[0])


def test_scores_of_half_precision_are_in_single_precision() -> None:
    """NumPy has no bfloat16."""
    net = nets.mlp(4, 6, 3).eval().to(torch.bfloat16)
    half = [(x.to(torch.bfloat16), y) for x, y in batches(TRAIN, 40)]
    x, y = TEST[0].to(torch.bfloat16), TEST[1]
    fitted = inf.compose(
        net, nn.CrossEntropyLoss(), solver="ekfac", hessian_regularization=1e-2, preflight=False
    ).fit(half)
    found = torch.from_numpy(attribute(fitted, [(x, y)], half).array)
    wanted = fitted.influences(x, y, torch.cat([x for x, _ in half]), torch.cat([y for _, y in half]))
    assert found.dtype is torch.float32
    assert (found - wanted.float()).abs().max() < 2e-2 * wanted.float().abs().max()


def test_identifiers_travel_with_the_scores() -> None:
    names = np.array([f"image-{index:03}" for index in range(len(TRAIN[0]))])
    order = torch.randperm(len(TRAIN[0]), generator=torch.Generator().manual_seed(3))
    train = [(TRAIN[0][part], TRAIN[1][part], names[part.numpy()].tolist()) for part in order.split(13)]
    test = [(x, y, torch.arange(100, 100 + len(x))) for x, y in batches(TEST, len(TEST[0]))]
    fitted = fitted_once("direct")
    plain = attribute(fitted, batches(TEST, 4), batches(TRAIN, 17), output="top_k").to_pandas()
    named = attribute(fitted, test, train, output="top_k").to_pandas()
    assert named["train"].to_list() == [f"image-{index:03}" for index in plain["train"]]
    assert named["test"].to_list() == [index + 100 for index in plain["test"]]
    np.testing.assert_allclose(named["score"], plain["score"], rtol=1e-9)


def test_a_shuffling_loader_without_identifiers_is_refused() -> None:
    fitted = fitted_once("direct")
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=16, shuffle=True)
    with pytest.raises(inf.InvalidInputError, match=r"shuffles.*shuffle=False, or yield"):
        attribute(fitted, batches(TEST, 4), loader)
    ordered = DataLoader(TensorDataset(*TRAIN), batch_size=16)
    attribute(fitted, batches(TEST, 4), ordered)
    numbered = DataLoader(TensorDataset(*TRAIN, torch.arange(len(TRAIN[0]))), batch_size=16, shuffle=True)
    shuffled = attribute(fitted, batches(TEST, 4), numbered)
    expected = fitted.influences(*TEST, *TRAIN)[:, shuffled.train_ids].numpy()
    np.testing.assert_allclose(shuffled.array, expected, rtol=1e-9, atol=1e-12)


class Restless:
    """Another order in every pass, from no random state that could be set back."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        order = torch.arange(len(TRAIN[0])).roll(self.passes)
        for part in order.split(30):
            yield TRAIN[0][part], TRAIN[1][part], part


def test_a_loader_whose_order_changes_between_passes_is_noticed() -> None:
    with pytest.raises(inf.InvalidInputError, match="another order in every pass"):
        attribute(fitted_once("direct"), batches(TEST, 4), Restless())


class Dwindling(Passes):
    """Its last batch is missing from the second pass on."""

    def __iter__(self) -> Iterator[Points]:
        self.passes += 1
        return iter(self.data if self.passes == 1 else self.data[:-1])


@pytest.mark.parametrize("side", ["test", "train"])
def test_a_loader_that_yields_fewer_points_in_a_later_pass_is_noticed(side: str) -> None:
    data = {"test": batches(TEST, 4), "train": batches(TRAIN, 50)}
    missing, whole = len(data[side][-1][0]), {"test": len(TEST[0]), "train": len(TRAIN[0])}[side]
    with pytest.raises(
        inf.InvalidInputError, match=f"{whole} points when first read and {whole - missing} now"
    ):
        attribute(fitted_once("direct"), **data | {side: Dwindling(data[side])})


@pytest.mark.parametrize("seed", range(3))
def test_blocks_in_any_order_give_the_same_extremes_and_the_earlier_of_equal_ones(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(-4, 5, (6, 50)).astype(np.float32)
    starts = np.arange(0, 50, 20)
    collector = inf.attribution.TopK(9).collector(6, 50, scores.dtype)
    for row in (0, 4):
        for start in generator.permutation(starts):
            rows, columns = slice(row, min(6, row + 4)), slice(start, min(50, start + 20))
            collector.add(rows, columns, scores[rows, columns])
    columns = collector.columns(np.arange(6), np.arange(50))
    for side, sign in enumerate((1, -1)):
        expected = np.argsort(-sign * scores, axis=1, kind="stable")[:, :9]
        np.testing.assert_array_equal(columns["train"].reshape(2, 6, 9)[side], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "matrxi"}, "Did you mean 'matrix'"),
        ({"output": {"name": "top_k", "k": 0}}, "k must be a positive integer"),
        ({"output": {"name": "top_k", "kk": 3}}, "'top_k' has no option 'kk'. Did you mean 'k'"),
        ({"output": {"name": "mean", "normalize": "x"}}, "got 'x'"),
        ({"output": {"name": "self_influence", "normalize": "l_relatif"}}, "leave normalize out"),
        ({"output": "self_influence"}, "pass test=None"),
        ({"test": None}, "pass test points too"),
        ({"train": []}, "the training points yielded no batch"),
        ({"train": [TRAIN[0]]}, r"Expected batches \(x, y\)"),
        ({"train": [(*TRAIN, [1, 2])]}, "one for each of the 150 samples"),
        ({"train": iter([TRAIN])}, "one-shot iterator"),
        ({"train": [(TRAIN[0] * float("nan"), TRAIN[1])]}, "NaN or infinity in the points from 0 on"),
    ],
    ids=lambda case: "" if isinstance(case, dict) else case[:30],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"test": batches(TEST, 4), "train": batches(TRAIN, 17)} | change
    with pytest.raises(inf.InvalidInputError, match=message):
        attribute(fitted_once("direct"), **settings)


def test_loaders_in_the_place_of_the_model_are_refused() -> None:
    unchecked = inspect.unwrap(attribute)  # the types that the tests check would be refused before
    with pytest.raises(inf.InvalidInputError, match=r"got list: attribute\(model, test, train\)"):
        unchecked(batches(TEST, 4), batches(TRAIN, 17), fitted_once("direct"))


def test_a_result_is_printed_in_a_line() -> None:
    model = fitted_once("direct")
    assert repr(attribute(model, batches(TEST, 4), batches(TRAIN, 17))).endswith(
        f"test points: {len(TEST[0])}, training points: {len(TRAIN[0])}>"
    )
    alone = repr(attribute(model, None, batches(TRAIN, 17), output="self_influence"))
    assert "test points" not in alone
    assert len(alone) < 100


def test_before_fit_there_is_nothing_to_score() -> None:
    unfitted = inf.compose(nets.mlp(4, 3), nn.CrossEntropyLoss(), solver="direct")
    with pytest.raises(inf.NotFittedError):
        attribute(unfitted, batches(TEST, 4), batches(TRAIN, 17))


def test_failures_in_blocks_are_reported_as_one() -> None:
    limited = {"name": "cg", "maxiter": 1, "rtol": 1e-12}
    with pytest.warns(inf.ConvergenceWarning, match="150 of 150 right-hand sides") as caught:
        attribute(model(limited), None, batches(TRAIN, 17), output="self_influence")
    assert len(caught) == 1


def test_batches_of_unlike_shapes_stay_apart() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x.mean(1))
            return result

    torch.manual_seed(0)
    net = Pooled().double().eval()
    data = [(torch.randn(5, length, 4, dtype=torch.float64), torch.randint(3, (5,))) for length in (2, 3, 2)]
    fitted = inf.compose(net, nn.CrossEntropyLoss(), solver="direct", hessian_regularization=0.1).fit(data)
    found = attribute(fitted, data, data).array
    expected = torch.cat([torch.cat([fitted.influences(*a, *b) for b in data], 1) for a in data])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-12)


def test_scores_of_a_model_in_half_precision_are_in_single_precision() -> None:
    torch.manual_seed(0)
    half = nets.mlp(4, 6, 3).bfloat16().eval()

    def scores(dtype: torch.dtype) -> Any:
        train, test = ([(x.bfloat16().to(dtype), y) for x, y in batches(side, 40)] for side in (TRAIN, TEST))
        fitted = inf.compose(
            copy.deepcopy(half).to(dtype),
            nn.CrossEntropyLoss(),
            solver="ekfac",
            blocks="per_layer",
            hessian_regularization=0.1,
        ).fit(train)
        return attribute(fitted, test, train).array

    found, expected = scores(torch.bfloat16), scores(torch.float64)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected)
