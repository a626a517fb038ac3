"""Static HTML for notebooks: one card, one table.

Every text is escaped, nothing is loaded from anywhere and there is no script.  A card costs about
1 kB, a table about 150 bytes a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"


def card(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A titled list of facts."""
    rows = "".join(
        f'<tr><td style="{_CELL};opacity:.65">{escape(name)}</td>'
        f'<td style="{_CELL}">{escape(str(value))}</td></tr>'
        for name, value in facts
    )
    return (
        '<div style="border:1px solid #8884;border-radius:6px;padding:8px 12px;'
        'display:inline-block;font-family:sans-serif;font-size:13px">'
        f"<b>{escape(title)}</b><table>{rows}</table></div>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A plain table with a note below."""
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(str(c))}</td>' for c in row) + "</tr>"
        for row in rows
    )
    foot = f'<div style="opacity:.65">{escape(note)}</div>' if note else ""
    return (
        '<div style="font-family:sans-serif;font-size:13px">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{foot}</div>"
    )
