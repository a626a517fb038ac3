"""Attribution graphs of a tiny random model, made once."""

from __future__ import annotations

from functools import cache
from typing import Any

from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.tracing import FeatureTarget, LogitDifference, StreamDirection, trace
from tests import factories
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=1, length=12, seed=5)


@cache
def traced(name: str = "plain") -> Graph:
    """``plain``; ``mixed``, with SAEs of attention and the stream; ``targets`` of every kind; ``some``
    rows only; ``shallow``, without features above layer 0.
    """
    import torch

    model = factories.tiny_model("gemma2", "hooked")
    saes = [factories.transcoder(model, layer, seed=layer) for layer in range(3)]
    options: dict[str, Any] = {}
    if name == "mixed":
        saes += [factories.residual(model, 1), factories.attention(model, 2)]
    if name == "some":
        options["max_feature_nodes"] = 7
    if name == "targets":
        plain = traced().nodes
        last = plain[(plain["kind"] == "feature") & (plain["layer"] == 2)].iloc[-1]
        feature = FeatureTarget(last["site"], int(last["index"]), int(last["pos"]))
        direction = StreamDirection(torch.ones(model.cfg.d_model), 1, 5, name='a "b" (p=')
        options["targets"] = [3, LogitDifference(4, 5), LogitDifference(5, 4), direction, feature]
    return trace(model, TOKENS, saes, **options)


def same(first: Graph, second: Graph) -> None:
    """Asserts that two graphs are equal, exactly."""
    import numpy as np
    import pandas as pd

    pd.testing.assert_frame_equal(first.nodes, second.nodes)
    np.testing.assert_array_equal(first.edges.nodes, second.edges.nodes)
    a, b = first.edges.matrix, second.edges.matrix
    assert a.dtype == b.dtype and a.shape == b.shape
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert first.tokens == second.tokens
    assert repr(first.metadata) == repr(second.metadata)
