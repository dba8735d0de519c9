"""What cannot be right is refused at once, with what was given, what was expected and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf
from tests import nets
from tests.small import Action, batches, fit, fitted, model, net, points

pytestmark = pytest.mark.usefixtures("as_user")


def changed(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[], list[Any]]:
    """The batches with input (0) or target (1) of the last one changed."""

    def make() -> list[Any]:
        first, last = batches()
        parts = list(last)
        parts[index] = change(parts[index])
        return [first, tuple(parts)]

    return make


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


NAN, INF = float("nan"), float("inf")

DATA: dict[str, tuple[Action, str]] = {
    "empty list": (fit(list), r"training data is empty: .* Is the dataset empty, or drop_last=True"),
    "empty loader": (
        fit(lambda: DataLoader(TensorDataset(*points(3)), batch_size=4, drop_last=True)),
        "training data is empty",
    ),
    "a batch without samples": (fit(lambda: [points(2), points(0)]), "training data has no sample"),
    "iterator": (
        fit(lambda: iter(batches())),
        r"one-shot iterator \(list_iterator\).* Pass a DataLoader, or a list",
    ),
    "generator": (fit(lambda: (batch for batch in batches())), r"one-shot iterator \(generator\)"),
    "dataset": (
        fit(lambda: TensorDataset(*points())),
        r"dataset TensorDataset .*DataLoader\(dataset, batch_size",
    ),
    "tensor": (fit(lambda: points()[0]), "DataLoader or any re-iterable of batches .*, not Tensor"),
    "mapping": (fit(lambda: {"x": points()[0]}), "re-iterable of batches .*, not dict"),
    "number": (fit(lambda: 3), "re-iterable of batches .*, not int"),
    "the pair itself": (
        fit(points),
        r"batches \(x, y\), got Tensor\. All samples in one batch are \[\(x, y\)\]",
    ),
    "inputs alone": (fit(lambda: [points()[0]]), r"batches \(x, y\), got Tensor"),
    "triples": (fit(lambda: [(*points(), points()[1])]), r"batches \(x, y\), got 3 parts"),
    "mappings": (
        fit(lambda: [{"x": points()[0], "y": points()[1]}]),
        r"batches \(x, y\), got dict\..*'causal_lm'",
    ),
    "lengths differ": (fit(changed(0, lambda x: x[1:])), r"same number of samples .* x: \(2, 3\), y: \(3,\)"),
    "no batch dimension": (
        fit(lambda: [(points()[0], torch.tensor(1))]),
        r"without a batch dimension.*unsqueeze\(0\)",
    ),
    "target is a list": (fit(lambda: [(points()[0], [0, 1, 1, 0])]), "y holds no tensor, got list"),
    "float32 inputs": (
        fit(changed(0, Tensor.float)),
        r"holds torch.float32, .* torch.float64: .*\.to\(torch.float64",
    ),
    "float32 targets": (
        fit(lambda: [(x, y[:, None].float()) for x, y in batches()], module=net(1), loss=nn.MSELoss()),
        r"float32, .*float64.*\.to\(torch.float64\)",
    ),
    "another device": (
        fit(changed(0, lambda x: x.to("meta"))),
        r"on meta, the model on cpu: move .*\.to\(device\)",
    ),
    "targets on another device": (fit(changed(1, lambda y: y.to("meta"))), "on meta, the model on cpu"),
    "NaN inputs": (
        fit(changed(0, lambda x: with_value(x, NAN))),
        r"NaN or infinity in the training data \(sample 0 of a batch of 3\): drop or",
    ),
    "infinite inputs": (
        fit(changed(0, lambda x: with_value(x, INF))),
        "NaN or infinity in the training data",
    ),
    "NaN targets": (
        fit(
            lambda: [(x, with_value(x[:, :1], NAN)) for x, _ in batches()],
            module=net(1),
            loss=nn.MSELoss(),
        ),
        "NaN or infinity in the training data",
    ),
}


@pytest.mark.parametrize("what", DATA)
def test_data(what: str) -> None:
    action, message = DATA[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        action()


class Loader:
    """Re-iterable, with other batches on every pass."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = iter(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(next(self.passes))


