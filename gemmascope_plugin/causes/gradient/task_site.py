"""Sites: tensors that are taken apart into nodes, in the order in which a pass writes them.

============ =========================== ================================================================
kind         hook                        nodes
============ =========================== ================================================================
``feature``  where a dictionary writes   its features, and one error: all else that is there
``head``     ``blocks.L.attn.hook_z``    the heads, where no dictionary takes the attention apart
``mlp``      ``blocks.L.hook_mlp_out``   the MLP as a whole, where no dictionary does
============ =========================== ================================================================

1. With ``y`` the tensor at a dictionary's output hook, ``a_f`` its features (times the token's scale,
   where the dictionary has one) and ``W_f`` their decoder rows, the error is ``y - sum_f a_f W_f``. It
   holds what the dictionary misses, its bias, an affine skip, and the whole of ``y`` at tokens that it
   leaves alone. So features and error always sum to ``y``, of SAEs and transcoders alike, and ``y`` is
   linear in them.
2. Only tensors that are added to the residual stream, and the stream itself, are sites, one at each
   place: ``hook_resid_post`` of a layer and ``hook_resid_pre`` of the next one are the same place.

What is at the sites of one run (``Values``):

3. One forward pass keeps the tensor of every site and what its dictionary encodes.
4. Features are encoded sparsely and exactly; special tokens and padding have none. Where a dictionary
   has a scale for each token, a feature stands for ``scale * f``, which is what it writes.

Sums over active entries (``Tally``):

5. ``dm/da_f`` at a token is ``<W_f, g>`` with ``g`` the gradient at the site: one row of the decoder and
   one of ``g`` for each active entry, never ``[token, d_sae]``.
6. Sums over tokens and prompts are kept by *key*: the feature, or position and feature. ``Tally`` merges
   the keys of one batch of prompts into those of the batches before.

Cost: sites are names and references; values a forward pass and an encode per dictionary, 16 bytes an
active feature, no ``d_sae`` numbers a token are ever kept; slopes ``2 * active * width`` operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64

from gemmascope_plugin.causes.components import WRITTEN, is_stream, layer_of, stream_time
from gemmascope_plugin.errors import GemmaScopeError, ModelError, UnknownNameError
from gemmascope_plugin.models import flatten_heads, special_ids
from gemmascope_plugin.models.points import Reading, hook_points, n_layers, reading, width_at
from gemmascope_plugin.models.protocol import HookedModel, wide
from gemmascope_plugin.models.record import record
from gemmascope_plugin.models.tokens import kept_positions
from gemmascope_plugin.saes import Coder, SparseActs, write
from gemmascope_plugin.splice import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.hooked_sae import Saes, as_list, check_sae

SiteKind = Literal["feature", "head", "mlp"]
_RAW = {"head": "blocks.{}.attn.hook_z", "mlp": "blocks.{}.hook_mlp_out"}
_ALLOWED = tuple(name for name in WRITTEN if name not in ("hook_embed", "hook_resid_mid"))


@dataclass(frozen=True, eq=False)
class TaskSite:
    """One tensor and what takes it apart."""

    hook: str
    """Where it is written."""
    kind: SiteKind
    width: int
    """Of the tensor, heads flattened."""
    hooked: HookedSAE | None = None
    """The dictionary, at ``feature`` sites."""
    reads: Reading | None = None
    """The tensor that the dictionary encodes."""
    special: frozenset[int] = frozenset()
    """Ids of the tokens that it leaves alone."""

    @property
    def coder(self) -> Coder:
        """Encoder and decoder of the dictionary."""
        assert self.hooked is not None, "a site without a dictionary"
        return self.hooked.weights

    @property
    def d_sae(self) -> int:
        """Number of features; 0 without a dictionary."""
        return 0 if self.hooked is None else self.hooked.d_sae

    @property
    def layer(self) -> int:
        """Its layer."""
        return layer_of(self.hook)

    @property
    def is_stream(self) -> bool:
        """Whether it is the residual stream, which screens all that was written before."""
        return is_stream(self.hook)

    @cached_property
    def place(self) -> tuple[int, bool]:
        """When it is written; the stream after what was added to it."""
        return stream_time(self.hook), self.is_stream

    def __repr__(self) -> str:
        return f"TaskSite({self.hook}, {self.kind}, width {self.width}, d_sae {self.d_sae})"


def sites_of(
    model: HookedModel, saes: Saes, raw: Sequence[str] = (), *, level: int | None = None
) -> tuple[TaskSite, ...]:
    """The sites of dictionaries, and of heads and MLPs without one, in forward order."""
    if saes is None:
        raise UnknownNameError(
            'Circuits of features need dictionaries: nodes="features" without saes',
            fix="saes=[gemmascope_plugin.load(spec)]",
        )
    sites = [_dictionary_site(model, _hooked(sae, level)) for sae in as_list(saes)]
    by_place: dict[tuple[int, bool], TaskSite] = {}
    for site in sites:
        other = by_place.setdefault(site.place, site)
        if other is not site:
            raise UnknownNameError(
                f"Two dictionaries take the same tensor apart: {other!r} and {site!r}",
                fix="one dictionary at each place; stability() compares several",
            )
    for kind in raw:
        for layer in range(n_layers(model)):
            site = _raw_site(model, kind, layer)
            by_place.setdefault(site.place, site)
    return tuple(by_place[place] for place in sorted(by_place))


def _hooked(sae: Any, level: int | None) -> HookedSAE:
    if isinstance(sae, HookedCrossLayer):
        raise ModelError(
            "A cross-layer dictionary has many sites, and a site of a circuit is taken apart by one",
            fix="dictionaries of one layer each, or gemmascope_plugin.trace",
        )
    if not isinstance(sae, HookedSAE):
        check_sae(sae)
        return HookedSAE(sae, level=level)
    if sae.positions is not None:
        raise ModelError(
            f"The dictionary for {sae.hook_out} is restricted to positions={sae.positions}",
            fix="a dictionary for all positions; per_position=True tells positions apart",
        )
    return sae


def _dictionary_site(model: HookedModel, hooked: HookedSAE) -> TaskSite:
    if not hooked.hook_out.endswith(_ALLOWED):
        raise ModelError(
            f"The dictionary for {hooked.hook_out} cannot be part of a circuit of features, which "
            "takes apart what is added to the residual stream, and the stream",
            exists=", ".join(_ALLOWED),
        )
    hooked.check(model, hook_points(model))
    return TaskSite(
        hooked.hook_out,
        "feature",
        hooked.widths[1],
        hooked,
        reading(model, hooked.hook_in),
        special_ids(model, hooked.exclude),
    )


def _raw_site(model: HookedModel, kind: str, layer: int) -> TaskSite:
    hook, which = _RAW[kind].format(layer), "head" if kind == "head" else "mlp"
    width = width_at(model, hook)
    assert width is not None
    return TaskSite(hook, which, width)


def check_restartable(model: HookedModel, free: bool) -> None:
    """Refuses a model with hooks of its own: passes that start late would leave them out."""
    if not free:
        raise GemmaScopeError(
            f"This {type(model).__name__} has hooks attached, and feature circuits start passes at "
            "inner layers, where those would be left out",
            fix="model.reset_hooks(), or leave the splice block",
        )


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

    def error(self, site: TaskSite) -> Float[torch.Tensor, "prompt pos width"]:
        """What is there besides features."""
        assert self.acts is not None, "a site without a dictionary"
        return self.flat - written_by(site, self.acts).to(self.y.device)


def written_by(site: TaskSite, acts: SparseActs) -> Float[torch.Tensor, "*tokens width"]:
    """``sum_f a_f W_f``, on the dictionary's device, at least in float32."""
    return write(acts.with_values(wide(acts.values)), site.coder.W_dec)


