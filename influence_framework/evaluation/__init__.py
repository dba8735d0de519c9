"""Do scores predict retraining? True effects of training points, and how well scores foretell them."""

from influence_framework.evaluation.datamodels import (
    LinearDatamodelingScore,
    SubsetLosses,
    linear_datamodeling_score,
    retrain_on_subsets,
)
from influence_framework.evaluation.labels import DetectionCurve, detection_curve, mislabel_detection
from influence_framework.evaluation.one_out import Agreement, LeaveOneOut, leave_one_out
from influence_framework.evaluation.recipes import ConvexFit, GradientDescent, Recipe, StackedRecipe
from influence_framework.evaluation.removals import (
    Brittleness,
    RemovalCurve,
    brittleness,
    subset_removal,
)
from influence_framework.evaluation.statistics import Estimate

__all__ = [
    "Agreement",
    "Brittleness",
    "ConvexFit",
    "DetectionCurve",
    "Estimate",
    "GradientDescent",
    "LeaveOneOut",
    "LinearDatamodelingScore",
    "Recipe",
    "RemovalCurve",
    "StackedRecipe",
    "SubsetLosses",
    "brittleness",
    "detection_curve",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_detection",
    "retrain_on_subsets",
    "subset_removal",
]
