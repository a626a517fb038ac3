"""Why a head attended from one token to another: which pairs of nodes made the score.

The score before its soft-cap is a sum over pairs of a node in the query and a node in the key, exactly,
with norm scales and all below the layer frozen; the method is in ``tracing/linear/head_queries.py``. A
score alone says little, since the softmax sees differences only: ``contrast=True`` explains the score
less the mean over all keys that the query sees.

Cost: one forward pass and encoding, then a sweep of ``2 d_head`` targets, of 2 without pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import EmptySelectionError, TaskError
from gemmascope_plugin.files.stored_result import ARRAY, TABLE, TENSORS, StoredResult
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.models.anatomy import HeadScores
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.tracing.linear.head_queries import Score, Side, ranked_pairs
from gemmascope_plugin.tracing.linear.trace_site import Exclude
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt

if TYPE_CHECKING:
    import pandas as pd

    from gemmascope_plugin.figures.fragments import Figure

_SHOWN_COLUMNS = ["id", "label", "kind", "layer", "pos"]


@dataclass(frozen=True, eq=False, repr=False)
class QkAttribution(StoredResult):
    """One score of one head as a sum over nodes and over pairs of nodes."""

    noun = "QK attribution"

    nodes: pd.DataFrame = field(metadata=TABLE)
    """All nodes below the layer, as in a graph; ``bias:b_Q_and_b_K`` are the head's own."""
    query_weights: Float[np.ndarray, " node"] = field(metadata=ARRAY)
    """What each node in the query brings, over all nodes in the key."""
    key_weights: Float[np.ndarray, " node"] = field(metadata=ARRAY)
    """What each node in the key brings, over all nodes in the query."""
    parts: tuple[Float[torch.Tensor, "node d_head"], Float[torch.Tensor, "node d_head"]] | None = (
        field(metadata=TENSORS)
    )
    """Of nodes in the query and in the key; a pair is the product of two. None without pairs."""
    score: float
    """Sum over all pairs: the score before its soft-cap, less the mean over keys for a contrast."""
    capped: float
    """The score itself after the soft-cap, as the softmax sees it."""
    residual: float
    """Largest gap between what the nodes sum to, the score found here and the model's own, as a share of
    the query's largest score."""
    tokens: tuple[str, ...]
    """The prompt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """``layer, head, query, key, contrast``."""

    @property
    def by_query(self) -> pd.DataFrame:
        """Nodes in the query by size: ``id, label, kind, layer, pos, weight``; they sum to the score."""
        return self._ranked(self.query_weights)

    @property
    def by_key(self) -> pd.DataFrame:
        """Nodes in the key by size, likewise."""
        return self._ranked(self.key_weights)

    def to_frame(self) -> pd.DataFrame:
        """Nodes that bring something, the largest in the key first: ``id, label, kind, layer, pos, query,
        key``.
        """
        order = np.argsort(-np.abs(self.key_weights), kind="stable")
        order = order[(self.query_weights[order] != 0) | (self.key_weights[order] != 0)]
        frame = self.nodes.iloc[order][_SHOWN_COLUMNS].reset_index(drop=True)
        return frame.assign(query=self.query_weights[order], key=self.key_weights[order])

    def pairs(self, top: int = 20) -> pd.DataFrame:
        """The pairs that brought most, of either sign: ``query, query_label, key, key_label, weight``.

        Args:
            top: How many.

        Raises:
            EmptySelectionError: They were not asked for, or none is to be shown.
        """
        import pandas as pd

        if top < 1:
            raise EmptySelectionError(f"top={top} leaves no pair", fix="top=20")
        if self.parts is None:
            raise EmptySelectionError(
                "Pairs were not asked for, only what each node brings", fix="pairs=True"
            )
        rows, columns, weights = ranked_pairs(*self.parts, top)
        ends: dict[str, np.ndarray] = {}
        for name, places in (("query", rows), ("key", columns)):
            nodes = self.nodes.iloc[places]
            ends |= {name: nodes["id"].to_numpy(), f"{name}_label": nodes["label"].to_numpy()}
        return pd.DataFrame({**ends, "weight": weights})

    def plot(self, top: int = SHOWN) -> Figure:
        """A plotly figure: the nodes that brought most, query by key; the key's alone without pairs.

        Args:
            top: Nodes of each side.
        """
        keys = self.by_key.head(top)
        if self.parts is None:
            names = keys["id"].tolist()
            return figures.bars(names, keys["weight"].tolist(), title=repr(self), x_title="score")
        weights = (self.query_weights, self.key_weights)
        places = [np.argsort(-np.abs(w), kind="stable")[:top] for w in weights]
        first, second = (part[at] for part, at in zip(self.parts, places, strict=True))
        labels = [self.nodes["id"].iloc[at].tolist() for at in places]
        return figures.heatmap(
            (first @ second.T).double().cpu().numpy(),
            x=labels[1],
            y=labels[0],
            x_title="key",
            y_title="query",
            title=repr(self),
            color_title="score",
        )

    def _ranked(self, weights: np.ndarray) -> pd.DataFrame:
        order = np.argsort(-np.abs(weights), kind="stable")
        order = order[weights[order] != 0]
        nodes = self.nodes.iloc[order][_SHOWN_COLUMNS]
        return nodes.assign(weight=weights[order]).reset_index(drop=True)

    def __repr__(self) -> str:
        about = self.metadata
        query, key = (f"{self.tokens[about[n]]!r} at {about[n]}" for n in ("query", "key"))
        mean = ", less the mean of its keys" if about["contrast"] else ""
        return (
            f"QkAttribution(layer {about['layer']} head {about['head']}, {query} to {key}: "
            f"score {self.score:.3f}{mean}, residual {self.residual:.1e})"
        )

    def _repr_html_(self) -> str:
        frame = self.by_key.head(SHOWN) if self.parts is None else self.pairs(SHOWN)
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(frame, SHOWN)}"


@gate(model=check_model, saes=check_saes)
def qk_attribution(
    model: HookedModel,
    prompt: Graph | PromptLike,
    saes: Saes,
    layer: int,
    head: int,
    query: int,
    key: int,
    *,
    contrast: bool = False,
    pairs: bool = True,
    exclude: Exclude | None = None,
    memory_budget: int | str = "4 GB",
) -> QkAttribution:
    """Which pairs of nodes made a head attend from one token to another.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge`` of a Gemma.
        prompt: One text, token ids ``[pos]`` or ``[1, pos]``, or the graph of a prompt.
        saes: As in ``trace``.
        layer: Of the head.
        head: Its number among the layer's query heads.
        query: Position of the token that attends; negative ones count from the end.
        key: Position of the token that is attended to.
        contrast: Explain the score less the mean over all keys that the query sees.
        pairs: Pairs of nodes; else only what each node brings in the query and in the key.
        exclude: Special tokens that dictionaries leave alone; None for those of the graph, or bos, eos
            and pad.
        memory_budget: Bytes, or ``"4 GB"``.

    Returns:
        What each node and each pair brings.

    Raises:
        TaskError: No such layer, head or position, or a key that the query does not see.
        ModelError: Dictionaries that cannot be traced.
        GemmaScopeError: The memory budget is too small.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> gs.qk_attribution(suite.model, graph, saes, layer=2, head=1, query=-1, key=7)
        QkAttribution(layer 2 head 1, 'is' at 8 to 'dallas' at 7: score 1.430, residual 2.7e-07)
    """
    traced = TracedPrompt.of(model, prompt, saes, exclude=exclude, memory_budget=memory_budget)
    frozen = traced.frozen
    layer = _number("layer", layer, frozen.n_layers)
    head = _number("head", head, frozen.anatomy.n_heads)
    query, key = (_position(n, p, frozen.n_pos) for n, p in (("Query", query), ("Key", key)))
    score = _score(traced, layer, head, query, key, contrast)
    if pairs:
        unit = torch.eye(frozen.anatomy.d_head, dtype=frozen.dtype, device=frozen.embed.device)
        parts = score.by_query(unit), score.by_key(unit)
        marginals = parts[0] @ score.key[0], parts[1] @ score.query[0]
    else:
        parts = None
        marginals = score.by_query(score.key)[:, 0], score.by_key(score.query)[:, 0]
    by_query, by_key = (values.double().cpu().numpy() for values in marginals)
    details = {"layer": layer, "head": head, "query": query, "key": key, "contrast": contrast}
    return QkAttribution(
        _nodes(traced, score.n_below),
        by_query,
        by_key,
        parts,
        float(by_key.sum()),
        score.capped,
        score.residual(float(by_query.sum()), float(by_key.sum())),
        tuple(token_strings(model, frozen.tokens)),
        details,
    )


def _score(
    traced: TracedPrompt, layer: int, head: int, query: int, key: int, contrast: bool
) -> Score:
    """The score that is explained."""
    frozen = traced.frozen
    scores = HeadScores(frozen.anatomy, layer, head)
    names = [scores.scores_hook, *scores.rotary_hooks]
    acts = record(frozen.model, frozen.tokens[None], names)
    observed = acts[scores.scores_hook][0, head, query].to(frozen.dtype)
    # an infinity on one model class, the least finite number on the other
    visible = (observed > torch.finfo(observed.dtype).min / 2).nonzero()[:, 0].tolist()
    _check_visible(layer, query, key, visible)
    keys = visible if contrast else [key]
    query_side, key_side = (
        Side.of(frozen, layer, projection, at, scores.rotation(at, acts))
        for projection, at in ((scores.query, [query]), (scores.key, keys))
    )
    place = keys.index(key)
    key_weights = observed.new_zeros(len(keys))
    key_weights[place] = 1.0
    key_weights = key_weights - 1 / len(keys) if contrast else key_weights
    largest = float(observed[visible].abs().max())
    return Score(
        traced.sweep, scores, query_side, key_side, key_weights, place, observed[keys], largest
    )


def _nodes(traced: TracedPrompt, n_below: int) -> pd.DataFrame:
    """Nodes below the layer; a head's own biases take the place of those of targets."""
    nodes = traced.nodes.head(n_below).copy()
    nodes.loc[traced.layout.constant, ["id", "label"]] = ["bias:b_Q_and_b_K", "b_Q and b_K"]
    return nodes.drop(columns="weight")


def _number(noun: str, value: int, count: int) -> int:
    if not 0 <= value < count:
        close = 0 if value < 0 else count - 1
        raise TaskError(
            f"There is no {noun} {value}", exists=f"{noun}s 0 to {count - 1}", nearest=str(close)
        )
    return value


def _position(noun: str, value: int, n_pos: int) -> int:
    if not -n_pos <= value < n_pos:
        raise TaskError(
            f"{noun} {value} lies outside the prompt of {n_pos} tokens",
            exists=f"positions 0 to {n_pos - 1}, or {-n_pos} to -1 from the end",
            nearest=str(n_pos - 1 if value > 0 else -n_pos),
        )
    return value % n_pos


def _check_visible(layer: int, query: int, key: int, visible: Sequence[int]) -> None:
    if key > query:
        raise TaskError(
            f"Key {key} comes after query {query}, and a head sees no later tokens",
            exists=f"keys {visible[0]} to {visible[-1]}",
            fix=f"query={key}, key={query}",
        )
    if key not in visible:
        raise TaskError(
            f"Key {key} lies outside the sliding window of layer {layer} at query {query}",
            exists=f"keys {visible[0]} to {visible[-1]}",
            nearest=str(visible[0]),
        )
