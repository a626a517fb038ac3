"""The features of one tensor in one pass; nothing is computed before somebody needs it.

1. ``real``: the features of the tensor as it is, sparse and without a graph.
2. ``materialise``: the dense activations that hooks see. With the error kept they are a leaf; else they
   are in the graph of the tensor. Edits apply first, then hooks on ``hook_sae_acts_post``.
3. Without a listener, edited features alone are encoded: ``amounts`` are their ``a' - a``.

A cross-layer dictionary writes the same features through several decoders, so each write takes the
decoder it goes through. Where the dictionary has a scale for each token (``saes/coder.py``), feature
``i`` writes ``s * f_i * W_dec[i]``, and ``s * W_dec[i]`` carries its gradient; a hook on
``hook_sae_input`` changes ``s`` along with the features.

With the error kept the gradient is straight-through (Marks et al., arXiv 2403.19647): the stream passes
unchanged, value and gradient, and the features, which are leaves beside it, collect the gradient that
they would have if the stream were made of them, ``d out / d f_i = W_dec[i]``.

Cost: ``real`` and ``materialise`` one encode; ``amounts`` reads the touched encoder columns, or of a
tree, whose features decide together, all of them. Straight-through: forward nothing, or one addition
where features were changed; backward one product with ``W_dec``, without a buffer of a parameter's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from transformer_lens.hook_points import HookPoint

import gemmascope_plugin.saes as saes
from gemmascope_plugin.saes import Bf16Prefilter, Coder, SparseActs
from gemmascope_plugin.splice.edit import Edit, apply_edits, touched_features
from gemmascope_plugin.splice.edits import Project
from gemmascope_plugin.splice.window import Window

SUB_HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)
"""The hook points of one site of a dictionary."""


def listened(points: Mapping[str, HookPoint], *names: str) -> bool:
    """Whether any hook is attached to one of these points; to any of all without names."""
    chosen = (points[name] for name in names or SUB_HOOKS)
    return any(p._forward_hooks or p._backward_hooks for p in chosen)


def listened_backward(points: Mapping[str, HookPoint], *names: str) -> bool:
    """Whether a backward hook is attached to one of these points."""
    return any(points[name]._backward_hooks for name in names)


class PassFeatures:
    """Features of the tensor ``x`` (heads flattened) at a site with these hook points.

    The encoder is opened when it is first needed: ``coder`` gives it.
    """

    def __init__(
        self,
        coder: Callable[[], Coder],
        points: Mapping[str, HookPoint],
        x: Float[torch.Tensor, "batch pos d_in"],
        window: Window,
        edits: Sequence[Edit],
        *,
        two_stage: Bf16Prefilter | None = None,
    ) -> None:
        self.points = points
        self._coder, self._two_stage = coder, two_stage
        self._x = x
        self.tokens = window
        self.edits = [edit for edit in edits if not isinstance(edit, Project)]
        self.projections = [edit for edit in edits if isinstance(edit, Project)]
        self.edited: torch.Tensor | None = None
        """Dense activations after edits and hooks, once they are materialised."""
        self._real: SparseActs | None = None
        self._changed = True
        self._hooked: torch.Tensor | None = None

    @cached_property
    def weights(self) -> Coder:
        """What encodes; opened when first needed."""
        return self._coder()

    @cached_property
    def x(self) -> Float[torch.Tensor, "batch pos d_in"]:
        """The tensor that is read, where the encoder is."""
        return self._x.to(self.weights.W_enc.device)

    @cached_property
    def window(self) -> Window:
        """The tokens of the pass, where the encoder is."""
        return self.tokens.narrowed(self.tokens.keep.to(self.x.device))

    @property
    def keep(self) -> Bool[torch.Tensor, "batch pos"]:
        """False at excluded tokens."""
        return self.window.keep

    @property
    def writes(self) -> bool:
        """Whether edits or listeners make the features change the stream, or wait for gradients."""
        return bool(self.edits) or self.edited is not None

    @property
    def real(self) -> SparseActs:
        """What is active in the tensor itself, whatever edits and hooks make of it; no graph."""
        if self._real is None:
            with torch.no_grad():
                self._real = self._encode(self.x.detach())
        return self._real

    @property
    def touched(self) -> list[int] | None:
        """The edited features; None for all."""
        return touched_features(self.edits)

    @cached_property
    def amounts(self) -> tuple[Float[torch.Tensor, "batch pos k"], torch.Tensor | None]:
        """``a' - a`` of the edited features, in the graph of ``x``, and which they are; None for all."""
        features = self.touched
        if features is None:
            acts, index = self._encoded.to_dense(), None
            features = range(acts.shape[-1])
        else:
            index = torch.tensor(features, device=self.x.device)
            acts = self.weights.encode_features(self.x, index) * self.keep[..., None]
        return apply_edits(self.edits, acts, features, self.window) - acts, index

    def materialise(self, *, as_leaf: bool) -> None:
        """Computes the dense activations and shows them to the hooks.

        As a leaf they are cut off from ``x``, whose gradient the stream carries where the error is kept.
        """
        points, recording = self.points, torch.is_grad_enabled()
        upstream = not as_leaf or listened_backward(points, "hook_sae_input", "hook_sae_acts_pre")
        with torch.set_grad_enabled(recording and upstream):
            acts, rebuilt = self._activate(as_leaf)
        start = acts if acts.requires_grad else leaf(acts)
        edited = start
        if self.edits:
            edited = apply_edits(self.edits, start, range(acts.shape[-1]), self.window)
        version = _version(edited)
        self.edited = points["hook_sae_acts_post"](edited)
        same = self.edited is edited and version is not None and version == _version(edited)
        self._changed = bool(self.edits) or rebuilt or not same

    def carry(
        self,
        base: Float[torch.Tensor, "batch pos d_out"],
        W_dec: Float[torch.Tensor, "d_sae d_out"],
    ) -> Float[torch.Tensor, "batch pos d_out"]:
        """``base`` plus what edits and hooks changed, with the features beside it as leaves."""
        if self.edited is not None:
            change = self._change(W_dec)
            change = None if change is None else change.to(base.device, base.dtype)
            base = straight_through(base, self._scaled_constant(self.edited), change, W_dec)
        if self.edits and (self.edited is None or self.x.requires_grad):
            delta = self._scaled(saes.write_features(W_dec, *self.amounts), self.x)
            delta = delta.to(base.device, base.dtype)
            base = base + (delta if self.edited is None else gradient_only(delta))
        return base

    def written(
        self, W_dec: Float[torch.Tensor, "d_sae d_out"]
    ) -> Float[torch.Tensor, "batch pos d_out"]:
        """``s * sum_i a'_i W_dec[i]`` in the graph of ``x``."""
        if self.edited is None:
            out = saes.write(self._encoded, W_dec)
            if self.edits:
                out = out + saes.write_features(W_dec, *self.amounts).to(out.device)
        elif self.edited.requires_grad:
            out = self.edited.to(W_dec.device, W_dec.dtype) @ W_dec
        else:
            out = saes.write(SparseActs.from_dense(self.edited), W_dec)
        return self._scaled(out, self.read)

    def really_written(
        self, W_dec: Float[torch.Tensor, "d_sae d_out"]
    ) -> Float[torch.Tensor, "batch pos d_out"]:
        """``s * sum_i a_i W_dec[i]`` of the tensor as it is; no graph."""
        with torch.no_grad():
            return self._scaled(saes.write(self.real, W_dec), self.x)

    @property
    def read(self) -> Float[torch.Tensor, "batch pos d_in"]:
        """The tensor as hooks on ``hook_sae_input`` left it."""
        return self.x if self._hooked is None else self._hooked

    def bias_change(self) -> torch.Tensor | None:
        """What hooks on ``hook_sae_input`` changed in what is written besides features; value only."""
        if self._hooked is None or not self.weights.reads_input:
            return None
        with torch.no_grad():
            return self.weights.bias(self._hooked) - self.weights.bias(self.x)

    @cached_property
    def _encoded(self) -> SparseActs:
        """The same as ``real``, in the graph of ``x``."""
        recording = torch.is_grad_enabled() and self.x.requires_grad
        return self._encode(self.x) if recording else self.real

    def _encode(self, x: torch.Tensor) -> SparseActs:
        return self.weights.encode_sparse(x, keep=self.keep, two_stage=self._two_stage)

    def _scaled(self, written: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What features write, or the features, times each token's scale, in the graph of ``x``."""
        scale = self.weights.scale(x)
        return written if scale is None else written * scale.to(written.device, written.dtype)

    def _scaled_constant(self, acts: torch.Tensor) -> torch.Tensor:
        """Features times the scale; beside a kept error nothing flows through the scale."""
        return self._scaled(acts, self.read.detach())

    def _activate(self, as_leaf: bool) -> tuple[torch.Tensor, bool]:
        """Dense activations, and whether hooks on input or pre-activations changed them."""
        points = self.points
        if not listened(points, "hook_sae_input", "hook_sae_acts_pre"):
            recording = torch.is_grad_enabled() and self.x.requires_grad
            return (self._encoded if recording else self.real).to_dense(), False
        # A copy: a hook may write into what it gets, and the stream is not its own.
        x = leaf(self.x).clone() if as_leaf else self.x.clone()
        before = _version(x)
        read = self._hooked = points["hook_sae_input"](x)
        same = read is x and before is not None and before == _version(x)
        pre = self.weights.pre_activations(read)
        before = _version(pre)
        hooked = points["hook_sae_acts_pre"](pre)
        same = same and hooked is pre and before is not None and before == _version(pre)
        if same:  # what is active does not depend on who listens, down to the last bit
            return torch.where(self.real.to_dense() != 0, hooked, 0), False
        return self.weights.activate(hooked, read) * self.keep[..., None], True

    def _change(self, W_dec: torch.Tensor) -> torch.Tensor | None:
        """``sum_i (s' a'_i - s a_i) W_dec[i]``, value only, over the features that changed anywhere."""
        assert self.edited is not None, "features are not materialised"
        if not self._changed:
            return None
        with torch.no_grad():
            real = self._scaled(self.real.to_dense(), self.x)
            difference = self._scaled(self.edited.detach(), self.read) - real
            index = difference.flatten(0, -2).any(0).nonzero()[:, 0]
            if not len(index):
                return None
            return saes.write_features(W_dec, difference[..., index], index)


def _version(x: torch.Tensor) -> int | None:
    """Counts changes in place; None where torch does not count them."""
    return None if x.is_inference() else x._version


class _StraightThrough(torch.autograd.Function):
    """``base + change`` that is differentiable in ``base`` and, through ``W_dec``, in ``acts``."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        acts: torch.Tensor,
        change: torch.Tensor | None,
        W_dec: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_dec)
        ctx.acts = acts.device, acts.dtype
        return base.view_as(base) if change is None else base + change

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (W_dec,) = ctx.saved_tensors
        device, dtype = ctx.acts
        to_acts = grad.to(W_dec.device, W_dec.dtype) @ W_dec.T if ctx.needs_input_grad[1] else None
        return grad, None if to_acts is None else to_acts.to(device, dtype), None, None


def straight_through(
    base: Float[torch.Tensor, "batch pos d_out"],
    acts: Float[torch.Tensor, "batch pos d_sae"],
    change: Float[torch.Tensor, "batch pos d_out"] | None,
    W_dec: Float[torch.Tensor, "d_sae d_out"],
) -> Float[torch.Tensor, "batch pos d_out"]:
    """``base`` plus the value of ``change``; gradients to ``base`` and, by ``W_dec``, to ``acts``."""
    out = _StraightThrough.apply(base, acts, change, W_dec)
    assert isinstance(out, torch.Tensor)
    return out


def leaf(x: torch.Tensor) -> torch.Tensor:
    """The same values, cut off, collecting gradients where gradients are recorded."""
    return x.detach().requires_grad_(True) if torch.is_grad_enabled() else x


def gradient_only(x: torch.Tensor) -> torch.Tensor:
    """Zero that carries the gradient of ``x``."""
    return x - x.detach()
