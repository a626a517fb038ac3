"""A dictionary's place in a trace: where its features read and write, and what is active in the prompt.

================ ==================== ============================================== =================
kind             reads                writes                                         effect on the rest
================ ==================== ============================================== =================
``transcoder``   the norm before MLP  the MLP's output                               replaces the MLP
``mlp``          the MLP's output     the same: sources only, an MLP is not linear   replaces the MLP
``attention``    ``hook_z``           the same                                       cuts value paths
``resid``        ``hook_resid_post``  the same                                       cuts everything
================ ==================== ============================================== =================

What a dictionary writes at a token is ``sum_i f_i W_dec[i] + b_dec (+ x A)``; what is missing to the real
tensor is the error. At special tokens, which dictionaries were not trained on, no feature is active, the
output of an MLP is a source as a whole, but for what an affine skip passes on, and nothing is cut.

Cost: one encoding of the prompt per site.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.errors import EmptySelectionError, ModelError, WidthMismatchError
from gemmascope_plugin.models.points import gained_layer, norm_gain
from gemmascope_plugin.models.protocol import HookedModel, check_finite
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.saes import Coder, Weights
from gemmascope_plugin.saes.coder import cross_layer_of
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.saes.sparse import SparseActs, write
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE, Saes, as_list
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.tracing.linear.frozen_pass import FrozenPass
from gemmascope_plugin.types import SAE

Kind = Literal["transcoder", "mlp", "attention", "resid"]
STAGES: dict[Kind, int] = {"attention": 0, "transcoder": 1, "mlp": 1, "resid": 2}
"""Order of the sites of a layer in a forward pass."""
PER_LAYER = 4
"""Times of a layer: its sites, and last the stream behind it, before an SAE there."""
Exclude = str | int | Sequence[str | int]
"""Special tokens that dictionaries leave alone, unless they were wrapped with their own choice."""
_HOOKS: dict[str, Kind] = {
    "hook_mlp_out": "mlp",
    "attn.hook_z": "attention",
    "hook_resid_post": "resid",
}
_NORMED = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")
_PLACE = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False)
class TraceSite:
    """A site of a dictionary in a trace."""

    hooked: HookedSite
    kind: Kind
    layer: int
    place: int = 0
    """Number among the sites of its own dictionary."""

    @property
    def time(self) -> int:
        """When it works, see ``PER_LAYER``."""
        return PER_LAYER * self.layer + STAGES[self.kind]

    @property
    def label(self) -> str:
        """Its output hook, as caches name it."""
        return self.hooked.name

    @property
    def dictionary(self) -> CrossLayerDictionary | None:
        """The cross-layer dictionary that it belongs to; None for others."""
        return getattr(self.hooked, "dictionary", None)

    def receives(self, other: TraceSite) -> bool:
        """Whether features that read at another site write here."""
        if other is self:
            return True
        same = self.dictionary is not None and other.dictionary is self.dictionary
        return same and other.place < self.place

    @property
    def weights(self) -> Coder:
        """Encoder and decoder."""
        return self.hooked.weights

    @property
    def is_target(self) -> bool:
        """Whether what its features read is linear in what others write."""
        return self.kind != "mlp"

    @property
    def cuts(self) -> bool:
        """Whether what it writes takes the place of all below, at the tokens that it works on."""
        return self.kind in ("attention", "resid")

    @property
    def skip(self) -> Float[torch.Tensor, "d_out d_in"] | None:
        """The affine skip."""
        weights = self.weights
        return weights.W_skip if isinstance(weights, Weights) else None


@dataclass(frozen=True, eq=False)
class Activity:
    """What a site does in the prompt."""

    site: TraceSite
    acts: SparseActs
    """``[pos, d_sae]``."""
    keep: Bool[torch.Tensor, " pos"]
    """False at special tokens."""
    rest: Float[torch.Tensor, "pos d_out"]
    """The error; at special tokens the output of an MLP without the skip, and nothing at other sites."""
    b_dec: Float[torch.Tensor, " d_out"]
    read_gain: Float[torch.Tensor, "pos d_in"] | None
    """What the stream is multiplied by before the encoder reads it; None for 1."""

    @property
    def n_features(self) -> int:
        """Active features, all tokens together."""
        return len(self.acts.indices)

    def encoders(self, entries: Int[torch.Tensor, " some"]) -> Float[torch.Tensor, "some d_in"]:
        """Encoder columns of some of the active features."""
        features = self.acts.indices[entries]
        return self.site.weights.W_enc.detach()[:, features].T.to(self.rest.dtype)

    def readers(
        self, entries: Int[torch.Tensor, " some"]
    ) -> tuple[Float[torch.Tensor, "some d_in"], Float[torch.Tensor, " some"]]:
        """How some of the active features read: gradients at the stream (or ``z``), and constants."""
        weights: Any = self.site.weights
        columns = self.encoders(entries)
        constant = weights.b_enc.detach()[self.acts.indices[entries]].to(columns)
        if getattr(weights, "subtract_b_dec", False):
            constant = constant - columns @ weights.b_dec.detach().to(columns)
        if self.read_gain is not None:
            columns = columns * self.read_gain[self.acts.rows[entries]]
        return columns, constant

    def writers(
        self, W_dec: Float[torch.Tensor, "d_sae d_out"], pos: int
    ) -> Float[torch.Tensor, "some d_out"]:
        """What the features of one token write through a decoder, times their activation."""
        entries = slice(int(self.acts.offsets[pos]), int(self.acts.offsets[pos + 1]))
        rows = W_dec.index_select(0, self.acts.indices[entries].to(W_dec.device))
        values = self.acts.values[entries, None]
        return rows.to(values) * values


def site_of(hooked: HookedSite, place: int) -> TraceSite:
    """A site, checked; ``place`` is its number in its dictionary."""
    weights = hooked.weights
    match = _PLACE.fullmatch(hooked.hook_out)
    kind = _HOOKS.get(match[2]) if match else None
    if match is None or kind is None:
        raise ModelError(
            f"A dictionary at {hooked.hook_out} has no place in a trace",
            exists="transcoders, and SAEs at " + ", ".join(_HOOKS),
        )
    if weights.reads_input and not isinstance(weights, Weights):
        raise ModelError(
            f"The dictionary at {hooked.hook_out} is scaled by its own input, so its features are not "
            "linear in the stream",
            fix="JumpReLU, Matryoshka or top-k dictionaries",
        )
    if hooked.is_transcoder:
        if kind != "mlp":
            raise ModelError(f"A transcoder that writes to {hooked.hook_out} cannot be traced")
        kind = "transcoder"
    return TraceSite(hooked, kind, int(match[1]), place)


def trace_sites(model: HookedModel, saes: Saes, exclude: Exclude) -> list[TraceSite]:
    """The sites of all SAEs, in the order of the forward pass, checked."""
    sites: list[TraceSite] = []
    for sae in as_list(saes):
        for place, site in enumerate(hooked_of(sae, exclude).sites):
            sites.append(site_of(site, place))
    sites.sort(key=lambda site: site.time)
    for first, second in pairwise(sites):
        if first.time == second.time:
            raise ModelError(
                f"Two dictionaries stand at {second.hooked.hook_out}: what it writes would count twice",
                fix="one dictionary per site",
            )
    covered = {site.layer for site in sites if site.time % PER_LAYER == 1}
    missing = [layer for layer in range(int(model.cfg.n_layers)) if layer not in covered]
    if missing:
        raise ModelError(
            f"There is no dictionary of the MLP of {_layers(missing)}, and an MLP is not linear",
            exists=f"dictionaries of the MLP of {_layers(sorted(covered))}" if covered else None,
            fix='[load(spec) for spec in find(model=..., site="transcoder", ...)], one per layer',
        )
    return sites


def hooked_of(
    sae: SAE | HookedSAE | HookedCrossLayer, exclude: Exclude
) -> HookedSAE | HookedCrossLayer:
    """A dictionary with its sites."""
    if isinstance(sae, (HookedSAE, HookedCrossLayer)):
        return sae
    layers = cross_layer_of(sae)
    if layers is None:
        return HookedSAE(sae, exclude=exclude)
    if layers.cfg.kind != "clt":
        raise ModelError(
            f"A {layers.cfg.kind} reads and writes the stream of several layers at once; it has no "
            "place in a trace",
            fix="transcoders, a CLT, or residual SAEs",
        )
    assert isinstance(layers, CrossLayerDictionary)
    return HookedCrossLayer(layers, exclude=exclude)


def _layers(layers: Sequence[int]) -> str:
    """``layer 3``, ``layers 0, 1``."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"


