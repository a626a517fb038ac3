"""From a spec to a freshly initialised dictionary in training, one function an architecture.

1. Common fields (widths, metadata) come from ``architectures.build``; each function adds what the spec
   says in its architecture's own words.
2. Where a paper counts in its own hundred thousand steps (SoftSAE's and Tree SAE's schedules), the shares
   of the training are kept, so that a short run has the same phases.
3. ``options`` of the spec go before all of that; a field that the spec sets by another name is refused.

SAELens' classes and this package's are imported when the first one is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError, nearest
from gemmascope_plugin.training.train_spec import TrainSpec

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

Values = dict[str, Any]

_ROOT_SHARE = 0.8
"""Share of the active features that the first layer of a Tree SAE has in the published runs."""


def make_config(
    config_class: type[Any], spec: TrainSpec, values: Values, usual: Values | None = None
) -> Any:
    """A config of SAELens with the spec's ``options`` in it, which cannot change ``values``."""
    free = {field.name for field in fields(config_class)} - set(values) - {"dtype", "device"}
    for name in spec.options:
        if name not in free:
            raise UnknownNameError(
                f"{name!r} is not an option of the architecture {spec.architecture!r}",
                exists=", ".join(sorted(free)),
                nearest=nearest(name, free),
            )
    return config_class(**{**(usual or {}), **values, **spec.options})


def _dead_coefficient(spec: TrainSpec, usual: float) -> float:
    """Coefficient of an architecture's own loss on dead features; 0 where it is not used."""
    if spec.dead_features != "auxiliary":
        return 0.0
    return usual if spec.dead_coefficient is None else float(spec.dead_coefficient)


def _jumprelu_values(spec: TrainSpec, common: Values) -> Values:
    return common | {
        "jumprelu_init_threshold": spec.init_threshold,
        "jumprelu_bandwidth": spec.bandwidth,
        "jumprelu_sparsity_loss_mode": spec.sparsity,
        "target_l0": float(spec.target_l0),
        "l0_coefficient": float(spec.sparsity_coefficient),
        "l0_warm_up_steps": spec.sparsity_warm_up,
        "pre_act_loss_coefficient": _dead_coefficient(spec, 1e-3) or None,
    }


def _topk_values(spec: TrainSpec, common: Values) -> Values:
    return common | {
        "k": float(spec.target_l0),
        "aux_loss_coefficient": _dead_coefficient(spec, 1 / 32),
    }


def _whole_k(spec: TrainSpec) -> int:
    """``target_l0`` as a number of features."""
    if spec.target_l0 != int(spec.target_l0):
        raise GemmaScopeError(
            f"target_l0={spec.target_l0} is not a number of features",
            exists=f"whole numbers for {spec.architecture!r}",
            fix="architecture='batchtopk', whose k is a mean over the batch",
        )
    return int(spec.target_l0)


def _levels(spec: TrainSpec, noun: str) -> tuple[int, ...]:
    """The prefix sizes, of which there must be several."""
    if len(spec.levels) < 2:
        raise GemmaScopeError(
            f"levels={spec.levels} do not make a {noun}",
            fix=f"levels=({max(1, spec.d_sae // 8)}, {spec.d_sae})",
        )
    return spec.levels


def jumprelu(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """SAELens' JumpReLU."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    values = _jumprelu_values(spec, common)
    return JumpReLUTrainingSAE(make_config(JumpReLUTrainingSAEConfig, spec, values))


def standard(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """SAELens' ReLU with an L1 penalty; its coefficient decides the L0, whatever ``target_l0``."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    values = common | {
        "l1_coefficient": float(spec.sparsity_coefficient),
        "l1_warm_up_steps": spec.sparsity_warm_up,
    }
    return StandardTrainingSAE(make_config(StandardTrainingSAEConfig, spec, values))


