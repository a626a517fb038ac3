"""Sections of a page from results: features on a text, patching, circuits, steering.

Each function takes the result objects of the floors below and says in the section's lead how to
read what it shows. Cost: that of the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes import Effects, FeatureId
from gemmascope_plugin.circuits import Scores
from gemmascope_plugin.features import Features
from gemmascope_plugin.pages.circuit_page import spread
from gemmascope_plugin.pages.report_page import Columns, Section
from gemmascope_plugin.splice import Steering

_SITES = {
    "hook_resid_post": "res",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "att",
}

MAX_NODES = 20
"""Rows of a circuit's table."""
MAX_EDGES = 40
"""Edges of a circuit's picture."""
_LAYERS = ("source_layer", "target_layer")
_RANKED = {
    "node": "Nodes ranked on training prompts by how much the metric falls when a node alone gets its "
    "corrupted value.",
    "edge": "An edge is what one head or MLP reads of what another wrote. Edges are ranked on training "
    "prompts by an estimate of how much the metric falls when the edge alone is corrupted.",
}

Labels = Mapping[FeatureId, Any]
"""Feature to its label: ``concept``, ``precision`` and ``recall``."""


@dataclass(frozen=True)
class Comparison:
    """The same patches measured exactly and estimated from gradients."""

    exact: Effects
    estimate: Effects
    spearman: float
    """Rank correlation of the two over all patches."""


def agreement(comparison: Comparison) -> str:
    """How well the estimate agrees, one sentence."""
    return (
        f"Attribution patching estimates the same {comparison.exact.values.numel()} effects from one "
        f"backward pass; its rank correlation (Spearman) with the exact ones is "
        f"{comparison.spearman:.3f}."
    )


def site_name(site: str) -> str:
    """A hook name in short: ``res 2`` for ``blocks.2.hook_resid_post``."""
    parts = site.split(".", 2)
    if len(parts) == 3 and parts[2] in _SITES:
        return f"{_SITES[parts[2]]} {parts[1]}"
    return site


def feature_name(feature: FeatureId) -> str:
    """``res 2 / 17``."""
    return f"{site_name(feature.site)} / {feature.feature}"


def feature_frame(rows: Sequence[tuple[FeatureId, Mapping[str, Any]]], labels: Labels) -> Any:
    """A table of features with their labels.

    Args:
        rows: Features and what else is known of each, as columns.
        labels: What the features stand for.
    """
    import pandas as pd

    lines = []
    for feature, columns in rows:
        label = labels.get(feature)
        described = (
            {"label": "none", "precision": "", "recall": ""}
            if label is None
            else {
                "label": label.concept,
                "precision": f"{label.precision:.2f}",
                "recall": f"{label.recall:.2f}",
            }
        )
        lines.append({"feature": feature_name(feature), **described, **columns})
    return pd.DataFrame(lines)


def features_section(
    features: Features, chosen: Sequence[FeatureId], labels: Labels, *, n: int = 10
) -> Section:
    """The text once per chosen feature, then the features that are most active on it.

    Args:
        features: From :func:`gemmascope_plugin.analyze`.
        chosen: Features that the tokens are coloured by.
        labels: What the features stand for.
        n: Rows of the table.
    """
    rows = [(_described(f, labels), features.activations(f.site, f.feature)) for f in chosen]
    strongest = [
        (FeatureId(row.site, row.feature), {"token": row.token, "activation": row.activation})
        for row in features.top(n).itertuples()
    ]
    fits = "; ".join(
        f"{site_name(site)}: L0 {fit.l0:.1f}, variance explained {fit.variance_explained:.2f}"
        for site, fit in features.fits.items()
    )
    return Section(
        "What the dictionaries see in a sentence",
        "One line per feature: the darker a token, the more active the feature there (hover for the "
        "number). A label is a concept of the grammar; precision is the share of the feature's "
        "tokens where the concept holds, recall the share of the concept's tokens that it finds, "
        "both on held-out text.",
        (
            _token_rows(features.tokens, rows),
            f"Fit on this sentence. {fits}. Excluded tokens: {', '.join(map(str, features.exclude))}.",
            "The features with the highest activation, whatever their label:",
            feature_frame(strongest, labels),
        ),
    )


