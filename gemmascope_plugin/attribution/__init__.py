"""First-order causes."""

from gemmascope_plugin.attribution.edge_attribution import edge_attribution
from gemmascope_plugin.attribution.missed import MissedEffects, missed_effects
from gemmascope_plugin.attribution.patching import attribution_patching
from gemmascope_plugin.attribution.relp_rules import RelpRules
from gemmascope_plugin.attribution.verify import verify_top

__all__ = [
    "MissedEffects",
    "RelpRules",
    "attribution_patching",
    "edge_attribution",
    "missed_effects",
    "verify_top",
]
