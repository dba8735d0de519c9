"""Wrong labels in the training data of a convolutional net: found, deleted, trained again.

A tenth of the labels of small pictures of digits is made wrong. Kronecker factors of all layers give the
influence of every training picture on itself and on the test loss. Both rank the pictures by suspicion, beside
the training loss, which needs no influence. Then the most suspicious tenth is deleted and the net is trained
again. Run it with::

    python examples/convolution/convolution.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf
from influence_framework import evaluation


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        found: For every ranking, which share of the wrong labels is in its first tenth.
        auroc: For every ranking, the probability that a wrong label is ranked before a right one.
        accuracy: On the test data: as trained, and by the name of every ranking, without its first tenth.
    """

    found: dict[str, float]
    auroc: dict[str, float]
    accuracy: dict[str, float]


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The net, from the same initial parameters each time."""
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def run(*, training: int = 1200, share: float = 0.1, epochs: int = 15) -> Result:
    """Flip labels, find them, and train again without what is found."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = torch.tensor(pictures / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    x, y = pictures[:training], labels[:training].clone()
    x_test, y_test = pictures[training:], labels[training:]
    count = round(share * training)
    flipped = torch.randperm(training, generator=generator)[:count]
    y[flipped] = (y[flipped] + torch.randint(1, 10, flipped.shape, generator=generator)) % 10
    wrong = torch.zeros(training, dtype=torch.bool)
    wrong[flipped] = True

    net, loss = trained(x, y, epochs), nn.CrossEntropyLoss()
    model = inf.compose(
        net,
        loss,
        solver="ekfac",
        blocks="per_layer",
        hessian_regularization=inf.RelativeRegularization(0.1),
    )
    model.fit(DataLoader(TensorDataset(x, y), batch_size=256))
    suspicion = {
        "influence on itself": model.self_influences(x, y),
        "influence on the test loss": -model.influences(x_test, y_test, x, y).mean(0),
    }
    curves = evaluation.mislabel_detection(net, loss, x, y, wrong, suspicion)
    suspicion["loss"] = nn.functional.cross_entropy(net(x), y, reduction="none").detach()

    def accuracy(trained_net: nn.Module) -> float:
        return float((trained_net(x_test).argmax(1) == y_test).float().mean())

    found, accuracies = {}, {"as trained": accuracy(net)}
    for name, values in suspicion.items():
        order = values.argsort(descending=True)
        found[name] = float(wrong[order[:count]].float().mean())
        accuracies[name] = accuracy(trained(x[order[count:]], y[order[count:]], epochs))
    return Result(found, {name: curve.auroc.value for name, curve in curves.items()}, accuracies)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Wrong labels found in the data of a convolutional net.")
    parser.add_argument("--epochs", type=int, default=15)
    result = run(epochs=parser.parse_args().epochs)
    print(f"{'ranking':28} found in the first tenth   AUROC   test accuracy without it")
    for name, share in result.found.items():
        print(f"{name:28} {share:>24.0%}   {result.auroc[name]:.3f}   {result.accuracy[name]:.1%}")
    print(f"{'as trained':28} {'':>24}           {result.accuracy['as trained']:.1%}")
