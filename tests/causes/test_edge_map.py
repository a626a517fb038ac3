"""Writers, readers and edges: counts, order, and who can reach whom."""

from __future__ import annotations

import pytest

from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import Node, Reader
from gemmascope_plugin.models.anatomy import Anatomy

GEMMA_2_2B = EdgeMap(26, 8, 4)


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "n_kv", "edges"),
    [(12, 12, 12, 32_491), (26, 8, 8, 74_218), (26, 8, 4, 50_610), (18, 4, 1, 5_644)],
)
def test_counts_of_known_models(n_layers: int, n_heads: int, n_kv: int, edges: int) -> None:
    assert EdgeMap(n_layers, n_heads, n_kv).n_edges == edges


def test_sizes() -> None:
    assert len(GEMMA_2_2B.writers) == 235
    assert len(GEMMA_2_2B.readers) == 26 * (8 + 2 * 4 + 1) + 1
    assert GEMMA_2_2B.mask.shape == (235, len(GEMMA_2_2B.readers))


def test_places_are_those_of_the_lists() -> None:
    edges = EdgeMap(3, 4, 2)
    for layer in range(3):
        assert edges.writers[edges.heads(layer)] == tuple(Node.head(layer, h) for h in range(4))
        assert edges.writers[edges.mlp(layer)] == Node.mlp(layer)
        assert edges.readers[edges.inputs(layer, "q")][3] == Reader(Node.head(layer, 3), "q")
        for port in ("k", "v"):
            assert edges.readers[edges.inputs(layer, port)][1] == Reader(Node.kv(layer, 1), port)
        assert edges.readers[edges.inputs(layer, "mlp")] == (Reader(Node.mlp(layer)),)
    assert edges.readers[edges.inputs(0, "logits")] == (Reader(Node.logits()),)
    assert all(edges.writer(node) == i for i, node in enumerate(edges.writers))
    assert all(edges.reader(reader) == i for i, reader in enumerate(edges.readers))


def test_edges_go_forward() -> None:
    edges = EdgeMap(2, 2, 1)

    def reaches(writer: Node, reader: Reader) -> bool:
        return bool(edges.mask[edges.writer(writer), edges.reader(reader)])

    assert reaches(Node.embed(), Reader(Node.head(0, 0), "q"))
    assert reaches(Node.head(0, 1), Reader(Node.mlp(0)))
    assert reaches(Node.mlp(0), Reader(Node.kv(1, 0), "v"))
    assert reaches(Node.mlp(1), Reader(Node.logits()))
    assert not reaches(Node.head(0, 1), Reader(Node.head(0, 0), "q"))
    assert not reaches(Node.mlp(0), Reader(Node.mlp(0)))
    assert not reaches(Node.head(1, 0), Reader(Node.mlp(0)))


def test_what_a_reader_feeds() -> None:
    edges = EdgeMap(2, 4, 2)

    def fed(reader: Reader) -> tuple[Node, ...]:
        start, stop = edges.feeds[edges.reader(reader)].tolist()
        return edges.writers[start:stop]

    assert fed(Reader(Node.head(1, 2), "q")) == (Node.head(1, 2),)
    assert fed(Reader(Node.kv(1, 1), "k")) == (Node.head(1, 2), Node.head(1, 3))
    assert fed(Reader(Node.mlp(0))) == (Node.mlp(0),)
    assert fed(Reader(Node.logits())) == ()


def test_labels() -> None:
    edges = EdgeMap(1, 2, 1)
    assert [node.label for node in edges.writers] == ["embed", "L0H0", "L0H1", "MLP0"]
    assert [reader.label for reader in edges.readers] == [
        *("L0H0.q", "L0H1.q", "L0KV0.k", "L0KV0.v", "MLP0", "logits"),
    ]


def test_the_map_of_a_model(model) -> None:
    assert EdgeMap.of(Anatomy(model)) == EdgeMap(3, 4, 2)
