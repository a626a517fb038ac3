"""The nodes of a trace as a DataFrame."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmascope_plugin.loading.load import spec_of
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.tracing.linear.node_order import Layout
from gemmascope_plugin.tracing.linear.targets import Seed
from gemmascope_plugin.tracing.linear.trace_site import Activity
from gemmascope_plugin.tracing.linear.tracer import Tracer

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("kind", "site", "layer", "pos", "index", "activation", "label", "id")


def node_table(tracer: Tracer, seeds: Sequence[Seed], weights: np.ndarray) -> pd.DataFrame:
    """One row a node, in the order of the layout, targets last.

    Args:
        tracer: The prompt's.
        seeds: Targets that are no features.
        weights: Of all nodes.
    """
    import pandas as pd

    layout, record = tracer.layout, tracer.record
    words = token_strings(record.model, record.tokens)
    parts = [_tokens(record.tokens.tolist(), words), _biases(layout)]
    for site in range(len(layout.activities)):
        parts += [_features(layout.activities[site]), _errors(layout.activities[site])]
    parts.append(_seeds(seeds, record.n_layers))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    columns["weight"] = weights
    order = ("id", "kind", "site", "layer", "pos", "index", "activation", "weight", "label")
    return pd.DataFrame({name: columns[name] for name in order})


def _rows(count: int, kind: str, **given: Any) -> dict[str, np.ndarray]:
    known = {"kind": kind, "site": "", "layer": -1, "pos": -1, "index": -1, "activation": np.nan}
    types = {"layer": np.int64, "pos": np.int64, "index": np.int64, "activation": np.float64}
    found = {}
    for name, value in {**known, **given}.items():
        column = np.empty(count, dtype=types.get(name, object))
        column[:] = value
        found[name] = column
    return found


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
    for one in layout.activities:
        labels += [f"b_dec of {one.site.label}", f"{one.site.label} at special tokens"]
        sites += [one.site.label] * 2
        layers += [one.site.layer] * 2
    names = [f"bias:{label.replace(' ', '_')}" for label in labels]
    return _rows(len(labels), "bias", site=sites, layer=layers, label=labels, id=names)


def _features(own: Activity) -> dict[str, np.ndarray]:
    acts, site = own.acts, own.site
    pos, index = acts.rows.cpu().numpy(), acts.indices.cpu().numpy()
    label, short = site.label, _short(own)
    names = [f"{label}/{i}@{p}" for i, p in zip(index.tolist(), pos.tolist(), strict=True)]
    labels = [f"{short} {i}" for i in index.tolist()]
    values = acts.values.double().cpu().numpy()
    given = {"site": site.label, "layer": site.layer, "pos": pos, "index": index}
    return _rows(len(index), "feature", **given, activation=values, label=labels, id=names)


def _errors(own: Activity) -> dict[str, np.ndarray]:
    pos = own.keep.nonzero()[:, 0].cpu().numpy()
    names = [f"{own.site.label}/error@{p}" for p in pos]
    given = {"site": own.site.label, "layer": own.site.layer, "pos": pos}
    return _rows(len(pos), "error", **given, label=f"{_short(own)} error", id=names)


def _short(own: Activity) -> str:
    """``L3`` for transcoders, with the kind of site for others."""
    kind = "" if own.site.kind == "transcoder" else f" {own.site.kind}"
    return f"L{own.site.layer}{kind}"


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
    """What tells a dictionary from others of its site: its spec, or its size and a checksum.

    Args:
        site: Where it is spliced.
    """
    owner: Any = site
    spec = spec_of(owner.dictionary if hasattr(owner, "dictionary") else owner.sae)
    if spec is not None:
        return f"{spec.release}/{spec.sae_id}"
    # of one row of the encoder: in training no two become equal
    row = site.weights.W_enc[0].detach().float().cpu().numpy()
    return f"{site.d_sae} features, checksum {zlib.crc32(row.tobytes()):08x}"
