"""Words of features against what writing them really does to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, UnknownNameError
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.tracing import top_tokens, trace
from tests import factories
from tests.splice.cross_layer_reference import clt
from tests.tracing.traces import TOKENS


def logits_of(model: Any, direction: torch.Tensor) -> torch.Tensor:
    """What a stream that is all this direction says, before the soft-cap (which keeps the order)."""
    return model.unembed(model.ln_final(direction[None, None]))[0, 0]


def words(model: Any, logits: torch.Tensor, k: int) -> tuple[str, ...]:
    return tuple(token_strings(model, logits.topk(k).indices))


def test_words_are_those_that_the_direction_raises_and_lowers() -> None:
    model = factories.tiny_model("gemma2", "hooked")
    saes = [factories.transcoder(model, layer, seed=layer) for layer in range(3)]
    saes += [factories.residual(model, 1), factories.attention(model, 2)]
    graph = trace(model, TOKENS, saes)
    by_node = top_tokens(graph, model, saes, k=3)
    assert list(by_node) == list(graph.nodes["id"][graph.where("feature")])
    by_hook = {sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name: sae for sae in saes}
    for row in graph.nodes[graph.where("feature")].groupby("site").head(5).itertuples():
        direction = by_hook[row.site].W_dec[row.index]
        if "hook_z" in row.site:
            block = model.blocks[row.layer]
            out = direction @ block.attn.W_O.flatten(0, 1)
            direction = block.ln1_post(out[None, None])[0, 0]
        logits = logits_of(model, direction)
        assert by_node[row.id].top == words(model, logits, 3)
        assert by_node[row.id].bottom == words(model, -logits, 3)


def test_features_of_a_clt_write_to_all_later_layers() -> None:
    model = factories.tiny_model("gemma2", "hooked")
    dictionary = clt(factories.tiny_hf("gemma2"))
    graph = trace(model, TOKENS, [dictionary])
    by_node = top_tokens(graph, model, dictionary, k=2)
    rows = graph.nodes[graph.where("feature")]
    for layer in range(3):
        row = rows[rows["layer"] == layer].iloc[0]
        W_dec = dictionary.weights(layer).W_dec[row["index"]]
        logits = logits_of(model, W_dec[layer:].sum(0))
        assert by_node[row["id"]].top == words(model, logits, 2)


def test_mistakes() -> None:
    model = factories.tiny_model("gemma2", "hooked")
    saes = [factories.transcoder(model, layer, seed=layer) for layer in range(3)]
    graph = trace(model, TOKENS, [*saes, factories.residual(model, 1)])
    with pytest.raises(UnknownNameError, match="features of blocks.1.hook_resid_post, and no dict"):
        top_tokens(graph, model, saes)
    with pytest.raises(EmptySelectionError, match="k=0 is not a number of words"):
        top_tokens(trace(model, TOKENS, saes), model, saes, k=0)
