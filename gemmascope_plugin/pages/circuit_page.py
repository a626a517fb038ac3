"""The page of a circuit: its graph, how faithful it is, its ranking, how it was made.

1. What was measured of it, in a sentence and in key figures.
2. The graph of the kept edges, bottom up, or the bars of the kept nodes.
3. Where scores are given, faithfulness by size beside random circuits, as a curve and a table.
4. The ranking, kept or not, with a box that filters its rows.

Pages of several results take a circuit as one section.

One file, as ``report_page.py`` makes them. Cost: about 5 MB per page, for the plotting library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

import gemmascope_plugin.figures as figures
from gemmascope_plugin.circuits import Scores
from gemmascope_plugin.errors import number_of
from gemmascope_plugin.graphs import Circuit
from gemmascope_plugin.pages.report_page import (
    Columns,
    PageError,
    Section,
    even_digits,
    facts,
    page_html,
    template,
    write_html,
)

TEMPLATE = "circuit.html.jinja"
MAX_ROWS = 500
"""Rows of the ranking."""
MAX_NODES = 20
"""Rows of a circuit's table."""
MAX_EDGES = 40
"""Edges of a circuit's picture."""
_LAYERS = ("source_layer", "target_layer")
_RANKED = {
    "node": "Nodes ranked on training prompts by how much the metric falls when a node alone gets its "
    "corrupted value.",
    "edge": "An edge is what one head or MLP reads of what another wrote. Edges are ranked on training "
    "prompts by an estimate of how much the metric falls when the edge alone is corrupted.",
}
FAITHFUL = 0.9
"""Faithfulness from which on a circuit counts as one that does the task."""
_HALF = 1.15
"""Half the width of a graph whose rows are long."""
_STYLE = """
.scroll { overflow: auto; max-height: 560px; }
.scroll thead th { position: sticky; top: 0; background: #fff; }
.scroll table { width: 100%; }
input { font: inherit; padding: 4px 8px; width: 320px; max-width: 100%; margin-bottom: 10px; }
footer dd { overflow-wrap: anywhere; }
"""


def circuit_html(
    circuit: Circuit,
    scores: Scores | None = None,
    *,
    title: str | None = None,
    held_out: bool = True,
) -> str:
    """A circuit as one HTML page.

    Args:
        circuit: The circuit.
        scores: What :func:`gemmascope_plugin.evaluate` measured of it.
        title: Heading; the name of the task by default.
        held_out: Whether the scores are of other prompts than those that it was found on.

    Returns:
        The whole page.

    Raises:
        PageError: The scores are of another circuit.
    """
    if scores is not None and not torch.equal(scores.circuit.is_kept, circuit.is_kept):
        raise PageError(
            f"The scores are of another circuit: {scores.circuit!r}", fix="scores.circuit"
        )
    measured = [] if scores is None else [_faithfulness(scores, held_out)]
    return page_html(
        title or f"Circuit for {circuit.metadata.get('task')}",
        [_picture(circuit), *measured, _ranking(circuit)],
        lead="" if scores is None else _meaning(scores, held_out),
        key_figures=_key_figures(circuit, scores),
        footer=facts(circuit.metadata),
        style=_STYLE,
    )


def write_circuit(
    path: str | Path,
    circuit: Circuit,
    scores: Scores | None = None,
    *,
    title: str | None = None,
    held_out: bool = True,
) -> Path:
    """Writes the page of a circuit; an older page is replaced.

    Args:
        path: The file; its folder is made if need be.
        circuit: The circuit.
        scores: What was measured of it.
        title: Heading; the name of the task by default.
        held_out: Whether the scores are of other prompts than those that it was found on.

    Returns:
        The path.

    Raises:
        PageError: The file cannot be written there, or the scores are of another circuit.
    """
    return write_html(path, circuit_html(circuit, scores, title=title, held_out=held_out))


def ranked(circuit: Circuit, n: int | None = None) -> Any:
    """The units, most important first, named by their ends; scores are text of even digits."""
    frame = circuit.to_frame(n)
    layers = [name for name in ("source_layer", "target_layer") if name in frame]
    return even_digits(frame.drop(columns=layers), ["score"])


def _key_figures(circuit: Circuit, scores: Scores | None) -> list[tuple[str, str]]:
    unit = circuit.graph.unit
    size = f"{unit}s kept of {circuit.n_units} ({circuit.share:.2%})"
    if circuit.graph.ranks_edges:
        size += f", {len(circuit.nodes)} nodes of {len(circuit.graph)} touched"
    size += f", {circuit.n_against} against the metric" if circuit.n_against else ""
    pairs = [(str(circuit.size), size)]
    if scores is None:
        return pairs
    smallest = scores.smallest(FAITHFUL)
    return [
        *pairs,
        (f"{scores.faithfulness:.3f}", f"faithfulness{_interval(scores)}"),
        (
            f"{scores.completeness:.3f}",
            "faithfulness of all but the circuit (completeness; 0 best)",
        ),
        (f"{scores.kl:.3g}", "nats of divergence from the full model's next token"),
        (
            "none" if smallest is None else str(smallest),
            f"{unit}s, the smallest measured size with faithfulness of at least {FAITHFUL} from there on",
        ),
    ]


