"""Nodes of dictionaries, heads and MLPs at their sites: values, slopes, direct paths between them."""

from gemmascope_plugin.attribution.sites.runs import PartRun, SiteRun, run_sites
from gemmascope_plugin.attribution.sites.site import Site, sites_of

__all__ = ["PartRun", "Site", "SiteRun", "run_sites", "sites_of"]
