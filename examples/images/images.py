"""Why was this digit misread? The training pictures that helped and harmed one prediction, and a test of it.

A net learns 8 by 8 pictures of digits, of which some have wrong labels. The test picture with the largest loss
is shown beside the training pictures that helped and harmed it most. Then the net is trained again without the
most harmful ones, and, to compare, without as many at random. Run it with::

    python examples/images/images.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import influence_framework as inf

SHADES = " .:oO@"


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        picture: The test picture, its label and what it was read as.
        helpful: The most helpful training pictures with their labels and scores, the best first.
        harmful: The most harmful ones, the worst first.
        wrong: How many of ``harmful`` have a wrong label.
        losses: Of the test picture: as trained, without the harmful ones, and the mean without random ones.
    """

    picture: tuple[Tensor, int, int]
    helpful: list[tuple[Tensor, int, float]]
    harmful: list[tuple[Tensor, int, float]]
    wrong: int
    losses: tuple[float, float, float]


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """A net, from the same initial parameters each time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def run(*, training: int = 1200, flipped: float = 0.05, epochs: int = 30, count: int = 20) -> Result:
    """Find the pictures, and train again without ``count`` of them."""
    pictures, labels = load_digits(return_X_y=True)
    pictures, labels = torch.tensor(pictures / 16, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    x, y, truth = pictures[:training], labels[:training].clone(), labels[:training]
    x_test, y_test = pictures[training:], labels[training:]
    wrong = torch.randperm(training, generator=generator)[: round(flipped * training)]
    y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10

    net = trained(x, y, epochs)
    losses = nn.functional.cross_entropy(net(x_test), y_test, reduction="none").detach()
    which = int(losses.argmax())
    picture, label = x_test[[which]], y_test[[which]]

    solver = {"name": "cg", "rtol": 1e-4, "preconditioner": {"name": "nystroem", "rank": 100}}
    model = inf.compose(net, nn.CrossEntropyLoss(), solver=solver, hessian_regularization=1e-2)
    scores = model.fit([(x, y)]).influences(picture, label, x, y)[0]
    order = scores.argsort()

    def without(removed: Tensor) -> float:
        kept = torch.ones(training, dtype=torch.bool)
        kept[removed] = False
        return nn.functional.cross_entropy(trained(x[kept], y[kept], epochs)(picture), label).item()

    chance = [without(torch.randperm(training, generator=generator)[:count]) for _ in range(3)]
    return Result(
        (picture[0], int(label), int(net(picture).argmax())),
        [(x[i], int(y[i]), float(scores[i])) for i in order.flip(0)[:count]],
        [(x[i], int(y[i]), float(scores[i])) for i in order[:count]],
        int((y != truth)[order[:count]].sum()),
        (float(losses[which]), without(order[:count]), sum(chance) / 3),
    )


def drawn(pictures: Sequence[tuple[Tensor, str]]) -> str:
    """Pictures of 64 pixels side by side, each with a line of text below."""
    rows = [
        "   ".join("".join(SHADES[int(5 * value)] * 2 for value in one.view(8, 8)[row]) for one, _ in pictures)
        for row in range(8)
    ]
    return "\n".join([*rows, "   ".join(text.center(16) for _, text in pictures)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The training pictures behind one misread digit.")
    parser.add_argument("--epochs", type=int, default=30)
    result = run(epochs=parser.parse_args().epochs)
    picture, label, read = result.picture
    print(drawn([(picture, f"a {label}, read as {read}")]))
    for title, found in (("helped", result.helpful), ("harmed", result.harmful)):
        print(f"\nIt {title} most:\n")
        print(drawn([(one, f"{said}  ({score:+.0f})") for one, said, score in found[:4]]))
    before, after, chance = result.losses
    print(f"\n{result.wrong} of the {len(result.harmful)} most harmful pictures have a wrong label.")
    print(f"Loss of the digit: {before:.2f}; trained without them {after:.2f}, without others {chance:.2f}.")
