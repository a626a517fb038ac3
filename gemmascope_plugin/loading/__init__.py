"""From bytes to dictionaries: files, checks, ``load()``, suites and SAELens' registry."""

from gemmascope_plugin.loading.footprint import Footprint, footprint
from gemmascope_plugin.loading.load import load, spec_of
from gemmascope_plugin.loading.sae_suite import SaeSuite, load_suite
from gemmascope_plugin.loading.saelens_registry import register

__all__ = [
    "Footprint",
    "SaeSuite",
    "footprint",
    "load",
    "load_suite",
    "register",
    "spec_of",
]
