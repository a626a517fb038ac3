"""Does a pruned graph do what the model does? Everything outside it is ablated in the real model.

With ``m`` the targets, weighted as in the graph, ``m(M)`` of the model and ``m(0)`` with no feature and
no error left:

1. *faithfulness* ``(m(G) - m(0)) / (m(M) - m(0))`` of the graph ``G``;
2. *divergence* ``sum p log(p / q)`` of the next token, ``p`` the model's, mean over the targets'
   positions;
3. the same with all errors left, so that only features are judged, and of random graphs of the size.

Attention is live: a graph that explains values but not where heads look pays for it here, while
replacement and completeness scores take patterns as given. In detail, of a run with some nodes kept:

1. At every site the tensor is rebuilt from what is kept: ``sum f W_dec`` over kept features, which are
   taken live from the run, plus biases and skip, plus kept errors as recorded. Everything else is zero.
2. Attention, norms and special tokens are the model's own: nothing is frozen.
3. Choices ride on the batch axis. With everything kept the run is the model's.

Cost: one forward pass over a row per choice, and the encoder columns of features that are kept in any of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.bound_task import MIN_GAP
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.files.stored_result import TABLE, StoredResult
from gemmascope_plugin.graphs.frames import SHOWN
from gemmascope_plugin.graphs.graph import Graph
from gemmascope_plugin.graphs.graph_arrays import check_graph
from gemmascope_plugin.models.asked import asked_positions
from gemmascope_plugin.models.gate import gate
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.models.protocol import HookedModel, check_model
from gemmascope_plugin.models.record import hooking, keep, write
from gemmascope_plugin.splice.hooked_sae import Saes, check_saes
from gemmascope_plugin.tracing.changed_run import Hooks, hook_of
from gemmascope_plugin.tracing.linear.trace_nodes import Layout
from gemmascope_plugin.tracing.traced_prompt import TracedPrompt

if TYPE_CHECKING:
    import pandas as pd

    from gemmascope_plugin.figures.fragments import Figure


@dataclass(frozen=True, eq=False, repr=False)
class AblationCheck(StoredResult):
    """What the graph alone computes."""

    noun = "ablation check"

    frame: pd.DataFrame = field(metadata=TABLE)
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

    def to_frame(self) -> pd.DataFrame:
        """One row per choice: ``what, features, errors, metric, faithfulness, kl``."""
        return self.frame.copy()

    def plot(self) -> Figure:
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


@gate(model=check_model, graph=check_graph, saes=check_saes)
def check_by_ablation(
    model: HookedModel,
    graph: Graph,
    saes: Saes,
    *,
    n_random: int = 5,
    seed: int = 0,
    memory_budget: int | str = "4 GB",
) -> AblationCheck:
    """Ablates every feature and error outside a graph in the real model.

    Args:
        model: The model that was traced.
        graph: A pruned graph.
        saes: Those that it was traced with.
        n_random: Random graphs with as many features and errors, for comparison.
        seed: Of their draw.
        memory_budget: Bytes, or ``"4 GB"``.

    Raises:
        TaskError: No target but features, or targets that do not depend on features and errors.
        UnknownNameError: The prompt does not have the graph's nodes: other dictionaries.

    Example:
        >>> suite = gs.tiny()
        >>> saes = [suite.load("transcoder", layer) for layer in range(4)]
        >>> graph = gs.trace(suite.model, "the capital of the state containing dallas is", saes)
        >>> gs.check_by_ablation(suite.model, graph.prune(0.9), saes, n_random=2)
        AblationCheck(faithfulness 0.813, with all errors 0.825, random 0.047; KL 0.004088)
    """
    traced = TracedPrompt.of_graph(model, graph, saes, memory_budget)
    if not traced.seeds:
        raise TaskError(
            "The graph explains features only, and no logit to judge it by",
            fix="targets=None or a token in trace(...)",
        )
    is_kept, names = _choices(traced, graph, n_random, np.random.default_rng(seed))
    positions = sorted({seed.position for seed in traced.seeds})
    end, logits = ablated_run(traced, is_kept, positions)
    metric = _metric(traced, graph, end)
    full, empty = float(metric[0]), float(metric[-1])
    if abs(full - empty) < MIN_GAP:
        raise TaskError(
            f"The targets are {full:.6f} in the model and {empty:.6f} without any feature and error; "
            "faithfulness cannot be put on a scale between them",
            fix="other targets",
        )
    return AblationCheck(_frame(traced.layout, is_kept, names, metric, _divergence(logits)))


def _choices(
    traced: TracedPrompt, graph: Graph, n_random: int, rng: np.random.Generator
) -> tuple[Bool[torch.Tensor, "choice node"], list[str]]:
    """Which nodes each choice keeps, and what it is called."""
    layout, places = traced.layout, traced.places(graph)
    features = np.zeros(layout.n_nodes, dtype=bool)
    errors = features.copy()
    for site in range(len(layout.activities)):
        features[layout.features(site)] = True
        errors[layout.errors(site)] = True
    nodes = np.zeros(layout.n_nodes, dtype=bool)
    nodes[places[places >= 0]] = True
    nodes &= features | errors
    rows = [features | errors, nodes, nodes | errors]
    names = ["the model", "the graph", "the graph and all errors"]
    for i in range(n_random):
        rows.append(_drawn(features, nodes, rng) | _drawn(errors, nodes, rng))
        names.append(f"random graph {i + 1}")
    return torch.from_numpy(np.stack([*rows, np.zeros_like(nodes)])), [*names, "nothing"]


def _drawn(
    among: Bool[np.ndarray, " node"], like: Bool[np.ndarray, " node"], rng: np.random.Generator
) -> Bool[np.ndarray, " node"]:
    """As many of some nodes as another choice has of them."""
    is_drawn = np.zeros_like(like)
    is_drawn[rng.choice(among.nonzero()[0], int((among & like).sum()), replace=False)] = True
    return is_drawn


@dataclass(frozen=True, eq=False)
class Kept:
    """What the choices keep of a site's features and errors."""

    features: Int64[torch.Tensor, " feature"]
    """Their indices, each once."""
    mask: Bool[torch.Tensor, "choice pos feature"]
    errors: Bool[torch.Tensor, "choice pos"]

    @classmethod
    def of(cls, layout: Layout, site: int, is_kept: Bool[torch.Tensor, "choice node"]) -> Kept:
        """At one site."""
        activity = layout.activities[site]
        device = activity.rest.device
        entries = is_kept[:, layout.features(site)].to(device)
        used = entries.any(0)
        features, index = activity.acts.indices[used].unique(return_inverse=True)
        shape = (len(is_kept), layout.n_pos)
        mask = torch.zeros(*shape, len(features), dtype=torch.bool, device=device)
        mask[:, activity.acts.rows[used], index] = entries[:, used]
        errors = torch.zeros(shape, dtype=torch.bool, device=device)
        errors[:, activity.keep] = is_kept[:, layout.errors(site)].to(device)
        return cls(features, mask, errors)


