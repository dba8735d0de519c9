"""Every solver with every source it can take, every block structure, mode and dtype, on every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import influence_framework as inf
from tests import reference, table
from tests.fits import STRUCTURES
from tests.reference import assert_close

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FEW, MANY = 3, 6


@pytest.mark.parametrize("source", reference.CURVATURES)
@pytest.mark.parametrize("net", table.NETS)
def test_the_table_is_hard_enough(net: str, source: str) -> None:
    values = torch.linalg.eigvalsh(table.dense(net, source))
    assert values[-1] >= 10 * table.STRENGTH
    assert values[-1] >= 4 * max(method.strength for method in table.METHODS.values())
    assert values[0] > -0.9 * table.STRENGTH


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("net", table.NETS)
@pytest.mark.parametrize(
    ("method", "source", "device"),
    [
        (name, source, device)
        for name, method in table.METHODS.items()
        for source in method.sources
        for device in DEVICES
        if device in method.devices
    ],
)
def test_scores_equal_the_dense_inverse(
    method: str, source: str, net: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = table.METHODS[method]
    # Convolutions of single precision are of less by default on GPUs.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    instance = table.instance(net).to(dtype, device)
    names = list(reference.trainable(instance.model))

    def on_device(n: int, seed: int) -> tuple[Any, torch.Tensor]:
        x, y = table.points(net, n, seed)
        return x.to(device, dtype if x.is_floating_point() else None), y.to(device)

    test, train = on_device(FEW, 1), on_device(MANY, 2)
    for structure in ("full", "per_layer", "per_parameter", "interleaved"):
        given, listed = STRUCTURES[structure]
        influence = inf.compose(
            instance.model,
            instance.loss,
            solver=chosen.solver(dtype),
            source=source,
            blocks=given(names),
            hessian_regularization=chosen.strength,
        ).fit(instance.data)
        inverse = table.inverse(net, source, listed(names), chosen)
        g_test, g_train = table.gradients(net, FEW, 1), table.gradients(net, MANY, 2)
        expected = {"up": reference.up_scores(inverse, g_test, g_train)}
        if test[0].is_floating_point():
            mixed = table.mixed(net, MANY, 2)
            expected["perturbation"] = reference.perturbation_scores(inverse, g_test, mixed)
        else:
            with pytest.raises(inf.InvalidInputError, match="floating-point"):
                influence.influences(*test, *train, mode="perturbation")
        factors = influence.influence_factors_by_block(*test)
        for mode, scores in expected.items():
            parts = influence.influences_from_factors_by_block(factors, *train, mode)
            total = torch.stack(list(parts.values())).sum(0)
            assert_close(total, scores, chosen.tolerance[dtype], f"{mode}, {structure}")
            if structure == "full" and method != "lissa":
                assert_close(influence.influences(*test, *train, mode), scores, chosen.tolerance[dtype])
