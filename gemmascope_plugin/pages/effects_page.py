"""The page of effects: what each patch does to the metric, as a picture, a table and in words.

1. How to read a number: what was replaced by what, in which run.
2. A heatmap of two axes; ranked bars of the largest effects of any other number.
3. What came out, in two sentences, and the largest effects as a table, with standard errors over prompts
   where the effects are not estimates.
4. The metadata.

Pages of several results take effects as sections: positions, and heads beside their estimate.

One file, as ``report_page.py`` makes them. Cost: about 5 MB per page, for the plotting library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes import Effects
from gemmascope_plugin.causes.gradient.attribution_patching import METHODS
from gemmascope_plugin.causes.gradient.edge_attribution import METHODS as EDGE_METHODS
from gemmascope_plugin.pages.report_page import (
    MAX_TABLE_ROWS,
    Columns,
    Section,
    even_digits,
    facts,
    page_html,
    write_html,
)

if TYPE_CHECKING:
    import pandas as pd

MAX_BARS = 20
"""Bars of a figure."""
NUMBERS = ("effect", "share", "se")
"""Columns of ``top_frame`` that are not coordinates."""
_OTHER_RUN = {"noising": "corrupted", "denoising": "clean"}
_INSERTED = {
    "other": "its value in the {} run",
    "zero": "zero",
    "mean": "the {} run's mean at its position",
    "overall_mean": "the {} run's mean over all tokens",
    "resample": "its value for another prompt of the {} run",
}


def effects_html(effects: Effects, *, title: str | None = None, n: int = MAX_TABLE_ROWS) -> str:
    """Effects as one HTML page.

    Args:
        effects: From any method of patching.
        title: Heading; component and task by default.
        n: Rows of the table.

    Returns:
        The whole page.
    """
    meta = effects.metadata
    hidden = {"tokens", "options", "metric_clean", "metric_corrupt"}
    shown = {name: value for name, value in meta.items() if name not in hidden}
    tokens = [("first prompt", " ".join(meta["tokens"]))] if meta.get("tokens") else []
    return page_html(
        title or f"Effects of {meta.get('component')} on {meta.get('task')}",
        [
            Section("Effects", how_to_read(effects), (_figure(effects),)),
            Section("The largest effects", meaning(effects), (_table(effects, n),)),
        ],
        key_figures=_key_figures(effects),
        footer=[*facts(shown), *tokens],
    )


def write_effects(
    path: str | Path, effects: Effects, *, title: str | None = None, n: int = MAX_TABLE_ROWS
) -> Path:
    """Writes the page of effects; an older page is replaced.

    Args:
        path: The file; its folder is made if need be.
        effects: From any method of patching.
        title: Heading; component and task by default.
        n: Rows of the table.

    Returns:
        The path.

    Raises:
        PageError: The file cannot be written there.
    """
    return write_html(path, effects_html(effects, title=title, n=n))


def top_frame(effects: Effects, n: int) -> Any:
    """The effects of largest absolute value, largest first, as a DataFrame."""
    frame = effects.to_frame()
    if has_errors(effects):
        frame["se"] = effects.standard_error()[effects.is_cell].tolist()
    order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index[:n]
    return frame.loc[order].reset_index(drop=True)


def is_estimate(effects: Effects) -> bool:
    """Whether the numbers come from gradients."""
    titles = {method.title for method in METHODS.values()}
    return effects.metadata.get("method") in {*titles, *EDGE_METHODS}


def has_errors(effects: Effects) -> bool:
    """Whether the scatter over prompts is that of the effects: no estimates, and several prompts.

    That of an estimate says nothing about how wrong the estimate is.
    """
    each = effects.values_by_prompt
    return not is_estimate(effects) and each is not None and each.shape[-1] > 1


def how_to_read(effects: Effects) -> str:
    """What a number is."""
    meta, gap = effects.metadata, abs(effects.gap)
    metric = meta.get("metric", "metric")
    if meta.get("direction") not in _OTHER_RUN:
        return f"Each number is by how much one entry raises the {metric}; {meta.get('method')}."
    base = "clean" if meta["direction"] == "noising" else "corrupted"
    inserted = _INSERTED[meta.get("replacement", "other")].format(_OTHER_RUN[meta["direction"]])
    part = meta.get("component", "one path")
    if effects.axes:
        *some, last = ("position" if axis == "pos" else axis for axis in effects.axes)
        part += f" of one {', '.join(some)} and {last}" if some else f" of one {last}"
    how = f"if {part}, alone, is replaced by {inserted}"
    text = (
        f"Each number is the change of the {metric} of the {base} run {how}, and all that follows is "
        "computed again."
        if meta.get("method") == "exact patching"
        else f"Each number is what {meta.get('method')} gives for the change of the {metric} of the "
        f"{base} run {how}."
    )
    if meta.get("magnitudes"):
        return f"{text} Sizes only: the sign says nothing."
    return (
        f"{text} Blue raises the {metric}, red lowers it; clean and corrupted are {gap:.3f} apart."
    )


def meaning(effects: Effects) -> str:
    """What came out, in two sentences."""
    top = top_frame(effects, 1)
    if not len(top):
        return "There are no effects."
    row = top.iloc[0]
    value, total = float(row["effect"]), effects.values.numel()
    error = f" ± {row['se']:.3f} (standard error)" if "se" in top else ""
    name = _names(effects, top)[0] or effects.metadata.get("component")
    text = f"Most is changed by {name}: {value:+.3f}{error}{_way(effects, value)}."
    if is_estimate(effects):
        return (
            f"{text} The {total} numbers are estimates, for ranking; exact patching says how large the "
            "first ones really are."
        )
    if not has_errors(effects):
        return f"{text} One prompt says nothing about others."
    sure = int((effects.values.abs().cpu() > 2 * effects.standard_error().cpu()).sum())
    text = f"{text} {sure} of {total} effects are more than two standard errors from 0"
    if effects.metadata.get("direction") not in _OTHER_RUN:
        return f"{text}."
    return (
        f"{text}; they need not add up, as later parts may repeat or make up for what an earlier one "
        "does."
    )


def _way(effects: Effects, value: float) -> str:
    """How far an effect goes from one end of the scale to the other."""
    meta = effects.metadata
    if meta.get("direction") not in _OTHER_RUN or meta.get("magnitudes"):
        return ""
    begin, end = meta["metric_corrupt"], meta["metric_clean"]
    if meta["direction"] == "noising":
        begin, end = end, begin
    return f", {value / (end - begin):.0%} of the way from {begin:.3f} to {end:.3f}"


def _key_figures(effects: Effects) -> list[tuple[str, str]]:
    meta = effects.metadata
    metric = meta.get("metric", "metric")
    shape = " x ".join(f"{len(effects.labels[axis])} {axis}" for axis in effects.axes)
    return [
        (f"{meta['metric_clean']:.3f}", f"{metric}, clean"),
        (f"{meta['metric_corrupt']:.3f}", f"{metric}, corrupted"),
        (f"{float(effects.values.abs().max()):.3f}", "largest effect"),
        (str(effects.values.numel()), f"effects: {shape}"),
        (str(meta.get("n_prompts")), "prompts"),
    ]


def _figure(effects: Effects) -> Any:
    if len(effects.axes) == 2:
        return effects.plot()
    ranked = top_frame(effects, MAX_BARS)
    title = "Effects"
    if len(ranked) < effects.values.numel():
        title = f"The {len(ranked)} largest of {effects.values.numel()} effects"
    return figures.bars(
        _names(effects, ranked),
        ranked["effect"].tolist(),
        title=title,
        x_title=f"change of the {effects.metadata.get('metric', 'metric')}",
        errors=ranked["se"].tolist() if "se" in ranked else None,
    )


def _names(effects: Effects, frame: pd.DataFrame) -> list[str]:
    """``layer 1, head 3`` for every row; features and senders have names of their own."""
    columns = [column for column in frame.columns if column not in NUMBERS]
    rows = frame[columns].itertuples(index=False, name=None)
    return [
        ", ".join(
            f"{column} {value}" if isinstance(value, int) else str(value)
            for column, value in zip(columns, row, strict=True)
        )
        for row in rows
    ]


def _table(effects: Effects, n: int) -> Any:
    frame = top_frame(effects, n)
    tokens = effects.metadata.get("tokens")
    if "pos" in frame and tokens:
        place = list(frame.columns).index("pos") + 1
        frame.insert(place, "token of the first prompt", [tokens[p] for p in frame["pos"]])
    return even_digits(frame, [name for name in NUMBERS if name in frame])


# ---------------------------------------------------------------------- sections of another page
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
