"""Circuits: discover, select, prune, keep, evaluate."""

from gemmascope_plugin.circuits.circuit import Circuit
from gemmascope_plugin.circuits.discover import discover
from gemmascope_plugin.circuits.evaluate import evaluate, evaluate_ranking
from gemmascope_plugin.circuits.graph import Graph
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.circuits.select import greedy, threshold, top_n
from gemmascope_plugin.patching.node import Node

__all__ = [
    "Circuit",
    "Graph",
    "Node",
    "Scores",
    "discover",
    "evaluate",
    "evaluate_ranking",
    "greedy",
    "threshold",
    "top_n",
]
