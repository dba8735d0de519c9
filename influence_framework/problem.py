"""A trained model, its objective and its training data, checked once and ready for products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from influence_framework.calling import as_function
from influence_framework.checks import check_leaves, check_model
from influence_framework.data import (
    Batch,
    Fingerprint,
    Joiner,
    RandomState,
    check_reiterable,
    concatenate,
    detached,
    layout,
    map_leaves,
    nbytes,
    one_pass,
    random_state,
    random_state_kept,
    split,
    take,
)
from influence_framework.derivatives import has_second_derivatives
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.memory import Room, in_pieces
from influence_framework.objective import Checking, Loss, Objective, Preparing, SupervisedObjective
from influence_framework.parameters import ParameterSpace
from influence_framework.processes import Processes
from influence_framework.trials import check_one_sample_at_a_time, saved_by_autograd

DEFAULT_MEMORY_BUDGET = 256 * 2**20
"""Bytes that caches and intermediate results may take beside the model, the data and the results."""

TRIAL = 32
"""Samples that are tried beforehand: enough for a batch, few enough to cost nothing ..."""

TRIAL_FLOPS = 2**29
"""... unless a forward pass over them takes more than this: then fewer, but at least four."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What is differentiated: ``1/N Σ_i ℓ_i(θ)`` of a model over its training data.

    Made by :meth:`build`, which checks everything that can be checked at the price of a forward pass.
    Its methods take the parameters as named tensors, so that nothing is ever written to the model.

    Attributes:
        model: The trained model, as it was given.
        objective: How a batch becomes outputs and losses.
        parameters: All trainable parameters.
        data: Batches, re-iterable: held in memory where they fit the budget, else the caller's loader.
        cached: Whether ``data`` is held in memory.
        example: The first samples, up to ``TRIAL`` of them, for trials.
        size: ``N``, the number of samples of one pass.
        batch_size: Samples in the first batch of the caller's loader.
        sample_bytes: Bytes that autograd keeps of one sample's forward pass.
        sample_flops: Flops of one sample's forward pass, as far as matrix products and convolutions go.
        twice_differentiable: Whether gradients can be differentiated again. Where not, there are scores
            but no curvature products.
        memory_budget: Bytes for caches and intermediate results.
        precision: ``eps`` of the coarsest dtype that the model computes in: some work in single precision
            inside whatever that of their parameters is.
        state: Global random state in which every pass starts.
        fingerprint: What the first pass held.
        share: The same of what was for this process, to notice other contents in a later pass.
        processes: Those that the data is divided between, of which this one has a share; ``None`` where it has
            all. ``size`` counts the samples of all shares.
        confirmed: What was found out of the model's layers for all blocks, once; see ``layers.covering``.
        room: How many samples at a time memory was found to have room for.
        plain: Of parameters by name, the linear layers that are all they belong to; see ``plain``.
        whole: The parameters of all blocks, where ``parameters`` are those of one; else ``None``.
    """

    model: nn.Module
    objective: Objective
    parameters: ParameterSpace
    data: Iterable[Batch]
    cached: bool
    example: Batch
    size: int
    batch_size: int
    sample_bytes: int
    sample_flops: int
    twice_differentiable: bool
    memory_budget: int
    precision: float
    state: RandomState
    fingerprint: Fingerprint
    share: Fingerprint
    processes: Processes | None = None
    confirmed: list[Any] = field(default_factory=list, repr=False, compare=False)
    room: Room = field(default_factory=Room)
    whole: ParameterSpace | None = None
    plain: Remembered = field(default_factory=lambda: Remembered(), repr=False, compare=False)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        loss: Loss | Objective,
        data: Iterable[Batch],
        *,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        processes: Processes | None = None,
    ) -> Self:
        """Check model, loss and data against each other and count the samples.

        Args:
            model: In eval mode if it contains Dropout or BatchNorm.
            loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
            data: A ``DataLoader`` or any re-iterable of batches; read to the end once, here.
            memory_budget: Bytes for caches and intermediate results.
            processes: Those that the data is divided between.

        Raises:
            InvalidInputError: What does not fit, with the remedy.
            NonFiniteError: NaN or infinity in parameters, data or losses.
        """
        check_model(model)
        parameters = ParameterSpace.of(model)
        check_reiterable(data)
        objective = loss if isinstance(loss, Objective) else SupervisedObjective(loss)
        if isinstance(objective, Preparing):
            objective = objective.prepared(model)
        measured: Any = {"size": 0, "batch_size": 0, "sample_bytes": 1, "sample_flops": 0}
        return cls(
            model=model,
            objective=objective,
            parameters=parameters,
            data=data,
            cached=False,
            example=None,
            twice_differentiable=False,
            memory_budget=memory_budget,
            precision=torch.finfo(parameters.dtype).eps,
            state=random_state(data),
            fingerprint=Fingerprint(),
            share=Fingerprint(),
            processes=processes,
            **measured,
        )._read()

    def _read(self) -> Self:
        """Read the data once: validate and count it, and keep it where it fits the budget."""
        kept: Joiner | None = None
        first = held = 0
        read, own = Fingerprint(), Fingerprint()
        problem = self
        for whole in map(detached, one_pass(self.data, self.state)):
            if not read.size or self.processes is None:
                problem = problem.validated(whole, "training data")
            if not read.size:
                # All processes try the same samples, so that all learn the same of the model.
                first = problem.objective.size(whole)
                few = problem._same(take(whole, slice(0, TRIAL)))
                problem = self.room.retried(partial(problem._tried, few))
                kept = Joiner(problem.max_batch)
            elif read.size == 1 and layout(whole) == layout(problem.example):
                # One sample by itself cannot tell whether it is mixed with others.
                self.room.retried(partial(problem._check_beside_the_first, take(whole, slice(0, TRIAL))))
            batch, size = problem._share(whole, read.size)
            if size and self.processes is not None:
                problem = problem.validated(batch, "training data")
            own += (found := Fingerprint.of(batch, size) if size else Fingerprint())
            read += found if batch is whole else Fingerprint.of(whole, problem.objective.size(whole))
            held += nbytes(batch)
            if held > self.memory_budget:
                kept = None
            if kept is not None and size:
                kept.add(batch, size)
        if not read.size:
            raise InvalidInputError(
                "The training data is empty: the loader yielded no batch. Is the dataset empty, or "
                "drop_last=True with fewer samples than one batch?"
            )
        joined = None if kept is None else kept.finish()
        if joined and getattr(problem.objective, "reduction", "known") is None:
            # Batches of one sample do not tell a mean from a sum; what they were joined to does.
            largest = max(joined, key=problem.objective.size)
            problem = replace(problem, objective=problem.validated(largest, "training data").objective)
        whole = own if self.processes is None else self.processes.settle(read, own)
        return replace(
            problem,
            data=self.data if joined is None else joined,
            cached=joined is not None,
            size=whole.size,
            batch_size=first,
            objective=_settled(problem.objective),
            fingerprint=whole,
            share=own,
        )

    def _same(self, batch: Batch) -> Batch:
        """The batch of the first process."""
        if self.processes is None:
            return batch
        shared = self.processes.same(map_leaves(lambda tensor: tensor.cpu(), batch), "the first samples")
        return map_leaves(lambda tensor: tensor.to(self.parameters.device), shared)

    def _share(self, batch: Batch, start: int) -> tuple[Batch, int]:
        """This process's part of a batch whose first sample is number ``start`` of the pass, and its size."""
        size = self.objective.size(batch)
        if self.processes is None:
            return batch, size
        own = self.processes.share(batch, size, start)
        return own, self.objective.size(own)

    @property
    def share_size(self) -> int:
        """Samples of this process's share, to one."""
        return self.size if self.processes is None else ceil(self.size / self.processes.count)

    def together(self) -> AbstractContextManager[None]:
        """What the processes that the data is divided between do alike; see :meth:`Processes.together`."""
        return nullcontext() if self.processes is None else self.processes.together()

    def total(
        self, work: Callable[[Self], Sequence[Tensor]], place: str, same: Tensor | None = None
    ) -> Sequence[Tensor]:
        """The sum of what ``work`` returns for each share of the data. All sums over the data are formed here.

        Where memory runs out meanwhile, ``work`` begins again with smaller batches.

        Args:
            work: From the problem of a share to sums over its samples: as many tensors, of the same shapes,
                for every share, also for one whose samples add nothing.
            place: What is summed, for messages.
            same: What has to be the same in all processes, beside model and options.

        Raises:
            DistributedError: Another process failed, is not here, or has another ``same``.
        """
        own = partial(self.room.retried, partial(work, self))
        return own() if self.processes is None else self.processes.total(own, place, same)

    def count(self, size: int) -> int:
        """How many samples of all shares that is, if it is ``size`` of this one."""
        number = torch.tensor(size, dtype=torch.float64, device="cpu")
        (whole,) = self.total(lambda _: [number], "a number of samples")
        return int(whole)

    def agreed(self, count: int) -> int:
        """``count`` samples at a time, or as few as some process has room for: to solve, all keep in step."""
        if self.processes is None:
            return count
        return min(self.processes.gather(count, "how many samples to solve for at a time"))

    def _tried(self, batch: Batch) -> Self:
        """What the first samples tell: that each is on its own, what one costs, and which derivatives exist."""
        self.room.last = min(2, self.objective.size(batch))
        pair = take(batch, slice(0, 2))
        with torch.no_grad(), random_state_kept(), FlopCounterMode(display=False) as counter:
            self.outputs({}, pair)
        flops = int(counter.get_total_flops()) // self.objective.size(pair)
        batch = take(batch, slice(0, self.room.at_most(max(4, TRIAL_FLOPS // max(1, flops)))))
        self.room.last = size = self.objective.size(batch)
        leaves = self.parameters.leaves(self.model)
        saved = saved_by_autograd(lambda: self.mean_loss(leaves, batch), self.model)
        kept, precision = saved or (32 * nbytes(batch), self.precision)
        tried = replace(
            self,
            example=map_leaves(torch.clone, batch),
            precision=max(precision, self.precision),
            sample_bytes=kept // size + 1,
            sample_flops=flops,
        )
        tried._check_one_sample_at_a_time(batch)
        with torch.enable_grad(), random_state_kept():
            outputs = tried.outputs(leaves, pair)
            losses = tried.objective.sample_losses(outputs, pair)
        twice = has_second_derivatives(outputs, losses, list(leaves.values()), tried.precision)
        return replace(tried, twice_differentiable=twice)

    def _check_beside_the_first(self, batch: Batch) -> None:
        part = slice(0, max(1, self.room.at_most(2 * TRIAL) // 2))
        pair = concatenate([take(self.example, part), take(batch, part)])
        self.room.last = self.objective.size(pair)
        self._check_one_sample_at_a_time(pair)

    def _check_one_sample_at_a_time(self, batch: Batch) -> None:
        size = self.objective.size(batch)
        with torch.no_grad(), random_state_kept():
            check_one_sample_at_a_time(lambda part: self.outputs({}, take(batch, part)), size, self.precision)

    def validated(self, batch: Batch, what: str) -> Self:
        """Check one batch; return the problem with what was learnt about the loss.

        Raises:
            InvalidInputError: Wrong dtype, device, lengths, outputs or loss.
            NonFiniteError: NaN or infinity.
        """
        check_leaves(batch, self.parameters, what)
        size = self.objective.size(batch)
        if size == 0:
            raise InvalidInputError(f"A batch of the {what} has no sample.")
        if isinstance(self.objective, Checking):
            self.objective.check(batch)
        found = [self]

        def work(piece: Batch) -> None:
            with torch.no_grad(), random_state_kept():
                outputs = found[0].outputs({}, piece, twice=False)
            found[0] = found[0].judged(outputs, piece, what)

        for _ in in_pieces(self.room, batch, self.objective.size, size, work):
            pass
        return found[0]

    def judged(self, outputs: Tensor, batch: Batch, what: str) -> Self:
        """Check what the model returned for one batch; return the problem with what was learnt about the loss.

        Raises:
            InvalidInputError: Wrong outputs or loss.
            NonFiniteError: NaN or infinity.
        """
        size = self.objective.size(batch)
        if outputs.ndim == 0 or outputs.shape[0] != size:
            raise InvalidInputError(
                f"The model returned shape {tuple(outputs.shape)} for {size} samples: the first dimension "
                "of the output must count samples."
            )
        if not outputs.dtype.is_floating_point:
            raise InvalidInputError(f"The model returned {outputs.dtype}; expected floating-point outputs.")
        if not torch.isfinite(outputs).all():
            raise NonFiniteError(
                f"The model returns NaN or infinity on the {what}: check the data's scale and the parameters."
            )
        objective = self.objective.validate(outputs, batch)
        with torch.no_grad():
            loss = objective.mean_loss(outputs, batch)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"The loss is {loss.item()} on the {what}.")
        return replace(self, objective=objective)

    def require_second_derivatives(self) -> None:
        """Raise :class:`InvalidInputError` where gradients of the model cannot be differentiated again."""
        if not self.twice_differentiable:
            raise InvalidInputError(
                "The gradients of this model cannot be differentiated again: part of it, usually a "
                "torch.autograd.Function with once_differentiable, has no second derivative, and curvature "
                "products would miss that part. Write its backward in differentiable operations, or freeze "
                "the parameters before it."
            )

    def outputs_of_a_sample(self) -> int:
        """How many numbers the model returns for a sample."""
        with torch.no_grad():
            return self.outputs({}, take(self.example, slice(0, 1))).numel()

    @property
    def max_batch(self) -> int:
        """Samples to work on at a time: second derivatives hold a few times what a forward pass saves."""
        return self.room.at_most(max(1, self.memory_budget // (8 * self.sample_bytes)))

    def batches(self, at_most: int | None = None) -> Iterator[tuple[Batch, int]]:
        """One pass over the data: batches within the memory budget, each with its sample count.

        Of ``at_most`` so many samples, where more are worked on than second derivatives leave room for.

        The order may be another on every pass, since whatever is computed from the data is a sum over it.

        Raises:
            InvalidInputError: The data holds other samples than when it was first read.
        """
        found = Fingerprint()
        start = 0
        for whole in self.data if self.cached else map(detached, one_pass(self.data, self.state)):
            own, size = (whole, self.objective.size(whole)) if self.cached else self._share(whole, start)
            if not self.cached:
                start += self.objective.size(whole)
            if not size:
                continue
            if not self.cached:
                found += Fingerprint.of(own, size)
            for batch in split(own, size, self.max_batch if at_most is None else at_most):
                self.room.last = self.objective.size(batch)
                yield batch, self.room.last
        if self.cached or found.agrees(self.share):
            return
        before = self.share.size
        now = f"{found.size} now" if found.size != before else "as many, but not the same ones, now"
        order = "in whatever order" if self.processes is None else "and in the same order where it is divided"
        raise InvalidInputError(
            f"The training data held {before} samples when it was first read and {now}: it must yield the "
            f"same samples on every pass, {order}. Switch off random augmentation and drop_last, "
            "draw from the global generators of torch, NumPy or Python (every pass starts from the same state "
            "of them), or raise memory_budget so that the data is held in memory."
        )

    def first(self, count: int) -> Self:
        """The same problem on its first ``count`` samples, which it holds; on all where there are no more."""
        if self.processes is not None:
            return self._first_of_all(self.processes, count)
        kept, size = self._held(count)
        return replace(self, data=kept, cached=True, size=size)

    def _first_of_all(self, processes: Processes, count: int) -> Self:
        """The same for every process, divided no more."""
        kept, _ = self._held(processes.share_of(min(count, self.size)))
        own = map_leaves(lambda tensor: tensor.cpu(), kept)
        shares = processes.gather(own, "the first samples of every share")
        data = map_leaves(
            lambda tensor: tensor.to(self.parameters.device), [b for share in shares for b in share]
        )
        size = sum(map(self.objective.size, data))
        return replace(self, data=data, cached=True, size=size, processes=None)

    def _held(self, count: int) -> tuple[list[Batch], int]:
        """The first ``count`` samples of the share, and how many there are."""
        kept: list[Batch] = []
        size = 0
        for batch, _ in self.batches():
            part = take(batch, slice(0, count - size))
            kept.append(part)
            size += self.objective.size(part)
            if size >= count:
                break
        return kept, size

    def random_batches(self, generator: torch.Generator) -> Iterator[tuple[Batch, int]]:
        """Endless mini-batches, each sample once a pass.

        Data held in memory is cut at random, by ``generator`` alone, into batches of the caller's size.
        Data that is streamed comes in the loader's own batches and order: shuffle it there. Of data that is
        divided, these are this process's part of the mini-batches.
        """
        own = self.batch_size
        if self.processes is not None:
            generator = self.processes.generator(generator)
            own = own if self.processes.divided else ceil(own / self.processes.count)
        while True:
            if not self.cached:
                yield from self.batches()
                continue
            pieces = [
                take(batch, index)
                for batch, size in self.batches()
                for index in torch.randperm(size, generator=generator, device=generator.device).split(own)
            ]
            for position in torch.randperm(len(pieces), generator=generator, device=generator.device):
                yield pieces[position], self.objective.size(pieces[position])

    def forward(self, parameters: Mapping[str, Tensor], *, twice: bool = True) -> Callable[..., Any]:
        """The model as a function of its inputs, with these parameters in place of its own."""
        return as_function(self.model, parameters, twice=twice)

    def outputs(self, parameters: Mapping[str, Tensor], batch: Batch, *, twice: bool = True) -> Tensor:
        """Model outputs ``(n, …)``, to be differentiated ``twice`` or once at most, by the backward pass."""
        return self.objective.outputs(self.forward(parameters, twice=twice), batch)

    def mean_loss(self, parameters: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, ""]:
        """``1/n Σ ℓ_i`` over the batch."""
        return self.objective.mean_loss(self.outputs(parameters, batch), batch)

    def sample_losses(self, parameters: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, " n"]:
        """``ℓ_i`` of each sample of the batch."""
        return self.objective.sample_losses(self.outputs(parameters, batch), batch)


class Remembered(dict[Any, Any]):
    """What is found out again where it is missing: on another device, and in another process."""

    def to(self, device: Any) -> Remembered:
        """Nothing of it."""
        return Remembered()

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()


def _settled(objective: Objective) -> Objective:
    return objective.settled() if isinstance(objective, SupervisedObjective) else objective