def _token_rows(tokens: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Rows of tokens, set apart from each other where the tokens carry no blanks of their own."""
    style = "tokens" if any(token.startswith(" ") for token in tokens) else "words"
    html = Markup(figures.token_rows_html(tokens, rows))
    return Markup('<div class="{}">{}</div>').format(style, html)


def positions_section(effects: Effects, agreement: str) -> Section:
    """Layer by position patching.

    Args:
        effects: Two axes, layer and position.
        agreement: How well the estimate from gradients agrees, one sentence.
    """
    meta = effects.metadata
    figure = figures.heatmap(
        effects.share.cpu().numpy(),
        x=list(meta["tokens"]),
        y=[f"layer {layer}" for layer in effects.labels["layer"]],
        x_title="token (of the first prompt)",
        title="Share that one patch brings back",
        color_title="share",
    )
    return Section(
        "Where the answer is decided",
        "Each cell copies the residual stream of the clean run into the corrupted run at one layer "
        f"and position, and runs the rest of the model. 1 (blue) brings back the whole {meta['metric']}, "
        f"0 (white) nothing. {_mean_over(meta['n_prompts'])}.",
        (figure, agreement),
    )


def _mean_over(n_prompts: int) -> str:
    return f"Mean over {n_prompts} held-out prompts" if n_prompts > 1 else "One held-out prompt"


def heads_section(exact: Effects, estimate: Effects, agreement: str) -> Section:
    """Heads patched one by one beside the estimate of the same from one backward pass."""
    note = f"{_mean_over(exact.metadata['n_prompts'])}."
    limit = max(float(effects.share.abs().max()) for effects in (exact, estimate))
    panels = Columns(tuple(_heads(e, e.metadata["method"], limit) for e in (exact, estimate)))
    return Section(
        "Which attention heads matter, exactly and by estimate",
        "Left: every head's output replaced by its clean value, one run per head. Right: the "
        f"first-order estimate of the same numbers from a single backward pass. {note}",
        (panels, agreement),
    )


def _heads(effects: Effects, title: str, limit: float) -> Any:
    return figures.heatmap(
        effects.share.cpu().numpy(),
        x=[f"head {head}" for head in effects.labels["head"]],
        y=[f"layer {layer}" for layer in effects.labels["layer"]],
        title=title,
        color_title="share",
        limit=limit,
    )


def circuit_section(scores: Scores) -> Section:
    """The ranked nodes, or edges, and how faithful the circuit is beside random ones."""
    circuit = scores.circuit
    unit, shown = circuit.graph.unit, min(circuit.size, MAX_NODES)
    ranked = circuit.to_frame().drop(columns="kept")
    ranked = ranked.drop(columns=[name for name in _LAYERS if name in ranked])
    if unit == "edge":  # more would hide each other
        pictures = (scores.plot(), spread(circuit.top(min(circuit.size, MAX_EDGES)).plot()))
    else:
        pictures = (circuit.plot(), scores.plot())
    return Section(
        "The circuit, checked by ablation",
        f"{_RANKED[unit]} The curve keeps the best 0, 1, 2, ... {unit}s and corrupts all others, on "
        f"{scores.metadata['n_prompts']} held-out prompts: 1 is the full model, 0 is everything "
        "corrupted. The grey band spans random circuits of the same size.",
        (
            f"The best {circuit.size} of {circuit.n_units} {unit}s: faithfulness "
            f"{scores.faithfulness:.3f}{_beside(scores.random)}.",
            *([Columns(pictures)] if unit == "node" else pictures),
            *([f"The best {shown} edges:"] if unit == "edge" else []),
            Markup(figures.frame_html(ranked, max(shown, 1))),
        ),
    )


def _beside(random: Sequence[float]) -> str:
    """Random circuits of the same size; one of several may hold all that matters, so their mean too."""
    if not random:
        return ""
    n = "one random circuit" if len(random) == 1 else f"{len(random)} random circuits"
    mean = sum(random) / len(random)
    return f"; {n} of that size: {mean:.3f} on average, {max(random):.3f} at best"


def steering_html(steering: Steering) -> Markup:
    """The continuation without and with steering, side by side."""
    card = Markup(
        '<div class="steering"><h3>{}</h3><span class="prompt">{}</span><mark>{}</mark></div>'
    )
    cards = [
        card.format("before", steering.prompt, steering.before),
        card.format("after", steering.prompt, steering.after),
    ]
    return Markup('<div class="columns">{}</div>').format(Markup("").join(cards))


def _described(feature: FeatureId, labels: Labels) -> str:
    label = labels.get(feature)
    name = feature_name(feature)
    return name if label is None else f"{label.concept}  ({name})"
