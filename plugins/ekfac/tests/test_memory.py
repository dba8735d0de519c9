"""Layers in partitions, eigenbases kept elsewhere and in lower precision: the same scores, and less memory."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from influence_framework_ekfac import EkfacInverse, EkfacSolver, KfacSolver, scores
from influence_framework_ekfac.partitions import factor_bytes, grouped
from influence_framework_ekfac.scores import Positions, Weighted
from influence_framework_ekfac.statistics import Covariances, Eigenbasis, SecondMoments
from influence_framework_ekfac.storage import Stored
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.layer_scores import LayerScorer
from influence_framework.layers import Layer
from influence_framework.layers.forms import FORMS
from influence_framework.testing import check_solver
from plugins.ekfac.tests import dense
from tests import language
from tests.cases import CASES, Instance
from tests.reference import assert_close

STRENGTH = 1e-2
LAYERED = ["ragged_last_batch", "conv", "embedding", "module_used_twice"]


def compose(
    instance: Instance, blocks: Any = "full", name: str = "ekfac", **solver: Any
) -> inf.TorchInfluenceFunctionModel:
    return inf.compose(
        instance.model,
        instance.loss,
        solver={"name": name, "score_rtol": 0.0, **solver},
        blocks=blocks,
        hessian_regularization=STRENGTH,
        preflight=False,
    ).fit(instance.data)


def everything(model: inf.TorchInfluenceFunctionModel, test: Any, train: Any) -> list[Tensor]:
    """Scores of every kind, at two λ."""
    other = model.with_regularization(3 * STRENGTH)
    return [
        model.influences(*test, *train),
        model.influences(*train, *test),
        model.self_influences(*test),
        model.influence_factors(*test),
        other.influences(*test, *train),
    ]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs, tolerance)


@cache
def made(name: str) -> tuple[Instance, Any]:
    return dense.made(CASES[name])


@cache
def plain(name: str, rtol: float) -> tuple[inf.TorchInfluenceFunctionModel, list[Tensor]]:
    """Everything on the device and nothing in parts, and its scores."""
    instance, test = made(name)
    model = compose(instance, score_rtol=rtol)
    return model, everything(model, test, instance.data[0])


def curvatures(model: inf.TorchInfluenceFunctionModel) -> list[Tensor]:
    """All that an inverse is made of: scores are the same where these are."""
    layers = [
        layer for inverse in model.inverses.values() for layer in cast(EkfacInverse, inverse).layers.values()
    ]
    return [part for layer in layers for part in layer.basis.tensors().values()]


@pytest.mark.parametrize(
    ("name", "solver"), [*((name, "ekfac") for name in LAYERED), ("module_used_twice", "kfac")]
)
def test_partitions_change_nothing(name: str, solver: str) -> None:
    """Of drawn targets too: every pass sees the same."""
    instance, _ = made(name)
    for samples, choices in ((1, (2,)), (2, (3, "auto"))):
        whole = curvatures(compose(instance, name=solver, samples=samples))
        for partitions in choices:
            parts = compose(instance, name=solver, samples=samples, partitions=partitions, memory_budget=1000)
            assert_same(curvatures(parts), whole)
    by_layer = compose(instance, "per_layer", name=solver, samples=2, partitions=2)
    assert_same(curvatures(by_layer), whole)


class Gated(nn.Module):
    """Applies its middle layer to batches with a sample that takes it, and to no others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = torch.tanh(self.first(x)), (x[:, :1] > 0).to(x.dtype)
        if gate.any():
            hidden = hidden + gate * torch.tanh(self.middle(hidden))
        logits: Tensor = self.last(hidden)
        return logits


def test_partitions_of_a_model_that_skips_layers_change_nothing() -> None:
    """A pass for a layer alone sees the draws of batches that go without it too."""
    torch.manual_seed(0)
    net, data = Gated().double().eval(), []
    for sign in (-1, -1, 1, 1):
        x = torch.randn(6, 3, dtype=torch.float64)
        x[:, 0] = sign * x[:, 0].abs()
        data.append((x, torch.randint(3, (6,))))
    scores = []
    for partitions in (1, 3):
        # So little memory that batches are not joined.
        model = inf.compose(
            net,
            nn.CrossEntropyLoss(),
            solver={"name": "ekfac", "partitions": partitions, "score_rtol": 0.0},
            hessian_regularization=STRENGTH,
            memory_budget=4000,
        ).fit(data)
        scores.append(model.influences(*data[3], *data[2]))
    assert_close(scores[1], scores[0], 1e-12)