@pytest.mark.parametrize("second", [batches()[:1], [*batches(), points(2, 5)]])
def test_a_loader_that_changes_its_length(second: list[Any]) -> None:
    with pytest.raises(
        inf.InvalidInputError, match=r"held 7 samples when .* first read and \d now: it must yield the same"
    ):
        # What fits the budget is read once; only what is streamed can change.
        model(memory_budget=1).fit(Loader(batches(), second))


def poisoned(value: float, *, buffer: bool = False) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    tensor = module[1].running_mean if buffer else module[0].weight
    assert isinstance(tensor, Tensor)
    with torch.no_grad():
        tensor.view(-1)[1] = value
    return module


class Functional(nn.Module):
    """A linear layer and a function after it."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2).double(), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is on its way out
        script: nn.Module = torch.jit.script(module)
    return script


def compiled(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the compiler's own imports have to say
        optimized: nn.Module = torch.compile(module)
    return optimized


def without_gradients() -> nn.Module:
    return net().requires_grad_(False)


def mixed_dtypes() -> nn.Module:
    module = net()
    module[2].float()
    return module


def of_dtype(dtype: torch.dtype) -> nn.Module:
    module = net()
    module[0].weight = nn.Parameter(module[0].weight.detach().to(dtype), requires_grad=True)
    return nets.frozen(module, "0.bias", "2.")


class Recurrent(nn.Module):
    """Each sample goes on from the one before, whatever the batch; the first one is right."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: lambda x: x, "Expected a torch.nn.Module, got function"),
    "no trainable parameter": (
        without_gradients,
        r"Sequential has no trainable parameter.*requires_grad_\(True\)",
    ),
    "no parameter at all": (nn.Flatten, "no trainable parameter"),
    "two dtypes": (mixed_dtypes, r"share one dtype and device, found .*float32.*float64.*model\.to\("),
    "complex": (lambda: of_dtype(torch.complex128), "real floating-point parameters, got torch.complex128"),
    "NaN parameter": (lambda: poisoned(NAN), "'0.weight' of the model contains NaN or infinity"),
    "infinite parameter": (lambda: poisoned(INF), "'0.weight' of the model contains NaN or infinity"),
    "NaN buffer": (
        lambda: poisoned(NAN, buffer=True),
        "'1.running_mean' of the model contains NaN or infinity",
    ),
    "random": (
        lambda: Functional(lambda out: F.dropout(out, 0.5, training=True)),
        r"Two forward passes .* different .* model\.eval\(\), and switch off functional dropout",
    ),
    "noisy": (lambda: Functional(lambda out: out + torch.randn_like(out)), "the model draws random numbers"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).double().eval(),
        r"^1 normalise by the statistics of the batch .*track_running_stats=False.*use running statistics",
    ),
    "centred on the batch": (
        lambda: Functional(lambda out: out - out.mean(0)),
        r"differs with the other samples of its batch.*use running statistics",
    ),
    "samples taken for time steps": (
        lambda: nn.Sequential(Recurrent(), nn.Linear(4, 2)).double(),
        r"differs with the other samples of its batch.*batch_first=True",
    ),
    "tuple output": (
        lambda: Functional(lambda out: (out, out)),
        "returned tuple; a single tensor .* Wrap the model",
    ),
    "mapping output": (lambda: Functional(lambda out: {"logits": out}), "returned dict; a single tensor"),
    "integer output": (
        lambda: Functional(lambda out: out.argmax(1)),
        "returned torch.int64; expected floating",
    ),
    "output for the batch": (lambda: Functional(torch.sum), r"shape \(\) for 4 samples: the first dimension"),
    "output transposed": (
        lambda: Functional(lambda out: out.T),
        r"shape \(2, 4\) for 4 samples: the first dim",
    ),
    "infinite output": (
        lambda: Functional(lambda out: out / 0),
        "model returns NaN or infinity on the training data",
    ),
    "TorchScript": (
        lambda: scripted(net()),
        "The model is a TorchScript module: .* Pass the original nn.Module",
    ),
    "compiled": (lambda: compiled(net()), "made by torch.compile .*pass the module that was compiled"),
    "TorchScript inside": (
        lambda: nn.Sequential(scripted(nn.Linear(3, 2).double())),
        "The submodule '0' is a TorchScript module",
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_model(what: str) -> None:
    make, message = MODELS[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        model(make()).fit(batches())


def test_a_model_that_squeezes_the_batch_dimension_away() -> None:
    data = [(x, torch.ones(len(x)).double()) for x, _ in batches()]
    message = r"shape \(4,\) for a batch and \(\) for its first sample alone.* squeeze\(-1\)"
    with pytest.raises(inf.InvalidInputError, match=message):
        model(Functional(lambda out: out[:, :1].squeeze()), nn.MSELoss()).fit(data)
    model(Functional(lambda out: out[:, :1].squeeze(-1)), nn.MSELoss()).fit(data)


@pytest.mark.parametrize("budget", [1, 2**20])
def test_a_model_that_mixes_samples_is_found_out_from_batches_of_one(budget: int) -> None:
    x, y = points(5)
    data = [(x[[i]], y[[i]]) for i in range(5)]
    with pytest.raises(inf.InvalidInputError, match=r"differs with the other samples of its batch"):
        model(Functional(lambda out: out - out.mean(0) / 2), memory_budget=budget).fit(data)
    model(Functional(lambda out: out), memory_budget=budget).fit(data)


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    influence = model().fit(batches())
    expected = influence.influences(*points(2))
    with torch.inference_mode():
        for action in (model().fit, lambda _: influence.influences(*points(2))):
            with pytest.raises(inf.InvalidInputError, match=r"inference_mode\(\).*no_grad\(\) is fine"):
                action(batches())
        made = net(), batches()
    with pytest.raises(inf.InvalidInputError, match=r"inference_mode\(\).* model made outside"):
        model(made[0]).fit(batches())
    with pytest.raises(inf.InvalidInputError, match=r"training data was made under .*clone\(\)"):
        model().fit(made[1])
    with torch.no_grad():
        torch.testing.assert_close(model().fit(batches()).influences(*points(2)), expected)


TRAINING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), r"1 \(Dropout\)"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), r"1 \(BatchNorm1d\)"),
    "random slope": (lambda: nn.Sequential(nn.Linear(3, 2), nn.RReLU()), r"1 \(RReLU\)"),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(3, 2), nn.AlphaDropout(0.5)), r"1 \(AlphaDropout\)"),
    "nested": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Dropout(0.1))), r"1\.0 \(Dropout\)"),
}


