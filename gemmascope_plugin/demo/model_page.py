"""What the demo on a real model measured, and the page of it: SAEs, positions, heads, the circuit.

Cost: that of its figures.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from markupsafe import Markup

import gemmascope_plugin.figures as figures
from gemmascope_plugin.catalog import SaeSpec, SpecList
from gemmascope_plugin.causes import Effects, Task
from gemmascope_plugin.circuits import Scores
from gemmascope_plugin.features import Features
from gemmascope_plugin.figures.theme import visible
from gemmascope_plugin.pages.circuit_page import circuit_section
from gemmascope_plugin.pages.effects_page import (
    Comparison,
    agreement,
    heads_section,
    positions_section,
)
from gemmascope_plugin.pages.report_page import Section, write_page
from gemmascope_plugin.pages.walkthrough import site_name

LIBRARIES = ("gemmascope_plugin", "torch", "transformer-lens", "sae-lens", "transformers")
N_FEATURES = 8
"""Features of spliced SAEs that are shown."""


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Names and figures, one pair per line."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


@dataclass(frozen=True)
class SplicedSaes:
    """SAEs whose files are on this machine, spliced into the model."""

    names: tuple[str, ...]
    logit_difference: float
    """Largest change of a logit, error kept."""
    features: Features
    """What they see in the first prompt."""
    words: dict[tuple[str, int], tuple[str, ...]]
    """Site and feature to the words that it writes towards."""


@dataclass(frozen=True)
class ModelReport:
    """What was measured on a model, and where its page is."""

    path: Path
    model: str
    source: str
    """Where the weights come from."""
    specs: SpecList
    """SAEs that the catalog has for the model."""
    spliced: SplicedSaes | None
    """Those on this machine; None where there are none."""
    task: Task
    """Held-out prompts: what is patched, and what the circuit is evaluated on."""
    positions: Effects
    heads: Comparison
    scores: Scores
    seconds: float = field(default=0.0, compare=False)

    @property
    def best_random(self) -> float:
        """Faithfulness of the best random circuit of the same size."""
        return max(self.scores.random)

    @property
    def mean_random(self) -> float:
        """Mean faithfulness of the random circuits; a single one may hold all that matters."""
        return sum(self.scores.random) / len(self.scores.random)

    def summary(self) -> str:
        """The main figures, one per line."""
        circuit = self.scores.circuit
        rows = [
            ("model", f"{self.model}, weights from {self.source}"),
            ("SAEs", f"{len(self.specs)} in the catalog, {self._local()}"),
            ("task", repr(self.task)),
            ("attribution vs exact, heads", f"Spearman {self.heads.spearman:.3f}"),
            (
                f"circuit, {circuit.size} of {circuit.n_units} edges",
                f"faithfulness {self.scores.faithfulness:.3f} held out; {len(self.scores.random)} "
                f"random ones {self.mean_random:.3f} on average, {self.best_random:.3f} at best",
            ),
            ("time", f"{self.seconds:.0f} s"),
        ]
        return aligned(rows)

    def _local(self) -> str:
        if self.spliced is None:
            return "none of them on this machine"
        return (
            f"{len(self.spliced.names)} of those on this machine spliced in: "
            f"logits change by at most {self.spliced.logit_difference:.2g}"
        )

    def __repr__(self) -> str:
        return f"ModelReport({str(self.path)!r})\n{self.summary()}"


def write(report: ModelReport) -> Path:
    """Writes the page."""
    circuit, spliced = report.scores.circuit, report.spliced
    key_figures = [
        (
            f"{report.heads.spearman:.2f}",
            "rank correlation of attribution with exact patching, heads",
        ),
        (
            f"{report.scores.faithfulness:.2f}",
            f"faithfulness of {circuit.size} of {circuit.n_units} edges on held-out prompts "
            f"(random circuits: {report.mean_random:.2f} on average, {report.best_random:.2f} at best)",
        ),
    ]
    if spliced is not None:
        change = f"largest logit change by splicing {len(spliced.names)} SAEs, error kept"
        key_figures.insert(0, (f"{spliced.logit_difference:.1g}", change))
    sections = [
        saes_section(report),
        positions_section(report.positions, _first_pair(report.task)),
        heads_section(report.heads.exact, report.heads.estimate, agreement(report.heads)),
        circuit_section(report.scores),
    ]
    footer = [
        ("model", report.model),
        ("weights", report.source),
        ("task", repr(report.task)),
        ("random seed", "0"),
        ("versions", versions()),
    ]
    return write_page(
        report.path,
        f"From SAEs to a checked circuit: {report.model}",
        sections,
        lead=_lead(report),
        key_figures=key_figures,
        footer=footer,
    )


def _lead(report: ModelReport) -> str:
    """The task, and the ends of its metric."""
    scores, task = report.scores, report.task
    return (
        f"The task is {task.name}: “{task.clean[0]} …” against “{task.corrupt[0]} …”. Over "
        f"{len(task)} held-out prompts the mean {scores.metadata['metric']} is "
        f"{scores.metric_full:.2f}, and {scores.metric_empty:.2f} on their corrupted partners."
    )


def _first_pair(task: Task) -> str:
    """The first clean prompt and its corrupted partner."""
    return f"The prompt is “{task.clean[0]} …”, corrupted “{task.corrupt[0]} …”."


def saes_section(report: ModelReport) -> Section:
    """What the catalog has for the model, and what splicing changed."""
    parts: list[Any] = []
    if len(report.specs):
        parts.append(_catalog_table(report.specs))
    else:
        parts.append("The catalog has none for this model.")
    if report.spliced is not None:
        parts += _spliced_parts(report.spliced)
    elif len(report.specs):
        parts.append(
            "None of their files is on this machine, so none was spliced in. load(spec) fetches one, "
            "where there is a network."
        )
    return Section(
        "SAEs for this model",
        "What the catalog lists for the model, without a network. An SAE that is spliced in with its "
        "reconstruction error kept must not change the model.",
        tuple(parts),
    )


def _catalog_table(specs: SpecList) -> Any:
    """A row for each kind and site."""
    import pandas as pd

    groups: dict[tuple[str, str], list[SaeSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.kind, spec.site), []).append(spec)
    rows = [
        {
            "kind": kind,
            "site": site,
            "number": len(group),
            "layers": len({layer for spec in group for layer in spec.all_layers}),
            "widths": ", ".join(
                dict.fromkeys(s.width for s in sorted(group, key=lambda s: s.d_sae))
            ),
        }
        for (kind, site), group in groups.items()
    ]
    return pd.DataFrame(rows)


def _spliced_parts(spliced: SplicedSaes) -> list[Any]:
    import pandas as pd

    features = spliced.features
    rows = [
        {
            "feature": f"{site_name(row.site)} / {row.feature}",
            "token": visible(row.token),
            "activation": row.activation,
            "writes towards": "  ".join(
                map(visible, spliced.words.get((row.site, row.feature), ()))
            ),
        }
        for row in features.top(N_FEATURES).itertuples()
    ]
    fits = "; ".join(
        f"{site_name(site)}: L0 {fit.l0:.1f}, variance explained {fit.variance_explained:.2f}"
        for site, fit in features.fits.items()
    )
    return [
        f"Spliced in: {', '.join(spliced.names)}. Largest change of a logit, reconstruction error "
        f"kept: {spliced.logit_difference:.2g}.",
        f"The most active features on the first prompt, and the words that they write towards. {fits}. "
        f"Excluded tokens: {', '.join(map(str, features.exclude))}.",
        Markup(figures.frame_html(pd.DataFrame(rows), N_FEATURES)),
    ]


def versions() -> str:
    """Python's and the libraries' versions, in one line."""
    names = [f"{name} {_version(name)}" for name in LIBRARIES]
    return ", ".join([f"Python {platform.python_version()}", *names])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this package itself, used from a source tree
        return "from source"
