"""Products with the curvature of a chain of linear layers by matrix products alone, without autograd.

In a chain each linear layer is used once, on vectors, and its input is an elementwise function of the output
of the one before: ``s_l = W_l a_l + b_l`` and ``a_{l+1} = φ_l(s_l)``. With a dot for the derivative along a row
``V`` of the product, and ``δ_l`` and ``γ_l`` the gradients of the mean loss by ``s_l`` and ``a_l``,

    ṡ_l = V_l a_l + W_l ȧ_l               ȧ_{l+1} = φ_l'(s_l) ∘ ṡ_l
    δ̇_l = φ_l'(s_l) ∘ γ̇_{l+1} + φ_l''(s_l) ∘ γ_{l+1} ∘ ṡ_l
    γ̇_l = W_lᵀ δ̇_l + V_lᵀ δ_l             (C V)_l = Σ_n δ̇_l a_lᵀ + δ_l ȧ_lᵀ

and ``δ̇`` of the last layer from the curvature of what follows it. Pearlmutter (1994), "Fast Exact
Multiplication by the Hessian", §3.2. The terms with ``δ`` and ``γ`` belong to the Hessian only; without them it
is the product of Schraudolph (2002), "Fast Curvature Matrix-Vector Products", §3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of
from influence_framework.layers import Cover, Layer, Tape, record
from influence_framework.parameters import ParameterSpace
from influence_framework.plain import PlainGradients, weighted_sum
from influence_framework.problem import Problem
from influence_framework.sources.linearization import Curve, Linearization, Product, Workspace

Head: TypeAlias = Callable[[Tensor], Tensor | None]
"""From ``(n, k, c)`` tangents of the last layer's outputs to as many cotangents; ``None`` for zeros."""


def plain_layers(covered: Cover) -> dict[str, Layer] | None:
    """The layers by module, where all parameters are those of linear modules that share none; else ``None``."""
    if not covered.plain:
        return None
    return {name: layer for layer in covered.layers for name in layer.modules}


def used_once_on_vectors(tape: Tape, layers: Collection[str], size: int) -> bool:
    """Whether every layer was applied once, to one vector for each of ``size`` samples."""
    on_vectors = all(use.inputs.ndim == 2 and use.inputs.shape[0] == size for use in tape.uses)
    return on_vectors and sorted(use.module for use in tape.uses) == sorted(layers)


@dataclass(frozen=True, eq=False)
class Link:
    """One layer of the chain on one batch.

    Attributes:
        weight: ``W``, ``(o, i)``.
        places: Index of ``"weight"`` and ``"bias"`` among the parameters, those that take part.
        inputs: ``a``, ``(n, i)``.
        slope: ``φ'`` of the elementwise function behind the inputs, ``(n, i)``; ``None`` for the first layer.
        bend: ``φ'' ∘ γ``, ``(n, i)``; ``None`` for the first layer and where the curvature has no such terms.
        gradient: ``δ``, ``(n, o)``; ``None`` where the curvature has no such terms.
    """

    weight: Float[Tensor, "o i"]
    places: dict[str, int]
    inputs: Float[Tensor, "n i"]
    slope: Float[Tensor, "n i"] | None
    bend: Float[Tensor, "n i"] | None
    gradient: Float[Tensor, "n o"] | None


