"""Coloured tokens: every token appears, in order, escaped, with its value."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmascope_plugin.figures import FigureInputError, token_rows_html, tokens_html
from gemmascope_plugin.figures.theme import visible


class Spans(HTMLParser):
    """Reads a fragment as a browser would: texts and attributes of the token spans, all tags."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "span":
            self._inside = True
            self.texts.append("")
            self.attributes.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "span"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def background(attributes: dict[str, str | None]) -> str:
    return (attributes["style"] or "").split("background:")[1]


@given(st.lists(st.text(min_size=1, max_size=12), max_size=15))
def test_every_token_appears_in_order(tokens: list[str]) -> None:
    spans = Spans(tokens_html(tokens, [1.0] * len(tokens)))
    assert spans.texts == [visible(token) for token in tokens]
    assert spans.tags <= {"div", "span", "wbr"}


def test_scripts_in_tokens_titles_and_notes_stay_text() -> None:
    bad = '"><script>alert(1)</script>'
    fragment = tokens_html([bad], [1.0], title=bad, labels=[bad])
    rows = token_rows_html([bad], [(bad, [1.0])], title=bad)
    assert "<script" not in fragment + rows
    assert Spans(fragment).texts == Spans(rows).texts == [visible(bad)]


def test_value_is_in_the_tooltip_and_in_the_colour() -> None:
    spans = Spans(tokens_html([" john", "and", "x"], [2.0, 0.0, -2.0], labels=["IO name", "", ""]))
    assert [each["title"] for each in spans.attributes] == [
        "·john: 2 (IO name)",
        "and: 0",
        "x: -2",
    ]
    assert [background(each) for each in spans.attributes] == ["#f69026", "#ffffff", "#427db8"]


def test_full_colour_is_the_given_maximum() -> None:
    half, full = Spans(tokens_html(["a", "b"], [1.0, 9.0], max_value=2.0)).attributes
    assert background(half) == "#fbc793"
    assert background(full) == "#f69026"


def test_values_that_are_not_finite_stay_readable() -> None:
    nan, inf = Spans(tokens_html(["a", "b"], [float("nan"), float("inf")])).attributes
    assert (nan["title"], background(nan)) == ("a: nan", "#ffffff")
    assert (inf["title"], background(inf)) == ("b: inf", "#f69026")


def test_rows_repeat_the_tokens_and_scale_on_their_own() -> None:
    fragment = token_rows_html(["a", "b"], [("f 1", [0.0, 10.0]), ("f 2", [0.1, 0.0])])
    spans = Spans(fragment)
    assert spans.texts == ["a", "b", "a", "b"]
    colours = [background(each) for each in spans.attributes]
    assert colours == ["#ffffff", "#f69026", "#f69026", "#ffffff"]
    assert fragment.index("f 1") < fragment.index("f 2")


def test_mismatched_lengths() -> None:
    with pytest.raises(FigureInputError, match="1 values were given for 2 tokens"):
        tokens_html(["a", "b"], [1.0])
    with pytest.raises(FigureInputError, match="1 labels were given for 2 tokens"):
        tokens_html(["a", "b"], [1.0, 2.0], labels=["x"])
    with pytest.raises(FigureInputError, match="3 values were given for 2 tokens"):
        token_rows_html(["a", "b"], [("row", [1.0, 2.0, 3.0])])