def encoded(
    site: TaskSite, x: Float[torch.Tensor, "row pos ..."], keep: Bool[torch.Tensor, "row pos"]
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
    site: TaskSite,
    tokens: Int[torch.Tensor, "row pos"],
    mask: Bool[torch.Tensor, "row pos"],
) -> Bool[torch.Tensor, "row pos"]:
    """False at padding and at tokens that the site's dictionary leaves alone."""
    return kept_positions(tokens, site.special) & mask


@torch.no_grad()
def read_sites(
    model: HookedModel,
    sites: Sequence[TaskSite],
    tokens: Int[torch.Tensor, "prompt pos"],
    mask: Bool[torch.Tensor, "prompt pos"],
) -> dict[str, Values]:
    """The values of one run, by the hook of the site."""
    hooks = [site.hook for site in sites]
    hooks += [site.reads.hook for site in sites if site.reads is not None]
    acts: Mapping[str, torch.Tensor] = record(model, tokens, list(dict.fromkeys(hooks)))
    values = {}
    for site in sites:
        if site.reads is None:
            values[site.hook] = Values(acts[site.hook])
            continue
        x = flatten_heads(site.reads(acts[site.reads.hook]))
        features = encoded(site, x, kept_tokens(site, tokens, mask))
        values[site.hook] = Values(acts[site.hook], features, x)
    return values


BLOCK = 2**24
"""Numbers gathered at a time."""


def _none(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


def slopes_of_entries(
    acts: SparseActs,
    W_dec: Float[torch.Tensor, "d_sae width"],
    gradient: Float[torch.Tensor, "prompt pos width"],
) -> Float[torch.Tensor, " active"]:
    """``<W_f, g>`` for every active entry, in its order."""
    flat = gradient.flatten(0, -2).to(W_dec.device)
    slopes = []
    size = max(1, BLOCK // W_dec.shape[1])
    for rows, features in zip(acts.rows.split(size), acts.indices.split(size), strict=True):
        slopes.append((W_dec[features].to(flat.dtype) * flat[rows]).sum(-1))
    return torch.cat(slopes) if slopes else flat.new_zeros(0)


@dataclass
class Tally:
    """Sums by key, over as many batches as come."""

    keys: Int64[torch.Tensor, " key"] = field(default_factory=lambda: _none(torch.int64))
    """Ascending."""
    sums: Float64[torch.Tensor, " key"] = field(default_factory=lambda: _none(torch.float64))

    def add(
        self, keys: Int64[torch.Tensor, " entry"], values: Float[torch.Tensor, " entry"]
    ) -> None:
        """Adds entries to the sums of their keys, which may be new ones.

        A value of zero makes a key known and no more.
        """
        every = torch.cat([self.keys, keys.cpu()])
        self.keys, place = every.unique(return_inverse=True)
        entries = torch.cat([self.sums, values.detach().double().cpu()])
        self.sums = torch.zeros(len(self.keys), dtype=torch.float64).index_add(0, place, entries)


def keys_of(acts: SparseActs, per_position: bool) -> Int64[torch.Tensor, " active"]:
    """``feature``, or ``position * d_sae + feature``, of entries of ``[prompt, pos, d_sae]``."""
    if not per_position:
        return acts.indices
    return acts.rows % acts.shape[-2] * acts.d_sae + acts.indices
