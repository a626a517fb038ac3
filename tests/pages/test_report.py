"""Pages: escaped, self-contained, the plotting library once, written in one go."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import gemmascope_plugin.figures as figures
from gemmascope_plugin.pages import Columns, PageError, Section, write_page

BAD = "<script>alert(1)</script>"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"


class Loads(HTMLParser):
    """Collects what a browser would fetch, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "href", "srcset", "action", "data", "poster"}
        self.urls += [value or "" for name, value in attrs if name in loading]


def full_page(path: Path, text: str) -> str:
    """A page with ``text`` wherever a text can stand; returns its HTML."""
    frame = pd.DataFrame({text: [text, "a"]})
    figure = figures.bars([text, "b"], [1.0, -2.0], title=text, x_title=text)
    curve = figures.curves([0, 1], {text: [0.0, 1.0]}, title=text)
    section = Section(text, text, (text, frame, figure, Columns((text, figure, curve))))
    pairs = [(text, text)]
    write_page(path, text, [section, section], lead=text, key_figures=pairs, footer=pairs)
    return path.read_text(encoding="utf-8")


def test_every_text_is_escaped(tmp_path: Path) -> None:
    html = full_page(tmp_path / "page.html", BAD)
    assert "<script>alert" not in html
    assert f"<title>{ESCAPED}</title>" in html
    for tag in ("h1", "h2", "b", "span", "dt", "dd", "td", "th", "p"):
        assert f"<{tag}>{ESCAPED}</{tag}>" in html, tag


def test_markup_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_page(tmp_path / "a.html", "t", [Section("s", "l", (Markup("<i>x</i>"), "<i>y"))])
    html = path.read_text(encoding="utf-8")
    assert "<i>x</i>" in html
    assert "<p>&lt;i&gt;y</p>" in html


def test_library_is_inlined_once_and_only_with_figures(tmp_path: Path) -> None:
    library = get_plotlyjs()
    assert full_page(tmp_path / "a.html", "text").count(library) == 1
    path = write_page(tmp_path / "b.html", "t", [Section("s", "l", ("text",))])
    assert path.stat().st_size < 20_000


def test_nothing_is_loaded(tmp_path: Path) -> None:
    html = full_page(tmp_path / "page.html", "text").replace(get_plotlyjs(), "")
    loads = Loads()
    loads.feed(html)
    assert loads.urls == ["data:,"]  # the empty icon that keeps browsers from asking for one
    assert not {"iframe", "img", "object", "embed", "base"} & set(loads.tags)
    for forbidden in ("http://", "https://", "@import", "fetch(", "XMLHttpRequest", "url("):
        assert forbidden not in html, forbidden
    assert "default-src 'none'; script-src 'unsafe-inline'" in html


def test_same_content_same_file(tmp_path: Path) -> None:
    assert full_page(tmp_path / "a.html", "x") == full_page(tmp_path / "b.html", "x")


def test_folder_is_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = write_page(tmp_path / "new" / "page.html", "t", [])
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old", encoding="utf-8")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PageError, match=r"cannot be written \(No space left on device\)"):
        write_page(path, "t", [])
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text(encoding="utf-8") == "old"


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"is a folder\. Try: '.*page\.html'"):
        write_page(tmp_path, "t", [])


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(PageError, match=r"The folder of .* cannot be made"):
        write_page(tmp_path / "file" / "page.html", "t", [])
