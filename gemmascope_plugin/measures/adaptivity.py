"""How the number of active features follows the input: its spread, and its rank correlation with content.

1. ``k`` is a token's number of active features; a SoftSAE (arXiv 2605.06610) also predicts a budget, of
   which ``k`` may be at most the floor.
2. Where the concepts of every token are known, as in the bundled corpus, the number that holds at a token
   says how much there is to represent. Spearman's correlation is Pearson's of the ranks, equal values
   sharing the mean of their ranks.
3. A dictionary with a fixed number of active features has no spread, and no correlation: NaN.

Cost: one forward pass over the corpus and one encode of it; 8 bytes a token and figure are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64, Num
from typing_extensions import override

import gemmascope_plugin.figures as figures
from gemmascope_plugin.features.stream import (
    Tokens,
    check_concepts,
    corpus,
    hooked_for,
    kept_concepts,
    site_tensors,
)
from gemmascope_plugin.files.stored_result import TENSOR
from gemmascope_plugin.measures.measure_results import Measured, subject
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.splice import HookedSAE
from gemmascope_plugin.splice.hooked_sae import check_sae
from gemmascope_plugin.types import SAE


@dataclass(frozen=True, eq=False, kw_only=True)
class Adaptivity(Measured):
    """Active features per token, budgets and concepts beside them; ``to_frame`` has a row of figures."""

    noun = "adaptivity"

    k: Int64[torch.Tensor, " token"] = field(metadata=TENSOR)
    """Active features of each token that counts."""
    budget: Float[torch.Tensor, " token"] | None = field(metadata=TENSOR)
    """What a SoftSAE allots to each token; None for other dictionaries."""
    n_concepts: Int64[torch.Tensor, " token"] | None = field(metadata=TENSOR)
    """Number of known concepts that hold at each token; None if none are known."""

    @property
    def mean(self) -> float:
        """Mean of ``k``, the L0."""
        return float(self.k.double().mean())

    @property
    def std(self) -> float:
        """Standard deviation of ``k`` over the tokens (not the unbiased one)."""
        return float(self.k.double().std(correction=0))

    @property
    def k_spearman(self) -> float:
        """Rank correlation of ``k`` with the number of concepts; NaN if either is constant or unknown."""
        return math.nan if self.n_concepts is None else spearman(self.k, self.n_concepts)

    @property
    def budget_spearman(self) -> float:
        """Rank correlation of the budget with the number of concepts; NaN as ``k_spearman``."""
        if self.budget is None or self.n_concepts is None:
            return math.nan
        return spearman(self.budget, self.n_concepts)

    @override
    def row(self) -> dict[str, Any]:
        """Every figure by name; those of budgets and concepts are NaN where there are none."""
        budget = torch.full((1,), math.nan) if self.budget is None else self.budget
        return {
            **self._what(),
            "k_mean": self.mean,
            "k_std": self.std,
            "k_min": int(self.k.min()),
            "k_max": int(self.k.max()),
            "k_spearman": self.k_spearman,
            "budget_mean": float(budget.double().mean()),
            "budget_std": float(budget.double().std(correction=0)),
            "budget_spearman": self.budget_spearman,
        }

    def by_concepts(self) -> Any:
        """A DataFrame, one row per number of concepts: ``n_concepts``, ``n_tokens``, ``mean``, ``std``.

        Empty if no concepts are known.
        """
        import pandas as pd

        names = ["n_concepts", "n_tokens", "mean", "std"]
        if self.n_concepts is None:
            return pd.DataFrame({name: [] for name in names})
        rows = []
        for n in self.n_concepts.unique().tolist():
            values = self.k[self.n_concepts == n].double()
            rows.append((n, len(values), float(values.mean()), float(values.std(correction=0))))
        return pd.DataFrame(rows, columns=names)

    def plot(self, *, title: str = "") -> Any:
        """Draws active features against known concepts with a band of one deviation; without concepts
        the share of tokens by number of active features.

        Args:
            title: Title of the figure.

        Returns:
            A plotly figure.
        """
        if self.n_concepts is None:
            values, counts = self.k.unique(return_counts=True)
            shares = {"share of tokens": (counts.double() / len(self.k)).tolist()}
            x_title = "active features of a token"
            return figures.curves(values.tolist(), shares, title=title, x_title=x_title)
        frame = self.by_concepts()
        low, high = ((frame["mean"] + sign * frame["std"]).tolist() for sign in (-1, 1))
        return figures.curves(
            frame["n_concepts"].tolist(),
            {"mean": frame["mean"].tolist()},
            band=("one standard deviation", low, high),
            title=title,
            x_title="known concepts that hold at a token",
            y_title="active features",
        )

    def __repr__(self) -> str:
        budget = "" if self.budget is None else f", budget {float(self.budget.mean()):.1f}"
        concepts = (
            "" if self.n_concepts is None else f", Spearman with concepts {self.k_spearman:.3f}"
        )
        return (
            f"Adaptivity({self._head()}: {self.mean:.1f} active, deviation {self.std:.1f}, "
            f"{int(self.k.min())} to {int(self.k.max())}{budget}{concepts})"
        )


@gate(model=check_model, sae=check_sae)
@torch.no_grad()
def adaptivity(
    model: HookedModel,
    sae: SAE | HookedSAE,
    tokens: Tokens,
    concepts: Bool[torch.Tensor, "document pos concept"] | None = None,
    names: Sequence[str] | None = None,
    *,
    exclude: str | int | Sequence[str | int] = ("bos", "eos", "pad"),
    batch_size: int = 16,
) -> Adaptivity:
    """Measures how the number of active features follows the input.

    Args:
        model: The bare model.
        sae: A dictionary with one site, or ``HookedSAE(sae, level=...)`` for a level of it.
        tokens: Token ids ``[document, pos]``, or several such tensors.
        concepts: Where each known concept holds; None if none are known.
        names: One name per concept; they are checked and do not count.
        exclude: Special tokens to leave out.
        batch_size: Documents per forward pass.

    Raises:
        EmptySelectionError: No token, or excluded ones only.
        ModelError: Concepts without names, or for other tokens; not a dictionary with one site.
        MissingHookError: The model has no such hook.
        WidthMismatchError: The dictionary has another width than the model's tensor.
    """
    check_concepts(concepts, names)
    text = corpus(model, tokens, exclude, batch_size)
    n_concepts = None if concepts is None else kept_concepts(text, concepts).sum(-1)
    hooked = hooked_for(sae, text.exclude)
    counts, budgets = [], []
    for x, _ in site_tensors(model, hooked, text):
        counts.append(hooked.weights.encode_sparse(x).offsets.diff().cpu())
        budgets += _budget(hooked, x)
    k = torch.cat(counts)
    return Adaptivity(
        **subject(hooked, len(k), text.exclude),
        k=k,
        budget=torch.cat(budgets) if budgets else None,
        n_concepts=None if n_concepts is None else n_concepts.cpu(),
    )


def spearman(a: Num[torch.Tensor, " token"], b: Num[torch.Tensor, " token"]) -> float:
    """Spearman's rank correlation; NaN where either is constant."""
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    spread = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / spread if spread > 0 else math.nan


def ranks(values: Num[torch.Tensor, " token"]) -> Float64[torch.Tensor, " token"]:
    """Ranks from 1, ascending; equal values share the mean of theirs."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[index]


def _budget(
    hooked: HookedSAE, x: Float[torch.Tensor, "token d_in"]
) -> list[Float[torch.Tensor, " token"]]:
    """The budgets of a SoftSAE in a list; an empty one for other dictionaries."""
    if not hasattr(hooked.sae, "budget"):
        return []
    # attention outputs have their heads flattened here, which the dictionary would do itself
    heads = hooked.sae.cfg.reshape_activations == "hook_z"
    return [hooked.sae.budget(x[:, None] if heads else x).float().cpu()]
