"""Graphs and circuits: what they hold, what they refuse, how they show themselves."""

from __future__ import annotations

import sys
from dataclasses import replace

import networkx as nx
import pytest
import torch

from gemmascope_plugin.circuits import top_n
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    MissingExtraError,
    ModelError,
    UnknownNameError,
)
from gemmascope_plugin.graphs import Circuit, Graph
from gemmascope_plugin.graphs.adjacency import EdgeList
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.frames import MAX_BARS
from gemmascope_plugin.graphs.graph import SIGN
from gemmascope_plugin.graphs.node import PORTS, FeatureId, Node, Reader
from tests.graphs.graphs import EDGE_MAP, META, edge_graph, node_graph

SMALL = EdgeMap(1, 2, 1)


def matrix(edge_map: EdgeMap) -> torch.Tensor:
    """A different score for every pair of writer and reader."""
    return torch.arange(float(edge_map.mask.numel())).reshape(edge_map.mask.shape)


# ------------------------------------------------------------------------------------------- graphs
def test_every_edge_of_a_model_has_the_score_of_its_writer_and_reader() -> None:
    scores = matrix(EDGE_MAP)
    graph = Graph.of_edges(EDGE_MAP, scores)
    assert graph.n_edges == EDGE_MAP.n_edges
    by_ends = {}
    for i in range(graph.n_edges):
        reader = Reader(graph.components[graph.target[i]], PORTS[graph.port[i]])
        by_ends[graph.components[graph.source[i]], reader] = float(graph.edge_scores[i])
    for row, writer in enumerate(EDGE_MAP.writers):
        for column, reader in enumerate(EDGE_MAP.readers):
            expected = float(scores[row, column]) if EDGE_MAP.mask[row, column] else None
            assert by_ends.get((writer, reader)) == expected


def test_edges_at_positions_have_scores_of_their_own() -> None:
    scores = matrix(SMALL)[:, :, None] + torch.tensor([0.0, 0.25, 0.5])
    graph, flat = Graph.of_edges(SMALL, scores), Graph.of_edges(SMALL, matrix(SMALL))
    assert graph.pos is not None
    assert graph.pos.tolist() == [0, 1, 2] * flat.n_edges
    assert graph.edge_scores[1::3].tolist() == [score + 0.25 for score in flat.edge_scores.tolist()]
    assert graph.source[2::3].tolist() == flat.source.tolist()
    assert graph.edge_labels[:4] == [
        "embed->L0H0.q@0",
        "embed->L0H0.q@1",
        "embed->L0H0.q@2",
        "embed->L0H1.q@0",
    ]


def test_labels_of_edges() -> None:
    labels = Graph.of_edges(SMALL, matrix(SMALL)).edge_labels
    assert labels[:6] == [
        *("embed->L0H0.q", "embed->L0H1.q", "embed->L0KV0.k", "embed->L0KV0.v", "embed->MLP0"),
        "embed->logits",
    ]
    assert "L0H1->MLP0" in labels


def test_a_key_value_head_feeds_the_heads_of_its_group() -> None:
    graph = edge_graph(EdgeMap(2, 4, 2))
    pairs = [
        (graph.components[kv].label, graph.components[head].label)
        for kv, head in graph.feeds.tolist()
    ]
    assert pairs[4:] == [
        *(("L1KV0", "L1H0"), ("L1KV0", "L1H1"), ("L1KV1", "L1H2"), ("L1KV1", "L1H3")),
    ]
    assert len(pairs) == 8
    assert node_graph().feeds.shape == (0, 2)


def test_the_sign_convention_stands_in_the_metadata() -> None:
    assert edge_graph().metadata == {"sign": SIGN, **META}
    assert Graph.of_nodes([Node.mlp(0)], [1.0], {"sign": "other"}).metadata["sign"] == "other"


def test_metadata_cannot_be_changed_from_outside() -> None:
    kinds = ["head", {"a": [1]}]
    graph = Graph.of_nodes([Node.mlp(0)], [1.0], {"kinds": kinds})
    kinds.append("mlp")
    assert graph.metadata["kinds"] == ("head", {"a": (1,)})


