"""The nodes of a circuit of features: which is which, and what each is worth.

Nodes of a site lie side by side in the graph, those that are written first and within them by position,
then its errors. A *key* numbers them within a site: ``index``, or ``position * n + index`` where
positions are told apart, with ``n`` the number of features, heads, or 1.

Of a graph of features ``metadata["sites"]`` says of every site its kind and how many features its
dictionary has; ``metadata["per_position"]`` whether nodes have positions, ``metadata["level"]`` which
prefix of nested dictionaries they are of.

Scores, from slopes at the sites:

1. A feature is a node if it is active in any prompt, clean or corrupted, at a token that its dictionary
   works on; with ``per_position`` each position is a node of its own.
2. Its score is the sum over tokens, and the mean over prompts, of ``(a - a') <W_f, g>``; that of an
   error ``(e - e') . g``, one number a token; that of a head ``(z - z') . g_z``.
3. Features that are active in the corrupted runs only are counted: their clean activation is 0, their
   slope is that of any other (see ``causes/gradient/site_runs.py``).
4. What the scores of a site sum to, and what replacing the whole site does, is in the metadata.

Cost: one small object per node; ``2 * active * width`` operations, nothing of size ``d_sae``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64

from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.gradient.site_runs import PartRun, SiteRun
from gemmascope_plugin.causes.gradient.task_site import (
    Tally,
    TaskSite,
    keys_of,
    sites_of,
    slopes_of_entries,
)
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    TaskError,
    UnknownNameError,
    WidthMismatchError,
)
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.node import FeatureId, Node
from gemmascope_plugin.models.points import n_heads
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.hooked_sae import Saes


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
        nodes = [make(i) for i in self.index.tolist()]
        nodes += [Node.error(self.site.hook) for _ in range(len(self.errors))]
        if not self.per_position:
            return nodes
        positions = [*self.pos.tolist(), *self.errors.tolist()]
        return [node.at(pos) for node, pos in zip(nodes, positions, strict=True)]

    def _feature(self, index: int) -> Node:
        return Node.of_feature(FeatureId(self.site.hook, index))

    def _head(self, index: int) -> Node:
        return Node.head(self.site.layer, index)

    def _mlp(self, index: int) -> Node:
        return Node.mlp(self.site.layer)


def n_of(site: TaskSite, heads: int) -> int:
    """How many nodes a site has at a position, errors aside."""
    return {"feature": site.d_sae, "head": heads, "mlp": 1}[site.kind]


def layout_of(
    nodes: Sequence[Node], sites: Sequence[TaskSite], heads: int, per_position: bool
) -> tuple[SiteNodes, ...]:
    """The nodes of a graph by site, checked to be those of these sites."""
    by_hook: Mapping[str, list[Node]] = {site.hook: [] for site in sites}
    for node in nodes:
        if node.site not in by_hook:
            raise UnknownNameError(
                f"The circuit has {node.label}, and there is no dictionary for {node.site}",
                exists=", ".join(by_hook),
                fix="saes=[the dictionaries that the circuit was found with]",
            )
        by_hook[node.site].append(node)
    layout, start = [], 0
    for site in sites:
        at_site = _site_nodes(site, by_hook[site.hook], n_of(site, heads), per_position, start)
        start = at_site.stop
        layout.append(at_site)
    ordered = [node for at_site in layout for node in at_site.nodes()]
    assert ordered == list(nodes), "the nodes are in another order than the sites"
    return tuple(layout)


def _site_nodes(
    site: TaskSite, nodes: Sequence[Node], n: int, per_position: bool, start: int
) -> SiteNodes:
    units = [node for node in nodes if node.kind != "error"]
    largest = max((node.index for node in units), default=-1)
    if largest >= n:
        raise GemmaScopeError(
            f"The circuit has feature {largest} of the dictionary for {site.hook}",
            exists=f"a dictionary of {n} features",
            fix="the dictionaries, and the level, that the circuit was found with",
        )
    keys = torch.tensor([(node.pos or 0) * n + node.index for node in units], dtype=torch.int64)
    errors = [node.pos or 0 for node in nodes if node.kind == "error"]
    return SiteNodes(site, n, keys, torch.tensor(errors, dtype=torch.int64), per_position, start)


def is_feature_graph(graph: Graph) -> bool:
    """Whether nodes are parts of sites, as ``discover(..., nodes="features")`` makes them."""
    return "sites" in graph.metadata


def layout_of_graph(graph: Graph, model: HookedModel, saes: Saes) -> tuple[SiteNodes, ...]:
    """The nodes of a graph of features by site."""
    if saes is None:
        raise UnknownNameError(
            "The circuit has features", fix="evaluate(..., saes=[the same dictionaries])"
        )
    expected: Mapping[str, tuple[str, int]] = graph.metadata["sites"]
    raw = sorted({kind for kind, _ in expected.values() if kind != "feature"})
    sites = sites_of(model, saes, raw, level=graph.metadata["level"])
    actual = {site.hook: (site.kind, site.d_sae) for site in sites}
    same_hooks = actual.keys() == expected.keys()
    if not same_hooks or any(actual[hook][0] != expected[hook][0] for hook in expected):
        differing = set(actual.items()) ^ {(hook, tuple(site)) for hook, site in expected.items()}
        raise UnknownNameError(
            f"The dictionaries are not those of the circuit, which differ at {min(differing)[0]}",
            exists=", ".join(hook for hook, (kind, _) in expected.items() if kind == "feature"),
            fix="saes=[the dictionaries that the circuit was found with]",
        )
    for hook, (_, d_sae) in expected.items():
        if actual[hook][1] != d_sae:
            raise WidthMismatchError(
                f"The dictionary for {hook} has {actual[hook][1]} features, the circuit's has {d_sae}",
                fix="the dictionaries, and the level, that the circuit was found with",
            )
    return layout_of(graph.components, sites, n_heads(model), graph.metadata["per_position"])


def check_prompts(graph: Graph, bound: BoundTask) -> None:
    """Refuses prompts that the positions of a graph do not fit."""
    if not graph.metadata["per_position"]:
        return
    lengths = bound.prompt_lengths.unique().tolist()
    n_pos = graph.metadata["n_pos"]
    if lengths != [n_pos]:
        raise TaskError(
            f"The nodes of the circuit have positions in prompts of {n_pos} tokens, and these have "
            f"{' or '.join(map(str, lengths))}",
            fix="prompts of the same template and length, or a circuit with per_position=False",
        )


@dataclass(frozen=True, eq=False)
class ScoredNodes:
    """All nodes of a task and their scores."""

    layout: tuple[SiteNodes, ...]
    scores: Float32[torch.Tensor, " node"]
    corrupt_only: dict[str, int]
    """Features that are active in corrupted runs only, and entries (one feature at one token)."""


@torch.no_grad()
def score_nodes(
    parts: Sequence[PartRun], *, n_heads: int, per_position: bool, errors: bool
) -> ScoredNodes:
    """Every node with its score."""
    n_prompts = sum(len(part.bound) for part in parts)
    layout, scores, start = [], [], 0
    counts = {"features": 0, "entries": 0}
    for i, site in enumerate(run.site for run in parts[0].sites):
        runs = [part.sites[i] for part in parts]
        n = n_of(site, n_heads)
        tally = _tally(runs, n, per_position)
        error = _errors(runs, per_position) if errors and site.kind == "feature" else tally.sums[:0]
        places = torch.arange(len(error))
        nodes = SiteNodes(site, n, tally.keys, places, per_position, start)
        start = nodes.stop
        layout.append(nodes)
        scores += [tally.sums / n_prompts, error / n_prompts]
        if site.kind == "feature":
            for name, count in _corrupt_only(runs).items():
                counts[name] += count
    if not any(len(nodes.keys) for nodes in layout if nodes.site.kind == "feature"):
        raise EmptySelectionError(
            f"No feature of {len(layout)} sites is active on any of {n_prompts} prompts",
            fix="other prompts, or dictionaries that fit the model: gemmascope_plugin.verify",
        )
    return ScoredNodes(tuple(layout), torch.cat(scores).float(), counts)


def residuals(parts: Sequence[PartRun], gap: float) -> dict[str, float]:
    """By site: what the scores miss of the effect of replacing it whole, as a share of the gap."""
    residual = {}
    for i, first in enumerate(parts[0].sites):
        runs = [part.sites[i] for part in parts]
        if first.whole is None:
            continue
        missing = [_whole(run) - run.whole for run in runs if run.whole is not None]
        residual[first.site.hook] = float(torch.cat(missing).mean()) / gap
    return residual


def _whole(run: SiteRun) -> Float[torch.Tensor, " prompt"]:
    return (run.moved * run.slope).sum((1, 2))


def _tally(runs: Sequence[SiteRun], n: int, per_position: bool) -> Tally:
    """Sums of effects by key."""
    tally = Tally()
    for run in runs:
        if run.site.kind != "feature":
            _add_raw(tally, run, n, per_position)
            continue
        for sign, values in ((1, run.clean), (-1, run.corrupt)):
            acts = values.acts
            assert acts is not None
            slopes = slopes_of_entries(acts, run.site.coder.W_dec, run.slope)
            tally.add(keys_of(acts, per_position), sign * acts.values.to(slopes.dtype) * slopes)
    return tally


def _add_raw(tally: Tally, run: SiteRun, n: int, per_position: bool) -> None:
    """Effects of heads, or of the MLP."""
    product = (run.moved * run.slope).unflatten(2, (n, -1)).sum((0, 3))
    values = product if per_position else product.sum(0)
    tally.add(torch.arange(values.numel()), values.flatten())


def _errors(runs: Sequence[SiteRun], per_position: bool) -> Float[torch.Tensor, " error"]:
    """Effects of errors, by position or of all at once."""
    total: Any = 0
    for run in runs:
        product = (run.error_moved * run.slope).sum((0, 2)).double().cpu()
        total = total + (product if per_position else product.sum(0, keepdim=True))
    return total


def _corrupt_only(runs: Sequence[SiteRun]) -> dict[str, int]:
    """Features, and entries, that are active in corrupted runs and not in clean ones."""
    entries, clean, corrupt = 0, [], []
    for run in runs:
        assert run.clean.acts is not None and run.corrupt.acts is not None
        tokens = [
            acts.rows * acts.d_sae + acts.indices for acts in (run.clean.acts, run.corrupt.acts)
        ]
        entries += _missing(tokens[1], tokens[0])
        clean.append(run.clean.acts.indices)
        corrupt.append(run.corrupt.acts.indices)
    return {
        "features": _missing(torch.cat(corrupt).unique(), torch.cat(clean).unique()),
        "entries": entries,
    }


def _missing(indices: Int64[torch.Tensor, " n"], others: Int64[torch.Tensor, " m"]) -> int:
    return int((~torch.isin(indices, others)).sum())


def site_summary(sites: Sequence[TaskSite]) -> dict[str, Any]:
    """Sites as a circuit's metadata keep them: hook to kind and number of features."""
    return {site.hook: (site.kind, site.d_sae) for site in sites}
