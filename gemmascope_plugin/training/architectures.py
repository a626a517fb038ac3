"""Which architectures can be trained, by name, and how a spec becomes one of them.

1. A row of ``ARCHITECTURES`` has a training class, any ``TrainingSAE`` of SAELens whose state lies in its
   parameters and buffers, its config, what the spec says in the words of that config, which fields of
   the spec it reads (setting one that it does not read is an error), and what it maps. A further
   architecture is a further row.
2. ``build`` gives every config the common fields (widths, metadata).
3. Where a paper counts in its own hundred thousand steps (SoftSAE's and Tree SAE's schedules), the shares
   of the training are kept, so that a short run has the same phases.
4. ``options`` of the spec go before what is usual, but a field that the spec sets by another name is
   refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sae_lens
from sae_lens.saes.sae import SAEMetadata

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError, check_choice, nearest
from gemmascope_plugin.saes.training.transcoder_training import (
    JumpReLUTrainingTranscoder,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from gemmascope_plugin.training.train_spec import Scale, TrainSpec
from gemmascope_plugin.types import Kind

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

Values = dict[str, Any]
"""Fields of a config."""

SPARSITY = ("sparsity_coefficient", "sparsity_warm_up")
SELECTIVE = (
    *(*SPARSITY, "sparsity", "bandwidth", "init_threshold"),
    *("levels", "subtract_b_dec", "options", "gain", "layers"),
)
"""Fields of a spec that only some architectures read."""

_ROOT_SHARE = 0.8
"""Share of the active features that the first layer of a Tree SAE has in the published runs."""


@dataclass(frozen=True)
class Architecture:
    """How to build one, and what it reads."""

    sae_class: type[TrainingSAE[Any]]
    config_class: type[Any]
    values: Callable[[TrainSpec], Values]
    """What the spec says, as fields of the config, which ``options`` cannot change."""
    uses: frozenset[str]
    """Those of ``SELECTIVE`` that it reads."""
    _: KW_ONLY
    usual: Callable[[TrainSpec], Values] = lambda spec: {}
    """Fields that ``options`` can change."""
    kind: Kind = "sae"
    layer_norm: bool = False
    """Whether its losses hold for inputs normalised token by token."""
    scale: Scale = "sqrt_d"
    """The scale of activations that its published settings are meant for."""
    ghost: bool = True
    """Whether its pre-activations and decoder rows are in the units that ghost gradients need."""


def architecture(spec: TrainSpec) -> Architecture:
    """The row of a spec, whose fields it all reads."""
    check_choice("architecture", spec.architecture, ARCHITECTURES)
    row = ARCHITECTURES[spec.architecture]
    unset = TrainSpec(d_sae=spec.d_sae, layer=0)
    for name in sorted(set(SELECTIVE) - row.uses):
        if getattr(spec, name) != getattr(unset, name):
            readers = [key for key, item in ARCHITECTURES.items() if name in item.uses]
            raise GemmaScopeError(
                f"{name}={getattr(spec, name)!r} means nothing to the architecture "
                f"{spec.architecture!r}",
                exists=f"{name} of {', '.join(readers)}",
                fix=f"leave {name} out",
            )
    if spec.scale == "layer_norm" and not row.layer_norm:
        names = [name for name, item in ARCHITECTURES.items() if item.layer_norm]
        raise GemmaScopeError(
            f"A {spec.architecture!r} cannot be trained on layer-normed input",
            exists="scale='sqrt_d' or 'unit'; scale='layer_norm' for " + ", ".join(names),
        )
    if spec.dead_features == "ghost" and not row.ghost:
        raise GemmaScopeError(
            f"A {spec.architecture!r} has no pre-activations that ghost gradients could flow through",
            exists="dead_features='auxiliary' or 'none'",
        )
    return row


def build(spec: TrainSpec, d_in: int, d_out: int, metadata: dict[str, Any]) -> TrainingSAE[Any]:
    """The dictionary of a spec, freshly initialised from torch's random state."""
    row = architecture(spec)
    values: Values = {
        "d_in": d_in,
        "d_sae": spec.d_sae,
        "apply_b_dec_to_input": spec.subtract_b_dec,
        "normalize_activations": "layer_norm" if spec.scale == "layer_norm" else "none",
        "reshape_activations": "hook_z" if metadata["hook_name"].endswith("hook_z") else "none",
        "metadata": SAEMetadata(**metadata),
    }
    if row.kind != "sae":
        values["d_out"] = d_out
    if spec.layers:
        reads, writes = spec.sites(row.kind)
        values |= {"layers": spec.layers, "hooks_in": reads, "hooks_out": writes}
    try:
        values |= row.values(spec)
        if "matryoshka_widths" in values:  # SAELens saves a plain JumpReLU, which has no levels
            values["metadata"].levels = values["matryoshka_widths"]
        _check_options(spec, row.config_class, values)
        return row.sae_class(row.config_class(**{**row.usual(spec), **values, **spec.options}))
    except (TypeError, ValueError) as fault:
        raise GemmaScopeError(f"SAELens refuses this {spec.architecture!r}: {fault}") from fault


