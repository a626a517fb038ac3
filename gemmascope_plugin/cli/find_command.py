"""``gemmascope find``: the dictionaries that match, as an aligned table or as JSON.

Reads the catalog only: no torch, no pandas, no network. Cost: one pass over the catalog.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmascope_plugin.catalog.site_names import human_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gemmascope_plugin.catalog import SaeSpec, SpecList

_COLUMNS = (
    *("model", "kind", "site", "layer", "width", "l0", "size", "provenance"),
    *("release", "sae_id"),
)
_RIGHT = {"layer", "width", "l0", "size"}

Model = Annotated[str | None, typer.Option(help="Model, e.g. gemma-2-2b or 4b-it.")]
Site = Annotated[str | None, typer.Option(help="Site: res, att, mlp, transcoder.")]
Layer = Annotated[int | None, typer.Option(help="Layer, from 0.")]
Width = Annotated[str | None, typer.Option(help="Number of features, e.g. 16k.")]
Level = Annotated[
    str | None, typer.Option("--l0", help="canonical, medium, a number, nearest:80 or 50-100.")
]
Kind = Annotated[str | None, typer.Option(help="sae, transcoder, crosscoder or clt.")]
Release = Annotated[str | None, typer.Option(help="Name of the release.")]
Affine = Annotated[
    bool | None, typer.Option("--affine/--no-affine", help="With or without an affine skip.")
]
Variant = Annotated[str | None, typer.Option(help="plain, all, seed_1...")]
Provenance = Annotated[str | None, typer.Option(help="listed or derived; both by default.")]


def find_command(
    model: Model = None,
    site: Site = None,
    layer: Layer = None,
    width: Width = None,
    l0: Level = None,
    kind: Kind = None,
    release: Release = None,
    affine: Affine = None,
    variant: Variant = None,
    provenance: Provenance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the dictionaries that match."""
    specs = search(
        model=model,
        site=site,
        layer=layer,
        width=width,
        l0=l0,
        kind=kind,
        release=release,
        affine=affine,
        variant=variant,
        provenance=provenance,
    )
    if as_json:
        typer.echo(json.dumps([spec.to_dict() for spec in specs], indent=2))
        return
    for line in table(_COLUMNS, [_row(spec) for spec in specs], right=_RIGHT):
        typer.echo(line)
    count = f"{len(specs)} {'dictionary' if len(specs) == 1 else 'dictionaries'}"
    notes = [
        *(["* the canonical choice"] if any(s.canonical for s in specs) else []),
        *(
            ["derived: not seen in a listing"]
            if any(s.provenance == "derived" for s in specs)
            else []
        ),
    ]
    typer.echo(f"\n{count}" + (f" ({'; '.join(notes)})" if notes else ""))


def search(*, l0: str | None, **arguments: Any) -> SpecList:
    """``find()`` with an L0 as it is typed: a number, a word, or ``low-high``."""
    from gemmascope_plugin.catalog import find

    return find(l0=_number_or_word(l0), **arguments)


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
    return [
        spec.model,
        spec.kind,
        spec.site,
        spec.layer_text,
        spec.width,
        (spec.l0_text or "-") + ("*" if spec.canonical else ""),
        human_size(spec.nbytes),
        spec.provenance,
        spec.release,
        spec.sae_id,
    ]


def _number_or_word(text: str | None) -> str | float | tuple[float, float] | None:
    """A number or an interval as such; words such as "canonical" stay words."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    low, _, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError:
        return text
