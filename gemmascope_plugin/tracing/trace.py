"""Traces a prompt: the direct effects of active features, errors and tokens on each other and on logits.

1. Attention patterns and norm scales are frozen, every MLP is replaced by what its dictionary writes, the
   rest of it being an error node: the stream is linear (``tracing/linear``).
2. A row of the graph is the effect of all nodes on one target; it sums to the target's pre-activation,
   which is checked.
3. Targets are the likeliest next tokens, or what is asked for.

A row is a linear function of everything that is written into the stream; what is not in it is what the
model has rounded away. With a type whose roundings are ``u`` on average (a quarter of its ``eps``):

1. A block rounds some twelve times on the way of its stream: four norms, the products of attention and
   the MLP, their activations, two additions. Roundings are independent, so ``12 L`` of them add up to
   ``u sqrt(12 L)`` of the size of what is rounded.
2. Sums of half-precision products are kept in float32. Those of float32 are not kept in more, so each of
   the ``d`` terms of a product rounds too: ``sqrt(12 L d)``.
3. ``SIGMAS`` of that, over thousands of rows: what is above is not rounding. Heads of one layer that
   write a thousandth more than their values say are above it in float32, a third more in bfloat16.

For Gemma 3 270M (18 layers) that is 3e-5 in float32 and 0.09 in bfloat16, as a share of the absolute sum
of a row; ordinary prompts with random transcoders were off by 4e-7 and 6e-3 at most, the bundled suite,
whose stream is narrow, by a fifth of what is allowed.

Cost: see ``tracing/linear/rows.py``; with ``max_feature_nodes`` rows are made for the most influential
features only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gemmascope_plugin.errors import ModelError, TaskError
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.loading.load import spec_of
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import (
    HookedModel,
    check_finite,
    check_model,
    dtype_of,
    weights_of,
)
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.tracing.linear.rows import matrix
from gemmascope_plugin.tracing.linear.targets import FeatureTarget, Target
from gemmascope_plugin.tracing.linear.trace_site import Exclude
from gemmascope_plugin.tracing.traced_prompt import SPECIAL, TracedPrompt

ROUNDINGS = 12
"""Of the stream, in a block."""
SIGMAS = 3


@gate(model=check_model, saes=check_saes)
def trace(
    model: HookedModel,
    prompt: PromptLike,
    saes: Saes,
    *,
    targets: Sequence[Target] | Target | None = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    min_share: float = 0.0,
    exclude: Exclude = SPECIAL,
    memory_budget: int | str = "4 GB",
    progress: bool = False,
) -> Graph:
    """The attribution graph of a prompt.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge`` of a Gemma.
        prompt: One text, or token ids ``[pos]`` or ``[1, pos]``.
        saes: A transcoder for every layer, or a CLT; SAEs of the MLPs' outputs in the place of
            transcoders are sources only. SAEs of ``hook_z`` and of the stream may stand beside them.
        targets: Words, ids, pairs of them (differences), :class:`Logit`, :class:`LogitDifference`,
            :class:`StreamDirection`, :class:`FeatureTarget`; None for the likeliest next tokens.
        max_n_logits: Most of these.
        desired_logit_prob: Share of the probability that they should reach.
        max_feature_nodes: Rows for so many features, the most influential ones; None for all.
        min_share: Effects that are a smaller share of their row are dropped, for long prompts.
        exclude: Special tokens that dictionaries leave alone.
        memory_budget: Bytes, or ``"4 GB"``, for all that is not the graph itself.
        progress: Show a progress bar.

    Returns:
        The graph; ``metadata["residual"]`` is the largest gap between a row's sum and its node's
        pre-activation, as a share of the largest pre-activation.

    Raises:
        ModelError: A layer without a dictionary, two at one site, or one that cannot be traced.
        TaskError: Several prompts, no or equal targets, a position outside the prompt.
        FeatureIndexError: A target feature that is not active.
        EmptySelectionError: No feature is active.
        MissingHookError: The model's norms were folded and a transcoder reads the gain.
        GemmaScopeError: The memory budget is too small.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> graph
        Graph('<bos>thecapitalofthestatecontainingdallasis': 9 tokens, 13 biases, 376 features,
          32 errors, 1 target, 36505 edges)
        >>> print(f"{graph.scores.replacement:.2f}")
        0.96
    """
    # Phase 0: what is asked for makes sense.
    _check_limits(max_n_logits, desired_logit_prob, max_feature_nodes, min_share)

    # Phase 1: one forward pass freezes attention and norms; every dictionary encodes its site.
    traced = TracedPrompt.of(model, prompt, saes, exclude=exclude, memory_budget=memory_budget)

    # Phase 2: targets become vectors that read the stream, or nodes of features.
    if targets is None:
        seeds, features = traced.readout.top(max_n_logits, desired_logit_prob, -1), {}
    else:
        seeds, features = traced.choose(targets)
    traced = traced.with_seeds(seeds)
    weights = _weights(traced, features)

    # Phase 3: the sweep makes a row for every target, then for features, the most influential first.
    edges = matrix(
        traced.sweep,
        seeds,
        sorted(features),
        weights,
        max_features=max_feature_nodes,
        min_share=min_share,
        progress=progress,
    )

    # Phase 4: nodes get ids and values, and every row must sum to the value of its node.
    columns = {**traced.columns, "weight": weights}
    residual = _judge(traced, columns, edges) if min_share == 0 else float("nan")

    # Phase 5: the graph, with what is needed to run its prompt again.
    words = token_strings(model, traced.frozen.tokens)
    details = {
        "prompt": prompt if isinstance(prompt, str) else "".join(words),
        "token_ids": tuple(traced.frozen.tokens.tolist()),
        "model": str(getattr(model.cfg, "model_name", "model")),
        "weights": weights_of(model),
        "n_layers": traced.frozen.n_layers,
        "exclude": exclude if isinstance(exclude, (str, int)) else tuple(exclude),
        "dictionaries": {
            activity.site.label: _dictionary_name(activity.site.hooked)
            for activity in traced.layout.activities
        },
        "targets": tuple(seed.source for seed in seeds),
        "logits": "before the final soft-cap",
        "max_feature_nodes": max_feature_nodes,
        "min_share": min_share,
        "residual": residual,
    }
    return Graph(columns, edges, tuple(words), details)


def allowed_gap(dtypes: Iterable[torch.dtype], n_layers: int, d_model: int) -> float:
    """The share of the absolute sum of a row that its sum may be off, see the opening of this file.

    ``dtypes`` are those of the model, of features and of the rows; the narrowest counts.
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    terms = d_model if eps <= torch.finfo(torch.float32).eps else 1
    return SIGMAS * eps / 4 * math.sqrt(ROUNDINGS * n_layers * terms)


