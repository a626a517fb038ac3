"""``gemmascope find``: the dictionaries that match, as an aligned table or as JSON.

Reads the catalog only: no torch, no pandas, no network. Cost: one pass over the catalog.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gemmascope_plugin.catalog.sites import human_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gemmascope_plugin.catalog import SaeSpec

_COLUMNS = ("model", "kind", "site", "layer", "width", "l0", "size", "release", "sae_id")
_RIGHT = {"layer", "width", "l0", "size"}


def find_command(
    model: Annotated[str | None, typer.Option(help="Model, e.g. gemma-2-2b.")] = None,
    site: Annotated[str | None, typer.Option(help="Site: res, att, mlp.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer, from 0.")] = None,
    width: Annotated[str | None, typer.Option(help="Number of features, e.g. 16k.")] = None,
    l0: Annotated[str | None, typer.Option(help="canonical, a number, or nearest:80.")] = None,
    kind: Annotated[str | None, typer.Option(help="sae or transcoder.")] = None,
    release: Annotated[str | None, typer.Option(help="Name of the release.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the dictionaries that match."""
    from gemmascope_plugin.catalog import find

    specs = find(
        model=model,
        site=site,
        layer=layer,
        width=width,
        l0=_number_or_word(l0),
        kind=kind,
        release=release,
    )
    if as_json:
        typer.echo(json.dumps([spec.to_dict() for spec in specs], indent=2))
        return
    for line in table(_COLUMNS, [_row(spec) for spec in specs], right=_RIGHT):
        typer.echo(line)
    count = f"{len(specs)} {'dictionary' if len(specs) == 1 else 'dictionaries'}"
    starred = any(spec.canonical for spec in specs)
    typer.echo(f"\n{count}" + (" (* the release's canonical choice)" if starred else ""))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()
) -> list[str]:
    """Lines of an aligned plain-text table; the columns in ``right`` are aligned to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    to_right = [column in set(right) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if aligned else cell.ljust(width)
            for cell, width, aligned in zip(line, widths, to_right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _row(spec: SaeSpec) -> list[str]:
    l0 = "-" if spec.l0 is None else f"{spec.l0:g}" + ("*" if spec.canonical else "")
    return [
        spec.model,
        spec.kind,
        spec.site,
        str(spec.layer),
        spec.width,
        l0,
        human_size(spec.nbytes),
        spec.release,
        spec.sae_id,
    ]


def _number_or_word(text: str | None) -> str | float | None:
    """An L0 typed as a number is a number; words such as "canonical" stay words."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
