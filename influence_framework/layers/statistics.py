"""Inputs and output gradients of layers in matrix form, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from influence_framework.data import Batch, joined, take
from influence_framework.derivatives import CACHE_BYTES, gradients_of, pull_back, rows_at_once
from influence_framework.errors import InvalidInputError
from influence_framework.layers.forms import MatrixForm
from influence_framework.layers.tape import Layer, Tape, Use, of_samples, record
from influence_framework.memory import in_pieces
from influence_framework.objective import Masking
from influence_framework.output_curvature import OutputCurvature
from influence_framework.problem import Problem

Rows = Callable[[Tensor, Batch], Tensor]
"""From a batch's outputs ``(n, …)`` to ``s`` cotangents of them, ``(s, n, …)``."""

Samples = int | Literal["exact"]
"""How many cotangents are drawn for each sample; or all that the curvature in the outputs takes."""


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """One layer's part in one batch of ``n`` samples, for ``s`` draws of output gradients.

    The gradient of draw ``s`` and sample ``n`` in matrix form is ``G[s,n] = Σ_t δ[s,n,t] ⊗ ā[n,t]``,
    ``(g, o, e)``, with ``t`` over the positions at which the layer was applied.

    Attributes:
        inputs: ``ā``, ``(g, n, t, e)``; or ``(n, t)`` with the indices of unit vectors ``ā``.
        output_gradients: ``δ``, ``(s, g, n, t, o)``; as ``inputs``, it may be strided and share memory with
            other layers', so that nothing is written into it.
        columns: ``e``.
        present: Which positions count, where some are padding: their ``δ`` is zero, and so is ``ā`` unless it
            is an index. ``None`` where all do.
    """

    inputs: Float[Tensor, "g n t e"] | Int[Tensor, "n t"]
    output_gradients: Float[Tensor, "s g n t o"]
    columns: int
    present: Bool[Tensor, "n t"] | None = None

    @property
    def one_hot(self) -> bool:
        """Whether ``inputs`` are indices."""
        return not self.inputs.is_floating_point()

    @property
    def size(self) -> int:
        """``n``."""
        return self.output_gradients.shape[2]

    @property
    def positions(self) -> int:
        """Number of positions ``t``."""
        return self.output_gradients.shape[3]

    def parts(self, step: int) -> Iterator[LayerBatch]:
        """``step`` samples at a time."""
        for start in range(0, self.size, step):
            part = slice(start, start + step)
            inputs = self.inputs[part] if self.one_hot else self.inputs[:, part]
            present = None if self.present is None else self.present[part]
            yield LayerBatch(inputs, self.output_gradients[:, :, part], self.columns, present)

    def square(self) -> float:
        """``Σ_s Σ_n ‖G[s,n]‖²``, from products of positions where they are fewer than entries."""
        deltas, inputs, positions = self.output_gradients, self.inputs, self.positions
        if positions * (deltas.shape[4] + self.columns) > deltas.shape[4] * self.columns:
            return float(self.gradients().square().sum(dtype=torch.float64))
        same = inputs @ inputs.mT if not self.one_hot else (inputs[:, :, None] == inputs[:, None, :])[None]
        return float(((deltas @ deltas.mT) * same).sum(dtype=torch.float64))

    def gradients(self) -> Float[Tensor, "s n g o e"]:
        """``G`` of every draw and sample."""
        return contract_positions(self.output_gradients, self.inputs, self.columns)


def contract_positions(
    output_gradients: Float[Tensor, "s g n t o"],
    inputs: Float[Tensor, "g n t e"] | Int[Tensor, "n t"],
    columns: int,
) -> Float[Tensor, "s n g o e"]:
    """``Σ_t δ[s,n,t] ⊗ ā[n,t]``."""
    if inputs.is_floating_point():
        return torch.einsum("sgnto,gnte->sngoe", output_gradients, inputs)
    draws, groups, size, positions, outputs = output_gradients.shape
    total = output_gradients.new_zeros(draws, groups, size, columns, outputs)
    index = inputs[None, None, :, :, None].expand(draws, groups, size, positions, outputs)
    return total.scatter_add_(3, index, output_gradients).permute(0, 2, 1, 4, 3)


def true_gradients(problem: Problem) -> Rows:
    """The gradient of each sample's own loss with respect to its outputs, as one draw."""

    def rows(outputs: Tensor, batch: Batch) -> Tensor:
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = problem.objective.sample_losses(leaf, batch).sum()
        return gradients_of(total, [leaf], keep_graph=False)[0][None]

    return rows


