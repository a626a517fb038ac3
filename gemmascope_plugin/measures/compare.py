"""Several dictionaries on the same corpus: one row each, and the picture of fit against sparsity.

1. Each dictionary is measured by ``measure`` on the same tokens of the same model, so that the rows
   can be compared: a dictionary is better than another one at the same site if it has a lower FVU, or a
   lower delta loss, at the same L0.
2. With known concepts: ``concept_f1``, ``splitting`` and ``absorption``, means over the concepts that
   hold on at least ``min_tokens`` tokens, of the latter two over those with a feature (``concepts.py``);
   ``k_spearman`` (``adaptivity.py``); and the forest of features, ``coverage``, ``tree_precision``,
   ``tree_recall`` and ``tree_f1`` (``hierarchy.py``).
3. On demand ``s_res`` (``probe.py``) and what a dictionary costs (``cost.py``), whose seconds differ from
   run to run.
4. ``plot_comparison`` draws FVU (or another column) against L0, one point a dictionary.

FVU is relative to the variance of a dictionary's own target: rows of different sites, or of a transcoder
and an SAE, compare through ``share_of_zero`` and ``share_of_mean`` rather than through FVU.

Cost: that of ``measure`` for every dictionary, and of each of the others that is asked for; nothing is
shared between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import EmptySelectionError, InputError, UnknownNameError, check_choice
from gemmascope_plugin.features.stream import Tokens, check_concepts
from gemmascope_plugin.measures.adaptivity import adaptivity
from gemmascope_plugin.measures.concepts import concept_scores_of
from gemmascope_plugin.measures.cost import cost as measure_cost
from gemmascope_plugin.measures.hierarchy import hierarchy
from gemmascope_plugin.measures.measure import measure
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe
from gemmascope_plugin.splice.hooked_sae import check_saes

if TYPE_CHECKING:
    from pandas import DataFrame

_TITLES = {
    "fvu": "fraction of variance unexplained",
    "delta_loss": "rise of the next-token loss (nats)",
    "share_of_zero": "rise of the loss / rise with zeros",
    "share_of_mean": "rise of the loss / rise with the mean",
    "dead_share": "share of dead features",
    "dense_share": "share of dense features",
    "r_l0": "uniformity of importance r_L0",
    "max_cosine": "mean maximum decoder cosine",
    "concept_f1": "mean F1 of the best feature of a concept",
    "splitting": "mean number of features per concept",
    "absorption": "mean share of absorbed tokens",
    "k_spearman": "rank correlation of L0 with known concepts",
    "coverage": "mean activation coverage of edges",
    "s_res": "share of edges that reconstruct",
    "tree_precision": "edges that are edges of concepts",
    "tree_recall": "concepts found below one above them",
    "tree_f1": "F1 of the tree of concepts",
    "n_parameters": "parameters",
    "nbytes": "bytes",
    "encode_madds": "multiply-adds of an encode per token",
    "decode_madds": "multiply-adds of a decode per token",
    "encode_seconds": "seconds of an encode per 1,000 tokens",
    "round_trip_seconds": "seconds of a round trip per 1,000 tokens",
}


@gate(model=check_model, saes=check_saes)
def compare(
    model: HookedModel,
    saes: Mapping[str, Any],
    tokens: Tokens,
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
    n_positions: int = 8,
    concepts: Bool[torch.Tensor, "document pos concept"] | None = None,
    names: Sequence[str] | None = None,
    min_tokens: int = 20,
    n_parents: int = 0,
    cost: bool = False,
) -> Any:
    """Measures several dictionaries on the same corpus.

    Args:
        model: The bare model.
        saes: Name to dictionary, or to ``HookedSAE(sae, level=...)``, so that levels of a Matryoshka
            dictionary can stand beside one another. A lazy mapping opens one at a time.
        tokens: Token ids ``[document, pos]``, or several such tensors.
        exclude: Special tokens that are neither measured nor touched.
        batch_size: Documents per forward pass.
        n_positions: Positions per document at which ``r_l0`` is measured; 0 for none.
        concepts: Where each known concept holds; None if none are known.
        names: One name per concept.
        min_tokens: Tokens on which a concept must hold, or a child be active, to count.
        n_parents: Parents whose children are probed for ``s_res``; 0 for none.
        cost: Whether to measure what each dictionary costs.

    Returns:
        A DataFrame, one row per dictionary in the given order; column ``name``, then those of
        ``Measures.to_frame``, then those of steps 2 and 3 at the top of this file that were asked for.

    Raises:
        EmptySelectionError: No token, or excluded tokens only.
        UnknownNameError: No dictionary, or one without a name.
        ModelError: Not a dictionary with one site, or concepts without names or for other tokens.
        MissingHookError: The model has no such hook.
        WidthMismatchError: A dictionary of another width than the model's tensor.

    Example:
        >>> suite = gs.tiny()
        >>> tokens = suite.task("agreement").bind(suite.model).clean
        >>> saes = {f"layer {layer}": suite.load("res", layer) for layer in (1, 2)}
        >>> frame = gs.compare(suite.model, saes, tokens, n_positions=0)
        >>> frame[["name", "l0", "fvu"]].round(2)
              name     l0   fvu
        0  layer 1  11.96  0.02
        1  layer 2  11.21  0.04
    """
    import pandas as pd

    _check_named(saes)
    check_concepts(concepts, names)
    options: dict[str, Any] = {"exclude": exclude, "batch_size": batch_size}
    labels = {} if concepts is None else {"concepts": concepts, "names": names}
    limits = {"min_tokens": min_tokens, "n_parents": n_parents}
    rows = []
    for name in saes:
        subject = (model, saes[name], tokens)
        rows.append({"name": name, **measure(*subject, n_positions=n_positions, **options).row()})
        if labels:
            rows[-1] |= _of_concepts(subject, min_tokens, {**labels, **options})
        if labels or n_parents:
            figures = hierarchy(*subject, **labels, **limits, **options).row()
            rows[-1] |= {column: figures[column] for column in _of_trees(bool(labels), n_parents)}
        if cost:
            rows[-1] |= measure_cost(*subject, **options).costs()
    frame = pd.DataFrame(rows)
    return frame.astype({"level": "Int64"})


def _check_frame(frame: DataFrame, call: str = "") -> None:
    """Refuses what is not a table."""
    if not hasattr(frame, "columns"):
        raise InputError(
            f"{describe(frame)} is not a table of dictionaries",
            fix=f"frame = gemmascope_plugin.compare(model, saes, tokens); {call}",
        )


@gate(frame=_check_frame)
def plot_comparison(frame: DataFrame, *, y: str = "fvu", title: str = "") -> Any:
    """Draws one point per dictionary of :func:`compare`: FVU, or another figure, against L0.

    Args:
        frame: What ``compare`` returned, or some of its rows.
        y: The column on the vertical axis.
        title: Title of the figure.

    Returns:
        A plotly figure.

    Raises:
        UnknownNameError: No such column, or the frame lacks it.
        EmptySelectionError: The frame has no rows.
    """
    check_choice("column", y, _TITLES)
    if y not in frame:
        raise UnknownNameError(
            f"The frame has no column {y!r}",
            exists=", ".join(name for name in _TITLES if name in frame),
            fix="compare(..., concepts=..., names=..., n_parents=50, cost=True) for all columns",
        )
    if not len(frame):
        raise EmptySelectionError(
            "There is no dictionary to draw", fix="plot_comparison(compare(...))"
        )
    names, values = [str(name) for name in frame["name"]], [float(v) for v in frame[y]]
    if len(set(names)) < len(names):  # rows of several frames: equal names would hide points
        names = [f"{i} {name}" for i, name in enumerate(names)]
    # a series each, so that the legend says which point is which
    series = {
        name: [value if j == i else math.nan for j in range(len(names))]
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    }
    l0 = [float(value) for value in frame["l0"]]
    return figures.curves(
        l0, series, title=title, x_title="L0: active features per token", y_title=_TITLES[y]
    )


def _of_concepts(
    subject: tuple[HookedModel, Any, Tokens], min_tokens: int, options: dict[str, Any]
) -> dict[str, float]:
    """Means over known concepts, and how the number of active features follows them."""
    scores = concept_scores_of(*subject, **options)
    scores = scores[scores["n_tokens"] >= max(min_tokens, 1)]
    with_feature = scores[scores["feature"].notna()]
    return {
        "concept_f1": float(scores["f1"].mean()),
        "splitting": float(with_feature["splitting"].mean()),
        "absorption": float(with_feature["absorption"].mean()),
        "k_spearman": adaptivity(*subject, **options).k_spearman,
    }


def _of_trees(has_concepts: bool, n_parents: int) -> list[str]:
    """The figures of the forest that were asked for."""
    probed = ["s_res"] if n_parents else []
    return [
        "coverage",
        *probed,
        *(["tree_precision", "tree_recall", "tree_f1"] if has_concepts else []),
    ]


def _check_named(saes: object) -> None:
    if not isinstance(saes, Mapping):
        raise UnknownNameError(
            f"compare() needs a name for each dictionary, and got a {type(saes).__name__}",
            fix='compare(model, {"narrow": sae, "wide": other}, tokens)',
        )
