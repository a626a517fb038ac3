"""Exact effects of edges and nodes, one forward pass each: slow, obvious, plain hooks only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch

from gemmascope_plugin.causes import Task
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import Node, Reader
from gemmascope_plugin.models.anatomy import Anatomy
from tests.ground_truth.build import Edge

Hook = tuple[str, Callable[..., torch.Tensor]]


class Brute:
    """A base run in which one edge or node at a time gets the value of the other run.

    Args:
        model: Either class.
        task: Clean and corrupted prompts and the metric.
        denoising: The base run is the corrupted one, the other the clean one; else the reverse.
    """

    def __init__(self, model: Any, task: Task, *, denoising: bool = False) -> None:
        bound = task.bind(model)
        runs = (bound.corrupt, bound.clean) if denoising else (bound.clean, bound.corrupt)
        self.model, self.metric, self.anatomy = model, bound.metric, Anatomy(model)
        self.tokens = runs[0]
        with torch.no_grad():
            self.base, self.other = (model.run_with_cache(tokens)[1] for tokens in runs)
            self.before, after = (float(self.metric(model(tokens)).mean()) for tokens in runs)
        self.gap = after - self.before

    @cached_property
    def edges(self) -> dict[Edge, float]:
        """Change of the metric under each edge alone, as a share of the change under the whole input."""
        edges = EdgeMap.of(self.anatomy)
        return {
            (writer, reader): self._change([self._edge(writer, reader)])
            for row, writer in enumerate(edges.writers)
            for column, reader in enumerate(edges.readers)
            if edges.mask[row, column]
        }

    @cached_property
    def nodes(self) -> dict[Node, float]:
        """The same for the output of each node."""
        return {node: self.together([node]) for node in EdgeMap.of(self.anatomy).writers}

    def together(self, nodes: Iterable[Node]) -> float:
        """The same for the outputs of several nodes at once."""
        return self._change([self._node(node) for node in nodes])

    def difference(self, writer: Node) -> torch.Tensor:
        """What the stream would gain if this writer alone wrote what it does in the other run."""
        base, other = self.base[writer.hook], self.other[writer.hook]
        if writer.kind != "head":
            return other - base
        layer, head = writer.layer, writer.index
        post = self.anatomy.norm(layer, "ln1_post")
        assert post is not None
        a = self.anatomy.head_sum(layer, base)
        moved = (other - base)[:, :, head] @ self.anatomy.W_O(layer)[head]
        return post(a + moved) - post(a)

    @torch.no_grad()
    def _change(self, hooks: list[Hook]) -> float:
        with warnings.catch_warnings(), self.model.hooks(fwd_hooks=hooks):
            # of the bridge, that an edited ln2.hook_normalized differs by rounding
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
            after = float(self.metric(self.model(self.tokens)).mean())
        return (after - self.before) / self.gap

    def _node(self, node: Node) -> Hook:
        def patch(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x, other = x.clone(), self.other[node.hook]
            if node.kind == "head":
                x[:, :, node.index] = other[:, :, node.index]
                return x
            return other

        return node.hook, patch

    def _edge(self, writer: Node, reader: Reader) -> Hook:
        d, node = self.difference(writer), reader.node
        if node.kind == "logits":
            return f"blocks.{self.anatomy.n_layers - 1}.hook_resid_post", lambda x, hook: x + d
        if node.kind == "mlp":
            ln2 = self.anatomy.norm(node.layer, "ln2")
            assert ln2 is not None
            x = self.base[f"blocks.{node.layer}.hook_resid_mid"] + d
            return f"blocks.{node.layer}.ln2.hook_normalized", lambda _, hook: x / ln2.scale(x)
        ln1 = self.anatomy.norm(node.layer, "ln1")
        assert ln1 is not None
        x = self.base[f"blocks.{node.layer}.hook_resid_pre"]
        weight = {"q": self.anatomy.W_Q, "k": self.anatomy.W_K, "v": self.anatomy.W_V}[reader.port]
        moved = (ln1(x + d) - ln1(x)) @ weight(node.layer)[node.index]

        def read(values: torch.Tensor, hook: Any) -> torch.Tensor:
            values = values.clone()
            values[:, :, node.index] += moved
            return values

        return f"blocks.{node.layer}.attn.hook_{reader.port}", read
