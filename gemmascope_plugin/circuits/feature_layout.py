"""Which node is which: sites, keys and positions on one side, places in a graph on the other.

Nodes of a site lie side by side in the graph, those that are written first and within them by position,
then its errors. A *key* numbers them within a site: ``index``, or ``position * n + index`` where
positions are told apart, with ``n`` the number of features, heads, or 1.

Cost: one small object per node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int64

from gemmascope_plugin.causes.gradient.task_site import TaskSite
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.graphs.node import FeatureId, Node


@dataclass(frozen=True, eq=False)
class SiteNodes:
    """The nodes of one site."""

    site: TaskSite
    n: int
    """Features, heads, or 1."""
    keys: Int64[torch.Tensor, " key"]
    """Of features, heads or MLPs, ascending."""
    errors: Int64[torch.Tensor, " error"]
    """Positions of the errors, ascending; 0 alone where positions are not told apart."""
    per_position: bool
    start: int
    """Place of the first one in the graph."""

    @property
    def stop(self) -> int:
        """Place after the last one."""
        return self.start + len(self.keys) + len(self.errors)

    @property
    def features(self) -> slice:
        """Places of features, heads or MLPs in the graph."""
        return slice(self.start, self.start + len(self.keys))

    @property
    def error_places(self) -> slice:
        """Places of errors."""
        return slice(self.start + len(self.keys), self.stop)

    @cached_property
    def index(self) -> Int64[torch.Tensor, " key"]:
        """Feature or head of every key."""
        return self.keys % self.n

    @cached_property
    def pos(self) -> Int64[torch.Tensor, " key"]:
        """Position of every key; 0 where they are not told apart."""
        return self.keys // self.n

    def nodes(self) -> list[Node]:
        """The nodes, in the order of the graph."""
        make = {"feature": self._feature, "head": self._head, "mlp": self._mlp}[self.site.kind]
        own = [make(i) for i in self.index.tolist()] + [
            Node.error(self.site.hook) for _ in range(len(self.errors))
        ]
        if not self.per_position:
            return own
        places = [*self.pos.tolist(), *self.errors.tolist()]
        return [node.at(pos) for node, pos in zip(own, places, strict=True)]

    def _feature(self, index: int) -> Node:
        return Node.of_feature(FeatureId(self.site.hook, index))

    def _head(self, index: int) -> Node:
        return Node.head(self.site.layer, index)

    def _mlp(self, index: int) -> Node:
        return Node.mlp(self.site.layer)


def n_of(site: TaskSite, n_heads: int) -> int:
    """How many nodes a site has at a position, errors aside."""
    return {"feature": site.d_sae, "head": n_heads, "mlp": 1}[site.kind]


def layout_of(
    nodes: Sequence[Node], sites: Sequence[TaskSite], n_heads: int, per_position: bool
) -> tuple[SiteNodes, ...]:
    """The nodes of a graph by site, checked to be those of these sites.

    Args:
        nodes: Nodes of a graph of features, in its order.
        sites: Sites of a model with dictionaries, in forward order.
        n_heads: Heads of a layer.
        per_position: Whether the nodes have positions.

    Raises:
        UnknownNameError: Nodes at a place where there is no site.
        GemmaScopeError: A feature outside its dictionary.
    """
    by_hook: Mapping[str, list[Node]] = {site.hook: [] for site in sites}
    for node in nodes:
        if node.site not in by_hook:
            raise UnknownNameError(
                f"The circuit has {node.label}, and there is no dictionary for {node.site}",
                exists=", ".join(by_hook),
                fix="saes=[the dictionaries that the circuit was found with]",
            )
        by_hook[node.site].append(node)
    found, start = [], 0
    for site in sites:
        made = _site_nodes(site, by_hook[site.hook], n_of(site, n_heads), per_position, start)
        start = made.stop
        found.append(made)
    ordered = [node for site in found for node in site.nodes()]
    assert ordered == list(nodes), "the nodes are in another order than the sites"
    return tuple(found)


def _site_nodes(
    site: TaskSite, nodes: Sequence[Node], n: int, per_position: bool, start: int
) -> SiteNodes:
    own = [node for node in nodes if node.kind != "error"]
    if own and max(node.index for node in own) >= n:
        raise GemmaScopeError(
            f"The circuit has feature {max(node.index for node in own)} of the dictionary for "
            f"{site.hook}",
            exists=f"a dictionary of {n} features",
            fix="the dictionaries, and the level, that the circuit was found with",
        )
    keys = torch.tensor([(node.pos or 0) * n + node.index for node in own], dtype=torch.int64)
    errors = [node.pos or 0 for node in nodes if node.kind == "error"]
    return SiteNodes(site, n, keys, torch.tensor(errors, dtype=torch.int64), per_position, start)
