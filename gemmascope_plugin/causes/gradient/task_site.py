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

Cost: none; a list of names and references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from gemmascope_plugin.causes.stream_time import WRITTEN, is_stream, layer_of, written
from gemmascope_plugin.errors import GemmaScopeError, ModelError, UnknownNameError
from gemmascope_plugin.models import special_ids
from gemmascope_plugin.models.points import Reading, hook_points, n_layers, reading, width_at
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.saes import Coder
from gemmascope_plugin.splice import HookedCrossLayer, HookedSAE
from gemmascope_plugin.splice.check_saes import as_list, check_sae
from gemmascope_plugin.splice.splicing import check_site

SiteKind = Literal["feature", "head", "mlp"]
_RAW = {"head": "blocks.{}.attn.hook_z", "mlp": "blocks.{}.hook_mlp_out"}
_ALLOWED = tuple(name for name in WRITTEN if name not in ("hook_embed", "hook_resid_mid"))


@dataclass(frozen=True, eq=False)
class Site:
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
        return written(self.hook), self.is_stream

    def __repr__(self) -> str:
        return f"Site({self.hook}, {self.kind}, width {self.width}, d_sae {self.d_sae})"


def sites_of(
    model: HookedModel, saes: Any, raw: Sequence[str] = (), *, level: int | None = None
) -> tuple[Site, ...]:
    """The sites of dictionaries, and of heads and MLPs without one, in forward order."""
    if saes is None:
        raise UnknownNameError(
            'Circuits of features need dictionaries: nodes="features" without saes',
            fix="saes=[gemmascope_plugin.load(spec)]",
        )
    found = [_dictionary_site(model, _hooked(sae, level)) for sae in as_list(saes)]
    by_place: dict[tuple[int, bool], Site] = {}
    for site in found:
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


def _dictionary_site(model: HookedModel, hooked: HookedSAE) -> Site:
    if not hooked.hook_out.endswith(_ALLOWED):
        raise ModelError(
            f"The dictionary for {hooked.hook_out} cannot be part of a circuit of features, which "
            "takes apart what is added to the residual stream, and the stream",
            exists=", ".join(_ALLOWED),
        )
    check_site(model, hooked, hook_points(model))
    return Site(
        hooked.hook_out,
        "feature",
        hooked.widths[1],
        hooked,
        reading(model, hooked.hook_in),
        special_ids(model, hooked.exclude),
    )


def _raw_site(model: HookedModel, kind: str, layer: int) -> Site:
    hook, which = _RAW[kind].format(layer), "head" if kind == "head" else "mlp"
    width = width_at(model, hook)
    assert width is not None
    return Site(hook, which, width)


def check_restartable(model: HookedModel, free: bool) -> None:
    """Refuses a model with hooks of its own: passes that start late would leave them out."""
    if not free:
        raise GemmaScopeError(
            f"This {type(model).__name__} has hooks attached, and feature circuits start passes at "
            "inner layers, where those would be left out",
            fix="model.reset_hooks(), or leave the splice block",
        )