def test_scores_that_are_not_finite_are_an_error() -> None:
    scores = matrix(SMALL)
    scores[0, 0] = float("nan")
    with pytest.raises(
        ModelError, match=f"1 of {SMALL.n_edges} scores are NaN.*a model in float32"
    ):
        Graph.of_edges(SMALL, scores)
    with pytest.raises(ModelError, match="1 of 1 scores are NaN or infinite"):
        Graph.of_nodes([Node.mlp(0)], [float("inf")])
    absent = matrix(SMALL)
    absent[~SMALL.mask] = float("nan")
    assert Graph.of_edges(SMALL, absent).n_edges == SMALL.n_edges


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"nodes": (Node.mlp(0),) * 6}, "a node is there twice"),
        ({"nodes": (*(Node.mlp(i) for i in range(5)), Node.kv(0, 0))}, "cannot share them"),
        ({"source": [0, 9]}, "the source of an edge is not among the 6 nodes"),
        ({"target": [-1, 2]}, "the target of an edge is not among"),
        ({"target": [0, 1]}, "an edge ends where it begins"),
        ({"port": [0, 4]}, "port number 4"),
        ({"pos": [0, -1]}, "an edge has a position outside 0 to"),
        (
            {"source": [0, 0], "target": [2, 2]},
            "an edge is there twice",
        ),
        ({"weight": [0.0, float("nan")]}, "a score is NaN"),
    ],
)
def test_what_is_no_graph_cannot_be_made(change: dict, fault: str) -> None:
    nodes = tuple(Node.mlp(i) for i in range(6))
    ends = {"source": [0, 1], "target": [2, 3], "weight": [1.0, 1.0]}
    Graph.of_nodes(nodes, None, edges=EdgeList.of(**ends))
    with pytest.raises(AssertionError, match=fault):
        Graph.of_nodes(change.pop("nodes", nodes), None, edges=EdgeList.of(**ends | change))


def test_the_same_edge_may_be_there_at_two_ports_or_positions() -> None:
    nodes = (Node.embed(), Node.head(0, 0), Node.kv(0, 0))
    ends = {"source": [0, 0], "target": [2, 2], "weight": torch.ones(2)}
    Graph.of_nodes(nodes, None, edges=EdgeList.of(**ends, port=[2, 3]))
    Graph.of_nodes(nodes, None, edges=EdgeList.of(**ends, port=[2, 2], pos=[0, 1]))


def test_a_graph_as_table_text_and_figure() -> None:
    graph = edge_graph()
    frame = graph.to_frame()
    columns = ["source", "target", "port", "source_layer", "target_layer", "score"]
    assert list(frame.columns) == columns
    assert len(frame) == graph.n_edges
    assert frame.iloc[0].tolist()[:5] == ["embed", "L0H0", "q", -1, 0]
    to_logits = frame[frame["target"] == "logits"]
    assert to_logits["target_layer"].isna().all() and (to_logits["port"] == "").all()
    assert list(edge_graph(n_pos=2).to_frame().columns)[3] == "pos"
    assert repr(graph) == f"Graph(t, 16 nodes, {graph.n_edges} edges by eap, {SIGN})"
    assert "</table>" in graph._repr_html_()
    assert f"{graph.n_edges} edges of t" in graph.plot().layout.title.text


def test_a_graph_of_nodes_as_table_text_and_figure() -> None:
    graph = node_graph()
    frame = graph.to_frame()
    assert list(frame.columns) == ["node", "kind", "layer", "score"]
    assert frame["node"].tolist()[3:] == ["L1H3", "MLP0", "blocks.0.hook_resid_post/7"]
    assert frame["layer"].tolist() == [1, 1, 1, 1, 0, 0]
    assert repr(graph) == f"Graph(t, 6 nodes by eap, {SIGN})"
    many = Graph.of_nodes([Node.mlp(i) for i in range(50)], torch.arange(50.0), META)
    figure = many.plot()
    assert figure.layout.title.text == f"50 nodes of t, the {MAX_BARS} largest"
    assert sorted(figure.data[0].x) == [float(score) for score in range(10, 50)]


