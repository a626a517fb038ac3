"""One site of a dictionary: its hook points, and what flows on there.

With ``y`` the tensor at the output hook, ``f`` the features, ``f'`` the same after edits and hooks,
``D(f) = s * (f @ W_dec) + b`` and ``e = y - D(f)``.  ``b`` is what is written whatever the edits:
``b_dec``, plus ``x @ A`` for an affine skip. ``s`` is 1, but where tokens are standardised (trees,
SoftSAEs) the token's deviation, and then ``b = b_dec * s + mean`` (``saes/coder.py``).

* ``keep``: ``y + D(f') - D(f)``. Value and gradient are those of the real model: ``f`` and ``e`` are
  leaves that collect gradients, and ``y`` receives the full gradient of the output (straight-through,
  Marks et al., arXiv 2403.19647) plus, exactly, what flows through the edited features.
* ``drop``: ``D(f')``; the gradient goes through encoder and decoder.
* ``detach``: the value of ``keep`` with ``e`` a constant, as SAELens' ``use_error_term=True``; the
  gradient upstream of it is *wrong* by design and kept for comparison only.

In a cross-layer dictionary ``D`` sums over the features of this layer and all earlier ones.
Excluded tokens keep ``y`` in every mode and have no active feature.

Cost: with the error kept, nothing without edits and listeners; the touched encoder columns and decoder
rows for edits; one encode where features are listened to; one sparse decode more for reconstruction or
error. With the error dropped one encode and one sparse decode.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import get_args

import torch
from jaxtyping import Float
from transformer_lens.hook_points import HookPoint

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import WidthMismatchError, check_choice
from gemmascope_plugin.models import flatten_heads, hook_point, restore_heads, special_ids
from gemmascope_plugin.models.points import reading, width_at
from gemmascope_plugin.models.protocol import HookedModel, check_finite, is_finite
from gemmascope_plugin.saes import Bf16Prefilter, Coder, Weights
from gemmascope_plugin.saes.cross_layer import CrossLayerDictionary
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.splice.pass_features import SUB_HOOKS, PassFeatures, leaf, listened
from gemmascope_plugin.splice.window import Positions, Window
from gemmascope_plugin.types import ErrorMode

FEATURE_HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post")
"""Whoever listens here needs the features."""
Sources = list[tuple[PassFeatures, torch.Tensor]]
"""Features that write at a site, each with the decoder that they write through."""


class HookedSite(torch.nn.Module, ABC):
    """Hook points of a dictionary at one output hook of the model, and what it does there."""

    def __init__(
        self,
        hook_in: str,
        hook_out: str,
        *,
        error: ErrorMode,
        exclude: str | int | Sequence[str | int],
        positions: Positions,
        two_stage: Bf16Prefilter | None = None,
    ) -> None:
        super().__init__()
        check_choice("error mode", error, get_args(ErrorMode))
        self.hook_in, self.hook_out = hook_in, hook_out
        self.error: ErrorMode = error
        self.exclude = (exclude,) if isinstance(exclude, (str, int)) else tuple(exclude)
        self.positions = positions
        self.two_stage = two_stage
        self.points = {name: HookPoint() for name in SUB_HOOKS}
        for name, point in self.points.items():
            self.add_module(name, point)
        self.name = hook_out

    @property
    @abstractmethod
    def weights(self) -> Coder:
        """What encodes here, and decodes the features of this site."""

    @property
    @abstractmethod
    def d_sae(self) -> int:
        """Number of features that read this site."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """Widths of the tensors that are read and written."""

    @abstractmethod
    def decoder_from(self, position: int) -> Float[torch.Tensor, "d_sae d_out"]:
        """The decoder through which the features of the site at ``position`` write here."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The model that the dictionary says it belongs to, in words."""

    @property
    def name(self) -> str:
        """Prefix of this site's names in caches and hooks: the output hook, numbered if several
        dictionaries share it.
        """
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        for part, point in self.points.items():
            point.name = f"{name}.{part}"

    @property
    def is_transcoder(self) -> bool:
        """Whether input and output are different tensors."""
        return self.hook_in != self.hook_out

    @property
    def layer(self) -> int | None:
        """The layer whose tensor the features read; None outside the blocks."""
        parts = self.hook_in.split(".")
        return int(parts[1]) if parts[0] == "blocks" else None

    def check(self, model: HookedModel, points: Mapping[str, HookPoint]) -> None:
        """Refuses a model that this does not fit; ``points`` are the model's, by name."""
        special_ids(model, self.exclude)
        hook_point(model, self.hook_out, points)
        reading(model, self.hook_in, points)
        for name, width in zip((self.hook_in, self.hook_out), self.widths, strict=True):
            width_here = width_at(model, name)
            if width_here is not None and width_here != width:
                raise self._other_width(name, width, width_here)

    def idle(self, edits: Sequence[Edit]) -> bool:
        """Whether the tensor flows on unchanged, so that nothing needs computing."""
        constant = self.error == "keep" or (self.error == "detach" and not torch.is_grad_enabled())
        return constant and not edits and not listened(self.points)

    def read(
        self, x: Float[torch.Tensor, "batch pos ..."], window: Window, edits: Sequence[Edit] = ()
    ) -> PassFeatures:
        """The features of a tensor at the input hook, in one pass."""
        flat = flatten_heads(x)
        self._check_width(flat, self.hook_in, self.widths[0])
        return PassFeatures(
            lambda: self.weights, self.points, flat, window, edits, two_stage=self.two_stage
        )

    def write(
        self,
        y: Float[torch.Tensor, "batch pos ..."],
        features: PassFeatures,
        earlier: Sequence[PassFeatures] = (),
    ) -> Float[torch.Tensor, "batch pos ..."]:
        """The tensor that takes the place of ``y``."""
        flat = flatten_heads(y)
        self._check_width(flat, self.hook_out, self.widths[1])
        if listened(self.points, *FEATURE_HOOKS):
            features.materialise(as_leaf=self.error == "keep")
        whole = self.error != "keep" or listened(self.points, "hook_sae_recons", "hook_sae_error")
        # only what writes here is opened: other layers' decoders stay on disk
        sources = [
            (part, self.decoder_from(position))
            for position, part in enumerate((*earlier, features))
            if whole or part.writes
        ]
        # the wider type, so that a narrow dictionary does not round the stream
        types = [part.weights.W_enc.dtype for part, _ in sources]
        wide = flat.to(reduce(torch.promote_types, types, flat.dtype))
        new = self._with_error if self.error == "keep" else self._rebuilt
        out = new(wide, features, sources)
        window = features.tokens
        for edit in features.projections:
            out = edit.project(out, features.weights.W_dec, window)
        out = out.to(flat.dtype)
        if not torch.compiler.is_compiling() and not is_finite(out):
            chosen = window.keep.to(out.device)[..., None]  # padding may hold anything
            written = torch.where(chosen, out, torch.zeros_like(out))
            check_finite(written, f"What the dictionary at {self.name} writes")
        # edits alone leave excluded tokens as they are, hooks need not
        if self.error != "keep" or any(listened(part.points) for part in (*earlier, features)):
            out = torch.where(window.keep.to(out.device)[..., None], out, flat)
        return restore_heads(self.points["hook_sae_output"](out), y)

    def _with_error(
        self, y: torch.Tensor, features: PassFeatures, sources: Sources
    ) -> torch.Tensor:
        """``y + D(f') - D(f)``, and what hooks make of reconstruction and error."""
        if not listened(self.points, "hook_sae_recons", "hook_sae_error"):
            return _carry(y, features, sources)
        with torch.no_grad():
            real = self._reconstruction(features.x, y, sources)
        # a copy: a hook may write into what it is given
        recons = self.points["hook_sae_recons"](_carry(real.clone(), features, sources))
        # Written as differences, so that what nobody changed adds exactly nothing to the stream.
        return y + (recons - real) + self._error_change(y, real)

    def _rebuilt(self, y: torch.Tensor, features: PassFeatures, sources: Sources) -> torch.Tensor:
        """``D(f')``, or, with a constant error, ``y + D(f') - D(f)`` with the gradient of ``D(f')``."""
        written = [part.written(W_dec).to(y.device, y.dtype) for part, W_dec in sources]
        bias = self.weights.bias(features.read).to(y.device, y.dtype)
        recons = self.points["hook_sae_recons"](sum(written[1:], written[0]) + bias)
        if self.error == "drop":
            return recons
        with torch.no_grad():
            real = self._reconstruction(features.x, y, sources)
        return y.detach() + (recons - real) + self._error_change(y, real)

    def _reconstruction(self, x: torch.Tensor, y: torch.Tensor, sources: Sources) -> torch.Tensor:
        """``D(f)`` of the real features."""
        written = [f.really_written(W_dec).to(y.device, y.dtype) for f, W_dec in sources]
        return sum(written[1:], written[0]) + self.weights.bias(x).to(y.device, y.dtype)

    def _error_change(self, y: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """What hooks add to the error; it is a leaf that collects gradients."""
        if not listened(self.points, "hook_sae_error"):
            return torch.zeros_like(real)
        error = y.detach() - real
        return self.points["hook_sae_error"](leaf(error.clone())) - error

    def _check_width(self, x: torch.Tensor, hook: str, width: int) -> None:
        if x.shape[-1] != width:
            raise self._other_width(hook, width, x.shape[-1])

    def _other_width(self, hook: str, width: int, width_here: int) -> WidthMismatchError:
        return WidthMismatchError(
            f"The dictionary for {self.hook_out} has width {width}, "
            f"the model's {hook} has {width_here}",
            fix=f"a dictionary of this model; this one says {self.model_name}",
        )


class HookedLayer(HookedSite):
    """One layer of a cross-layer dictionary; its weights are opened when they are first needed.

    ``position`` is an index into ``dictionary.cfg.layers``.
    """

    def __init__(
        self,
        dictionary: CrossLayerDictionary,
        position: int,
        *,
        error: ErrorMode,
        exclude: str | int | Sequence[str | int],
        positions: Positions,
    ) -> None:
        cfg = dictionary.cfg
        super().__init__(
            cfg.hooks_in[position],
            cfg.hooks_out[position],
            error=error,
            exclude=exclude,
            positions=positions,
        )
        self.dictionary = dictionary
        self.position = position

    @property
    def weights(self) -> Weights:
        """Encoder, bias and skip of this layer."""
        return saes.layer_weights(self.dictionary, self.position)

    @property
    def d_sae(self) -> int:
        """Number of features that read this layer."""
        return self.dictionary.cfg.d_sae[self.position]

    @property
    def widths(self) -> tuple[int, int]:
        """``d_in`` and ``d_out``."""
        cfg = self.dictionary.cfg
        return cfg.d_in, cfg.d_out

    @property
    def model_name(self) -> str:
        """The model that the dictionary says it belongs to."""
        return self.dictionary.cfg.metadata.get("model_name") or "no model name"

    def decoder_from(self, position: int) -> Float[torch.Tensor, "d_sae d_out"]:
        """``W_dec_position[:, this layer]``, a view of the file."""
        return self.dictionary.weights(position).W_dec[:, self.position]


def _carry(base: torch.Tensor, features: PassFeatures, sources: Sources) -> torch.Tensor:
    """``base`` plus all that edits and hooks on input and features changed."""
    shifted = features.bias_change()
    if shifted is not None:
        base = base + shifted.to(base.device, base.dtype)
    for part, W_dec in sources:
        base = part.carry(base, W_dec)
    return base
