"""A Matryoshka dictionary for inference: JumpReLU with levels (arXiv 2503.17547).

1. Levels ``m_1 < ... < m_K = d_sae`` are prefixes of the features (section 3).
2. Encode: ``z = x @ W_enc + b_enc``, ``f = z`` where ``z > threshold`` and ``z > 0`` (arXiv
   2407.14435, equation 1). Features do not compete at inference, so a level's activations are the
   first ``m`` of the whole's, and only ``m`` columns of the encoder are read.
3. Decode: ``x_hat_m = f[:m] @ W_dec[:m] + b_dec``. ``x_hat_m2 - x_hat_m1`` is written by the features
   ``m1..m2`` alone (prefix additivity), and the last level is the whole dictionary.
4. ``truncate`` gives a level as a plain SAELens ``JumpReLUSAE``.
5. ``with_levels``: SAELens saves BatchTopK Matryoshkas as plain JumpReLU with one threshold. Since 6.54
   the levels are in ``metadata.training_architecture_details["matryoshka_widths"]``; older checkpoints
   lost them and they must be given (the catalog knows those of the public suites).
6. ``from_dictionary_learning``: such checkpoints (``ae.pt``) hold ``W_enc, b_enc, W_dec, b_dec``, one
   ``threshold``, ``k`` and ``group_sizes``, the differences of the levels. They subtract ``b_dec`` from
   the input, which is folded: ``b_enc - b_dec @ W_enc``. This package reads no pickle;
   ``torch.load("ae.pt", weights_only=True)``, which runs no code of the file, gives the state.

Levels are counted from 0, the coarsest, to -1, the whole. They are saved in the config as ``levels``
and repeated in ``metadata.levels``, where splicing reads them.

What it cannot do: a level of a dictionary that was not trained with it (Gemma Scope 2 does not publish
its levels) reconstructs badly, since later features correct earlier ones.

Cost: ``2 * tokens * d_in * m`` operations each way; ``truncate`` copies ``m / d_sae`` of the memory,
``with_levels`` shares all of it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Shaped
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from sae_lens.util import dtype_to_str
from typing_extensions import override

from gemmascope_plugin.errors import BadFileError, ModelError, WidthMismatchError
from gemmascope_plugin.saes.coder import level_width
from gemmascope_plugin.saes.jumprelu import jump
from gemmascope_plugin.saes.registration import StrictConfig, register_class


def check_levels(levels: object, d_sae: int) -> tuple[int, ...]:
    """Refuses anything but increasing prefix sizes that end with the whole dictionary."""
    if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
        raise ModelError(
            f"A Matryoshka dictionary needs levels, and got {levels!r}",
            fix=f"levels=({max(1, d_sae // 8)}, {d_sae}): the sizes of its prefixes, d_sae last",
        )
    widths: list[int] = []
    for level in levels:
        if not isinstance(level, SupportsIndex) or isinstance(level, bool) or level.__index__() < 1:
            raise ModelError(f"Level {level!r} of {list(levels)} is not a positive integer")
        widths.append(operator.index(level))
    for before, after in pairwise(widths):
        if after <= before:
            raise ModelError(
                f"The levels {widths} do not increase: {after} follows {before}",
                fix=f"levels={tuple(sorted(set(widths)))}",
            )
    if widths[-1] > d_sae:
        raise ModelError(
            f"Level {widths[-1]} exceeds the {d_sae} features of the dictionary",
            fix=f"levels={(*(w for w in widths if w < d_sae), d_sae)}",
        )
    if widths[-1] < d_sae:
        raise ModelError(
            f"The last level is {widths[-1]}, and the dictionary has {d_sae} features",
            fix=f"levels={(*widths, d_sae)}",
        )
    return tuple(widths)


_OF_THE_WHOLE = ("l0", "gemmascope_spec")
"""Metadata that are not true of a prefix."""


@dataclass
class MatryoshkaSAEConfig(StrictConfig, JumpReLUSAEConfig):
    """SAELens' JumpReLU config with levels.

    Raises:
        ModelError: The levels do not increase to ``d_sae``.
    """

    levels: Sequence[int] = ()
    """Numbers of features of the prefixes, coarsest first; the last one is ``d_sae``."""
    metadata: Any = field(default_factory=SAEMetadata)
    """SAELens' metadata; its ``from_dict`` passes a dict first and replaces it afterwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels = check_levels(self.levels, self.d_sae)

    @override
    @classmethod
    def architecture(cls) -> str:
        """``"matryoshka_jumprelu"``."""
        return "matryoshka_jumprelu"


