"""The nodes of a trace as a DataFrame."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gemmascope_plugin.loading.load import spec_of
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.node_order import Layout
from gemmascope_plugin.tracing.linear.targets import Seed
from gemmascope_plugin.tracing.linear.trace_site import Activity, TraceSite

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("kind", "site", "layer", "pos", "index", "activation", "label", "id")


def node_table(
    frozen: FrozenPass, layout: Layout, seeds: Sequence[Seed], weights: Float[np.ndarray, " node"]
) -> pd.DataFrame:
    """One row a node, in the order of the layout, targets last."""
    import pandas as pd

    words = token_strings(frozen.model, frozen.tokens)
    parts = [_tokens(frozen.tokens.tolist(), words), _biases(layout)]
    for site in range(len(layout.activities)):
        parts += [_features(layout.activities[site]), _errors(layout.activities[site])]
    parts.append(_seeds(seeds, frozen.n_layers))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    columns["weight"] = weights
    order = ("id", "kind", "site", "layer", "pos", "index", "activation", "weight", "label")
    return pd.DataFrame({name: columns[name] for name in order})


def _rows(count: int, kind: str, **values: Any) -> dict[str, np.ndarray]:
    blank = {"kind": kind, "site": "", "layer": -1, "pos": -1, "index": -1, "activation": np.nan}
    types = {"layer": np.int64, "pos": np.int64, "index": np.int64, "activation": np.float64}
    columns = {}
    for name, value in {**blank, **values}.items():
        columns[name] = np.empty(count, dtype=types.get(name, object))
        columns[name][:] = value
    return columns


def _tokens(ids: list[int], words: list[str]) -> dict[str, np.ndarray]:
    places = range(len(ids))
    names = [f"token@{pos}" for pos in places]
    return _rows(len(ids), "token", pos=list(places), index=ids, label=words, id=names)


def _biases(layout: Layout) -> dict[str, np.ndarray]:
    labels, sites, layers = ["b_enc and b_U"], [""], [-1]
    for layer in range(layout.n_layers):
        labels.append(f"attention biases of layer {layer}")
        sites.append("")
        layers.append(layer)
    for site in (activity.site for activity in layout.activities):
        labels += [f"b_dec of {site.label}", f"{site.label} at special tokens"]
        sites += [site.label] * 2
        layers += [site.layer] * 2
    names = [f"bias:{label.replace(' ', '_')}" for label in labels]
    return _rows(len(labels), "bias", site=sites, layer=layers, label=labels, id=names)


def _features(activity: Activity) -> dict[str, np.ndarray]:
    acts, site = activity.acts, activity.site
    pos, index = acts.rows.cpu().numpy(), acts.indices.cpu().numpy()
    label, short = site.label, _short(site)
    names = [f"{label}/{i}@{p}" for i, p in zip(index.tolist(), pos.tolist(), strict=True)]
    labels = [f"{short} {i}" for i in index.tolist()]
    values = acts.values.double().cpu().numpy()
    columns = {"site": site.label, "layer": site.layer, "pos": pos, "index": index}
    return _rows(len(index), "feature", **columns, activation=values, label=labels, id=names)


def _errors(activity: Activity) -> dict[str, np.ndarray]:
    site = activity.site
    pos = activity.keep.nonzero()[:, 0].cpu().numpy()
    names = [f"{site.label}/error@{p}" for p in pos]
    columns = {"site": site.label, "layer": site.layer, "pos": pos}
    return _rows(len(pos), "error", **columns, label=f"{_short(site)} error", id=names)


def _short(site: TraceSite) -> str:
    """``L3`` for transcoders, with the kind of site for others."""
    kind = "" if site.kind == "transcoder" else f" {site.kind}"
    return f"L{site.layer}{kind}"


def _seeds(seeds: Sequence[Seed], n_layers: int) -> dict[str, np.ndarray]:
    names = [f"target:{seed.name}" for seed in seeds]
    return _rows(
        len(seeds),
        "target",
        layer=n_layers,
        pos=[seed.position for seed in seeds],
        index=[seed.token for seed in seeds],
        activation=[seed.value for seed in seeds],
        label=[seed.label for seed in seeds],
        id=names,
    )


def dictionary_name(site: HookedSite) -> str:
    """What tells a dictionary from others of its site: its spec, or its size and a checksum."""
    owner: Any = site
    spec = spec_of(owner.dictionary if hasattr(owner, "dictionary") else owner.sae)
    if spec is not None:
        return f"{spec.release}/{spec.sae_id}"
    # of one row of the encoder: in training no two become equal
    row = site.weights.W_enc[0].detach().float().cpu().numpy()
    return f"{site.d_sae} features, checksum {zlib.crc32(row.tobytes()):08x}"
