"""K-FAC and EK-FAC of the architectures of ``transformers`` from their definitions, in float64.

Gradients of parameters come from ``torch.func``, of every sample alone and without its padding; inputs and
output gradients of layers, which the factors are of, from hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from tests import language


@dataclass
class Factored:
    """Parameters of one layer.

    Attributes:
        modules: Names of those that use them.
        names: Of the parameters: weight before bias.
        tied: Whether an embedding and a linear layer share the weight.
    """

    modules: list[str]
    names: list[str]
    tied: bool = False


def kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        return "linear"
    if isinstance(module, Conv1D):
        return "transposed"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if "Norm" in type(module).__name__ else None


def layers(net: nn.Module) -> tuple[list[Factored], list[str]]:
    """The layers, and the parameters outside them."""
    names = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    owners: dict[str, list[str]] = {name: [] for name in names.values()}
    for module_name, module in net.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names and kind(module):
                owners[names[id(parameter)]].append(module_name)
    found: dict[Any, Factored] = {}
    for name, users in owners.items():
        if not users:
            continue
        together = {kind(net.get_submodule(user)) for user in users}
        key = users[0] if users == [name.rpartition(".")[0]] and len(users) == 1 else name
        layer = found.setdefault(key, Factored(users, [], together == {"embedding", "linear"}))
        layer.names.append(name)
    return list(found.values()), [name for name, users in owners.items() if not users]


def matrix(net: nn.Module, layer: Factored, values: dict[str, Tensor]) -> Tensor:
    """Entries of the layer's parameters as ``(o, e)``."""
    how = kind(net.get_submodule(layer.modules[0]))
    if how == "norm":
        return torch.cat([values[name] for name in layer.names])[:, None]
    columns = []
    for name in layer.names:
        value = values[name]
        if value.ndim == 2 and (layer.tied or how in ("embedding", "transposed")):
            value = value.T
        columns.append(value.reshape(len(value), -1))
    return torch.cat(columns, 1)


@dataclass
class Sampled:
    """One layer in one sample: ``ā`` ``(t, e)``, ``δ`` ``(s, t, o)``, ``G`` ``(s, o, e)``."""

    inputs: Tensor
    deltas: Tensor
    gradients: Tensor


def rows_of(name: str, source: str, logits: Tensor, sample: language.Fields) -> Tensor:
    """Cotangents ``(s, *logits)`` of the true label, or a square root of the curvature in the logits."""

    def loss(flat: Tensor) -> Tensor:
        return language.loss(name, flat.view(logits.shape), sample)

    if source == "empirical_fisher":
        return jacrev(loss)(logits.flatten()).view(1, *logits.shape)
    values, vectors = torch.linalg.eigh(jacrev(jacrev(loss))(logits.flatten()))
    return (vectors * values.clamp_min(0).sqrt()).T.reshape(-1, *logits.shape)


def samples(name: str, source: str) -> Iterator[list[Sampled]]:
    """Every layer in every training sample."""
    net = language.model("gpt2" if name == "checkpointed gpt2" else name)
    own = language.parameters(net)
    found, _ = layers(net)
    for batch in language.training(name):
        for sample in language.alone(batch):
            logits, pull = vjp(lambda v, s=sample: language.outputs(name, v, s), own)
            cotangents = rows_of(name, source, logits, sample)
            each = [{k: v.detach() for k, v in pull(row)[0].items()} for row in cotangents]
            uses = hooked(name, net, sample, cotangents)
            yield [_sampled(net, layer, uses, each) for layer in found]


def hooked(
    name: str, net: nn.Module, sample: language.Fields, rows: Tensor
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By module: what it was applied to, and the gradients with respect to what it returned."""
    noted: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, args, out, at=at: noted.append((at, args[0].detach(), out)))
        for at, module in net.named_modules()
        if kind(module)
    ]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            leaves = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}
            logits = language.outputs(name, leaves, sample)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [out for _, _, out in noted]
    grads = [
        torch.autograd.grad(logits, outputs, row, retain_graph=True, materialize_grads=True, allow_unused=True)
        for row in rows
    ]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (at, inputs, _), parts in zip(noted, zip(*grads, strict=True), strict=True):
        found.setdefault(at, []).append((inputs, torch.stack(parts)))
    return found


def _sampled(
    net: nn.Module, layer: Factored, uses: dict[str, list[tuple[Tensor, Tensor]]], each: list[dict[str, Tensor]]
) -> Sampled:
    gradients = torch.stack([matrix(net, layer, one) for one in each])
    how = kind(net.get_submodule(layer.modules[0]))
    if how == "norm":
        return Sampled(torch.ones(1, 1, dtype=gradients.dtype), gradients.mT, gradients)
    if layer.tied:
        return Sampled(torch.eye(gradients.shape[2], dtype=gradients.dtype), gradients.mT, gradients)
    inputs, deltas = [], []
    for module_name in layer.modules:
        module = net.get_submodule(module_name)
        for x, gradient in uses.get(module_name, []):
            parts = []
            if isinstance(module, nn.Conv2d):
                parts.append(nn.functional.unfold(x, module.kernel_size, stride=module.stride)[0].T)
                gradient = gradient.flatten(3).movedim(2, 3)
            elif kind(module) == "embedding":
                parts.append(nn.functional.one_hot(x, gradients.shape[2]).double().flatten(0, -2))
            elif any(name.endswith("weight") for name in layer.names):
                parts.append(x.flatten(0, -2))
            if any(name.endswith("bias") for name in layer.names):
                parts.append(gradient.new_ones(gradient[0, ..., 0].numel(), 1))
            inputs.append(torch.cat(parts, 1))
            deltas.append(gradient.flatten(1, -2))
    return Sampled(torch.cat(inputs), torch.cat(deltas, 1), gradients)


def curvature(name: str, source: str, *, refit: bool = True) -> Tensor:
    """The approximation of the whole curvature, ``(P, P)``."""
    net = language.model("gpt2" if name == "checkpointed gpt2" else name)
    own = language.parameters(net)
    found, rest = layers(net)
    parts = dict(
        zip(
            own,
            torch.arange(sum(p.numel() for p in own.values())).split([p.numel() for p in own.values()]),
            strict=True,
        )
    )
    shaped = {key: parts[key].view(p.shape) for key, p in own.items()}
    exact = language.dense(name, source)
    whole = torch.zeros_like(exact)
    for key in rest:
        whole[parts[key], parts[key]] = exact[parts[key], parts[key]]
    for layer, sampled in zip(found, zip(*samples(name, source), strict=True), strict=True):
        places = matrix(net, layer, shaped).flatten()
        whole[places[:, None], places] = _approximated(net, layer, list(sampled), refit)
    return whole


def _approximated(net: nn.Module, layer: Factored, sampled: list[Sampled], refit: bool) -> Tensor:
    count, positions = len(sampled), sum(len(s.inputs) for s in sampled)
    given = sum(torch.einsum("sto,stp->op", s.deltas, s.deltas) for s in sampled) / count
    taken = sum(s.inputs.T @ s.inputs for s in sampled) / positions
    left, outputs = torch.linalg.eigh(given)
    right, inputs = torch.linalg.eigh(taken)
    if layer.tied or kind(net.get_submodule(layer.modules[0])) == "embedding":
        right, inputs = taken.diagonal(), torch.eye(len(taken), dtype=taken.dtype)
    values = left[:, None] * right
    if refit:
        values = sum((outputs.T @ s.gradients @ inputs).square().sum(0) for s in sampled) / count
    basis = torch.kron(outputs.contiguous(), inputs.contiguous())
    return basis @ torch.diag(values.flatten()) @ basis.T
