"""How good dictionaries are: fit, loss, concepts, hierarchies, costs."""

from gemmascope_plugin.measures.absorption import probe_absorption
from gemmascope_plugin.measures.adaptivity import Adaptivity, adaptivity
from gemmascope_plugin.measures.compare import compare, plot_comparison
from gemmascope_plugin.measures.concepts import concept_scores, concept_scores_of
from gemmascope_plugin.measures.cost import Cost, cost
from gemmascope_plugin.measures.forest import edge_frame, mcs_parents
from gemmascope_plugin.measures.forest_scores import (
    Recovery,
    chance_recovery,
    concept_order,
    sibling_overlap,
    tree_recovery,
)
from gemmascope_plugin.measures.hierarchy import hierarchy
from gemmascope_plugin.measures.measure import measure
from gemmascope_plugin.measures.measure_results import Hierarchy, Measures
from gemmascope_plugin.measures.probe import probe_edges

__all__ = [
    "Adaptivity",
    "Cost",
    "Hierarchy",
    "Measures",
    "Recovery",
    "adaptivity",
    "chance_recovery",
    "compare",
    "concept_order",
    "concept_scores",
    "concept_scores_of",
    "cost",
    "edge_frame",
    "hierarchy",
    "mcs_parents",
    "measure",
    "plot_comparison",
    "probe_absorption",
    "probe_edges",
    "sibling_overlap",
    "tree_recovery",
]
