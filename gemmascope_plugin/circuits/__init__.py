"""Circuits: discover, keep, evaluate."""

from gemmascope_plugin.circuits.circuit import Circuit
from gemmascope_plugin.circuits.discover import discover
from gemmascope_plugin.circuits.evaluate import evaluate
from gemmascope_plugin.circuits.node import Node
from gemmascope_plugin.circuits.scores import Scores

__all__ = ["Circuit", "Node", "Scores", "discover", "evaluate"]
