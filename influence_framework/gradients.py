"""Per-sample gradients, and their products with factors that never hold all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.checks import check_differentiable
from influence_framework.data import Batch, map_leaves, split, take
from influence_framework.derivatives import CACHE_BYTES, PushForward, gradients_of, pull_back, rows_at_once
from influence_framework.errors import NonFiniteError
from influence_framework.finite import all_finite, finite_rows
from influence_framework.memory import in_pieces, is_out_of_memory
from influence_framework.parameters import ParameterSpace
from influence_framework.plain import plain_layers_of, scores_by_layers
from influence_framework.problem import Problem


def samples_within(problem: Problem, parameters: ParameterSpace, budget: int, copies: int) -> int:
    """How many samples' activations and ``copies`` gradients each take ``budget`` bytes; at least one."""
    element = torch.empty(0, dtype=parameters.dtype).element_size()
    count = max(1, budget // (copies * parameters.numel * element + 4 * problem.sample_bytes))
    return problem.room.at_most(count)


def sample_chunks(
    problem: Problem, parameters: ParameterSpace, batch: Batch, size: int, *, copies: int = 2
) -> Iterator[Batch]:
    """The batch in pieces of :func:`chunk_size` samples."""
    yield from split(batch, size, chunk_size(problem, parameters, size, copies=copies))


def chunk_size(problem: Problem, parameters: ParameterSpace, size: int, *, copies: int = 2) -> int:
    """Samples whose ``copies`` gradients and activations fit the budget, of ``size`` in all."""
    count = samples_within(problem, parameters, problem.memory_budget, copies)
    if parameters.device.type == "cpu":
        # Larger tensors come as fresh pages from the operating system each time, which costs more than the
        # arithmetic; a few dozen samples at a time are as quick as more.
        count = min(count, max(32, samples_within(problem, parameters, 2 * CACHE_BYTES, copies)))
    return min(size, count) if size else count


def _per_sample(
    function: Callable[[dict[str, Tensor], Batch], Tensor],
    size: int,
    problem: Problem,
    parameters: ParameterSpace,
    batch: Batch,
    alone: Callable[[dict[str, Tensor], Batch], Tensor] | None = None,
) -> Tensor:
    """``function(parameters, one sample)`` for every sample, stacked: vectorised where that is possible.

    ``alone`` computes the same for a single sample where ``torch.func`` cannot, without it.
    """
    leaves = {name: leaf.detach() for name, leaf in parameters.leaves(problem.model).items()}
    try:
        return torch.func.vmap(lambda sample: function(leaves, map_leaves(lambda t: t[None], sample)))(batch)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Control flow on values, or an operator that torch.func cannot batch: one sample at a time.
        one = alone or function
        return torch.stack([one(leaves, take(batch, slice(i, i + 1))) for i in range(size)])


def _gradients_of_each(
    scalar: Callable[[dict[str, Tensor], Batch], Tensor],
    size: int,
    problem: Problem,
    parameters: ParameterSpace,
    batch: Batch,
) -> Float[Tensor, "n P"]:
    """The gradient of ``scalar(parameters, one sample)`` for every sample, one row each."""

    def gradient(leaves: dict[str, Tensor], sample: Batch) -> Tensor:
        return parameters.flatten(torch.func.grad(scalar)(leaves, sample))

    def by_autograd(leaves: dict[str, Tensor], sample: Batch) -> Tensor:
        inputs = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        with torch.enable_grad():
            value = scalar(inputs, sample)
        found = gradients_of(value, list(inputs.values()), keep_graph=False)
        return parameters.flatten(dict(zip(inputs, found, strict=True)))

    rows = _per_sample(gradient, size, problem, parameters, batch, by_autograd)
    check_sample_gradients(rows)
    return rows


def sample_gradients(problem: Problem, parameters: ParameterSpace, batch: Batch) -> Float[Tensor, "n P"]:
    """``∇ℓ_i`` of every sample of the batch, one row each.

    Raises:
        NonFiniteError: A gradient contains NaN or infinity; the message says which samples'.
    """
    size = problem.objective.size(batch)
    return _gradients_of_each(problem.mean_loss, size, problem, parameters, batch)


def sample_pullbacks(
    problem: Problem, parameters: ParameterSpace, batch: Batch, cotangents: Float[Tensor, "n ..."]
) -> Float[Tensor, "n P"]:
    """``J_nᵀ r_n`` of every sample, one row each, with ``J_n`` the Jacobian of its output.

    Raises:
        NonFiniteError: A row contains NaN or infinity; the message says which samples'.
    """

    def along(values: dict[str, Tensor], sample: Batch) -> Tensor:
        points, cotangent = sample
        total: Tensor = (problem.outputs(values, points) * cotangent).sum()
        return total

    return _gradients_of_each(along, len(cotangents), problem, parameters, (batch, cotangents))


def check_sample_gradients(gradients: Float[Tensor, "n _P"]) -> None:
    """Raise :class:`NonFiniteError` unless these, or what was computed from them, one row each, are finite."""
    finite = finite_rows(gradients)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise NonFiniteError(
            f"The loss gradients of samples {bad[:8]} (positions within their batch) contain NaN or "
            "infinity: check these samples and the loss at its extremes."
        )


def sample_jacobians(
    problem: Problem, parameters: ParameterSpace, batch: Batch
) -> tuple[Float[Tensor, "n c P"], Float[Tensor, "n c c"]]:
    """Jacobian of each sample's flattened output, and the Hessian of its loss with respect to it."""

    def jacobian(leaves: dict[str, Tensor], sample: Batch) -> Tensor:
        def output(values: dict[str, Tensor]) -> Tensor:
            return problem.outputs(values, sample).reshape(-1)

        parts = torch.func.jacrev(output)(leaves)
        return parameters.flatten_rows([parts[name] for name in parameters.names])

    def curvature(leaves: dict[str, Tensor], sample: Batch) -> Tensor:
        outputs = problem.outputs(leaves, sample)

        def loss(flat: Tensor) -> Tensor:
            return problem.objective.mean_loss(flat.reshape(outputs.shape), sample)

        second: Tensor = torch.func.jacrev(torch.func.jacrev(loss))(outputs.reshape(-1))
        return second

    def jacobian_by_autograd(leaves: dict[str, Tensor], sample: Batch) -> Tensor:
        inputs = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        with torch.enable_grad():
            outputs = problem.outputs(inputs, sample).reshape(-1)
        rows = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        found = pull_back([outputs], list(inputs.values()), [rows])
        return parameters.flatten_rows(
            [
                leaf.new_zeros(len(rows), *leaf.shape) if part is None else part
                for leaf, part in zip(inputs.values(), found, strict=True)
            ]
        )

    def curvature_by_autograd(leaves: dict[str, Tensor], sample: Batch) -> Tensor:
        with torch.no_grad():
            outputs = problem.outputs(leaves, sample)
        leaf = outputs.reshape(-1).requires_grad_()
        with torch.enable_grad():
            loss = problem.objective.mean_loss(leaf.reshape(outputs.shape), sample)
        rows = torch.eye(len(leaf), dtype=leaf.dtype, device=leaf.device)
        (second,) = pull_back(gradients_of(loss, [leaf]), [leaf], [rows])
        return torch.zeros_like(rows) if second is None else second

    size = problem.objective.size(batch)
    return (
        _per_sample(jacobian, size, problem, parameters, batch, jacobian_by_autograd),
        _per_sample(curvature, size, problem, parameters, batch, curvature_by_autograd),
    )


Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Factors:
    """Rows ``(m, q)`` over part of the flat parameter vector.

    Attributes:
        rows: One factor each.
        index: Positions in the flat vector of its ``q`` columns; ``None`` where they are all of it.
    """

    rows: Float[Tensor, "m q"]
    index: Int[Tensor, " q"] | None = None

    def of(self, gradients: Float[Tensor, "n P"]) -> Float[Tensor, "n q"]:
        """The columns of ``gradients`` that belong to these factors."""
        return gradients if self.index is None else gradients[:, self.index]

    def padded(self, numel: int, part: slice) -> Float[Tensor, "m P"]:
        """Some rows over the whole vector, zero where these factors are silent."""
        rows = self.rows[part]
        if self.index is None:
            return rows
        return rows.new_zeros(rows.shape[0], numel).index_copy(1, self.index, rows)


def contract_up(
    factors: Mapping[Name, Factors], problem: Problem, batch: Batch
) -> dict[Name, Float[Tensor, "m n"]]:
    """``f_k · ∇ℓ_j`` for every factor of every name and every sample of the batch.

    Where all parameters are those of linear layers, from inputs and output gradients of these. Else either from
    per-sample gradients, formed for as many samples at a time as pays and multiplied at once, ``2·m·n·P``
    flops; or, for few factors, as directional derivatives of all samples' losses at once, which forms no
    gradient of a sample. The choice changes speed only.
    """
    size = problem.objective.size(batch)
    found = _by_layers(factors, problem, batch)
    if found is not None:
        return found

    directions = sum(part.rows.shape[0] for part in factors.values())
    along = problem.twice_differentiable and _directions_pay(directions, problem)
    contraction = _along_factors if along else _with_gradients
    at_most = problem.max_batch if along else chunk_size(problem, problem.parameters, size)
    work = partial(contraction, factors, problem)
    parts = [part for _, part in in_pieces(problem.room, batch, problem.objective.size, at_most, work)]
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in factors}