def gemma_scope(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """JumpReLU with unit decoder rows, gradient projection and, by option, a frequency penalty."""
    from gemmascope_plugin.saes import GemmaScopeConfig, GemmaScopeTrainingSAE

    values = _jumprelu_values(spec, common)
    return GemmaScopeTrainingSAE(make_config(GemmaScopeConfig, spec, values))


def transcoder(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """A JumpReLU transcoder, with or without affine skip."""
    import gemmascope_plugin.training.transcoder as classes

    skip = spec.architecture == "jumprelu_skip_transcoder"
    config_class = classes.SkipTranscoderConfig if skip else classes.TranscoderConfig
    config = make_config(config_class, spec, _jumprelu_values(spec, common))
    return classes.JumpReLUTrainingTranscoder(config)


def topk(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """SAELens' top-k."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    values = _topk_values(spec, common) | {"k": _whole_k(spec)}
    return TopKTrainingSAE(make_config(TopKTrainingSAEConfig, spec, values))


def batchtopk(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """SAELens' BatchTopK."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    values = _topk_values(spec, common)
    return BatchTopKTrainingSAE(make_config(BatchTopKTrainingSAEConfig, spec, values))


def saelens_matryoshka(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """SAELens' Matryoshka, which saves a plain JumpReLU."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig

    levels = list(_levels(spec, "Matryoshka"))
    values = _topk_values(spec, common) | {"matryoshka_widths": levels}
    common["metadata"].levels = levels
    return MatryoshkaBatchTopKTrainingSAE(
        make_config(MatryoshkaBatchTopKTrainingSAEConfig, spec, values)
    )


def matryoshka_batchtopk(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """The paper's Matryoshka SAE."""
    from gemmascope_plugin.saes import MatryoshkaBatchTopK, MatryoshkaBatchTopKConfig

    values = _topk_values(spec, common) | {"levels": _levels(spec, "Matryoshka")}
    return MatryoshkaBatchTopK(make_config(MatryoshkaBatchTopKConfig, spec, values))


def matryoshka_jumprelu(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """Gemma Scope 2's combination: JumpReLU whose every prefix reconstructs."""
    from gemmascope_plugin.saes import MatryoshkaJumpReLU, MatryoshkaJumpReLUConfig

    values = _jumprelu_values(spec, common) | {"levels": _levels(spec, "Matryoshka")}
    return MatryoshkaJumpReLU(make_config(MatryoshkaJumpReLUConfig, spec, values))


def tree(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """A Tree SAE whose privilege layers are the features between two levels."""
    from gemmascope_plugin.saes import TreeTrainingSAE, TreeTrainingSAEConfig

    sizes = [b - a for a, b in pairwise((0, *_levels(spec, "tree")))]
    values = common | {
        "features_per_layer": sizes,
        "aux_coefficient": _dead_coefficient(spec, 1 / 32),
        "dead_after_tokens": spec.dead_after * spec.batch_size,
        "l0_coefficient": float(spec.sparsity_coefficient),
        "l0_warm_up_steps": spec.sparsity_warm_up,
        "threshold_init": spec.init_threshold,
        "bandwidth": spec.bandwidth,
    }
    # Of the paper's 97,657 steps: the first interval 3,000, the longest 10,000, frozen at 50,000.
    first = max(1, spec.steps * 3 // 100)
    usual = {
        "k_per_layer": _k_per_layer(_whole_k(spec), sizes),
        "k_aux": min(256, sizes[0]),
        "parent_within_tokens": 10 * spec.batch_size,
        "first_reallocation": first,
        "longest_interval": max(first, spec.steps // 10),
        "freeze_step": spec.steps // 2,
    }
    return TreeTrainingSAE(make_config(TreeTrainingSAEConfig, spec, values, usual))


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


def _soft_values(spec: TrainSpec, common: Values) -> tuple[Values, Values]:
    """What the spec says, and phases that short trainings need longer shares for than the paper's.

    At the paper's last ``alpha`` of 1e-4 the gradient of the selection is that of a handful of scores;
    a few thousand steps need more of them, and more hard steps after.
    """
    values = common | {
        "total_steps": spec.steps,
        "aux_loss_coefficient": _dead_coefficient(spec, 1 / 32),
    }
    usual: Values = {"alpha_steps": spec.steps // 10, "hard_steps": spec.steps // 4}
    if spec.scale == "sqrt_d":
        usual["final_alpha"] = 0.02
    return values, usual


def soft(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """SoftSAE, whose mean budget is ``target_l0``."""
    from gemmascope_plugin.saes import SoftTrainingSAE, SoftTrainingSAEConfig

    values, usual = _soft_values(spec, common)
    values["k"] = float(spec.target_l0)
    return SoftTrainingSAE(make_config(SoftTrainingSAEConfig, spec, values, usual))


def soft_topk(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """A fixed budget, softly selected."""
    from gemmascope_plugin.saes import SoftTopKTrainingSAE, SoftTopKTrainingSAEConfig

    values, usual = _soft_values(spec, common)
    values["k"] = _whole_k(spec)
    return SoftTopKTrainingSAE(make_config(SoftTopKTrainingSAEConfig, spec, values, usual))


def crosscoder(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """A weakly causal crosscoder of the residual stream."""
    from gemmascope_plugin.saes import CrossCoderTrainingConfig, CrossCoderTrainingSAE

    values = _jumprelu_values(spec, common)
    return CrossCoderTrainingSAE(make_config(CrossCoderTrainingConfig, spec, values))


def clt(spec: TrainSpec, common: Values) -> TrainingSAE[Any]:
    """A cross-layer transcoder, with an affine skip by option."""
    from gemmascope_plugin.saes import CLTTrainingConfig, CLTTrainingSAE

    values = _jumprelu_values(spec, common)
    return CLTTrainingSAE(make_config(CLTTrainingConfig, spec, values))
