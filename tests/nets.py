"""Small networks with the structures that break influence code."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def frozen(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


class Tied(nn.Module):
    """One Parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


class Reused(nn.Module):
    """One module used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))
        return result


class Root(nn.Module):
    """Parameters on the model itself, one of them 0-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.scale)) / self.temperature


class Unused(nn.Module):
    """A parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.randn(2))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x)
        return result


class Positional(nn.Module):
    """Two inputs, given as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sin(self.left(a)) * self.right(b)


class Keyword(Positional):
    """Two inputs, given as a mapping."""

    def forward(self, *, wide: Tensor, narrow: Tensor) -> Tensor:
        return super().forward(wide, narrow)


class TokenMean(nn.Module):
    """Integer tokens, of any sequence length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.embedding(tokens)).mean(1))
        return result


class Recurrent(nn.Module):
    """A recurrent layer, which keeps a list of its weights beside the named ones."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.cell(x)[0][:, -1])
        return result


class Transformer(nn.Module):
    """Layer norms, dropout and self-attention by a fused kernel over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(3, 1, 2, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(x).mean(1))
        return result


def conv_net() -> nn.Sequential:
    """For ``(n, 1, 4, 4)``."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(8, 3))


def batch_norm_net() -> nn.Sequential:
    """With running statistics that are not the initial ones."""
    norm = nn.BatchNorm1d(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(nn.Linear(3, 3), norm, nn.Tanh(), nn.Linear(3, 2))
