"""The view of a graph that a viewer has saved: ``qParams`` of its JSON, as part of the metadata.

    {"pinned": (id, ...), "supernodes": ((name, id, ...), ...), "unknown": (name, ...), "saved": {...}}

1. Ids are those of our nodes. What the viewer names and the graph does not have is kept under
   ``unknown``, and not written again. ``saved`` has all other entries as they are.
2. Labels that a viewer has changed (``clerps``, which one of them keeps as JSON in a text and the other
   as pairs) become labels of the nodes: each is named by layer, feature and position.
3. Writing takes what is there of the view; nodes that were pruned since are left out of it.

Cost: that of the view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemmascope_plugin.errors import BadFileError, UnknownNameError, nearest
from gemmascope_plugin.files.bundle import as_json, from_json_value
from gemmascope_plugin.files.json_file import parse_json

VIEW = "view"
"""Where it stands in the metadata of a graph."""
EMPTY = {"pinnedIds": [], "supernodes": [], "linkType": "both", "sg_pos": ""}
_CLICKED = "clickedId"


def saved_view(
    metadata: Mapping[str, Any],
    names: Mapping[str, str],
    groups: Mapping[str, Sequence[str]] | None,
    pinned: Sequence[str] | None,
) -> dict[str, Any]:
    """``qParams`` of a graph; ``names`` are those of its nodes in the file, by id."""
    view = metadata.get(VIEW)
    view = view if isinstance(view, Mapping) else {}
    saved = {**EMPTY, **as_json(view.get("saved", {}), "the saved view")}
    if saved.get(_CLICKED) in names:
        saved[_CLICKED] = names[saved[_CLICKED]]
    else:
        saved.pop(_CLICKED, None)
    if pinned is None:
        pinned = [node for node in view.get("pinned", ()) if node in names]
    if groups is None:
        rows = [(row[0], [i for i in row[1:] if i in names]) for row in view.get("supernodes", ())]
        rows = [(name, ids) for name, ids in rows if ids]
    else:
        rows = [(name, list(ids)) for name, ids in groups.items()]
    saved["pinnedIds"] = _named(pinned, names, "A pin")
    saved["supernodes"] = [[name, *_named(ids, names, "A group")] for name, ids in rows]
    return saved


def _named(ids: Iterable[str], names: Mapping[str, str], whose: str) -> list[str]:
    """Names of nodes in the file."""
    ids = list(ids)
    for node in ids:
        if node not in names:
            raise UnknownNameError(
                f"{whose} has the node {node!r}, which the graph has not",
                nearest=nearest(node, names),
                fix="graph.nodes.id",
            )
    return [names[node] for node in ids]


def read_view(params: Any, ids: Mapping[str, str]) -> dict[str, Any]:
    """A saved view as metadata; nothing where there is none."""
    if not isinstance(params, dict):
        raise ValueError("qParams is not an object")
    rows = params.get("supernodes") or []
    pins = params.get("pinnedIds") or []
    lists = [pins, *rows] if isinstance(rows, list) else [rows]
    for row in lists:
        if not isinstance(row, list) or not all(isinstance(text, str) for text in row):
            raise ValueError("qParams has pins or supernodes that are not lists of texts")
    for key in (_CLICKED, "linkType", "sg_pos"):
        if not isinstance(params.get(key), str | None):
            raise ValueError(f"qParams has the {key} {params[key]!r:.60}")
    unknown = [
        name for row in (pins, *(row[1:] for row in rows)) for name in row if name not in ids
    ]
    others = ("pinnedIds", "supernodes", "clerps")
    saved = {key: value for key, value in params.items() if key not in others}
    if isinstance(saved.get(_CLICKED), str):
        saved[_CLICKED] = ids.get(saved[_CLICKED], saved[_CLICKED])
    saved = {key: value for key, value in saved.items() if EMPTY.get(key) != value}
    view = {
        "pinned": tuple(ids[name] for name in pins if name in ids),
        "supernodes": tuple(
            (row[0], *(ids[name] for name in row[1:] if name in ids)) for row in rows if row
        ),
        "unknown": tuple(dict.fromkeys(unknown)),
        "saved": from_json_value(saved),
    }
    return {VIEW: view} if any(view.values()) else {}


def changed_labels(params: Any) -> dict[str, str]:
    """Labels that a viewer has changed, by layer, feature and position as one text."""
    pairs = params.get("clerps") if isinstance(params, dict) else None
    if isinstance(pairs, str):
        try:
            pairs = parse_json(pairs, "qParams.clerps") if pairs else []
        except BadFileError as fault:
            raise ValueError(str(fault)) from fault
    if isinstance(pairs, dict):
        pairs = [list(pair) for pair in pairs.items()]
    if not isinstance(pairs, list | None):
        raise ValueError("qParams.clerps are not pairs of texts")
    for pair in pairs or []:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise ValueError("qParams.clerps are not pairs of texts")
    return dict(pairs or [])
