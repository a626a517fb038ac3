"""Pages: one self-contained HTML file each, nothing loaded from a network."""

from gemmascope_plugin.pages.circuit_page import circuit_html, circuit_section, write_circuit
from gemmascope_plugin.pages.effects_page import (
    effects_html,
    heads_section,
    positions_section,
    write_effects,
)
from gemmascope_plugin.pages.report_page import Columns, PageError, Section, prepare, write_page
from gemmascope_plugin.pages.trace_page import trace_html, write_trace
from gemmascope_plugin.pages.walkthrough import (
    feature_frame,
    features_section,
    site_name,
    steering_html,
)

__all__ = [
    "Columns",
    "PageError",
    "Section",
    "circuit_html",
    "circuit_section",
    "effects_html",
    "feature_frame",
    "features_section",
    "heads_section",
    "positions_section",
    "prepare",
    "site_name",
    "steering_html",
    "trace_html",
    "write_circuit",
    "write_effects",
    "write_page",
    "write_trace",
]
