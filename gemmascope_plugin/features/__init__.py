"""What is active on a text."""

from gemmascope_plugin.features.analyze import Features, analyze
from gemmascope_plugin.features.cooccurrence import best_concepts

__all__ = [
    "Features",
    "analyze",
    "best_concepts",
]