@torch.no_grad()
def ablated_run(
    traced: TracedPrompt, is_kept: Bool[torch.Tensor, "choice node"], positions: Sequence[int]
) -> tuple[Float[torch.Tensor, "choice pos d_model"], Float[torch.Tensor, "choice asked d_vocab"]]:
    """The end of the stream before the last norm, and logits at some positions after the soft-cap.

    Only features and errors of ``is_kept`` count.
    """
    frozen = traced.frozen
    sites = range(len(traced.layout.activities))
    kept_parts = [Kept.of(traced.layout, site, is_kept) for site in sites]
    inputs: dict[int, torch.Tensor] = {}
    acts: dict[int, torch.Tensor] = {}
    hooks: Hooks = []
    for site in sites:
        hooks += _site_hooks(traced, site, kept_parts, inputs, acts)
    end: dict[str, torch.Tensor] = {}
    hooks.append((f"blocks.{frozen.n_layers - 1}.hook_resid_post", keep(end, "stream")))
    with hooking(frozen.model, fwd_hooks=hooks), asked_positions(frozen.model, list(positions)):
        logits = frozen.model(frozen.tokens.repeat(len(is_kept), 1))
    return end["stream"].to(frozen.dtype), logits


def _site_hooks(
    traced: TracedPrompt,
    site: int,
    kept_parts: Sequence[Kept],
    inputs: dict[int, torch.Tensor],
    acts: dict[int, torch.Tensor],
) -> Hooks:
    """Hooks that note what a site's dictionary reads, its kept features, and rebuild what it writes."""
    hooked = traced.layout.activities[site].site.hooked
    read = reading(traced.frozen.model, hooked.hook_in)

    def live(x: torch.Tensor) -> torch.Tensor:
        part, weights = kept_parts[site], hooked.weights
        values = weights.encode_features(inputs[site].to(weights.W_enc.dtype), part.features)
        return (values * part.mask.to(values)).to(traced.frozen.dtype)

    return [
        (read.hook, keep(inputs, site, lambda x: read(x).flatten(2))),
        (read.hook, keep(acts, site, live)),
        (hook_of(traced, hooked.hook_out), _rebuilt(traced, site, kept_parts, inputs, acts)),
    ]


