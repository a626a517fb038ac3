"""What the results of questions to a traced prompt share: a table, plain values, one file.

A field is a DataFrame, an array, some tensors, or plain values, by its annotation. In the file arrays,
tensors and columns of numbers stand as they are; text and plain values are JSON beside them.

Cost: reading, writing and hashing once.
"""

from __future__ import annotations

from dataclasses import fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.files.bundle import (
    Arrays,
    as_json,
    from_json_value,
    read_bundle,
    write_bundle,
)
from gemmascope_plugin.graphs.frames import SHOWN

if TYPE_CHECKING:
    from pandas import DataFrame

VERSION = 1
Result = TypeVar("Result", bound="TraceResult")


class TraceResult:
    """A frozen dataclass that can be looked at, kept and read again."""

    noun: ClassVar[str]
    """What it is called in errors and in its file."""

    def to_frame(self) -> DataFrame:
        """The table that says most."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        values = {name: getattr(self, name) for name in _kinds(self)}
        return {name: _plain(value, name) for name, value in values.items()}

    def save(self, path: str | Path) -> Path:
        """Keeps everything in one file; an older file is replaced.

        Returns:
            The path.

        Raises:
            GemmaScopeError: The file cannot be written.
        """
        content: dict[str, Any] = {}
        arrays: Arrays = {}
        for name, kind in _kinds(self).items():
            content[name] = _PACK[kind](name, getattr(self, name), arrays)
        head = {"format": _format(self), "version": VERSION}
        return write_bundle(path, {**head, "fields": content}, arrays, kind=self.noun)

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Reads what :meth:`save` has written, exactly.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, contradicts itself, or is of another version.
        """
        content, arrays = read_bundle(path, kind=cls.noun, format=_format(cls), version=VERSION)
        values = content.get("fields", dict)
        try:
            result = cls(
                **{n: _UNPACK[kind](n, values[n], arrays) for n, kind in _kinds(cls).items()}
            )
            _ = repr(result), result.to_frame()  # a result that contradicts itself has neither
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as fault:
            content.bad(str(fault))
        return result

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{figures.frame_html(self.to_frame(), SHOWN)}"


def _format(result: TraceResult | type[TraceResult]) -> str:
    return f"gemmascope {result.noun}"


def _kinds(result: TraceResult | type[TraceResult]) -> dict[str, str]:
    """What kind of field each one is."""
    kinds = {}
    for field in fields(result):  # pyright: ignore[reportArgumentType]
        text = str(field.type)
        if "DataFrame" in text:
            kinds[field.name] = "frame"
        elif "torch.Tensor" in text:
            kinds[field.name] = "tensors"
        else:
            kinds[field.name] = "array" if "np.ndarray" in text else "plain"
    return kinds


def _plain(value: Any, name: str) -> Any:
    if hasattr(value, "to_dict"):
        return as_json(value.to_dict("records"), name)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return as_json(value.tolist(), name)
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return [_plain(part, name) for part in value]
    return as_json(value, name)


def _pack_frame(name: str, frame: DataFrame, arrays: Arrays) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for column in frame.columns:
        values = frame[column].to_numpy()
        if values.dtype == object or values.dtype.kind in "OUT":
            columns[column] = [as_json(value, column) for value in values.tolist()]
        else:
            columns[column] = None
            arrays[f"{name}.{column}"] = values
    return columns


def _unpack_frame(name: str, columns: dict[str, Any], arrays: Arrays) -> DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            column: arrays[f"{name}.{column}"] if values is None else from_json_value(values)
            for column, values in columns.items()
        }
    )


def _pack_array(name: str, array: np.ndarray, arrays: Arrays) -> None:
    arrays[name] = array


def _pack_tensors(name: str, parts: tuple[torch.Tensor, ...] | None, arrays: Arrays) -> int:
    for i, part in enumerate(parts or ()):
        arrays[f"{name}.{i}"] = part.detach().cpu().numpy()
    return len(parts or ())


def _unpack_tensors(name: str, count: int, arrays: Arrays) -> tuple[torch.Tensor, ...] | None:
    return tuple(torch.from_numpy(arrays[f"{name}.{i}"]) for i in range(count)) or None


_PACK: dict[str, Any] = {
    "frame": _pack_frame,
    "array": _pack_array,
    "tensors": _pack_tensors,
    "plain": lambda name, value, arrays: as_json(value, name),
}
_UNPACK: dict[str, Any] = {
    "frame": _unpack_frame,
    "array": lambda name, value, arrays: arrays[name],
    "tensors": _unpack_tensors,
    "plain": lambda name, value, arrays: from_json_value(value),
}
