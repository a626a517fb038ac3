"""How stable a circuit is: between dictionaries (:func:`stability`), between samples of prompts
(:func:`bootstrap_stability`).

The same task in several sets of dictionaries: other widths, other sparsities, other seeds.

1. For each set a circuit is found on the same prompts, and its prefixes are evaluated on the same
   held-out prompts: the size that it takes for a faithfulness, and the faithfulness at a size.
2. Two circuits **share** a feature if the other one has one at the same site whose decoder row points the
   same way: cosine at least ``cosine``. The overlap of one with another is the share of its best ``n``
   features that have such a partner among the other's best ``n``.

What holds in one dictionary only is a finding about that dictionary (circuits are far from unique).

Resampled prompts: the mean overlap (Jaccard) of the best ``k`` edges between resamples.

Cost: one circuit and one evaluation per set, products of decoder rows of the best ``n`` features; sorts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.gradient.task_site import TaskSite, sites_of
from gemmascope_plugin.causes.task import check_task
from gemmascope_plugin.circuits.discover import discover
from gemmascope_plugin.circuits.evaluate import evaluate
from gemmascope_plugin.circuits.feature_ablation import Errors
from gemmascope_plugin.circuits.feature_method import FEATURES
from gemmascope_plugin.errors import EmptySelectionError, InputError, TaskError
from gemmascope_plugin.graphs.circuit import Circuit
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model, describe, wide
from gemmascope_plugin.splice.hooked_sae import Saes

Directions = dict[str, Float[torch.Tensor, "_ _"]]
"""Unit decoder rows ``[feature, width]`` by site."""


@gate(model=check_model, task=check_task, held_out=check_task)
def stability(
    model: HookedModel,
    task: Task,
    held_out: Task,
    *,
    sets: Mapping[str, Saes],
    n: int = 30,
    at_least: float = 0.8,
    cosine: float = 0.7,
    errors: Errors = "kept",
    sizes: Sequence[int] = (5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400),
    **options: Any,
) -> Any:
    """A DataFrame, one row per set of dictionaries.

    Columns: ``dictionaries``, ``features`` (of all of them), ``nodes`` (active ones), ``size`` (the
    smallest measured one from which on faithfulness stays at ``at_least``; NA if none does),
    ``faithfulness`` of the best ``n``, and ``overlap NAME`` with the best ``n`` of every other set.

    Args:
        model: The model.
        task: Prompts that circuits are found on.
        held_out: Prompts that they are evaluated on.
        sets: Name to dictionaries.
        n: Size at which they are compared.
        at_least: Faithfulness that is asked for.
        cosine: Of decoder rows that count as the same feature.
        errors: Treatment of reconstruction errors.
        sizes: Sizes that are measured; those above the number of nodes are left out.
        **options: As :func:`discover` has them for circuits of features; errors are not nodes here.

    Raises:
        EmptySelectionError: Fewer than two sets, or one with fewer than ``n`` nodes.
        UnknownNameError: A set has two dictionaries at one place.
    """
    import pandas as pd

    if not isinstance(sets, Mapping):
        raise InputError(
            f"{describe(sets)} does not name sets of dictionaries", fix="sets={name: [...], ...}"
        )
    if len(sets) < 2:
        raise EmptySelectionError(
            f"There are {len(sets)} sets of dictionaries to compare", fix="sets={name: [...], ...}"
        )
    options = {"nodes": FEATURES, **options}
    rows, best = {}, {}
    for name, saes in sets.items():
        circuit = discover(model, task, saes=saes, size=n, errors=False, edges=False, **options)
        measured = [size for size in sizes if size <= circuit.n_units]
        scores = evaluate(
            model, circuit, held_out, saes=saes, sizes=measured, n_random=0, errors=errors
        )
        sites = sites_of(model, saes, level=options.get("level"))
        best[name] = _directions(circuit, sites)
        rows[name] = {
            "dictionaries": len(sites),
            "features": sum(site.d_sae for site in sites),
            "nodes": circuit.n_units,
            "size": scores.smallest(at_least),
            "faithfulness": scores.faithfulness,
        }
    for name, directions in best.items():
        for other, others in best.items():
            if other != name:
                rows[name][f"overlap {other}"] = overlap(directions, others, cosine)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("set")
    frame["size"] = frame["size"].astype("Int64")
    return frame


def overlap(directions: Directions, others: Directions, cosine: float) -> float:
    """Share of features that have a partner; NaN without features."""
    n = sum(len(rows) for rows in directions.values())
    n_shared = sum(
        int(((rows @ others[site].T) >= cosine).any(1).sum())
        for site, rows in directions.items()
        if site in others and len(others[site])
    )
    return n_shared / n if n else float("nan")


def _directions(circuit: Circuit, sites: Sequence[TaskSite]) -> Directions:
    """Unit decoder rows of the kept features, each once."""
    by_site: Directions = {}
    for site in sites:
        features = {
            node.index
            for node in circuit.nodes
            if node.kind == "feature" and node.site == site.hook
        }
        W_dec = site.coder.W_dec
        rows = wide(W_dec[torch.tensor(sorted(features), dtype=torch.long, device=W_dec.device)])
        by_site[site.hook] = torch.nn.functional.normalize(rows, dim=1).cpu()
    return by_site


def bootstrap_stability(
    effects: Effects, k: int, *, n: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Mean and smallest Jaccard overlap of the best ``k`` edges between resamples of the prompts.

    Args:
        effects: Edge effects with ``values_by_prompt``.
        k: How many edges.
        n: Resamples.
        seed: Of the resampling.

    Raises:
        TaskError: The effects of single prompts were not kept, or there is only one prompt.
        EmptySelectionError: ``k`` is not among 1 to the number of edges.
    """
    by_prompt = effects.values_by_prompt
    if by_prompt is None or by_prompt.shape[-1] < 2:
        raise TaskError(
            f"{effects!r} has no effects of several prompts",
            fix="edge_attribution(..., by_prompt=True) on two prompts or more",
        )
    flat = by_prompt[effects.edges.mask].T.cpu()
    if not 1 <= k <= flat.shape[1]:
        raise EmptySelectionError(f"The best {k} edges", exists=f"1 to {flat.shape[1]} edges")
    generator = torch.Generator().manual_seed(seed)
    best = torch.zeros(n, flat.shape[1], dtype=torch.bool)
    for row in best:
        draw = torch.randint(len(flat), (len(flat),), generator=generator)
        row[flat[draw].mean(0).abs().topk(k).indices] = True
    overlaps = [_jaccard(best[i], best[j]) for i, j in combinations(range(n), 2)]
    return sum(overlaps) / len(overlaps), min(overlaps)


def _jaccard(best: Bool[torch.Tensor, " unit"], other: Bool[torch.Tensor, " unit"]) -> float:
    """Size of the intersection over size of the union."""
    return int((best & other).sum()) / int((best | other).sum())
