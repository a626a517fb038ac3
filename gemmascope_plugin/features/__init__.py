"""Statistics of features."""

from gemmascope_plugin.features.absorption import probe_absorption
from gemmascope_plugin.features.adaptivity import Adaptivity, adaptivity
from gemmascope_plugin.features.analyze import Features, analyze
from gemmascope_plugin.features.compare import compare, plot_comparison
from gemmascope_plugin.features.concepts import concept_scores, concept_scores_of
from gemmascope_plugin.features.cost import Cost, cost
from gemmascope_plugin.features.edge_table import edge_frame
from gemmascope_plugin.features.forest import sibling_overlap
from gemmascope_plugin.features.hierarchy import hierarchy
from gemmascope_plugin.features.hierarchy_scores import Hierarchy
from gemmascope_plugin.features.labels import best_concepts
from gemmascope_plugin.features.masked_cosine import mcs_parents
from gemmascope_plugin.features.measure import Measures, measure
from gemmascope_plugin.features.probe import probe_edges
from gemmascope_plugin.features.tree_recovery import (
    Recovery,
    chance_recovery,
    concept_order,
    tree_recovery,
)

__all__ = [
    "Adaptivity",
    "Cost",
    "Features",
    "Hierarchy",
    "Measures",
    "Recovery",
    "adaptivity",
    "analyze",
    "best_concepts",
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