def _interval(scores: Scores) -> str:
    """The interval over prompts, where there are several."""
    if scores.by_prompt is None or scores.by_prompt.shape[1] < 2:
        return ""
    low, high = scores.interval()
    return f", 95 % interval over prompts {low:.3f} to {high:.3f}"


def _prompts(scores: Scores, held_out: bool) -> str:
    n = scores.metadata["n_prompts"]
    if held_out:
        return number_of(n, "held-out prompt")
    return f"the {number_of(n, 'prompt')} that it was found on"


def _meaning(scores: Scores, held_out: bool) -> str:
    """What the scores say, in two sentences."""
    meta, circuit = scores.metadata, scores.circuit
    text = (
        f"With every other {circuit.graph.unit} replaced, the {circuit.size} that are kept bring back "
        f"{scores.faithfulness:.1%} of the {meta.get('metric', 'metric')} on "
        f"{_prompts(scores, held_out)}: {scores.metric_full:.3f} is the full "
        f"model, {scores.metric_empty:.3f} everything replaced."
    )
    if scores.random:
        text += (
            f" The best of {len(scores.random)} random circuits of this size brings back "
            f"{max(scores.random):.1%}."
        )
    return text


def _picture(circuit: Circuit) -> Section:
    title = "Graph" if circuit.graph.has_edges else "Nodes"
    if not circuit.size:
        return Section(title, "Nothing is kept.")
    figure = circuit.plot()
    if circuit.graph.has_edges:
        lead = (
            "Kept edges, from the embedding at the bottom to the logits on top; the wider, the larger "
            "the score. Dotted: a key-value head and the heads that share it. Point at an edge or a node "
            "for its name."
            if circuit.graph.ranks_edges
            else "Kept nodes, early layers at the bottom, and the edges between them; the wider, the "
            "larger the score. Point at an edge or a node for its name."
        )
        return Section(title, lead, (spread(figure),))
    return Section(title, "Kept nodes and their scores.", (figure,))


def spread(figure: Any) -> Any:
    """The same graph as wide as the page where its rows are short, with room for the labels."""
    widest = max((abs(x) for trace in figure.data for x in trace.x if x is not None), default=0.0)
    half = min(_HALF, max(0.4, 1.35 * widest))
    figure.update_traces(textfont_size=12, selector={"mode": "markers+text"})
    return figure.update_xaxes(range=[-half, half]).update_layout(margin_b=12)


def _faithfulness(scores: Scores, held_out: bool) -> Section:
    figure = scores.plot()
    if not held_out:
        figure.update_layout(title_text=f"Faithfulness on {_prompts(scores, held_out)}")
    lead = (
        "The best 0, 1, 2, ... units of the ranking are kept and all others replaced: 1 is the full "
        "model, 0 everything replaced. The grey band spans random circuits of the same size."
    )
    frame = scores.to_frame()
    table = figures.frame_html(even_digits(frame, frame.columns[1:]))
    table = Markup('<div class="scroll">{}</div>').format(Markup(table))
    return Section("Faithfulness by size", lead, (figure, table))


def _ranking(circuit: Circuit) -> Section:
    unit, sign = circuit.graph.unit, circuit.metadata.get("sign")
    table = figures.frame_html(ranked(circuit, MAX_ROWS), MAX_ROWS)
    left = circuit.n_units - MAX_ROWS
    note = f'<p class="gs-note">… and {left} more {unit}s</p>' if left > 0 else ""
    lead = f"All {unit}s, most important first." + (f" Scores: {sign}." if sign else "")
    part = Markup(template(TEMPLATE).render(table=Markup(table + note)))
    return Section("Ranking", lead, (part,))


# ---------------------------------------------------------------------- a section of another page
def circuit_section(scores: Scores) -> Section:
    """The ranked nodes, or edges, and how faithful the circuit is beside random ones."""
    circuit = scores.circuit
    unit, shown = circuit.graph.unit, min(circuit.size, MAX_NODES)
    ranked = circuit.to_frame().drop(columns="kept")
    ranked = ranked.drop(columns=[name for name in _LAYERS if name in ranked])
    if unit == "edge":  # more would hide each other
        pictures = (scores.plot(), spread(circuit.top(min(circuit.size, MAX_EDGES)).plot()))
    else:
        pictures = (circuit.plot(), scores.plot())
    return Section(
        "The circuit, checked by ablation",
        f"{_RANKED[unit]} The curve keeps the best 0, 1, 2, ... {unit}s and corrupts all others, on "
        f"{scores.metadata['n_prompts']} held-out prompts: 1 is the full model, 0 is everything "
        "corrupted. The grey band spans random circuits of the same size.",
        (
            f"The best {circuit.size} of {circuit.n_units} {unit}s: faithfulness "
            f"{scores.faithfulness:.3f}{_beside(scores.random)}.",
            *([Columns(pictures)] if unit == "node" else pictures),
            *([f"The best {shown} edges:"] if unit == "edge" else []),
            Markup(figures.frame_html(ranked, max(shown, 1))),
        ),
    )


def _beside(random: Sequence[float]) -> str:
    """Random circuits of the same size; one of several may hold all that matters, so their mean too."""
    if not random:
        return ""
    n = "one random circuit" if len(random) == 1 else f"{len(random)} random circuits"
    mean = sum(random) / len(random)
    return f"; {n} of that size: {mean:.3f} on average, {max(random):.3f} at best"
