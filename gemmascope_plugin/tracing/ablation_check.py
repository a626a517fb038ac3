"""Does a pruned graph do what the model does? Everything outside it is ablated in the real model.

With ``m`` the targets, weighted as in the graph, ``m(M)`` of the model and ``m(0)`` with no feature and
no error left:

1. *faithfulness* ``(m(G) - m(0)) / (m(M) - m(0))`` of the graph ``G``;
2. *divergence* ``sum p log(p / q)`` of the next token, ``p`` the model's, mean over the targets'
   positions;
3. the same with all errors left, so that only features are judged, and of random graphs of the size.

Attention is live: a graph that explains values but not where heads look pays for it here, while
replacement and completeness scores take patterns as given.

Cost: one forward pass over a row per choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.task import MIN_GAP
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.models.check_model import check_model
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.check_saes import check_saes
from gemmascope_plugin.tracing.ablated_run import ablated_run
from gemmascope_plugin.tracing.traced_prompt import Replay

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class AblationCheck:
    """What the graph alone computes."""

    frame: pd.DataFrame
    """``what, features, errors, metric, faithfulness, kl``, one row per choice."""

    @property
    def faithfulness(self) -> float:
        """Of the graph."""
        return float(self.frame["faithfulness"].iloc[1])

    @property
    def faithfulness_with_errors(self) -> float:
        """Of the graph with all errors left."""
        return float(self.frame["faithfulness"].iloc[2])

    @property
    def kl(self) -> float:
        """Divergence of the graph from the model."""
        return float(self.frame["kl"].iloc[1])

    @property
    def random(self) -> float:
        """Mean faithfulness of random graphs of the same size."""
        rows = self.frame["what"].str.startswith("random")
        return float(self.frame["faithfulness"][rows].mean())

    def plot(self) -> Any:
        """Faithfulness of all choices as bars."""
        return figures.bars(
            self.frame["what"].tolist(),
            self.frame["faithfulness"].tolist(),
            title="What is left computes",
            x_title="faithfulness",
        )

    def __repr__(self) -> str:
        return (
            f"AblationCheck(faithfulness {self.faithfulness:.3f}, with all errors "
            f"{self.faithfulness_with_errors:.3f}, random {self.random:.3f}; KL {self.kl:.4g})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.frame, SHOWN)}"


@gate(model=check_model, graph=check_graph, dictionaries=check_saes)
def check_by_ablation(
    model: HookedModel,
    graph: Graph,
    dictionaries: Any,
    *,
    n_random: int = 5,
    seed: int = 0,
    memory_budget: int | str = "4 GB",
) -> AblationCheck:
    """Ablates every feature and error outside a graph in the real model.

    Args:
        model: The model that was traced.
        graph: A pruned graph.
        dictionaries: Those that it was traced with.
        n_random: Random graphs with as many features and errors, for comparison.
        seed: Of their draw.
        memory_budget: Bytes, or ``"4 GB"``.

    Raises:
        TaskError: No target but features, or targets that do not depend on features and errors.
        UnknownNameError: The prompt does not have the graph's nodes: other dictionaries.
    """
    replay = Replay.of(model, graph, dictionaries, memory_budget)
    if not replay.seeds:
        raise TaskError(
            "The graph explains features only, and no logit to judge it by",
            fix="targets=None or a token in trace(...)",
        )
    kept, names = _choices(replay, n_random, np.random.default_rng(seed))
    positions = sorted({seed.position for seed in replay.seeds})
    end, logits = ablated_run(replay, kept, positions)
    metric = _metric(replay, end)
    full, empty = float(metric[0]), float(metric[-1])
    if abs(full - empty) < MIN_GAP:
        raise TaskError(
            f"The targets are {full:.6f} in the model and {empty:.6f} without any feature and error; "
            "faithfulness cannot be put on a scale between them",
            fix="other targets",
        )
    return AblationCheck(_frame(replay, kept, names, metric, _divergence(logits)))


def _choices(
    replay: Replay, n_random: int, rng: np.random.Generator
) -> tuple[Bool[torch.Tensor, "choice node"], list[str]]:
    layout = replay.layout
    features = np.zeros(layout.n_nodes, dtype=bool)
    errors = features.copy()
    for site in range(len(layout.activities)):
        features[layout.features(site)] = True
        errors[layout.errors(site)] = True
    own = np.zeros(layout.n_nodes, dtype=bool)
    own[replay.place[replay.place >= 0]] = True
    own &= features | errors
    rows = [features | errors, own, own | errors]
    names = ["the model", "the graph", "the graph and all errors"]
    for i in range(n_random):
        rows.append(_drawn(features, own, rng) | _drawn(errors, own, rng))
        names.append(f"random graph {i + 1}")
    return torch.from_numpy(np.stack([*rows, np.zeros_like(own)])), [*names, "nothing"]


def _drawn(among: np.ndarray, like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many of some nodes as another choice has of them."""
    found = np.zeros_like(like)
    found[rng.choice(among.nonzero()[0], int((among & like).sum()), replace=False)] = True
    return found


def _metric(
    replay: Replay, end: Float[torch.Tensor, "choice pos d_model"]
) -> Float[torch.Tensor, " choice"]:
    """Weighted targets, as logits before the soft-cap through the norm of each run."""
    record = replay.record
    scale = record.final_scale() / record.anatomy.ln_final.scale(end)[..., 0]
    weights = replay.graph.weights[replay.seed_nodes]
    values = [
        (end[:, one.position] @ one.vector) * scale[:, one.position] + one.own
        for one in replay.seeds
    ]
    parts = [weight * value for weight, value in zip(weights, values, strict=True)]
    return torch.stack(parts).sum(0) / float(weights.sum())


def _divergence(
    logits: Float[torch.Tensor, "choice asked d_vocab"],
) -> Float[torch.Tensor, " choice"]:
    log = logits.double().log_softmax(-1)
    return (log[:1].exp() * (log[:1] - log)).sum(-1).mean(-1)


def _frame(
    replay: Replay,
    kept: Bool[torch.Tensor, "choice node"],
    names: list[str],
    metric: Float[torch.Tensor, " choice"],
    kl: Float[torch.Tensor, " choice"],
) -> pd.DataFrame:
    import pandas as pd

    layout = replay.layout
    sites = range(len(layout.activities))
    counts = {
        "features": sum(kept[:, layout.features(site)].sum(1) for site in sites),
        "errors": sum(kept[:, layout.errors(site)].sum(1) for site in sites),
    }
    faithfulness = (metric - metric[-1]) / (metric[0] - metric[-1])
    values = {"metric": metric, "faithfulness": faithfulness, "kl": kl}
    columns = {
        name: torch.as_tensor(value).tolist() for name, value in {**counts, **values}.items()
    }
    return pd.DataFrame({"what": names, **columns})
