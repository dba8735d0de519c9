"""Which patients shape a regression? Scores of a fitted scikit-learn pipeline, and refits without one row.

Ridge regression predicts the progression of diabetes. The rows that matter most for one patient are shown as a
table, and the scores of all rows are compared with what fitting again without them does. Run it with::

    python examples/tabular/tabular.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from influence_framework.ecosystem.sklearn import EstimatorInfluence


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        patient: The test row that is asked about, as a table.
        rows: The training rows that matter most for it, with their scores.
        correlation: Of ``+score/n`` with the true changes of the test losses, over all pairs.
        slope: The factor between the two, by least squares.
        refits: How many rows were left out, one at a time.
    """

    patient: pd.DataFrame
    rows: pd.DataFrame
    correlation: float
    slope: float
    refits: int


def fitted(x: pd.DataFrame, y: pd.Series) -> Pipeline:
    """The pipeline."""
    return make_pipeline(StandardScaler(), Ridge(alpha=5.0)).fit(x, y)


def run(*, refits: int = 382, shown: int = 3) -> Result:
    """Score all training rows, and fit again without each of the first ``refits``."""
    x, y = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=60, random_state=0)
    model = fitted(x_train, y_train)
    scores = EstimatorInfluence(model).fit(x_train, y_train).influences(x_test, y_test)

    errors = (model.predict(x_test) - y_test) ** 2
    patient = errors.idxmax()
    order = scores.loc[patient].sort_values()
    picked = [*order.index[-shown:][::-1], *order.index[:shown]]
    columns = ["age", "bmi", "bp", "s5"]
    rows = x_train.loc[picked, columns].assign(
        progression=y_train[picked], predicted=model.predict(x_train.loc[picked]).round(), score=order[picked]
    )

    changes = []
    for left_out in x_train.index[:refits]:
        rest = x_train.index != left_out
        changes.append((fitted(x_train[rest], y_train[rest]).predict(x_test) - y_test) ** 2 - errors)
    truth = np.array(changes).T
    foretold = scores.to_numpy()[:, :refits] / len(x_train)
    asked = x_test.loc[[patient], columns].assign(
        progression=y_test[patient], predicted=model.predict(x_test.loc[[patient]]).round()
    )
    return Result(
        asked,
        rows,
        float(np.corrcoef(foretold.ravel(), truth.ravel())[0, 1]),
        float((foretold * truth).sum() / (foretold**2).sum()),
        refits,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The rows behind the predictions of a ridge regression.")
    parser.add_argument("--refits", type=int, default=382)
    result = run(refits=parser.parse_args().refits)
    print("The patient whose progression is predicted worst:\n")
    print(result.patient.to_string())
    print("\nThe rows that helped this prediction most, then those that harmed it most:\n")
    print(result.rows.to_string(float_format="{:.1f}".format))
    print(
        f"\nOver {result.refits} fits without one row, the correlation of +score/n with the true changes of the"
    )
    print(f"losses is {result.correlation:.3f}, and the changes are {result.slope:.2f} times as large.")
