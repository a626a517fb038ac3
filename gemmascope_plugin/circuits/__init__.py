"""Circuits: discover, select, ablate, evaluate."""

from gemmascope_plugin.circuits.discover import discover, discover_levels
from gemmascope_plugin.circuits.evaluate import evaluate, evaluate_features
from gemmascope_plugin.circuits.mib import MibScores, evaluate_ranking
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.circuits.stability import bootstrap_stability, stability

__all__ = [
    "MibScores",
    "Scores",
    "bootstrap_stability",
    "discover",
    "discover_levels",
    "evaluate",
    "evaluate_features",
    "evaluate_ranking",
    "greedy",
    "stability",
    "threshold",
    "top_n",
]