class MatryoshkaSAE(JumpReLUSAE):
    """SAELens' ``JumpReLUSAE`` with levels; registered with SAELens when this module is imported."""

    cfg: MatryoshkaSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: MatryoshkaSAEConfig, use_error_term: bool = False) -> None:
        levels = cfg.metadata.get("levels")
        if levels is not None and tuple(levels) != tuple(cfg.levels):
            raise ModelError(
                f"The config has levels {list(cfg.levels)}, its metadata say {list(levels)}",
                fix="leave them out of the metadata",
            )
        cfg.metadata["levels"] = list(cfg.levels)
        super().__init__(cfg, use_error_term)

    @override
    def encode(
        self, x: Float[torch.Tensor, "*axes d"], level: int | None = None
    ) -> Float[torch.Tensor, "*tokens width"]:
        """Activations of the features of a level; None for the whole."""
        width = self.width(level)
        sae_in = self.process_sae_in(x)
        pre = self.hook_sae_acts_pre(sae_in @ self.W_enc[:, :width] + self.b_enc[:width])
        return self.hook_sae_acts_post(jump(pre, self.threshold[:width]))

    @override
    def decode(
        self, feature_acts: Float[torch.Tensor, "*tokens width"], level: int | None = None
    ) -> Float[torch.Tensor, "*axes d"]:
        """What the features of a level write, and ``b_dec``; of all activations or the level's only."""
        width, n_acts = self.width(level), feature_acts.shape[-1]
        if n_acts not in (width, self.cfg.d_sae):
            raise WidthMismatchError(
                f"The activations have {n_acts} features, level {level} has {width} of "
                f"{self.cfg.d_sae}",
                fix="decode(acts, level=) with the level of encode(x, level=)",
            )
        recons = self.hook_sae_recons(feature_acts[..., :width] @ self.W_dec[:width] + self.b_dec)
        recons = self.run_time_activation_norm_fn_out(recons)
        return self.reshape_fn_out(recons, self.d_head)

    def width(self, level: int | None) -> int:
        """Number of features of a level; of the whole for None."""
        return self.cfg.d_sae if level is None else level_width(self, level)

    def truncate(self, level: int) -> JumpReLUSAE:
        """A level as a dictionary of its own, with the levels below it in its metadata.

        The parameters are copies: the result can be saved, changed and kept without the whole.
        ``weights_of(sae, level)``, which splicing uses, gives views instead.
        """
        width = self.width(level)
        metadata = {k: v for k, v in self.cfg.metadata.items() if k not in _OF_THE_WHOLE}
        metadata["levels"] = [m for m in self.cfg.levels if m <= width]
        cfg = JumpReLUSAEConfig(
            **{**config_values(self.cfg), "d_sae": width, "metadata": SAEMetadata(**metadata)}
        )
        cuts = {
            "W_enc": self.W_enc[:, :width],
            "b_enc": self.b_enc[:width],
            "threshold": self.threshold[:width],
            "W_dec": self.W_dec[:width],
            "b_dec": self.b_dec,
        }
        prefix = on_meta(JumpReLUSAE, cfg)
        for name, cut in cuts.items():
            values = cut.detach().clone(memory_format=torch.contiguous_format)
            setattr(prefix, name, torch.nn.Parameter(values, requires_grad=cut.requires_grad))
        return prefix.train(self.training)

    @override
    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """The strict config, so that ``MatryoshkaSAE.load_from_disk`` refuses unknown keys."""
        return MatryoshkaSAEConfig


def config_values(cfg: JumpReLUSAEConfig) -> dict[str, Any]:
    """The fields that a plain JumpReLU config has."""
    return {field.name: getattr(cfg, field.name) for field in fields(JumpReLUSAEConfig)}


def on_meta(sae_class: type[Any], cfg: SAEConfig) -> Any:
    """An object without values, which takes no memory; its device is still the config's."""
    device, cfg.device = cfg.device, "meta"
    sae = sae_class(cfg)
    sae.cfg.device, sae.device = device, torch.device(device)
    return sae


_KEYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "group_sizes")
_ALSO = ("k",)


