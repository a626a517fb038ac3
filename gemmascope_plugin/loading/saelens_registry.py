"""Teach SAELens the catalog: afterwards ``SAE.from_pretrained`` is right for every release in it.

1. A loader and a config getter named ``gemmascope`` go into SAELens' two tables of loaders.
2. Releases and ids that SAELens does not list are added to its directory.
3. Rows of Gemma Scope that it lists are pointed at our loader, and their declared L0 and model are
   set right.  What this corrects in SAELens 6.54:

   * Gemma Scope 2 transcoders read ``hook_mlp_in``, which is the un-normalised residual stream and
     usually never fires; they get ``mlp.hook_in``, the norm's output with gain, and the request not
     to fold layer norms;
   * Gemma Scope 2 attention dictionaries expect flat heads where the hook has them apart;
   * nothing of Gemma Scope 2 loads offline, even when cached;
   * embedding dictionaries lack the factor sqrt(d_model) on their output bias;
   * files are neither checked nor compared with what their names promise.

4. Crosscoders and CLTs have no class in SAELens.  They are listed, and loading them there says to use
   ``gemmascope_plugin.load``.  Tree SAEs have one of ours, whose import registers the architecture.
   Releases in SAELens' own format keep SAELens' loader.
5. The name of the release travels in the row's config overrides, since SAELens hands its loaders
   only a repository and a folder.

Nothing else in this package writes into SAELens, but for architectures: a class of ours registers
its own, by SAELens' function for that, when it is imported (``saes/tree.py``).  The directory is
SAELens' own cached dict, so one change is seen everywhere; once ``register()`` has run, ``load()``
registers again in case that cache was cleared.  The first call costs what SAELens needs to
import and to parse its list (several seconds), later ones microseconds;
``load()`` alone needs neither the list nor the wait.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Shaped

from gemmascope_plugin.catalog import SaeSpec, releases
from gemmascope_plugin.catalog.manifest import spec_of_folder
from gemmascope_plugin.catalog.tables import derive, models, specs_of
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.loading.convert import SINGLE_LAYER, config, state
from gemmascope_plugin.loading.other_formats import tree_config, tree_state
from gemmascope_plugin.loading.sources import locate

NAME = "gemmascope"
RELEASE_KEY = "gemmascope_release"
_ROW_FIELDS = {"conversion_func", "config_overrides", "expected_l0", "model", "saes_map"}

registered: tuple[object, object] | None = None
"""SAELens' directory and our catalog at the last ``register()``; either may be read anew."""


def register() -> None:
    """Make every release of the catalog known to SAELens; calling it again changes nothing.

    Raises:
        GemmaScopeError: This version of SAELens has moved the names that are needed.

    Example:
        >>> gs.register()
        >>> from sae_lens import SAE
        >>> spec = gs.find(model="gemma-2-tiny", site="res", layer=1, l0="canonical").one()
        >>> SAE.from_pretrained(spec.release, spec.sae_id).cfg.d_sae
        512
    """
    from gemmascope_plugin.saes import register_all

    register_all()
    global registered
    loaders, getters, lookup_class, directory = _internals()
    loaders[NAME] = _load
    getters[NAME] = _get_config
    now = directory, models()
    complete = all(release in directory for release in now[1])
    if registered and complete and registered[0] is now[0] and registered[1] is now[1]:
        return
    for release in releases():
        specs = specs_of(release)
        row = directory.get(release)
        if specs[0].format in SINGLE_LAYER and row is not None:
            _correct(row, release, specs)
        elif row is None or row.conversion_func == NAME:
            directory[release] = _row(lookup_class, release, specs)
    registered = now


def _internals() -> tuple[dict[str, Any], dict[str, Any], type[Any], dict[str, Any]]:
    """What SAELens must still have: both tables of loaders, the class of a row, the directory."""
    import sae_lens

    try:
        from sae_lens.loading.pretrained_sae_loaders import (
            NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
            NAMED_PRETRAINED_SAE_LOADERS,
        )
        from sae_lens.loading.pretrained_saes_directory import (
            PretrainedSAELookup,
            get_pretrained_saes_directory,
        )

        if lost := _ROW_FIELDS - {field.name for field in dataclasses.fields(PretrainedSAELookup)}:
            raise ImportError(f"a release has no {', '.join(sorted(lost))}")
    except (ImportError, TypeError) as fault:
        raise GemmaScopeError(
            f"SAELens {sae_lens.__version__} has moved the tables that releases are registered in "
            f"({fault})",
            fix="pip install 'sae-lens>=6.54,<7'",
        ) from fault
    return (
        NAMED_PRETRAINED_SAE_LOADERS,
        NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
        PretrainedSAELookup,
        get_pretrained_saes_directory(),
    )


