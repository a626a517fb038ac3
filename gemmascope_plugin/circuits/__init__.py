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
from gemmascope_plugin.circuits.graph import Graph
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.circuits.tracing.attribution_graph import AttributionGraph
from gemmascope_plugin.circuits.tracing.trace import trace
from gemmascope_plugin.patching.node import Node

__all__ = [
    "AttributionGraph",
    "Circuit",
    "FeatureTarget",
    "Graph",
    "Logit",
    "LogitDifference",
    "Node",
    "Scores",
    "StreamDirection",
    "discover",
    "evaluate",
    "evaluate_ranking",
    "greedy",
    "threshold",
    "top_n",
    "trace",
]
