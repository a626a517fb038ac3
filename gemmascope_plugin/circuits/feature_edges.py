"""Edges between kept nodes: what a node does to the metric through another one, directly.

    ``w(u -> d) = sum_tokens [dm/dd] [dd/du | direct] (u - u')``,  mean over prompts,

positive where it supports the metric, with ``dm/dd`` the slope that scored ``d`` (averaged along the
way for ``ig``, local for ``atp``), and *direct* as ``causes/gradient/site_paths.py`` defines it: no path
through another site, nor through an error on the way.  Everything is taken at the clean run.

1. What a target reads.  A feature: its pre-activation ``<W_enc[f], x>`` times a gate.  The gate is 1
   where the feature is active in the clean run, the derivative of JumpReLU, and 0 where it is not. With
   ``ig`` it is the *finite difference* ``(a' - a) / (pre' - pre)`` where exactly one of the runs has the
   feature active (at most ``MAX_GATE``): features of the corrupted run alone have incoming edges too,
   and the edges into a feature tend to sum to its score. With ``atp`` those have none;
   ``n_unreachable`` counts them.  Dictionaries that are not plain JumpReLU (trees, SoftSAEs, top-k): the
   derivative of their own encoder.
2. An error: ``e`` itself, through tensor and dictionary, in the direction of its slope.  A head or MLP:
   its output in that direction.
3. One vector-Jacobian product per target, all targets of a site on the batch axis, gives the gradient
   ``G`` at every source site; ``(u - u') <W_u, G>`` for features, ``<e - e', G>`` for errors,
   ``<z - z', G>`` for heads.

Cost: per kept node a forward and a backward pass over the layers back to the last stream that is a site;
products with the decoder rows of kept nodes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64

import gemmascope_plugin.saes as saes
from gemmascope_plugin.causes.gradient.site_paths import direct_slopes
from gemmascope_plugin.causes.gradient.site_runs import PartRun, SiteRun, frozen_model
from gemmascope_plugin.causes.gradient.slopes import ignore_bridge_norm_warning
from gemmascope_plugin.causes.gradient.task_site import Values
from gemmascope_plugin.circuits.feature_nodes import SiteNodes
from gemmascope_plugin.models.protocol import HookedModel, wide

MAX_GATE = 10.0
"""Largest finite difference: a feature whose input hardly moved has no meaningful one."""


@dataclass(frozen=True, eq=False)
class FeatureEdges:
    """Edges among kept nodes, as places in the graph."""

    source: Int64[torch.Tensor, " edge"]
    target: Int64[torch.Tensor, " edge"]
    scores: Float[torch.Tensor, " edge"]
    n_unreachable: int
    """Kept features that no edge can reach: never active in clean runs, with ``atp``."""


@torch.no_grad()
def find_edges(
    model: HookedModel,
    parts: Sequence[PartRun],
    layout: Sequence[SiteNodes],
    is_kept: Bool[torch.Tensor, " node"],
    *,
    finite_differences: bool,
    rows: int,
) -> FeatureEdges:
    """All edges between kept nodes that are not zero."""
    places = is_kept.nonzero().flatten()
    column = torch.full((len(is_kept),), -1)
    column[places] = torch.arange(len(places))
    weights = torch.zeros(len(places), len(places), dtype=torch.float64)
    is_unreachable = torch.ones(len(is_kept), dtype=torch.bool)
    n_prompts = sum(len(part.bound) for part in parts)
    with ignore_bridge_norm_warning(), frozen_model(model):
        for part in parts:
            for i, nodes in enumerate(layout):
                copies = max(1, rows // len(part.bound))
                for targets in _targets(
                    part.sites[i], nodes, is_kept, finite_differences, copies, is_unreachable
                ):
                    slopes = direct_slopes(part, nodes.site, targets.probe, len(targets.places))
                    for j, sources in enumerate(layout):
                        if sources.site.hook in slopes:
                            units, effects = _onto(
                                part.sites[j], sources, is_kept, slopes[sources.site.hook]
                            )
                            cells = column[units][:, None], column[targets.places]
                            weights[cells] += effects.T
    source, target = weights.nonzero(as_tuple=True)
    features = torch.zeros(len(is_kept), dtype=torch.bool)
    for nodes in layout:
        features[nodes.features] = nodes.site.kind == "feature"
    return FeatureEdges(
        places[source],
        places[target],
        (weights[source, target] / n_prompts).float(),
        int((is_unreachable & is_kept & features).sum()),
    )


@dataclass(frozen=True, eq=False)
class _Targets:
    """Some targets of one site: copy ``j`` of the prompts asks for the ``j``-th."""

    run: SiteRun
    places: Int64[torch.Tensor, " copy"]
    direction: Float[torch.Tensor, "copy prompt pos width"] | None
    """Of heads, MLPs and errors: the slope of their part of the tensor."""
    factor: Float[torch.Tensor, "copy prompt pos"] | None = None
    """Of features: slope times gate."""
    index: Int64[torch.Tensor, " copy"] | None = None
    """Of features: which."""

    def probe(self, x: torch.Tensor | None, y: torch.Tensor) -> Float[torch.Tensor, " row"]:
        """``dm/dd`` times what the target reads, of every row."""
        if self.direction is not None:
            whole = wide(y) if x is None else self._error(x, y)
            return (whole * self.direction.flatten(0, 1)).sum((1, 2))
        assert x is not None and self.factor is not None and self.index is not None
        read = _read(self.run, x.unflatten(0, (len(self.index), -1)), self.index)
        return (read * self.factor.to(read.device)).sum(2).flatten()

    def _error(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y - sum_f a_f W_f`` in the graph of both, at the tokens that the dictionary works on."""
        coder = self.run.site.coder
        keep = self.run.keep.repeat(len(self.places), 1).to(coder.W_enc.device)
        acts = coder.encode_sparse(x.to(coder.W_enc.device), keep=keep)
        reconstruction = wide(saes.write(acts, coder.W_dec))
        scale = coder.scale(x.to(coder.W_enc.device))
        reconstruction = reconstruction if scale is None else reconstruction * scale
        return wide(y) - reconstruction.to(y.device)


