"""Attribution graphs against circuit-tracer 0.5.0's own, stored with the model that they are of."""

from __future__ import annotations

import numpy as np
import pytest

from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.tracing.trace import trace
from tests.circuits.golden import CASES, Golden, golden


@pytest.fixture(scope="module", params=CASES)
def stored(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


@pytest.fixture(scope="module")
def graph(stored: Golden) -> Graph:
    # whoever made the file leaves out the first token, whatever it is
    special = int(stored.tokens[0])
    targets = stored.logit_tokens.tolist()
    return trace(
        stored.model, stored.tokens, stored.transcoders, targets=targets, exclude=(special,)
    )


def places(graph: Graph, stored: Golden) -> np.ndarray:
    """Our node for each of theirs; -1 for errors at the first token, which are zero there."""
    nodes = graph.nodes
    keys = {
        (row.kind, row.layer, row.pos, row.index): place
        for place, row in enumerate(nodes.itertuples(index=False))
    }
    n_layers, n_pos = len(stored.transcoders), len(stored.tokens)
    ids = stored.tokens.tolist()
    active = [tuple(row) for row in stored.active_features.tolist() if row[1]]
    nodes = [keys[("feature", *row)] for row in active]
    assert len(nodes) == stored.n_features, "features at the first token are not nodes"
    nodes += [keys.get(("error", i, p, -1), -1) for i in range(n_layers) for p in range(n_pos)]
    nodes += [keys["token", -1, p, ids[p]] for p in range(n_pos)]
    last = n_pos - 1
    return np.array(
        [*nodes, *(keys["target", n_layers, last, int(t)] for t in stored.logit_tokens)]
    )


def in_peer_order(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values of our nodes in their order, zero where we have no node."""
    return np.where(at >= 0, values[at], 0)


def test_the_same_features_are_active(graph: Graph, stored: Golden) -> None:
    features = graph.nodes[graph.where("feature")]
    got = features.sort_values(["layer", "pos", "index"])
    expected = stored.active_features.numpy()
    np.testing.assert_array_equal(got[["layer", "pos", "index"]].to_numpy(), expected)
    np.testing.assert_allclose(
        got["activation"], stored.activation_values.numpy(), rtol=1e-4, atol=1e-5
    )


def test_adjacency(graph: Graph, stored: Golden) -> None:
    at = places(graph, stored)
    dense = graph.adjacency.toarray()
    got = dense[np.ix_(at, at)]
    got[at < 0] = got[:, at < 0] = 0
    expected = stored.adjacency.numpy()
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_influence_and_scores(graph: Graph, stored: Golden) -> None:
    at = places(graph, stored)
    np.testing.assert_allclose(
        graph.weights[at[stored.targets]], stored.logit_probabilities.numpy(), rtol=1e-5
    )
    np.testing.assert_allclose(
        in_peer_order(graph.influence, at), stored.node_influence.numpy(), rtol=1e-4, atol=1e-6
    )
    assert graph.scores.replacement == pytest.approx(stored.replacement_score, rel=1e-5)
    assert graph.scores.completeness == pytest.approx(stored.completeness_score, rel=1e-5)


def test_pruning(graph: Graph, stored: Golden) -> None:
    at = places(graph, stored)
    for pruned in stored.pruned:
        masks = graph.prune_masks(pruned.node_threshold, pruned.edge_threshold)
        np.testing.assert_array_equal(in_peer_order(masks.nodes, at), pruned.node_mask.numpy())
        dense = masks.edges.matrix.toarray() != 0
        rows = np.where(at >= 0, masks.edges.row_of[at], -1)
        got = np.where((rows >= 0)[:, None], dense[rows][:, at], False) & (at >= 0)
        np.testing.assert_array_equal(got, pruned.edge_mask.numpy())
