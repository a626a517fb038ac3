"""A graph in layers: who is drawn, where, how wide, and in which colour."""

from __future__ import annotations

from html import unescape
from typing import Any

import numpy as np
import pytest

from gemmascope_plugin.figures import FigureInputError
from gemmascope_plugin.figures.layered_graph import MAX_EDGES, MAX_LABELS, WIDTHS, layered_graph
from gemmascope_plugin.figures.theme import NEGATIVE, POSITIVE

LABELS = ["embed", "L0KV0", "L0H0", "MLP0", "MLP1", "logits"]
KINDS = ["embed", "kv", "head", "mlp", "mlp", "logits"]
LAYERS = [-1, 0, 0, 0, 1, None]


def draw(**changes: Any) -> Any:
    parts: dict[str, Any] = {
        "labels": LABELS,
        "kinds": KINDS,
        "layers": LAYERS,
        "source": np.array([0, 0, 2, 3]),
        "target": np.array([1, 2, 3, 5]),
        "weights": np.array([1.0, -0.5, 0.1, 0.8]),
        "edge_labels": ["embed->L0KV0.k", "embed->L0H0.q", "L0H0->MLP0", "MLP0->logits"],
        "links": np.array([[1, 2]]),
        "title": "a",
    } | changes
    return layered_graph(parts.pop("labels"), parts.pop("kinds"), parts.pop("layers"), **parts)


def nodes(figure: Any) -> dict[str, tuple[float, float]]:
    """Place of every node by its name."""
    return {
        name: (x, y)
        for trace in figure.data
        if trace.mode == "markers+text"
        for name, x, y in zip(trace.hovertext, trace.x, trace.y, strict=True)
    }


def names(figure: Any) -> list[str]:
    """What the edges say, the largest last."""
    (hover,) = [trace for trace in figure.data if trace.mode == "markers"]
    return [unescape(text) for text in hover.hovertext]


def lines(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.mode == "lines" and trace.line.dash is None]


def test_edges_go_up_and_untouched_nodes_are_left_out() -> None:
    places = nodes(draw())
    assert set(places) == {"embed", "L0KV0", "L0H0", "MLP0", "logits"}
    heights = [places[name][1] for name in ("embed", "L0KV0", "L0H0", "MLP0", "logits")]
    assert heights == [0, 1, 2, 3, 4]


def test_only_the_largest_edges_are_drawn() -> None:
    largest = draw(**{"max_edges": 2})
    assert names(largest) == names(draw())[-2:]
    assert set(nodes(largest)) == {"embed", "L0KV0", "MLP0", "logits"}


def test_nodes_of_one_row_stand_apart_and_centred() -> None:
    n = 30
    figure = layered_graph(
        ["embed", *(f"f{i}" for i in range(n))],
        ["embed", *["feature"] * n],
        [-1, *[2] * n],
        source=np.zeros(n, dtype=int),
        target=np.arange(1, n + 1),
        weights=np.ones(n),
        edge_labels=[""] * n,
    )
    places = nodes(figure)
    x = [places[f"f{i}"][0] for i in range(n)]
    assert x == sorted(set(x)) and sum(x) == pytest.approx(0, abs=1e-3)
    assert max(x) == pytest.approx(1, abs=1e-3)
    assert n > MAX_LABELS
    texts = {trace.name: list(trace.text) for trace in figure.data if trace.text is not None}
    assert texts == {"embed": ["embed"], "feature": [""] * n}


def test_width_is_size_and_colour_is_sign() -> None:
    drawn = {(trace.line.color, trace.line.width) for trace in lines(draw())}
    assert drawn == {
        (POSITIVE, WIDTHS[3]),
        (NEGATIVE, WIDTHS[2]),
        (POSITIVE, WIDTHS[0]),
    }
    assert [trace.name for trace in lines(draw()) if trace.showlegend] == [
        *("negative score", "positive score"),
    ]


def test_an_edge_says_what_it_is_at_its_middle() -> None:
    assert names(draw()) == [
        *("L0H0->MLP0: 0.1", "embed->L0H0.q: -0.5", "MLP0->logits: 0.8", "embed->L0KV0.k: 1"),
    ]


def test_edges_begin_and_end_at_their_nodes() -> None:
    figure = draw(source=np.array([0]), target=np.array([5]), weights=np.ones(1), edge_labels=["e"])
    (line,), places = lines(figure), nodes(figure)
    assert (line.x[0], line.y[0]) == places["embed"]
    assert (line.x[-2], line.y[-2]) == places["logits"]
    assert line.x[-1] is None


def test_the_largest_edges_are_drawn_and_the_title_says_so() -> None:
    figure = draw(max_edges=2)
    assert figure.layout.title.text == "a, the 2 largest drawn"
    assert names(figure) == ["MLP0->logits: 0.8", "embed->L0KV0.k: 1"]
    assert set(nodes(figure)) == {"embed", "L0KV0", "MLP0", "logits"}
    n = MAX_EDGES + 1
    many = draw(
        source=np.zeros(n, dtype=int),
        target=np.full(n, 5),
        weights=np.arange(n) / n,
        edge_labels=["e"] * n,
    )
    assert many.layout.title.text == f"a, the {MAX_EDGES} largest drawn"


def test_nodes_that_belong_together_are_joined_where_both_are_drawn() -> None:
    def dotted(figure: Any) -> list[Any]:
        return [trace for trace in figure.data if trace.mode == "lines" and trace.line.dash]

    (link,) = dotted(draw())
    places = nodes(draw())
    assert list(zip(link.x, link.y, strict=True))[:2] == [places["L0KV0"], places["L0H0"]]
    (link,) = dotted(draw(max_edges=1))
    assert list(link.x) == []
    assert not dotted(draw(links=None))


def test_layers_are_named_at_their_rows() -> None:
    axis = draw().layout.yaxis
    assert list(axis.ticktext) == ["0"]
    assert list(axis.tickvals) == [2.0]


def test_no_edges_are_an_empty_figure() -> None:
    empty = np.zeros(0, dtype=int)
    figure = draw(source=empty, target=empty, weights=np.zeros(0), edge_labels=[])
    assert not lines(figure) and not nodes(figure)


def test_names_are_escaped() -> None:
    figure = draw(labels=["<b>", *LABELS[1:]], edge_labels=["<i>"] * 4, title="<u>")
    text = figure.to_json()
    for bad in ("<b>", "<i>", "<u>"):
        assert bad not in text and f"\\u003c{bad[1:-1]}\\u003e" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["mlp"]}, "1 kinds were given for 6 labels"),
        ({"layers": [0]}, "1 layers were given for 6 labels"),
        ({"edge_labels": ["e"]}, "1 edge labels were given for 4 sources"),
    ],
)
def test_lengths_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(FigureInputError, match=message):
        draw(**changes)
