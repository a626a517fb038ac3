"""``gemmascope info``: everything the catalog knows of one dictionary, and the line that loads it.

Reads the catalog only: no torch, no pandas, no network.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from gemmascope_plugin.cli.find_command import (
    Affine,
    Kind,
    Layer,
    Level,
    Model,
    Provenance,
    Site,
    Variant,
    Width,
    search,
)

if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec


def info_command(
    release: Annotated[str | None, typer.Argument(help="Name of the release.")] = None,
    sae_id: Annotated[str | None, typer.Argument(help="Id in the release.")] = None,
    model: Model = None,
    site: Site = None,
    layer: Layer = None,
    width: Width = None,
    l0: Level = None,
    kind: Kind = None,
    affine: Affine = None,
    variant: Variant = None,
    provenance: Provenance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one dictionary: RELEASE SAE_ID, or arguments of find that match one."""
    from gemmascope_plugin.catalog import get

    if release is not None and sae_id is not None:
        spec = get(release, sae_id)
    else:
        spec = search(
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
        ).one()
    if as_json:
        typer.echo(json.dumps({**spec.to_dict(), "url": spec.url}, indent=2))
        return
    for line in card_lines(spec):
        typer.echo(line)


def card_lines(spec: SaeSpec) -> list[str]:
    """The card of a dictionary as lines of text."""
    pairs = [*spec.facts(), ("load with", load_line(spec))]
    indent = max(len(name) for name, _ in pairs) + 2
    title = f"{spec.release} {spec.sae_id}"
    return [title, *(f"  {name.ljust(indent)}{text}" for name, text in pairs)]


def load_line(spec: SaeSpec) -> str:
    """The line of Python that loads a dictionary."""
    return f'gemmascope_plugin.load(("{spec.release}", "{spec.sae_id}"))'
