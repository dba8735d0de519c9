"""Dense float64 references, from plain autograd loops over single samples.

Nothing here uses the package under test: every matrix is written down from its definition, one sample,
one output and one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor, Tensor], Tensor]
Sample = tuple[Any, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a tied one appears once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in trainable(model).values())


def part(inputs: Any, index: int | slice) -> Any:
    """The samples at ``index`` of a tensor, a tuple or a mapping of tensors, still as a batch."""
    index = slice(index, index + 1) if isinstance(index, int) else index
    if isinstance(inputs, Mapping):
        return {key: part(value, index) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(part(value, index) for value in inputs)
    return inputs[index]


def count(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        return count(next(iter(inputs.values())))
    return count(inputs[0]) if isinstance(inputs, tuple) else len(inputs)


def samples(data: Iterable[Sample]) -> Iterator[Sample]:
    """Single samples, each as a batch of one."""
    for x, y in data:
        for index in range(count(x)):
            yield part(x, index), y[index : index + 1]


def forward(model: nn.Module, x: Any) -> Tensor:
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(x, Mapping):
            return model(**x)
        return model(*x) if isinstance(x, tuple) else model(x)


def _derivatives(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """Flat gradient of one number; zeros where it does not depend on an input."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in inputs])
    parts = torch.autograd.grad(value, inputs, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
            for p, g in zip(inputs, parts, strict=True)
        ]
    )


def gradient(model: nn.Module, loss: Loss, sample: Sample, *, create_graph: bool = False) -> Tensor:
    """``∇ℓ`` of one sample, ``(P,)``."""
    x, y = sample
    parameters = list(trainable(model).values())
    return _derivatives(loss(forward(model, x), y), parameters, create_graph=create_graph)


def gradients(model: nn.Module, loss: Loss, data: Iterable[Sample]) -> Tensor:
    """``(n, P)``."""
    return torch.stack([gradient(model, loss, sample) for sample in samples(data)])


def hessian(model: nn.Module, loss: Loss, data: Iterable[Sample]) -> Tensor:
    """``1/N Σ_i ∇²ℓ_i``."""
    parameters = list(trainable(model).values())
    each = [gradient(model, loss, sample, create_graph=True) for sample in samples(data)]
    mean = torch.stack(each).mean(0)
    return torch.stack([_derivatives(entry, parameters) for entry in mean])


def gauss_newton(model: nn.Module, loss: Loss, data: Iterable[Sample]) -> Tensor:
    """``1/N Σ_i J_iᵀ H_i J_i``, with ``H_i`` the Hessian of the loss with respect to the output."""
    parameters = list(trainable(model).values())
    total, number = torch.zeros(()), 0
    for x, y in samples(data):
        output = forward(model, x)
        jacobian = torch.stack([_derivatives(entry, parameters) for entry in output.reshape(-1)])
        leaf = output.detach().requires_grad_()
        first = _derivatives(loss(leaf, y), [leaf], create_graph=True)
        second = torch.stack([_derivatives(entry, [leaf]) for entry in first])
        total = total + jacobian.T @ second @ jacobian
        number += 1
    return total / number


def empirical_fisher(model: nn.Module, loss: Loss, data: Iterable[Sample]) -> Tensor:
    """``1/N Σ_i g_i g_iᵀ``."""
    rows = gradients(model, loss, data)
    return rows.T @ rows / len(rows)


CURVATURES: dict[str, Callable[[nn.Module, Loss, Iterable[Sample]], Tensor]] = {
    "hessian": hessian,
    "gauss_newton": gauss_newton,
    "empirical_fisher": empirical_fisher,
}


def mixed_derivatives(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """``∇ₓ∇_θ ℓ`` of every sample, ``(n, P, *features)``."""
    rows = []
    for index in range(len(x)):
        leaf = x[index : index + 1].clone().requires_grad_()
        flat = gradient(model, loss, (leaf, y[index : index + 1]), create_graph=True)
        rows.append(torch.stack([_derivatives(entry, [leaf]).reshape(x.shape[1:]) for entry in flat]))
    return torch.stack(rows)


def positions(model: nn.Module, names: Iterable[str]) -> Tensor:
    """Where the elements of these parameters stand in the flat vector, in the order of ``names``."""
    spans, start = {}, 0
    for name, parameter in trainable(model).items():
        spans[name] = torch.arange(start, start + parameter.numel())
        start += parameter.numel()
    return torch.cat([spans[name] for name in names])


def block_inverse(
    model: nn.Module, curvature: Tensor, blocks: Mapping[str, Sequence[str]], strengths: Mapping[str, float]
) -> dict[str, Tensor]:
    """For each block ``(C + λI)⁻¹`` over its own parameters, as a ``(P, P)`` matrix, zero elsewhere."""
    inverses = {}
    for name, parameters in blocks.items():
        own = positions(model, parameters)
        damped = curvature[own][:, own] + strengths[name] * torch.eye(len(own), dtype=curvature.dtype)
        whole = torch.zeros_like(curvature)
        whole[own[:, None], own] = torch.linalg.inv(damped)
        inverses[name] = whole
    return inverses


def up_scores(inverse: Tensor, test: Tensor, train: Tensor) -> Tensor:
    """``(n_test, n_train)`` from gradients ``(n, P)``."""
    return test @ inverse @ train.T


def perturbation_scores(inverse: Tensor, test: Tensor, mixed: Tensor) -> Tensor:
    """``(n_test, n_train, *features)`` from gradients and mixed derivatives."""
    return torch.tensordot(test @ inverse, mixed, dims=([1], [1]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry expected; absolute where all of these are zero."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    return error / scale if scale else error


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Compare by the largest entry, and say what differs most."""
    actual = actual.detach().cpu().double()
    expected = expected.detach().cpu().double()
    error = relative_error(actual, expected)
    if not error <= tolerance:
        worst = (actual - expected).abs().flatten().argmax().item()
        raise AssertionError(
            f"{what or 'result'}: relative error {error:.3e} > {tolerance:.1e}; largest at flat index {worst}: "
            f"{actual.flatten()[worst]:.12g}, expected {expected.flatten()[worst]:.12g}"
        )