def _by_layers(
    factors: Mapping[Name, Factors], problem: Problem, batch: Batch
) -> dict[Name, Float[Tensor, "m n"]] | None:
    """From inputs and output gradients of layers; ``None`` where factors or model do not allow it."""
    if (
        any(part.index is not None for part in factors.values())
        or plain_layers_of(problem, problem.parameters) is None
    ):
        return None
    work = partial(scores_by_layers, [part.rows for part in factors.values()], problem)
    pieces = []
    for _, found in in_pieces(problem.room, batch, problem.objective.size, problem.max_batch, work):
        if found is None:
            return None
        pieces.append(found)
    scores = [torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)]
    for part in scores:
        check_sample_gradients(part.T)
    return dict(zip(factors, scores, strict=True))


def _directions_pay(count: int, problem: Problem) -> bool:
    """Whether ``count`` directional derivatives take less time than per-sample gradients.

    A direction takes two forward passes' worth of flops for each sample. A sample's gradient takes about
    three, vectorised at a third of the speed; then its ``P`` numbers are written and read a few times,
    which takes as long as some 250 flops each, and multiplied with every factor.
    """
    parameters = problem.parameters.numel
    return count * (2 * problem.sample_flops - 2 * parameters) < 9 * problem.sample_flops + 250 * parameters


