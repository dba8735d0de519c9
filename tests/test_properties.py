"""What holds for every shape, batch size, dtype, block structure and λ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import influence_framework as inf
from tests import nets, reference
from tests.fits import STRUCTURES
from tests.reference import Sample, assert_close

Loss = Callable[[Tensor, Tensor], Tensor]

SOLVERS: dict[str, dict[str, Any]] = {
    "direct": {"name": "direct"},
    "cg": {"name": "cg", "rtol": 1e-12, "atol": 0.0},
    "ekfac": {"name": "ekfac", "samples": "exact", "score_rtol": 0.0},
}
LOSSES: dict[str, Loss] = {"cross-entropy": nn.CrossEntropyLoss(), "squared error": nn.MSELoss()}
# Rounding times what a condition number of at most 1e3 and the products before the solve make of it.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-8}


@dataclass(frozen=True)
class Setting:
    """One influence model and its data."""

    widths: tuple[int, ...]
    samples: int
    batch: int
    dtype: torch.dtype
    structure: str
    fraction: float
    source: str
    loss: str
    solver: str
    seed: int

    def net(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nets.mlp(*self.widths).to(self.dtype).eval()

    def points(self, count: int, seed: int) -> Sample:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        x = torch.randn(count, self.widths[0], generator=generator, dtype=torch.float64).to(self.dtype)
        if self.loss == "squared error":
            y = torch.randn(count, self.widths[-1], generator=generator, dtype=torch.float64)
            return x, y.to(self.dtype)
        return x, torch.randint(self.widths[-1], (count,), generator=generator)

    @property
    def train(self) -> Sample:
        return self.points(self.samples, 0)

    def batches(self, size: int | None = None) -> list[Sample]:
        x, y = self.train
        size = size or self.batch
        return list(zip(x.split(size), y.split(size), strict=True))

    def exact(self, batch: Sample) -> Sample:
        """The same points in double precision."""
        x, y = batch
        return x.double(), y.double() if y.is_floating_point() else y

    def curvature(self) -> Tensor:
        return reference.CURVATURES[self.source](
            copy.deepcopy(self.net()).double(), LOSSES[self.loss], [self.exact(self.train)]
        )

    @property
    def strength(self) -> float:
        """λ above the magnitude of any negative eigenvalue, and well below the largest."""
        values = torch.linalg.eigvalsh(self.curvature())
        return self.fraction * values[-1].item() + 1.5 * max(0.0, -values[0].item())

    def fitted(self, data: list[Sample] | None = None, **options: Any) -> inf.TorchInfluenceFunctionModel:
        net = self.net()
        names = [name for name, _ in net.named_parameters()]
        settings: dict[str, Any] = {
            "loss": LOSSES[self.loss],
            "solver": SOLVERS[self.solver],
            "source": self.source,
            "blocks": STRUCTURES[self.structure][0](names),
            "hessian_regularization": self.strength,
            # λ may outweigh a block whose curvature is small beside the others'.
            "preflight": False,
        }
        return inf.compose(net, **(settings | options)).fit(self.batches() if data is None else data)

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        assert_close(actual, expected, TOLERANCE[self.dtype], str(self))


def drawn(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Setting]:
    anything: dict[str, st.SearchStrategy[Any]] = {
        "widths": st.lists(st.integers(1, 4), min_size=1, max_size=2).flatmap(
            lambda inner: st.integers(2, 4).map(lambda outputs: (*inner, outputs))
        ),
        "samples": st.integers(1, 9),
        "batch": st.integers(1, 10),
        "dtype": st.sampled_from([torch.float64, torch.float32]),
        "structure": st.sampled_from(list(STRUCTURES)),
        "fraction": st.sampled_from([1e-3, 0.01, 0.1, 1.0]),
        "source": st.sampled_from(list(reference.CURVATURES)),
        "loss": st.sampled_from(list(LOSSES)),
        "solver": st.just("direct"),
        "seed": st.integers(0, 99),
    }
    return st.builds(Setting, **(anything | fixed))


def examples(count: int) -> settings:
    """Nothing is shrunk: a setting is small as it is drawn, and shrinking would take minutes."""
    return settings(max_examples=count, phases=[Phase.generate])


ANY_SOLVER = {"solver": st.sampled_from(list(SOLVERS)), "dtype": st.just(torch.float64)}
SIZES = st.integers(1, 6)


@examples(30)
@given(drawn(), SIZES, SIZES, st.sampled_from(list(inf.InfluenceMode)))
def test_scores_are_those_of_the_dense_reference(
    setting: Setting, tests: int, trains: int, mode: inf.InfluenceMode
) -> None:
    test, train = setting.points(tests, 1), setting.points(trains, 2)
    net, loss = setting.net().double(), LOSSES[setting.loss]
    names = STRUCTURES[setting.structure][1]([name for name, _ in net.named_parameters()])
    strengths = dict.fromkeys(names, setting.strength)
    parts = reference.block_inverse(net, setting.curvature(), names, strengths)
    inverse = torch.stack(list(parts.values())).sum(0)
    gradients = reference.gradients(net, loss, [setting.exact(test)])
    if mode is inf.InfluenceMode.Up:
        others = reference.gradients(net, loss, [setting.exact(train)])
        expected = reference.up_scores(inverse, gradients, others)
    else:
        mixed = reference.mixed_derivatives(net, loss, *setting.exact(train))
        expected = reference.perturbation_scores(inverse, gradients, mixed)
    influence = setting.fitted()
    setting.assert_close(influence.influences(*test, *train, mode), expected)
    setting.assert_close(influence.influence_factors(*test), gradients @ inverse)


@examples(12)
@given(drawn(solver=st.sampled_from(["direct", "cg"])), SIZES, st.randoms(use_true_random=False))
def test_neither_order_nor_batches_of_the_data_matter(setting: Setting, size: int, random: Any) -> None:
    setting = replace(setting, dtype=torch.float64)
    order = random.sample(range(setting.samples), setting.samples)
    x, y = (part[order] for part in setting.train)
    shuffled = list(zip(x.split(size), y.split(size), strict=True))
    test, train = setting.points(2, 1), setting.points(3, 2)
    expected = setting.fitted().influences(*test, *train)
    for budget in (1, 2**28):
        other = setting.fitted(shuffled, memory_budget=budget)
        setting.assert_close(other.influences(*test, *train), expected)


@examples(12)
@given(drawn(**ANY_SOLVER), SIZES, SIZES)
def test_blocks_add_up(setting: Setting, tests: int, trains: int) -> None:
    influence = setting.fitted()
    test, train = setting.points(tests, 1), setting.points(trains, 2)
    for mode in inf.InfluenceMode:
        parts = influence.influences_by_block(*test, *train, mode)
        total = torch.stack(list(parts.values())).sum(0)
        setting.assert_close(influence.influences(*test, *train, mode), total)
        factors = influence.influence_factors(*test)
        setting.assert_close(influence.influences_from_factors(factors, *train, mode), total)


@examples(12)
@given(drawn(**ANY_SOLVER), SIZES, SIZES)
def test_swapping_the_sides_transposes_the_scores(setting: Setting, tests: int, trains: int) -> None:
    influence = setting.fitted()
    test, train = setting.points(tests, 1), setting.points(trains, 2)
    # From the factors of each side in turn, since the model itself solves for the smaller one.
    forth = influence.influences_from_factors(influence.influence_factors(*test), *train)
    back = influence.influences_from_factors(influence.influence_factors(*train), *test)
    setting.assert_close(forth, back.T)
    setting.assert_close(influence.influences(*test, *train), forth)
    setting.assert_close(influence.influences(*train, *test), back)


@examples(12)
@given(drawn(**ANY_SOLVER), SIZES)
def test_self_influences_are_the_diagonal(setting: Setting, count: int) -> None:
    influence, points = setting.fitted(), setting.points(count, 1)
    setting.assert_close(influence.self_influences(*points), influence.influences(*points).diagonal())


@examples(12)
@given(drawn(**ANY_SOLVER), SIZES, st.sampled_from([1.01, 3.0, 100.0]))
def test_another_regularization_is_another_fit(setting: Setting, tests: int, factor: float) -> None:
    test, strength = setting.points(tests, 1), factor * setting.strength
    again = setting.fitted(hessian_regularization=strength)
    moved = setting.fitted().with_regularization(strength)
    setting.assert_close(moved.influences(*test), again.influences(*test))


@examples(12)
@given(drawn(), st.sampled_from([0.125, 0.3, 7.0]), SIZES)
def test_a_multiple_of_the_loss(setting: Setting, factor: float, tests: int) -> None:
    """Gradients are multiplied by ``c``, and so is ``C``; the empirical Fisher by ``c²``."""
    setting = replace(setting, dtype=torch.float64)
    loss, test = LOSSES[setting.loss], setting.points(tests, 1)
    curved = factor**2 if setting.source == "empirical_fisher" else factor
    plain = setting.fitted()
    scaled = setting.fitted(
        loss=lambda output, target: factor * loss(output, target),
        hessian_regularization=curved * setting.strength,
    )
    setting.assert_close(scaled.influence_factors(*test), factor / curved * plain.influence_factors(*test))
    setting.assert_close(scaled.influences(*test), factor**2 / curved * plain.influences(*test))
