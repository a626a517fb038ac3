"""Which architectures can be trained, by name, and how a spec becomes one of them.

A training class is any ``TrainingSAE`` of SAELens whose state lies in its parameters and buffers. An
entry says how it is built, which fields of the spec only some architectures read (setting one that this
one does not read is an error), and whether it reconstructs what it reads. Further architectures are
further entries, with a function in ``builders.py`` each.

Presets are specs by name, the published recipes and one for small models:

1. ``gemma-scope`` (arXiv 2408.05147, section 3): one squared norm for all inputs, the L0 penalty with a
   warm-up of 10,000 steps, bandwidth and first thresholds 0.001, unit decoder rows without a gradient
   along them, Adam (0, 0.999) at 7e-5 after a cosine warm-up, batches of 4,096 out of buckets of a
   million, no loss on dead features. The penalty's coefficients are not published: set
   ``sparsity_coefficient`` for the L0 that you want. Gradients are clipped, which the papers do not
   mention and ``max_grad_norm`` sets.
2. ``gemma-scope-2`` (its technical paper): the same with the quadratic penalty around ``target_l0``, a
   penalty on frequent features, transcoders that read the norm's output with its gain, and Gemma Scope
   2's files. With ``levels``, whose sizes are not published, a Matryoshka.
3. ``quick``: minutes on a CPU, for small models; close to what trained the bundled suite.

Values that the chosen architecture does not read are left out, the scale of activations is the one its
settings are meant for, and what the user says goes before the preset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gemmascope_plugin.training.builders as builders
from gemmascope_plugin.errors import GemmaScopeError, check_choice
from gemmascope_plugin.training.train_spec import Scale, TrainSpec, check_keys
from gemmascope_plugin.types import Kind

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

Builder = Callable[[TrainSpec, dict[str, Any]], "TrainingSAE[Any]"]
"""A spec and SAELens' common config fields (widths, device, metadata) to a dictionary."""

SPARSITY = ("sparsity_coefficient", "sparsity_warm_up")
SELECTIVE = (
    *(*SPARSITY, "sparsity", "bandwidth", "init_threshold"),
    *("levels", "subtract_b_dec", "options", "gain", "layers"),
)
"""Fields of a spec that only some architectures read."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build one, and what it reads."""

    build: Builder
    uses: frozenset[str]
    """Those of ``SELECTIVE`` that it reads."""
    kind: Kind = "sae"
    layer_norm: bool = False
    """Whether its losses hold for inputs normalised token by token."""
    scale: Scale = "sqrt_d"
    """The scale of activations that its published settings are meant for."""
    ghost: bool = True
    """Whether its pre-activations and decoder rows are in the units that ghost gradients need."""


def architecture(spec: TrainSpec) -> Architecture:
    """The entry of a spec, whose fields it all reads."""
    check_choice("architecture", spec.architecture, ARCHITECTURES)
    entry = ARCHITECTURES[spec.architecture]
    unset = TrainSpec(d_sae=spec.d_sae, layer=0)
    for name in sorted(set(SELECTIVE) - entry.uses):
        if getattr(spec, name) != getattr(unset, name):
            readers = [key for key, item in ARCHITECTURES.items() if name in item.uses]
            raise GemmaScopeError(
                f"{name}={getattr(spec, name)!r} means nothing to the architecture "
                f"{spec.architecture!r}",
                exists=f"{name} of {', '.join(readers)}",
                fix=f"leave {name} out",
            )
    if spec.scale == "layer_norm" and not entry.layer_norm:
        names = [name for name, item in ARCHITECTURES.items() if item.layer_norm]
        raise GemmaScopeError(
            f"A {spec.architecture!r} cannot be trained on layer-normed input",
            exists="scale='sqrt_d' or 'unit'; scale='layer_norm' for " + ", ".join(names),
        )
    if spec.dead_features == "ghost" and not entry.ghost:
        raise GemmaScopeError(
            f"A {spec.architecture!r} has no pre-activations that ghost gradients could flow through",
            exists="dead_features='auxiliary' or 'none'",
        )
    return entry


def build(spec: TrainSpec, d_in: int, d_out: int, metadata: dict[str, Any]) -> TrainingSAE[Any]:
    """The dictionary of a spec, freshly initialised from torch's random state."""
    from sae_lens.saes.sae import SAEMetadata

    entry = architecture(spec)
    common: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": spec.d_sae,
        "apply_b_dec_to_input": spec.subtract_b_dec,
        "normalize_activations": "layer_norm" if spec.scale == "layer_norm" else "none",
        "reshape_activations": "hook_z" if metadata["hook_name"].endswith("hook_z") else "none",
        "metadata": SAEMetadata(**metadata),
    }
    if entry.kind != "sae":
        common["d_out"] = d_out
    if spec.layers:
        reads, writes = spec.sites(entry.kind)
        common |= {"layers": spec.layers, "hooks_in": reads, "hooks_out": writes}
    try:
        return entry.build(spec, common)
    except (TypeError, ValueError) as fault:
        raise GemmaScopeError(f"SAELens refuses this {spec.architecture!r}: {fault}") from fault


_JUMPRELU = frozenset(
    {*SPARSITY, "bandwidth", "init_threshold", "sparsity", "subtract_b_dec", "options"}
)
_TOPK = frozenset({"options", "subtract_b_dec"})
_PAIRS = _JUMPRELU - {"subtract_b_dec"} | {"gain"}
_LAYERS = _JUMPRELU - {"subtract_b_dec"} | {"layers"}
_TREE = _TOPK | {*SPARSITY, "levels", "bandwidth", "init_threshold"}

