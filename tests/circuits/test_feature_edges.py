"""Edges between features equal vector-Jacobian products taken one by one, and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.causes.gradient.site_paths import sources_of
from gemmascope_plugin.causes.gradient.site_runs import METHODS, run_sites
from gemmascope_plugin.causes.gradient.task_site import sites_of
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.circuits import discover
from gemmascope_plugin.circuits.feature_edges import MAX_GATE
from gemmascope_plugin.graphs import Circuit
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.models import flatten_heads, restore_heads
from tests import factories
from tests.causes.tasks import CLEAN, CORRUPT, RIGHT, WRONG
from tests.circuits.feature_slow import caches, dense, dictionaries

TASK = Task(CLEAN, CORRUPT, logit_diff(RIGHT, WRONG), name="random")
SIZE = 24


def found(model: Any, **options: Any) -> Circuit:
    arguments = {"nodes": ("features", "head", "mlp"), "saes": dictionaries(model), **options}
    steps = {} if options.get("method") == "atp" else {"steps": 2}
    return discover(model, TASK, **{**steps, **arguments})


def weights(circuit: Circuit) -> dict[tuple[Node, Node], float]:
    graph = circuit.graph
    ends = zip(
        graph.source.tolist(), graph.target.tolist(), graph.edge_scores.tolist(), strict=True
    )
    return {(graph.components[s], graph.components[t]): w for s, t, w in ends}


class Slow:
    """The same from the definition: all sites but one are held in the whole model."""

    def __init__(self, model: Any, finite_differences: bool, method: str) -> None:
        self.model, self.finite_differences = model, finite_differences
        self.sites = sites_of(model, dictionaries(model), ("head", "mlp"))
        self.place = {site.hook: i for i, site in enumerate(self.sites)}
        self.clean, self.corrupt = (
            caches(model, self.sites, tokens) for tokens in (CLEAN, CORRUPT)
        )
        limit = Limit(64, None)
        chosen = METHODS[method](**({"steps": 2} if method == "ig" else {}))
        (part,) = run_sites(model, TASK.bind(model), self.sites, method=chosen, limit=limit)
        self.slopes = {run.site.hook: run.slope for run in part.sites}

    def read(self, node: Node, values: dict[str, Any]) -> torch.Tensor:
        """``dm/dd * d`` of every prompt, linear in features' pre-activations."""
        site = self.sites[self.place[node.site]]
        slope, y = self.slopes[node.site], flatten_heads(values[node.site])
        at = torch.zeros(CLEAN.shape[1])
        at[slice(None) if node.pos is None else node.pos] = 1
        if node.kind == "head":
            is_head = torch.zeros(slope.shape[-1]).unflatten(0, (-1, y.shape[-1] // 4))
            is_head[node.index] = 1
            return (slope * is_head.flatten() * y * at[:, None]).sum((1, 2))
        if node.kind == "mlp":
            return (slope * y * at[:, None]).sum((1, 2))
        assert site.reads is not None
        x = flatten_heads(site.reads(values[site.reads.hook]))
        if node.kind == "error":
            error = y - dense(site, x, CLEAN).to(y) @ site.coder.W_dec
            return (slope * error * at[:, None]).sum((1, 2))
        slope = slope @ site.coder.W_dec[node.index]
        pre = x @ site.coder.W_enc[:, node.index]
        return (slope * self.gate(site, node) * pre * at).sum(1)

    def gate(self, site: Any, node: Node) -> torch.Tensor:
        ends = [cache[node.site][1][..., node.index] for cache in (self.clean, self.corrupt)]
        gate = (ends[0] > 0).to(ends[0])
        if not self.finite_differences:
            return gate
        pre = []
        for tokens in (CLEAN, CORRUPT):
            with torch.no_grad():
                _, cache = self.model.run_with_cache(tokens, names_filter=[site.reads.hook])
            x = flatten_heads(site.reads(cache[site.reads.hook]))
            pre.append(x @ site.coder.W_enc[:, node.index])
        one_sided = (ends[0] > 0) != (ends[1] > 0)
        ratio = (ends[1] - ends[0]) / torch.where(one_sided, pre[1] - pre[0], 1.0)
        return torch.where(one_sided, ratio.clamp(0, MAX_GATE), gate)

    def moved(self, node: Node) -> torch.Tensor:
        """``u - u'`` as it is written at its site, ``[prompt, pos, width]``."""
        (y, a, e), (y_new, a_new, e_new) = self.clean[node.site], self.corrupt[node.site]
        if node.kind == "head":
            whole = torch.zeros_like(y)
            whole[:, :, node.index] = (y - y_new)[:, :, node.index]
            out = flatten_heads(whole)
        elif node.kind == "mlp":
            out = y - y_new
        elif node.kind == "error":
            out = e - e_new
        else:
            site = self.sites[self.place[node.site]]
            out = (a - a_new)[..., [node.index]] * site.coder.W_dec[node.index]
        at = torch.zeros(CLEAN.shape[1])
        at[slice(None) if node.pos is None else node.pos] = 1
        return out * at[:, None]

    def values(self, source: Node, target: Node, add: torch.Tensor) -> dict[str, Any]:
        """A run with something added at the source and every site between held at its clean value."""
        low, high = self.place[source.site], self.place[target.site]
        held: dict[str, Any] = {}

        def hold(site):
            return lambda y, hook: self.clean[site.hook][0]

        def start(y, hook):
            return y + restore_heads(add, y)

        def keep(name):
            def fn(x, hook):
                held[name] = x

            return fn

        hooks: list[Any] = [(source.site, start)]
        hooks += [(site.hook, hold(site)) for site in self.sites[low + 1 : high]]
        site = self.sites[high]
        hooks.append((target.site, keep(target.site)))
        if site.reads is not None and site.reads.hook != target.site:
            hooks.append((site.reads.hook, keep(site.reads.hook)))
        with self.model.hooks(fwd_hooks=hooks):
            self.model(CLEAN)
        return held

    def edge(self, source: Node, target: Node) -> float:
        """One vector-Jacobian product."""
        y = self.clean[source.site][0]
        add = torch.zeros_like(flatten_heads(y)).requires_grad_()
        value = self.read(target, self.values(source, target, add)).sum()
        (grad,) = torch.autograd.grad(value, add, allow_unused=True)
        return 0.0 if grad is None else float((grad * self.moved(source)).sum()) / len(CLEAN)


def joined(sites: Any, source: Node, target: Node) -> bool:
    by_hook = {site.hook: site for site in sites}
    return by_hook[source.site] in sources_of(sites, by_hook[target.site])


@pytest.mark.parametrize(
    ("method", "per_position"), [("ig", False), ("ig", True), ("atp", False)], ids=str
)
def test_edges_are_direct_paths(hooked2, method: str, per_position: bool) -> None:
    circuit = found(hooked2, method=method, per_position=per_position, size=SIZE)
    slow, edges = Slow(hooked2, method == "ig", method), weights(circuit)
    is_kept = circuit.nodes
    pairs = [(u, d) for u in is_kept for d in is_kept if joined(slow.sites, u, d)]
    assert {pair for pair in edges} <= set(pairs)
    sizes = []
    for u, d in pairs[:: max(1, len(pairs) // 40)]:
        expected = slow.edge(u, d)
        assert edges.get((u, d), 0.0) == pytest.approx(expected, abs=2e-6, rel=1e-4)
        sizes.append(abs(expected))
    assert max(sizes) > 1e-3


def test_edges_are_finite_differences(double) -> None:
    """In float64, of what a target reads, along each source's own difference."""
    circuit, slow = found(double, size=SIZE), Slow(double, True, "ig")
    edges = weights(circuit)
    step, checked = 1e-4, 0
    largest = sorted(edges, key=lambda pair: -abs(edges[pair]))
    for u, d in [pair for pair in largest if pair[1].kind != "error"][:12]:
        moved = slow.moved(u)
        with torch.no_grad():
            values = [slow.read(d, slow.values(u, d, sign * step * moved)) for sign in (1, -1)]
        slope = float((values[0] - values[1]).mean()) / (2 * step)
        assert edges[u, d] == pytest.approx(slope, rel=1e-4, abs=1e-7)
        checked += 1
    assert checked == 12


def test_which_sites_are_joined(hooked2) -> None:
    """Back to the last stream that is a site, through everything that is none."""
    sites = sites_of(hooked2, dictionaries(hooked2), ("head",))
    names = {site.hook: [first.hook for first in sources_of(sites, site)] for site in sites}
    assert names == {
        "blocks.0.attn.hook_z": [],
        "blocks.0.hook_resid_post": ["blocks.0.attn.hook_z"],
        "blocks.1.attn.hook_z": ["blocks.0.hook_resid_post"],
        "blocks.1.hook_mlp_out": ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"],
        "blocks.1.hook_resid_post": [
            *("blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"),
        ],
        "blocks.2.attn.hook_z": ["blocks.1.hook_resid_post"],
        "blocks.2.hook_mlp_out": ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"],
    }


def test_without_a_stream_edges_reach_back_to_the_first_site(hooked2) -> None:
    saes = [dictionaries(hooked2)[i] for i in (1, 2, 4)]
    sites = sites_of(hooked2, saes)
    assert [first.hook for first in sources_of(sites, sites[-1])] == [
        *("blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"),
    ]
    circuit = discover(hooked2, TASK, nodes="features", saes=saes, steps=2, size=SIZE)
    assert {(u.layer, d.layer) for u, d in weights(circuit)} >= {(1, 1), (1, 2)}


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_both_model_classes_give_the_same_circuit(family: str) -> None:
    """Scores and edges, and in batches of other sizes."""
    hooked, bridge = (factories.tiny_model(family, backend) for backend in ("hooked", "bridge"))
    first = found(hooked, size=10)
    other = found(bridge, size=10, saes=dictionaries(hooked), max_rows=6)
    assert first.graph.components == other.graph.components and first.nodes == other.nodes
    assert torch.allclose(first.graph.node_scores, other.graph.node_scores, atol=1e-5)
    found_there = weights(other)
    assert len(found_there) > 5
    for pair, weight in weights(first).items():
        assert found_there.get(pair, 0.0) == pytest.approx(weight, abs=1e-5)


def test_features_that_no_edge_reaches_are_counted(hooked2) -> None:
    """Active in corrupted runs only, they have no slope at the clean run."""
    circuit = found(hooked2, method="atp", size=200)
    slow = Slow(hooked2, False, "atp")
    dead = [
        node
        for node in circuit.nodes
        if node.kind == "feature" and not slow.clean[node.site][1][..., node.index].any()
    ]
    assert circuit.metadata["n_unreachable"] >= len(dead) > 0
    assert not {d for _, d in weights(circuit)} & set(dead)
