"""From the name of a folder in a known repository to a spec, for folders that no table lists.

1. ``layer_{L}/width_{W}/average_l0_{N}`` and ``embedding/...`` in the repositories of Gemma Scope 1.
2. ``{site}/layer_{L}_width_{W}_l0_{label}[_affine][_seed_{n}]`` in those of Gemma Scope 2; the families
   of several layers are complete by rule and are looked up.

Everything follows from the name; whether the folder exists is not known here, and the specs say
``provenance="derived"``.  A few microseconds per name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import gemmascope_plugin.catalog.community as community
import gemmascope_plugin.catalog.gemma_scope_1 as gemma_scope_1
import gemmascope_plugin.catalog.gemma_scope_2 as gemma_scope_2
import gemmascope_plugin.catalog.gemma_scope_2_specs as gemma_scope_2_specs
from gemmascope_plugin.catalog.site_names import WIDTHS, hooks, raw_nbytes
from gemmascope_plugin.catalog.spec import SaeSpec

_GEMMA_SCOPE_1 = re.compile(r"(?:layer_(\d+)|embedding)/width_(\w+)/average_l0_(\d+)")
_GEMMA_SCOPE_2 = re.compile(
    r"(\w+)/layer_(\d+)_width_([^_]+)_l0_(small|medium|big)((?:_affine)?(?:_seed_\d+)?)"
)


@cache
def releases_of_repositories() -> dict[str, tuple[str, ...]]:
    """Repository to its releases, canonical ones not among them."""
    found: dict[str, list[str]] = {}
    for release in gemma_scope_1.heads():
        found.setdefault(f"google/{release}", []).append(release)
    for release in gemma_scope_2.heads():
        size, tuning, _ = gemma_scope_2.split_release(release)
        repo_id = f"google/{gemma_scope_2.PREFIX}{size}-{tuning}"
        found.setdefault(repo_id, []).append(release)
    for release in community.heads():
        found.setdefault(community.build(release)[0].repo_id, []).append(release)
    return {repo_id: tuple(names) for repo_id, names in found.items()}


def spec_of_folder(repo_id: str, path: str) -> SaeSpec | None:
    """The spec of a folder, by its name alone.

    Args:
        repo_id: Repository, e.g. ``google/gemma-scope-2b-pt-transcoders``.
        path: Folder in it.

    Returns:
        The spec, ``provenance="derived"``; None when the repository or the pattern is unknown.
    """
    releases = releases_of_repositories().get(repo_id, ())
    if not releases:
        return None
    if match := _GEMMA_SCOPE_1.fullmatch(path):
        if releases[0] in gemma_scope_1.heads():
            return _first_suite(releases[0], path, match[1], match[2], int(match[3]))
        return None
    if match := _GEMMA_SCOPE_2.fullmatch(path):
        folder, layer, width, label, ending = match.groups()
        for release in releases if releases[0] in gemma_scope_2.heads() else ():
            if gemma_scope_2.is_single_layer_folder(release, folder) and width in WIDTHS:
                known = int(layer) < gemma_scope_2.n_layers(release)
                plain = "_affine" not in ending or folder.startswith("transcoder")
                if known and plain:
                    return gemma_scope_2_specs.one(release, int(layer), width, label, ending)
    return None


def _first_suite(release: str, path: str, layer: str | None, width: str, l0: int) -> SaeSpec | None:
    """A folder of Gemma Scope 1, by the example of another one of its release."""
    if width not in WIDTHS:
        return None
    like = gemma_scope_1.build(release)[0]
    if layer is None and (like.kind, like.site) != ("sae", "res"):
        return None
    site, number = (like.site, int(layer)) if layer is not None else ("embedding", 0)
    if number >= gemma_scope_1.N_LAYERS[like.model]:
        return None
    hook_in, hook_out = hooks(like.kind, site, number)
    return replace(
        like,
        sae_id=path,
        path=path,
        site=site,
        layer=number,
        width=width,
        d_sae=WIDTHS[width],
        nbytes=raw_nbytes(like.d_in, like.d_out, WIDTHS[width]),
        l0=float(l0),
        hook_in=hook_in,
        hook_out=hook_out,
        neuronpedia_id=None,
        provenance="derived",
        canonical=False,
    )
