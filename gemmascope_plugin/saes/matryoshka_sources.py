"""Public Matryoshka checkpoints become ``MatryoshkaSAE``.

1. SAELens saves BatchTopK Matryoshkas as plain JumpReLU with one threshold. Since 6.54 the levels are in
   ``metadata.training_architecture_details["matryoshka_widths"]``; older checkpoints lost them and
   they must be given (the catalog knows those of the public suites).
2. ``dictionary_learning`` checkpoints (``ae.pt``) hold ``W_enc, b_enc, W_dec, b_dec``, one
   ``threshold``, ``k`` and ``group_sizes``, the differences of the levels. They subtract ``b_dec`` from
   the input, which is folded: ``b_enc - b_dec @ W_enc``.

This package reads no pickle. ``torch.load("ae.pt", weights_only=True)``, which runs no code of the
file, gives the state that 2. takes.

Cost: none for 1., the parameters are shared; one product of ``b_dec`` with ``W_enc`` for 2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Shaped
from sae_lens import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str

from gemmascope_plugin.errors import BadFileError, ModelError
from gemmascope_plugin.saes.matryoshka import (
    MatryoshkaSAE,
    MatryoshkaSAEConfig,
    check_levels,
    config_values,
    on_meta,
)

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
