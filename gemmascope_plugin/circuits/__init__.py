"""Circuits: discover, trace, select, prune, keep, evaluate."""

from gemmascope_plugin.attribution.adjoint.targets import (
    FeatureTarget,
    Logit,
    LogitDifference,
    StreamDirection,
)
from gemmascope_plugin.circuits.circuit import Circuit
from gemmascope_plugin.circuits.discover import discover
from gemmascope_plugin.circuits.evaluate import evaluate, evaluate_ranking
from gemmascope_plugin.circuits.feature_circuits.discover import discover_features
from gemmascope_plugin.circuits.feature_circuits.errors_compared import (
    FeatureScores,
    evaluate_features,
)
from gemmascope_plugin.circuits.feature_circuits.levels import discover_levels
from gemmascope_plugin.circuits.feature_circuits.stability import stability
from gemmascope_plugin.circuits.graph import Graph
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.circuits.tracing.ablation_check import AblationCheck, check_by_ablation
from gemmascope_plugin.circuits.tracing.attribution_graph import AttributionGraph
from gemmascope_plugin.circuits.tracing.contrast import contrast
from gemmascope_plugin.circuits.tracing.head_loadings import HeadLoadings, head_loadings
from gemmascope_plugin.circuits.tracing.intervention import Intervention, intervene
from gemmascope_plugin.circuits.tracing.qk_attribution import QkAttribution, qk_attribution
from gemmascope_plugin.circuits.tracing.supernode_groups import Supernodes
from gemmascope_plugin.circuits.tracing.supernodes import supernodes
from gemmascope_plugin.circuits.tracing.trace import trace
from gemmascope_plugin.circuits.tracing.union import union
from gemmascope_plugin.patching.node import Node

__all__ = [
    "AblationCheck",
    "AttributionGraph",
    "Circuit",
    "FeatureScores",
    "FeatureTarget",
    "Graph",
    "HeadLoadings",
    "Intervention",
    "Logit",
    "LogitDifference",
    "Node",
    "QkAttribution",
    "Scores",
    "StreamDirection",
    "Supernodes",
    "check_by_ablation",
    "contrast",
    "discover",
    "discover_features",
    "discover_levels",
    "evaluate",
    "evaluate_features",
    "evaluate_ranking",
    "greedy",
    "head_loadings",
    "intervene",
    "qk_attribution",
    "stability",
    "supernodes",
    "threshold",
    "top_n",
    "trace",
    "union",
]