def test_names_of_a_task_are_no_html() -> None:
    bad = "<script>"
    graph = Graph.of_nodes([Node.mlp(0)], [1.0], {"task": bad})
    assert bad not in graph._repr_html_() + top_n(graph, 1)._repr_html_()


# ----------------------------------------------------------------------------------------- circuits
def hand_made() -> Circuit:
    """The three edges of one path, kept among all others."""
    scores = torch.zeros(EDGE_MAP.mask.shape)
    for n, (writer, reader) in enumerate(PATH):
        scores[EDGE_MAP.writer(writer), EDGE_MAP.reader(reader)] = (3 - n) * (-1) ** n
    return top_n(Graph.of_edges(EDGE_MAP, scores, META), 3)


PATH = (
    (Node.embed(), Reader(Node.head(0, 1), "q")),
    (Node.head(0, 1), Reader(Node.kv(1, 1), "v")),
    (Node.head(1, 3), Reader(Node.logits())),
)


def test_a_circuit_of_edges() -> None:
    circuit = hand_made()
    assert circuit.edges == PATH
    assert [node.label for node in circuit.nodes] == [
        *("embed", "L0H1", "L1H3", "L1KV1", "logits"),
    ]
    assert circuit.scores[:4] == (3.0, -2.0, 1.0, 0.0)
    assert (circuit.size, circuit.n_units) == (3, EDGE_MAP.n_edges)
    assert circuit.share == 3 / EDGE_MAP.n_edges
    assert repr(circuit) == (
        f"Circuit(t, 3 of {EDGE_MAP.n_edges} edges by eap, 1 against the metric: +embed->L0H1.q, "
        "-L0H1->L1KV1.v, +L1H3->logits)"
    )
    assert circuit.top(1).edges == PATH[:1]
    assert circuit.top(0).nodes == ()


def test_a_circuit_of_nodes() -> None:
    circuit = top_n(node_graph(), 2)
    assert circuit.nodes == circuit.ranking[:2]
    assert set(circuit.ranking) == set(circuit.graph.components)
    assert [abs(score) for score in circuit.scores] == sorted(
        map(abs, circuit.scores), reverse=True
    )
    assert circuit.edges == ()
    is_kept = torch.tensor([True, False, False, False, True, True])
    assert set(Circuit(circuit.graph, is_kept).nodes) == {
        circuit.graph.components[i] for i in (0, 4, 5)
    }


def test_a_head_is_not_a_feature_of_its_site() -> None:
    feature = Node.of_feature(FeatureId("blocks.0.attn.hook_z", 3))
    graph = Graph.of_nodes([Node.head(0, 3), feature], [1.0, 2.0])
    for labels in ({("blocks.0.attn.hook_z", 3): "x"}, {"blocks.0.attn.hook_z": {3: "x"}}):
        assert graph.with_labels(labels).meanings == {feature: "x"}


def test_equal_scores_keep_the_order_of_the_graph() -> None:
    graph = Graph.of_nodes([Node.mlp(i) for i in range(5)], [1.0, -2.0, 2.0, -1.0, 2.0])
    assert [node.layer for node in top_n(graph, 0).ranking] == [1, 2, 4, 0, 3]
    assert [node.layer for node in top_n(graph, 0, rank="positive").ranking] == [2, 4, 0, 3, 1]


def test_a_circuit_of_edges_has_no_ranking_of_nodes() -> None:
    with pytest.raises(GemmaScopeError, match=r"ranks edges, not nodes.*circuit\.edges"):
        _ = hand_made().ranking


def test_the_mask_of_a_model() -> None:
    mask = hand_made().mask(EDGE_MAP)
    expected = torch.zeros(EDGE_MAP.mask.shape, dtype=torch.bool)
    for writer, reader in PATH:
        expected[EDGE_MAP.writer(writer), EDGE_MAP.reader(reader)] = True
    assert torch.equal(mask, expected)
    full = edge_graph()
    assert torch.equal(top_n(full, full.n_edges).mask(EDGE_MAP), EDGE_MAP.mask)


