"""Effects as tables, figures and text: what depends on the axes.

1. A table has one row per intervention. A feature fills two columns, an edge three; positions of the
   logit lens have their token beside them.
2. A figure is a heatmap of two axes, or ranked bars of one. Edges are writers by readers, empty where
   there is no edge; the logit lens is layers by positions, with the most likely token in each field.

Cost: none worth mentioning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes.labelled_values import LabelledValues
from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.figures.theme import plain, short_label
from gemmascope_plugin.graphs.frames import conservation_text
from gemmascope_plugin.graphs.node import FeatureId, Node, Reader

if TYPE_CHECKING:
    from pandas import DataFrame

    from gemmascope_plugin.figures.fragments import Figure

MAX_BARS = 20


def is_lens(effects: LabelledValues) -> bool:
    """Whether the numbers are probabilities of tokens."""
    return "id" in effects.columns


def frame_of(
    effects: LabelledValues, columns: Mapping[str, torch.Tensor] | None = None
) -> DataFrame:
    """One row per intervention: its coordinates, its number, and further columns."""
    import pandas as pd

    places = effects.is_cell.nonzero()
    table: dict[str, list[Any]] = {}
    for i, axis in enumerate(effects.axes):
        labels = effects.labels[axis]
        for name, entries in _columns_of(axis, labels).items():
            table[name] = [entries[place] for place in places[:, i].tolist()]
    tokens = effects.metadata.get("tokens", ())
    if is_lens(effects):
        if "pos" in table:
            table["at"] = [tokens[pos] for pos in table["pos"]]
        table.pop("token", None)
        ids = _cells(effects, effects.columns["id"])
        table["token"] = [effects.metadata["texts"][str(i)] for i in ids]
        table |= {"id": ids, "rank": _cells(effects, effects.columns["rank"])}
        table["probability"] = _cells(effects, effects.values)
    else:
        table["effect"] = _cells(effects, effects.values)
        table["share"] = _cells(effects, effects.share)
    table |= {name: _cells(effects, values) for name, values in (columns or {}).items()}
    return pd.DataFrame(table, index=range(len(places)))


def top_of(effects: LabelledValues, n: int) -> DataFrame:
    """The rows with the largest absolute number."""
    frame = frame_of(effects)
    sizes = frame["probability" if is_lens(effects) else "effect"].abs()
    order = sizes.sort_values(ascending=False, kind="stable").index[:n]
    return frame.loc[order].reset_index(drop=True)


def _cells(effects: LabelledValues, values: torch.Tensor) -> list[Any]:
    return values[effects.is_cell.to(values.device)].tolist()


def _columns_of(axis: str, labels: tuple[Any, ...]) -> dict[str, list[Any]]:
    """The columns that the coordinates along an axis fill."""
    if labels and isinstance(labels[0], FeatureId):
        return {"site": [f.site for f in labels], "feature": [f.feature for f in labels]}
    if axis == "reader":
        ports = [reader.port for reader in labels]
        return {"target": [reader.node.label for reader in labels], "port": ports}
    if axis == "writer":
        return {"source": [node.label for node in labels]}
    return {axis: list(labels)}


def plot_of(effects: LabelledValues) -> Figure:
    """A heatmap of two axes, ranked bars of one."""
    if is_lens(effects):
        effects = _most_likely(effects)
    if effects.of_edges:
        return _edges_figure(effects)
    if len(effects.axes) not in (1, 2):
        first = effects.axes[0] if effects.axes else None
        raise TaskError(
            f"A figure shows one or two axes, these effects have {len(effects.axes)}",
            exists=", ".join(effects.axes) or f"one effect of {float(effects.values):.4g}",
            fix=f"effects.at({first}={effects.labels[first][0]!r}).plot()" if first else None,
        )
    if len(effects.axes) == 1:
        ranked = top_of(effects, MAX_BARS)
        number = "probability" if is_lens(effects) else "effect"
        ends = {number, "share", "id", "rank"}
        names = [name for name in ranked if name not in ends]
        rows = ranked[names].itertuples(index=False, name=None)
        texts = [" ".join(map(str, row)) for row in rows]
        title = _title(effects)
        return figures.bars(texts, ranked[number].tolist(), title=title, x_title=number)
    (y_title, rows), (x_title, columns) = (_ticks(effects, axis) for axis in effects.axes)
    figure = figures.heatmap(
        effects.values.cpu().numpy(),
        x=columns,
        y=rows,
        x_title=x_title,
        y_title=y_title,
        title=_title(effects),
        color_title="probability" if is_lens(effects) else "effect",
        symmetric=not is_lens(effects),
    )
    if not is_lens(effects):
        return figure
    texts = effects.metadata["texts"]
    ids = effects.columns.get("best", effects.columns["id"]).tolist()
    names = [[plain(short_label(texts[str(i)])) for i in row] for row in ids]
    return figure.update_traces(text=names, texttemplate="%{text}")


def _most_likely(effects: LabelledValues) -> LabelledValues:
    """Layers and positions, where the tokens are told apart."""
    if "token" in effects.axes and len(effects.axes) == 3:
        return effects.at(token=effects.labels["token"][0])
    return effects


def _edges_figure(effects: LabelledValues) -> Figure:
    is_edge, axes = effects.is_cell, list(effects.axes)
    if "pos" in axes:
        is_edge = is_edge.any(axes.index("pos"))
    values = effects.total.masked_fill(~is_edge.to(effects.values.device), float("nan"))
    return figures.heatmap(
        values.cpu().numpy(),
        x=[reader.label for reader in effects.labels["reader"]],
        y=[node.label for node in effects.labels["writer"]],
        x_title="reader",
        y_title="writer",
        title=f"Edges: {_how(effects.metadata)}",
        color_title="effect",
    )


def _title(effects: LabelledValues) -> str:
    meta = effects.metadata
    places = dict(meta.get("at", {}))
    if is_lens(effects):
        token = str(places.pop("token", "#1"))
        subject = "the most likely token" if token == "#1" else repr(token)
        title = f"logit lens: probability of {subject}"
    else:
        title = f"{meta['component']}: {_how(meta)}"
    return title + "".join(f", {axis} {_text(value)}" for axis, value in places.items())


def _how(meta: Mapping[str, Any]) -> str:
    """Method, and the direction of a patch or the form of a sum of contributions."""
    return ", ".join(str(meta[key]) for key in ("method", "direction", "form") if meta.get(key))


def _text(label: object) -> str:
    return label.label if isinstance(label, Node | Reader) else str(label)


def _ticks(effects: LabelledValues, axis: str) -> tuple[str, list[Any]]:
    """Title and labels of an axis in a figure; positions are tokens of the first prompt."""
    labels, tokens = effects.labels[axis], effects.metadata.get("tokens")
    if axis == "pos" and tokens:
        return "token", [tokens[position] for position in labels]
    return axis, [_text(label) if isinstance(label, Node | Reader) else label for label in labels]


def text_of(effects: LabelledValues) -> str:
    """The essentials in one line."""
    meta = effects.metadata
    shape = " x ".join(f"{len(effects.labels[axis])} {axis}" for axis in effects.axes)
    if is_lens(effects):
        return f"Effects(logit lens, {shape or 'one probability'}{_last_text(effects)})"
    # Rounded first: no minus before zero.
    clean, corrupt = (
        round(meta.get(f"metric_{run}", float("nan")), 3) + 0.0 for run in ("clean", "corrupt")
    )
    ends = f"metric clean {clean:.3f}, corrupt {corrupt:.3f}"
    if effects.of_edges:
        n_edges = int(effects.is_cell.sum()) // len(effects.labels.get("pos", (0,)))
        return (
            f"Effects(edges, {_how(meta)}, {n_edges} edges, "
            f"{meta.get('n_prompts')} prompts, {ends}{conservation_text(meta)})"
        )
    answers = f"first prompt {meta['answers']}, " if meta.get("answers") else ""
    excluded = ", ".join(map(str, meta.get("exclude") or ())) or "none"
    return (
        f"Effects({meta.get('component')}, {_how(meta)}, {shape}, "
        f"{answers}{ends}, excluded tokens {excluded}{conservation_text(meta)})"
    )


def _last_text(effects: LabelledValues) -> str:
    """What the logit lens sees after its last layer, at its last position."""
    chosen = {axis: effects.labels[axis][-1] for axis in ("layer", "pos") if axis in effects.axes}
    last = effects.at(**chosen)
    if last.axes != ("token",) or not bool(last.is_cell.any()):
        return ""
    rows = frame_of(last).head(3)
    words = [f"{t!r} {p:.2f}" for t, p in zip(rows["token"], rows["probability"], strict=True)]
    at = {**effects.metadata.get("at", {}), **chosen}
    return f", after layer {at['layer']} at position {at['pos']}: {', '.join(words)}"
