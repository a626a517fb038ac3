"""Numbers that count things, whatever library they come from: features, token ids, layers.

An index may be an int, a numpy integer, an integer tensor without axes, or a whole float as a row of a
DataFrame makes it; several may be a list, a range, a tensor, an array or a column. Texts and booleans
are refused: identity is a number, text is for people.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from gemmascope_plugin.errors import FeatureIndexError

BYTES = (bytes, bytearray, memoryview)
"""What gives numbers when it is walked over, and means none."""


def as_index(value: Any) -> int | None:
    """The number, or None where it is not one."""
    if isinstance(value, (bool, str, *BYTES)) or "bool" in str(getattr(value, "dtype", "")):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        pass
    is_float = isinstance(value, float) or "float" in str(getattr(value, "dtype", ""))
    return int(value) if is_float and float(value).is_integer() else None


def as_indices(values: Any) -> list[int] | None:
    """One number or several as a list, or None where any is not one."""
    single = as_index(values)
    if single is not None:
        return [single]
    is_listed = isinstance(values, Iterable) and not isinstance(values, (str, *BYTES, Mapping))
    if not is_listed or getattr(values, "ndim", 1) != 1:
        return None
    numbers = [as_index(value) for value in values]
    return None if None in numbers else [number for number in numbers if number is not None]


def feature_ids(features: Any) -> int | tuple[int, ...] | None:
    """Features of a dictionary as an int, a tuple of them, or None for all.

    Args:
        features: One index or several, of any library; None.

    Raises:
        FeatureIndexError: A name, or something else that is not a number.
    """
    if features is None:
        return None
    single = as_index(features)
    if single is not None:
        return single
    several = as_indices(features)
    if several is None:
        raise FeatureIndexError(
            f"{_shown(features)} does not say which features are meant",
            exists="a feature is a number: features=12, features=[12, 40], features=acts.topk(5).indices",
            fix="analyze(model, saes, prompt).top() shows the numbers of active features",
        )
    return tuple(several)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"A {type(value).__name__}"