def _row(lookup_class: type[Any], release: str, specs: tuple[SaeSpec, ...]) -> Any:
    """A row of SAELens' directory."""
    own_format = specs[0].format == "sae_lens"
    values = {
        "release": release,
        "repo_id": specs[0].repo_id,
        "model": specs[0].model,
        "conversion_func": None if own_format else NAME,
        "saes_map": {s.sae_id: s.path for s in specs},
        "expected_var_explained": {s.sae_id: 1.0 for s in specs},
        "expected_l0": {s.sae_id: s.l0 or 0.0 for s in specs},
        "neuronpedia_id": {s.sae_id: s.neuronpedia_id for s in specs},
        "norm_scaling_factor": {},
        "config_overrides": None if own_format else {RELEASE_KEY: release},
    }
    # SAELens adds fields to this class now and then.
    names = {f.name for f in dataclasses.fields(lookup_class)}
    return lookup_class(**{k: v for k, v in values.items() if k in names})


def _correct(row: Any, release: str, specs: tuple[SaeSpec, ...]) -> None:
    """Point a row of SAELens at our loader and set right what it declares."""
    row.conversion_func = NAME
    row.config_overrides = {**(row.config_overrides or {}), RELEASE_KEY: release}
    owner, slash, model = row.model.rpartition("/")
    if model != specs[0].model:
        row.model = f"{owner}{slash}{specs[0].model}"
    for spec in specs:
        if spec.sae_id not in row.saes_map:
            row.saes_map[spec.sae_id] = spec.path
            row.expected_var_explained[spec.sae_id] = 1.0
            row.neuronpedia_id[spec.sae_id] = spec.neuronpedia_id
        # SAELens shows 0 where it knows none.
        row.expected_l0[spec.sae_id] = spec.l0 or row.expected_l0.get(spec.sae_id, 0.0)


def _spec(repo_id: str, path: str, release: str | None) -> SaeSpec:
    """The spec of a folder, listed or, as a newer SAELens may know more of them, by its name."""
    names = [release] if release else [r for r in releases() if specs_of(r)[0].repo_id == repo_id]
    for name in names:
        for spec in specs_of(name):
            if spec.path == path:
                return spec
    if (spec := spec_of_folder(repo_id, path)) is not None:
        return spec
    if not names:
        raise UnknownNameError(f"repository {repo_id!r} is in no release of the catalog")
    return derive(names[0], path)  # refuses, and names the nearest folder


def _config(
    repo_id: str, folder_name: str, device: str | None, overrides: dict[str, Any] | None
) -> tuple[SaeSpec, dict[str, Any], str | None]:
    """Spec, config and revision for what SAELens hands its loaders."""
    overrides = dict(overrides or {})
    spec = _spec(repo_id, folder_name, overrides.pop(RELEASE_KEY, None))
    revision = overrides.pop("revision", None)
    # A top-level id would be dropped when SAELens makes its config; metadata keeps it.
    page = overrides.pop("neuronpedia_id", None) or spec.neuronpedia_id
    if spec.format == "tree":  # how many features fire is said by its config.json alone
        cfg = tree_config(spec, locate(spec, revision=revision), device=device or "cpu")
    else:
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
    """SAELens' interface to the config alone; nothing is downloaded, but of trees their two files."""
    del force_download
    return _config(repo_id, folder_name, device, cfg_overrides)[1]


def _load(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Shaped[torch.Tensor, "*_"]], None]:
    """SAELens' interface to config and weights; there is no sparsity tensor."""
    from sae_lens.util import str_to_dtype

    spec, cfg, revision = _config(repo_id, folder_name, device, cfg_overrides)
    files = locate(spec, revision=revision, force_download=force_download)
    dtype = str_to_dtype(cfg["dtype"])
    if spec.format == "tree":
        tensors = tree_state(spec, files, cfg, device=device, dtype=dtype)
    else:
        tensors = state(spec, files, device=device, dtype=dtype)
    # Whoever saves what SAELens builds of this needs plain rows, also of the transposed skip.
    return cfg, {name: tensor.contiguous() for name, tensor in tensors.items()}, None
