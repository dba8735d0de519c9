"""A measurement of the test points in place of their loss, at everything that scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_framework_ekfac import EkfacInfluence
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.attribution import Stored
from influence_framework.cli.main import main
from influence_framework.reporting import report
from tests import nets, reference
from tests.pages import content, said
from tests.reference import assert_close

Points = tuple[Tensor, Tensor]
STRENGTH = 1e-2


def points(count: int, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


DATA, TRAIN, TEST = points(40, 0), points(9, 1), points(5, 2)


def margin(outputs: Tensor, batch: Points) -> Tensor:
    """The logit of the target less the mean of all."""
    return outputs.gather(1, batch[1][:, None])[:, 0] - outputs.mean(1)


def first(outputs: Tensor, batch: Points) -> Tensor:
    """The first logit."""
    return outputs[:, 0]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nets.mlp(4, 5, 3).double().eval()


@cache
def fitted(solver: Any = "direct", blocks: str = "full") -> inf.TorchInfluenceFunctionModel:
    options: Any = {"name": "ekfac", "samples": "exact", "score_rtol": 0.0} if solver == "ekfac" else solver
    model = inf.compose(
        net(), nn.CrossEntropyLoss(), solver=options, blocks=blocks, hessian_regularization=STRENGTH
    )
    return model.fit([DATA])


@cache
def sides() -> tuple[Tensor, Tensor]:
    """Gradients of the margin at the test points, and of the loss at the training points, from autograd."""
    model = net()
    rows = []
    for x, y in zip(*TEST, strict=True):
        value = margin(model(x[None]), (x[None], y[None])).sum()
        found = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows), reference.gradients(model, nn.CrossEntropyLoss(), [TRAIN])


@cache
def truth(blocks: str = "full") -> dict[str, Tensor]:
    """``∇mᵀ (C + λI)⁻¹ ∇ℓ`` by block from the whole matrix."""
    matrix = reference.gauss_newton(net(), nn.CrossEntropyLoss(), [DATA])
    left, right = sides()
    found = {}
    for name, block in fitted("direct", blocks).fitted.blocks.items():
        place = torch.arange(len(matrix))[block.selection]
        part = matrix[place[:, None], place] + STRENGTH * torch.eye(len(place), dtype=torch.float64)
        found[name] = left[:, place] @ torch.linalg.solve(part, right[:, place].T)
    return found


def exact() -> Tensor:
    return truth()["full"]


def test_the_reference_is_not_that_of_the_loss() -> None:
    losses = fitted().influences(*TEST, *TRAIN)
    assert (losses - exact()).abs().max() > 0.1 * exact().abs().max()


# Everything that scores tensors, and the scores that come of it.
ENTRIES: dict[str, Callable[[inf.TorchInfluenceFunctionModel], Tensor]] = {
    "influences": lambda model: model.influences(*TEST, *TRAIN, measurement=margin),
    "by block": lambda model: sum_of(model.influences_by_block(*TEST, *TRAIN, measurement=margin)),
    "with bounds": lambda model: model.influences(*TEST, *TRAIN, measurement=margin, return_bounds=True).scores,
    "from factors": lambda model: model.influences_from_factors(
        model.influence_factors(*TEST, measurement=margin), *TRAIN
    ),
    "from factors by block": lambda model: sum_of(
        model.influences_from_factors_by_block(
            model.influence_factors_by_block(*TEST, measurement=margin), *TRAIN
        )
    ),
    "from queries": lambda model: model.influences_from_query(
        model.query_factors(*TEST, rank=100, measurement=margin), *TRAIN
    ),
    "for several λ": lambda model: sum_of(
        model.explore_hessian_regularization(*TEST, [STRENGTH], *TRAIN, measurement=margin)[STRENGTH]
    ),
    "ensemble": lambda model: inf.ensemble([model, model]).influences(*TEST, *TRAIN, measurement=margin),
    "by member": lambda model: inf.ensemble([model]).influences_by_member(*TEST, *TRAIN, measurement=margin)[
        "0"
    ],
    "from factors of an ensemble": lambda model: inf.ensemble([model, model]).influences_from_factors(
        inf.ensemble([model, model]).influence_factors(*TEST, measurement=margin), *TRAIN
    ),
    "between loaders": lambda model: torch.from_numpy(
        inf.attribute(model, [take(TEST, 0, 2), take(TEST, 2, 5)], [TRAIN], measurement=margin).array
    ),
}


def take(data: Points, start: int, stop: int) -> Points:
    return data[0][start:stop], data[1][start:stop]


def sum_of(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum(0)


@pytest.mark.parametrize("entry", ENTRIES)
class TestEveryEntry:
    def test_gives_the_scores_of_the_dense_matrix(self, entry: str) -> None:
        assert_close(ENTRIES[entry](fitted()), exact(), 1e-8)

    def test_of_blocks(self, entry: str) -> None:
        assert_close(ENTRIES[entry](fitted("direct", "per_layer")), sum_of(truth("per_layer")), 1e-8)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "with bounds"])
def test_of_layers(entry: str) -> None:
    """An inverse that scores from inputs and output gradients, against its own matrix; bounds correct it."""
    model = fitted("ekfac")
    left, right = sides()
    expected = left @ model.fitted.blocks["full"].inverse.solve(right.T).value
    assert_close(ENTRIES[entry](model), expected, 1e-8)


@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["ekfac", {"name": "cg", "maxiter": 2}], ids=str)
def test_bounds_hold_where_the_solution_is_crude(solver: Any) -> None:
    model = inf.compose(net(), nn.CrossEntropyLoss(), solver=solver, hessian_regularization=STRENGTH)
    model.fit([DATA])
    scores, bounds = model.influences(*TEST, *TRAIN, measurement=margin, return_bounds=True)
    off = (scores - exact()).abs()
    assert off.max() > 1e-9 * exact().abs().max()
    assert (off <= bounds).all()


def test_in_mode_perturbation() -> None:
    model = fitted()
    factors = model.influence_factors(*TEST, measurement=margin)
    expected = model.influences_from_factors(factors, *TRAIN, mode="perturbation")
    found = model.influences(*TEST, *TRAIN, mode="perturbation", measurement=margin)
    assert_close(found, expected, 1e-10)
    both = model.influences(*TEST, *TRAIN, mode="perturbation", measurement=margin, return_bounds=True)
    assert_close(both.scores, expected, 1e-10)


def test_by_layer() -> None:
    model = EkfacInfluence(net(), hessian_regularization=STRENGTH).fit([DATA])
    parts = model.influences_by_layer(*TEST, *TRAIN, measurement=margin)
    assert_close(sum_of(parts), model.influences(*TEST, *TRAIN, measurement=margin), 1e-10)
    factors = model.influence_factors_by_layer(*TEST, measurement=margin)
    again = model.influences_from_factors_by_layer(factors, *TRAIN)
    for name, part in parts.items():
        assert_close(again[name], part, 1e-10)


def test_whatever_takes_test_points_takes_a_measurement() -> None:
    """A new method is not forgotten here; what is of training points alone, or takes factors, has none."""
    for owner in (inf.TorchInfluenceFunctionModel, inf.EnsembleModel, EkfacInfluence):
        for name in dir(owner):
            scores = "influences" in name and "self" not in name and "from" not in name
            if scores or name == "explore_hessian_regularization" or "factors" in name.partition("_from_")[0]:
                assert "measurement" in inspect.signature(getattr(owner, name)).parameters, (owner, name)


class TestLoaders:
    @pytest.mark.parametrize("solver", ["direct", "ekfac"])
    def test_outputs(self, solver: str) -> None:
        model = fitted(solver)
        expected = model.influences(*TEST, *TRAIN, measurement=margin)
        mean = inf.attribute(model, [TEST], [TRAIN], output="mean", measurement=margin)
        assert_close(torch.from_numpy(mean.columns["score"]), expected.mean(0), 1e-9)
        options = {"name": "matrix", "normalize": "l_relatif"}
        relative = inf.attribute(model, [TEST], [TRAIN], output=options, measurement=margin)
        own = model.self_influences(*TRAIN).sqrt()
        assert_close(torch.from_numpy(relative.array), expected / own, 1e-9)

    def test_a_store_is_of_one_measurement(self, tmp_path: Path) -> None:
        def into(measurement: Any) -> inf.Scored:
            return inf.attribute(
                fitted(), [TEST], [TRAIN], output="mean", measurement=measurement, store=tmp_path / "s"
            )

        scored = into(margin)
        assert (into(margin).columns["score"] == scored.columns["score"]).all()
        others: list[Any] = [first, None, lambda outputs, batch: outputs[:, 1]]
        for other in others:
            with pytest.raises(inf.InvalidInputError, match=r"something else: .*measurement: .*margin"):
                into(other)
        stored = Stored.read(tmp_path / "s")
        assert stored.quantity == "margin"
        assert stored.manifest["units"] == scored.units
        assert "what is measured at the test point" in scored.units

    def test_one_name_for_two_measurements(self, tmp_path: Path) -> None:
        def of(column: int) -> Any:
            return lambda outputs, batch: outputs[:, column]

        def into(column: int) -> inf.Scored:
            return inf.attribute(
                fitted(), [TEST], [TRAIN], output="mean", measurement=of(column), store=tmp_path / "s"
            )

        into(0)
        with pytest.raises(inf.InvalidInputError, match="something else: measurement"):
            into(1)
        assert Stored.read(tmp_path / "s").quantity == "measurement"

    @pytest.mark.parametrize("output", ["self_influence", "factors"])
    def test_points_that_are_not_tested_are_not_measured(self, output: str) -> None:
        with pytest.raises(inf.InvalidInputError, match="A measurement is of test points"):
            inf.attribute(fitted(), None, [TRAIN], output=output, measurement=margin)

    @pytest.mark.usefixtures("as_user")
    def test_what_is_none_is_refused(self) -> None:
        with pytest.raises(inf.InvalidInputError, match="a function of"):
            inf.attribute(fitted(), [TEST], [TRAIN], measurement="margin")


def test_a_page_does_not_speak_of_the_loss() -> None:
    scored = inf.attribute(fitted(), [TEST], [TRAIN], measurement=margin)
    page = report(scored, count=1)
    assert "Positive: up-weighting the point lowers that margin; negative: it raises it." in said(page.html)
    assert "on the margin of 5 test points" in said(page.html)
    assert content(page.html)["sides"] == [
        ["Most positive", "lowered the margin"],
        ["Most negative", "raised the margin"],
    ]


CONFIG = """
model = "measuring_project:net"
loss = "torch.nn:CrossEntropyLoss"
train = "measuring_project:train"
test = "measuring_project:test"
measurement = "measuring_project:{measurement}"
store = "scores"
output = "{output}"
hessian_regularization = 1e-2
solver = "direct"
"""

PROJECT = """
from tests.test_measurement import DATA, TEST, first, margin, net