def _targets(
    run: SiteRun,
    nodes: SiteNodes,
    is_kept: Bool[torch.Tensor, " node"],
    finite_differences: bool,
    copies: int,
    is_unreachable: Bool[torch.Tensor, " node"],
) -> Iterator[_Targets]:
    """The kept nodes of a site, as many at a time as fit; those that can be reached are marked."""
    features = is_kept[nodes.features].nonzero().flatten()
    for chunk in features.split(copies) if len(features) else ():
        at = _at(nodes, chunk, run.slope.shape[1]).to(run.slope)
        places, index = chunk + nodes.start, nodes.index[chunk]
        if run.site.kind != "feature":
            yield _Targets(run, places, _of_heads(run, nodes.n, index) * at[..., None])
            continue
        factor = _slopes(run, index) * _gates(run, index, finite_differences) * at
        is_unreachable[places] &= ~factor.flatten(1).any(1).cpu()
        yield _Targets(run, places, None, factor, index)
    errors = is_kept[nodes.error_places].nonzero().flatten()
    for chunk in errors.split(copies) if len(errors) else ():
        at = torch.ones(1, 1, run.slope.shape[1], device=run.slope.device)
        if nodes.per_position:
            at = torch.nn.functional.one_hot(nodes.errors[chunk], at.shape[2])[:, None].to(at)
        direction = run.slope * at[..., None]
        yield _Targets(run, chunk + nodes.error_places.start, direction)


def _at(
    nodes: SiteNodes, chunk: Int64[torch.Tensor, " copy"], n_pos: int
) -> Float[torch.Tensor, "copy one pos"]:
    """1 at the position of each node, everywhere if it has none."""
    if not nodes.per_position:
        return torch.ones(len(chunk), 1, n_pos)
    return torch.nn.functional.one_hot(nodes.pos[chunk], n_pos)[:, None].float()


def _of_heads(
    run: SiteRun, n: int, index: Int64[torch.Tensor, " copy"]
) -> Float[torch.Tensor, "copy prompt pos width"]:
    """The slope at one head each, zero at the others; the MLP is one head."""
    is_head = torch.nn.functional.one_hot(index, n).to(run.slope)[:, None, None, :, None]
    return (run.slope.unflatten(2, (n, -1)) * is_head).flatten(3)


def _slopes(
    run: SiteRun, index: Int64[torch.Tensor, " copy"]
) -> Float[torch.Tensor, "copy prompt pos"]:
    """``dm/da`` of some features."""
    W_dec = run.site.coder.W_dec
    rows = W_dec[index.to(W_dec.device)].to(run.slope)
    return torch.einsum("bsd,fd->fbs", run.slope, rows)


