"""Matrix forms of layers against the per-sample gradients that torch.func finds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from influence_framework.layers.forms import FORMS, MatrixForm, UnsupportedLayerError, form_of
from tests.reference import assert_close

DRAWS = 2


class Conv1D(nn.Module):
    """As in ``transformers``, which need not be installed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Case:
    """A module, what it is called with, and the subset of its parameters that takes part."""

    def __init__(self, module: nn.Module, x: Tensor, names: tuple[str, ...], seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.module, self.x, self.names = module.double().eval(), x, names
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = 0.5 + torch.rand(tensor.shape, generator=self.generator, dtype=tensor.dtype)
        self.parameters = {name: getattr(module, name).detach() for name in names}
        # Scattered over a vector with gaps, so that no order of the entries is right by chance.
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.numel = sum(sizes) + 3
        order = torch.randperm(self.numel, generator=self.generator)[: sum(sizes)].split(sizes)
        self.places = {
            name: part.view(self.parameters[name].shape) for name, part in zip(names, order, strict=True)
        }
        self.cotangents = self.normal(DRAWS, *module(x).shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def losses(self, outputs: Tensor, samples: slice) -> Tensor:
        """One loss for each draw, not linear in the outputs."""
        return (self.cotangents[:, samples] * torch.sin(outputs)).flatten(1).sum(1)

    def form(self) -> MatrixForm:
        kind = form_of(self.module, FORMS)
        assert kind is not None
        return kind(self.module, self.places)

    def output_gradients(self) -> Tensor:
        outputs = self.module(self.x).detach()
        return self.cotangents * torch.cos(outputs)

    def expected(self) -> Tensor:
        """``(s, n, P)``, one sample at a time."""
        result = torch.zeros(DRAWS, len(self.x), self.numel, dtype=torch.float64)
        for i in range(len(self.x)):
            sample = slice(i, i + 1)

            def losses(parameters: dict[str, Tensor], sample: slice = sample) -> Tensor:
                outputs = torch.func.functional_call(self.module, parameters, (self.x[sample],))
                return self.losses(outputs, sample)

            for name, jacobian in torch.func.jacrev(losses)(self.parameters).items():
                result[:, i, self.places[name].flatten()] = jacobian.flatten(1)
        return result


def gradients(form: MatrixForm, x: Tensor, output_gradients: Tensor, numel: int) -> Tensor:
    """``Σ_t δ[s,n,t] ⊗ ā[n,t]`` scattered by ``places``, ``(s, n, P)``."""
    inputs, delta = form.inputs(x), form.output_gradients(x, output_gradients)
    if form.one_hot:
        inputs = nn.functional.one_hot(inputs, form.places.shape[2]).double()[None]
    matrices = torch.einsum("sgnto,gnte->sngoe", delta, inputs)
    assert matrices.shape[2:] == form.places.shape
    result = matrices.new_zeros(*matrices.shape[:2], numel)
    result[..., form.places.flatten()] = matrices.flatten(2)
    return result


def check(case: Case) -> None:
    form = case.form()
    assert_close(gradients(form, case.x, case.output_gradients(), case.numel), case.expected(), 1e-10)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


BOTH = [("weight", "bias"), ("weight",), ("bias",)]
subsets = pytest.mark.parametrize("names", BOTH, ids="+".join)


@subsets
@pytest.mark.parametrize("shape", [(3,), (1,), (3, 5), (2, 3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: Conv1D(3, 4)], ids=["Linear", "Conv1D"])
def test_linear(make: Callable[[], nn.Module], shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    check(Case(make(), normal(*shape, 4), names))


def test_linear_without_a_bias_has_no_column_of_ones_and_no_copy() -> None:
    case = Case(nn.Linear(4, 3, bias=False), normal(2, 5, 4), ("weight",))
    assert case.form().inputs(case.x).data_ptr() == case.x.data_ptr()
    check(case)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 2, 3), (2, 3, 7)),
    "1d one sample": (nn.Conv1d(3, 2, 2, padding=1), (1, 3, 6)),
    "2d": (nn.Conv2d(3, 4, (3, 2)), (2, 3, 6, 5)),
    "2d strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(2, 1)), (3, 3, 6, 7)),
    "2d dilated": (nn.Conv2d(2, 3, (3, 2), dilation=(2, 3), padding=(1, 2), stride=(1, 2)), (2, 2, 7, 8)),
    "2d grouped": (nn.Conv2d(6, 4, (3, 2), groups=2, padding=1), (2, 6, 4, 5)),
    "2d depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding=1, dilation=2), (2, 3, 6, 5)),
    "2d depthwise, two outputs each": (nn.Conv2d(3, 6, 2, groups=3), (2, 3, 4, 5)),
    "2d pointwise": (nn.Conv2d(3, 4, 1), (2, 3, 4, 5)),
    "2d valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 4, 5)),
    "3d": (nn.Conv3d(2, 3, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2)), (2, 2, 4, 5, 3)),
    "3d grouped": (nn.Conv3d(4, 2, (3, 2, 1), groups=2, dilation=(1, 2, 1)), (2, 4, 4, 5, 2)),
}


