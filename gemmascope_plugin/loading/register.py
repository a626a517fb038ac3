"""Teach SAELens the catalog: afterwards ``SAE.from_pretrained`` loads every release in it.

1. A loader and a config getter named ``gemmascope`` go into SAELens' two tables of loaders.
2. A release that SAELens does not list (the bundled ones) is added to its directory.
3. A release that it lists keeps its rows and is only pointed at our loader, which scales the bias
   of embedding dictionaries, checks the file, and leaves L0, site and spec in the metadata.
4. The name of the release travels in the row's config overrides, since SAELens hands its loaders
   only a repository and a folder.

Nothing else in this package writes into SAELens.  The directory is SAELens' own cached dict, so one
change is seen everywhere; ``load()`` registers again in case that cache was cleared.  The first
call costs what SAELens needs to import and to parse its list (several seconds), later ones
microseconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float

from gemmascope_plugin.catalog import SaeSpec, releases
from gemmascope_plugin.catalog.tables import derive, specs_of, tables
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.loading.convert import config, state
from gemmascope_plugin.loading.sources import locate

NAME = "gemmascope"
RELEASE_KEY = "gemmascope_release"


def register() -> None:
    """Make every release of the catalog known to SAELens; calling it again changes nothing.

    Raises:
        GemmaScopeError: This version of SAELens has moved the names that are needed.
    """
    try:
        from sae_lens.loading.pretrained_sae_loaders import (
            NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
            NAMED_PRETRAINED_SAE_LOADERS,
        )
        from sae_lens.loading.pretrained_saes_directory import (
            PretrainedSAELookup,
            get_pretrained_saes_directory,
        )
    except ImportError as fault:
        import sae_lens

        raise GemmaScopeError(
            f"SAELens {sae_lens.__version__} has moved the tables that releases are registered in "
            f"({fault})",
            fix="pip install 'sae-lens>=6.54,<7'",
        ) from fault
    NAMED_PRETRAINED_SAE_LOADERS[NAME] = _load
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[NAME] = _get_config
    directory = get_pretrained_saes_directory()
    for release in releases():
        row = directory.get(release)
        if row is None:
            directory[release] = _lookup(PretrainedSAELookup, release)
        elif row.conversion_func != NAME:
            row.conversion_func = NAME
            overrides: dict[str, Any] = {**(row.config_overrides or {}), RELEASE_KEY: release}
            row.config_overrides = overrides


def _lookup(lookup_class: type[Any], release: str) -> Any:
    """A row of SAELens' directory."""
    specs = specs_of(release)
    values = {
        "release": release,
        "repo_id": specs[0].repo_id,
        "model": specs[0].model,
        "conversion_func": NAME,
        "saes_map": {s.sae_id: s.path for s in specs},
        "expected_var_explained": {s.sae_id: 1.0 for s in specs},
        "expected_l0": {s.sae_id: s.l0 or 0.0 for s in specs},
        "neuronpedia_id": {s.sae_id: s.neuronpedia_id for s in specs},
        "norm_scaling_factor": {},
        "config_overrides": {RELEASE_KEY: release},
    }
    # SAELens adds fields to this class now and then.
    known = {f.name for f in dataclasses.fields(lookup_class)}
    return lookup_class(**{k: v for k, v in values.items() if k in known})


def _spec(repo_id: str, path: str, release: str | None) -> SaeSpec:
    names = [release] if release else [n for n, t in tables().items() if t[0].repo_id == repo_id]
    for name in names:
        for spec in specs_of(name):
            if spec.path == path:
                return spec
    if not names:
        raise UnknownNameError(f"repository {repo_id!r} is in no release of the catalog")
    # A newer SAELens may list folders that our tables do not have yet.
    return derive(names[0], path)


def _config(
    repo_id: str, folder_name: str, device: str | None, overrides: dict[str, Any] | None
) -> tuple[SaeSpec, dict[str, Any], str | None]:
    """Spec, config and revision for what SAELens hands its loaders."""
    overrides = dict(overrides or {})
    spec = _spec(repo_id, folder_name, overrides.pop(RELEASE_KEY, None))
    revision = overrides.pop("revision", None)
    # A top-level id would be dropped when SAELens makes its config; metadata keeps it.
    page = overrides.pop("neuronpedia_id", None) or spec.neuronpedia_id
    cfg = config(spec, device=device or "cpu")
    cfg.update(overrides)
    cfg["metadata"]["neuronpedia_id"] = page
    return spec, cfg, revision


def _get_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """SAELens' interface to the config alone; nothing is downloaded."""
    del force_download
    return _config(repo_id, folder_name, device, cfg_overrides)[1]


def _load(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Float[torch.Tensor, "*_"]], None]:
    """SAELens' interface to config and weights; there is no sparsity tensor."""
    from sae_lens.util import str_to_dtype

    spec, cfg, revision = _config(repo_id, folder_name, device, cfg_overrides)
    path = locate(spec, revision=revision, force_download=force_download)
    return cfg, state(spec, path, device=device, dtype=str_to_dtype(cfg["dtype"])), None