def _check_options(spec: TrainSpec, config_class: type[Any], values: Values) -> None:
    """Refuses options that the config does not have, or that the spec sets."""
    free = {field.name for field in fields(config_class)} - set(values) - {"dtype", "device"}
    for name in spec.options:
        if name not in free:
            raise UnknownNameError(
                f"{name!r} is not an option of the architecture {spec.architecture!r}",
                exists=", ".join(sorted(free)),
                nearest=nearest(name, free),
            )


def _dead_coefficient(spec: TrainSpec, usual: float) -> float:
    """Coefficient of an architecture's own loss on dead features; 0 where it is not used."""
    if spec.dead_features != "auxiliary":
        return 0.0
    return usual if spec.dead_coefficient is None else float(spec.dead_coefficient)


def _whole_k(spec: TrainSpec) -> int:
    """``target_l0`` as a number of features."""
    if spec.target_l0 != int(spec.target_l0):
        raise GemmaScopeError(
            f"target_l0={spec.target_l0} is not a number of features",
            exists=f"whole numbers for {spec.architecture!r}",
            fix="architecture='batchtopk', whose k is a mean over the batch",
        )
    return int(spec.target_l0)


def _levels(spec: TrainSpec, noun: str = "Matryoshka") -> tuple[int, ...]:
    """The prefix sizes, of which there must be several."""
    if len(spec.levels) < 2:
        raise GemmaScopeError(
            f"levels={spec.levels} do not make a {noun}",
            fix=f"levels=({max(1, spec.d_sae // 8)}, {spec.d_sae})",
        )
    return spec.levels


def _standard(spec: TrainSpec) -> Values:
    """An L1 penalty, whose coefficient decides the L0, whatever ``target_l0``."""
    return {
        "l1_coefficient": float(spec.sparsity_coefficient),
        "l1_warm_up_steps": spec.sparsity_warm_up,
    }


def _jumprelu(spec: TrainSpec) -> Values:
    return {
        "jumprelu_init_threshold": spec.init_threshold,
        "jumprelu_bandwidth": spec.bandwidth,
        "jumprelu_sparsity_loss_mode": spec.sparsity,
        "target_l0": float(spec.target_l0),
        "l0_coefficient": float(spec.sparsity_coefficient),
        "l0_warm_up_steps": spec.sparsity_warm_up,
        "pre_act_loss_coefficient": _dead_coefficient(spec, 1e-3) or None,
    }


def _batchtopk(spec: TrainSpec) -> Values:
    return {"k": float(spec.target_l0), "aux_loss_coefficient": _dead_coefficient(spec, 1 / 32)}


def _topk(spec: TrainSpec) -> Values:
    return _batchtopk(spec) | {"k": _whole_k(spec)}


def _tree_sizes(spec: TrainSpec) -> list[int]:
    """Privilege layers: the features between two levels."""
    return [b - a for a, b in pairwise((0, *_levels(spec, "tree")))]


def _tree(spec: TrainSpec) -> Values:
    return {
        "features_per_layer": _tree_sizes(spec),
        "aux_coefficient": _dead_coefficient(spec, 1 / 32),
        "dead_after_tokens": spec.dead_after * spec.batch_size,
        "l0_coefficient": float(spec.sparsity_coefficient),
        "l0_warm_up_steps": spec.sparsity_warm_up,
        "threshold_init": spec.init_threshold,
        "bandwidth": spec.bandwidth,
    }


