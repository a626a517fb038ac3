"""Nodes: what writes to the residual stream or reads from it, and features of dictionaries.

======== =============================================== ============================== ===============
kind     what it is                                      hook                           index
======== =============================================== ============================== ===============
embed    the token embeddings                            ``hook_embed``                 0
head     one attention head's output                     ``blocks.L.attn.hook_z``       head
kv       one key-value head, shared by a group of heads  ``blocks.L.attn.hook_k``       key-value head
mlp      an MLP                                          ``blocks.L.hook_mlp_out``      0
feature  one feature of a spliced dictionary             ``<site>.hook_sae_acts_post``  feature
error    what a dictionary's features leave at its site  ``<site>.hook_sae_error``      0; -1 in traces
logits   the end of the residual stream                  ``unembed.hook_in``            0
token    an embedded token of a traced prompt            none                           token id
bias     constants of a traced model, over all tokens    its id in the graph            -1
target   a logit, a difference, a direction              its id in the graph            token id, or -1
======== =============================================== ============================== ===============

A node stands for all positions, or for one: ``pos``; in a trace all but biases have one. A graph has its
nodes as columns of arrays (:func:`node_columns`), in which -1 is every position, and the layer of what
has none.

Cost: one pass over the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from gemmascope_plugin.errors import EmptySelectionError, check_choice

if TYPE_CHECKING:
    import pandas as pd

NodeKind = Literal[
    "embed", "head", "kv", "mlp", "feature", "error", "logits", "token", "bias", "target"
]
TRACE_KINDS: tuple[NodeKind, ...] = ("token", "bias", "feature", "error", "target")
"""Kinds of the nodes of a trace."""
NODE_KINDS: tuple[NodeKind, ...] = ("head", "mlp", "feature")
"""Kinds that ``discover`` ranks."""
Port = Literal["", "q", "k", "v"]
"""Through which input a node reads: queries of a head, keys and values of a key-value head; empty for
nodes with one input."""
PORTS: tuple[Port, ...] = ("", "q", "k", "v")
"""Ports by their number in the edges of a graph."""
MAX_LAYER, MAX_INDEX, MAX_POS = 1000, 1 << 31, 1 << 18
"""Beyond those of any model."""

NodeColumns = Mapping[str, np.ndarray]
"""Arrays with an entry per node, by name."""
_BY_ID = ("bias", "target")
"""Kinds whose nodes differ by their ids only: their hook is the id."""
_FEATURES, _ERROR = ".hook_sae_acts_post", ".hook_sae_error"


class FeatureId(NamedTuple):
    """One feature of one spliced dictionary."""

    site: str
    """Output hook of the dictionary."""
    feature: int
    """Index in the dictionary."""

    def __str__(self) -> str:
        return f"{self.site}/{self.feature}"


@dataclass(frozen=True, order=True)
class Node:
    """One component whose activation can be replaced.

    Example:
        >>> gs.Node.head(2, 1).label, gs.Node.mlp(0).label
        ('L2H1', 'MLP0')
    """

    kind: NodeKind
    hook: str
    """Hook of the activation."""
    index: int = 0
    """Head, key-value head or feature; 0 for the others."""
    pos: int | None = None
    """Position; None for all of them."""

    @property
    def layer(self) -> int:
        """Layer of the hook; -1 for the embedding.

        Raises:
            AssertionError: The logits belong to no layer.
        """
        if self.kind in ("embed", "token"):
            return -1
        assert self.kind not in ("logits", "bias", "target"), f"{self.kind}: no layer"
        return int(self.hook.split(".")[1])

    @property
    def label(self) -> str:
        """``L1H3``, ``L1KV0``, ``MLP2``, ``embed``, ``logits``, ``blocks.2.hook_resid_post/17`` or
        ``.../error``; with ``@4`` at a position of its own. Of biases and targets the id in their graph.
        """
        if self.pos is None or self.kind == "target":
            return self._name
        return f"{self._name}@{self.pos}"

    @property
    def site(self) -> str:
        """Output hook of the dictionary, of features and errors; the hook itself of the others."""
        return self.hook.removesuffix(_FEATURES).removesuffix(_ERROR)

    @property
    def _name(self) -> str:
        if self.kind == "head":
            return f"L{self.layer}H{self.index}"
        if self.kind == "kv":
            return f"L{self.layer}KV{self.index}"
        if self.kind == "mlp":
            return f"MLP{self.layer}"
        if self.kind in ("feature", "error"):
            return f"{self.site}/{self.index if self.kind == 'feature' else 'error'}"
        return self.hook if self.kind in _BY_ID else self.kind

    @classmethod
    def embed(cls) -> Node:
        """The token embeddings."""
        return cls("embed", "hook_embed")

    @classmethod
    def logits(cls) -> Node:
        """The end of the residual stream."""
        return cls("logits", "unembed.hook_in")

    @classmethod
    def head(cls, layer: int, head: int) -> Node:
        """An attention head, at ``hook_z``."""
        return cls("head", f"blocks.{layer}.attn.hook_z", head)

    @classmethod
    def kv(cls, layer: int, head: int) -> Node:
        """A key-value head."""
        return cls("kv", f"blocks.{layer}.attn.hook_k", head)

    @classmethod
    def mlp(cls, layer: int) -> Node:
        """An MLP, at ``hook_mlp_out``."""
        return cls("mlp", f"blocks.{layer}.hook_mlp_out")

    @classmethod
    def of_feature(cls, feature: FeatureId) -> Node:
        """A feature of a spliced dictionary."""
        return cls("feature", f"{feature.site}{_FEATURES}", feature.feature)

    @classmethod
    def error(cls, site: str) -> Node:
        """What a dictionary's features leave at its site.

        Args:
            site: Output hook of the dictionary.
        """
        return cls("error", f"{site}{_ERROR}")

    def at(self, pos: int | None) -> Node:
        """The same at one position, or at all."""
        return replace(self, pos=pos)


class Reader(NamedTuple):
    """One input of a node: where edges end."""

    node: Node
    port: Port = ""

    @property
    def label(self) -> str:
        """``L1H3.q``, ``L1KV0.k``, ``MLP2`` or ``logits``."""
        return f"{self.node.label}.{self.port}" if self.port else self.node.label


def layer_of(node: Node) -> int | None:
    """Layer of a node; None for what has none, such as the logits."""
    return None if node.kind in ("logits", "bias", "target") else node.layer


def node_columns(nodes: Sequence[Node]) -> dict[str, np.ndarray]:
    """Nodes as the columns ``kind, site, layer, pos, index``."""
    hooks = {(node.kind, node.hook): node for node in nodes}
    places = {key: place for place, key in enumerate(hooks)}
    at = np.array([places[node.kind, node.hook] for node in nodes], dtype=np.int64)
    layers = [layer_of(node) for node in hooks.values()]
    return {
        "kind": np.array([kind for kind, _ in hooks], dtype=object)[at],
        "site": np.array([node.site for node in hooks.values()], dtype=object)[at],
        "layer": np.array([-1 if layer is None else layer for layer in layers])[at],
        "pos": np.array([-1 if node.pos is None else node.pos for node in nodes], dtype=np.int64),
        "index": np.array([node.index for node in nodes], dtype=np.int64),
    }


def table_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """A table of nodes as columns; texts are objects, whatever type of text the table has."""
    columns = {str(name): np.asarray(table[name]) for name in table}
    return {n: c.astype(object) if c.dtype.kind in "UT" else c for n, c in columns.items()}


def nodes_of(columns: NodeColumns) -> tuple[Node, ...]:
    """The inverse of :func:`node_columns`; no two nodes of a graph are equal."""
    names = ("kind", "site", "index", "pos", "id" if "id" in columns else "site")
    rows = zip(*(columns[name].tolist() for name in names), strict=True)
    return tuple(
        Node(
            kind,
            name if kind in _BY_ID else hook_of(kind, site),
            index,
            None if pos < 0 else pos,
        )
        for kind, site, index, pos, name in rows
    )


def hook_of(kind: str, site: str) -> str:
    """Hook of a node of a kind at a site."""
    return site + {"feature": _FEATURES, "error": _ERROR}.get(kind, "")


def is_hook_of(node: Node) -> bool:
    """Whether the hook of a node is one that its kind has."""
    try:
        layer = layer_of(node) or 0
    except (ValueError, IndexError):
        return False
    return node.hook == hook_of(node.kind, node.site) and -1 <= layer < MAX_LAYER


def check_kinds(nodes: str | Iterable[str]) -> tuple[str, ...]:
    """Node kinds as a tuple, each once."""
    kinds = (nodes,) if isinstance(nodes, str) else tuple(dict.fromkeys(nodes))
    if not kinds:
        raise EmptySelectionError("No node kind is named", exists=", ".join(NODE_KINDS))
    for kind in kinds:
        check_choice("node kind", kind, NODE_KINDS)
    return kinds
