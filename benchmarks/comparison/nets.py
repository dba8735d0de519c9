"""The nets that are compared on, in plain torch: every library's environment builds them from their names."""

from __future__ import annotations

from torch import nn


def logistic(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def cnn(side: int, channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, side)),
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * (side // 4) ** 2, outputs),
    )


NETS = {"logistic": logistic, "mlp": mlp, "cnn": cnn}


def build(description: dict[str, object]) -> nn.Sequential:
    """The net that ``{"name": ..., "sizes": [...]}`` describes, with random parameters."""
    make, sizes = NETS[str(description["name"])], description["sizes"]
    net: nn.Sequential = make(*sizes)  # type: ignore[operator,misc]
    return net