def activities(frozen: FrozenPass, sites: Sequence[TraceSite]) -> list[Activity]:
    """Features, errors and read gains of all sites, which are sorted by time."""
    earlier: list[Activity] = []
    for site in sites:
        special = special_ids(frozen.model, site.hooked.exclude)
        keep = kept_positions(frozen.tokens[None], special)[0]
        x = frozen.tensor(site.hooked.hook_in)
        _check_width(site, x, frozen.tensor(site.hooked.hook_out))
        acts = site.weights.encode_sparse(x, keep=keep).detach()
        earlier.append(_activity(frozen, site, x, acts, keep, earlier))
    if not any(activity.n_features for activity in earlier):
        raise EmptySelectionError(
            f"No feature of {len(earlier)} dictionaries is active on this prompt",
            fix="a longer prompt, exclude=(), or dictionaries of this model",
        )
    return earlier


def _activity(
    frozen: FrozenPass,
    site: TraceSite,
    x: torch.Tensor,
    acts: SparseActs,
    keep: torch.Tensor,
    earlier: Sequence[Activity],
) -> Activity:
    dtype = frozen.dtype
    y = frozen.tensor(site.hooked.hook_out).to(dtype)
    sources = [(source.site.place, source.acts) for source in earlier if site.receives(source.site)]
    decoded = torch.zeros_like(y)
    for place, active in (*sources, (site.place, acts)):
        wide = active.with_values(active.values.to(dtype))
        decoded = decoded + write(wide, site.hooked.decoder_from(place).detach()).to(dtype)
    bias = site.weights.bias(x.to(site.weights.W_enc.dtype)).detach().to(dtype)
    b_dec = bias if bias.ndim == 1 else _constant(site, dtype)
    # an MLP is a source where its dictionary has no features; other tensors flow on there
    passed = torch.zeros_like(y) if site.cuts else y - (bias - b_dec)
    check_finite(decoded, f"What the features of the dictionary at {site.label} write by position")
    rest = torch.where(keep[:, None], y - decoded - bias, passed)
    gain = _read_gain(frozen, site)
    return Activity(site, acts.with_values(acts.values.to(dtype)), keep, rest, b_dec, gain)


