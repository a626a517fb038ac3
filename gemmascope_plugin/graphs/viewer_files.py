"""What viewers keep beside the nodes and links of a graph: a list of the graphs of a folder, saved views.

circuit-tracer's viewer lists the graphs of a folder in ``graph-metadata.json``, one entry per name. It is
written under a lock after the graph: it never names one that is not there.

The view that a viewer has saved, ``qParams`` of the JSON, becomes part of a graph's metadata:

    {"pinned": (id, ...), "supernodes": ((name, id, ...), ...), "unknown": (name, ...), "saved": {...}}

1. Ids are those of our nodes. What the viewer names and the graph does not have is kept under
   ``unknown``, and not written again. ``saved`` has all other entries as they are.
2. Labels that a viewer has changed (``clerps``, which one of them keeps as JSON in a text and the other
   as pairs) become labels of the nodes: each is named by layer, feature and position.
3. Writing takes what is there of the view; nodes that were pruned since are left out of it.

Cost: that of writing the graph, and of the view.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, UnknownNameError, nearest
from gemmascope_plugin.files.bundle import as_json, from_json_value
from gemmascope_plugin.files.json_file import Record, parse_json, read_json
from gemmascope_plugin.files.lock import file_lock
from gemmascope_plugin.files.whole import write_whole

INDEX = "graph-metadata.json"
MAX_SLUG, MAX_INDEX_SIZE = 200, 1 << 26
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows has for devices."""
VIEW = "view"
"""Where it stands in the metadata of a graph."""
EMPTY = {"pinnedIds": [], "supernodes": [], "linkType": "both", "sg_pos": ""}
_CLICKED = "clickedId"


def check_slug(slug: str) -> None:
    """Refuses a name of a graph that is not a plain file name, or is that of the list of graphs."""
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug) or len(slug) > MAX_SLUG:
        raise UnknownNameError(
            f"The slug {slug!r} is not a file name", exists="letters, digits, '.', '_', '-'"
        )
    if f"{slug.lower()}.json" == INDEX or _RESERVED.fullmatch(slug):
        raise UnknownNameError(
            f"The slug {slug!r} names a file that is something else", fix=f"slug='my-{slug}'"
        )


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes a graph file, whole or not at all."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise GemmaScopeError(f"{str(path)!r} is a folder", fix=f"{str(path / 'graph.json')!r}")
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return write_whole(path, lambda file: file.write(data))


def add_to_folder(folder: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes ``<slug>.json`` and enters it in ``graph-metadata.json``, in the place of an older one;
    waits a minute where another process writes into the folder.
    """
    folder, metadata = Path(folder).expanduser(), content["metadata"]
    check_slug(metadata["slug"])
    info = {**metadata["info"], "create_time_ms": time.time_ns() // 10**6}
    metadata = {**metadata, "info": info}
    index = folder / INDEX
    with file_lock(folder / f".{INDEX}.lock", "a graph", shown=folder, wait=60.0):
        listed = [each for each in _listed(index) if each.get("slug") != metadata["slug"]]
        path = write_json(folder / f"{metadata['slug']}.json", {**content, "metadata": metadata})
        listed.append({name: value for name, value in metadata.items() if name != "gemmascope"})
        write_json(index, {"graphs": listed})
    return path


def _listed(index: Path) -> list[dict[str, Any]]:
    """What the list of graphs has."""
    if not index.exists():
        return []
    fix = "mend it, delete it, or another folder"
    content = read_json(index, max_size=MAX_INDEX_SIZE, fix=fix)
    return Record(content, index, fix).list_of("graphs", dict)


# ------------------------------------------------------------------------------------- saved views
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
                f"{whose} has the node {node!r}, which the graph does not have",
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
