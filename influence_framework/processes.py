"""Several processes of ``torch.distributed`` that run the same program, each with its share of the data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DistributedSampler

from influence_framework.data import Batch, Fingerprint, take
from influence_framework.errors import DistributedError, InvalidInputError

T = TypeVar("T")


_TOGETHER: set[Any] = set()
"""The groups in whose :meth:`Processes.together` this process is."""


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes of a group of ``torch.distributed``, which all do the same.

    Sample ``i`` of the training data belongs to process ``i mod W``, whatever the batches; or each process
    is given its own samples. Sums over the data are summed over the processes, by an all-reduce that gives
    every one of them the same bits. What follows from these sums is worked out by all of them alike.

    Before every exchange the processes meet: each says where in the program it is and whether it has failed.
    If one has, all others raise :class:`DistributedError` instead of waiting; and so they do if they are not
    all at the same place, or hold different numbers where these have to be the same.

    Attributes:
        group: The process group; ``None`` for the default one.
        divided: Whether the data given to each process is its share already.
    """

    group: Any = None
    divided: bool = False

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInputError(
                "No processes are connected: start the program by torchrun --nproc-per-node=N program.py, and "
                "call torch.distributed.init_process_group() in it first."
            )
        if dist.get_rank(self.group) < 0:
            raise InvalidInputError("This process is not in the group: call in those that are in it only.")

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """``W``, number of processes."""
        return dist.get_world_size(self.group)

    def to(self, device: Any) -> Processes:
        """Itself, wherever the model is."""
        return self

    @property
    def _device(self) -> torch.device:
        """Where small things are exchanged."""
        return self._exchangeable(torch.device("cpu"))

    def _exchangeable(self, device: torch.device) -> torch.device:
        """The device itself, where the group exchanges tensors on such, else one on which it does."""
        known = self._device_types
        if device.type in known:
            return device
        return torch.device("cpu") if "cpu" in known else torch.device("cuda", torch.cuda.current_device())

    @property
    def _device_types(self) -> list[str]:
        """Those on which the group exchanges tensors."""
        # Such as "cpu:gloo,cuda:nccl".
        return [part.partition(":")[0] for part in dist.get_backend_config(self.group).split(",")]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do, to the end or not at all: where one raises, so do the others.

        Raises:
            DistributedError: Another process has failed.
        """
        if self.group in _TOGETHER:
            yield
            return
        _TOGETHER.add(self.group)
        try:
            yield
            self._meet("the end of a call")
        except DistributedError:
            raise
        except Exception as error:
            with suppress(DistributedError):
                self._tell(error)
            raise
        finally:
            _TOGETHER.discard(self.group)

    def _tell(self, error: Exception) -> None:
        """Let the others know, who are on their way to the next exchange or to the end of the call."""
        self._exchange(1.0, 0.0, 0.0, 0.0)
        self._gather(f"{type(error).__name__}: {error}")

    def _exchange(self, failed: float, place: float, value: float, scale: float) -> Tensor:
        """The largest of what all processes pass, and the negative of the smallest."""
        state = torch.tensor([failed, place, value, scale], dtype=torch.float64, device="cpu")
        try:
            # Maximum and minimum in one exchange.
            both = torch.cat([state, -state]).to(self._device)
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            raise DistributedError(
                "Another process was lost, or did not come to the same point of the program in time "
                f"({str(error).splitlines()[0]}): it may have ended, or not have made the same call. All "
                "processes have to make the same calls; the timeout is that of init_process_group.",
                {},
            ) from error
        return both.cpu()

    def _meet(self, place: str, same: Tensor | None = None) -> None:
        """Wait for the others; raise unless all are well and at the same place with the same numbers.

        Raises:
            DistributedError: One has failed, is elsewhere in the program, or holds other numbers.
        """
        # 32 bits, which a float64 holds exactly.
        own = float(zlib.crc32(place.encode()))
        found = self._exchange(0.0, own, *((0.0, 0.0) if same is None else _checksum(same)))
        failed, largest_place, largest, scale = found[:4].tolist()
        _, smallest_place, smallest, _ = (-found[4:]).tolist()
        if failed:
            which = {number: text for number, text in enumerate(self._gather("")) if text}
            raise DistributedError(
                "Stopped because another process failed: "
                + "; ".join(f"process {number}: {text}" for number, text in which.items()),
                which,
            )
        if largest_place != smallest_place:
            places = dict(enumerate(self._gather(place)))
            raise DistributedError(
                "The processes are not doing the same: "
                + "; ".join(f"process {number} is at {text}" for number, text in places.items())
                + ". All have to make the same calls with the same arguments, in the same order.",
                places,
            )
        tolerance = torch.finfo(torch.float32 if same is None else same.dtype).eps ** 0.5
        if largest - smallest > tolerance * scale:
            raise DistributedError(
                f"The processes hold different numbers at {place}: pass the same model and the same points in "
                "all of them; the training data alone is divided between them.",
                {},
            )

    def _gather(self, thing: T) -> list[T]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, thing, group=self.group)
        return found

    def gather(self, thing: T, place: str) -> list[T]:
        """What each process has, in their order; ``thing`` is pickled, with its tensors on the CPU."""
        with self.together():
            self._meet(place)
            return self._gather(thing)

    def same(self, thing: T, place: str) -> T:
        """What the first process has."""
        with self.together():
            self._meet(place)
            found = [thing]
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(found, source, group=self.group)
            return found[0]

    def total(
        self, work: Callable[[], Sequence[Tensor]], place: str, same: Tensor | None = None
    ) -> list[Tensor]:
        """The sum over all processes of what ``work`` returns in each; see :meth:`Problem.total`."""
        with self.together():
            own = work()
            self._meet(f"{place} of shapes {[tuple(tensor.shape) for tensor in own]}", same)
            return [self._sum(tensor) for tensor in own]

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`DistributedError` unless all processes have the same model.

        Raises:
            InvalidInputError: Small things would be exchanged on another GPU than this process's.
        """
        self._check_device({parameter.device for parameter in model.parameters()})
        tensors = [*model.parameters(), *model.buffers()]
        parts = [tensor.detach().to("cpu", torch.float64).reshape(-1) for tensor in tensors]
        self._meet(f"the model with {sum(map(len, parts))} parameters", torch.cat(parts)[None])

    def _check_device(self, devices: Collection[torch.device]) -> None:
        here = next((device for device in devices if device.type == "cuda"), None)
        if here is None or "cpu" in self._device_types:
            return
        current = torch.cuda.current_device()
        if here.index != current:
            # Of two processes on one GPU, NCCL makes neither an error nor an end in every version.
            raise InvalidInputError(
                f"The model is on {here}, and what the processes tell each other would go through the current "
                f"device, cuda:{current}: call torch.cuda.set_device({here.index}) in this process before "
                'init_process_group, or init_process_group("cpu:gloo,cuda:nccl").'
            )

    def _sum(self, tensor: Tensor) -> Tensor:
        # A copy where the tensor is not contiguous, or elsewhere.
        summed = tensor.to(self._exchangeable(tensor.device)).contiguous()
        dist.all_reduce(summed, group=self.group)
        return summed.to(tensor.device)

    def share(self, batch: Batch, size: int, start: int) -> Batch:
        """This process's samples, maybe none, of a batch whose first sample is number ``start``."""
        if self.divided:
            return batch
        first = (self.rank - start) % self.count
        return take(batch, slice(first, size, self.count))

    def share_of(self, number: int) -> int:
        """How many of the first ``number`` samples are this process's."""
        return len(range(self.rank, number, self.count))

    def generator(self, generator: torch.Generator) -> torch.Generator:
        """One for this process alone; ``generator`` itself is used alike in all of them."""
        drawn = torch.randint(2**62, (), generator=generator, device=generator.device)
        return torch.Generator(generator.device).manual_seed(int(drawn) + self.rank)

    def check_sampler(self, data: Any) -> None:
        """Raise :class:`InvalidInputError` for a loader whose sampler gives some samples to two processes."""
        sampler = getattr(data, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return
        repeated = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
        if repeated > 0:
            raise InvalidInputError(
                f"The DistributedSampler repeats {repeated} samples, for equal shares, and they would count "
                "twice: give every process all of the data, without a sampler, which divides it "
                "exactly; or give each its own share by a sampler that repeats none."
            )

    def settle(self, read: Fingerprint, own: Fingerprint) -> Fingerprint:
        """Of all shares, which are checked to be all of the data.

        Args:
            read: Of all samples that this process has read.
            own: Of those that are its share.

        Raises:
            InvalidInputError: A process has none; or the processes have read different data.
        """
        shares = self.gather(own, "the end of the data")
        whole = sum(shares, Fingerprint())
        sizes = [share.size for share in shares]
        if not all(sizes):
            raise InvalidInputError(
                f"{whole.size} samples are too few for {self.count} processes: their shares are {sizes}."
            )
        if not self.divided and not whole.agrees(read):
            raise InvalidInputError(
                f"The processes read different training data: together their shares are {whole.size} samples "
                f"that are not the {read.size} that process {self.rank} has read. Give each the same loader in "
                "the same order (shuffle=False, or the same seed in all), or set divided=True where each is "
                "given its own share."
            )
        return whole


def _checksum(tensor: Tensor) -> tuple[float, float]:
    """A number that other rows would hardly have, and the scale of its rounding."""
    rows = tensor.detach()
    weights = torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device).sin()
    order = torch.arange(1, len(rows) + 1, dtype=torch.float64, device=rows.device).sin()
    sums = (rows @ weights).double()
    sizes = torch.linalg.vector_norm(rows, dim=1).double() * torch.linalg.vector_norm(weights).double()
    return float(sums @ order), float(sizes @ order.abs())
