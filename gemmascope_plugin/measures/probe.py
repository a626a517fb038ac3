"""The reconstruction condition of a hierarchy: does a child's concept lie along parent and child?

``S_res`` of Tree SAEs (arXiv 2605.07922, equation 5 and section 5.2), on a sample of a forest's edges:

1. Parents are drawn among the more frequent half of the features, and up to ``max_children`` children of
   each. A child must be active on ``min_tokens`` of the tokens, and silent on as many.
2. One logistic probe per child tells from ``x`` whether the child is active; its weights are the
   direction of the child's concept. Positive tokens weigh as much as negative ones.
3. A hit: the decoder rows of parent *and* child are among the ``TOP`` with the largest cosine with that
   direction. The score is the share of hits.

``x`` is centred and divided by *one* number, so that directions, and their cosines with decoder rows,
stay those of the model's tensor. Parents are drawn without replacement, the paper's with; children are
drawn at random among all of a parent, where the paper takes the first of a tree. The paper trains for 50
epochs of 1.28 million tokens. Scores depend on the training: whether a feature is active is itself nearly
linear in ``x``, and a probe that is trained for long ends at the encoder column. Compare scores of equal
``steps`` and tokens only.

Cost: all probes are one matrix: ``6 * batch * d * probes`` operations a step; ``tokens * probes`` bytes
of labels; ``2 * probes * d_sae * d`` operations for the cosines, ``CELLS`` of which are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, Int64

from gemmascope_plugin.errors import ModelError, WidthMismatchError
from gemmascope_plugin.features.cooccurrence import CELLS, active_only, token_counts
from gemmascope_plugin.measures.forest import check_forest, judged_edges
from gemmascope_plugin.saes import SparseActs

if TYPE_CHECKING:
    from pandas import DataFrame

TOP = 5
"""Both decoder rows must be among so many."""
_BATCH = 4096
_LEARNING_RATES = (1e-2, 1e-5)
"""Of the first step and of the last."""
_WEIGHT_DECAY = 1e-6


@dataclass(frozen=True, eq=False)
class ProbedEdges:
    """Edges with what the probes for their children say."""

    parent: Int64[torch.Tensor, " edge"]
    child: Int64[torch.Tensor, " edge"]
    parent_cosine: Float[torch.Tensor, " edge"]
    """Of the parent's decoder row with the direction of the child's concept."""
    child_cosine: Float[torch.Tensor, " edge"]
    parent_rank: Int64[torch.Tensor, " edge"]
    """Number of decoder rows with a larger cosine."""
    child_rank: Int64[torch.Tensor, " edge"]

    @property
    def hits(self) -> Bool[torch.Tensor, " edge"]:
        """Where parent and child are both among the ``TOP``."""
        return (self.parent_rank < TOP) & (self.child_rank < TOP)

    @property
    def score(self) -> float:
        """``S_res``: the share of hits; NaN without edges."""
        return float(self.hits.double().mean()) if len(self.child) else math.nan


def probe_edges(
    x: Float[torch.Tensor, "token d"],
    acts: SparseActs,
    W_dec: Float[torch.Tensor, "d_sae d"],
    parent: Int[torch.Tensor, " d_sae"],
    *,
    n_parents: int = 200,
    max_children: int = 5,
    min_tokens: int = 20,
    steps: int = 500,
    seed: int = 0,
) -> ProbedEdges:
    """Probes a sample of a forest's edges; definitions at the top of this file.

    Args:
        x: The tensor that the decoder rows add up to.
        acts: Activations at the same tokens.
        W_dec: The decoder.
        parent: The forest.
        n_parents: Parents in the sample, fewer where there are fewer.
        max_children: Children of each.
        min_tokens: Tokens on which a child must be active, and silent.
        steps: Steps of Adam, on 4096 tokens each.
        seed: Of the sample and of the order of tokens.

    Raises:
        WidthMismatchError: ``x`` is not as wide as the decoder rows, or not one parent per feature.
        ModelError: Not a forest, other tokens in ``x`` than in ``acts``, or a number out of range.
    """
    _check(x, acts, W_dec, n_parents, max_children, steps)
    check_forest(parent, acts.d_sae)
    acts = active_only(acts)
    rng = torch.Generator().manual_seed(seed)
    child = sample_edges(parent, acts, (n_parents, max_children), min_tokens, rng)
    above = parent[child].long()
    if not len(child):
        nothing = W_dec.new_zeros(0, dtype=torch.float32)
        return ProbedEdges(above, child, nothing, nothing, above, child)
    weights = train_probes(x, activity(acts, child), steps=steps, rng=rng)
    (parent_cosine, parent_rank), (child_cosine, child_rank) = (
        _ranks(weights, W_dec, of) for of in (above, child)
    )
    return ProbedEdges(above, child, parent_cosine, child_cosine, parent_rank, child_rank)


def sample_edges(
    parent: Int[torch.Tensor, " d_sae"],
    acts: SparseActs,
    n: tuple[int, int],
    min_tokens: int,
    rng: torch.Generator,
) -> Int64[torch.Tensor, " edge"]:
    """The children of a sample of edges, ascending; step 1 at the top of this file.

    ``rng`` is on the CPU, so that the sample does not depend on the device.
    """
    counts = token_counts(acts).cpu()
    above = parent.cpu().long()
    frequent = torch.zeros_like(counts, dtype=torch.bool)
    frequent[counts.argsort(descending=True, stable=True)[: max(1, acts.d_sae // 2)]] = True
    child = judged_edges(above, counts, min_tokens)
    child = child[acts.n_tokens - counts[child] >= max(min_tokens, 1)]
    child = child[frequent[above[child]]]
    child = child[torch.randperm(len(child), generator=rng)]
    families = [child[above[child] == p][: n[1]] for p in _drawn(above[child], n[0], rng)]
    chosen = torch.cat(families) if families else child
    return chosen.sort().values.to(parent.device)


def activity(
    acts: SparseActs, features: Int64[torch.Tensor, " k"]
) -> Bool[torch.Tensor, "token k"]:
    """Where each of some features, named once each, is active."""
    column = torch.full((acts.d_sae,), -1, device=acts.indices.device)
    column[features] = torch.arange(len(features), device=column.device)
    columns = column[acts.indices]
    fires = torch.zeros(acts.n_tokens, len(features), dtype=torch.bool, device=columns.device)
    fires[acts.rows[columns >= 0], columns[columns >= 0]] = True
    return fires


def train_probes(
    x: Float[torch.Tensor, "token d"],
    labels: Bool[torch.Tensor, "token probe"],
    *,
    steps: int,
    rng: torch.Generator,
) -> Float[torch.Tensor, "probe d"]:
    """Directions of logistic probes, all trained at once with Adam from zero."""
    x = x.float() - x.float().mean(0)
    x = x / x.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    positive = labels.sum(0)
    balance = (len(x) - positive) / positive
    weights = torch.nn.Parameter(x.new_zeros(labels.shape[1], x.shape[1]))
    bias = torch.nn.Parameter(x.new_zeros(labels.shape[1]))
    first, last = _LEARNING_RATES
    adam = torch.optim.Adam([weights, bias], lr=first, weight_decay=_WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, (last / first) ** (1 / steps))
    for _ in range(steps):
        batch = slice(None)
        if len(x) > _BATCH:
            batch = torch.randint(len(x), (_BATCH,), generator=rng).to(x.device)
        inputs, targets = x[batch], labels[batch].to(x.dtype)
        error = (inputs @ weights.detach().T + bias.detach()).sigmoid()
        # the gradient of the weighted cross-entropy: labels are many, and autograd would keep copies
        error = torch.where(targets > 0, (error - 1) * balance, error) / len(inputs)
        weights.grad, bias.grad = error.T @ inputs, error.sum(0)
        adam.step()
        decay.step()
    return weights.detach()


def _ranks(
    directions: Float[torch.Tensor, "edge d"],
    W_dec: Float[torch.Tensor, "d_sae d"],
    features: Int64[torch.Tensor, " edge"],
) -> tuple[Float[torch.Tensor, " edge"], Int64[torch.Tensor, " edge"]]:
    """Cosine of a feature's decoder row with each direction, and how many rows have a larger one."""
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=-1)
    height, cosines, ranks = max(1, CELLS // len(rows)), [], []
    for block, of in zip(directions.split(height), features.split(height), strict=True):
        cosines_of_rows = torch.nn.functional.normalize(block, dim=-1) @ rows.T
        cosine = cosines_of_rows.gather(1, of[:, None])
        cosines.append(cosine[:, 0])
        ranks.append((cosines_of_rows > cosine).sum(1))
    return torch.cat(cosines), torch.cat(ranks)


def _drawn(parents: Int64[torch.Tensor, " edge"], n: int, rng: torch.Generator) -> Sequence[int]:
    """At most ``n`` of the different parents."""
    different = parents.unique()
    return different[torch.randperm(len(different), generator=rng)[:n]].tolist()


def _check(
    x: torch.Tensor,
    acts: SparseActs,
    W_dec: torch.Tensor,
    n_parents: int,
    max_children: int,
    steps: int,
) -> None:
    if x.shape[1] != W_dec.shape[1]:
        raise WidthMismatchError(
            f"The probe reads a tensor of width {x.shape[1]}, the decoder rows have {W_dec.shape[1]}",
            fix="the tensor at the output site, which the decoder rows add up to",
        )
    if len(x) != acts.n_tokens:
        raise ModelError(
            f"x has {len(x)} tokens, the activations {acts.n_tokens}", fix="both at the same tokens"
        )
    numbers = {"n_parents": n_parents, "max_children": max_children, "steps": steps}
    for name, value in numbers.items():
        if value < 1:
            raise ModelError(f"{name}={value} is less than one", fix=f"{name}=5")


def add_hits(edges: DataFrame, probed: ProbedEdges | None) -> None:
    """Adds ``hit``, whether an edge meets the reconstruction condition; NA where it was not probed."""
    import pandas as pd

    hits: dict[int, bool] = {}
    if probed is not None:
        hits = dict(zip(probed.child.tolist(), probed.hits.tolist(), strict=True))
    edges["hit"] = pd.array([hits.get(child) for child in edges["child"]], dtype="boolean")
