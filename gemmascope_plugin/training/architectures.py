"""Which architectures can be trained, by name, and how a spec becomes one of them.

A training class is any ``TrainingSAE`` of SAELens whose state lies in its parameters and buffers. An
entry says how it is built, which fields of the spec only some architectures read (setting one that this
one does not read is an error), and whether it reconstructs what it reads. Further architectures are
further entries, with a function in ``builders.py`` each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gemmascope_plugin.training.builders as builders
from gemmascope_plugin.errors import GemmaScopeError, check_choice
from gemmascope_plugin.training.train_spec import Scale, TrainSpec
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
    """The entry of a spec, whose fields it all reads.

    Raises:
        UnknownNameError: There is no such architecture.
        GemmaScopeError: A field is set that it does not read, or a combination that cannot be.
    """
    check_choice("architecture", spec.architecture, ARCHITECTURES)
    entry = ARCHITECTURES[spec.architecture]
    unset = TrainSpec(d_sae=spec.d_sae, layer=0)
    for name in sorted(set(SELECTIVE) - entry.uses):
        if getattr(spec, name) != getattr(unset, name):
            readers = [key for key, other in ARCHITECTURES.items() if name in other.uses]
            raise GemmaScopeError(
                f"{name}={getattr(spec, name)!r} means nothing to the architecture "
                f"{spec.architecture!r}",
                exists=f"{name} of {', '.join(readers)}",
                fix=f"leave {name} out",
            )
    if spec.scale == "layer_norm" and not entry.layer_norm:
        names = [name for name, other in ARCHITECTURES.items() if other.layer_norm]
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
    """The dictionary of a spec, freshly initialised from torch's random state.

    Args:
        spec: What to build.
        d_in: Width of what is read.
        d_out: Width of what is reconstructed.
        metadata: What SAELens' metadata shall say.

    Raises:
        GemmaScopeError: The architecture refuses the values.
    """
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
