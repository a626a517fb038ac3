"""One report as one HTML file that opens anywhere, from a disk without a network too.

1. A page is a title, a few key figures, sections and a footer of facts. A section's parts are text,
   tables, figures and fragments of HTML; text is escaped, only ``Markup`` is taken as HTML.
2. The plotting library is inlined before the first figure and never again. The page's own security
   policy forbids the browser any request, so that nothing added later can load something either.
3. The file is written under a temporary name and renamed: a reader sees all of it or none.

Cost: about 5 MB per page with figures, for the library; a few kB without.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

import gemmascope_plugin.figures as figures
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.files.whole import write_text_whole

if TYPE_CHECKING:
    import pandas as pd

    from gemmascope_plugin.figures.layered_graph import Figure

TEMPLATE = "report.html.jinja"
MAX_TABLE_ROWS = 50

Part = Any
"""Text (escaped, one paragraph), ``Markup`` (HTML as it is), a data frame, a figure, ``Columns``."""

Pairs = Sequence[tuple[str, str]]


class PageError(GemmaScopeError):
    """A page that cannot be written where it was asked for."""


@dataclass(frozen=True)
class Columns:
    """Parts that stand side by side; below each other on a narrow screen."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Section:
    """One section of a page."""

    title: str
    lead: str
    """What the section shows and how to read it."""
    parts: tuple[Part, ...] = ()


def prepare(path: str | Path) -> Path:
    """The path of a page that can be written, its folder made; call it before long work.

    Raises:
        PageError: The path is a folder, or the folder cannot be made or written to.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise PageError(f"{str(path)!r} is a folder", fix=f"{str(path / 'page.html')!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PageError(f"The folder of {str(path)!r} cannot be made ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise PageError(f"The folder {str(path.parent)!r} cannot be written to")
    return path


def write_page(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    key_figures: Pairs = (),
    footer: Pairs = (),
) -> Path:
    """Writes one page.

    Args:
        path: The file; its folder is made if need be, an older page is replaced.
        title: Title and heading.
        sections: What it shows, in order.
        lead: A sentence or two under the heading.
        key_figures: ``(value, what it is)``, shown large under the lead.
        footer: ``(name, value)``: versions, seeds, what was left out.

    Returns:
        The path.

    Raises:
        PageError: The file cannot be written.
    """
    html = page_html(title, sections, lead=lead, key_figures=key_figures, footer=footer)
    return write_html(path, html)


def page_html(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    key_figures: Pairs = (),
    footer: Pairs = (),
    style: str = "",
) -> str:
    """One page as text."""
    renderer = _Renderer()
    return template(TEMPLATE).render(
        title=title,
        lead=lead,
        key_figures=key_figures,
        sections=[(s.title, s.lead, [renderer.html(p) for p in s.parts]) for s in sections],
        footer=footer,
        fragments_css=Markup(figures.PAGE_CSS + style),
    )


def write_html(path: str | Path, html: str) -> Path:
    """Writes the text of a page; its folder is made if need be, an older page is replaced."""
    path = prepare(path)
    _replace(path, html)
    return path


def facts(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a result says of itself, as lines of a footer; what is None is left out."""
    return [(str(name), _fact(value)) for name, value in metadata.items() if value is not None]


def even_digits(frame: pd.DataFrame, names: Iterable[str]) -> Any:
    """The frame with columns of numbers as text: all as precise as the largest with four digits."""
    texts = {}
    for name in names:
        largest = max((abs(x) for x in frame[name] if math.isfinite(x)), default=0.0)
        places = max(3, 3 - math.floor(math.log10(largest))) if largest else 3
        # nothing is shown as minus zero
        texts[name] = [f"{round(x, places) + 0.0:.{places}f}" for x in frame[name]]
    return frame.assign(**texts)


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_fact(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Renderer:
    """Turns parts into HTML; remembers whether the plotting library is on the page."""

    def __init__(self) -> None:
        self._figures = 0

    def html(self, part: Part) -> Markup:
        if isinstance(part, Markup):
            return part
        if isinstance(part, str):
            return Markup("<p>{}</p>").format(part)
        if isinstance(part, Columns):
            cells = Markup("").join(
                Markup("<div>{}</div>").format(self.html(p)) for p in part.parts
            )
            return Markup('<div class="columns">{}</div>').format(cells)
        if hasattr(part, "to_plotly_json"):
            return self._figure(part)
        assert hasattr(part, "itertuples"), f"a page cannot show {type(part).__name__}"
        return Markup(figures.frame_html(part, MAX_TABLE_ROWS))

    def _figure(self, figure: Figure) -> Markup:
        self._figures += 1
        first, name = self._figures == 1, f"figure-{self._figures}"
        return Markup(figures.figure_fragment(figure, first, div_id=name))


def template(name: str) -> Template:
    """A template beside this file; what it is given is escaped, and has to be all that it names."""
    source = resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _replace(path: Path, text: str) -> None:
    """Writes the file; on failure nothing is left and the old one stays."""
    try:
        write_text_whole(path, text)
    except GemmaScopeError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise PageError(f"{str(path)!r} cannot be written ({reason})") from error
