"""Which training points pushed a PyTorch model towards or away from a prediction.

Methods are composed by name::

    import influence_framework as inf

    model = inf.compose(net, loss, solver="cg", source="gauss_newton", hessian_regularization=1e-2)
    model.fit(train_loader)
    scores = model.influences(x_test, y_test, x_train, y_train)    # (n_test, n_train)

A positive score means that up-weighting the training point lowers the test loss; removing it from n
training points changes the test loss by about +score/n.
"""

from influence_framework import evaluation
from influence_framework.advice import Advice, Budget, Candidate, Prediction, advise
from influence_framework.attribution import Output, Scored, attribute
from influence_framework.bounds import BoundedScores
from influence_framework.bridges import from_scipy, to_scipy
from influence_framework.compose import compose
from influence_framework.costs import Cost, Costed, Fidelity, Work, Workload
from influence_framework.ensembles import EnsembleModel, ensemble
from influence_framework.errors import (
    ConvergenceError,
    ConvergenceWarning,
    DistributedError,
    IndefiniteOperatorWarning,
    InfluenceError,
    InvalidInputError,
    MissingCapabilityError,
    NonFiniteError,
    NotFittedError,
    OutOfMemoryError,
    PluginConflictError,
    PluginError,
    PreflightWarning,
    SingularOperatorError,
    SmallerBatchWarning,
    UnknownMethodError,
    UnknownOptionError,
)
from influence_framework.hookspecs import API_VERSION as PLUGIN_API_VERSION
from influence_framework.hookspecs import hookimpl
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.layers import MatrixForm, UnsupportedLayerError, register_layer
from influence_framework.lowrank import LowRankInverse
from influence_framework.objective import (
    Checking,
    Masking,
    Objective,
    Pointing,
    Preparing,
    SoftmaxLosses,
    SupervisedObjective,
    TokenLosses,
)
from influence_framework.objectives import CausalLM, MaskedLM, Seq2SeqLM, SequenceClassification
from influence_framework.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    Operator,
)
from influence_framework.parameters import Blocks, ParameterSpace
from influence_framework.persistence.restoring import load
from influence_framework.planning import Plan, plan
from influence_framework.preflight import BlockPreflight, Preflight
from influence_framework.problem import Problem
from influence_framework.protocols import (
    Dense,
    Diagonal,
    Executor,
    HessianSource,
    InfluenceFunctionModel,
    InfluenceMode,
    InverseOperator,
    JointSolver,
    JointTrace,
    LayerScoring,
    LayerStatistics,
    LeadingRows,
    LinearOperator,
    Minibatches,
    Needs,
    Persistent,
    Planning,
    Preconditioning,
    Reregularizable,
    Restoring,
    SavedState,
    Solution,
    Solver,
    StopReason,
    Sweepable,
    Trace,
    WarmStart,
    Weighing,
)
from influence_framework.query_factors import QueryFactors
from influence_framework.refinement import RefinedSolver
from influence_framework.registry import (
    Registry,
    default_registry,
    executors,
    hessian_sources,
    objectives,
    solvers,
)
from influence_framework.regularization import RelativeRegularization
from influence_framework.reporting import report
from influence_framework.reports import BlockReport, BlockTotals, SolveReport
from influence_framework.rows import RootRows

__all__ = [
    "PLUGIN_API_VERSION",
    "Advice",
    "BlockDiagonalOperator",
    "BlockPreflight",
    "BlockReport",
    "BlockTotals",
    "Blocks",
    "BoundedScores",
    "Budget",
    "Candidate",
    "CausalLM",
    "Checking",
    "ConvergenceError",
    "ConvergenceWarning",
    "Cost",
    "Costed",
    "Dense",
    "DenseOperator",
    "Diagonal",
    "DistributedError",
    "EnsembleModel",
    "Executor",
    "Fidelity",
    "HessianSource",
    "IndefiniteOperatorWarning",
    "InfluenceError",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InvalidInputError",
    "InverseOperator",
    "JointSolver",
    "JointTrace",
    "LayerScoring",
    "LayerStatistics",
    "LeadingRows",
    "LinearOperator",
    "LowRankInverse",
    "MaskedLM",
    "Masking",
    "MatrixForm",
    "Minibatches",
    "MissingCapabilityError",
    "Needs",
    "NonFiniteError",
    "NotFittedError",
    "Objective",
    "Operator",
    "OutOfMemoryError",
    "Output",
    "ParameterSpace",
    "Persistent",
    "Plan",
    "Planning",
    "PluginConflictError",
    "PluginError",
    "Pointing",
    "Preconditioning",
    "Prediction",
    "Preflight",
    "PreflightWarning",
    "Preparing",
    "Problem",
    "QueryFactors",
    "RefinedSolver",
    "Registry",
    "RelativeRegularization",
    "Reregularizable",
    "Restoring",
    "RootRows",
    "SavedState",
    "Scored",
    "Seq2SeqLM",
    "SequenceClassification",
    "SingularOperatorError",
    "SmallerBatchWarning",
    "SoftmaxLosses",
    "Solution",
    "SolveReport",
    "Solver",
    "StopReason",
    "SupervisedObjective",
    "Sweepable",
    "TokenLosses",
    "TorchInfluenceFunctionModel",
    "Trace",
    "UnknownMethodError",
    "UnknownOptionError",
    "UnsupportedLayerError",
    "WarmStart",
    "Weighing",
    "Work",
    "Workload",
    "advise",
    "attribute",
    "compose",
    "default_registry",
    "ensemble",
    "evaluation",
    "executors",
    "from_scipy",
    "hessian_sources",
    "hookimpl",
    "load",
    "objectives",
    "plan",
    "register_layer",
    "report",
    "solvers",
    "to_scipy",
]