def test_partitions_of_a_language_model_change_nothing() -> None:
    """The tied embedding, which is cut into smaller batches than the other layers, is in one of them."""
    test, train = (language.points("gpt2", side) for side in ("test", "train"))
    whole = language_model().influences(test, x=train)
    for partitions in (2, 5):
        # So little that the embedding's gradients are formed one by one, and others' are not.
        parts = language_model(partitions=partitions, storage="host", memory_budget=2**17)
        assert_close(parts.influences(test, x=train), whole, 1e-12)
    # Several λ from the same sides.
    swept = parts.explore_hessian_regularization(test, None, [STRENGTH, 1.0], x_train=train)
    for strength, by_block in swept.items():
        wanted = language_model().with_regularization(strength).influences(test, x=train)
        assert_close(cast(Tensor, sum(by_block.values())), wanted, 1e-12)


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("storage", ["host", "mapped"])
def test_storage_changes_nothing(name: str, storage: str, tmp_path: Path) -> None:
    instance, test = made(name)
    place = str(tmp_path / "bases") if storage == "mapped" else storage
    for rtol in (0.0, 1e-4):
        whole, wanted = plain(name, rtol)
        kept = compose(instance, score_rtol=rtol, storage=place, partitions=2)
        assert_same(everything(kept, test, instance.data[0]), wanted)
        mine, theirs = (cast(EkfacInverse, model.inverses["full"]) for model in (kept, whole))
        assert mine.spectrum == pytest.approx(theirs.spectrum, rel=1e-12)
        for inverse, elsewhere in ((mine, True), (theirs, False)):
            assert all(isinstance(layer.basis, Stored) is elsewhere for layer in inverse.layers.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LAYERED)
def test_scores_of_rounded_bases_are_off_by_a_few_roundings(name: str, dtype: torch.dtype) -> None:
    """Relative to the geometric mean of the self-influences; λ is far above ``eps²`` of the spectrum."""
    instance, test = dense.made(CASES[name])
    train, eps = instance.data[0], torch.finfo(dtype).eps
    exact, rounded = compose(instance), compose(instance, storage="host", storage_dtype=dtype)
    own = [exact.self_influences(*points).sqrt() for points in (test, train)]
    error = (rounded.influences(*test, *train) - exact.influences(*test, *train)).abs()
    relative = (error / torch.outer(*own)).max()
    assert eps / 100 < relative < 8 * eps
    inverse = cast(EkfacInverse, rounded.inverses["full"])
    for layer in inverse.layers.values():
        kept = cast(Stored, layer.basis)
        assert {part.dtype for part in kept.tensors().values()} == {dtype}
        assert {part.dtype for part in kept.load().tensors().values()} == {torch.float64}
        assert kept.nbytes == sum(part.nbytes for part in kept.tensors().values())


def language_model(
    *, memory_budget: int = 2**28, blocks: str = "per_layer", **options: Any
) -> inf.TorchInfluenceFunctionModel:
    return inf.compose(
        language.model("gpt2"),
        "causal_lm",
        solver={"name": "ekfac", **options},
        blocks=blocks,
        hessian_regularization=STRENGTH,
        memory_budget=memory_budget,
        preflight=False,
    ).fit(language.training("gpt2"))


def test_gradients_formed_in_lower_precision_are_off_by_a_few_roundings() -> None:
    test, train = (language.points("gpt2", side) for side in ("test", "train"))
    exact = language_model()
    own = [exact.self_influences(points).sqrt() for points in (test, train)]
    for dtype in (torch.bfloat16, torch.float32):
        eps = torch.finfo(dtype).eps
        rounded = language_model(score_dtype=dtype)
        error = (rounded.influences(test, x=train) - exact.influences(test, x=train)).abs()
        relative = (error / torch.outer(*own)).max()
        assert eps / 100 < relative < 8 * eps
        assert ((rounded.self_influences(test).sqrt() - own[0]).abs() / own[0]).max() < 8 * eps
        # Factors are of the parameters, whose precision they have.
        assert_close(rounded.influence_factors(test), exact.influence_factors(test), 1e-12)


