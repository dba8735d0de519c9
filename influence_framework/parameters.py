"""The flat parameter vector and its named tensors, and how parameters are grouped into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence_framework.errors import InvalidInputError, did_you_mean

ROOT_LAYER = "(root)"


@dataclass(frozen=True)
class ParameterSpace:
    """Names and shapes of the trainable parameters in the order of the flat vector.

    The order is that of ``model.named_parameters()``; each tensor is flattened row by row. A tensor
    under two names (tied weights) appears once, under the first. Parameters with
    ``requires_grad=False`` do not appear.

    Attributes:
        names: ``(m,)`` names as in ``model.named_parameters()``.
        shapes: Their shapes.
        dtype: Their common dtype.
        device: Their common device.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> ParameterSpace:
        """The trainable parameters of ``model``.

        Raises:
            InvalidInputError: There is none, or they differ in dtype or device, or one is complex.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InvalidInputError(
                f"{type(model).__name__} has no trainable parameter: influence is measured through "
                "parameters with requires_grad=True. Call model.requires_grad_(True) on the part to study."
            )
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1:
            raise InvalidInputError(
                "All trainable parameters must share one dtype and device, found "
                + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
                + ". Convert the model with model.to(...)."
            )
        ((dtype, device),) = kinds
        if not dtype.is_floating_point:
            raise InvalidInputError(f"Expected real floating-point parameters, got {dtype}.")
        shapes = tuple(p.shape for p in trainable.values())
        return cls(tuple(trainable), shapes, dtype, device)

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """``P``, the length of the flat vector."""
        return sum(self.sizes)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each parameter starts and stops in the flat vector."""
        return list(pairwise(accumulate(self.sizes, initial=0)))

    def subset(self, names: Iterable[str]) -> ParameterSpace:
        """The space of only these parameters, in the order given."""
        names = tuple(names)
        shapes = dict(zip(self.names, self.shapes, strict=True))
        return ParameterSpace(names, tuple(shapes[name] for name in names), self.dtype, self.device)

    def indices_of(self, part: ParameterSpace) -> Int[Tensor, " q"] | None:
        """Positions in this flat vector of the elements of ``part``'s; ``None`` where the two are equal."""
        if part.names == self.names:
            return None
        spans = dict(zip(self.names, self.spans, strict=True))
        return torch.cat([torch.arange(*spans[name], device=self.device) for name in part.names])

    def leaves(self, model: nn.Module) -> dict[str, Tensor]:
        """Fresh leaf tensors that share the model's storage, so that nothing reaches ``p.grad``."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach().requires_grad_() for name in self.names}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " P"]:
        """Named tensors as one vector."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """One vector as named tensors (views where possible)."""
        return dict(zip(self.names, (t[0] for t in self.unflatten_rows(vector[None])), strict=True))

    def flatten_rows(self, tensors: Sequence[Tensor]) -> Float[Tensor, "k P"]:
        """Tensors ``(k, *shape)``, one per parameter in order, as ``(k, P)`` rows."""
        return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors], dim=1)

    def gather_rows(self, tensors: Sequence[Tensor | None], like: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        """Like :meth:`flatten_rows`, with zeros in place of ``None``."""
        shapes = zip(tensors, self.sizes, strict=True)
        return torch.cat(
            [
                like.new_zeros(like.shape[0], size) if t is None else t.reshape(like.shape[0], size)
                for t, size in shapes
            ],
            dim=1,
        )

    def unflatten_rows(self, rows: Float[Tensor, "k P"]) -> list[Tensor]:
        """``(k, P)`` rows as tensors ``(k, *shape)``, one per parameter in order, without a copy."""
        return [
            rows[:, start:stop].unflatten(1, shape) if shape else rows[:, start]
            for (start, stop), shape in zip(self.spans, self.shapes, strict=True)
        ]


@dataclass(frozen=True)
class Blocks(Mapping[str, tuple[str, ...]]):
    """An ordered map from block name to the names of its parameters; every parameter in one block."""

    parameters: Mapping[str, tuple[str, ...]]

    @classmethod
    def resolve(cls, spec: str | Mapping[str, Sequence[str]], space: ParameterSpace) -> Blocks:
        """Blocks from a word or from the user's own grouping.

        Args:
            spec: ``"full"`` (one block), ``"per_layer"`` (one per module that owns parameters, named
                after it; parameters at the model's root form the block ``"(root)"``),
                ``"per_parameter"``, or a mapping from block name to parameter names.
            space: The parameters to cover.

        Raises:
            InvalidInputError: An unknown word; blocks that overlap, leave parameters out, are empty
                or name unknown ones.
        """
        if isinstance(spec, str):
            if spec == "full":
                return cls({"full": space.names})
            if spec == "per_parameter":
                return cls({name: (name,) for name in space.names})
            if spec == "per_layer":
                layers: dict[str, tuple[str, ...]] = {}
                for name in space.names:
                    layer = name.rpartition(".")[0] or ROOT_LAYER
                    layers[layer] = (*layers.get(layer, ()), name)
                return cls(layers)
            words = ["full", "per_layer", "per_parameter"]
            raise InvalidInputError(
                f"Unknown block structure {spec!r}; expected one of {words} or a mapping from block "
                f"name to parameter names.{did_you_mean(spec, words)}"
            )
        if not isinstance(spec, Mapping):
            raise InvalidInputError(
                f"Blocks are a word or a mapping from block name to parameter names, not {type(spec).__name__}."
            )
        return cls._checked(spec, space)

    @classmethod
    def _checked(cls, spec: Mapping[str, Sequence[str]], space: ParameterSpace) -> Blocks:
        owner: dict[str, str] = {}
        for block, names in spec.items():
            if isinstance(names, str):
                raise InvalidInputError(
                    f"Block {block!r} must list parameter names, got the string {names!r}: write [{names!r}]."
                )
            if not names:
                raise InvalidInputError(f"Block {block!r} has no parameter: remove it or fill it.")
            for name in names:
                if name not in space.names:
                    raise InvalidInputError(
                        f"Block {block!r} names {name!r}, which is not a trainable parameter of the "
                        f"model.{did_you_mean(name, space.names)} Known: {', '.join(space.names)}."
                    )
                if name in owner:
                    raise InvalidInputError(
                        f"Parameter {name!r} is in block {owner[name]!r} and in block {block!r}: "
                        "each parameter belongs to exactly one block."
                    )
                owner[name] = block
        missing = [name for name in space.names if name not in owner]
        if missing:
            raise InvalidInputError(
                f"These trainable parameters are in no block: {', '.join(missing)}. Add them to a "
                "block, or freeze them with requires_grad_(False) to leave them out."
            )
        return cls({block: tuple(names) for block, names in spec.items()})

    def __getitem__(self, block: str) -> tuple[str, ...]:
        return self.parameters[block]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)