train, test = [DATA], [TEST]
word = "margin"
"""


class TestCommand:
    def run(self, folder: Path, measurement: str, output: str) -> int:
        (folder / "measuring_project.py").write_text(PROJECT)
        config = CONFIG.format(measurement=measurement, output=output)
        if output == "self_influence":
            config = config.replace('test = "measuring_project:test"', "")
        (folder / "config.toml").write_text(config)
        return main(["run", str(folder / "config.toml"), "--no-progress"])

    def test_a_config_names_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(tmp_path, "margin", "matrix") == 0
        stored = Stored.read(tmp_path / "scores")
        expected = fitted().influences(*TEST, *DATA, measurement=margin)
        assert_close(torch.from_numpy(stored.matrix[:]), expected, 1e-9)
        assert "up-weighting the training point lowers the margin." in capsys.readouterr().out
        assert main(["top", str(tmp_path / "scores"), "--test", "1"]) == 0
        told = capsys.readouterr().out
        assert "on the margin of test point 1" in told
        assert "loss" not in told

    @pytest.mark.parametrize(
        ("measurement", "output", "message"),
        [
            ("word", "matrix", "expected a function of (outputs, batch)"),
            ("marign", "matrix", "Did you mean 'margin'?"),
            ("margin", "self_influence", "is of test points; the output"),
        ],
    )
    def test_what_it_cannot_be_is_told_before_any_work(
        self,
        measurement: str,
        output: str,
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.run(tmp_path, measurement, output) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "measurement:" in told
        assert not (tmp_path / "scores").exists()
