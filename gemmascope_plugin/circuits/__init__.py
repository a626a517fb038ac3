"""Circuits: discover, select, ablate, evaluate."""

from gemmascope_plugin.circuits.discover import discover, discover_levels
from gemmascope_plugin.circuits.errors_compared import FeatureScores, evaluate_features
from gemmascope_plugin.circuits.evaluate import evaluate, evaluate_ranking
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.circuits.stability import stability

__all__ = [
    "FeatureScores",
    "Scores",
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
