"""One head copies the token at position 2 to the logits.

``embed -> L1KV1.v`` (the content), ``L1H2 -> logits``. The head looks at positions, which are the same in
clean and corrupted prompts, so queries and keys carry nothing. ``L1H3`` shares its key-value head and is
noise. Layers 0 and 2 are random: the first writes before the copy, the last reads it. All contents differ
between clean and corrupted prompts, so every component's output does.
"""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.graphs.node import Node, Reader
from tests.ground_truth.build import Builder, Edge, answers, tokens

POSITIONS, MARKED = 6, 2
CLEAN = [[0, 1, 2, 3, 4, 5], [3, 0, 4, 1, 5, 2], [5, 2, 1, 0, 3, 4]]
CORRUPT = [[1, 0, 5, 4, 2, 3], [5, 1, 0, 2, 3, 4], [4, 5, 3, 1, 0, 2]]
TASK = Task(
    tokens(CLEAN),
    tokens(CORRUPT),
    logit_diff(
        answers([row[MARKED] for row in CLEAN], POSITIONS),
        answers([row[MARKED] for row in CORRUPT], POSITIONS),
    ),
    name="copying",
)
TRUE_EDGES: frozenset[Edge] = frozenset(
    {
        (Node.embed(), Reader(Node.kv(1, 1), "v")),
        (Node.head(1, 2), Reader(Node.logits())),
    }
)


def make(backend: str) -> Any:
    """The model, 3 layers."""
    spaces = dict.fromkeys(["copied", "noise_h1", "noise_h3"], 6)
    spaces |= dict.fromkeys(["noise_a0", "noise_a2", "noise_m0", "noise_m1", "noise_m2"], 5)
    spaces |= {"rest_1": 1}
    model = Builder(n_layers=3, positions=POSITIONS, contents=6, spaces=spaces)
    model.attend_position(1, 2, lambda p: min(p, MARKED))
    model.value(1, 1, "content")
    model.output(1, 2, "copied")
    model.noise_head(1, 1, "noise_h1", lambda p: p // 2, value=True)
    model.noise_head(1, 3, "noise_h3", lambda p: p, value=False)
    model.constant_head(1, 0, "rest_1")
    for layer in (0, 2):
        model.random_attention(layer, f"noise_a{layer}")
    for layer in range(3):
        model.random_mlp(layer, f"noise_m{layer}")
    model.unembed("copied")
    return model.finish(backend)
