"""Nodes of a circuit: attention heads, MLPs and dictionary features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gemmascope_plugin.errors import EmptySelectionError, check_choice
from gemmascope_plugin.patching.effects import FeatureId
from gemmascope_plugin.patching.nodes import HOOKS, acts_hook

NodeKind = Literal["head", "mlp", "feature"]
NODE_KINDS: tuple[NodeKind, ...] = ("head", "mlp", "feature")


@dataclass(frozen=True, order=True)
class Node:
    """One component whose activation can be replaced."""

    kind: NodeKind
    hook: str
    """Hook of the activation: ``hook_z``, ``hook_mlp_out`` or a dictionary's features."""
    index: int = 0
    """Head or feature; 0 for an MLP."""

    @property
    def layer(self) -> int:
        """Layer of the hook."""
        return int(self.hook.split(".")[1])

    @property
    def label(self) -> str:
        """``L1H3``, ``MLP2`` or ``blocks.2.hook_resid_post/17``."""
        if self.kind == "head":
            return f"L{self.layer}H{self.index}"
        if self.kind == "mlp":
            return f"MLP{self.layer}"
        return f"{self.hook.removesuffix('.hook_sae_acts_post')}/{self.index}"

    @classmethod
    def head(cls, layer: int, head: int) -> Node:
        """An attention head, at ``hook_z``."""
        return cls("head", HOOKS["z"].format(layer=layer), head)

    @classmethod
    def mlp(cls, layer: int) -> Node:
        """An MLP, at ``hook_mlp_out``."""
        return cls("mlp", HOOKS["mlp_out"].format(layer=layer))

    @classmethod
    def of_feature(cls, feature: FeatureId) -> Node:
        """A feature of a spliced dictionary."""
        return cls("feature", acts_hook(feature.site), feature.feature)


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