def fisher_rows(problem: Problem, samples: Samples | Literal["leading"], generator: torch.Generator) -> Rows:
    """Pseudo-gradients of the outputs, whose second moment is the Hessian of the loss in the outputs.

    With them the second moment of parameter gradients is the Gauss-Newton matrix, which is the Fisher
    information where the loss is a negative log-likelihood: exactly, or in expectation over ``samples``
    draws from the model's predictive distribution. The ``"leading"`` ones are exact too,
    and the first of them hold the most of it; see :meth:`OutputCurvature.leading`.
    """

    def rows(outputs: Tensor, batch: Batch) -> Tensor:
        curvature = OutputCurvature.of(problem.objective, outputs, batch)
        if samples == "leading":
            return curvature.leading(generator)
        return curvature.exact() if samples == "exact" else curvature.draw(samples, generator)

    return rows


def layer_batch(problem: Problem, layers: Iterable[Layer], batch: Batch, rows: Rows) -> dict[Layer, LayerBatch]:
    """One batch's inputs and output gradients of every layer that the model applied.

    Raises:
        InvalidInputError: A layer was applied to something other than the samples of the batch.
    """
    layers = list(layers)
    recorded = Recorded.of(problem, layers, batch, rows)
    found = {layer: recorded.at(layer) for layer in layers}
    return {layer: part for layer, part in found.items() if part is not None}


@dataclass(frozen=True)
class Recorded:
    """A batch that has been through the model and back, before it is brought into any layer's form.

    Attributes:
        size: Number of samples.
        uses: Every use of the layers' modules.
        gradients: ``(s, *shape)`` with respect to the output of each.
        present: Masks of the batch, where it has padding.
    """

    size: int
    uses: Sequence[Use]
    gradients: Sequence[Tensor]
    present: Sequence[Bool[Tensor, "n _t"]]

    @classmethod
    def of(cls, problem: Problem, layers: Sequence[Layer], batch: Batch, rows: Rows) -> Recorded:
        """Run ``batch`` through the model, and ``rows`` back."""
        names = dict.fromkeys(name for layer in layers for name in layer.modules)
        ways = {name: way for layer in layers for name, way in layer.shared.items()}
        alone = [name for name in names if ways.get(name) == "alone"]
        together = [name for name in names if name not in alone]
        tape = record(problem, together, batch, ways.keys() - set(alone), twice=False)
        size, objective = len(tape.outputs), problem.objective
        present = objective.present(batch) if isinstance(objective, Masking) else []
        padded = [mask for mask in present if not mask.all()]
        # Drawn for layers that the model did not apply too: all passes are to see the same draws.
        cotangents = rows(tape.outputs.detach(), batch)
        if not tape.uses and not alone:
            return cls(size, [], [], padded)
        uses, gradients = list(tape.uses), _output_gradients(problem, tape, cotangents)
        for use, gradient in _one_by_one(problem, alone, batch, cotangents) if alone else []:
            uses.append(use)
            gradients.append(gradient)
        return cls(size, uses, gradients, padded)

    def at(self, layer: Layer) -> LayerBatch | None:
        """The layer's part; ``None`` where the model did not apply it."""
        found = [
            (layer.modules[use.module], use.inputs.detach(), gradient)
            for use, gradient in zip(self.uses, self.gradients, strict=True)
            if use.module in layer.modules
        ]
        if not found:
            return None
        parts = [LayerBatch(*_in_form(*use, self.size, layer), columns=use[0].places.shape[2]) for use in found]
        if any(part.one_hot != layer.form.one_hot for part in parts):
            return _transposed_too(parts, layer.form.places.shape[2])
        return _joined([_masked(part, self.present) for part in parts])


def _output_gradients(problem: Problem, tape: Tape, rows: Float[Tensor, "s n ..."]) -> list[Tensor]:
    """``(s, *shape)`` of every use: ``rows`` pulled back, as many at a time as pays."""
    step = rows_at_once(rows.device, problem.sample_bytes * rows.shape[1], problem.memory_budget)
    parts = [pull_back([tape.outputs], tape.shifts, [part]) for part in rows.split(step)]
    return [
        use.shift.new_zeros(len(rows), *use.shift.shape)
        if pieces[0] is None
        else _one([piece for piece in pieces if piece is not None])
        for use, pieces in zip(tape.uses, zip(*parts, strict=True), strict=True)
    ]