def _gates(
    run: SiteRun, index: Int64[torch.Tensor, " copy"], finite_differences: bool
) -> Float[torch.Tensor, "copy prompt pos"]:
    """What a unit of pre-activation does to some features."""
    ends = []
    for values in (run.clean, run.corrupt):
        assert values.acts is not None
        ends.append(values.acts.columns(index).movedim(-1, 0).to(run.slope))
    clean, corrupt = ends
    if not isinstance(run.site.coder, saes.Weights):
        return run.keep.to(clean).expand_as(clean)  # the encoder itself is differentiated
    gates = (clean > 0).to(clean)
    one_sided = (clean > 0) != (corrupt > 0)
    if not finite_differences or not bool(one_sided.any()):
        return gates
    before, after = (_pre(run, values, index) for values in (run.clean, run.corrupt))
    ratio = (corrupt - clean) / torch.where(one_sided, after - before, 1.0)
    return torch.where(one_sided, ratio.clamp(0, MAX_GATE), gates)


def _pre(
    run: SiteRun, values: Values, index: Int64[torch.Tensor, " copy"]
) -> Float[torch.Tensor, "copy prompt pos"]:
    assert values.x is not None
    x, W_enc = wide(values.x), run.site.coder.W_enc
    return torch.einsum("bsd,df->fbs", x, W_enc[:, index.to(W_enc.device)].to(x))


def _read(
    run: SiteRun,
    x: Float[torch.Tensor, "copy prompt pos d_in"],
    index: Int64[torch.Tensor, " copy"],
) -> Float[torch.Tensor, "copy prompt pos"]:
    """What each copy's feature reads: linear where a gate follows, else the feature itself."""
    coder = run.site.coder
    here = index.to(coder.W_enc.device)
    if isinstance(coder, saes.Weights):
        return torch.einsum(
            "cbsd,dc->cbs", wide(x), coder.W_enc[:, here].to(x.device, wide(x).dtype)
        )
    acts = coder.encode_features(x.to(coder.W_enc.device), here)
    acts = acts.diagonal(dim1=0, dim2=3).movedim(-1, 0)
    scale = coder.scale(x.to(coder.W_enc.device))
    return acts if scale is None else acts * scale[..., 0]


def _onto(
    run: SiteRun,
    nodes: SiteNodes,
    is_kept: Bool[torch.Tensor, " node"],
    slopes: Float[torch.Tensor, "copy prompt pos width"],
) -> tuple[Int64[torch.Tensor, " source"], Float[torch.Tensor, "copy source"]]:
    """Kept nodes of a source site, and how far each moves what the copies ask for, over all prompts."""
    units = is_kept[nodes.features].nonzero().flatten()
    errors = is_kept[nodes.error_places].nonzero().flatten()
    places = torch.cat([units + nodes.start, errors + nodes.error_places.start])
    effects = [_parts(run, nodes, units, slopes)]
    if len(errors):
        product = torch.einsum("cbsd,bsd->cs", slopes, run.error_moved)
        effects.append(
            product[:, nodes.errors[errors]] if nodes.per_position else product.sum(1, True)
        )
    return places, torch.cat([each.double().cpu() for each in effects], 1)


def _parts(
    run: SiteRun,
    nodes: SiteNodes,
    units: Int64[torch.Tensor, " source"],
    slopes: Float[torch.Tensor, "copy prompt pos width"],
) -> Float[torch.Tensor, "copy source"]:
    """The same for features, heads or the MLP."""
    index, inverse = nodes.index[units].unique(return_inverse=True)
    if not len(units):
        return slopes.new_zeros(len(slopes), 0)
    if run.site.kind == "feature":
        W_dec = run.site.coder.W_dec
        rows = W_dec[index.to(W_dec.device)].to(slopes)
        assert run.clean.acts is not None and run.corrupt.acts is not None
        moved = run.clean.acts.columns(index) - run.corrupt.acts.columns(index)
        by_token = torch.einsum("cbsd,fd,bsf->csf", slopes, rows, moved.to(slopes))
    else:
        heads = (slopes * run.moved).unflatten(3, (nodes.n, -1)).sum((1, 4))
        by_token = heads[..., index.to(heads.device)]
    if nodes.per_position:
        return by_token[:, nodes.pos[units], inverse]
    return by_token.sum(1)[:, inverse]
