"""The page of an attribution graph: what is in it, and what it does in a browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.node import table_columns
from gemmascope_plugin.pages import PageError, trace_html, write_trace
from gemmascope_plugin.pages.trace_page import MAX_EDGES
from tests.pages.browser import attribute, opened
from tests.tracing.traces import traced

BAD = "</script><script>alert(1)</script><!-- \u2028 &amp; \"'"
_ROW = {"kind": "feature", "activation": 1.0, "weight": 0.0}


def large(n_features: int = 1970, n_edges: int = 20_000) -> Graph:
    """20 tokens, features of 10 layers, 10 targets, and random edges that lead upwards."""
    random = np.random.default_rng(0)
    tokens = [f"word{i}" for i in range(20)]
    layers = np.sort(random.integers(0, 10, n_features))
    rows = [
        {**_ROW, "id": f"t{i}", "kind": "token", "site": "", "layer": -1, "pos": i, "label": word}
        for i, word in enumerate(tokens)
    ]
    rows += [
        {**_ROW, "id": f"f{i}", "site": f"blocks.{layer}.hook_mlp_out", "layer": int(layer)}
        | {"pos": int(random.integers(0, 20)), "label": f"feature {i}"}
        for i, layer in enumerate(layers)
    ]
    rows += [
        {**_ROW, "id": f"y{i}", "kind": "target", "site": "", "layer": 10, "pos": 19, "weight": 0.1}
        | {"label": f"answer{i}"}
        for i in range(10)
    ]
    nodes = pd.DataFrame(rows).assign(index=1)
    n = len(nodes)
    level = nodes["layer"].to_numpy()
    source, target = random.integers(0, n, (2, 8 * n_edges))
    up = level[source] < level[target]
    cells = np.unique(np.stack([target[up], source[up]]), axis=1)
    chosen = random.permutation(cells.shape[1])[:n_edges]
    target, source = cells[:, np.sort(chosen)]
    data = random.normal(size=len(source)).astype(np.float32)
    matrix = sp.csr_array((data, (target, source)), shape=(n, n))
    return Graph(table_columns(nodes), Adjacency(matrix, np.arange(n)), tuple(tokens), {})


class Page(HTMLParser):
    """Tags, what a browser would fetch, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [v or "" for k, v in attrs if k in {"src", "href", "srcset", "action", "data"}]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def test_the_page_has_the_graph_and_what_was_measured() -> None:
    whole = traced()
    graph = whole.prune()
    page = trace_html(graph)
    data = Page(page).data
    assert data["nodes"]["id"] == list(graph.nodes["id"])
    assert len(data["edges"]["source"]) == graph.n_edges
    assert data["edges"]["score"] == sorted(data["edges"]["score"], reverse=True)
    row = graph.edge_frame(1).iloc[0]
    ends = zip(
        data["edges"]["source"], data["edges"]["target"], data["edges"]["weight"], strict=True
    )
    weights = {(data["nodes"]["id"][s], data["nodes"]["id"][t]): w for s, t, w in ends}
    assert weights[row["source"], row["target"]] == pytest.approx(row["weight"], rel=1e-3)
    n_nodes = int((~whole.where("bias")).sum())
    assert f"<b>{len(graph)} of {n_nodes}</b>" in page
    assert f"({whole.scores.replacement:.3f} unpruned)</b>" in page
    assert f"{graph.scores.completeness:.3f} (" in page
    assert "<dt>edge threshold</dt><dd>0.98</dd>" in page
    assert "MLP feature" in page and "what a dictionary misses" in page


def test_biases_are_left_out_and_shares_are_of_what_is_left() -> None:
    graph = traced()
    data = Page(trace_html(graph)).data
    ids = graph.nodes["id"][~graph.where("bias")]
    assert data["nodes"]["id"] == list(ids)
    sums = np.zeros(len(ids))
    np.add.at(sums, data["edges"]["target"], data["edges"]["share"])
    assert sums[sums > 0] == pytest.approx(1, abs=1e-2)


def test_only_the_strongest_edges_of_a_huge_graph_are_in_the_page() -> None:
    graph = large(n_features=900, n_edges=MAX_EDGES + 10)
    assert graph.n_edges == MAX_EDGES + 10
    page = trace_html(graph)
    assert len(Page(page).data["edges"]["source"]) == MAX_EDGES
    assert f"{MAX_EDGES + 10:,} (the strongest {MAX_EDGES:,} are here)" in page


