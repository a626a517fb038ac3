"""Keeps effects in one file and reads them back, exactly.

A bundle (``files/bundle.py``): in its header axes, labels and metadata; as arrays ``values``,
``by_prompt`` where there is one, and ``column.*``.

1. Labels are numbers or texts; features, nodes and readers are lists of their fields. The kind stands
   beside the labels of each axis.
2. The digest of the bundle is of all of it. Reading trusts no digest: labels fit the arrays, and numbers
   are finite, before writing and after reading. No pickle.

Cost: reading and writing the arrays once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemmascope_plugin.causes.labelled_values import LabelledValues
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.bundle import (
    Arrays,
    as_json,
    from_json_value,
    read_bundle,
    write_bundle,
)
from gemmascope_plugin.files.json_file import Record
from gemmascope_plugin.graphs.node import FeatureId, Node, Reader

FORMAT, VERSION, KIND = "gemmascope_plugin effects", 1, "effects"
_COLUMN = "column."


def save_effects(path: str | Path, effects: LabelledValues) -> Path:
    """Writes effects; an older file is replaced."""
    arrays = {"values": effects.values, **_columns(effects)}
    if effects.values_by_prompt is not None:
        arrays["by_prompt"] = effects.values_by_prompt
    plain = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
    if (defect := _array_defect(plain)) is not None:
        raise GemmaScopeError(f"The effects cannot be saved: {defect}")
    content = {"format": FORMAT, "version": VERSION, **_header(effects)}
    return write_bundle(path, content, plain, kind=KIND)


def load_effects(path: str | Path) -> dict[str, Any]:
    """The fields of what :func:`save_effects` has written."""
    content, arrays = read_bundle(path, kind=KIND, format=FORMAT, version=VERSION)
    try:
        return _fields(content, arrays)
    except (ValueError, TypeError) as fault:
        content.bad(str(fault))


def plain_effects(effects: LabelledValues) -> dict[str, Any]:
    """Effects as plain values."""
    each = effects.values_by_prompt
    return {
        **_header(effects),
        "values": as_json(effects.values.tolist(), "values"),
        "values_by_prompt": None if each is None else as_json(each.tolist(), "values_by_prompt"),
        "columns": {name: column.tolist() for name, column in effects.columns.items()},
    }


def _columns(effects: LabelledValues) -> dict[str, torch.Tensor]:
    return {f"{_COLUMN}{name}": column for name, column in effects.columns.items()}


def _header(effects: LabelledValues) -> dict[str, Any]:
    """Axes, labels and metadata; a coordinate that was chosen has its kind as well."""
    metadata = dict(effects.metadata)
    chosen = metadata.pop("at", {})
    return {
        "axes": list(effects.axes),
        "labels": {axis: _encoded(axis, effects.labels[axis]) for axis in effects.axes},
        "at": {axis: _encoded(axis, (label,)) for axis, label in chosen.items()},
        "metadata": as_json(metadata),
    }


def _encoded(axis: str, labels: Sequence[Any]) -> dict[str, Any]:
    kinds = {_kind_of(axis, label) for label in labels}
    if len(kinds) > 1:
        raise GemmaScopeError(f"The labels of {axis!r} are of several kinds: {sorted(kinds)}")
    return {"kind": kinds.pop() if kinds else "number", "entries": [_plain(x) for x in labels]}


def _kind_of(axis: str, label: object) -> str:
    kinds = {FeatureId: "feature", Node: "node", Reader: "reader", str: "text", int: "number"}
    if type(label) not in kinds:
        raise GemmaScopeError(f"The label {label!r} of {axis!r} cannot be saved")
    return kinds[type(label)]


def _plain(label: object) -> Any:
    if isinstance(label, Node):
        return [label.kind, label.hook, label.index, label.pos]
    if isinstance(label, Reader):
        return [_plain(label.node), label.port]
    return list(label) if isinstance(label, FeatureId) else label


def _label(kind: str, entry: Any) -> Any:
    """The inverse of ``_plain``."""
    if kind in ("number", "text"):
        if type(entry) is not {"number": int, "text": str}[kind]:
            raise ValueError(f"the label {entry!r} is not a {kind}")
        return entry
    if kind == "feature":
        site, feature = entry
        return FeatureId(_label("text", site), _label("number", feature))
    if kind == "reader":
        node, port = entry
        return Reader(_label("node", node), port)
    if kind != "node":
        raise ValueError(f"labels of the kind {kind!r} are unknown")
    name, hook, index, pos = entry
    return Node(name, _label("text", hook), _label("number", index), pos)


def _fields(content: Record, arrays: Arrays) -> dict[str, Any]:
    axes = tuple(content.list_of("axes", str))
    labels = {axis: _decoded(entry) for axis, entry in content.dict_of("labels", dict).items()}
    chosen = {axis: _decoded(entry)[0] for axis, entry in content.dict_of("at", dict).items()}
    metadata = from_json_value(content.get("metadata", dict))
    if set(labels) != set(axes) or len(set(axes)) < len(axes) or not isinstance(metadata, dict):
        raise ValueError("axes, labels and metadata do not fit together")
    columns = {n.removeprefix(_COLUMN): x for n, x in arrays.items() if n.startswith(_COLUMN)}
    shape = tuple(len(labels[axis]) for axis in axes)
    if not axes:  # a file has no arrays without an axis
        arrays = {name: x if name == "by_prompt" else x.reshape(()) for name, x in arrays.items()}
        columns = {name: x.reshape(()) for name, x in columns.items()}
    names = set(arrays) - {"by_prompt", *(f"{_COLUMN}{name}" for name in columns)}
    if names != {"values"}:
        raise ValueError(f"the arrays are {', '.join(sorted(arrays))}")
    each = arrays.get("by_prompt")
    shapes = {x.shape for x in (arrays["values"], *columns.values())}
    if shapes != {shape} or (each is not None and each.shape[:-1] != shape):
        raise ValueError("the arrays do not have the shape of the labels")
    if (defect := _array_defect(arrays)) is not None:
        raise ValueError(defect)
    return {
        "values": torch.from_numpy(arrays["values"].copy()),
        "axes": axes,
        "labels": labels,
        "metadata": {**metadata, **({"at": chosen} if chosen else {})},
        "values_by_prompt": None if each is None else torch.from_numpy(each.copy()),
        "columns": {name: torch.from_numpy(x.copy()) for name, x in columns.items()},
    }


def _decoded(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    if not isinstance(entry.get("entries"), list):
        raise ValueError("labels are missing")
    return tuple(_label(str(entry.get("kind")), label) for label in entry["entries"])


def _array_defect(arrays: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the numbers."""
    for name, array in arrays.items():
        if array.dtype.kind not in ("f" if name in ("values", "by_prompt") else "fi"):
            return f"{name} has numbers of type {array.dtype}"
        if not np.isfinite(array).all():
            return f"{name} has numbers that are not finite"
    return None