class Averaged(nn.Module):
    """A layer at every position, and another on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.first(x)).mean(1))
        return logits


def test_sequences_of_all_lengths_are_scored_in_lower_precision() -> None:
    """Of short ones positions are rotated; joined with others, they are of another precision."""
    torch.manual_seed(0)
    points = {n: (torch.randn(4, n, 20, dtype=torch.float64), torch.randint(3, (4,))) for n in (1, 2, 30)}
    train = points[30]
    model = compose(
        Instance(Averaged().double().eval(), nn.CrossEntropyLoss(), [train]), score_dtype=torch.bfloat16
    )
    short = [points[1], points[2]]
    wanted = torch.cat([model.influences(*batch, *train) for batch in short])
    found = torch.from_numpy(inf.attribute(model, short, [train]).array)
    assert_close(found, wanted, 4 * torch.finfo(torch.bfloat16).eps)


def parts_of(sides: Any) -> list[Any]:
    return [part for of_block in sides.values() for part in of_block.layers.values()]


def test_test_points_are_held_once_and_in_their_precision() -> None:
    """Neither their gradients beside their factors, nor in single precision where less was asked for."""
    test = language.points("gpt2", "test")
    for dtype in (torch.float64, torch.bfloat16):
        scorer = language_model(score_dtype=dtype).fitted.layer_scorer()
        assert scorer is not None
        for _, sides in scorer.prepared(test):
            weighted = [part for part in parts_of(sides) if isinstance(part, Weighted)]
            assert weighted
            numbers = [sum(factors.numel() for factors in part.factors) for part in weighted]
            assert [part.nbytes for part in weighted] == [count * dtype.itemsize for count in numbers]
            assert {type(part) for part in parts_of(sides)} <= {Weighted, Positions}
        for _, sides in scorer.prepared(test, weigh=False):
            assert Weighted not in {type(part) for part in parts_of(sides)}


def test_large_factors_are_never_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in their parts, of which the small ones are copied together."""
    parts = [torch.full((2, 4), float(n)) for n in range(5)]
    sides = [Weighted((part,), 0) for part in parts]
    for limit, sizes in ((1, [2, 2, 2, 2, 2]), (2 * parts[0].nbytes, [4, 4, 2]), (2**20, [10])):
        monkeypatch.setattr(scores, "JOINED_BYTES", limit)
        joined = scores.join_weighted(sides)
        assert [len(part) for part in joined.factors] == sizes
        assert joined.size == 10
        assert torch.equal(torch.cat(joined.factors), torch.cat(parts))
        if limit == 1:
            assert all(mine is theirs for mine, theirs in zip(joined.factors, parts, strict=True))


def test_one_layer_at_most_is_held_twice_while_batches_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(blocks="full")
    ((block, inverse),) = cast(dict[str, EkfacInverse], model.inverses).items()
    scorer = model.fitted.layer_scorer()
    assert scorer is not None
    found = [sides[block] for _ in range(2) for _, sides in scorer.prepared(language.points("gpt2", "test"))]
    pieces = [weakref.ref(part) for sides in found for part in sides.layers.values()]
    gone: list[int] = []
    joining = EkfacInverse._joined

    def noting(self: EkfacInverse, name: str, sides: Any, sizes: Any) -> Any:
        gone.append(sum(piece() is None for piece in pieces))
        return joining(self, name, sides, sizes)

    monkeypatch.setattr(EkfacInverse, "_joined", noting)
    inverse.join(found)
    each = len(found)
    assert gone == [each * done for done in range(len(inverse.layers))]
    assert len(gone) > 1


def test_a_group_of_test_points_is_gone_before_the_next_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(memory_budget=1_000)
    test, train = language.points("gpt2", "test"), language.points("gpt2", "train")
    seen: list[int] = []
    groups: list[weakref.ref[Any]] = []
    weighed, fill = EkfacInverse.weighed, LayerScorer._fill

    def noting(self: EkfacInverse, sides: Any) -> Any:
        seen.append(sum(group() is not None for group in groups))
        return weighed(self, sides)

    def looking(self: LayerScorer, found: Any, rows: Any, height: int, held: Any, *arguments: Any) -> None:
        groups.extend(weakref.ref(side) for side in parts_of(held))
        fill(self, found, rows, height, held, *arguments)

    monkeypatch.setattr(EkfacInverse, "weighed", noting)
    monkeypatch.setattr(LayerScorer, "_fill", looking)
    model.influences(test, x=train)
    assert len(groups) > len(model.inverses)
    assert not any(seen)


