"""The smallest faithful circuits of the bundled suite, by method, for ``causes.py``.

1. Edges are scored on training prompts; ``exact`` patches each alone.
2. Circuits of the best edges by size run on held-out prompts, everything else replaced by the corrupted
   run: all sizes up to 60, then steps of 4, from 128 on of 16.
3. The smallest from which on faithfulness stays at .9 or above is shown with

   * ``random``: faithfulness of the best of 20 random circuits of that size;
   * ``AUROC``: of the scores, where the truth is the tenth of the edges with the largest exact effects;
   * ``Pearson``: with the exact effects;
   * ``conservation``: scores out of the embedding over the whole difference of the metric, minus 1. Only
     integrated gradients promise 0; of ``exact`` it says how far edges are from adding up;
   * ``overlap``: mean Jaccard index of the best 20 edges between 100 resamples of the prompts;
   * CPR and CMD as MIB defines them.
"""

from __future__ import annotations

from typing import Any

import gemmascope_plugin as gs
from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.effects import Effects
from gemmascope_plugin.causes.exact.edge_patching import edge_patching
from gemmascope_plugin.causes.gradient.edge_attribution import edge_attribution
from gemmascope_plugin.circuits import bootstrap_stability, evaluate, evaluate_ranking
from gemmascope_plugin.circuits.scored_methods import graph_of
from gemmascope_plugin.circuits.select import top_n
from tests.support.recovery import auroc

METHODS: dict[str, dict[str, Any]] = {
    "eap": {"method": "eap"},
    "eap, naive": {"method": "eap", "writer_delta": "naive"},
    "eap-ig, 10": {"method": "eap-ig", "steps": 10},
    "eap-ig-activations, 5": {"method": "eap-ig-activations", "steps": 5},
    "exact": {},
}
COLUMNS = "smallest share random AUROC Pearson conservation overlap CPR CMD".split()


def table(smoke: bool = False) -> None:
    """One line per task and method.

    Args:
        smoke: One task with few prompts instead of 64 of each split, and two methods.
    """
    suite, n = gs.tiny(), 2 if smoke else 64
    for name in ["ioi"] if smoke else suite.tasks:
        train, held_out = suite.task(name, split="train", n=n), suite.task(name, n=n)
        exact = edge_patching(suite.model, train)
        title = f"{name}, {exact.edges.n_edges} edges, {n} + {n} prompts"
        print(f"{title:<36}" + "".join(f"{column:>13}" for column in COLUMNS))
        for label, options in list(METHODS.items())[: 1 if smoke else None]:
            effects = exact
            if options:
                effects = edge_attribution(suite.model, train, by_prompt=True, **options)
            cells = row(suite.model, held_out, effects, exact)
            print(f"  {label:<34}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def row(model: Any, held_out: Task, effects: Effects, exact: Effects) -> list[str]:
    """What the columns say of one method."""
    graph, sizes_of_exact = graph_of(effects), exact.flat.abs()
    n = graph.n_edges
    circuit = top_n(graph, n)
    sizes = [*range(61), *range(64, 121, 4), *range(128, n, 16), n]
    smallest = evaluate(model, circuit, held_out, sizes=sizes, n_random=0).smallest(0.9)
    assert smallest is not None, "all edges together are the model"
    random = evaluate(model, circuit.top(smallest), held_out, sizes=[], n_random=20).random
    curve = evaluate_ranking(model, graph, held_out)
    return [
        f"{smallest}",
        f"{smallest / n:.1%}",
        f"{max(random):.2f}",
        f"{auroc(effects.flat, sizes_of_exact >= sizes_of_exact.quantile(0.9)):.3f}",
        f"{effects.pearson(exact):.3f}",
        f"{float(effects.total[0].sum()) / -effects.gap - 1:+.4f}",
        f"{bootstrap_stability(effects, 20)[0]:.2f}",
        f"{curve.cpr:.3f}",
        f"{curve.cmd:.3f}",
    ]
