"""What dictionaries exist: specs, tables, ``find()``; no torch, and a network in ``refresh()`` only."""

from gemmascope_plugin.catalog.find import SpecList, find
from gemmascope_plugin.catalog.refresh import refresh
from gemmascope_plugin.catalog.spec import SaeSpec
from gemmascope_plugin.catalog.tables import get, releases

__all__ = ["SaeSpec", "SpecList", "find", "get", "refresh", "releases"]