class ChainLinearization(Linearization):
    """The curvature of one batch of a chain; see the module."""

    def __init__(self, links: Sequence[Link], head: Head, parameters: ParameterSpace) -> None:
        self.links, self.head, self.parameters = links, head, parameters
        samples = sum(link.inputs.nelement() + len(link.inputs) * len(link.weight) for link in links)
        self.row_bytes = samples * links[0].inputs.element_size()

    @classmethod
    def of(
        cls,
        problem: Problem,
        parameters: ParameterSpace,
        curve: Curve,
        batch: Batch,
        layers: Mapping[str, Layer],
        *,
        gradient_terms: bool,
        held: bool = False,
    ) -> ChainLinearization | None:
        """The linearisation, or ``None`` where the model is no chain of ``layers`` on this batch.

        Whether it is one is asked of autograd with a random cotangent: what the output of every layer
        receives must be what the recursion of the chain gives, and the gradient of the parameters what the
        layers' are made of, unless that was ``held`` of this batch before: a weight may have a use beside its
        layer.
        """
        leaves = {} if held else parameters.leaves(problem.model)
        tape = record(problem, layers, batch, leaves=leaves)
        if not used_once_on_vectors(tape, layers, problem.objective.size(batch)):
            return None
        shifts, inputs = tape.shifts, [use.inputs for use in tape.uses]
        modules = [problem.model.get_submodule(use.module) for use in tape.uses]
        weights = [cast(Tensor, module.weight).detach() for module in modules]
        if any(a.shape != shift.shape for a, shift in zip(inputs[1:], shifts[:-1], strict=True)):
            return None
        if any(tensor.dtype != parameters.dtype for tensor in (*inputs, *shifts)):  # under autocast
            return None
        with torch.enable_grad():
            slopes = [
                gradients_of(a.sum(), [shift])[0] for a, shift in zip(inputs[1:], shifts[:-1], strict=True)
            ]
            cotangent = _random_cotangent(tape)
            flows = _passed_back(tape, cotangent, weights, slopes)
            if flows is None:
                return None
            if not held:
                made = _gradients_of(parameters, layers, tape, flows)
                total = partial(weighted_sum, tape.outputs, cotangent)
                if not made.adds_up(problem, lambda _, weights: total(weights), leaves, keep_graph=True):
                    return None
            head = _head(curve(problem, tape.outputs, shifts[-1:], batch), inputs, shifts)
            deltas: Sequence[Tensor | None] = [None] * len(shifts)
            bends: list[Tensor | None] = [None] * len(slopes)
            if gradient_terms:
                loss = problem.objective.mean_loss(tape.outputs, batch)
                found = [delta.detach() for delta in gradients_of(loss, shifts)]
                bends = [
                    gradients_of(slope, [shift], delta @ weight)[0].detach()
                    for slope, shift, delta, weight in zip(
                        slopes, shifts[:-1], found[1:], weights[1:], strict=True
                    )
                ]
                deltas = found
        indices = {name: index for index, name in enumerate(parameters.names)}
        links = [
            Link(
                weight,
                {local: indices[name] for local, name in layers[use.module].parts.items()},
                use.inputs.detach(),
                None if slope is None else slope.detach(),
                bend,
                delta,
            )
            for weight, use, slope, bend, delta in zip(
                weights, tape.uses, [None, *slopes], [None, *bends], deltas, strict=True
            )
        ]
        return cls(links, head, parameters)

    def apply(self, rows: Float[Tensor, "k P"], workspace: Workspace) -> Float[Tensor, "k P"]:
        """All products are of two matrices, with the ``k`` rows beside the features or beside the samples."""
        changes = self.parameters.unflatten_rows(rows)
        of_outputs, of_inputs = self._forward(changes, workspace)
        flow = self.head(of_outputs[-1])
        result = workspace.empty("result", rows, *rows.shape)
        if flow is None:
            return result.zero_()
        parts = self.parameters.unflatten_rows(result)
        for index in reversed(range(len(self.links))):
            link = self.links[index]
            self._gradients(link, flow, of_inputs[index], parts)
            if link.slope is not None:
                flow = self._backward(link, flow, of_outputs[index - 1], changes, workspace, f"flow {index}")
        return result

    def _forward(
        self, changes: Sequence[Tensor], workspace: Workspace
    ) -> tuple[list[Float[Tensor, "n k _o"]], list[Float[Tensor, "n k _i"] | None]]:
        """``ṡ`` and ``ȧ`` of every layer."""
        of_outputs: list[Tensor] = []
        of_inputs: list[Tensor | None] = []
        for index, link in enumerate(self.links):
            out, width = link.weight.shape
            samples, count = len(link.inputs), len(changes[0])
            moved = None
            if link.slope is not None:
                moved = workspace.empty(f"inputs {index}", link.inputs, samples, count, width)
                torch.mul(of_outputs[-1], link.slope[:, None], out=moved)
            own = workspace.empty(f"outputs {index}", link.inputs, samples, count * out)
            change = {local: changes[place] for local, place in link.places.items()}
            if "weight" not in change:
                own.copy_(change["bias"].reshape(1, -1).expand_as(own))
            else:
                torch.mm(link.inputs, change["weight"].reshape(-1, width).T, out=own)
                if "bias" in change:
                    own += change["bias"].reshape(-1)
            if moved is not None:
                own.view(-1, out).addmm_(moved.view(-1, width), link.weight.T)
            of_outputs.append(own.view(samples, count, out))
            of_inputs.append(moved)
        return of_outputs, of_inputs

    @staticmethod
    def _backward(
        link: Link,
        flow: Float[Tensor, "n k o"],
        before: Float[Tensor, "n k i"],
        changes: Sequence[Tensor],
        workspace: Workspace,
        name: str,
    ) -> Float[Tensor, "n k i"]:
        """``δ̇`` of the layer before ``link`` from that of ``link``; ``before`` is the former's ``ṡ``."""
        out, width = link.weight.shape
        assert link.slope is not None
        arrived = workspace.empty(name, before, *before.shape)
        rows = arrived.view(-1, width)
        if link.gradient is None or "weight" not in link.places:
            torch.mm(flow.reshape(-1, out), link.weight, out=rows)
        else:
            # The rows beside the features: one product for all of them.
            change = changes[link.places["weight"]].transpose(0, 1).reshape(out, -1)
            torch.mm(link.gradient, change, out=arrived.view(len(arrived), -1))
            rows.addmm_(flow.reshape(-1, out), link.weight)
        arrived.mul_(link.slope[:, None])
        return arrived if link.bend is None else arrived.addcmul_(link.bend[:, None], before)

    @staticmethod
    def _gradients(
        link: Link, flow: Float[Tensor, "n k o"], moved: Float[Tensor, "n k i"] | None, parts: Sequence[Tensor]
    ) -> None:
        """Write the layer's share of the product."""
        if "bias" in link.places:
            torch.sum(flow, dim=0, out=parts[link.places["bias"]])
        if "weight" not in link.places:
            return
        part = parts[link.places["weight"]]
        part.copy_((flow.flatten(1).T @ link.inputs).view(part.shape))
        if link.gradient is not None and moved is not None:
            more = link.gradient.T @ moved.flatten(1)
            part += more.view(len(link.weight), -1, link.weight.shape[1]).transpose(0, 1)