def _rebuilt(
    traced: TracedPrompt,
    site: int,
    kept_parts: Sequence[Kept],
    inputs: dict[int, torch.Tensor],
    acts: dict[int, torch.Tensor],
) -> Callable[..., torch.Tensor]:
    layout, dtype = traced.layout, traced.frozen.dtype
    activity = layout.activities[site]
    weights = activity.site.weights

    def rebuilt(y: torch.Tensor) -> torch.Tensor:
        flat = y.flatten(2)
        out = weights.bias(inputs[site].to(weights.W_enc.dtype)).to(dtype)
        out = out + kept_parts[site].errors[..., None] * activity.rest
        for source in layout.source_sites(site):
            place = layout.activities[source].site.place
            W_dec = activity.site.hooked.decoder_from(place).detach()
            out = out + acts[source] @ W_dec[kept_parts[source].features].to(out)
        return torch.where(activity.keep[:, None], out.to(flat), flat).reshape(y.shape)

    return write(rebuilt)


def _metric(
    traced: TracedPrompt, graph: Graph, end: Float[torch.Tensor, "choice pos d_model"]
) -> Float[torch.Tensor, " choice"]:
    """Weighted targets, as logits before the soft-cap through the norm of each run."""
    frozen = traced.frozen
    scale = frozen.final_scale() / frozen.anatomy.ln_final.scale(end)[..., 0]
    weights = graph.weights[graph.where("target")]
    parts = [
        weight * ((end[:, seed.position] @ seed.vector) * scale[:, seed.position] + seed.constant)
        for weight, seed in zip(weights, traced.seeds, strict=True)
    ]
    return torch.stack(parts).sum(0) / float(weights.sum())


def _divergence(
    logits: Float[torch.Tensor, "choice asked d_vocab"],
) -> Float[torch.Tensor, " choice"]:
    log = logits.double().log_softmax(-1)
    return (log[:1].exp() * (log[:1] - log)).sum(-1).mean(-1)


def _frame(
    layout: Layout,
    is_kept: Bool[torch.Tensor, "choice node"],
    names: list[str],
    metric: Float[torch.Tensor, " choice"],
    kl: Float[torch.Tensor, " choice"],
) -> pd.DataFrame:
    import pandas as pd

    sites = range(len(layout.activities))
    counts = {
        "features": sum(is_kept[:, layout.features(site)].sum(1) for site in sites),
        "errors": sum(is_kept[:, layout.errors(site)].sum(1) for site in sites),
    }
    faithfulness = (metric - metric[-1]) / (metric[0] - metric[-1])
    values = {"metric": metric, "faithfulness": faithfulness, "kl": kl}
    columns = {
        name: torch.as_tensor(value).tolist() for name, value in {**counts, **values}.items()
    }
    return pd.DataFrame({"what": names, **columns})