def test_pieces_are_gone_while_what_was_joined_of_them_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[weakref.ref[Any]] = []
    seen = []
    combined, fill = LayerScorer.combined, LayerScorer._fill

    def noting(self: LayerScorer, found: Any) -> Any:
        assert len(found) > 1
        pieces.extend(weakref.ref(side) for sides in found for side in parts_of(sides))
        return combined(self, found)

    def looking(self: LayerScorer, *arguments: Any) -> None:
        seen.append(sum(piece() is not None for piece in pieces))
        fill(self, *arguments)

    model = language_model()
    expected = model.influences(language.points("gpt2", "test"), x=language.points("gpt2", "train"))
    monkeypatch.setattr("influence_framework.layer_scores.samples_at_once", lambda *_, **__: 1)
    monkeypatch.setattr(LayerScorer, "combined", noting)
    monkeypatch.setattr(LayerScorer, "_fill", looking)
    found = model.influences(language.points("gpt2", "test"), x=language.points("gpt2", "train"))
    assert pieces
    assert seen == [0]
    assert_close(found, expected, 1e-10)


def test_sides_of_all_forms_are_joined_and_scored_alike() -> None:
    model = language_model(score_rtol=0.0)
    points = [language.sequences(2, 7, padding=padding) for padding in (0, 1, 2, 2)]
    train = language.points("gpt2", "train")
    inverses = {name: cast(EkfacInverse, inverse) for name, inverse in model.inverses.items()}
    scorer = model.fitted.layer_scorer()
    assert scorer is not None
    wanted = torch.cat([model.influences(part, x=train) for part in points])
    for weigh in (True, False):
        parts = [sides for part in points for _, sides in scorer.prepared(part, weigh=weigh)]
        held = scorer.combined(parts)
        found = sum(scorer.with_held(held, 8, train).values())
        assert_close(cast(Tensor, found), wanted, 1e-12)
    # A side that another λ was applied to is refused.
    apart = scorer.combined([sides for _, sides in scorer.prepared(points[3], weigh=False)])
    held = scorer.combined([sides for _, sides in scorer.prepared(points[3])])
    for name, inverse in inverses.items():
        if any(isinstance(side, Weighted) for side in held[name].layers.values()):
            with pytest.raises(inf.InvalidInputError, match="weigh it with this one"):
                inverse.with_regularization(1.0).scores(held[name], apart[name])
            with pytest.raises(inf.InvalidInputError, match="weigh"):
                inverse.self_scores(held[name])
            with pytest.raises(inf.InvalidInputError, match="weigh"):
                inverse.scores(held[name], held[name])


