"""What can be patched, by component name: where it is written, where it is read, how it is indexed.

================== ======================================= ============================= ===========
component          what it is                              hook                          axes
================== ======================================= ============================= ===========
resid_pre          stream before a block                   ``hook_resid_pre``            pos
resid_mid          stream between attention and MLP        ``hook_attn_out``, see below  pos
resid_post         stream after a block                    ``hook_resid_post``           pos
attn_out, mlp_out  what is added, after Gemma's post-norms ``hook_attn_out`` ...         pos
z, q               per query head                          ``attn.hook_z``, ``hook_q``   head, pos
k, v               per *key-value* head, before rotation   ``attn.hook_k``, ``hook_v``   head, pos
pattern            attention after the softmax, by query   ``attn.hook_pattern``         head, pos
neuron             input of the MLP's down projection      ``mlp.hook_post``             neuron, pos
ln1_scale ...      what a norm divides by                  ``ln1.hook_scale`` ...        pos
ln_final_scale     the same of the last norm               ``ln_final.hook_scale``       pos
feature            features of spliced dictionaries        ``hook_sae_acts_post``        pos
error              their whole reconstruction errors       ``hook_sae_error``            pos
================== ======================================= ============================= ===========

All but the last three also have the axis ``layer``; features have ``feature``, errors ``site``.

``resid_mid`` is read at ``hook_resid_mid`` and written through ``hook_attn_out``: on
``TransformerBridge`` an edit at ``hook_resid_mid`` reaches the MLP and not the stream beside it.

**Stream time** is when a hook's tensor has been added to the residual stream, in half layers. The
embedding comes at -1, the attention of layer ``L`` at ``2 L``, its MLP at ``2 L + 1``. The stream at a
hook has the number of what was added to it last, so it contains all that is not later.

Features and errors need a model with dictionaries spliced in, their error kept: ``patchable`` makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.hooked_sae import HookedCrossLayer, HookedSAE, Saes, as_list
from gemmascope_plugin.splice.hooked_site import HookedSite
from gemmascope_plugin.splice.spliced_model import SplicedModel
from gemmascope_plugin.splice.splicing import splice

Runner = HookedModel | SplicedModel
"""A model, or one with dictionaries spliced in."""


@dataclass(frozen=True)
class Component:
    """One kind of activation."""

    hook: str
    """Where it is written: a template of ``layer``, or of ``site`` for dictionaries."""
    dims: tuple[str, ...]
    """What the dimensions after the batch are, as far as they can be chosen from."""
    axes: tuple[str, ...]
    """Of an effect, by default."""
    width: str | None = "d_model"
    """What is left after ``dims``; None for single numbers."""
    reads: str | None = None
    """Where it is read, if elsewhere."""

    @property
    def place(self) -> str | None:
        """The axis that says which hook: ``layer``, ``feature``, ``site``, or None for one hook."""
        if "{layer}" in self.hook:
            return "layer"
        if "{site}" in self.hook:
            return "feature" if "feature" in self.dims else "site"
        return None

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Every axis that an effect may have."""
        return tuple(dict.fromkeys((*([self.place] if self.place else []), *self.axes, *self.dims)))


def _stream(hook: str, reads: str | None = None) -> Component:
    return Component(f"blocks.{{layer}}.{hook}", ("pos",), ("layer", "pos"), reads=reads)


def _heads(hook: str) -> Component:
    template = f"blocks.{{layer}}.attn.{hook}"
    return Component(template, ("pos", "head"), ("layer", "head"), "d_head")


def _scale(norm: str) -> Component:
    return Component(f"blocks.{{layer}}.{norm}.hook_scale", ("pos",), ("layer", "pos"), width=None)


