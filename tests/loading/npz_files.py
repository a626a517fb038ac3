"""Generated parameter files in Gemma Scope's format."""

from pathlib import Path

import numpy as np
import torch

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog import site_names as sites
from gemmascope_plugin.catalog.headers import read_headers
from gemmascope_plugin.loading.integrity import check_file, open_npz

D_IN, D_SAE = 8, 24


def arrays(
    d_in: int = D_IN, d_sae: int = D_SAE, d_out: int = D_IN, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = {
        "W_enc": rng.normal(size=(d_in, d_sae)),
        "W_dec": rng.normal(size=(d_sae, d_out)),
        "b_enc": rng.normal(size=d_sae),
        "b_dec": rng.normal(size=d_out),
        "threshold": rng.uniform(0.1, 1.0, size=d_sae),
    }
    return {name: value.astype(np.float32) for name, value in normal.items()}


def spec(kind: str = "sae", site: str = "res", layer: int = 1, **changes) -> SaeSpec:
    path = sites.standard_path(layer, "24", 7)
    read, written = sites.hooks(kind, site, layer)
    fields = {
        "release": f"gemma-2-test-{site if kind == 'sae' else kind}",
        "repo_id": f"bundled/gemma-2-test-{site if kind == 'sae' else kind}",
        "sae_id": path,
        "path": path,
        "model": "gemma-2-test",
        "kind": kind,
        "site": site,
        "layer": layer,
        "width": "24",
        "d_in": D_IN,
        "d_out": D_IN,
        "d_sae": D_SAE,
        "l0": 7.0,
        "hook_in": read,
        "hook_out": written,
        "nbytes": sites.raw_nbytes(D_IN, D_IN, D_SAE),
    }
    return SaeSpec(**{**fields, **changes})


def save(path: Path, compress: bool = False, **values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compress else np.savez)(path, **values)
    return path


def read_npz(path: Path, *, check: bool = False) -> dict[str, torch.Tensor]:
    """All arrays of an archive, checked; without a spec to compare them with."""
    file = open_npz(path, read_headers(path))
    check_file(file, force=check)
    return file.tensors()