ARCHITECTURES: dict[str, Architecture] = {
    "jumprelu": Architecture(build=builders.jumprelu, uses=_JUMPRELU, layer_norm=True),
    "gemma_scope_jumprelu": Architecture(build=builders.gemma_scope, uses=_JUMPRELU),
    "standard": Architecture(build=builders.standard, uses=_TOPK | {*SPARSITY}),
    "topk": Architecture(build=builders.topk, uses=_TOPK),
    "batchtopk": Architecture(build=builders.batchtopk, uses=_TOPK),
    "matryoshka_batchtopk": Architecture(
        build=builders.saelens_matryoshka, uses=_TOPK | {"levels"}
    ),
    "matryoshka_prefix_batchtopk": Architecture(
        build=builders.matryoshka_batchtopk, uses=_TOPK | {"levels"}
    ),
    "matryoshka_prefix_jumprelu": Architecture(
        build=builders.matryoshka_jumprelu, uses=_JUMPRELU | {"levels"}
    ),
    "tree": Architecture(
        build=builders.tree, uses=_TREE, layer_norm=True, scale="layer_norm", ghost=False
    ),
    "softsae": Architecture(build=builders.soft, uses=_TOPK, layer_norm=True, ghost=False),
    "soft_topk": Architecture(build=builders.soft_topk, uses=_TOPK, ghost=False),
    "jumprelu_transcoder": Architecture(build=builders.transcoder, uses=_PAIRS, kind="transcoder"),
    "jumprelu_skip_transcoder": Architecture(
        build=builders.transcoder, uses=_PAIRS, kind="transcoder"
    ),
    # Ghost gradients would reach the part of the decoder that must stay zero.
    "jumprelu_crosscoder": Architecture(
        build=builders.crosscoder, uses=_LAYERS, kind="crosscoder", ghost=False
    ),
    "jumprelu_clt": Architecture(
        build=builders.clt, uses=_LAYERS | {"gain"}, kind="clt", ghost=False
    ),
}
"""Name to how it is built."""


def preset_spec(name: str, values: Mapping[str, Any]) -> TrainSpec:
    """A preset with some fields chosen.

    Args:
        name: One of ``PRESETS``.
        values: Fields that go before those of the preset, at least the site.

    Raises:
        UnknownNameError: No such preset, architecture or field.
        GemmaScopeError: A value of another type or out of range.
    """
    check_choice("preset", name, PRESETS)
    check_keys(values)
    recipe: dict[str, Any] = PRESETS[name](dict(values))
    architecture = values.get("architecture", recipe.get("architecture", "jumprelu"))
    check_choice("architecture", architecture, ARCHITECTURES)
    entry = ARCHITECTURES[architecture]
    unread = set(SELECTIVE) - entry.uses
    usable = {key: value for key, value in recipe.items() if key not in unread}
    options = {**recipe.get("options", {}), **values.get("options", {})}
    chosen = {"options": options} if options else {}
    return TrainSpec.from_dict({"scale": entry.scale, **usable, **values, **chosen})


def _quick(values: dict[str, Any]) -> dict[str, Any]:
    steps, lr = values.get("steps", 2000), values.get("lr", 2e-3)
    whole = isinstance(steps, int)
    selects = any(word in values.get("architecture", "") for word in ("topk", "soft"))
    return {
        "d_sae": 512,
        "steps": steps,
        "lr": lr,
        "lr_end": lr / 50 if isinstance(lr, float) else None,
        "lr_warm_up": steps // 50 if whole else 0,
        "sparsity_warm_up": steps // 4 if whole else 0,
        "context": 64,
        "rows": 128,
        # Features that lose the competition in a short run have no time to come back by themselves.
        "dead_after": max(1, steps // 20) if whole else 100,
        "dead_coefficient": 1.0 if selects else None,
    }


def _gemma_scope(_: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "gemma_scope_jumprelu",
        "d_sae": 1 << 14,
        "scale": "unit",
        "sparsity": "step",
        "target_l0": 71.0,
        "sparsity_coefficient": 1e-3,
        "sparsity_warm_up": 10_000,
        "bandwidth": 0.001,
        "init_threshold": 0.001,
        "subtract_b_dec": True,
        "lr": 7e-5,
        "lr_warm_up": 1000,
        "beta1": 0.0,
        "batch_size": 4096,
        "steps": 977_000,
        "bucket": 1_000_000,
        "dead_features": "none",
        "dead_after": 2500,
    }


def _gemma_scope_2(values: dict[str, Any]) -> dict[str, Any]:
    usual = "matryoshka_prefix_jumprelu" if values.get("levels") else "gemma_scope_jumprelu"
    coefficient = values.get("sparsity_coefficient", 1e-3)
    penalised = values.get("architecture", usual) == usual
    return _gemma_scope(values) | {
        "architecture": usual,
        "options": {"frequency_coefficient": coefficient} if penalised else {},
        "sparsity": "quadratic",
        "target_l0": 60.0,
        "sparsity_warm_up": 50_000,
        "gain": "with",
        "layout": "gemma-scope-2",
    }


PRESETS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "quick": _quick,
    "gemma-scope": _gemma_scope,
    "gemma-scope-2": _gemma_scope_2,
}
"""Name to what it sets, given what the user has set."""
