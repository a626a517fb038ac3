"""The page of a circuit: what it shows, that it loads nothing, that no text is HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from plotly.offline import get_plotlyjs

from gemmascope_plugin.circuits import Scores, top_n
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.pages import PageError
from gemmascope_plugin.pages.circuit_page import MAX_ROWS, circuit_html, write_circuit
from tests.graphs.graphs import edge_graph

BAD = "<script>alert(1)</script>"


def scores(circuit: Circuit, n_prompts: int = 8) -> Scores:
    sizes = (0, circuit.size, circuit.n_units)
    random = ((0.0,), (0.3,), (1.0,))
    by_prompt = torch.tensor([[2.25], [3.0], [-3.0]]).repeat(1, n_prompts)
    return Scores(
        circuit,
        0.875,
        sizes,
        (0.0, 0.875, 1.0),
        random,
        3.0,
        -3.0,
        completeness=0.125,
        kl=0.0123,
        by_prompt=by_prompt,
        metadata={"n_prompts": n_prompts, "metric": "logit difference"},
    )


def hostile() -> Circuit:
    nodes = [Node("feature", f"blocks.0.{BAD}.hook_sae_acts_post", 3), Node.mlp(1)]
    return top_n(Graph.of_nodes(nodes, [1.0, -2.0], {"task": BAD, BAD: [BAD, 1]}), 2)


class Loads(HTMLParser):
    """What a browser would fetch, the tags, and the rows of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.feed(page.replace(get_plotlyjs(), ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "href", "srcset", "action", "data", "poster"}
        self.urls += [value or "" for name, value in attrs if name in loading]


def test_a_circuit_of_edges_is_shown_with_its_scores() -> None:
    circuit = top_n(edge_graph(), 20)
    page = circuit_html(circuit, scores(circuit))
    assert "<h1>Circuit for t</h1>" in page
    assert f"edges kept of {circuit.n_units}" in page
    assert "<b>0.875</b>" in page and "nodes of 16 touched" in page
    assert "faithfulness, 95 % interval over prompts 0.875 to 0.875" in page
    assert (
        "<b>0.125</b>" in page and "<b>0.0123</b>" in page and f"<b>{circuit.n_units}</b>" in page
    )
    assert (
        "With every other edge replaced, the 20 that are kept bring back 87.5% of the logit difference "
        "on 8 held-out prompts: 3.000 is the full model, -3.000 everything replaced. The best of 1 "
        "random circuits of this size brings back 30.0%."
    ) in page
    assert page.count("Plotly.newPlot(") == 2
    for label in ("L1KV0", "random_mean", "positive = supports the metric"):
        assert label in page
    assert Loads(page).tags.count("tr") == 1 + circuit.n_units + 1 + 3
    assert "source_layer" not in page and "&lt;NA&gt;" not in page


def test_prompts_that_it_was_found_on_are_called_so() -> None:
    circuit = top_n(edge_graph(), 20)
    page = circuit_html(circuit, scores(circuit, 1), held_out=False)
    assert "held-out" not in page.replace(get_plotlyjs(), "")
    assert page.count("on the 1 prompt that it was found on") == 2
    # an interval over one prompt says nothing
    assert "interval" not in page.replace(get_plotlyjs(), "")


def test_a_circuit_of_nothing_has_no_figure() -> None:
    page = circuit_html(top_n(edge_graph(), 0))
    assert "Nothing is kept." in page
    assert "Plotly.newPlot(" not in page


def test_a_narrow_graph_is_as_wide_as_the_page() -> None:
    page = circuit_html(top_n(edge_graph(), 1))
    assert '"range":[-0.4,0.4]' in page


def test_a_circuit_of_nodes_is_shown_without_scores() -> None:
    page = circuit_html(hostile(), title="title")
    assert "<title>title</title>" in page
    assert page.count("Plotly.newPlot(") == 1
    assert "Faithfulness" not in page.replace(get_plotlyjs(), "")
    assert Loads(page).tags.count("tr") == 1 + 2


def test_long_rankings_are_cut_and_say_so() -> None:
    circuit = top_n(edge_graph(EdgeMap(6, 4, 2)), 5)
    page = circuit_html(circuit)
    assert Loads(page).tags.count("tr") == 1 + MAX_ROWS
    assert f"… and {circuit.n_units - MAX_ROWS} more edges" in page


def test_nothing_is_loaded() -> None:
    circuit = top_n(edge_graph(), 20)
    page = circuit_html(circuit, scores(circuit))
    assert page.count(get_plotlyjs()) == 1
    loads, rest = Loads(page), page.replace(get_plotlyjs(), "")
    assert loads.urls == ["data:,"]
    assert not {"iframe", "img", "object", "embed", "base"} & set(loads.tags)
    for forbidden in ("http://", "https://", "@import", "fetch(", "XMLHttpRequest", "url("):
        assert forbidden not in rest, forbidden
    assert "default-src 'none'; script-src 'unsafe-inline'" in page


def test_no_text_is_html() -> None:
    circuit = hostile()
    page = circuit_html(circuit, scores(circuit), title=BAD)
    assert "<script>alert" not in page
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    for tag in ("h1", "title", "dt"):
        assert f"<{tag}>{escaped}</{tag}>" in page
    assert f"<dd>{escaped}, 1</dd>" in page


def test_scores_of_another_circuit_are_refused() -> None:
    circuit = top_n(edge_graph(), 20)
    with pytest.raises(PageError, match=r"of another circuit: Circuit\(t, 19 of"):
        circuit_html(circuit, scores(circuit.top(19)))


def test_a_page_is_written_and_the_same_each_time(tmp_path: Path) -> None:
    circuit = top_n(edge_graph(), 5)
    path = write_circuit(tmp_path / "new" / "page.html", circuit)
    assert path.read_text(encoding="utf-8") == circuit_html(circuit)
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    path = write_circuit(path, circuit, title="Who did it")
    assert "<title>Who did it</title>" in path.read_text(encoding="utf-8")
    with pytest.raises(PageError, match="is a folder"):
        write_circuit(tmp_path, circuit)
