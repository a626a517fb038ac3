"""Fragments of a page: self-contained, escaped, the library inlined once."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from gemmascope_plugin.figures import FigureInputError, bars, figure_fragment, frame_html


def test_library_is_inlined_only_when_asked_for() -> None:
    figure = bars(["a"], [1.0])
    first = figure_fragment(figure, True)
    second = figure_fragment(figure, False)
    library = get_plotlyjs()
    assert (first + second).count(library) == 1
    assert len(second) < 20_000
    assert re.search(r"<(script|link|img)[^>]*(src|href)=", first.replace(library, "")) is None


def test_figure_has_its_height_and_id() -> None:
    figure = bars(["a"], [1.0])
    fragment = figure_fragment(figure, False, div_id="effects")
    assert 'id="effects"' in fragment
    assert f"height:{figure.layout.height}px" in fragment
    assert fragment == figure_fragment(figure, False, div_id="effects")


def test_script_in_a_label_does_not_end_the_script() -> None:
    fragment = figure_fragment(bars(["</script><script>alert(1)"], [1.0]), False)
    assert fragment.count("<script") == fragment.count("</script>") == 1


def test_no_button_uploads_the_data() -> None:
    figure = bars(["a"], [1.0])
    assert list(figure.layout.modebar.remove) == ["sendChartToCloud"]
    assert '"showSendToCloud": false' in figure_fragment(figure, False)


def test_frame_is_escaped_and_rounded() -> None:
    frame = pd.DataFrame(
        {
            "<b>": ["<script>", "a&b"],
            "x": np.array([1.23456789, 2.0], dtype=np.float32),
            "n": [123456789, 1],
        }
    )
    table = frame_html(frame)
    assert table.startswith('<table class="gs-table">')
    assert "<b>" not in table
    assert "<script>" not in table
    for cell in ("&lt;b&gt;", "&lt;script&gt;", "a&amp;b", "1.235", "123456789"):
        assert f">{cell}<" in table


def test_long_frame_says_what_is_left_out() -> None:
    table = frame_html(pd.DataFrame({"n": range(60)}), max_rows=2)
    assert table.count("<tr>") == 3
    assert "and 58 more rows" in table
    assert "more rows" not in frame_html(pd.DataFrame({"n": range(2)}), max_rows=2)


def test_frame_wants_a_row() -> None:
    with pytest.raises(FigureInputError, match="max_rows is 0. Try: give a number from 1 up"):
        frame_html(pd.DataFrame({"n": [1]}), max_rows=0)