def _one(pieces: list[Tensor]) -> Tensor:
    """All pieces, one after the other; a single one as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _in_form(
    form: MatrixForm, inputs: Tensor, gradient: Tensor, size: int, layer: Layer
) -> tuple[Tensor, Tensor]:
    taken, given = form.inputs(inputs), form.output_gradients(inputs, gradient)
    if given.shape[2] != size:
        raise InvalidInputError(
            f"The layer {layer.name!r} was applied to a tensor of shape {tuple(inputs.shape)}, whose first "
            f"dimension is not the {size} samples of the batch: keep samples in the first dimension."
        )
    return taken, given


def _one_by_one(
    problem: Problem, modules: Sequence[str], batch: Batch, rows: Float[Tensor, "s n ..."]
) -> Iterator[tuple[Use, Tensor]]:
    """Uses of modules that are applied to what all samples have in common, from one pass for each sample."""
    tapes = [record(problem, modules, take(batch, slice(n, n + 1)), twice=False) for n in range(rows.shape[1])]
    pulled = [_output_gradients(problem, tape, rows[:, n : n + 1]) for n, tape in enumerate(tapes)]
    for position, uses in enumerate(zip(*(tape.uses for tape in tapes), strict=True)):
        inputs = torch.cat([of_samples(use.inputs, 1) for use in uses])
        gradients = [
            part if use.shift.ndim > 1 and use.shift.shape[0] == 1 else part.unsqueeze(1)
            for use, part in zip(uses, (parts[position] for parts in pulled), strict=True)
        ]
        yield Use(uses[0].module, inputs, uses[0].shift), torch.cat(gradients, dim=1)


def _masked(part: LayerBatch, present: Sequence[Bool[Tensor, "n _t"]]) -> LayerBatch:
    """Without the padding of the first mask that fits: of as many positions, no gradient at those left out."""
    for mask in present:
        if part.positions == 1 or mask.shape != (part.size, part.positions):
            continue
        if part.output_gradients.masked_fill(mask[..., None], 0).any():
            continue
        inputs = part.inputs if part.one_hot else part.inputs.masked_fill(~mask[..., None], 0)
        return LayerBatch(inputs, part.output_gradients, part.columns, mask)
    return part


def _joined(parts: Sequence[LayerBatch]) -> LayerBatch:
    """Several uses of a layer are further positions of one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    present = None
    if any(part.present is not None for part in parts):
        each = [
            first.output_gradients.new_ones(part.size, part.positions, dtype=torch.bool)
            if part.present is None
            else part.present
            for part in parts
        ]
        present = torch.cat(each, dim=1)
    return LayerBatch(
        torch.cat([part.inputs for part in parts], dim=1 if first.one_hot else 2),
        torch.cat([part.output_gradients for part in parts], dim=3),
        first.columns,
        present,
    )


def _transposed_too(parts: Sequence[LayerBatch], columns: int) -> LayerBatch:
    """Uses as an embedding, and of its transpose as a linear layer: one position for every row of the weight.

    Output gradients of the one stand where inputs of the other do, so that no list of positions serves both.
    ``G`` as a whole does, with a unit vector for each of its columns.
    """
    total = torch.stack([p.gradients() if p.one_hot else p.gradients().mT for p in parts]).sum(0)
    index = torch.arange(columns, device=total.device).expand(total.shape[1], columns)
    return LayerBatch(index, total.permute(0, 2, 1, 4, 3), columns)


def samples_at_once(problem: Problem, draws: int = 1, layers: Iterable[Layer] = ()) -> int:
    """Samples to bring into matrix form together, with ``draws`` gradients of each output."""
    layers = list(layers)
    # What is saved for the backward pass, inputs in matrix form, and output gradients of every draw: those of
    # sixteen take about what second derivatives would, and so do inputs that are patches.
    least = 8.0 if any(form.unfolds for layer in layers for form in layer.modules.values()) else 2.0
    times = max(least, 2 + 3 * draws / 8, draws / 2)
    count = problem.room.at_most(int(problem.memory_budget / (times * problem.sample_bytes)))
    if problem.parameters.device.type == "cpu":
        # More gain nothing once their activations have left the cache, and take memory.
        count = min(count, max(32, CACHE_BYTES // (2 * problem.sample_bytes)))
    # Whole gradients are formed of these, in single precision at least.
    whole = sum(layer.form.places.numel() for layer in layers if layer.transposed)
    if whole:
        count = min(count, problem.memory_budget // (3 * 8 * draws * whole))
    return max(1, count)


def layer_batches(
    problem: Problem,
    layers: Sequence[Layer],
    rows: Rows,
    samples: Samples,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Mapping[Layer, LayerBatch], int]]:
    """One pass over the training data: every batch's layers, with its sample count.

    ``rows`` draws from ``generator``, which is wound back where memory runs out and a batch is cut.
    """
    draws = problem.outputs_of_a_sample() if samples == "exact" else samples
    at_once = samples_at_once(problem, draws, layers)

    def work(batch: Batch) -> list[Mapping[Layer, LayerBatch]]:
        return [layer_batch(problem, layers, batch, rows)]

    passed = problem.batches(at_once)
    # A loader may fill one buffer again and again: what it yields is used before the next is asked for.
    for whole, _ in joined(passed, at_once) if problem.cached else passed:
        for piece, found in in_pieces(problem.room, whole, problem.objective.size, at_once, work, generator):
            # Nothing of it is held here while the next one is worked on.
            yield found.pop(), problem.objective.size(piece)
