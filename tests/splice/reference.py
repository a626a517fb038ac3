"""What a splice should do, computed on the transformers model with plain module hooks.

One pair of forward hooks per dictionary: the first keeps the tensor that is read, the second replaces
the tensor that is written by ``f(x) @ W_dec + b_dec`` at the tokens that are not special.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tests.tiny_models import FIRST_WORD_ID


@contextmanager
def reconstructed(hf: Any, saes: list[Any], tokens: torch.Tensor):
    """The transformers model with every dictionary's output in place of the real tensor."""
    keep = (tokens >= FIRST_WORD_ID)[..., None]
    with ExitStack() as stack:
        for sae in saes:
            for handle in _hooks(hf, sae, keep):
                stack.callback(handle.remove)
        yield hf


def _hooks(hf: Any, sae: Any, keep: torch.Tensor) -> list[Any]:
    name = sae.cfg.metadata.hook_name
    layer = hf.model.layers[int(name.split(".")[1])]
    if name.endswith("hook_resid_post"):
        return [layer.register_forward_hook(_replace_output(sae, keep))]
    if name.endswith("hook_mlp_out"):
        return [layer.post_feedforward_layernorm.register_forward_hook(_replace_output(sae, keep))]
    if name.endswith("hook_z"):
        return [layer.self_attn.o_proj.register_forward_pre_hook(_replace_input(sae, keep))]
    return _transcoder_hooks(hf, layer, sae, keep)


def largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())


def features(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """JumpReLU, equation 1 of arXiv 2407.14435."""
    pre = x @ sae.W_enc + sae.b_enc
    return pre * (pre > sae.threshold)


def reconstruction(sae: Any, x: torch.Tensor) -> torch.Tensor:
    return features(sae, x) @ sae.W_dec + sae.b_dec


def _replace_output(sae: Any, keep: torch.Tensor):
    def hook(module, args, output):
        value = output[0] if isinstance(output, tuple) else output
        value = torch.where(keep, reconstruction(sae, value), value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def _replace_input(sae: Any, keep: torch.Tensor):
    def hook(module, args):
        return (torch.where(keep, reconstruction(sae, args[0]), args[0]), *args[1:])

    return hook


def _transcoder_hooks(hf: Any, layer: Any, sae: Any, keep: torch.Tensor) -> list[Any]:
    """Reads the input of the norm before the MLP over its RMS, without the norm's gain."""
    seen: list[torch.Tensor] = []

    def look(module, args):
        x = args[0]
        seen[:] = [x / (x.pow(2).mean(-1, keepdim=True) + hf.config.rms_norm_eps).sqrt()]

    def write(module, args, output):
        return torch.where(keep, reconstruction(sae, seen.pop()), output)

    return [
        layer.pre_feedforward_layernorm.register_forward_pre_hook(look),
        layer.post_feedforward_layernorm.register_forward_hook(write),
    ]
