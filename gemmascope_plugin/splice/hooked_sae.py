"""A dictionary with hook points, run at its site.

What flows on, with ``y`` the tensor at the output site, ``f`` the features of the tensor at the input
site, ``f'`` the edited ones, ``D(f) = f @ W_dec + b_dec`` (plus ``x @ A`` for a transcoder with an
affine skip, whatever the edits) and ``e = y - D(f)``:

* ``keep``: ``D(f') + e``. Value and gradient are those of the real model: ``f`` and ``e`` are leaves
  that collect gradients, and ``y`` receives the full gradient of the output (straight-through, Marks
  et al., arXiv 2403.19647) plus, exactly, what flows through the edited features.
* ``drop``: ``D(f')``; the gradient goes through encoder and decoder.
* ``detach``: ``D(f') + e`` with ``e`` a constant, as SAELens' ``use_error_term=True``; the gradient
  upstream of it is *wrong* by design and kept for comparison only.

Excluded tokens keep ``y`` in every mode and have no active feature.

Cost: with the error kept and nobody listening at a hook point, only the edited features are encoded
(nothing at all without edits); otherwise one encode and one or two decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from transformer_lens.hook_points import HookPoint

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import MissingHookError, WidthMismatchError, check_choice
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.splice.edits import Edit, apply_edits, touched_features
from gemmascope_plugin.types import ErrorMode

SUB_HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)


class HookedSAE(torch.nn.Module):
    """Gives an SAE or transcoder its hook points and runs it at its site.

    Args:
        sae: SAELens ``JumpReLUSAE``, ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``; its
            parameters are frozen.
        error: What becomes of the reconstruction error, see the module's first lines.
        exclude: Special tokens by name (``"bos"``, ``"eos"``, ``"pad"``) or id that are left alone.
            Gemma Scope was trained without them.

    Raises:
        ModelError: The dictionary is not plain JumpReLU.
        MissingHookError: The dictionary does not say which hooks it belongs to.
        UnknownNameError: An unknown error mode.
    """

    def __init__(
        self,
        sae: Any,
        *,
        error: ErrorMode = "keep",
        exclude: Sequence[str | int] = ("bos", "eos", "pad"),
    ) -> None:
        super().__init__()
        saes.check_architecture(sae)
        check_choice("error mode", error, get_args(ErrorMode))
        self.sae = sae.requires_grad_(False).eval()
        self.error: ErrorMode = error
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.hook_in, self.hook_out = _site(sae)
        for name in SUB_HOOKS:
            point = HookPoint()
            point.name = f"{self.hook_out}.{name}"
            self.add_module(name, point)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.sae.cfg.d_sae)

    @property
    def is_transcoder(self) -> bool:
        """Whether input and output are different tensors."""
        return self.hook_in != self.hook_out

    def sub_hook(self, name: str) -> HookPoint:
        """One of the hook points in ``SUB_HOOKS``."""
        point = self.get_submodule(name)
        assert isinstance(point, HookPoint), f"{name} is not a hook point"
        return point

    def __repr__(self) -> str:
        route = self.hook_out if not self.is_transcoder else f"{self.hook_in} -> {self.hook_out}"
        return (
            f"HookedSAE({route}, d_in={self.sae.cfg.d_in}, d_sae={self.d_sae}, "
            f"error={self.error!r}, exclude={self.exclude})"
        )

    def forward(
        self,
        x: Float[torch.Tensor, "batch pos ..."],
        y: Float[torch.Tensor, "batch pos ..."],
        keep: Bool[torch.Tensor, "batch pos"],
        edits: Sequence[Edit] = (),
    ) -> Float[torch.Tensor, "batch pos ..."]:
        """The tensor that takes the place of ``y``.

        Args:
            x: Tensor at the input site.
            y: Tensor at the output site; the same tensor as ``x`` for an SAE.
            keep: False at excluded tokens.
            edits: Edits of this dictionary's features, already checked.

        Raises:
            WidthMismatchError: ``x`` or ``y`` has another width than the dictionary.
        """
        x_flat, y_flat = flatten_heads(x), flatten_heads(y)
        self._check_width(x_flat, self.hook_in, self.sae.W_enc.shape[0])
        self._check_width(y_flat, self.hook_out, self.sae.W_dec.shape[1])
        if self.error == "keep" and not self._listened():
            if not edits:
                return y
            change = self._edit_delta(
                edits, lambda index: saes.encode_features(self.sae, x_flat, index) * keep[..., None]
            )
            out = y_flat + change.to(y_flat.dtype)
        else:
            out = self._full(x_flat, y_flat, keep, edits)
        return restore_heads(torch.where(keep[..., None], out, y_flat), y)

    def _full(
        self, x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor, edits: Sequence[Edit]
    ) -> torch.Tensor:
        read = self.sub_hook("hook_sae_input")(x)
        unhooked = saes.pre_activations(self.sae, read)
        pre = self.sub_hook("hook_sae_acts_pre")(unhooked)
        acts = saes.jump(pre, self.sae.threshold) * keep[..., None]
        # the wider type, so that a narrow dictionary does not round the stream
        target = y.to(torch.promote_types(y.dtype, acts.dtype))
        with torch.no_grad():
            # the error is that of the real features, whatever hooks made of input and pre-activations
            same = read is x and pre is unhooked
            real = acts if same else saes.encode(self.sae, x) * keep[..., None]
            recons = saes.decode(self.sae, real, x)
            error = target - recons
        start = _leaf(acts, detach=self.error == "keep")
        edited = start
        if edits:
            edited = apply_edits(edits, start, range(self.d_sae)) * keep[..., None]
        edited = self.sub_hook("hook_sae_acts_post")(edited)
        # With the error kept, y carries the whole gradient already, that of the skip included.
        skipped = read.detach() if self.error == "keep" else read
        out = self.sub_hook("hook_sae_recons")(saes.decode(self.sae, edited, skipped))
        if self.error != "drop":
            # Written as differences, so that what nobody changed adds exactly nothing to the stream.
            changes = self.sub_hook("hook_sae_error")(_leaf(error, detach=True)) - error
            out = (target if self.error == "keep" else target.detach()) + (out - recons) + changes
        if self.error == "keep" and edits and acts.requires_grad:
            out = out + _no_value(self._edit_delta(edits, lambda index: acts[..., index]))
        return self.sub_hook("hook_sae_output")(out.to(y.dtype))

    def _edit_delta(
        self, edits: Sequence[Edit], acts_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> Float[torch.Tensor, "batch pos d_out"]:
        """``sum_i (a'_i - a_i) W_dec[i]`` over the edited features, which alone are asked for."""
        features = touched_features(edits)
        index = torch.tensor(features, device=self.sae.W_enc.device)
        acts = acts_of(index)
        return saes.write_features(self.sae, apply_edits(edits, acts, features) - acts, index)

    def _listened(self) -> bool:
        """Whether any hook is attached to one of the sub-hooks."""
        return any(
            self.sub_hook(name)._forward_hooks or self.sub_hook(name)._backward_hooks
            for name in SUB_HOOKS
        )

    def _check_width(self, x: torch.Tensor, hook: str, width: int) -> None:
        if x.shape[-1] != width:
            raise WidthMismatchError(
                f"The dictionary for {self.hook_out} has width {width}, "
                f"the model's {hook} has {x.shape[-1]}",
                fix=f"a dictionary of this model; this one says "
                f"{self.sae.cfg.metadata.model_name or 'no model name'}",
            )


def _site(sae: Any) -> tuple[str, str]:
    """Input and output hook that the dictionary names."""
    hook_in = sae.cfg.metadata.hook_name
    if not hook_in:
        raise MissingHookError(
            "The dictionary does not say which hook it belongs to",
            fix="gemmascope_plugin.load(spec), or set sae.cfg.metadata.hook_name",
        )
    hook_out = sae.cfg.metadata.hook_name_out
    if not hook_out and "transcoder" in sae.cfg.architecture():
        raise MissingHookError(
            f"The transcoder reads {hook_in} and does not say which hook it writes to",
            fix="gemmascope_plugin.load(spec), or set sae.cfg.metadata.hook_name_out",
        )
    return hook_in, hook_out or hook_in


def _leaf(x: torch.Tensor, *, detach: bool) -> torch.Tensor:
    """A tensor that collects gradients: cut off, or in its graph if it has one."""
    if not torch.is_grad_enabled():
        return x
    return x.detach().requires_grad_(True) if detach or not x.requires_grad else x


def _no_value(x: torch.Tensor) -> torch.Tensor:
    """Zero that carries the gradient of ``x``."""
    return x - x.detach()
