"""Traces a prompt: the direct effects of active features, errors and tokens on each other and on logits.

1. Attention patterns and norm scales are frozen, every MLP is replaced by what its dictionary writes, the
   rest of it being an error node: the stream is linear (``tracing/linear``).
2. A row of the graph is the effect of all nodes on one target; it sums to the target's pre-activation,
   which is checked.
3. Targets are the likeliest next tokens, or what is asked for.

Cost: see ``tracing/linear/sweep.py``; with ``max_feature_nodes`` rows are made for the most
influential features only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.errors import (
    FeatureIndexError,
    ModelError,
    TaskError,
    UnknownNameError,
    nearest,
)
from gemmascope_plugin.graphs.adjacency import Adjacency
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import table_columns
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.prompts import PromptLike
from gemmascope_plugin.models.protocol import HookedModel, dtype_of, weights_of
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.sizes import parse_size
from gemmascope_plugin.splice.check_saes import check_saes
from gemmascope_plugin.tracing.linear.targets import (
    FeatureTarget,
    Logit,
    LogitDifference,
    Readout,
    Seed,
    StreamDirection,
    Target,
    as_target,
    check_distinct,
    position_in,
)
from gemmascope_plugin.tracing.linear.tracer import Tracer
from gemmascope_plugin.tracing.node_table import dictionary_name, node_table
from gemmascope_plugin.tracing.row_tolerance import allowed_gap


@gate(model=check_model, transcoders=check_saes)
def trace(
    model: HookedModel,
    prompt: PromptLike,
    transcoders: Any,
    *,
    targets: Sequence[Target] | Target | None = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    min_share: float = 0.0,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    memory_budget: int | str = "4 GB",
    progress: bool = False,
) -> Graph:
    """The attribution graph of a prompt.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge`` of a Gemma.
        prompt: One text, or token ids ``[pos]`` or ``[1, pos]``.
        transcoders: A transcoder for every layer, or a CLT; SAEs of the MLPs' outputs in the place of
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
    """
    budget = parse_size(memory_budget)
    assert budget is not None, "a budget is a size"
    _check_limits(max_n_logits, desired_logit_prob, max_feature_nodes, min_share)
    tracer = Tracer.of(
        model, prompt, transcoders, exclude=exclude, budget=budget, min_share=min_share
    )
    readout = Readout(tracer.record)
    if targets is None:
        seeds, features = readout.top(max_n_logits, desired_logit_prob, -1), {}
    else:
        seeds, features = chosen(tracer, readout, targets)
    weights = _weights(tracer, seeds, features)
    edges = tracer.rows(seeds, sorted(features), weights, max_feature_nodes, progress)
    nodes = node_table(tracer, seeds, weights)
    words = token_strings(model, tracer.record.tokens)
    details = {
        "prompt": prompt if isinstance(prompt, str) else "".join(words),
        "token_ids": tuple(tracer.record.tokens.tolist()),
        "model": str(getattr(model.cfg, "model_name", "model")),
        "weights": weights_of(model),
        "n_layers": tracer.record.n_layers,
        "exclude": exclude if isinstance(exclude, (str, int)) else tuple(exclude),
        "dictionaries": {
            one.site.label: dictionary_name(one.site.hooked) for one in tracer.layout.activities
        },
        "targets": tuple(seed.source for seed in seeds),
        "logits": "before the final soft-cap",
        "max_feature_nodes": max_feature_nodes,
        "min_share": min_share,
        "residual": _judged(tracer, nodes, edges) if min_share == 0 else float("nan"),
    }
    return Graph(table_columns(nodes), edges, tuple(words), details)


def chosen(
    tracer: Tracer, readout: Readout, targets: Sequence[Target] | Target
) -> tuple[list[Seed], dict[int, FeatureTarget]]:
    """Targets by kind: seeds, and nodes of features.

    Args:
        tracer: The prompt's.
        readout: Of its logits.
        targets: What is asked for.

    Raises:
        TaskError: None, or one twice.
    """
    single = isinstance(targets, (str, int, Logit, LogitDifference, StreamDirection, FeatureTarget))
    given: Any = [targets] if single else targets
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        as_target(given)  # pyright: ignore[reportArgumentType]  # says what a target is
    given = list(given)
    if not given:
        raise TaskError("No target was given", fix="targets=None for the likeliest next tokens")
    seeds: list[Seed] = []
    features: dict[int, FeatureTarget] = {}
    names: list[tuple[Any, str, int]] = []
    for target in map(as_target, given):
        if isinstance(target, FeatureTarget):
            node = feature_node(tracer, target)
            features[node] = target
            position = position_in(target.position, tracer.record.n_pos)
            names.append((node, f"{target.site}/{target.feature}", position))
            continue
        seed = _seed(readout, target)
        seeds.append(seed)
        names.append((seed.source, seed.label, seed.position))
    check_distinct(names)
    return seeds, features


def _seed(readout: Readout, target: Logit | LogitDifference | StreamDirection) -> Seed:
    if isinstance(target, Logit):
        return readout.logit(target)
    if isinstance(target, LogitDifference):
        return readout.difference(target)
    return readout.direction(target)


def feature_node(tracer: Tracer, target: FeatureTarget) -> int:
    """The node of an active feature.

    Raises:
        UnknownNameError: No such site, or one whose features are sources only.
        FeatureIndexError: The feature is not active there.
    """
    sites = {one.site.label: i for i, one in enumerate(tracer.layout.activities)}
    if target.site not in sites:
        raise UnknownNameError(
            f"No dictionary stands at {target.site!r}",
            exists=", ".join(sites),
            nearest=nearest(target.site, sites),
        )
    index = sites[target.site]
    own = tracer.layout.activities[index]
    if not own.site.is_target:
        raise UnknownNameError(
            f"What features at {target.site!r} read is no linear function of the stream",
            fix="a transcoder instead of an SAE of the MLP's output",
        )
    position = position_in(target.position, tracer.record.n_pos)
    start, stop = (int(own.acts.offsets[position + i]) for i in (0, 1))
    active = own.acts.indices[start:stop].tolist()
    if target.feature not in active:
        raise FeatureIndexError(
            f"Feature {target.feature} of {target.site} is not active at position {position}",
            exists=f"{len(active)} active features there: {', '.join(map(str, active[:10]))}",
        )
    return tracer.layout.starts[index] + start + active.index(target.feature)


def _weights(tracer: Tracer, seeds: Sequence[Seed], features: dict[int, Any]) -> np.ndarray:
    """Probabilities if all targets are tokens, else an equal share each."""
    first = tracer.layout.n_nodes
    weights = np.zeros(first + len(seeds))
    if not features and all(seed.token >= 0 for seed in seeds):
        weights[first:] = [seed.probability for seed in seeds]
    else:
        weights[[*features, *range(first, len(weights))]] = 1 / (len(seeds) + len(features))
    return weights


def _judged(tracer: Tracer, nodes: Any, edges: Adjacency) -> float:
    """The residual: how far rows are from what they explain.

    Raises:
        ModelError: Something is not finite, or rows do not sum to what they explain.
    """
    if not np.isfinite(edges.sizes).all():
        check_finite(torch.from_numpy(edges.matrix.data), "The effect of a node on a target")
    values = nodes["activation"].to_numpy()[edges.nodes]
    check_finite(torch.from_numpy(values), "The pre-activation of an explained node")
    sums = edges.sums
    gaps = np.abs(sums - values)
    residual = float(gaps.max() / max(np.abs(values).max(), 1e-30))
    allowed = _allowed(tracer, edges)
    # of terms that cancel, rounding leaves a share of their size
    size = edges.sizes
    worst = int(np.argmax(gaps - allowed * np.maximum(size, np.abs(values))))
    if not gaps[worst] <= allowed * max(size[worst], abs(values[worst])):
        node = nodes["id"].iloc[edges.nodes[worst]]
        raise ModelError(
            f"The effects on {node} sum to {sums[worst]:.6g}, and it is {values[worst]:.6g}: the frozen "
            f"model is not this one (allowed is {allowed:.0e} of the effects' size)",
            fix="load_model(name), which folds nothing, or dtype='float32'",
        )
    return residual


def _allowed(tracer: Tracer, edges: Adjacency) -> float:
    """The share of a row's size that rounding may leave."""
    record = tracer.record
    dtypes = {dtype_of(record.model), torch.from_numpy(edges.matrix.data[:0]).dtype}
    dtypes |= {one.acts.values.dtype for one in tracer.layout.activities}
    return allowed_gap(dtypes, record.n_layers, int(record.model.cfg.d_model))


def _check_limits(
    max_n_logits: int, share: float, max_feature_nodes: int | None, min_share: float
) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        TaskError: With the number.
    """
    wrong = {
        f"max_n_logits={max_n_logits}": max_n_logits < 1,
        f"desired_logit_prob={share}": not 0 < share <= 1,
        f"max_feature_nodes={max_feature_nodes}": max_feature_nodes is not None
        and max_feature_nodes < 1,
        f"min_share={min_share}": not 0 <= min_share < 1,
    }
    for name, bad in wrong.items():
        if bad:
            raise TaskError(
                f"{name} leaves nothing to trace",
                exists="max_n_logits and max_feature_nodes of at least 1, shares between 0 and 1",
            )
