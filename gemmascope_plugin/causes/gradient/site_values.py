"""What is at the sites of one run: tensors, active features, errors.

1. One forward pass keeps the tensor of every site and what its dictionary encodes.
2. Features are encoded sparsely and exactly; special tokens and padding have none. Where a dictionary
   has a scale for each token, a feature stands for ``scale * f``, which is what it writes.

Cost: a forward pass and an encode per dictionary; 16 bytes an active feature, no ``d_sae`` numbers a
token are ever kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.causes.gradient.task_site import Site
from gemmascope_plugin.models import flatten_heads
from gemmascope_plugin.models.finite import wide
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import SparseActs, write


@dataclass(frozen=True, eq=False)
class Values:
    """One run at one site."""

    y: Float[torch.Tensor, "prompt pos ..."]
    """The tensor, as its hook fires."""
    acts: SparseActs | None = None
    """Its active features, at a dictionary's site."""
    x: Float[torch.Tensor, "prompt pos d_in"] | None = None
    """What the dictionary encodes, heads flattened."""

    @property
    def flat(self) -> Float[torch.Tensor, "prompt pos width"]:
        """The tensor, heads flattened, at least in float32."""
        return wide(flatten_heads(self.y))

    def error(self, site: Site) -> Float[torch.Tensor, "prompt pos width"]:
        """What is there besides features."""
        assert self.acts is not None, "a site without a dictionary"
        return self.flat - written_by(site, self.acts).to(self.y.device)


def written_by(site: Site, acts: SparseActs) -> Float[torch.Tensor, "*tokens width"]:
    """``sum_f a_f W_f``, on the dictionary's device, at least in float32."""
    return write(acts.with_values(wide(acts.values)), site.coder.W_dec)


def encoded(
    site: Site, x: Float[torch.Tensor, "row pos ..."], keep: Bool[torch.Tensor, "row pos"]
) -> SparseActs:
    """The active features of the tensor that a dictionary reads, each times its token's scale."""
    coder = site.coder
    flat = flatten_heads(x).to(coder.W_enc.device)
    hooked = site.hooked
    assert hooked is not None
    acts = coder.encode_sparse(flat, keep=keep.to(flat.device), two_stage=hooked.two_stage)
    scale = coder.scale(flat)
    if scale is None:
        return acts
    return acts.with_values(acts.values * scale.flatten()[acts.rows].to(acts.values))


def kept_tokens(
    site: Site,
    tokens: Int[torch.Tensor, "row pos"],
    mask: Bool[torch.Tensor, "row pos"],
) -> Bool[torch.Tensor, "row pos"]:
    """False at padding and at tokens that the site's dictionary leaves alone."""
    return kept_positions(tokens, site.special) & mask


@torch.no_grad()
def read_sites(
    model: HookedModel,
    sites: Sequence[Site],
    tokens: Int[torch.Tensor, "prompt pos"],
    mask: Bool[torch.Tensor, "prompt pos"],
) -> dict[str, Values]:
    """The values of one run, by the hook of the site."""
    hooks = [site.hook for site in sites]
    hooks += [site.reads.hook for site in sites if site.reads is not None]
    found: Mapping[str, torch.Tensor] = record(model, tokens, list(dict.fromkeys(hooks)))
    values = {}
    for site in sites:
        if site.reads is None:
            values[site.hook] = Values(found[site.hook])
            continue
        x = flatten_heads(site.reads(found[site.reads.hook]))
        acts = encoded(site, x, kept_tokens(site, tokens, mask))
        values[site.hook] = Values(found[site.hook], acts, x)
    return values
