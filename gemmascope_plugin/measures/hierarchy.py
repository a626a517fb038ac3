"""How hierarchical a dictionary is: its forest of features, measured on a corpus and known concepts.

1. The forest is the dictionary's own (Tree SAE), one that is given, or read from activations by masked
   cosine similarity (``forest.py``); in a Matryoshka dictionary a feature has its parent in an
   earlier level then.
2. Along its edges: coverage and similarity (``forest.py``), and overlap of siblings
   (``forest.py``).
3. ``s_res``, the share of edges that meet the reconstruction condition (``probe.py``). The probes read
   the *output* site, whose space the decoder rows live in: for an SAE the tensor that it encodes, for a
   transcoder the one that it predicts. So probe and rows have one width for every dictionary.
4. With known concepts: how far the forest is their hierarchy, and what chance gives
   (``forest_scores.py``).

Cost: one forward pass over the corpus and one encode of it; 16 bytes per active entry are kept, and the
tensor at ``probe_tokens`` tokens; then as the files named above say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int64

from gemmascope_plugin.errors import ModelError, check_choice
from gemmascope_plugin.features.cooccurrence import MIN_F1, at_tokens, best_concepts
from gemmascope_plugin.features.stream import (
    Corpus,
    Tokens,
    check_concepts,
    corpus,
    hooked_for,
    joined,
    kept_concepts,
    site_tensors,
)
from gemmascope_plugin.measures.forest import (
    SIMILARITIES,
    Similarity,
    candidate_rank,
    check_forest,
    depth,
    edge_frame,
    mcs_parents,
)
from gemmascope_plugin.measures.forest_scores import (
    Recovery,
    add_concepts,
    chance_recovery,
    concept_order,
    sibling_overlap,
    tree_recovery,
)
from gemmascope_plugin.measures.measure_results import Hierarchy, subject
from gemmascope_plugin.measures.probe import ProbedEdges, add_hits, probe_edges
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE

if TYPE_CHECKING:
    from pandas import DataFrame

Forest: TypeAlias = Literal["auto", "own", "mcs"] | Int[torch.Tensor, " d_sae"]
"""``"own"``: the dictionary's; ``"mcs"``: from activations; ``"auto"``: its own if it has one; or the
parent of each feature, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """The numbers in the definitions."""

    similarity: Similarity
    min_mcs: float
    min_tokens: int
    min_f1: float
    n_parents: int
    max_children: int
    steps: int
    probe_tokens: int
    seed: int


@gate(model=check_model, sae=check_sae)
def hierarchy(
    model: HookedModel,
    sae: SAE | HookedSAE,
    tokens: Tokens,
    concepts: Bool[torch.Tensor, "document pos concept"] | None = None,
    names: Sequence[str] | None = None,
    *,
    forest: Forest = "auto",
    similarity: Similarity = "cosine",
    min_mcs: float = 0.5,
    min_tokens: int = 20,
    min_f1: float = MIN_F1,
    n_parents: int = 200,
    max_children: int = 5,
    steps: int = 500,
    probe_tokens: int = 65536,
    seed: int = 0,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
) -> Hierarchy:
    """Measures how hierarchical a dictionary is; what each figure means is said in the files above.

    Args:
        model: The bare model.
        sae: A dictionary with one site, or ``HookedSAE(sae, level=...)`` for a level of it.
        tokens: Token ids ``[document, pos]``, or several such tensors.
        concepts: Where each known concept holds; None if none are known.
        names: One name per concept.
        forest: ``"own"``, ``"mcs"``, ``"auto"`` for its own if it has one, or the parent of each
            feature, -1 for none.
        similarity: ``"cosine"``, ``"scaled"`` or ``"binary"`` masked cosine similarity.
        min_mcs: Least similarity of parent and child in a forest from activations.
        min_tokens: Tokens on which a child, or a concept, must hold to be judged.
        min_f1: Least F1 with which a feature stands for a concept.
        n_parents: Parents whose children are probed; 0 leaves ``s_res`` NaN.
        max_children: Children of each that are probed.
        steps: Training steps of the probes.
        probe_tokens: Most tokens that the probes see, drawn at random.
        seed: Of all that is drawn.
        exclude: Special tokens to leave out.
        batch_size: Documents per forward pass.

    Raises:
        EmptySelectionError: No token, or excluded ones only.
        ModelError: Concepts without names, or for other tokens; not a forest, or a dictionary without
            one of its own; a number out of range; not a dictionary with one site.
        UnknownNameError: There is no such forest or similarity.
        MissingHookError: The model has no such hook.
        WidthMismatchError: The dictionary has another width than the model's tensor, or the forest
            another number of features.
    """
    check_concepts(concepts, names)
    _check(forest, similarity, n_parents, probe_tokens)
    rules = _Rules(
        similarity=similarity,
        min_mcs=min_mcs,
        min_tokens=min_tokens,
        min_f1=min_f1,
        n_parents=n_parents,
        max_children=max_children,
        steps=steps,
        probe_tokens=probe_tokens,
        seed=seed,
    )
    text = corpus(model, tokens, exclude, batch_size)
    holds = None if concepts is None else kept_concepts(text, concepts)
    return _hierarchy(model, hooked_for(sae, text.exclude), text, holds, names or (), forest, rules)


