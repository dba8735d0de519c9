"""What the demonstration prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from influence_framework.cli.demo import CLASSES, FRACTIONS, HIDDEN, PIXELS, Result, accuracy, top


def report(result: Result) -> str:
    """What is printed: data, net, composition, and what each ranking finds."""
    data, flipped = result.data, result.data.flipped
    count, wrong = len(data.y), int(flipped.sum())
    sizes = [top(count, fraction) for fraction in FRACTIONS]
    rows = [["ranked by", *(f"top {fraction:.0%}" for fraction in FRACTIONS), "retrained"]]
    rows.append(["", *(f"({size})" for size in sizes), "test loss"])
    for ranking in result.rankings:
        found = (str(ranking.found(flipped, fraction)) for fraction in FRACTIONS)
        rows.append([ranking.name, *found, f"{ranking.loss_without:.3f}"])
    expected = (f"{wrong * size / count:.1f}" for size in sizes)
    rows.append([result.chance.name, *expected, f"{result.chance.loss_without:.3f}"])
    return "\n".join(
        [
            f"Data       {count} training images, {wrong} with a flipped label; {len(data.y_test)} test images",
            f"Net        {PIXELS}-{HIDDEN}-{CLASSES}, {result.parameters} parameters; accuracy "
            f"{accuracy(result.net, data.x_test, data.y_test):.1%}, test loss {result.test_loss:.3f}",
            f"Influence  {composition_text(result)}",
            "",
            f"Flipped labels (of {wrong}) among the most suspicious training images, and the test loss of a",
            f"net trained again without the top {FRACTIONS[0]:.0%}:",
            "",
            *("  " + name.ljust(28) + "".join(cell.rjust(12) for cell in cells) for name, *cells in rows),
            "",
            "The influence on the test loss has seen the test labels; the other rankings have not.",
            "A positive score helps: removing training image j of n changes the test loss by about +score/n.",
        ]
    )


def composition_text(result: Result) -> str:
    """The composition in one line, as solver(options), source(options) and λ."""

    def method(spec: Mapping[str, Any]) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in spec.items() if key != "name")
        return f"{spec['name']}({options})" if options else str(spec["name"])

    solver, source = result.composition["solver"], result.composition["source"]
    strength = result.composition["hessian_regularization"]
    return f"solver {method(solver)}, source {method(source)}, λ = {strength:g}"
