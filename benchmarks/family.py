"""The solvers ``arnoldi``, ``lissa`` and ``nystroem`` against pydvl, and what Nyström does for ``cg``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import problems
from common import HEADER, loosest, quickest, row
from pydvl.influence.torch import ArnoldiInfluence, LissaInfluence, NystroemSketchInfluence, SecondOrderMode
from timing import paired
from torch import Tensor, nn

import influence_framework as inf

RANK = 50
LISSA_RESIDUAL = 5e-2
CG_RESIDUAL = 1e-5
LEADING = 700
"""Rows of a square root of the curvature that the second sketch for ``cg`` is made of."""


class Setting:
    """A trained net, its data, and models composed for it."""

    def __init__(self, data: problems.Digits, net: nn.Sequential) -> None:
        self.data, self.net = data, net

    def compose(self, strength: float, batch_size: int, source: str, **solver: Any) -> Any:
        return inf.compose(
            self.net,
            problems.LOSS,
            solver=solver,
            source={"name": source, "precompute_grad": True},
            hessian_regularization=strength,
        ).fit(self.data.loader(batch_size))

    def scores(self, make: Callable[[], Any]) -> Callable[[], Tensor]:
        data = self.data

        def work() -> Tensor:
            return make().influences(data.x_test, data.y_test, data.x, data.y)

        return work

    def by_batch(self, make: Callable[[int], Any]) -> Callable[[int], Callable[[], Tensor]]:
        return lambda size: self.scores(lambda: make(size))


def arnoldi(setting: Setting, strength: float, runs: int) -> str:
    """Rank 50, tol 1e-4; the scores of both on the span of the eigenvectors alone."""
    net, data = setting.net, setting.data

    def ours(batch_size: int) -> Any:
        return setting.compose(
            strength, batch_size, "hessian", name="arnoldi", rank=RANK, tol=1e-4, complement=False
        )

    def peer(batch_size: int) -> Any:
        model = ArnoldiInfluence(net, problems.LOSS, regularization=strength, rank=RANK, tol=1e-4)
        return model.fit(data.loader(batch_size))

    mine, theirs = quickest(setting.by_batch(ours)), quickest(setting.by_batch(peer))
    pairing = paired(setting.by_batch(ours)(mine), setting.by_batch(peer)(theirs), runs)
    inverse = ours(mine).inverses["full"]
    low_rank = next(iter(peer(theirs).block_mapper.composable_block_dict.values())).op._low_rank_representation
    values = low_rank.eigen_vals.double().sort().values
    off = float(((inverse.values.sort().values - values) / values).abs().max())
    what = f"`arnoldi`, Hessian, rank {RANK}, tol 1e-4, λ = {strength:.2g}"
    return row(what, pairing, f"batch {mine}", f"batch {theirs}; eigenvalues differ by {off:.0e} at most")


def lissa(setting: Setting, judge: problems.Judge, strength: float, runs: int) -> str:
    """Both to the same true residual: ours by its tolerance, pydvl by the number of iterations."""
    net, data = setting.net, setting.data

    def ours(tolerance: float) -> Any:
        options = {"scale": "auto", "rtol": tolerance, "maxiter": 3000}
        return setting.compose(strength, 64, "hessian", name="lissa", **options)

    def peer(iterations: float) -> Any:
        model = LissaInfluence(
            net,
            problems.LOSS,
            regularization=strength,
            maxiter=int(iterations),
            scale=1.15,
            rtol=1e-12,
        )
        return model.fit(data.loader(1500))

    labels, works = [], []
    for make, candidates in (
        (ours, (LISSA_RESIDUAL,)),
        (peer, (80.0, 120.0, 160.0, 200.0, 240.0, 320.0)),
    ):
        chosen = loosest(
            candidates,
            lambda value, make=make: make(value).influence_factors(data.x_test, data.y_test),
            lambda factors: judge.residual(factors, strength),
            LISSA_RESIDUAL,
        )
        if chosen is None:
            raise SystemExit(f"LiSSA reaches no true residual of {LISSA_RESIDUAL}.")
        labels.append(f"{chosen[0]:g}, residual {chosen[1]:.0e}")
        works.append(setting.scores(lambda make=make, value=chosen[0]: make(value)))
    pairing = paired(works[0], works[1], runs)
    what = f"`lissa`, Hessian, true residual ≤ {LISSA_RESIDUAL:g}, λ = {strength:.2g}"
    return row(
        what, pairing, f"batch 64, rtol {labels[0]}", f"full batches, scale 1.15, iterations {labels[1]}"
    )


def nystroem(setting: Setting, strength: float, runs: int, source: str) -> str:
    """Rank 50; both sketch by one product with 50 random vectors. Ours looks for negative curvature too."""
    net, data = setting.net, setting.data
    mode = {"hessian": SecondOrderMode.HESSIAN, "gauss_newton": SecondOrderMode.GAUSS_NEWTON}[source]

    def ours(batch_size: int) -> Any:
        return setting.compose(strength, batch_size, source, name="nystroem", rank=RANK, oversampling=0)

    def peer(batch_size: int) -> Any:
        model = NystroemSketchInfluence(net, problems.LOSS, strength, RANK, second_order_mode=mode)
        return model.fit(data.loader(batch_size))

    mine, theirs = quickest(setting.by_batch(ours)), quickest(setting.by_batch(peer))
    pairing = paired(setting.by_batch(ours)(mine), setting.by_batch(peer)(theirs), runs)
    what = f"`nystroem`, `{source}`, rank {RANK}, λ = {strength:.2g}"
    return row(what, pairing, f"batch {mine}", f"batch {theirs}")


def preconditioned(setting: Setting, judge: problems.Judge, block: bool, runs: int, **more: Any) -> str:
    """CG on Gauss-Newton with Nyström of rank 200, its fit included, against CG alone."""

    def make(preconditioner: Any) -> Any:
        options = {"rtol": 0.9 * CG_RESIDUAL, "atol": 0.0, "block": block}
        return setting.compose(1e-2, 1500, "gauss_newton", name="cg", preconditioner=preconditioner, **options)

    sketch = {"name": "nystroem", "rank": 200, **more}
    sides, works = [], []
    for preconditioner in (sketch, None):
        model = make(preconditioner)
        solution = model.inverses["full"].solve(judge.rhs.float())
        assert solution.residual.max() <= CG_RESIDUAL
        sides.append(f"{int(solution.iterations.max())} iterations, residual {solution.residual.max():.0e}")
        works.append(setting.scores(lambda preconditioner=preconditioner: make(preconditioner)))
    pairing = paired(works[0], works[1], runs)
    taken = f"{more['leading_rows']} leading rows" if more else "products"
    return row(f"`cg`, {'block' if block else 'columns'}; from {taken}", pairing, *sides)


def report(runs: int) -> Iterator[str]:
    data = problems.digits()
    net = problems.trained(data, [64, 128, 64, 10])
    judge = problems.Judge(net, data)
    lowest = abs(judge.most_negative_eigenvalue())
    setting = Setting(data, net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from (
            "## Against pydvl: fit + all pairwise scores, net 64-128-64-10",
            "",
            "Each side at the batch size at which it is quickest; both with the Hessian unless said otherwise.",
            "",
            HEADER.format(peer="pydvl"),
        )
        yield arnoldi(setting, 3 * lowest, runs)
        yield nystroem(setting, 1e-2, runs, "hessian")
        yield nystroem(setting, 1e-2, runs, "gauss_newton")
        yield lissa(setting, judge, 10 * lowest, min(runs, 3))
        yield from (
            "",
            "## What Nyström of rank 200 does for `cg`",
            "",
            "Gauss-Newton, λ = 0.01, all 50 true residuals ≤ 1e-5; fit of the preconditioner included.",
            "",
            HEADER.format(peer="without").replace("ours", "with Nyström"),
        )
        for block in (False, True):
            yield preconditioned(setting, judge, block, runs)
            yield preconditioned(setting, judge, block, runs, leading_rows=LEADING)
