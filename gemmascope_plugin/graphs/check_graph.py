"""The gates for circuits and graphs."""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.errors import InputError
from gemmascope_plugin.models.check_model import describe, is_model, with_call


def check_circuit(circuit: Any, call: str = "") -> None:
    """Refuses what is not a circuit.

    Args:
        circuit: What was given.
        call: How the function is called, for the error.

    Raises:
        InputError: Something else, with what to type.
    """
    from gemmascope_plugin.graphs.circuit import Circuit

    if not isinstance(circuit, Circuit):
        raise _wrong(circuit, call, "circuit", "circuit = gemmascope_plugin.discover(model, task)")


def check_ranking(graph: Any, call: str = "") -> None:
    """The same for a graph of nodes and edges."""
    from gemmascope_plugin.graphs.graph import Graph

    if not isinstance(graph, Graph):
        raise _wrong(graph, call, "graph", "circuit.graph")


def check_graph(graph: Any, call: str = "") -> None:
    """The same for an attribution graph."""
    from gemmascope_plugin.graphs.attribution_graph import AttributionGraph

    if not isinstance(graph, AttributionGraph):
        fix = "graph = gemmascope_plugin.trace(model, prompt, transcoders)"
        raise _wrong(graph, call, "attribution graph", fix)


def _wrong(given: Any, call: str, noun: str, fix: str) -> InputError:
    article = "an" if noun[0] in "aeiou" else "a"
    problem = "The model" if is_model(given) else describe(given)
    return InputError(f"{problem} is not {article} {noun}", fix=with_call(fix, call))
