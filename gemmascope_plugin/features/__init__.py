"""Statistics of features."""

from gemmascope_plugin.features.analyze import Features, analyze

__all__ = ["Features", "analyze"]
