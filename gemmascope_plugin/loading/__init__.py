"""From bytes to a SAELens SAE: files, checks, ``load()`` and SAELens' registry."""

from gemmascope_plugin.loading.load import load, spec_of
from gemmascope_plugin.loading.register import register

__all__ = ["load", "register", "spec_of"]
