"""K-FAC and EK-FAC from their definitions, one sample, draw and group at a time.

Nothing here uses the package under test. Inputs of layers are found by what a layer returns for weights that
are zero but for one entry, so that strides, padding, groups and repeated indices are the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import reference
from tests.cases import Case, Instance
from tests.reference import Loss, Sample

LEFT_OUT = "ignore:.*left out directions of no curvature:influence_framework.ConvergenceWarning"
"""For tests of what comes of λ = 0 on singular curvature."""

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Rows = Callable[[Tensor, Tensor], Tensor]
"""From the output ``(1, …)`` and target of one sample to cotangents ``(s, 1, …)``."""


class Conv1D(nn.Module):
    """As in ``transformers``, which need not be installed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def true_rows(loss: Loss) -> Rows:
    """The gradient for the true label."""
    return lambda output, y: torch.func.grad(lambda o: loss(o, y))(output)[None]


def exact_rows(loss: Loss) -> Rows:
    """A square root of the loss's Hessian in the output."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        width = output.numel()
        gradient = torch.func.jacrev(lambda o: loss(o.reshape(output.shape), y))
        # Forward mode, which torch.func.hessian takes, warns of its own making.
        values, vectors = torch.linalg.eigh(torch.func.jacrev(gradient)(output.flatten()))
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root.T.reshape(width, *output.shape)

    return rows


def enumerated_rows(loss: Loss) -> Rows:
    """The gradient for every label of one categorical output, times the root of the label's probability."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        roots = output.softmax(1)[0].sqrt()
        labels = [torch.full_like(y, label) for label in range(output.shape[1])]
        gradients = [torch.func.grad(lambda o, label=label: loss(o, label))(output) for label in labels]
        return torch.stack([root * gradient for root, gradient in zip(roots, gradients, strict=True)])

    return rows


@dataclass(frozen=True)
class Layer:
    """Parameters and the modules that use them.

    ``places`` says where in the flat vector each entry of the layer's matrices is, ``(g, o, e)``.
    """

    name: str
    modules: tuple[nn.Module, ...]
    local: tuple[str, ...]
    places: Tensor

    @property
    def is_norm(self) -> bool:
        return isinstance(self.modules[0], NORMS)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.modules[0], nn.Embedding)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every module with its own parameters; parameters that several modules share by themselves."""
    grouped: dict[tuple[str, ...], dict[str, str]] = {}
    for name, parameter in reference.trainable(model).items():
        owners = [
            (module_name, local)
            for module_name, module in model.named_modules()
            for local, own in module.named_parameters(recurse=False)
            if own is parameter
        ]
        grouped.setdefault(tuple(owner for owner, _ in owners), {})[owners[0][1]] = name
    return [
        Layer(
            owners[0] if len(owners) == 1 else next(iter(names.values())),
            tuple(map(model.get_submodule, owners)),
            tuple(names),
            _matrices(
                model.get_submodule(owners[0]),
                {local: _positions(model, name) for local, name in names.items()},
            ),
        )
        for owners, names in grouped.items()
    ]


def _positions(model: nn.Module, name: str) -> Tensor:
    return reference.positions(model, [name]).view(reference.trainable(model)[name].shape)


def _matrices(module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
    """Entries of weight and bias as ``(g, o, e)``, one column for the bias."""
    if isinstance(module, NORMS):
        return torch.cat([part.flatten() for part in parts.values()])[None, :, None]
    groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
    columns = []
    for local, part in parts.items():
        transposed = local == "weight" and isinstance(module, nn.Embedding | Conv1D)
        rows = part.T if transposed else part
        columns.append(rows.reshape(groups, len(rows) // groups, -1))
    return torch.cat(columns, dim=2)


@dataclass(frozen=True)
class Sampled:
    """One layer's part in one sample: ``ā``, ``(g, t, e)``, and ``δ`` of each draw, ``(s, g, t, o)``."""

    inputs: Tensor
    deltas: Tensor

    @property
    def gradients(self) -> Tensor:
        return torch.einsum("sgto,gte->sgoe", self.deltas, self.inputs)


def sampled(model: nn.Module, layer: Layer, rows: Rows, sample: Sample) -> Sampled:
    """All uses of the layer for one sample, as further positions."""
    x, y = sample
    uses: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        uses.append((module, args[0].detach(), output))

    handles = [module.register_forward_hook(note) for module in layer.modules]
    output = reference.forward(model, x)
    for handle in handles:
        handle.remove()
    cotangents = rows(output.detach(), y)
    outputs = [use for _, _, use in uses]
    found = [torch.autograd.grad(output, outputs, row, retain_graph=True) for row in cotangents]
    parts = [
        _in_matrix_form(layer, module, at, torch.stack(gradients))
        for (module, at, _), gradients in zip(uses, zip(*found, strict=True), strict=True)
    ]
    return Sampled(torch.cat([part.inputs for part in parts], 1), torch.cat([part.deltas for part in parts], 2))


