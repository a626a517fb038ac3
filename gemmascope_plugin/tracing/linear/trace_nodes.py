"""The nodes of a trace: their numbers, which of them can reach a target, and their table.

Whatever can reach a site has a smaller number than its features:

====================== ==========================================================
nodes                  order
====================== ==========================================================
tokens                 by position
biases                 ``constant``, then attention biases by layer, then two per site
features and errors    site by site in the order of the pass: features by token and
                       index, then errors by token
====================== ==========================================================

``constant`` is the part of a target that comes from no other node: its ``b_enc``. Of each site's two
biases one is its ``b_dec``, the other what it passes through at special tokens; both summed over tokens.

A target is reached by the nodes before it in the pass, at its own token or an earlier one: tokens, some
of the biases, and of each site below the first features and the first errors. So the room of every row is
known before any is made (:class:`Reach`).

Cost: a few numbers a site and token.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from gemmascope_plugin.loading.load import spec_of
from gemmascope_plugin.models.tokens import token_strings
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.tracing.linear.targets import Seed
from gemmascope_plugin.tracing.linear.trace_site import PER_LAYER, Activity, TraceSite

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("kind", "site", "layer", "pos", "index", "activation", "label", "id")


@dataclass(frozen=True, eq=False)
class Layout:
    """Which numbers the nodes of each kind have."""

    n_pos: int
    n_layers: int
    activities: tuple[Activity, ...]

    @property
    def constant(self) -> int:
        """The part of a target that comes from no other node."""
        return self.n_pos

    def attention_bias(self, layer: int) -> int:
        """The biases of a layer's attention."""
        return self.n_pos + 1 + layer

    def b_dec(self, site: int) -> int:
        """The decoder bias of a site."""
        return self.n_pos + 1 + self.n_layers + 2 * site

    def passed(self, site: int) -> int:
        """What a site passes through at special tokens."""
        return self.b_dec(site) + 1

    @property
    def n_fixed(self) -> int:
        """Tokens and biases."""
        return self.n_pos + 1 + self.n_layers + 2 * len(self.activities)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first feature of each site, and after the last site the number of all nodes."""
        starts = [self.n_fixed]
        for activity in self.activities:
            starts.append(starts[-1] + activity.n_features + int(activity.keep.sum()))
        return tuple(starts)

    @property
    def n_nodes(self) -> int:
        """All nodes but non-feature targets."""
        return self.starts[-1]

    @cached_property
    def at(self) -> dict[int, int]:
        """The site of each time that has one."""
        return {activity.site.time: i for i, activity in enumerate(self.activities)}

    def sites_of(self, nodes: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """The sites that nodes of features and errors belong to."""
        return np.searchsorted(self.starts, nodes, side="right") - 1

    def source_sites(self, site: int) -> list[int]:
        """The sites whose features write at a site: itself, and earlier ones of its dictionary."""
        reader = self.activities[site].site
        return [i for i, source in enumerate(self.activities) if reader.receives(source.site)]

    def output_sites(self, site: int) -> list[int]:
        """The sites where the features of a site write, its own first."""
        source = self.activities[site].site
        return [i for i, reader in enumerate(self.activities) if reader.site.receives(source)]

    def features(self, site: int) -> slice:
        """The features of a site."""
        start = self.starts[site]
        return slice(start, start + self.activities[site].n_features)

    def errors(self, site: int) -> slice:
        """The errors of a site, one per token that is not special."""
        return slice(self.features(site).stop, self.starts[site + 1])

    def n_below(self, after: int) -> int:
        """Nodes that come before a time, the first ones."""
        return self.starts[sum(a.site.time < after for a in self.activities)]

    @cached_property
    def n_features(self) -> int:
        """Active features of all sites."""
        return sum(activity.n_features for activity in self.activities)

    def rest_nodes(self, site: int) -> Int64[torch.Tensor, " pos"]:
        """The node of what a site's features leave at each token: an error, or what it passes through."""
        keep = self.activities[site].keep.cpu()
        errors = keep.long().cumsum(0) - 1 + self.errors(site).start
        return torch.where(keep, errors, self.passed(site))


@dataclass(frozen=True, eq=False)
class Reach:
    """Which columns the rows of targets have."""

    frozen: FrozenPass
    layout: Layout

    def columns(self, after: int, pos: int) -> np.ndarray:
        """The nodes that can reach a target which enters at a time and token, ascending."""
        biases, firsts = self._biases(after)
        parts = [np.arange(pos + 1), biases[firsts <= pos]]
        for site in range(self._n_below(after)):
            features, errors = self.layout.starts[site], self.layout.errors(site).start
            parts.append(np.arange(features, features + self._features[site][pos]))
            parts.append(np.arange(errors, errors + self._errors[site][pos]))
        return np.concatenate(parts).astype(np.int32)

    def room(self, after: int, positions: np.ndarray) -> np.ndarray:
        """How many nodes can reach targets at some tokens, ``[target]``."""
        below = self._n_below(after)
        tokens = np.arange(self.layout.n_pos)
        counts = tokens + 1 + sum(self._features[:below]) + sum(self._errors[:below])
        _, firsts = self._biases(after)
        counts = counts + (firsts <= tokens[:, None]).sum(1)
        return counts[positions]

    def _n_below(self, after: int) -> int:
        return sum(activity.site.time < after for activity in self.layout.activities)

    def _biases(self, after: int) -> tuple[np.ndarray, np.ndarray]:
        """Those that may not be zero, and the first token that each of them stands at."""
        if after not in self._biases_of:
            layout = self.layout
            pairs = [(layout.constant, 0)]
            for layer, biased in enumerate(self._biased):
                if biased and PER_LAYER * layer <= after:
                    pairs.append((layout.attention_bias(layer), 0))
            for site in range(self._n_below(after)):
                first, passed = self._constants[site]
                pairs += [(layout.b_dec(site), first), (layout.passed(site), passed)]
            nodes, firsts = np.array(pairs).T
            self._biases_of[after] = nodes, firsts
        return self._biases_of[after]

    @cached_property
    def _biases_of(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def _biased(self) -> list[bool]:
        attentions = map(self.frozen.attention, range(self.layout.n_layers))
        return [a.bias_O is not None or a.bias_V is not None for a in attentions]

    @cached_property
    def _constants(self) -> list[tuple[int, int]]:
        """The first tokens at which the two biases of each site are not zero; ``n_pos`` for nowhere."""
        starts = []
        for activity in self.layout.activities:
            b_dec = activity.keep & bool(activity.b_dec.any())
            passed = ~activity.keep & (activity.rest != 0).any(1)
            starts.append((_first(b_dec.cpu().numpy()), _first(passed.cpu().numpy())))
        return starts

    @cached_property
    def _features(self) -> list[np.ndarray]:
        """Features up to each token, of each site."""
        return [a.acts.offsets[1:].cpu().numpy() for a in self.layout.activities]

    @cached_property
    def _errors(self) -> list[np.ndarray]:
        """Errors up to each token, of each site."""
        return [a.keep.cumsum(0).cpu().numpy() for a in self.layout.activities]


def _first(mask: np.ndarray) -> int:
    return int(mask.argmax()) if mask.any() else len(mask)


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