@pytest.mark.parametrize("what", TRAINING)
def test_pitfall_train_mode_is_refused_and_eval_mode_is_not(what: str) -> None:
    make, layer = TRAINING[what]
    module = make().double()
    with pytest.raises(inf.InvalidInputError, match=rf"train mode .*{layer}.* Call model\.eval\(\) first"):
        model(module.train()).fit(batches())
    scored = model(module.eval()).fit(batches()).influences(*points(2))
    assert scored.shape == (2, 2)


def test_train_mode_without_such_layers_is_fine() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Tanh(), nn.Linear(4, 2)).double().train()
    assert torch.isfinite(model(module).fit(batches()).influences(*points(2))).all()


def test_pitfall_train_mode_after_the_fit_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double().eval()
    influence = model(module).fit(batches())
    module.train()
    with pytest.raises(inf.InvalidInputError, match=r"train mode .*1 \(Dropout\).*model\.eval\(\)"):
        influence.influences(*points(2))


def test_a_failed_fit_leaves_the_previous_one() -> None:
    influence = fitted()
    expected = influence.influences(*points(2))
    other = [(x + 1.0, y) for x, y in batches()]
    for bad in ([*other, (points()[0], points()[1][1:])], [(x * NAN, y) for x, y in other], []):
        with pytest.raises(inf.InvalidInputError):
            influence.fit(bad)
        assert influence.is_fitted
        assert torch.equal(influence.influences(*points(2)), expected)
    assert not torch.equal(influence.fit(other).influences(*points(2)), expected)


def test_a_first_fit_that_fails_leaves_the_model_unfitted() -> None:
    influence = model()
    with pytest.raises(inf.InvalidInputError):
        influence.fit([])
    assert not influence.is_fitted
    with pytest.raises(inf.NotFittedError):
        influence.influences(*points(2))