def with_levels(sae: JumpReLUSAE, levels: Sequence[int] | None = None) -> MatryoshkaSAE:
    """A JumpReLU dictionary that was trained as a Matryoshka, with its levels.

    Args:
        sae: The dictionary; its parameters are shared, not copied.
        levels: Prefix sizes, the last one ``d_sae``; None for those in its metadata.

    Raises:
        ModelError: Neither given nor in the metadata, others than in the metadata, or not increasing
            to ``d_sae``.
    """
    metadata = copy.deepcopy(sae.cfg.metadata)
    details = metadata.get("training_architecture_details") or {}
    recorded = metadata.get("levels") or details.get("matryoshka_widths")
    if levels is None and not recorded:
        raise ModelError(
            f"The dictionary of {sae.cfg.d_sae} features does not say which levels it was trained "
            "with; SAELens before 6.54 did not save them",
            fix="with_levels(sae, levels=...), from the model card or find(variant='matryoshka')",
        )
    if levels is not None and recorded and tuple(levels) != tuple(recorded):
        raise ModelError(
            f"The levels given are {list(levels)}, the dictionary was trained with {list(recorded)}",
            fix="with_levels(sae)",
        )
    values = {**config_values(sae.cfg), "metadata": metadata, "levels": levels or recorded}
    matryoshka = on_meta(MatryoshkaSAE, MatryoshkaSAEConfig(**values))
    for name, parameter in sae.named_parameters():
        setattr(matryoshka, name, parameter)
    return matryoshka.train(sae.training)


def from_dictionary_learning(
    state: Mapping[str, Shaped[torch.Tensor, "*_"]], metadata: Mapping[str, Any] | None = None
) -> MatryoshkaSAE:
    """A checkpoint of ``dictionary_learning``'s ``MatryoshkaBatchTopKSAE``, frozen.

    Args:
        state: Its state dict.
        metadata: What the dictionary belongs to, e.g. ``{"hook_name": ..., "model_name": ...}``.

    Raises:
        BadFileError: Arrays are missing, unknown or of contradicting shapes, or the threshold was
            never set.
    """
    _check_state(state)
    W_enc, threshold = state["W_enc"].detach(), float(state["threshold"])
    levels = tuple(accumulate(int(size) for size in state["group_sizes"]))
    cfg = MatryoshkaSAEConfig(
        d_in=W_enc.shape[0],
        d_sae=W_enc.shape[1],
        dtype=dtype_to_str(W_enc.dtype),
        device=str(W_enc.device),
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(**(metadata or {})),
        levels=levels,
    )
    parameters = {
        "W_enc": W_enc,
        "b_enc": state["b_enc"].detach() - state["b_dec"].detach() @ W_enc,
        "threshold": torch.full_like(state["b_enc"], threshold),
        "W_dec": state["W_dec"].detach(),
        "b_dec": state["b_dec"].detach(),
    }
    sae = on_meta(MatryoshkaSAE, cfg)
    sae.load_state_dict(parameters, assign=True)
    return sae.eval().requires_grad_(False)


def _check_state(state: Mapping[str, Shaped[torch.Tensor, "*_"]]) -> None:
    missing = [key for key in _KEYS if key not in state]
    unknown = [key for key in state if key not in (*_KEYS, *_ALSO)]
    if missing or unknown:
        raise BadFileError(
            f"The state is not dictionary_learning's: missing {missing}, unknown {unknown}",
            exists=", ".join(state),
            fix="the ae.pt of a MatryoshkaBatchTopKSAE",
        )
    d_in, d_sae = state["W_enc"].shape[0], state["W_enc"].shape[-1]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in {**shapes, "threshold": ()}.items():
        if tuple(state[name].shape) != shape:
            raise BadFileError(f"{name} has shape {list(state[name].shape)}, not {list(shape)}")
    if float(state["threshold"]) < 0:
        raise BadFileError(
            f"The threshold is {float(state['threshold']):g}: it was never set, training ended "
            "before threshold_start_step",
            fix="a checkpoint of a longer run",
        )
    try:
        check_levels(list(accumulate(int(size) for size in state["group_sizes"])), d_sae)
    except ModelError as fault:
        raise BadFileError(f"group_sizes {state['group_sizes'].tolist()}: {fault}") from fault


register_class(MatryoshkaSAE, MatryoshkaSAEConfig)