@pytest.mark.parametrize("method", ["add", "scores"])
def test_memory_that_runs_out_beside_the_model_is_met_by_smaller_batches(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sums, half of whose layers have been added to by then; and in the scores."""
    instance = stack()
    (test, train) = ((instance.data[0][0], instance.data[0][1]), (instance.data[1][0], instance.data[1][1]))
    wanted = everything(compose(instance), test, train)
    calls: list[int] = []

    def limited(original: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def work(*arguments: Any) -> Any:
            calls.append(size(*arguments))
            if len(calls) > 2 and size(*arguments) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(*arguments)

        return work

    if method == "add":
        monkeypatch.setattr(Covariances, "add", limited(Covariances.add, lambda _, batch: batch.size))
    else:
        scored = limited(EkfacInverse.scores, lambda _, test, train: train.size)
        monkeypatch.setattr(EkfacInverse, "scores", scored)
        calls += [0, 0]
    with pytest.warns(inf.SmallerBatchWarning):
        found = everything(compose(instance), test, train)
    assert max(calls) > 3
    assert_same(found, wanted)


class Counter:
    """Bytes of all factors that are alive at any one time, by watching what holds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        for kind in (Covariances, SecondMoments, Eigenbasis):
            monkeypatch.setattr(kind, "__init__", self._noting(kind.__init__, self.alive.add))
        for kind in (Covariances, SecondMoments):
            monkeypatch.setattr(kind, "add", self._noting(kind.add, self._count))

    def _noting(self, method: Callable[..., None], note: Callable[[Any], None]) -> Callable[..., None]:
        def noting(thing: Any, *arguments: Any, **options: Any) -> None:
            method(thing, *arguments, **options)
            note(thing)

        return noting

    def _count(self, _: object) -> None:
        held = {id(part): part.nbytes for thing in self.alive for part in tensors(thing)}
        self.most = max(self.most, sum(held.values()))


def tensors(thing: Any) -> list[Tensor]:
    return list(thing.tensors().values()) if isinstance(thing, Eigenbasis) else thing.sums


def stack(widths: int = 6, depth: int = 4) -> Instance:
    """Layers that are all alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [part for _ in range(depth) for part in (nn.Linear(widths, widths, bias=False), nn.Tanh())]
        net = nn.Sequential(*layers, nn.Flatten()).double().eval()
        x, y = torch.randn(12, widths, dtype=torch.float64), torch.arange(12) % widths
    return Instance(net, nn.CrossEntropyLoss(), [(x[:8], y[:8]), (x[8:], y[8:])])


def test_no_more_than_one_group_of_factors_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    instance = stack()
    counter = Counter(monkeypatch)
    # Vectors of both sides, the eigenvalues and the sums of their squares.
    one = 4 * 6 * 6 * 8
    for partitions, storage, layers in ((1, "device", 4), (2, str(tmp_path), 2), (4, str(tmp_path), 1)):
        counter.most = 0
        model = compose(instance, partitions=partitions, storage=storage)
        assert counter.most == layers * one
        # What is foretold is what is held.
        operators = {name: block.operator for name, block in model.fitted.blocks.items()}
        needs = cast(EkfacSolver, model.solver).needs(operators)
        assert (needs.passes, needs.peak) == (2 * partitions, layers * one)
        inverse = cast(EkfacInverse, model.inverses["full"])
        kept = sum(sum(p.nbytes for p in x.basis.tensors().values()) for x in inverse.layers.values())
        assert (needs.device, needs.host, needs.disk) == ((kept, 0, 0) if partitions == 1 else (0, 0, kept))
        del model, inverse, operators


def test_a_pass_puts_hooks_on_the_layers_of_its_group_alone() -> None:
    instance = stack()
    calls: list[int] = []
    register = nn.Module.register_forward_hook

    def noting(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return register(module, *arguments, **options)

    for partitions, expected in ((1, 2 * 4), (4, 2 * 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "register_forward_hook", noting)
            solver = EkfacSolver(partitions=partitions)
            problem = inf.Problem.build(instance.model, instance.loss, instance.data)
            operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
            cast(inf.LayerStatistics, operator).cover()
            calls.clear()
            solver.fit(operator, STRENGTH)
        assert len(calls) == expected


def square(width: int) -> Layer:
    places = torch.arange(width**2).view(width, width)
    return Layer("", {"": FORMS[nn.Linear](nn.Linear(width, width, bias=False), {"weight": places})}, {})


def size_of(layer: Layer) -> int:
    return factor_bytes(layer, torch.float64, torch.float64)


def groups_of(layers: list[Layer], partitions: Any, budget: int = 1) -> list[Any]:
    return grouped(layers, partitions, budget, torch.float64, torch.float64)


def test_groups_are_neighbours_and_the_largest_is_as_small_as_can_be() -> None:
    layers = [square(width) for width in (1, 9, 2, 2, 8, 1, 5)]
    sizes = list(map(size_of, layers))
    assert sizes[1] == 4 * 81 * 8
    for partitions in range(1, 9):
        groups = groups_of(layers, partitions)
        assert [layer for group in groups for layer in group] == layers
        assert len(groups) <= partitions
        assert max(sum(map(size_of, group)) for group in groups) == best(sizes, partitions)
    for budget in (1, sizes[1] + sizes[0], sum(sizes)):
        groups = groups_of(layers, "auto", budget)
        held = [sum(map(size_of, group)) for group in groups]
        assert all(size <= budget or len(group) == 1 for size, group in zip(held, groups, strict=True))
        following = zip(held, groups[1:], strict=False)
        assert all(size + size_of(group[0]) > budget for size, group in following)
    assert groups_of([], 3) == []


def best(sizes: list[int], partitions: int) -> int:
    """By trying every cut."""
    if partitions == 1 or len(sizes) == 1:
        return sum(sizes)
    cuts = (max(sum(sizes[:at]), best(sizes[at:], partitions - 1)) for at in range(1, len(sizes)))
    return min(sum(sizes), *cuts)


def test_files_are_removed_with_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "bases"
    instance, test = dense.made(CASES["ragged_last_batch"])
    model = compose(instance, storage=str(folder))
    other = compose(instance, storage=str(folder))
    assert len(files(folder)) == 2 * len(cast(EkfacInverse, model.inverses["full"]).layers)
    kept = cast(Stored, next(iter(cast(EkfacInverse, model.inverses["full"]).layers.values())).basis)
    assert kept.nbytes < min(path.stat().st_size for path in files(folder)) + kept.nbytes
    sent = pickle.loads(pickle.dumps(kept))
    assert torch.equal(sent.load().outputs, kept.load().outputs)
    del sent
    gc.collect()
    assert kept.load().values.numel()
    expected = other.influences(*test)
    del model, kept
    gc.collect()
    assert len(files(folder)) == len(cast(EkfacInverse, other.inverses["full"]).layers)
    assert torch.equal(other.influences(*test), expected)
    for path in files(folder):
        path.unlink()
    with pytest.raises(inf.InvalidInputError, match="is gone"):
        other.influences(*test)


def test_a_process_that_was_forked_off_removes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a loader, say, in which copies of the inverse end with it."""
    model = compose(dense.made(CASES["ragged_last_batch"])[0], storage=str(tmp_path))
    before = set(files(tmp_path))
    with monkeypatch.context() as there:
        there.setattr(os, "getpid", lambda: 0)
        del model
        gc.collect()
    assert before
    assert set(files(tmp_path)) == before


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("storage", ["device", "host", "mapped"])
def test_what_is_saved_and_loaded_scores_the_same(
    storage: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    instance, test = dense.made(CASES["conv"])
    place = str(tmp_path / "bases") if storage == "mapped" else storage
    model = compose(instance, storage=place, storage_dtype=dtype)
    model.save(tmp_path / "saved")
    again = inf.load(tmp_path / "saved", instance.model, instance.loss)
    assert torch.equal(again.influences(*test), model.influences(*test))
    assert torch.equal(again.influence_factors(*test), model.influence_factors(*test))
    assert again.solver == model.solver


def test_it_can_be_moved_and_sent(tmp_path: Path) -> None:
    instance, test = dense.made(CASES["conv"])
    for storage in ("host", str(tmp_path)):
        model = compose(instance, storage=storage)
        expected = model.influences(*test)
        assert torch.equal(model.to("cpu").influences(*test), expected)
        inverse = cast(EkfacInverse, model.inverses["full"])
        columns = torch.eye(inverse.shape[0], dtype=torch.float64)[:, :3]
        sent = pickle.loads(pickle.dumps(dict(inverse.layers)))
        for name, layer in inverse.layers.items():
            assert torch.equal(sent[name].basis.load().outputs, layer.basis.load().outputs)
        assert (inverse @ columns).isfinite().all()


def test_conformance(tmp_path: Path) -> None:
    check_solver(
        EkfacSolver(partitions="auto", storage=str(tmp_path), storage_dtype=torch.float64, memory_budget=10_000)
    )


@pytest.mark.parametrize("solver", [EkfacSolver, KfacSolver])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("partitions", value) for value in (0, -1, 1.5, True, "all", None)],
        *[("storage", value) for value in ("", 3, None)],
        *[("storage_dtype", value) for value in (torch.float16, torch.int8, "bfloat16")],
        ("score_dtype", torch.float16),
    ],
)
def test_wrong_options_are_refused(solver: Any, option: str, value: Any) -> None:
    with pytest.raises((inf.InvalidInputError, TypeError), match=f"{option}"):
        solver(**{option: value})


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(inf.InvalidInputError, match="is a file"):
        EkfacSolver(storage=str(tmp_path / "file"))


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(inf.InvalidInputError, match="given as storage cannot be made"):
        compose(dense.made(CASES["ragged_last_batch"])[0], storage=str(tmp_path / "file" / "bases"))
