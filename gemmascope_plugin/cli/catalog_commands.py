"""Commands that read the catalog: no torch, no pandas.

``find``      the dictionaries that match, as an aligned table or as JSON
``info``      everything that the catalog knows of one dictionary, and the line that loads it
``refresh``   lists the repositories on the hub and corrects the catalog of this user; it needs a network,
              downloads no file, and ``--clear`` goes back to the tables of the package

Cost: one pass over the catalog.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmascope_plugin.arguments import human_size
from gemmascope_plugin.cli.options import AsJson, table, typed_one_by_one
from gemmascope_plugin.errors import number_of

if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec, SpecList

_COLUMNS = (
    *("model", "kind", "site", "layer", "width", "l0", "size", "provenance"),
    *("release", "sae_id"),
)
_RIGHT = {"layer", "width", "l0", "size"}

Width = Annotated[str | None, typer.Option(help="Number of features, e.g. 16k.")]
Level = Annotated[
    str | None, typer.Option("--l0", help="canonical, medium, a number, nearest:80 or 50-100.")
]
Affine = Annotated[
    bool | None, typer.Option("--affine/--no-affine", help="With or without an affine skip.")
]
Release = Annotated[str | None, typer.Option(help="Name of the release.")]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Arguments of ``find``, as they were typed."""

    model: Annotated[str | None, typer.Option(help="Model, e.g. gemma-2-2b or 4b-it.")] = None
    site: Annotated[str | None, typer.Option(help="Site: res, att, mlp, transcoder.")] = None
    layer: Annotated[int | None, typer.Option(help="Layer, from 0.")] = None
    width: Width = None
    l0: Level = None
    kind: Annotated[str | None, typer.Option(help="sae, transcoder, crosscoder or clt.")] = None
    affine: Affine = None
    variant: Annotated[str | None, typer.Option(help="plain, all, seed_1...")] = None
    provenance: Annotated[str | None, typer.Option(help="listed or derived; both by default.")] = (
        None
    )

    def find(self, **others: Any) -> SpecList:
        """The dictionaries that match, and ``others`` too."""
        return search(**vars(self), **others)


@typed_one_by_one
def find_command(filters: Filters, release: Release = None, as_json: AsJson = False) -> None:
    """List the dictionaries that match."""
    specs = filters.find(release=release)
    if as_json:
        typer.echo(json.dumps([spec.to_dict() for spec in specs], indent=2))
        return
    for line in table(_COLUMNS, [_row(spec) for spec in specs], right=_RIGHT):
        typer.echo(line)
    count = number_of(len(specs), "dictionary")
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


@typed_one_by_one
def info_command(
    filters: Filters,
    release: Annotated[str | None, typer.Argument(help="Name of the release.")] = None,
    sae_id: Annotated[str | None, typer.Argument(help="Id in the release.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show one dictionary: RELEASE SAE_ID, or arguments of find that match one."""
    from gemmascope_plugin.catalog import get

    if release is not None and sae_id is not None:
        spec = get(release, sae_id)
    else:
        spec = filters.find(release=release).one()
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


def refresh_command(
    repos: Annotated[
        list[str] | None, typer.Argument(help="Repositories; all of the catalog by default.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Forget what earlier runs found; needs no network.")
    ] = False,
) -> None:
    """Confirm or correct the catalog by what the repositories hold."""
    from gemmascope_plugin.catalog.refresh import COLUMNS, forget, refresh

    if clear:
        typer.echo("forgotten" if forget() else "there was nothing to forget")
        return
    report = refresh(repos=repos or None)
    for line in table(COLUMNS, report.rows(), right=COLUMNS[1:]):
        typer.echo(line)
    typer.echo(f"\nwritten to {report.path}")
