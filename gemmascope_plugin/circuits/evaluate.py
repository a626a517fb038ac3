"""Checks a circuit by ablating everything outside it in the real model.

1. What the circuit does not keep is replaced, by default by its value in the corrupted run: a node's
   output at every position, or what one reader sees of one writer, see ``edge_ablation``.
2. Faithfulness ``f(C) = (m(C) - m(none)) / (m(all) - m(none))``, ``m(none)`` with everything replaced: a
   ratio of means over prompts, never a mean of ratios (Marks et al., arXiv 2403.19647, section 4).
3. Completeness ``f(M - C)``: what is left without the circuit, near 0 if nothing is missing from it.
4. Minimality: ``|m(C - e) - m(C)| / |m(all) - m(none)|`` for every unit ``e`` of the circuit.
5. The divergence of its next-token distribution from the model's, summed over the vocabulary.
6. Faithfulness of the first 0, 1, 2, ... units of the ranking, and of random circuits of each size.

Cost: one row of prompts per circuit that differs from the others; circuits ride on the batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float

from gemmascope_plugin.causes import Task
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.exact.activation_patching import MAX_ROWS
from gemmascope_plugin.causes.memory import Limit
from gemmascope_plugin.causes.method import unused_option
from gemmascope_plugin.causes.metrics import divergence_at
from gemmascope_plugin.causes.replace import REPLACEMENTS, Replacement
from gemmascope_plugin.causes.task import check_task
from gemmascope_plugin.circuits.ablator import Ablator, ablator, metric_ends
from gemmascope_plugin.circuits.feature_ablation import Errors
from gemmascope_plugin.circuits.feature_nodes import is_feature_graph
from gemmascope_plugin.circuits.scores import Scores
from gemmascope_plugin.errors import check_choice
from gemmascope_plugin.graphs.circuit import Circuit, check_circuit
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes

_N_SIZES, _FEW = 12, 24
_COMPARED: tuple[Errors, ...] = ("kept", "as-circuit", "ablated")
"""Treatments of errors, from the one that flatters a circuit most to the hardest."""


@gate(model=check_model, circuit=check_circuit, task=check_task, saes=check_saes)
def evaluate(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    *,
    saes: Saes = None,
    sizes: Sequence[int] | None = None,
    n_random: int = 20,
    seed: int = 0,
    replacement: Replacement = "other",
    errors: Errors | None = None,
    minimality: bool = False,
    max_rows: int = MAX_ROWS,
    memory_budget: int | str = "2 GB",
    progress: bool = False,
) -> Scores:
    """Faithfulness of a circuit, of every prefix of its ranking, and of random circuits.

    Args:
        model: The model.
        circuit: From :func:`discover`; use a task with other prompts here than there.
        task: Held-out prompts.
        saes: The dictionaries that the circuit's features belong to.
        sizes: Circuit sizes to measure; 0 to all units by default, all of up to 24, else 13 of
            them, always with the circuit's own size.
        n_random: Random circuits of each size.
        seed: Seed of the random circuits.
        replacement: What stands in for what is not kept: the ``other`` (corrupted) run, ``zero``,
            ``mean`` over its prompts per position, or ``overall_mean``.
        errors: Of circuits of features: reconstruction errors are kept where the circuit has them
            (``as-circuit``, the default), ``kept`` all, or all ``ablated``. Faithfulness is 0 where all
            else is replaced, under the same rule for errors.
        minimality: Take out every kept unit alone as well.
        max_rows: Prompt copies per forward pass at most.
        memory_budget: Bytes, or ``"2 GB"``.
        progress: Show a progress bar.

    Raises:
        EmptySelectionError: A size below 0 or above the number of units.
        TaskError: The metric with everything replaced hardly differs from the full model's.
        UnknownNameError: The circuit has features and no dictionaries were given, edges that the model
            does not have, or an unknown replacement or treatment of errors.

    Example:
        >>> suite = gs.tiny()
        >>> task = suite.task("agreement", n=8)
        >>> circuit = gs.discover(suite.model, task, method="exact", size=6)
        >>> scores = gs.evaluate(suite.model, circuit, suite.task("agreement", n=8, seed=1), n_random=5)
        >>> scores
        Scores(agreement, 6 of 20 nodes, faithfulness 0.994, best of 5 random 0.063, metric full
          9.913, empty -11.674)
    """
    check_choice("replacement", replacement, REPLACEMENTS)
    treated = _errors(circuit, errors)
    bound = task.bind(model)
    measured_sizes = sorted({circuit.size, *(_sizes(circuit.n_units) if sizes is None else sizes)})
    masks = _masks(circuit, measured_sizes, n_random, seed, minimality)
    # what is in no unit of a circuit of features is kept where everything is, and in the complement
    rest = torch.zeros(len(masks), dtype=torch.bool)
    rest[-4] = rest[-2] = is_feature_graph(circuit.graph)
    with ablator(
        circuit.graph,
        model,
        saes,
        replacement=replacement,
        errors=treated,
        limit=Limit(max_rows, memory_budget),
        progress=progress,
    ) as run:
        values = _each_once(run, bound, masks, rest)
        kl = _divergence(run, model, task, circuit.is_kept)
    full, empty = metric_ends(values, model)
    shares = ((values.mean(1) - empty) / (full - empty)).tolist()
    n = len(measured_sizes)
    changes = (values[n + n * n_random : -4].mean(1) - values[-3].mean()) / (full - empty)
    return Scores(
        circuit=circuit,
        faithfulness=shares[-3],
        sizes=tuple(measured_sizes),
        faithfulness_by_size=tuple(shares[:n]),
        random_by_size=tuple(
            tuple(shares[n + i * n_random : n + (i + 1) * n_random]) for i in range(n)
        ),
        metric_full=full,
        metric_empty=empty,
        completeness=shares[-4],
        kl=kl,
        by_prompt=bound.fold(values[-3:]),
        minimality=tuple(changes.abs().tolist()) if minimality else None,
        metadata={
            "task": bound.name,
            "metric": bound.metric.metric.name,
            "logits": bound.logits,
            "n_prompts": bound.n_prompts,
            "replacement": replacement,
            **({"errors": treated} if is_feature_graph(circuit.graph) else {}),
        },
    )


@gate(model=check_model, circuit=check_circuit, task=check_task, saes=check_saes)
def evaluate_features(
    model: HookedModel, circuit: Circuit, task: Task, *, saes: Saes, **options: Any
) -> Scores:
    """:func:`evaluate` under each treatment of errors, side by side in :attr:`Scores.by_errors`.

    Args:
        model: The model.
        circuit: From ``discover(..., nodes="features")``.
        task: Held-out prompts.
        saes: The dictionaries that the circuit was found with.
        **options: As :func:`evaluate` has them, ``errors`` aside.

    Returns:
        Scores of the circuit as it is, with errors kept where their nodes are.

    Raises:
        TaskError: The circuit has no feature nodes, or the metric hardly differs.
        UnknownNameError: Other dictionaries than the circuit's.
    """
    by_errors = {
        errors: evaluate(model, circuit, task, saes=saes, errors=errors, **options)
        for errors in _COMPARED
    }
    return replace(by_errors["as-circuit"], by_errors=by_errors)


def _masks(
    circuit: Circuit, sizes: Sequence[int], n_random: int, seed: int, minimality: bool
) -> Bool[torch.Tensor, "mask unit"]:
    """What to keep: the ranking's first units and random ones of each size, the circuit without each of
    its units, everything but it, it, everything, nothing.
    """
    rng, full_mask = Random(seed), torch.ones_like(circuit.is_kept)
    masks = [circuit.top(n).is_kept for n in sizes]
    masks += [_random(rng, circuit.n_units, n) for n in sizes for _ in range(n_random)]
    masks += _without_each(circuit.is_kept) if minimality else []
    return torch.stack([*masks, ~circuit.is_kept, circuit.is_kept, full_mask, ~full_mask])


def _each_once(
    run: Ablator,
    bound: BoundTask,
    masks: Bool[torch.Tensor, "mask unit"],
    rest: Bool[torch.Tensor, " mask"],
) -> Float[torch.Tensor, "mask prompt"]:
    """The metric of every prompt; circuits that are there twice, as empty ones are, run once."""
    different, place = torch.cat([masks, rest[:, None]], 1).unique(dim=0, return_inverse=True)
    return run(bound, different[:, :-1], different[:, -1])[place]


def _errors(circuit: Circuit, errors: str | None) -> Errors:
    """What becomes of reconstruction errors."""
    treatments: tuple[Errors, ...] = get_args(Errors)
    if errors is None:
        return treatments[0]
    check_choice("treatment of errors", errors, treatments)
    if not is_feature_graph(circuit.graph):
        raise unused_option(
            f"errors={errors!r}",
            f"{circuit!r}, where reconstruction errors are kept",
            fix='a circuit of discover(..., nodes="features", saes=...), or without errors=',
        )
    return next(treatment for treatment in treatments if treatment == errors)


def _sizes(n_units: int) -> list[int]:
    """All of them if there are few, else a scale that is fine where circuits are small."""
    if n_units <= _FEW:
        return list(range(n_units + 1))
    steps = [n_units * (i / _N_SIZES) ** 2 for i in range(1, _N_SIZES + 1)]
    return sorted({0, *(round(step) for step in steps)})


def _random(rng: Random, n_units: int, size: int) -> Bool[torch.Tensor, " unit"]:
    is_kept = torch.zeros(n_units, dtype=torch.bool)
    is_kept[torch.tensor(rng.sample(range(n_units), size), dtype=torch.long)] = True
    return is_kept


def _without_each(is_kept: Bool[torch.Tensor, " unit"]) -> list[Bool[torch.Tensor, " unit"]]:
    """The circuit without each of its units, in the order of the graph."""
    units = is_kept.nonzero().flatten()
    masks = is_kept.repeat(len(units), 1)
    masks[torch.arange(len(units)), units] = False
    return list(masks)


def _divergence(
    run: Ablator, model: HookedModel, task: Task, is_kept: Bool[torch.Tensor, " unit"]
) -> float:
    """Mean divergence of the circuit's next-token distribution from the clean run's."""
    bound = replace(task, metric=divergence_at(task.question)).bind(model)
    return -float(run(bound, is_kept[None], torch.zeros(1, dtype=torch.bool)).mean())
