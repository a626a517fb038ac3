"""The page of the demo on a real model: its SAEs, where the answer is decided, heads, the circuit.

Cost: that of its figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

import gemmascope_plugin.figures as figures
from gemmascope_plugin.catalog import SaeSpec, SpecList
from gemmascope_plugin.causes import Task
from gemmascope_plugin.demo.progress import versions
from gemmascope_plugin.figures.theme import visible
from gemmascope_plugin.pages.report_page import Section, write_page
from gemmascope_plugin.pages.sections import (
    agreement,
    circuit_section,
    heads_section,
    positions_section,
    site_name,
)

if TYPE_CHECKING:
    from gemmascope_plugin.demo.on_model import ModelReport, SplicedSaes

N_FEATURES = 8
"""Features of spliced SAEs that are shown."""


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