@subsets
@pytest.mark.parametrize("key", CONVOLUTIONS)
def test_convolution(key: str, names: tuple[str, ...]) -> None:
    module, shape = CONVOLUTIONS[key]
    check(Case(module, normal(*shape), names))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("dims", "padding"), [*product([1, 2, 3], ["same", "given"])])
def test_padding_modes(dims: int, padding: str, mode: str) -> None:
    """Kernels of which ``"same"`` pads one side more than the other, and margins that differ by axis."""
    kind: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    kernel, dilation, margins = (4, 3, 2)[:dims], (1, 2, 1)[:dims], (2, 1, 0)[:dims]
    width = padding if padding == "same" else margins
    module = kind(2, 4, kernel, padding=width, dilation=dilation, padding_mode=mode, groups=2)
    check(Case(module, normal(2, 2, *(5, 6, 4)[:dims]), ("weight", "bias")))


def test_convolution_of_any_memory_layout() -> None:
    x = normal(2, 6, 5, 4).to(memory_format=torch.channels_last)
    check(Case(nn.Conv2d(6, 4, 3, padding=1, groups=2), x, ("weight", "bias")))


def test_inputs_of_a_convolution_join_samples_and_pixels_without_a_copy() -> None:
    case = Case(nn.Conv2d(3, 4, 3), normal(2, 3, 6, 5), ("weight", "bias"))
    inputs = case.form().inputs(case.x)
    assert inputs[0].view(-1, inputs.shape[-1]).data_ptr() == inputs.data_ptr()


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 5), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("padding", [None, 0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding(shape: tuple[int, ...], padding: int | None, dtype: torch.dtype) -> None:
    """With repeated indices, and with the padding index where there is one."""
    x = torch.randint(4, shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    x.view(-1)[-1] = 1 if padding is None else padding % 4
    check(Case(nn.Embedding(4, 3, padding_idx=padding), x, ("weight",)))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(4, eps=0.1), (3, 4)),
    "layer of tokens": (lambda: nn.LayerNorm(4, eps=0.1), (3, 5, 2, 4)),
    "layer of images": (lambda: nn.LayerNorm((3, 4), eps=0.1), (2, 5, 3, 4)),
    "layer of whole images": (lambda: nn.LayerNorm((2, 3, 4)), (1, 2, 3, 4)),
    "rms": (lambda: nn.RMSNorm(4, eps=0.1), (3, 5, 4)),
    "rms of images, eps left out": (lambda: nn.RMSNorm((3, 4)), (2, 5, 3, 4)),
    "group": (lambda: nn.GroupNorm(2, 6, eps=0.1), (3, 6, 4, 2)),
    "group of vectors": (lambda: nn.GroupNorm(2, 6, eps=0.1), (2, 6)),
    "batch 1d": (lambda: nn.BatchNorm1d(3, eps=0.1), (4, 3)),
    "batch 1d of sequences": (lambda: nn.BatchNorm1d(3), (2, 3, 5)),
    "batch 2d": (lambda: nn.BatchNorm2d(3, eps=0.1), (1, 3, 4, 2)),
    "batch 3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 4, 2)),
}


@pytest.mark.parametrize(
    ("key", "names"),
    [(key, names) for key, names in product(NORMS, BOTH) if not key.startswith("rms") or names == ("weight",)],
)
def test_norms(key: str, names: tuple[str, ...]) -> None:
    make, shape = NORMS[key]
    check(Case(make(), normal(*shape), names))


@pytest.mark.parametrize("key", ["layer of tokens", "batch 2d"])
def test_kronecker_factors_of_a_norm_give_the_exact_second_moment(key: str) -> None:
    make, shape = NORMS[key]
    case = Case(make(), normal(*shape), ("weight", "bias"))
    form = case.form()
    inputs, delta = form.inputs(case.x), form.output_gradients(case.x, case.output_gradients())
    left = torch.einsum("sgnto,sgntp->op", delta, delta)
    right = torch.einsum("gnte,gntf->ef", inputs, inputs) / len(case.x)
    exact = torch.einsum("snp,snq->pq", case.expected(), case.expected())
    where = form.places.flatten()
    assert_close(torch.kron(left, right), exact[where][:, where], 1e-10)


EMPTY = {
    "linear": (nn.Linear(4, 3), (0, 5, 4)),
    "convolution": (nn.Conv2d(2, 4, 2, groups=2), (0, 2, 4, 5)),
    "norm": (nn.LayerNorm(4), (0, 5, 4)),
}


@pytest.mark.parametrize("key", EMPTY)
def test_no_samples(key: str) -> None:
    module, shape = EMPTY[key]
    case = Case(module, normal(*shape), ("weight", "bias"))
    assert gradients(case.form(), case.x, case.cotangents, case.numel).shape == (DRAWS, 0, case.numel)


def every_place(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.arange(p.numel()).view(p.shape) for name, p in module.named_parameters(recurse=False)}


def extended() -> nn.Module:
    module = nn.Linear(2, 2)
    module.gain = nn.Parameter(torch.ones(2))
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(4, 3, sparse=True), "sparse"),
        (nn.BatchNorm1d(3), "eval"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "running statistics"),
        (extended(), "gain"),
        (nn.LayerNorm(3, elementwise_affine=False), "no parameter"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_options_that_are_not_covered(module: nn.Module, reason: str) -> None:
    kind = form_of(module, FORMS)
    assert kind is not None
    with pytest.raises(UnsupportedLayerError, match=reason):
        kind(module, every_place(module))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(4, 3), normal(4)),
        (nn.Conv1d(2, 3, 2), normal(2, 5)),
        (nn.LayerNorm((3, 4)), normal(3, 4)),
        (nn.Embedding(4, 3), torch.tensor(2)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_one_sample_without_a_batch(module: nn.Module, x: Tensor) -> None:
    kind = form_of(module, FORMS)
    assert kind is not None
    with pytest.raises(UnsupportedLayerError, match="samples first"):
        kind(module, every_place(module)).inputs(x)


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ConvTranspose2d(2, 2, 2), nn.Bilinear(2, 2, 2), nn.PReLU(), nn.GRU(2, 2)]
)
def test_layers_without_a_form(module: nn.Module) -> None:
    assert form_of(module, FORMS) is None


def test_a_form_is_looked_up_along_the_bases_of_the_class() -> None:
    class Base(nn.Linear):
        pass

    class Derived(Base):
        pass

    mine: dict[type | str, type[MatrixForm]] = {f"{__name__}.{Base.__qualname__}": FORMS[nn.Embedding]}
    assert form_of(Derived(2, 2), FORMS) is FORMS[nn.Linear]
    assert form_of(Derived(2, 2), FORMS | mine) is FORMS[nn.Embedding]
    assert form_of(Derived(2, 2), {}) is None
