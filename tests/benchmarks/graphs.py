"""How long do graphs of many edges take to be saved, opened and pruned?

    python -m tests.benchmarks.graphs [--edges 5000000] [--smoke]

Random graphs on one thread: rows of a trace with 20,000 nodes, and a list of edges with ports between
16,000 features. Opening means all of it: the digest, every check, arrays that are ready for use; it may
take a second for 5 million edges. Medians of five, after one that does not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from gemmascope_plugin.causes import FeatureId
from gemmascope_plugin.graphs import Graph, Node
from gemmascope_plugin.graphs.adjacency import Adjacency, EdgeList

N_TOKENS, N_TARGETS = 1000, 10
REPEATS = 5


def trace_graph(n_edges: int, n_nodes: int = 20_000) -> Graph:
    """Rows of equal length from random earlier nodes."""
    random, places = np.random.default_rng(0), np.arange(n_nodes)
    n_inner = n_nodes - N_TOKENS - N_TARGETS
    kind = np.repeat(["token", "feature", "target"], [N_TOKENS, n_inner, N_TARGETS])
    is_inner = kind == "feature"
    columns = {
        "id": np.array([f"node {i}" for i in places]),
        "kind": kind,
        "site": np.where(is_inner, "blocks.1.hook_mlp_out", ""),
        "layer": np.where(is_inner, 1, -1),
        "pos": places % N_TOKENS,
        "index": places,
        "activation": np.ones(n_nodes),
        "weight": (kind == "target") / N_TARGETS,
        "label": np.array([f"word {i}" for i in places]),
    }
    rows = places[N_TOKENS:]
    size = min(n_edges // len(rows), N_TOKENS)
    picks = [np.sort(random.choice(row, size, replace=False)) for row in rows]
    ends = np.arange(len(rows) + 1) * size
    data = random.normal(size=size * len(rows)).astype(np.float32)
    matrix = sp.csr_array((data, np.concatenate(picks), ends), shape=(len(rows), n_nodes))
    return Graph(columns, Adjacency(matrix, rows), ("a",) * N_TOKENS)


def component_graph(n_edges: int, n_nodes: int = 16_000) -> Graph:
    """Edges from every node of the first half to as many of the second."""
    sites = [f"blocks.{layer}.hook_mlp_out" for layer in range(4)]
    features = [FeatureId(site, i) for site in sites for i in range(n_nodes // 4)]
    half = n_nodes // 2
    size = max(1, n_edges // half)
    weights = np.random.default_rng(0).normal(size=size * half)
    edges = EdgeList.of(
        np.repeat(np.arange(half), size),
        half + np.tile(np.arange(size), half),
        weights,
        port=np.zeros(size * half),
    )
    return Graph.of_nodes([Node.of_feature(feature) for feature in features], None, edges=edges)


def median(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        del result
    return statistics.median(times[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=5_000_000)
    parser.add_argument("--smoke", action="store_true", help="a small case, to see that it runs")
    options = parser.parse_args(arguments)
    n_edges = 50_000 if options.smoke else options.edges
    torch.set_num_threads(1)
    graphs = {"trace": trace_graph(n_edges), "components": component_graph(n_edges)}
    for name, graph in graphs.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph"
            save = median(lambda path=path, graph=graph: graph.save(path))
            load = median(lambda path=path: Graph.load(path))
            size = path.stat().st_size / 1e6
            assert Graph.load(path).n_edges == graph.n_edges
        print(
            f"{name}: {graph.n_edges} edges, {size:.0f} MB: saved {save:.2f} s, opened {load:.2f} s"
        )
    start = time.perf_counter()
    graphs["trace"].prune()
    print(f"trace: pruned {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
