"""First-order causes."""

from gemmascope_plugin.attribution.patching import attribution_patching

__all__ = ["attribution_patching"]
