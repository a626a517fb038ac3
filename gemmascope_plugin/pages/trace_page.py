"""The page of an attribution graph: drawn on a canvas, to be zoomed, searched, filtered and grouped.

1. Tokens stand along the bottom, targets on top, layers between them; the nodes of one token and layer
   side by side, the most influential ones first.
2. Edges are ranked by what pruning ranks them by, their share of their target's input times the influence
   of the target; the strongest of them are drawn, and all of a selected node.
3. The graph is in the page as JSON in which no ``<`` is left; the scripts beside this file set all text
   as text. The page's security policy forbids the browser any request.

Cost: about 30 bytes an edge and 150 a node, beside 50 kB of page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.figures.theme import visible
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.write_json import site_word
from gemmascope_plugin.pages.report_page import facts, template, write_html

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "trace.html.jinja"
SCRIPTS = ("model.js", "layout.js", "draw.js", "panel.js", "main.js")
MAX_EDGES = 40_000
"""Edges on a page, the strongest."""
DRAWN = 100
"""Edges that are drawn at first."""
KINDS = ("token", "feature", "error", "target")
_WORDS = {"mlp": "MLP", "att": "attention", "res": "residual"}

Words = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Node id to the words that it raises and lowers."""


def trace_html(
    graph: Graph,
    *,
    title: str | None = None,
    top_tokens: Words | None = None,
    groups: Mapping[str, Iterable[str]] | None = None,
    selected: str | None = None,
) -> str:
    """An attribution graph as one HTML page.

    Args:
        graph: The graph, best pruned; biases are left out.
        title: Heading; the prompt by default.
        top_tokens: What ``tracing.top_tokens`` has found for its features.
        groups: Supernodes that are there at first: name to ids of nodes.
        selected: Id of the node that is selected at first.

    Returns:
        The whole page.

    Raises:
        UnknownNameError: A group or ``selected`` has a node that the graph does not have.
    """
    data = _data(graph, top_tokens or {}, groups or {}, selected)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    # neither a closing tag nor a comment can begin in it
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return template(TEMPLATE).render(
        title=title or str(graph.metadata.get("prompt", "".join(graph.tokens))),
        facts=_sizes(graph),
        kinds=_legend(graph),
        about=facts(_about(graph)),
        data=Markup(text),
        style=Markup(_asset("viewer.css")),
        script=Markup("\n".join(map(_asset, SCRIPTS))),
    )


def write_trace(
    path: str | Path,
    graph: Graph,
    *,
    title: str | None = None,
    top_tokens: Words | None = None,
    groups: Mapping[str, Iterable[str]] | None = None,
    selected: str | None = None,
) -> Path:
    """Writes the page of an attribution graph; an older page is replaced.

    Args:
        path: The file; its folder is made if need be.
        graph: The graph, best pruned; biases are left out.
        title: Heading; the prompt by default.
        top_tokens: What ``tracing.top_tokens`` has found for its features.
        groups: Supernodes that are there at first: name to ids of nodes.
        selected: Id of the node that is selected at first.

    Returns:
        The path.

    Raises:
        PageError: The file cannot be written there.
        UnknownNameError: A group or ``selected`` has a node that the graph does not have.
    """
    page = trace_html(graph, title=title, top_tokens=top_tokens, groups=groups, selected=selected)
    return write_html(path, page)


def _asset(name: str) -> str:
    return (
        resources.files(__package__ or "")
        .joinpath("viewer")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )


def _data(
    graph: Graph, words: Words, groups: Mapping[str, Any], selected: str | None
) -> dict[str, Any]:
    """What the scripts read."""
    is_shown = ~graph.where("bias")
    place = np.cumsum(is_shown) - 1
    nodes, influence = graph.nodes.loc[is_shown], graph.influence[is_shown]
    sites = [site for site in dict.fromkeys(nodes["site"]) if site]
    targets = graph.weights[is_shown].nonzero()[0]
    return {
        "tokens": [visible(token, blanks=False) for token in graph.tokens],
        "n_layers": _n_layers(nodes),
        "sites": [{"name": site, **_site(site)} for site in sites],
        "largest": float(influence.max(initial=1e-30)),
        "drawn": DRAWN,
        "start": int(targets[0]) if len(targets) else 0,
        "selected": -1 if selected is None else int(place[graph.find(selected)]),
        "groups": _groups(graph, place, groups),
        "nodes": {
            "id": nodes["id"].tolist(),
            "kind": [KINDS.index(kind) for kind in nodes["kind"]],
            "site": [sites.index(site) if site else -1 for site in nodes["site"]],
            **{name: nodes[name].tolist() for name in ("layer", "pos", "index", "label")},
            **{name: _short(nodes[name]) for name in ("activation", "weight")},
            "influence": _short(influence),
            "share": _short(graph.shares[is_shown]),
            "words": [_words(words.get(name)) for name in nodes["id"]],
        },
        "edges": _edges(graph, is_shown, place),
    }


