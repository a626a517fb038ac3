"""The page of a whole walk: dictionaries, features, an edit, patching, a circuit, steering.

Cost: that of its figures; about 5 MB of page, nearly all of it the plotting library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gemmascope_plugin.causes import FeatureId
from gemmascope_plugin.circuits import Scores
from gemmascope_plugin.features import Features
from gemmascope_plugin.pages.report_page import Section, write_page
from gemmascope_plugin.pages.sections import (
    Comparison,
    agreement,
    circuit_section,
    feature_frame,
    feature_name,
    features_section,
    heads_section,
    positions_section,
    steering_html,
)
from gemmascope_plugin.splice import Steering


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