def test_nothing_is_loaded_and_no_text_is_html() -> None:
    graph = traced("mixed").prune()
    columns = table_columns(graph.nodes.assign(label=BAD))
    graph = replace(graph, columns=columns, tokens=(BAD,) * 12, metadata={"prompt": BAD, BAD: BAD})
    name = graph.nodes["id"].iloc[-1]
    page = trace_html(graph, groups={BAD: [name]}, top_tokens={name: ((BAD,), (BAD,))})
    shown = Page(page)
    assert shown.tags.count("script") == 2 and shown.urls == ["data:,"]
    assert "alert(1)</script>" not in page
    assert shown.data["nodes"]["label"][0] == BAD and shown.data["groups"][0][0] == BAD
    for forbidden in (
        "http://",
        "https://",
        "@import",
        "fetch(",
        "XMLHttpRequest",
        "url(",
        "innerHTML",
    ):
        assert forbidden not in page, forbidden
    assert "default-src 'none'; script-src 'unsafe-inline'" in page


def test_groups_and_the_selected_node() -> None:
    graph = traced().prune()
    first, second = graph.nodes["id"][graph.where("feature")][:2]
    data = Page(trace_html(graph, groups={"two": [first, second]}, selected=first, title="T")).data
    assert data["groups"] == [["two", [graph.find(first), graph.find(second)]]]
    assert data["selected"] == graph.find(first)
    with pytest.raises(UnknownNameError, match="The graph has no node 'nowhere'"):
        trace_html(graph, groups={"two": ["nowhere"]})
    with pytest.raises(UnknownNameError, match="Did you mean"):
        trace_html(graph, selected=first + "0")
    with pytest.raises(UnknownNameError, match="The group 'none' has no node"):
        trace_html(graph, groups={"none": []})
    with pytest.raises(UnknownNameError, match="is in two groups"):
        trace_html(graph, groups={"one": [first], "two": [first]})


def test_a_page_is_written_and_the_same_each_time(tmp_path: Path) -> None:
    graph = traced().prune()
    path = write_trace(tmp_path / "new" / "page.html", graph)
    assert path.read_text(encoding="utf-8") == trace_html(graph)
    options: Any = {"title": "Who did it", "selected": graph.nodes["id"].iloc[0]}
    path = write_trace(path, graph, **options)
    assert path.read_text(encoding="utf-8") == trace_html(graph, **options)
    assert "<title>Who did it</title>" in path.read_text(encoding="utf-8")
    with pytest.raises(PageError, match="is a folder"):
        write_trace(tmp_path, graph)


def test_two_thousand_nodes_in_a_browser(tmp_path: Path) -> None:
    graph = large()
    assert len(graph) == 2000 and graph.n_edges == 20_000
    document = opened(write_trace(tmp_path / "page.html", graph), tmp_path / "profile")
    assert attribute(document, "data-drawn") == "2000 nodes, 100 edges"


STEPS = """
const log = [], root = document.documentElement, by = (id) => document.getElementById(id);
const note = () => log.push(by("details").querySelector("h2").textContent);
const key = (key) => by("canvas").dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const set = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("input")); };
set("search", "w178"); by("results").querySelector("button").click(); note();
key("Escape"); note();
key("ArrowUp"); key("ArrowUp"); key("m"); key("ArrowLeft"); key("m"); key("Enter"); note();
by("group-name").value = "mine"; by("make-group").click(); log.push(by("groups-text").textContent);
by("groups").querySelector("button").click(); log.push(by("groups").querySelector("button").textContent);
set("influence", 0.3); log.push(by("influence-text").textContent);
set("drawn", 0); log.push(by("drawn-text").textContent);
by("theme").click(); log.push(root.dataset.theme);
key("+"); key("0");
const box = by("canvas").getBoundingClientRect();
const at = {clientX: box.left + 100, clientY: box.top + 100, pointerId: 1, bubbles: true};
by("canvas").dispatchEvent(new PointerEvent("pointermove", at));
by("canvas").dispatchEvent(new WheelEvent("wheel", {...at, deltaY: -100, cancelable: true}));
root.dataset.log = JSON.stringify(log);
"""


def test_search_keys_groups_and_sliders_in_a_browser(tmp_path: Path) -> None:
    graph = traced("mixed").prune()
    document = opened(write_trace(tmp_path / "page.html", graph), tmp_path / "profile", STEPS)
    text = attribute(document, "data-log").replace("&quot;", '"').replace("&amp;", "&")
    match, cleared, chosen, groups, button, shown, drawn, theme = json.loads(text)
    assert match == "w178" and cleared == "Nothing selected"
    assert chosen in set(graph.nodes["label"])
    ((name, members),) = json.loads(groups).items()
    assert name == "mine" and len(members) == 2 and set(members) <= set(graph.nodes["id"])
    assert button == "Collapse"
    n_shown = int((graph.shares[graph.where("feature") | graph.where("error")] <= 0.3).sum())
    n_shown += int((graph.where("token") | graph.where("target")).sum())
    assert shown == f"{n_shown} of {len(graph)}, with 30 % of the influence"
    assert drawn == f"the strongest 1 of {graph.n_edges}"
    assert theme in ("light", "dark")
    assert re.search(r"data-theme=\"(light|dark)\"", document)
