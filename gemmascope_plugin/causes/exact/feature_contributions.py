"""What the features of dictionaries add to a logit difference: components split into features.

A dictionary says of a tensor ``y`` at its output hook ``y = s * sum_f a_f W_dec[f] + bias + error``. With
the readout ``n`` of that hook (``contributions.py``) feature ``f`` adds ``s * a_f <W_dec[f], n>``:

* at ``hook_mlp_out`` (SAEs and transcoders) and ``hook_attn_out``, ``n`` is that of the stream; the MLP
  or the attention layer is what is split;
* at ``attn.hook_z``, ``n`` is pulled back through ``W_O`` and the frozen norm; the heads are split;
* at ``hook_embed`` and in the stream (``hook_resid_pre``, ``mid``, ``post``) everything written up to
  there is split, and later components stay as they are;
* of a cross-layer dictionary a feature's parts at all its outputs are added up.

``bias`` is ``b_dec``, plus what an affine skip or a token's mean writes. At excluded tokens the
dictionary does not work, and all of ``y`` is in the error.

Cost: one encode of the answer positions per site, and the decoder rows of the features active there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.components import is_stream, is_z, layer_of, stream_time
from gemmascope_plugin.causes.exact.contributions import AnswerRun, Contribution
from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.graphs.node import FeatureId
from gemmascope_plugin.models.points import Reading, flatten_heads, reading
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.saes import SparseActs
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.window import Window


def site_hooks(model: HookedModel, spliced: Any) -> list[str]:
    """What :func:`split` reads."""
    for site in spliced.sites.values():
        stream_time(site.hook_out)
    readings = [reading(model, site.hook_in) for site in spliced.sites.values()]
    outputs = [site.hook_out for site in spliced.sites.values()]
    return [*(read.hook for read in readings), *outputs]


def split(parts: list[Contribution], run: AnswerRun, spliced: Any) -> list[Contribution]:
    """The parts, with those that dictionaries decompose replaced by features, error and bias."""
    where = {
        id(site): (dictionary, position)
        for dictionary in spliced.saes
        for position, site in enumerate(dictionary.sites)
    }
    acts = {id(site): _active(run, site) for site in spliced.sites.values()}
    for site in sorted(spliced.sites.values(), key=lambda site: _order(site.hook_out)):
        covered = [part for part in parts if _covers(site.hook_out, part)]
        double = [part.hook for part in covered if part.of_dictionary]
        if double:
            raise ModelError(
                f"The dictionaries at {double[0]} and {site.hook_out} decompose the same part of the "
                "stream, so their features would be counted twice",
                fix="one of the two; a dictionary of the stream decomposes all that lies before it",
            )
        dictionary, position = where[id(site)]
        sources = [(source, *acts[id(source)]) for source in dictionary.sites[: position + 1]]
        place = parts.index(covered[0])
        rest = [part for part in parts if not _covers(site.hook_out, part)]
        parts = [*rest[:place], *_site_parts(run, site, sources), *rest[place:]]
    return parts


def _active(run: AnswerRun, site: HookedSite) -> tuple[SparseActs, torch.Tensor, torch.Tensor]:
    """Features at the answer positions, the tensor they were read from, and where the site works."""
    model, weights = run.anatomy.model, site.weights
    read: Reading = reading(model, site.hook_in)
    x = _flat(read(run.at[read.hook])).to(weights.W_enc.device)
    keep = _kept(run, site).to(x.device)
    return weights.encode_sparse(x, keep=keep, two_stage=site.two_stage), x, keep


def _kept(run: AnswerRun, site: HookedSite) -> Bool[torch.Tensor, " prompt"]:
    tokens, at = run.bound.clean, run.bound.metric.at
    assert at is not None
    keep = kept_positions(tokens, special_ids(run.anatomy.model, site.exclude))
    if site.positions is not None:
        keep = keep & Window(keep).select(site.positions)
    return keep.gather(1, at[:, None])[:, 0]


def _site_parts(
    run: AnswerRun,
    site: HookedSite,
    sources: Sequence[tuple[HookedSite, SparseActs, torch.Tensor, torch.Tensor]],
) -> list[Contribution]:
    """Features, error and bias of what is written at one site."""
    when, readout = stream_time(site.hook_out), _readout(run, site.hook_out)
    parts: list[Contribution] = []

    def add(label: str, value: torch.Tensor) -> None:
        parts.append(Contribution(label, site.hook_out, when, value, of_dictionary=True))

    total = (_flat(run.at[site.hook_out]) * readout).sum(-1)
    for position, (source, acts, x, _) in enumerate(sources):
        index = acts.indices.unique()
        values = _of_features(source, site, position, acts, x, index, readout)
        for feature, value in zip(index.tolist(), values.unbind(-1), strict=True):
            add(str(FeatureId(source.name, feature)), value)
    _, _, x, keep = sources[-1]
    bias = wide(site.weights.bias(x)).to(readout.device).expand_as(readout)
    from_bias = (bias * readout).sum(-1) * keep.to(readout.device)
    explained = sum((part.value for part in parts), from_bias)
    add(f"{site.name} error", total - explained)
    add(f"{site.name} b_dec", from_bias)
    return parts


def _of_features(
    source: HookedSite,
    site: HookedSite,
    position: int,
    acts: SparseActs,
    x: torch.Tensor,
    index: Int[torch.Tensor, " k"],
    readout: Float[torch.Tensor, "prompt d_out"],
) -> Float[torch.Tensor, "prompt k"]:
    """``s * a_f <W_dec[f], n>``."""
    W_dec = site.decoder_from(position)
    rows = wide(W_dec[index.to(W_dec.device)]).to(readout.device)
    amounts, scale = acts.columns(index), source.weights.scale(x)
    if scale is not None:
        amounts = amounts * scale
    return wide(amounts).to(readout.device) * (readout @ rows.to(readout.dtype).T)


def _readout(run: AnswerRun, hook: str) -> Float[torch.Tensor, "prompt d_out"]:
    """The readout of what is written at a hook."""
    return run.readout_of_z(layer_of(hook)).flatten(1) if is_z(hook) else run.readout


def _order(hook: str) -> tuple[int, bool, bool]:
    """By time, and at one time what contains the other last."""
    return stream_time(hook), hook.endswith("hook_attn_out"), is_stream(hook)


def _covers(hook: str, part: Contribution) -> bool:
    """Whether what is at a hook contains a part."""
    if is_stream(hook):
        return part.stream_time <= stream_time(hook)
    if hook.endswith("hook_attn_out"):
        return part.stream_time == stream_time(hook)
    return part.hook == hook


def _flat(x: torch.Tensor) -> Float[torch.Tensor, "prompt d"]:
    return flatten_heads(x[:, None])[:, 0] if x.ndim == 3 else x