def _weights(
    traced: TracedPrompt, features: dict[int, FeatureTarget]
) -> Float[np.ndarray, " node"]:
    """Probabilities if all targets are tokens, else an equal share each."""
    first, seeds = traced.layout.n_nodes, traced.seeds
    weights = np.zeros(first + len(seeds))
    if not features and all(seed.token >= 0 for seed in seeds):
        weights[first:] = [seed.probability for seed in seeds]
    else:
        weights[[*features, *range(first, len(weights))]] = 1 / (len(seeds) + len(features))
    return weights


def _judge(traced: TracedPrompt, columns: Mapping[str, np.ndarray], edges: Adjacency) -> float:
    """The residual: how far rows are from what they explain."""
    if not np.isfinite(edges.sizes).all():
        check_finite(torch.from_numpy(edges.matrix.data), "The effect of a node on a target")
    values = columns["activation"][edges.nodes]
    check_finite(torch.from_numpy(values), "The pre-activation of an explained node")
    sums = edges.sums
    gaps = np.abs(sums - values)
    residual = float(gaps.max() / max(np.abs(values).max(), 1e-30))
    allowed = _allowed(traced, edges)
    # of terms that cancel, rounding leaves a share of their size
    size = edges.sizes
    worst = int(np.argmax(gaps - allowed * np.maximum(size, np.abs(values))))
    if not gaps[worst] <= allowed * max(size[worst], abs(values[worst])):
        node = columns["id"][edges.nodes[worst]]
        raise ModelError(
            f"The effects on {node} sum to {sums[worst]:.6g}, and it is {values[worst]:.6g}: the frozen "
            f"model is not this one (allowed is {allowed:.0e} of the effects' size)",
            fix="load_model(name), which folds nothing, or dtype='float32'",
        )
    return residual


def _allowed(traced: TracedPrompt, edges: Adjacency) -> float:
    """The share of a row's size that rounding may leave."""
    frozen = traced.frozen
    dtypes = {dtype_of(frozen.model), torch.from_numpy(edges.matrix.data[:0]).dtype}
    dtypes |= {activity.acts.values.dtype for activity in traced.layout.activities}
    return allowed_gap(dtypes, frozen.n_layers, int(frozen.model.cfg.d_model))


def _check_limits(
    max_n_logits: int, share: float, max_feature_nodes: int | None, min_share: float
) -> None:
    """Refuses numbers that mean nothing."""
    wrong = {
        f"max_n_logits={max_n_logits}": max_n_logits < 1,
        f"desired_logit_prob={share}": not 0 < share <= 1,
        f"max_feature_nodes={max_feature_nodes}": max_feature_nodes is not None
        and max_feature_nodes < 1,
        f"min_share={min_share}": not 0 <= min_share < 1,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise TaskError(
                f"{name} leaves nothing to trace",
                exists="max_n_logits and max_feature_nodes of at least 1, shares between 0 and 1",
            )


def _dictionary_name(site: HookedSite) -> str:
    """What tells a dictionary from others of its site: its spec, or its size and a checksum."""
    owner: Any = site
    spec = spec_of(owner.dictionary if hasattr(owner, "dictionary") else owner.sae)
    if spec is not None:
        return f"{spec.release}/{spec.sae_id}"
    # of one row of the encoder: in training no two become equal
    row = site.weights.W_enc[0].detach().float().cpu().numpy()
    return f"{site.d_sae} features, checksum {zlib.crc32(row.tobytes()):08x}"
