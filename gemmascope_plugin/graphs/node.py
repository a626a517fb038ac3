"""Nodes: what writes to the residual stream or reads from it, and features of dictionaries.

======== =============================================== ==========================================
kind     what it is                                      hook
======== =============================================== ==========================================
embed    the token embeddings                            ``hook_embed``
head     one attention head's output                     ``blocks.L.attn.hook_z``
kv       one key-value head, shared by a group of heads  ``blocks.L.attn.hook_k``
mlp      an MLP                                          ``blocks.L.hook_mlp_out``
feature  one feature of a spliced dictionary             ``<site>.hook_sae_acts_post``
error    what a dictionary's features leave at its site  ``<site>.hook_sae_error``
logits   the end of the residual stream                  ``unembed.hook_in``
======== =============================================== ==========================================

A node stands for all positions, or for one: ``pos``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from gemmascope_plugin.errors import EmptySelectionError, check_choice

NodeKind = Literal["embed", "head", "kv", "mlp", "feature", "error", "logits"]
NODE_KINDS: tuple[NodeKind, ...] = ("head", "mlp", "feature")
"""Kinds that ``discover`` ranks."""
Port = Literal["", "q", "k", "v"]
"""Through which input a node reads: queries of a head, keys and values of a key-value head; empty for
nodes with one input."""
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
    """One component whose activation can be replaced."""

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
        if self.kind == "embed":
            return -1
        assert self.kind != "logits", "the logits have no layer"
        return int(self.hook.split(".")[1])

    @property
    def label(self) -> str:
        """``L1H3``, ``L1KV0``, ``MLP2``, ``embed``, ``logits``, ``blocks.2.hook_resid_post/17`` or
        ``.../error``; with ``@4`` at a position of its own.
        """
        return self._name if self.pos is None else f"{self._name}@{self.pos}"

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
        return self.kind

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


def check_kinds(nodes: str | Iterable[str]) -> tuple[str, ...]:
    """Node kinds as a tuple, each once.

    Raises:
        EmptySelectionError: No kind is named.
        UnknownNameError: With the nearest match.
    """
    kinds = (nodes,) if isinstance(nodes, str) else tuple(dict.fromkeys(nodes))
    if not kinds:
        raise EmptySelectionError("No node kind is named", exists=", ".join(NODE_KINDS))
    for kind in kinds:
        check_choice("node kind", kind, NODE_KINDS)
    return kinds