def _head(product: Product, inputs: Sequence[Tensor], shifts: Sequence[Tensor]) -> Head:
    """The curvature in the last layer's outputs: a matrix for each sample, of no more than its activations."""
    shift = shifts[-1]
    samples, width = shift.shape
    if width**2 > sum(tensor.shape[1] for tensor in (*inputs, *shifts)):

        def by_autograd(tangents: Float[Tensor, "n k c"]) -> Float[Tensor, "n k c"] | None:
            (back,) = product([tangents.transpose(0, 1)])
            return None if back is None else back.transpose(0, 1).contiguous()

        return by_autograd
    units = torch.eye(width, dtype=shift.dtype, device=shift.device)
    (columns,) = product([units[:, None].expand(width, samples, width)])
    if columns is None:
        return lambda tangents: None
    # Symmetric, so that columns are rows.
    matrices = columns.detach().transpose(0, 1).contiguous()
    return lambda tangents: torch.bmm(tangents, matrices)


def _random_cotangent(tape: Tape) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(tape.outputs.device, tape.outputs.dtype)


def _passed_back(
    tape: Tape, cotangent: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]
) -> list[Tensor] | None:
    """The layers' ``δ`` for that cotangent; ``None`` where they are not ``δ_l = φ_l' ∘ (W_{l+1}ᵀ δ_{l+1})``."""
    found = gradients_of(tape.outputs, tape.shifts, cotangent)
    precision = torch.finfo(tape.outputs.dtype).eps
    for before, after, weight, slope in zip(found[:-1], found[1:], weights[1:], slopes, strict=True):
        error = torch.linalg.vector_norm(slope * (after @ weight) - before)
        # What sums of one layer's outputs are rounded by: a connection past a layer may be faint.
        tolerance = min(precision**0.5, 8 * len(weight) ** 0.5 * precision)
        if not error <= tolerance * torch.linalg.vector_norm(before):
            return None
    return [delta.detach() for delta in found]


def _gradients_of(
    parameters: ParameterSpace, layers: Mapping[str, Layer], tape: Tape, flows: Sequence[Tensor]
) -> PlainGradients:
    parts = {}
    for use, flow in zip(tape.uses, flows, strict=True):
        form = layers[use.module].modules[use.module]
        parts[layers[use.module]] = flow, form.inputs(use.inputs.detach())[0, :, 0]
    return PlainGradients(parameters, parts)