def _edges(graph: Graph, is_shown: np.ndarray, place: np.ndarray) -> dict[str, list[Any]]:
    """The strongest edges, the strongest first."""
    edges = graph.rows.restricted(is_shown)
    source, target, weight = edges.source, edges.target, edges.weight
    share = edges.normalised.matrix.data
    score = share * (graph.influence + graph.weights)[target]
    order = np.argsort(-score, kind="stable")[:MAX_EDGES]
    return {
        "source": place[source[order]].tolist(),
        "target": place[target[order]].tolist(),
        "weight": _short(weight[order]),
        "share": _short(share[order]),
        "score": _short(score[order]),
    }


def _groups(
    graph: Graph, place: np.ndarray, groups: Mapping[str, Iterable[str]]
) -> list[tuple[str, list[int]]]:
    """Names and places of members."""
    members_of: list[tuple[str, list[int]]] = []
    taken: set[str] = set()
    for name, ids in groups.items():
        members = list(ids)
        if not members:
            raise UnknownNameError(f"The group {name!r} has no node", fix="leave it out")
        for node in members:
            if node in taken:
                raise UnknownNameError(f"The node {node!r} is in two groups", fix="one of them")
            taken.add(node)
        members_of.append((name, [int(place[graph.find(node)]) for node in members]))
    return members_of


def _site(site: str) -> dict[str, str]:
    word = site_word(site)
    return {"kind": word, "word": _WORDS[word]}


def _n_layers(nodes: pd.DataFrame) -> int:
    """The row of the targets."""
    of_target = nodes["kind"] == "target"
    inner = int(nodes.loc[~of_target, "layer"].max()) + 1
    return max([inner, *nodes.loc[of_target, "layer"]])


def _short(values: Iterable[Any]) -> list[float | None]:
    """Four digits; None for what is unknown."""
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in map(float, values)]


def _words(lists: Sequence[Sequence[str]] | None) -> list[list[str]] | None:
    return None if lists is None else [[visible(word) for word in words] for words in lists]


def _legend(graph: Graph) -> list[tuple[str, str, str]]:
    """Shape, colour and name of what is on the page."""
    kinds = set(graph.nodes["kind"])
    features = dict.fromkeys(map(site_word, graph.nodes["site"][graph.where("feature")]))
    lines = [("square", "token", "token")] if "token" in kinds else []
    lines += [("circle", word, f"{_WORDS[word]} feature") for word in features]
    lines += [("diamond", "error", "what a dictionary misses")] if "error" in kinds else []
    return lines + ([("square", "target", "target")] if "target" in kinds else [])


def _sizes(graph: Graph) -> list[tuple[str, str]]:
    """Sizes and scores, and what they were before pruning."""
    is_shown = ~graph.where("bias")
    n_nodes, n_edges = int(is_shown.sum()), graph.rows.restricted(is_shown).n_edges
    whole, scores = graph.metadata.get("whole"), graph.scores
    sizes = [("nodes", f"{n_nodes:,}"), ("edges", f"{n_edges:,}")]
    pairs = [("replacement", scores.replacement), ("completeness", scores.completeness)]
    measures = [(name, f"{value:.3f}") for name, value in pairs]
    if whole is not None:
        sizes = [(name, f"{text} of {whole[f'n_{name}']:,}") for name, text in sizes]
        measures = [(name, f"{text} ({whole[name]:.3f} unpruned)") for name, text in measures]
    if n_edges > MAX_EDGES:
        sizes[1] = ("edges", f"{sizes[1][1]} (the strongest {MAX_EDGES:,} are here)")
    residual = graph.metadata.get("residual", math.nan)
    if math.isfinite(residual):
        measures.append(("largest residual of a row", f"{residual:.1g}"))
    return sizes + measures


def _about(graph: Graph) -> dict[str, Any]:
    """Metadata in words, but for what stands above."""
    left = ("prompt", "token_ids", "whole", "residual")
    details = {name: value for name, value in graph.metadata.items() if name not in left}
    if isinstance(details.get("dictionaries"), Mapping):
        details["dictionaries"] = tuple(details["dictionaries"].values())
    return {name.replace("_", " "): value for name, value in details.items()}
