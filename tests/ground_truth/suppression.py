"""Copying with a brake: a second head reads what was copied and writes against it (copy suppression).

``L0H2`` copies the token at position 2 (``embed -> L0KV1.v``) to the logits. ``L1H1`` reads its output at
the same position (``L0H2 -> L1KV0.v``, V-composition) and lowers the logit of what it finds. Its two
edges have the other sign: without them the metric is *higher*.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemmascope_plugin.graphs.node import Node, Reader
from tests.ground_truth.build import LOGIT, Builder, Edge
from tests.ground_truth.copying import MARKED, POSITIONS
from tests.ground_truth.copying import TASK as COPYING

TASK = replace(COPYING, name="suppression")
COPY, BRAKE = Node.head(0, 2), Node.head(1, 1)
TRUE_EDGES: frozenset[Edge] = frozenset(
    {
        (Node.embed(), Reader(Node.kv(0, 1), "v")),
        (COPY, Reader(Node.logits())),
        (COPY, Reader(Node.kv(1, 0), "v")),
        (BRAKE, Reader(Node.logits())),
    }
)
NEGATIVE = frozenset({(COPY, Reader(Node.kv(1, 0), "v")), (BRAKE, Reader(Node.logits()))})


def make(backend: str) -> Any:
    """The model, 2 layers."""
    noise = ["noise_01", "noise_03", "noise_10", "noise_12"]
    spaces = dict.fromkeys(["copied", "brake", *noise], 6)
    spaces |= dict.fromkeys(["noise_m0", "noise_m1"], 5)
    spaces |= {"rest_0": 1, "rest_1": 1}
    model = Builder(n_layers=2, positions=POSITIONS, contents=6, spaces=spaces)
    model.attend_position(0, 2, lambda p: min(p, MARKED))
    model.value(0, 1, "content")
    model.output(0, 2, "copied")
    model.noise_head(0, 1, "noise_01", lambda p: p // 2, value=True)
    model.noise_head(0, 3, "noise_03", lambda p: p, value=False)
    model.constant_head(0, 0, "rest_0")
    model.attend_position(1, 1, lambda p: p)
    model.value(1, 0, "copied")
    model.output(1, 1, "brake")
    model.noise_head(1, 0, "noise_10", lambda p: p // 2, value=False)
    model.noise_head(1, 2, "noise_12", lambda p: max(p - 2, 0), value=True)
    model.constant_head(1, 3, "rest_1")
    for layer in range(2):
        model.random_mlp(layer, f"noise_m{layer}")
    model.unembed("copied")
    model.unembed("brake", -LOGIT / 2)
    return model.finish(backend)
