"""Words that the features of an attribution graph write towards, and away from, by their decoders.

1. A feature's direction is the sum of its decoder rows over all layers that it writes to; rows of
   attention dictionaries go through ``W_O`` and the gain of the norm behind it.
2. The direction is read by the unembedding, see ``features/top_words.py``. It says what a feature does to
   logits directly, not through later layers: of early features it says little.

Cost: one multiplication with the unembedding for all features of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.features.top_words import TopWords, top_words
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.hooked_sae import Saes
from gemmascope_plugin.tracing.linear.trace_site import TraceSite, trace_sites

if TYPE_CHECKING:
    import pandas as pd


class TopTokens(dict[str, TopWords]):
    """Words of feature nodes, by the ids of the nodes."""

    def to_frame(self) -> pd.DataFrame:
        """One row a node: ``id, top, bottom``, the words in one text each, the strongest first."""
        import pandas as pd

        rows = [
            (node, *(", ".join(map(repr, part)) for part in words)) for node, words in self.items()
        ]
        return pd.DataFrame(rows, columns=["id", "top", "bottom"])

    def to_json(self) -> dict[str, dict[str, list[str]]]:
        """From ids to words, as plain values."""
        return {
            node: {"top": list(words.top), "bottom": list(words.bottom)}
            for node, words in self.items()
        }

    def __repr__(self) -> str:
        return f"TopTokens({len(self)} features)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.to_frame(), SHOWN)}"


def top_tokens(graph: Graph, model: HookedModel, saes: Saes, k: int = 5) -> TopTokens:
    """Words of every feature node.

    Args:
        graph: The graph.
        model: The model that it was traced in.
        saes: Those that it was traced with.
        k: How many words of each.

    Returns:
        From the id of a node to its words.

    Raises:
        UnknownNameError: The graph has features of a dictionary that was not given.
        EmptySelectionError: ``k`` is not a number of words.
    """
    sites = trace_sites(model, saes, ())
    by_label = {site.label: site for site in sites}
    rows = graph.nodes[graph.where("feature")]
    words = TopTokens()
    for label, nodes in rows.groupby("site"):
        label = str(label)
        if label not in by_label:
            raise UnknownNameError(
                f"The graph has features of {label}, and no dictionary for it was given",
                exists=", ".join(by_label),
            )
        features = torch.from_numpy(np.unique(np.asarray(nodes["index"])))
        directions = stream_writes(Anatomy(model), by_label[label], sites, features)
        by_feature = dict(zip(features.tolist(), top_words(model, directions, k), strict=True))
        words |= {name: by_feature[i] for name, i in zip(nodes["id"], nodes["index"], strict=True)}
    return words


def stream_writes(
    anatomy: Anatomy,
    site: TraceSite,
    sites: Sequence[TraceSite],
    features: Int64[torch.Tensor, " feature"],
) -> Float[torch.Tensor, "feature d_model"]:
    """What features of a site write to the stream, at all sites of a trace together, up to the scale of
    attention's norm.
    """
    parts = []
    for writer in sites:
        if not writer.receives(site):
            continue
        W_dec = writer.hooked.decoder_from(site.place).detach()
        rows = W_dec.index_select(0, features.to(W_dec.device)).float()
        if writer.kind == "attention":
            rows = rows @ anatomy.W_O(writer.layer).flatten(0, 1).to(rows)
            norm = anatomy.norm(writer.layer, "ln1_post")
            rows = rows if norm is None or norm.gain is None else rows * norm.gain.to(rows)
        parts.append(rows)
    return torch.stack(parts).sum(0)