def test_masks_that_do_not_exist() -> None:
    with pytest.raises(UnknownNameError, match=r"no edge .*1 layers with 4 heads"):
        hand_made().mask(EdgeMap(1, 4, 2))
    with pytest.raises(UnknownNameError, match="The model has no edge"):
        hand_made().mask(EdgeMap(2, 4, 1))
    with pytest.raises(GemmaScopeError, match="nodes only, and no mask over edges"):
        top_n(node_graph(), 1).mask(EDGE_MAP)
    with pytest.raises(GemmaScopeError, match="edges at single positions, and no mask"):
        top_n(edge_graph(n_pos=2), 1).mask(EDGE_MAP)
    backwards = replace(hand_made().graph, edges=EdgeList.of([11], [1], [1.0], port=[1]))
    with pytest.raises(UnknownNameError, match=r"no edge 'L1H3->L0H0.q'"):
        top_n(backwards, 1).mask(EDGE_MAP)


@pytest.mark.parametrize("n", [-1, EDGE_MAP.n_edges + 1])
def test_a_circuit_of_more_edges_than_there_are_is_an_error(n: int) -> None:
    with pytest.raises(EmptySelectionError, match=f"{n} edges.*There is: {EDGE_MAP.n_edges} edges"):
        hand_made().top(n)


def test_a_circuit_of_edges_as_table_and_figure() -> None:
    circuit = hand_made()
    frame = circuit.to_frame()
    assert list(frame.columns)[0] == "rank" and list(frame.columns)[-1] == "kept"
    assert frame["rank"].tolist() == list(range(1, circuit.n_units + 1))
    assert frame["kept"].tolist() == [True] * 3 + [False] * (circuit.n_units - 3)
    assert frame.loc[1, ["source", "target", "port", "score"]].tolist() == [
        *("L0H1", "L1KV1", "v", -2.0),
    ]
    assert circuit.to_frame(2).equals(frame.head(2))
    title = f"Circuit for t: 3 of {EDGE_MAP.n_edges} edges, 1 against the metric"
    assert circuit.plot().layout.title.text == title
    assert circuit._repr_html_().count("<tr>") == 1 + 3


# ----------------------------------------------------------------------------------------- networkx
def test_a_circuit_of_edges_in_networkx() -> None:
    graph = hand_made().to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    links = {(a.label, b.label): d for a, b, d in graph.edges(data=True)}
    assert links == {
        ("embed", "L0H1"): {"port": "q", "score": 3.0},
        ("L0H1", "L1KV1"): {"port": "v", "score": -2.0},
        ("L1KV1", "L1H3"): {"port": "feeds", "score": 0.0},
        ("L1H3", "logits"): {"port": "", "score": 1.0},
    }
    assert graph.nodes[Node.head(1, 3)] == {"kind": "head", "label": "L1H3", "layer": 1}
    assert graph.nodes[Node.logits()] == {"kind": "logits", "label": "logits"}
    assert nx.has_path(graph, Node.embed(), Node.logits())
    assert graph.graph["task"] == "t"
    assert "".join(nx.generate_graphml(graph))


def test_positions_and_scores_of_nodes_in_networkx() -> None:
    circuit = top_n(edge_graph(n_pos=2), 5)
    data = [d for _, _, d in circuit.to_networkx().edges(data=True) if d["port"] != "feeds"]
    assert len(data) == 5
    assert {d["pos"] for d in data} <= {0, 1}
    nodes = top_n(node_graph(), 3).to_networkx()
    assert nodes.number_of_nodes() == 3 and nodes.number_of_edges() == 0
    assert all(isinstance(d["score"], float) for _, d in nodes.nodes(data=True))


def test_networkx_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(MissingExtraError, match="pip install networkx"):
        hand_made().to_networkx()
