"""One gate for numbers, one for sizes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from gemmascope_plugin.arguments import as_index, feature_ids, parse_size
from gemmascope_plugin.errors import FeatureIndexError, UnknownNameError
from tests.factories import unchecked

_FRAME = pd.DataFrame({"feature": [3, 5], "activation": [0.5, 0.25], "site": ["a", "b"]})


@pytest.mark.parametrize(
    "value",
    [
        *(3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3, 5])[0]),
        *(_FRAME.iloc[0].feature, _FRAME[["feature", "activation"]].iloc[0].feature),
    ],
)
def test_a_number_of_any_library_is_a_feature(value: object) -> None:
    assert feature_ids(value) == 3
    assert type(feature_ids(value)) is int


@pytest.mark.parametrize(
    "values",
    [
        *([3, 5], (3, 5), range(3, 7, 2), np.array([3, 5]), torch.tensor([3, 5])),
        *(_FRAME.feature, _FRAME.feature.values, [np.int32(3), torch.tensor(5)]),
        *({3: 0, 5: 0}.keys(), torch.tensor([0.0, 0, 0, 2, 0, 1]).topk(2).indices),
    ],
)
def test_several_are_a_tuple(values: object) -> None:
    assert feature_ids(values) == (3, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        "giver",
        ["giver"],
        3.5,
        True,
        [True, False],
        torch.tensor([True]),
        {"3": 1},
        [[3, 5]],
        object,
    ],
)
def test_what_is_no_number_is_refused_whole(wrong: object) -> None:
    with pytest.raises(FeatureIndexError, match="does not say which features.*features=12.*top"):
        feature_ids(wrong)


def test_none_and_nothing_pass() -> None:
    assert feature_ids(None) is None
    assert feature_ids([]) == ()
    assert as_index(None) is None


def test_sizes() -> None:
    sizes = (None, 5, np.int64(5), 4e9, "2 GB", "1.5MiB", "3 kb", "1 TB")
    expected = [None, 5, 5, 4 * 10**9, 2 * 10**9, 3 << 19, 3000, 10**12]
    assert [parse_size(size) for size in sizes] == expected  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", ["many", "0", 0, -1, "3 parsecs", 1.5, True, "", [4], "nan GB"])
def test_what_is_no_size_is_refused(wrong: object) -> None:
    with pytest.raises(UnknownNameError, match="is not a size.*'8 GB'"):
        unchecked(parse_size)(wrong)


def test_a_text_without_a_unit_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"size '4' has no unit.*Try: '4 GB'"):
        parse_size("4")
    with pytest.raises(UnknownNameError, match="less than one byte"):
        parse_size("0.2 B")