@torch.no_grad()
def _hierarchy(
    model: HookedModel,
    hooked: HookedSAE,
    text: Corpus,
    concepts: Bool[torch.Tensor, "token concept"] | None,
    names: Sequence[str],
    forest: Forest,
    rules: _Rules,
) -> Hierarchy:
    source = _source(hooked, forest)
    acts, y, is_probed = _read(model, hooked, text, rules)
    parent, rank = _forest(hooked, acts, forest, source, rules)
    edges = edge_frame(acts, parent, similarity=rules.similarity, min_tokens=rules.min_tokens)
    recovery, chance = _recover(edges, acts, parent, rank, concepts, names, rules)
    probed = _probe(y, at_tokens(acts, is_probed), hooked.weights.W_dec, parent, rules)
    add_hits(edges, probed)
    return Hierarchy(
        **subject(hooked, acts.n_tokens, text.exclude),
        forest=source,
        parent=parent,
        edges=edges,
        sibling_iou=sibling_overlap(acts, parent, min_tokens=rules.min_tokens),
        s_res=math.nan if probed is None else probed.score,
        n_probed=0 if probed is None else len(probed.child),
        recovery=recovery,
        chance=chance,
    )


def _read(
    model: HookedModel, hooked: HookedSAE, text: Corpus, rules: _Rules
) -> tuple[SparseActs, Float[torch.Tensor, "probed d_out"], Int64[torch.Tensor, " probed"]]:
    """All activations, and the output site at the tokens that the probes see, ascending."""
    n = sum(int(text.kept(part).sum()) for part in text.batches)
    rng = torch.Generator().manual_seed(rules.seed)
    n_probed = rules.probe_tokens if rules.n_parents else 0
    is_probed = torch.randperm(n, generator=rng)[:n_probed].sort().values
    acts, outputs, start = [], [], 0
    for x, y in site_tensors(model, hooked, text):
        acts.append(hooked.weights.encode_sparse(x))
        here = is_probed[(is_probed >= start) & (is_probed < start + len(y))] - start
        outputs.append(y[here.to(y.device)])
        start += len(y)
    active = joined(acts)
    return active, torch.cat(outputs), is_probed.to(active.indices.device)


def _source(hooked: HookedSAE, forest: Forest) -> str:
    """Where the forest is from."""
    if isinstance(forest, torch.Tensor):
        return "given"
    has_own = hasattr(hooked.weights, "parent")
    if forest == "own" and not has_own:
        raise ModelError(
            f"The dictionary at {hooked.hook_out} has no forest of its own",
            exists="one from activations",
            fix="forest='mcs'",
        )
    return "own" if has_own and forest != "mcs" else "mcs"


def _forest(
    hooked: HookedSAE, acts: SparseActs, forest: Forest, source: str, rules: _Rules
) -> tuple[Int64[torch.Tensor, " d_sae"], Int64[torch.Tensor, " d_sae"]]:
    """The parents, and the rank that must grow from parent to child."""
    levels = _levels(hooked)
    if source == "mcs":
        parent = mcs_parents(
            acts,
            levels=levels,
            similarity=rules.similarity,
            min_tokens=rules.min_tokens,
            min_mcs=rules.min_mcs,
        )
        return parent, candidate_rank(acts, levels)
    parent = getattr(hooked.weights, "parent", None) if source == "own" else forest
    assert isinstance(parent, torch.Tensor), f"no forest from {source}"
    check_forest(parent, acts.d_sae)
    parent = parent.to(acts.indices.device).long()
    return parent, candidate_rank(acts, levels) if source == "own" and levels else depth(parent)


def _levels(hooked: HookedSAE) -> Sequence[int] | None:
    """Prefix sizes of a nested dictionary up to its level, the layers of a tree; None for neither."""
    layers = getattr(hooked.weights, "layers", None)
    if layers is not None:
        return [layer.stop for layer in layers]
    levels = getattr(hooked.sae.cfg.metadata, "levels", None) or ()
    return [int(width) for width in levels if width <= hooked.d_sae] or None


def _probe(
    y: Float[torch.Tensor, "probed d_out"],
    acts: SparseActs,
    W_dec: Float[torch.Tensor, "d_sae d_out"],
    parent: Int64[torch.Tensor, " d_sae"],
    rules: _Rules,
) -> ProbedEdges | None:
    if not rules.n_parents:
        return None
    return probe_edges(
        y,
        acts,
        W_dec,
        parent,
        n_parents=rules.n_parents,
        max_children=rules.max_children,
        min_tokens=rules.min_tokens,
        steps=rules.steps,
        seed=rules.seed,
    )


def _recover(
    edges: DataFrame,
    acts: SparseActs,
    parent: Int64[torch.Tensor, " d_sae"],
    rank: Int64[torch.Tensor, " d_sae"],
    concepts: Bool[torch.Tensor, "token concept"] | None,
    names: Sequence[str],
    rules: _Rules,
) -> tuple[Recovery | None, Recovery | None]:
    """Agreement with known concepts, and what chance gives; the edges learn their concepts."""
    if concepts is None:
        add_concepts(edges, None, None)
        return None, None
    order = concept_order(concepts.to(parent.device), names, min_tokens=rules.min_tokens)
    stands = best_concepts(acts, order.holds).at_least(rules.min_f1)
    judged = torch.tensor(edges["child"].tolist(), dtype=torch.long, device=parent.device)
    add_concepts(edges, order, stands)
    recovery = tree_recovery(parent, judged, stands, order.above)
    return recovery, chance_recovery(parent, judged, stands, order.above, rank, seed=rules.seed)


def _check(forest: object, similarity: object, n_parents: int, probe_tokens: int) -> None:
    if not isinstance(forest, torch.Tensor):
        check_choice("forest", forest, ("auto", "own", "mcs"))
    check_choice("similarity", similarity, SIMILARITIES)
    if n_parents < 0:
        raise ModelError(f"n_parents={n_parents} is negative", fix="n_parents=0 to skip S_res")
    if probe_tokens < 1:
        raise ModelError(f"probe_tokens={probe_tokens} is less than one", fix="probe_tokens=65536")