def _constant(site: TraceSite, dtype: torch.dtype) -> torch.Tensor:
    weights = site.weights
    assert isinstance(weights, Weights), "others with a bias of their input are refused"
    return weights.b_dec.detach().to(dtype)


def _read_gain(frozen: FrozenPass, site: TraceSite) -> torch.Tensor | None:
    """For transcoders ``gain / s_2`` by token: what lies between stream and encoder."""
    if site.kind != "transcoder":
        return None
    hook = site.hooked.hook_in
    layer, plain = gained_layer(hook), _NORMED.fullmatch(hook)
    if layer is None and plain is None:
        raise ModelError(
            f"The transcoder at {site.label} reads {hook}",
            exists="blocks.L.ln2.hook_normalized, blocks.L.mlp.hook_in",
            fix="a transcoder of the norm before the MLP",
        )
    scale = 1 / frozen.mlp_scale(site.layer)[:, None]
    if layer is None:
        return scale.expand(-1, frozen.anatomy.d_model)
    return scale * norm_gain(frozen.model, layer).to(scale)


def _check_width(site: TraceSite, x: torch.Tensor, y: torch.Tensor) -> None:
    for name, tensor, width in zip(
        (site.hooked.hook_in, site.hooked.hook_out), (x, y), site.hooked.widths, strict=True
    ):
        if tensor.shape[-1] != width:
            raise WidthMismatchError(
                f"The dictionary for {name} has width {width}, the model's tensor {tensor.shape[-1]}",
                fix=f"a dictionary of this model; this one says {site.hooked.model_name}",
            )
