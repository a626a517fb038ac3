"""Keeps what was measured of one dictionary in one file, and reads it back.

A bundle (``files/bundle.py``): tensors stand as they are; figures, losses and the table of edges are
JSON beside them, each column with its type.

Cost: reading, writing and hashing once.
"""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemmascope_plugin.files.bundle import (
    Arrays,
    as_json,
    from_json_value,
    read_bundle,
    write_bundle,
)
from gemmascope_plugin.files.json_file import Record
from gemmascope_plugin.measures.tree_recovery import Recovery
from gemmascope_plugin.splice.losses import SpliceLoss

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pandas import DataFrame

VERSION = 1
_PARTS: dict[str, type] = {"losses": SpliceLoss, "recovery": Recovery, "chance": Recovery}
"""Fields that are results themselves."""
_FRAME = "edges"
"""The field that is a table."""


def save_fields(path: str | Path, result: DataclassInstance) -> Path:
    """Writes all fields of a result; an older file is replaced."""
    arrays: Arrays = {}
    content: dict[str, Any] = {"format": _format(type(result)), "version": VERSION}
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, torch.Tensor):
            value = value.float() if value.dtype == torch.bfloat16 else value
            arrays[field.name] = value.cpu().numpy()
        elif field.name == _FRAME:
            content[field.name] = _columns(value)
        else:
            plain = asdict(value) if is_dataclass(value) else value  # pyright: ignore[reportArgumentType]
            content[field.name] = as_json(plain, field.name)
    return write_bundle(path, content, arrays, kind=type(result).__name__.lower())


def load_fields(path: str | Path, of: type[DataclassInstance]) -> tuple[Record, dict[str, Any]]:
    """What :func:`save_fields` has written of a result of a class: the file, and its fields by name."""
    kind = of.__name__.lower()
    record, arrays = read_bundle(path, kind=kind, format=_format(of), version=VERSION)
    values: dict[str, Any] = {}
    try:
        for field in fields(of):
            if field.name in arrays:
                values[field.name] = torch.from_numpy(arrays[field.name].copy())
            elif field.name == _FRAME:
                values[field.name] = _frame(record.get(field.name, dict))
            else:
                values[field.name] = _value(field.name, record.content[field.name])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as fault:
        record.bad(str(fault))
    return record, values


def _format(cls: type[DataclassInstance]) -> str:
    return f"gemmascope_plugin {cls.__name__.lower()}"


def _value(name: str, content: Any) -> Any:
    value = from_json_value(content)
    return _PARTS[name](**value) if name in _PARTS and value is not None else value


def _columns(frame: DataFrame) -> dict[str, Any]:
    """Column to its type and its values; of text and truth values None for what is missing."""
    columns = {}
    for name, column in frame.items():
        values = column.tolist()
        if column.dtype.kind not in "fiu":
            is_missing = column.isna().tolist()
            values = [None if gone else v for v, gone in zip(values, is_missing, strict=True)]
        columns[name] = {"type": str(column.dtype), "values": as_json(values, str(name))}
    return columns


def _frame(columns: dict[str, Any]) -> DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            name: pd.Series(list(from_json_value(column["values"])), dtype=column["type"])
            for name, column in columns.items()
        }
    )