def _tree_usual(spec: TrainSpec) -> Values:
    """Of the paper's 97,657 steps: the first interval 3,000, the longest 10,000, frozen at 50,000."""
    sizes, first = _tree_sizes(spec), max(1, spec.steps * 3 // 100)
    return {
        "k_per_layer": _k_per_layer(_whole_k(spec), sizes),
        "k_aux": min(256, sizes[0]),
        "parent_within_tokens": 10 * spec.batch_size,
        "first_reallocation": first,
        "longest_interval": max(first, spec.steps // 10),
        "freeze_step": spec.steps // 2,
    }


def _k_per_layer(k: int, sizes: Sequence[int]) -> list[int]:
    """Active features of each layer: four fifths in the first, the others in equal parts."""
    others = len(sizes) - 1
    rest = [max(1, round(k * (1 - _ROOT_SHARE) / others))] * others
    if k <= sum(rest):
        raise GemmaScopeError(
            f"target_l0={k} is too little for {len(sizes)} layers",
            fix="a larger target_l0, or options={'k_per_layer': [...]}",
        )
    return [min(n, size) for n, size in zip([k - sum(rest), *rest], sizes, strict=True)]


def _soft(spec: TrainSpec) -> Values:
    return _batchtopk(spec) | {"total_steps": spec.steps}


def _soft_usual(spec: TrainSpec) -> Values:
    """Phases that short trainings need longer shares for than the paper's.

    At the paper's last ``alpha`` of 1e-4 the gradient of the selection is that of a handful of scores;
    a few thousand steps need more of them, and more hard steps after.
    """
    usual: Values = {"alpha_steps": spec.steps // 10, "hard_steps": spec.steps // 4}
    return usual | {"final_alpha": 0.02} if spec.scale == "sqrt_d" else usual


_JUMPRELU = frozenset(
    {*SPARSITY, "bandwidth", "init_threshold", "sparsity", "subtract_b_dec", "options"}
)
_TOPK = frozenset({"options", "subtract_b_dec"})
_PAIRS = _JUMPRELU - {"subtract_b_dec"} | {"gain"}
_LAYERS = _JUMPRELU - {"subtract_b_dec"} | {"layers"}

ARCHITECTURES: dict[str, Architecture] = {
    "jumprelu": Architecture(
        sae_lens.JumpReLUTrainingSAE,
        sae_lens.JumpReLUTrainingSAEConfig,
        _jumprelu,
        _JUMPRELU,
        layer_norm=True,
    ),
    "gemma_scope_jumprelu": Architecture(
        saes.GemmaScopeTrainingSAE, saes.GemmaScopeConfig, _jumprelu, _JUMPRELU
    ),
    "standard": Architecture(
        sae_lens.StandardTrainingSAE,
        sae_lens.StandardTrainingSAEConfig,
        _standard,
        _TOPK | {*SPARSITY},
    ),
    "topk": Architecture(sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, _topk, _TOPK),
    "batchtopk": Architecture(
        sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, _batchtopk, _TOPK
    ),
    "matryoshka_batchtopk": Architecture(
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        lambda spec: _batchtopk(spec) | {"matryoshka_widths": list(_levels(spec))},
        _TOPK | {"levels"},
    ),
    "matryoshka_prefix_batchtopk": Architecture(
        saes.MatryoshkaBatchTopK,
        saes.MatryoshkaBatchTopKConfig,
        lambda spec: _batchtopk(spec) | {"levels": _levels(spec)},
        _TOPK | {"levels"},
    ),
    "matryoshka_prefix_jumprelu": Architecture(
        saes.MatryoshkaJumpReLU,
        saes.MatryoshkaJumpReLUConfig,
        lambda spec: _jumprelu(spec) | {"levels": _levels(spec)},
        _JUMPRELU | {"levels"},
    ),
    "tree": Architecture(
        saes.TreeTrainingSAE,
        saes.TreeTrainingSAEConfig,
        _tree,
        _TOPK | {*SPARSITY, "levels", "bandwidth", "init_threshold"},
        usual=_tree_usual,
        layer_norm=True,
        scale="layer_norm",
        ghost=False,
    ),
    "softsae": Architecture(
        saes.SoftTrainingSAE,
        saes.SoftTrainingSAEConfig,
        _soft,
        _TOPK,
        usual=_soft_usual,
        layer_norm=True,
        ghost=False,
    ),
    "soft_topk": Architecture(
        saes.SoftTopKTrainingSAE,
        saes.SoftTopKTrainingSAEConfig,
        lambda spec: _soft(spec) | {"k": _whole_k(spec)},
        _TOPK,
        usual=_soft_usual,
        ghost=False,
    ),
    "jumprelu_transcoder": Architecture(
        JumpReLUTrainingTranscoder, TranscoderConfig, _jumprelu, _PAIRS, kind="transcoder"
    ),
    "jumprelu_skip_transcoder": Architecture(
        JumpReLUTrainingTranscoder, SkipTranscoderConfig, _jumprelu, _PAIRS, kind="transcoder"
    ),
    # Ghost gradients would reach the part of the decoder that must stay zero.
    "jumprelu_crosscoder": Architecture(
        saes.CrossCoderTrainingSAE,
        saes.CrossCoderTrainingConfig,
        _jumprelu,
        _LAYERS,
        kind="crosscoder",
        ghost=False,
    ),
    "jumprelu_clt": Architecture(
        saes.CLTTrainingSAE,
        saes.CLTTrainingConfig,
        _jumprelu,
        _LAYERS | {"gain"},
        kind="clt",
        ghost=False,
    ),
}
"""Name to how it is built."""
