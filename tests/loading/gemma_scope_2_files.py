"""Generated files in the layouts of Gemma Scope 2, SAELens and the Tree SAE authors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from npz_files import D_IN, D_SAE, arrays, spec
from safetensors.numpy import save_file

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.site_names import GAINED_HOOK

REPO = "google/gemma-scope-2-test-pt"


def single_spec(kind: str = "sae", site: str = "res", **changes) -> SaeSpec:
    """A spec of one layer; ``affine=True`` for a skip."""
    fields = {"repo_id": REPO, "format": "gemma-scope-2", "model": "gemma-3-test"}
    if kind == "transcoder":
        fields |= {"hook_in": GAINED_HOOK.format(layer=1), "gain": "with"}
    path = f"{kind}/layer_1_width_24_l0_small" + ("_affine" if changes.get("affine") else "")
    fields |= {"path": path, "sae_id": path}
    return spec(kind, site, **{**fields, **changes})


def skip(d: int = D_IN) -> np.ndarray:
    """A matrix that is far from symmetric."""
    return np.triu(np.random.default_rng(5).normal(size=(d, d))).astype(np.float32)


def lower(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {{"W_enc": "w_enc", "W_dec": "w_dec"}.get(k, k): v for k, v in values.items()}


HF_HOOKS = {
    "res": ("output", "output"),
    "att": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def single_config(sae_spec: SaeSpec) -> dict:
    read, written = HF_HOOKS["transcoder" if sae_spec.kind == "transcoder" else sae_spec.site]
    return {
        "hf_hook_point_in": f"model.layers.{sae_spec.layer}.{read}",
        "hf_hook_point_out": f"model.layers.{sae_spec.layer}.{written}",
        "width": sae_spec.d_sae,
        "model_name": sae_spec.model.replace("gemma-3", "gemma-v3"),
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": sae_spec.affine,
        "type": sae_spec.kind,
    }


def put(folder: Path, sae_spec: SaeSpec, values: dict, config: dict | None) -> Path:
    """Write one parameter file and its config where a mirror of the repository has them."""
    path = folder / sae_spec.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, path)
    if config is not None:
        (folder / sae_spec.config_filename).write_text(json.dumps(config))
    return path


def put_single(folder: Path, sae_spec: SaeSpec, **changes) -> Path:
    values = lower(arrays(sae_spec.d_in, sae_spec.d_sae, sae_spec.d_out))
    if sae_spec.affine:
        values["affine_skip_connection"] = skip(sae_spec.d_in)
    return put(folder, sae_spec, values, {**single_config(sae_spec), **changes})


N_LAYERS, D, F = 3, 6, 10


def multi_spec(kind: str = "clt", *, affine: bool = False, **changes) -> SaeSpec:
    crosscoder = kind == "crosscoder"
    layers = (2, 5, 7) if crosscoder else (0, 1, 2)
    hook = "blocks.{}.hook_resid_post" if crosscoder else "blocks.{}.mlp.hook_in"
    fields = {
        "repo_id": REPO,
        "release": f"gemma-scope-2-test-pt-{kind}s",
        "model": "gemma-3-test",
        "format": kind,
        "path": f"{kind}/width_30_l0_big" + ("_affine" if affine else ""),
        "layers": layers,
        "layer": layers[0],
        "d_in": D,
        "d_out": D,
        "d_sae": N_LAYERS * F,
        "affine": affine,
        "hook_in": hook.format(layers[0]),
        "hook_out": hook.format(layers[0]) if crosscoder else "blocks.0.hook_mlp_out",
        "gain": "without" if crosscoder else "with",
    }
    return replace(spec(), kind=kind, site="res" if crosscoder else "mlp", **fields, **changes)


def multi_arrays(position: int, affine: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(position)
    decoder = rng.normal(size=(F, N_LAYERS, D))
    decoder[:, :position] = 0
    values = {
        "w_enc": rng.normal(size=(D, F)),
        "b_enc": rng.normal(size=F),
        "threshold": rng.uniform(0.1, 0.5, size=F),
        "w_dec": decoder,
        "b_dec": rng.normal(size=D),
    }
    if affine:
        values["affine_skip_connection"] = np.triu(rng.normal(size=(D, D)))
    return {k: v.astype(np.float32) for k, v in values.items()}


def put_multi(folder: Path, sae_spec: SaeSpec, **changes) -> list[dict[str, np.ndarray]]:
    """Write all files of a crosscoder or CLT; gives back their arrays."""
    ends = ("output", "output") if sae_spec.kind == "crosscoder" else HF_HOOKS["transcoder"]
    layers = (
        "{" + ",".join(map(str, sae_spec.layers)) + "}"
        if sae_spec.kind == "crosscoder"
        else "{all}"
    )
    config = {
        **single_config(replace(sae_spec, kind="sae", site="res")),
        "hf_hook_point_in": f"model.layers.{layers}.{ends[0]}",
        "hf_hook_point_out": f"model.layers.{layers}.{ends[1]}",
        "type": sae_spec.kind,
        **changes,
    }
    every = [multi_arrays(position, sae_spec.affine) for position in range(N_LAYERS)]
    (folder / sae_spec.path).mkdir(parents=True, exist_ok=True)
    (folder / sae_spec.config_filename).write_text(json.dumps(config))
    for name, values in zip(sae_spec.filenames, every, strict=True):
        save_file(values, folder / name)
    return every


TREE_SIZES, TREE_K = (8, 16), (3, 2)


def tree_spec(**changes) -> SaeSpec:
    hook = "blocks.5.hook_resid_pre"
    fields = {
        "repo_id": "someone/tree-sae",
        "path": "gpt2-small/tree_sae_2layer_l0_5",
        "model": "gpt2-small",
        "format": "tree",
        "hook_in": hook,
        "hook_out": hook,
    }
    return spec(**{**fields, **changes})


def tree_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    decoder = rng.normal(size=(D_IN, D_SAE)).astype(np.float32)
    return {
        "encoder.weight": np.ascontiguousarray(decoder.T),
        "decoder.weight": decoder,
        "b_dec": rng.normal(size=D_IN).astype(np.float32) / 10,
        "steps_since_fired": np.zeros(D_SAE, np.int64),
        "parent_index_1": np.arange(TREE_SIZES[1]) * 5 % (TREE_SIZES[0] + 1),
    }


def put_tree(folder: Path, sae_spec: SaeSpec, *, values: dict | None = None, **changes) -> Path:
    config = {
        "type": "tree_sae",
        "d_in": D_IN,
        "hook_name": sae_spec.hook_in,
        "features_per_layer": list(TREE_SIZES),
        "k_per_layer": list(TREE_K),
        "dead_threshold": 10_000_000,
        "standardize": True,
        **changes,
    }
    return put(folder, sae_spec, tree_arrays() if values is None else values, config)
