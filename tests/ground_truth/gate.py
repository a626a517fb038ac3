"""A fact that needs two tokens, looked up by an MLP: ``(subject, relation) -> object``.

The subject stands at position 1, the relation last. ``L0H1`` moves the subject one position on
(``embed -> L0KV0.v``), ``L1H2`` from there to the end (``L0H1 -> L1KV1.v``, V-composition). ``MLP1`` has
a neuron for each pair, active if both are there: an AND of what the head moved (``L1H2 -> MLP1``) and of
the last token (``embed -> MLP1``). It writes the object (``MLP1 -> logits``).

Four prompts, half of them with another subject when corrupted, half with another relation.
"""

from __future__ import annotations

from math import hypot
from typing import Any

from gemmascope_plugin.causes import Task, logit_diff
from gemmascope_plugin.graphs.node import Node, Reader
from tests.ground_truth.build import Builder, Edge, answers, tokens

POSITIONS, CONTENTS = 6, 8
SUBJECTS, RELATIONS, X, Y = (0, 1, 2), (3, 4, 5), 6, 7
SHARP = 4.0
"""Input of a neuron from each of its two tokens; both are half of this above zero, one as far below."""
ALWAYS = 1.5
"""What the neuron that is always on writes, in units of an active one."""


def fact(subject: int, relation: int) -> int:
    """The object, itself one of three contents."""
    return (subject + relation) % 3


def prompts(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """``pairs`` of subject and relation among fillers."""
    return [[X, subject, Y, X, Y, relation] for subject, relation in pairs]


CLEAN = [(0, 3), (1, 5), (2, 4), (1, 4)]
CORRUPT = [(1, 3), (2, 5), (2, 5), (1, 3)]
TASK = Task(
    tokens(prompts(CLEAN)),
    tokens(prompts(CORRUPT)),
    logit_diff(
        answers([fact(*pair) for pair in CLEAN], POSITIONS),
        answers([fact(*pair) for pair in CORRUPT], POSITIONS),
    ),
    name="gate",
)
TRUE_EDGES: frozenset[Edge] = frozenset(
    {
        (Node.embed(), Reader(Node.kv(0, 0), "v")),
        (Node.head(0, 1), Reader(Node.kv(1, 1), "v")),
        (Node.head(1, 2), Reader(Node.mlp(1))),
        (Node.embed(), Reader(Node.mlp(1))),
        (Node.mlp(1), Reader(Node.logits())),
    }
)


def make(backend: str) -> Any:
    """The model, 2 layers."""
    noise = ["noise_00", "noise_02", "noise_11", "noise_13"]
    spaces = dict.fromkeys(["previous", "moved", "object", *noise], CONTENTS)
    spaces |= {"noise_m0": 5, "rest_0": 1, "rest_1": 1, "rest_m1": 1}
    model = Builder(n_layers=2, positions=POSITIONS, contents=CONTENTS, spaces=spaces)
    model.attend_position(0, 1, lambda p: max(p - 1, 0))
    model.value(0, 0, "content")
    model.output(0, 1, "previous")
    model.noise_head(0, 0, "noise_00", lambda p: p // 2, value=False)
    model.noise_head(0, 2, "noise_02", lambda p: p, value=True)
    model.constant_head(0, 3, "rest_0")
    model.attend_position(1, 2, lambda p: min(p, 2))
    model.value(1, 1, "previous")
    model.output(1, 2, "moved")
    model.noise_head(1, 1, "noise_11", lambda p: max(p - 2, 0), value=True)
    model.noise_head(1, 3, "noise_13", lambda p: p, value=False)
    model.constant_head(1, 0, "rest_1")
    model.random_mlp(0, "noise_m0")
    _table(model)
    model.unembed("object")
    return model.finish(backend)


def _table(model: Builder) -> None:
    """One neuron per fact, and one that is always on: without it the post-norm would bring whatever the
    others let through to full length."""
    pairs = [(subject, relation) for subject in SUBJECTS for relation in RELATIONS]
    threshold = {("constant", 0): -1.5 * SHARP}
    for index, (subject, relation) in enumerate(pairs):
        gate = threshold | {("moved", subject): SHARP, ("content", relation): SHARP}
        model.neuron(1, index, gate, ("object", fact(subject, relation)))
    model.neuron(1, len(pairs), {("constant", 0): SHARP / 2}, ("rest_m1", 0), ALWAYS)
    model.height["object"] = 1 / hypot(1, ALWAYS)
