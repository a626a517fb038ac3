"""The page of a whole walk: dictionaries, features, an edit, patching, a circuit, steering.

Sections of effects and of circuits stand with their pages; those of features and of steering are here.

Cost: that of its figures; about 5 MB of page, nearly all of it the plotting library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes import FeatureId
from gemmascope_plugin.circuits import Scores
from gemmascope_plugin.features import Features
from gemmascope_plugin.pages.circuit_page import circuit_section
from gemmascope_plugin.pages.effects_page import (
    Comparison,
    agreement,
    heads_section,
    positions_section,
)
from gemmascope_plugin.pages.report_page import Section, write_page
from gemmascope_plugin.splice import Steering

_SITES = {
    "hook_resid_post": "res",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "att",
}

Labels = Mapping[FeatureId, Any]
"""Feature to its label: ``concept``, ``precision`` and ``recall``."""


@dataclass(frozen=True)
class Ablation:
    """What the answer of a task owes to one feature."""

    feature: FeatureId
    before: float
    """Mean probability of the answer."""
    after: float
    """The same with the feature set to zero."""
    n_prompts: int
    n_tried: int
    """Features of which this one lowers the answer most."""
    prompt: str
    """The prompt whose answer falls most."""
    answer: str
    words: Any
    """A data frame: the most probable next words of that prompt before and after."""


@dataclass(frozen=True)
class Walkthrough:
    """All results of one walk."""

    dictionaries: Any
    """A data frame, one row per spliced dictionary."""
    logit_difference: float
    """Largest difference between the spliced model's logits and the bare model's."""
    features: Features
    chosen: tuple[FeatureId, ...]
    """Features that the sentence is coloured by."""
    labels: Mapping[FeatureId, Any]
    ablation: Ablation
    positions: Comparison
    heads: Comparison
    scores: Scores
    ranked: Comparison
    """Features, shortlisted by the estimate."""
    steering: tuple[Steering, ...]

    @property
    def faithfulness(self) -> float:
        """Of the circuit, on held-out prompts."""
        return self.scores.faithfulness

    @property
    def best_random(self) -> float:
        """Faithfulness of the best random circuit of the same size."""
        return max(self.scores.random)

    def describe(self, feature: FeatureId) -> str:
        """``next_is_name (res 2 / 17)``."""
        label = self.labels.get(feature)
        name = feature_name(feature)
        return name if label is None else f"{label.concept} ({name})"

    def steered(self, steering: Steering) -> str:
        """The feature that was added, described."""
        return self.describe(FeatureId(steering.site, steering.feature))


def write_walkthrough(
    path: str | Path,
    title: str,
    walk: Walkthrough,
    *,
    lead: str = "",
    footer: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes the page."""
    sections = [
        _dictionaries(walk),
        features_section(walk.features, walk.chosen, walk.labels),
        _ablation(walk),
        positions_section(walk.positions.exact, agreement(walk.positions)),
        heads_section(walk.heads.exact, walk.heads.estimate, agreement(walk.heads)),
        circuit_section(walk.scores),
        _ranked(walk),
        _steering(walk),
    ]
    key_figures = _key_figures(walk)
    return write_page(path, title, sections, lead=lead, key_figures=key_figures, footer=footer)


def _key_figures(walk: Walkthrough) -> list[tuple[str, str]]:
    circuit, ablation = walk.scores.circuit, walk.ablation
    return [
        (
            f"{walk.logit_difference:.1g}",
            f"largest logit change by splicing {len(walk.dictionaries)} dictionaries, error kept",
        ),
        (
            f"{ablation.before:.2f} → {ablation.after:.2f}",
            "probability of the answer when one feature is ablated",
        ),
        (
            f"{walk.heads.spearman:.2f}",
            "rank correlation of attribution with exact patching, heads",
        ),
        (
            f"{walk.faithfulness:.2f}",
            f"faithfulness of {circuit.size} of {len(circuit.ranking)} nodes "
            f"(best random circuit: {walk.best_random:.2f})",
        ),
    ]


def _dictionaries(walk: Walkthrough) -> Section:
    return Section(
        "Find, load, splice",
        "Every dictionary that was found for the model, loaded and spliced in, up to a dozen at "
        "once. L0 is the mean number of active features per token, FVU the unexplained share of "
        "the variance, both on held-out text. With the reconstruction error kept, splicing must "
        "not change the model.",
        (
            walk.dictionaries,
            "Largest difference between spliced and bare logits on the held-out prompts: "
            f"{walk.logit_difference:.2g}.",
        ),
    )


def _ablation(walk: Walkthrough) -> Section:
    ablation = walk.ablation
    return Section(
        "Edit one feature",
        f"Each of the {ablation.n_tried} features that are active on the sentence above and stand for "
        "a concept of the grammar is set to zero, alone, at every token; everything else, the "
        "reconstruction error included, stays.",
        (
            f"The answer needs {walk.describe(ablation.feature)} most: without it, its mean "
            f"probability on {ablation.n_prompts} held-out prompts goes from {ablation.before:.3f} to "
            f"{ablation.after:.3f}. It falls most in this prompt, whose next words are:",
            Markup("<p><i>{} …</i></p>").format(ablation.prompt),
            ablation.words,
        ),
    )


def _ranked(walk: Walkthrough) -> Section:
    exact, estimate = walk.ranked.exact, walk.ranked.estimate
    pairs = sorted(
        zip(exact.labels["feature"], exact.share.tolist(), estimate.share.tolist(), strict=True),
        key=lambda row: -abs(row[1]),
    )
    rows = [
        (feature, {"change of the metric": f"{share:+.3f}", "estimate": f"{guess:+.3f}"})
        for feature, share, guess in pairs[:12]
    ]
    return Section(
        "Which features carry the task",
        "Attribution shortlists features of all residual dictionaries, exact patching ranks them: "
        "each gets its corrupted activation in the clean run. The change is in units of the gap "
        f"between clean and corrupted prompts; mean over {exact.metadata['n_prompts']} held-out prompts.",
        (feature_frame(rows, walk.labels),),
    )


def _steering(walk: Walkthrough) -> Section:
    parts: list[Any] = []
    for steering in walk.steering:
        described = f"{steering.strength:g} times the direction of {walk.steered(steering)}:"
        parts += [described, steering_html(steering)]
    return Section(
        "Steer the model with one feature",
        "A feature's decoder direction is added at every token; marked are the words that the model "
        "goes on with, the most probable one at every step.",
        tuple(parts),
    )


# ------------------------------------------------------------------- sections of features and steering
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
