"""Nodes and readers by name: what to type for them is what results are labelled with.

============================== ====================================== ==========================
name                           what it is                             as a reader
============================== ====================================== ==========================
``embed``                      token embeddings
``L1H3``                       an attention head                      ``L1H3.q``
``L1KV0``                      a key-value head                       ``L1KV0.k``, ``L1KV0.v``
``MLP2``                       an MLP                                 ``MLP2``
``blocks.2.hook_resid_pre``    the stream before a layer (or          the same
                               ``hook_resid_post``, after it)
``blocks.1.hook_mlp_out/17``   a feature: dictionary site, index      the same
``logits``                     the end of the stream                  ``logits``
============================== ====================================== ==========================

A key-value head serves a group of query heads. ``L1H3.k`` and ``L1H3.v`` are the *copies* of its key and
value that head 3 alone sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gemmascope_plugin.causes.components import layer_of
from gemmascope_plugin.errors import InputError, UnknownNameError, check_choice, nearest
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import FeatureId, Node, Port, Reader
from gemmascope_plugin.models.protocol import describe

_FORMS = "embed, L0H0, L0KV0, MLP0, blocks.0.hook_resid_pre, <dictionary site>/<feature>, logits"
_PORTED = re.compile(r"(L\d+(?:H|KV)\d+)\.(\w+)")
_HEAD = re.compile(r"L(\d+)(H|KV)(\d+)")
_MLP = re.compile(r"MLP(\d+)")
_STREAM = re.compile(r"blocks\.\d+\.hook_resid_(?:pre|post)")
_FEATURE = re.compile(r"(.+)/(\d+)")


@dataclass(frozen=True, order=True)
class Stream:
    """The residual stream before or after a layer: all that was written so far."""

    hook: str
    """``blocks.L.hook_resid_pre`` or ``blocks.L.hook_resid_post``."""

    @property
    def label(self) -> str:
        """Its hook."""
        return self.hook


Name = str | FeatureId | Node | Stream
Named = Name | Reader


def node_of(name: Name, edges: EdgeMap | None = None) -> Node | Stream:
    """A node from its name; nodes pass through.

    Args:
        name: See the table above.
        edges: Those of the model that the node is to be in; None checks the form alone.

    Raises:
        UnknownNameError: No such form of a name, or no such node in the model.
        InputError: Neither a name nor a node.
    """
    if isinstance(name, (Node, Stream)):
        node = name
    elif isinstance(name, FeatureId):
        node = Node.of_feature(name)
    else:
        node = _parsed(name)
    if edges is not None:
        _check_inside(node, edges)
    return node


def reader_of(name: Named, edges: EdgeMap | None = None) -> Reader | Stream:
    """One input of a node from its name; readers pass through.

    Args:
        name: See the table above.
        edges: Those of the model that the node is to be in; None checks the form alone.

    Raises:
        UnknownNameError: No such form of a name, a node that reads through several inputs without
            saying which, one that reads nothing, or no such node in the model.
        InputError: Neither a name nor a node.
    """
    if isinstance(name, Reader):
        node, port = node_of(name.node, edges), name.port
    else:
        match = _PORTED.fullmatch(name) if isinstance(name, str) else None
        node, port = node_of(match[1] if match else name, edges), match[2] if match else ""
    if isinstance(node, Stream):
        return node
    if node.kind == "embed":
        raise UnknownNameError("The embedding reads nothing", exists=_FORMS)
    ports: dict[str, tuple[Port, ...]] = {"head": ("q", "k", "v"), "kv": ("k", "v")}
    allowed = ports.get(node.kind, ("",))
    if port == "" and "" not in allowed:
        raise UnknownNameError(
            f"{node.label} reads through several inputs",
            exists=", ".join(f"{node.label}.{p}" for p in allowed),
        )
    check_choice(f"input of {node.label}", port, allowed)
    return Reader(node, next(p for p in allowed if p == port))


def edges_of(pairs: Any, edges: EdgeMap) -> list[tuple[int, int]]:
    """Row and column of edges, each given as its two ends.

    Each pair is a writer and a reader, by name or as nodes: ``("L1H3", "MLP2")``.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise _not_edges(pairs)
    return [_place(pair, edges) for pair in pairs]


def _place(pair: object, edges: EdgeMap) -> tuple[int, int]:
    if isinstance(pair, (str, Node, Reader)) or not isinstance(pair, Iterable):
        raise _not_edges(pair)
    ends = list(pair)
    if len(ends) != 2:
        raise _not_edges(pair)
    writer, reader = node_of(ends[0], edges), reader_of(ends[1], edges)
    if writer in edges.writers and reader in edges.readers:
        place = edges.writers.index(writer), edges.readers.index(reader)
        if edges.mask[place]:
            return place
    raise UnknownNameError(
        f"There is no edge from {writer.label} to {reader.label}",
        exists=f"{edges.n_edges} edges from a writer (embed, heads, MLPs) to a reader after it (queries "
        "of heads, keys and values of key-value heads, MLPs, logits)",
    )


def _not_edges(value: object) -> InputError:
    return InputError(
        f"{describe(value)} is not an edge",
        fix='edges=[("L1H3", "MLP2"), ("embed", "L2H0.q")], each a writer and a reader',
    )


def _parsed(name: object) -> Node | Stream:
    if not isinstance(name, str):
        raise InputError(f"{describe(name)} is not a node", exists=_FORMS)
    if name in ("embed", "logits"):
        return Node.embed() if name == "embed" else Node.logits()
    if match := _HEAD.fullmatch(name):
        make = Node.head if match[2] == "H" else Node.kv
        return make(int(match[1]), int(match[3]))
    if match := _MLP.fullmatch(name):
        return Node.mlp(int(match[1]))
    if _STREAM.fullmatch(name):
        return Stream(name)
    if match := _FEATURE.fullmatch(name):
        return Node.of_feature(FeatureId(match[1], int(match[2])))
    raise UnknownNameError(f"{name!r} names no node", exists=_FORMS, nearest=_like(name))


def _like(name: str) -> str | None:
    """The names with the numbers of this one that resemble it most."""
    layer, index = [*re.findall(r"\d+", name), "0", "0"][:2]
    streams = (f"blocks.{layer}.hook_resid_{point}" for point in ("pre", "post"))
    return nearest(
        name,
        ["embed", "logits", f"L{layer}H{index}", f"L{layer}KV{index}", f"MLP{layer}", *streams],
    )


def _check_inside(node: Node | Stream, edges: EdgeMap) -> None:
    if isinstance(node, Node) and node.kind in ("embed", "logits", "feature"):
        return
    kinds = {"head": edges.n_heads, "kv": edges.n_kv}
    n = kinds.get(node.kind, 1) if isinstance(node, Node) else 1
    index = node.index if isinstance(node, Node) else 0
    if layer_of(node.hook) < edges.n_layers and index < n:
        return
    raise UnknownNameError(
        f"The model has no {node.label}",
        exists=f"layers 0 to {edges.n_layers - 1}, heads 0 to {edges.n_heads - 1}, key-value heads "
        f"0 to {edges.n_kv - 1}",
    )
