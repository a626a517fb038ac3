"""Labels, numbers and lengths, on which all figures rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.figures.theme import (
    MAX_LABEL,
    FigureInputError,
    axis_labels,
    check_length,
    finite_max,
    floats,
    short_label,
    visible,
)


def test_equal_labels_are_numbered_by_position() -> None:
    assert axis_labels(["mary", "and", "john"]) == ["mary", "and", "john"]
    assert axis_labels(["john", "and", "john"]) == ["0 john", "1 and", "2 john"]


def test_labels_are_escaped_because_the_library_reads_markup() -> None:
    assert axis_labels(["<b>", "a&b"]) == ["&lt;b&gt;", "a&amp;b"]


def test_long_labels_end_in_an_ellipsis() -> None:
    assert short_label("x" * 100) == "x" * (MAX_LABEL - 1) + "…"


def test_blanks_are_marked_where_they_would_be_lost() -> None:
    assert short_label(" john") == "·john"
    assert short_label("layer 3 ") == "layer 3·"
    assert short_label("  ") == "··"
    assert visible(" a\n\t\x00") == "·a↵⇥\\x00"


@given(st.lists(st.text(max_size=40), max_size=12))
def test_labels_are_as_many_and_all_different(labels: list[str]) -> None:
    drawn = axis_labels(labels)
    assert len(drawn) == len(set(drawn)) == len(labels)


def test_numbers_come_in_any_collection() -> None:
    for values in ([1, 2.5], (1, 2.5), np.array([1, 2.5], dtype=np.float32)):
        assert floats(values) == [1.0, 2.5]


def test_largest_finite_value() -> None:
    assert finite_max([1.0, -3.0, float("inf"), float("nan")]) == 3.0
    assert finite_max([]) == finite_max([0.0]) == finite_max([float("nan")]) == 1.0


def test_length_error_names_both_numbers() -> None:
    assert issubclass(FigureInputError, GemmaScopeError)
    with pytest.raises(FigureInputError) as caught:
        check_length("values", 2, 3, "tokens")
    assert str(caught.value) == (
        "2 values were given for 3 tokens. Try: give one of values for each of tokens"
    )
