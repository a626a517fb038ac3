"""Induction: ``.. A B .. C D .. A`` is continued with ``B``, by K-composition.

``L0H1`` writes at every position which content stood before it (``embed -> L0KV0.v``). The induction head
``L1H2`` asks with the content of the last token (``embed -> L1H2.q``) for the position that has it before
itself (``L0H1 -> L1KV1.k``) and copies the content there (``embed -> L1KV1.v``) to the logits.

Three prompts, each corrupted in one way, whose answer becomes ``D``: the last token is ``C``; ``A`` and
``C`` are swapped in front; ``B`` and ``D`` are. The first can be seen through queries only, the second
through keys only, the third through values only.
"""

from __future__ import annotations

from typing import Any

from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.graphs.node import Node, Reader
from tests.ground_truth.build import Builder, Edge, answers, tokens

POSITIONS = 7
A, B, C, D, X, Y = range(6)
TASK = Task(
    tokens([[X, A, B, Y, C, D, A]] * 3),
    tokens([[X, A, B, Y, C, D, C], [X, C, B, Y, A, D, A], [X, A, D, Y, C, B, A]]),
    logit_diff(answers([B] * 3, POSITIONS), answers([D] * 3, POSITIONS)),
    name="induction",
)
PREVIOUS, INDUCTION = Node.head(0, 1), Node.head(1, 2)
TRUE_EDGES: frozenset[Edge] = frozenset(
    {
        (Node.embed(), Reader(Node.kv(0, 0), "v")),
        (PREVIOUS, Reader(Node.kv(1, 1), "k")),
        (Node.embed(), Reader(INDUCTION, "q")),
        (Node.embed(), Reader(Node.kv(1, 1), "v")),
        (INDUCTION, Reader(Node.logits())),
    }
)


def make(backend: str) -> Any:
    """The model, 2 layers."""
    noise = ["noise_00", "noise_02", "noise_11", "noise_13"]
    spaces = dict.fromkeys(["previous", "copied", *noise], 6)
    spaces |= dict.fromkeys(["noise_m0", "noise_m1"], 5)
    spaces |= {"rest_0": 1, "rest_1": 1}
    model = Builder(n_layers=2, positions=POSITIONS, contents=6, spaces=spaces)
    model.attend_position(0, 1, lambda p: max(p - 1, 0))
    model.value(0, 0, "content")
    model.output(0, 1, "previous")
    model.noise_head(0, 0, "noise_00", lambda p: p // 2, value=False)
    model.noise_head(0, 2, "noise_02", lambda p: max(p - 2, 0), value=True)
    model.constant_head(0, 3, "rest_0")
    model.attend_content(1, 2, query="content", key="previous")
    model.value(1, 1, "content")
    model.output(1, 2, "copied")
    model.noise_head(1, 1, "noise_11", lambda p: max(p - 1, 0), value=True)
    model.noise_head(1, 3, "noise_13", lambda p: p, value=False)
    model.constant_head(1, 0, "rest_1")
    for layer in range(2):
        model.random_mlp(layer, f"noise_m{layer}")
    model.unembed("copied")
    return model.finish(backend)