def _with_gradients(factors: Mapping[Name, Factors], problem: Problem, batch: Batch) -> dict[Name, Tensor]:
    gradients = sample_gradients(problem, problem.parameters, batch)
    return {name: part.rows @ part.of(gradients).T for name, part in factors.items()}


def _along_factors(factors: Mapping[Name, Factors], problem: Problem, batch: Batch) -> dict[Name, Tensor]:
    leaves = problem.parameters.leaves(problem.model)
    with torch.enable_grad():
        losses = problem.sample_losses(leaves, batch)
        forward = PushForward(losses, list(leaves.values()))
    step = rows_at_once(losses.device, 2 * problem.sample_bytes * len(losses), problem.memory_budget)
    found = {}
    for name, part in factors.items():
        scores = losses.new_zeros(part.rows.shape[0], len(losses))
        for start in range(0, len(scores), step):
            rows = part.padded(problem.parameters.numel, slice(start, start + step))
            derivatives = forward(problem.parameters.unflatten_rows(rows))
            if derivatives is not None:
                scores[start : start + step] = derivatives
        found[name] = scores
        check_sample_gradients(scores.T)
    return found


def contract_perturbation(
    factors: Mapping[Name, Factors], problem: Problem, batch: Batch
) -> dict[Name, Float[Tensor, "m n *features"]]:
    """``∇ₓ(f_k · ∇_θ ℓ_j)`` for every factor of every name and every sample of the batch.

    ``Σ_j ∇_θ ℓ_j`` is differentiated once more, with respect to the inputs, in the direction of each
    factor. A sample's loss depends on its own input only, so one such pass gives the result of one
    factor for all samples, and no ``(n, d, P)`` tensor of mixed derivatives exists at any time.

    Raises:
        InvalidInputError: The input is not a single floating-point tensor.
        NonFiniteError: A derivative contains NaN or infinity.
    """
    problem.require_second_derivatives()
    check_differentiable(batch)
    x, y = batch
    scores: dict[Name, list[Tensor]] = {name: [] for name in factors}
    for inputs, target in split((x, y), x.shape[0], problem.max_batch):
        derivative = _input_derivative(problem, inputs, target)
        step = max(1, problem.memory_budget // (3 * problem.sample_bytes * inputs.shape[0]))
        for name, part in factors.items():
            rows = [
                derivative(part.padded(problem.parameters.numel, slice(start, start + step)))
                for start in range(0, part.rows.shape[0], step)
            ]
            scores[name].append(torch.cat(rows) if rows else inputs.new_zeros(0, *inputs.shape))
    return {name: torch.cat(parts, dim=1) for name, parts in scores.items()}


def _input_derivative(problem: Problem, x: Tensor, y: Any) -> Callable[[Tensor], Tensor]:
    """``F ↦ ∇ₓ(f_k · Σ_j ∇_θ ℓ_j)`` for the rows ``f_k`` of ``F``, as ``(m, n, *features)``."""
    inputs = x.detach().requires_grad_()
    leaves = problem.parameters.leaves(problem.model)
    with torch.enable_grad():
        total = problem.mean_loss(leaves, (inputs, y)) * inputs.shape[0]
        gradients = gradients_of(total, list(leaves.values()))

    def derivative(rows: Tensor) -> Tensor:
        (result,) = pull_back(gradients, [inputs], problem.parameters.unflatten_rows(rows))
        if result is None:
            return inputs.new_zeros(rows.shape[0], *inputs.shape)
        if not all_finite(result):
            raise NonFiniteError(
                "A derivative with respect to the input contains NaN or infinity: check the samples and "
                "the model's behaviour at them."
            )
        return result.detach()

    return derivative


def mixed_norms(
    indices: Mapping[Name, Int[Tensor, " q"] | None], problem: Problem, batch: Batch
) -> dict[Name, Float[Tensor, "n *features"]]:
    """``‖∂∇_θ ℓ_j / ∂x_f‖`` of every sample and feature, over the parameters of each name; in float64.

    Sample by sample, with as many features at a time as the budget holds vectors for.

    Args:
        indices: Positions in the flat vector; ``None`` for all of it.
        problem: Model and objective.
        batch: Samples whose input is one floating-point tensor.
    """
    problem.require_second_derivatives()
    x, y = batch
    leaves = problem.parameters.leaves(problem.model)
    element, width = x.element_size(), x[0].numel()
    step = max(1, problem.memory_budget // (4 * problem.parameters.numel * element + 4 * problem.sample_bytes))
    norms = {name: torch.zeros(len(x), width, dtype=torch.float64, device=x.device) for name in indices}
    for position in range(len(x)):
        inputs = x[position : position + 1].detach().requires_grad_()
        target = take(y, slice(position, position + 1))
        with torch.enable_grad():
            loss = problem.mean_loss(leaves, (inputs, target))
            found = gradients_of(loss, list(leaves.values()))
            forward = PushForward(problem.parameters.flatten(dict(zip(leaves, found, strict=True))), [inputs])
        for start in range(0, width, step):
            count = min(step, width - start)
            units = x.new_zeros(count, width)
            units[:, start : start + count].fill_diagonal_(1.0)
            columns = forward([units.reshape(count, *inputs.shape)])
            if columns is None:
                continue
            for name, index in indices.items():
                chosen = columns if index is None else columns[:, index]
                norms[name][position, start : start + count] = torch.linalg.vector_norm(
                    chosen, dim=1, dtype=torch.float64
                )
    return {name: part.reshape(x.shape) for name, part in norms.items()}
