"""Pure data: circuits and attribution graphs, their files, JSON, influence, sums and groups."""

from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.graphs.contrast import contrast
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.node import Node, Reader
from gemmascope_plugin.graphs.supernode_groups import Supernodes
from gemmascope_plugin.graphs.union import union

__all__ = [
    "Circuit",
    "Graph",
    "Node",
    "Reader",
    "Supernodes",
    "contrast",
    "union",
]