COMPONENTS: dict[str, Component] = {
    "resid_pre": _stream("hook_resid_pre"),
    "resid_mid": _stream("hook_attn_out", reads="blocks.{layer}.hook_resid_mid"),
    "resid_post": _stream("hook_resid_post"),
    "attn_out": _stream("hook_attn_out"),
    "mlp_out": _stream("hook_mlp_out"),
    "z": _heads("hook_z"),
    "q": _heads("hook_q"),
    "k": _heads("hook_k"),
    "v": _heads("hook_v"),
    "pattern": Component(
        "blocks.{layer}.attn.hook_pattern", ("head", "pos"), ("layer", "head"), "pos"
    ),
    "neuron": Component(
        "blocks.{layer}.mlp.hook_post", ("pos", "neuron"), ("layer", "neuron"), width=None
    ),
    "ln1_scale": _scale("ln1"),
    "ln1_post_scale": _scale("ln1_post"),
    "ln2_scale": _scale("ln2"),
    "ln2_post_scale": _scale("ln2_post"),
    "ln_final_scale": Component("ln_final.hook_scale", ("pos",), ("pos",), width=None),
    "feature": Component("{site}.hook_sae_acts_post", ("pos", "feature"), ("feature",), width=None),
    "error": Component("{site}.hook_sae_error", ("pos",), ("site",)),
}


AFTER = 1 << 30
"""In place of a layer, after all of them."""


def sizes_of(model: HookedModel, component: str, n_pos: int) -> dict[str, int]:
    """How many layers, heads, positions and neurons there are to choose from."""
    cfg = model.cfg
    heads = int(cfg.n_heads)
    if component in ("k", "v"):
        heads = int(getattr(cfg, "n_key_value_heads", None) or heads)
    return {"layer": int(cfg.n_layers), "head": heads, "pos": n_pos, "neuron": int(cfg.d_mlp)}


def layer_of(hook: str) -> int:
    """The layer of a hook or site in a block; -1 before the blocks, more than any layer after them."""
    if hook.startswith("blocks."):
        return int(hook.split(".")[1])
    return AFTER if hook.startswith(("ln_final", "unembed")) else -1


WRITTEN = (
    *("hook_embed", "attn.hook_z", "hook_attn_out", "hook_mlp_out"),
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
)
"""Hooks of what is added to the stream, and of the stream itself."""

_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_WITHIN = {
    "hook_resid_pre": -1,
    "attn.hook_z": 0,
    "hook_attn_out": 0,
    "hook_resid_mid": 0,
    "hook_mlp_out": 1,
    "hook_resid_post": 1,
}


def stream_time(hook: str) -> int:
    """The half layer at which the tensor at a hook is complete and in the stream."""
    if hook == "hook_embed":
        return -1
    match = _HOOK.fullmatch(hook)
    if match is None or match[2] not in _WITHIN:
        raise ModelError(
            f"What is at {hook} is not added to the residual stream", exists=", ".join(WRITTEN)
        )
    return 2 * int(match[1]) + _WITHIN[match[2]]


def is_z(hook: str) -> bool:
    """Whether the tensor is that of the heads, before ``W_O`` and the norm after attention."""
    return hook.endswith(".attn.hook_z")


def is_stream(hook: str) -> bool:
    """Whether the tensor is the stream itself, all that was written so far."""
    return ".hook_resid_" in hook


def acts_hook(site: str) -> str:
    """Hook of the feature activations of the dictionary at ``site``."""
    return COMPONENTS["feature"].hook.format(site=site)


def needs_dictionaries(component: str) -> bool:
    """Whether a component belongs to dictionaries and not to the model itself."""
    return "{site}" in COMPONENTS[component].hook


def sites_in(runner: Runner) -> Mapping[str, HookedSite]:
    """The sites of the dictionaries that are spliced in, by name."""
    return runner.sites if isinstance(runner, SplicedModel) else {}


def excluded(sites: Iterable[HookedSite]) -> tuple[str | int, ...]:
    """The tokens that any of the dictionaries leaves alone."""
    return tuple(dict.fromkeys(token for site in sites for token in site.exclude))


@contextmanager
def patchable(model: HookedModel, component: str, saes: Saes) -> Iterator[Runner]:
    """The model itself, or spliced with the error kept when features or errors are to be patched."""
    if not needs_dictionaries(component):
        yield model
        return
    if saes is None:
        raise UnknownNameError(
            f'component="{component}" needs dictionaries',
            fix="saes=[gemmascope_plugin.load(spec)]",
        )
    # A dictionary that was wrapped for another error mode is wrapped again: here the error is kept.
    hooked = [
        sae.with_error("keep") if isinstance(sae, (HookedSAE, HookedCrossLayer)) else sae
        for sae in as_list(saes)
    ]
    with splice(model, hooked) as spliced:
        yield spliced