def _in_matrix_form(layer: Layer, module: nn.Module, x: Tensor, gradients: Tensor) -> Sampled:
    groups, _, columns = layer.places.shape
    own = dict(module.named_parameters(recurse=False))
    if layer.is_norm:
        pull = torch.func.vjp(lambda parameters: torch.func.functional_call(module, parameters, (x,)), own)[1]
        rows = [torch.cat([pull(g)[0][name].flatten() for name in layer.local]) for g in gradients]
        return Sampled(torch.ones(1, 1, 1, dtype=gradients.dtype), torch.stack(rows)[:, None, None])
    # Of the module's own parameters, those outside the layer stay zero.
    sizes = {name: own[name].numel() for name in layer.local}
    counted = torch.arange(sum(sizes.values())).split(list(sizes.values()))
    parts = {name: part.view(own[name].shape) for name, part in zip(sizes, counted, strict=True)}
    places = _matrices(module, parts)
    responses = []
    for column in range(columns):
        flat = torch.zeros(sum(sizes.values()), dtype=gradients.dtype)
        flat[places[:, 0, column]] = 1
        unit = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
        unit |= {name: flat[part] for name, part in parts.items()}
        with torch.no_grad():
            response = torch.func.functional_call(module, unit, (x,))
        responses.append(_by_position(module, response, groups)[..., 0])
    deltas = torch.stack([_by_position(module, gradient, groups) for gradient in gradients])
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        deltas[:, :, x.flatten() == module.padding_idx] = 0
    return Sampled(torch.stack(responses, -1), deltas)


def _by_position(module: nn.Module, values: Tensor, groups: int) -> Tensor:
    """What the module returns for one sample as ``(g, t, o)``."""
    if isinstance(module, CONVOLUTIONS):
        return values[0].reshape(groups, values.shape[1] // groups, -1).mT
    return values[0].reshape(1, -1, values.shape[-1])


@dataclass(frozen=True)
class Spectrum:
    """Eigenbases ``Q_G``, ``(g, o, o)``, ``Q_A``, ``(g, e, e)``, and eigenvalues ``Λ``, ``(g, o, e)``."""

    outputs: Tensor
    inputs: Tensor
    values: Tensor


def spectrum(
    layer: Layer, samples: Iterable[Sampled], *, refit: bool = True, sharing: str = "expand"
) -> Spectrum:
    """``Λ = λ_G ⊗ λ_A`` of the covariances, or refitted to the gradients of all samples."""
    samples = list(samples)
    count, positions = len(samples), sum(s.inputs.shape[1] for s in samples)
    if sharing == "reduce":
        reduced = [Sampled(s.inputs.mean(1, keepdim=True), s.deltas.sum(2, keepdim=True)) for s in samples]
        positions = count
    else:
        reduced = samples
    given = torch.stack([torch.einsum("sgto,sgtp->gop", s.deltas, s.deltas) for s in reduced]).sum(0) / count
    taken = torch.stack([torch.einsum("gte,gtf->gef", s.inputs, s.inputs) for s in reduced]).sum(0) / positions
    left, outputs = torch.linalg.eigh(given)
    if layer.is_embedding:
        # Unit vectors are kept as the basis whatever the covariance.
        right, inputs = taken.diagonal(dim1=1, dim2=2), torch.eye(taken.shape[1], dtype=taken.dtype)[None]
    else:
        right, inputs = torch.linalg.eigh(taken)
    values = left[:, :, None] * right[:, None, :]
    if refit:
        turned = torch.stack([outputs.mT @ s.gradients @ inputs for s in samples])
        values = turned.square().sum((0, 1)) / count
    return Spectrum(outputs, inputs, values)


Recorded = list[tuple[Layer, list[Sampled]]]


def recorded(model: nn.Module, data: Iterable[Sample], rows: Rows) -> Recorded:
    """Every layer's part in every sample."""
    each = list(reference.samples(data))
    return [(layer, [sampled(model, layer, rows, sample) for sample in each]) for layer in layers_of(model)]


def spectra(samples: Recorded, **options: Any) -> list[tuple[Layer, Spectrum]]:
    """The spectrum of every layer."""
    return [(layer, spectrum(layer, parts, **options)) for layer, parts in samples]


def inverse(model: nn.Module, samples: Recorded, strength: float, **options: Any) -> Tensor:
    """``(C + λI)⁻¹``, ``(P, P)``, of all layers."""
    return assembled(model, spectra(samples, **options), lambda values: 1 / (values + strength))


def assembled(
    model: nn.Module,
    spectra: Iterable[tuple[Layer, Spectrum]],
    function: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """``(Q_G ⊗ Q_A) f(Λ) (Q_G ⊗ Q_A)ᵀ`` of each layer at its places, ``(P, P)``."""
    size = reference.numel(model)
    whole = torch.zeros(size, size, dtype=torch.float64)
    for layer, found in spectra:
        for group, at in enumerate(layer.places):
            basis = torch.kron(found.outputs[group].contiguous(), found.inputs[group].contiguous())
            values = function(found.values[group]).flatten()
            whole[at.flatten()[:, None], at.flatten()] = basis @ torch.diag(values) @ basis.T
    return whole


def made(case: Case) -> tuple[Instance, Sample]:
    """A fresh instance of a recipe in float64, and four further points."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = case.model().double().eval()
        total = sum(case.sizes)
        x, y = case.x(total + 4), case.y(total + 4)
    stops = torch.tensor(case.sizes).cumsum(0).tolist()
    spans = [slice(stop - size, stop) for stop, size in zip(stops, case.sizes, strict=True)]
    data = [(reference.part(x, span), y[span]) for span in spans]
    return Instance(model, case.loss, data), (reference.part(x, slice(total, None)), y[total:])
