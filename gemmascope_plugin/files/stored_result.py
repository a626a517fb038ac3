"""What results of a run share: a frozen dataclass, all of it in one file and back, exactly.

The file is a bundle (``bundle.py``). What a field holds is said where it is declared:

1. ``field(metadata=ARRAY)``, ``TENSOR``, ``TENSORS`` (a tuple of them): arrays of the file, as they are;
   tensors in bfloat16, which the file does not have, as float32.
2. ``field(metadata=TABLE)``: a DataFrame. Columns of numbers and truth values are arrays, others are JSON
   beside their type.
3. ``field(metadata=record_of(cls))``: a dataclass of plain values, as JSON.
4. Nothing: plain values, as JSON.

Any of them may be None.

Cost: reading, writing and hashing once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from gemmascope_plugin.files.bundle import (
    Arrays,
    as_json,
    from_json_value,
    read_bundle,
    write_bundle,
)

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "gemmascope_plugin", 1
_KIND = "stored"
ARRAY: Mapping[str, Any] = {_KIND: "array"}
TENSOR: Mapping[str, Any] = {_KIND: "tensor"}
TENSORS: Mapping[str, Any] = {_KIND: "tensors"}
TABLE: Mapping[str, Any] = {_KIND: "table"}
Result = TypeVar("Result", bound="StoredResult")


def record_of(cls: type) -> Mapping[str, Any]:
    """Metadata of a field that holds a dataclass of plain values."""
    return {_KIND: cls}


class StoredResult:
    """A frozen dataclass that can be kept and read again."""

    noun: ClassVar[str]
    """What it is called in errors and in its file."""

    def to_frame(self) -> pd.DataFrame:
        """The table that says most."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        return {name: _plain(getattr(self, name), name) for name in _kinds(self)}

    def save(self, path: str | Path) -> Path:
        """Keeps everything in one file; an older file is replaced.

        Returns:
            The path.

        Raises:
            GemmaScopeError: The file cannot be written.
        """
        arrays: Arrays = {}
        content = {
            name: _packed(kind, name, getattr(self, name), arrays)
            for name, kind in _kinds(self).items()
        }
        head = {"format": f"{FORMAT} {self.noun}", "version": VERSION}
        return write_bundle(path, {**head, "fields": content}, arrays, kind=self.noun)

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Reads what :meth:`save` has written, exactly.

        Raises:
            MissingFileError: There is no such file.
            BadFileError: It is damaged, contradicts itself, is another result or of another version.
        """
        name = f"{FORMAT} {cls.noun}"
        record, arrays = read_bundle(path, kind=cls.noun, format=name, version=VERSION)
        content = record.get("fields", dict)
        try:
            result = cls(
                **{n: _unpacked(kind, content[n], arrays) for n, kind in _kinds(cls).items()}
            )
            _ = repr(result), result.to_frame()  # a result that contradicts itself has neither
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as fault:
            record.bad(str(fault))
        return result


def _kinds(result: StoredResult | type[StoredResult]) -> dict[str, Any]:
    """What each field holds; None for plain values."""
    declared = fields(result)  # pyright: ignore[reportArgumentType]  # every result is a dataclass
    return {field.name: field.metadata.get(_KIND) for field in declared}


def _packed(kind: Any, name: str, value: Any, arrays: Arrays) -> Any:
    """A field for the JSON of the file: itself, or where among the arrays it is."""
    if value is None:
        return None
    if kind == "table":
        return {
            column: _packed_column(f"{name}.{column}", value[column], arrays)
            for column in value.columns
        }
    if kind == "tensors":
        return [_packed("tensor", f"{name}.{i}", part, arrays) for i, part in enumerate(value)]
    if kind == "tensor":
        value = value.detach().cpu()
        arrays[name] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return name
    if kind == "array":
        arrays[name] = value
        return name
    return as_json(asdict(value) if isinstance(kind, type) else value, name)


def _packed_column(name: str, column: pd.Series, arrays: Arrays) -> Any:
    import pandas as pd

    if column.dtype.kind in "biuf" and not pd.api.types.is_extension_array_dtype(column):
        arrays[name] = column.to_numpy()
        return name
    values = [None if value is pd.NA else value for value in column.tolist()]
    return {"type": str(column.dtype), "values": as_json(values, name)}


def _unpacked(kind: Any, content: Any, arrays: Arrays) -> Any:
    """The inverse of :func:`_packed`."""
    if content is None:
        return None
    if kind == "table":
        return _table(content, arrays)
    if kind == "tensors":
        return tuple(_unpacked("tensor", part, arrays) for part in content)
    if kind == "tensor":
        return torch.from_numpy(arrays[content])
    if kind == "array":
        return arrays[content]
    value = from_json_value(content)
    return kind(**value) if isinstance(kind, type) else value


def _table(columns: Mapping[str, Any], arrays: Arrays) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            name: arrays[column]
            if isinstance(column, str)
            else pd.Series(list(from_json_value(column["values"])), dtype=column["type"])
            for name, column in columns.items()
        }
    )


def _plain(value: Any, name: str) -> Any:
    if hasattr(value, "to_dict"):
        return as_json(value.to_dict("records"), name)
    if hasattr(value, "tolist"):
        return as_json(value.tolist(), name)
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return [_plain(part, name) for part in value]
    return as_json(value, name)
