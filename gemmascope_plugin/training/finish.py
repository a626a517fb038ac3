"""From a trained dictionary to one that is used: scales folded, Gemma Scope's form, measured.

1. The factor on the activations is folded into the weights, so that raw activations are read.
2. SAELens' training class says what its inference class is and what of its state that keeps.
3. Top-k dictionaries that compared features times the norms of their decoder rows have unit rows.
   JumpReLU dictionaries get Gemma Scope's form: ``b_dec`` is not subtracted from the input
   (``b_enc - b_dec @ W_enc`` instead) and decoder rows have unit norm, encoder, bias and threshold taking
   the norms (arXiv 2408.05147, sections 3.2 and 3.3).
4. L0, FVU and share of features that never fire are measured with the result, on raw activations.

Cost: one copy of the weights and one pass over the tokens that are measured.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

import gemmascope_plugin.saes.jumprelu as jumprelu
from gemmascope_plugin.loading.convert import fill, skeleton
from gemmascope_plugin.saes.training.step_parts import fold_decoder
from gemmascope_plugin.training.learner import Learner
from gemmascope_plugin.training.shuffle import Bucket

_MEASURED = 1 << 14
"""Tokens that are measured, at most."""
_CHUNK = 1024


@torch.no_grad()
def finished(learner: Learner) -> Any:
    """The dictionary as SAELens' inference class, frozen; the learner stays as it is.

    Args:
        learner: After its last step.
    """
    learner.trainer.set_final_sae_metadata()
    sae: Any = copy.deepcopy(learner.sae)
    _fold_scales(sae, learner)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # What is saved compares features as they are, which is what splicing reads.
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    config = sae.cfg.get_inference_sae_cfg_dict()
    plain = config["normalize_activations"] == "none"
    if config["architecture"] == "standard":  # ReLU is JumpReLU with thresholds of zero
        config["architecture"] = jumprelu.ARCHITECTURES[0]
        state["threshold"] = torch.zeros_like(state["b_enc"])
    if config["architecture"] in jumprelu.ARCHITECTURES and plain:
        state["threshold"] = state["threshold"].clamp(min=0)
        state |= fold_decoder(state, subtracts_b_dec=config["apply_b_dec_to_input"])
        config["apply_b_dec_to_input"] = False
    result = skeleton(config)
    result.process_state_dict_for_loading(state)
    return fill(result, state, device=learner.device, dtype=sae.dtype)


def _fold_scales(sae: Any, learner: Learner) -> None:
    """Makes it a dictionary of raw activations; of several layers with unit decoder rows."""
    scales_in, scales_out = learner.scales
    if learner.kind in ("crosscoder", "clt"):
        sae.fold_scales(torch.tensor(scales_in), torch.tensor(scales_out))
        sae.threshold.data.clamp_(min=0)
        sae.fold_W_dec_norm()
    elif learner.kind == "transcoder":
        sae.fold_scales(scales_in[0], scales_out[0])
    elif scales_in[0] != 1:
        sae.fold_activation_norm_scaling_factor(scales_in[0])


@torch.no_grad()
def measured(sae: Any, learner: Learner, bucket: Bucket) -> dict[str, float]:
    """L0, FVU around the mean, and share of features that never fire, on raw activations.

    Args:
        sae: What ``finished`` made.
        learner: Which hooks it reads and reconstructs.
        bucket: Activations; the first ``_MEASURED`` of them are used.
    """
    some = {hook: values[:_MEASURED] for hook, values in bucket.items()}
    x, y = learner.tensors_of(some)
    reshape = sae.cfg.reshape_activations == "hook_z"
    if reshape:  # the bucket's heads are flat
        sae.turn_off_forward_pass_hook_z_reshaping()
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=x.device)
    squares = 0.0
    for part, target in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        fired += (sae.encode(part) != 0).double().sum(0)
        squares += float((sae(part) - target).double().pow(2).sum())
    if reshape:
        sae.turn_on_forward_pass_hook_z_reshaping()
    spread = float((y - y.mean(0)).double().pow(2).sum())
    return {
        "l0": float(fired.sum()) / len(x),
        "fvu": squares / spread,
        "dead_share": float((fired == 0).double().mean()),
    }
