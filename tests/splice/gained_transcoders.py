"""Random transcoders as Gemma Scope 2 has them, and what they should do, computed on transformers.

They read the output of the norm before the MLP, gain included; some have an affine skip ``x @ A``
with an ``A`` that is far from symmetric.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from tests.factories import DENSITY, random_sae
from tests.splice.reference import features
from tests.tiny_models import FIRST_WORD_ID, random_tokens


@lru_cache
def norm_outputs(hf: Any, layer: int) -> torch.Tensor:
    """The tensor that is read, at word tokens of random prompts."""
    seen = []
    module = hf.model.layers[layer].pre_feedforward_layernorm
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = random_tokens(batch_size=16, seed=99)
    with torch.no_grad():
        hf(tokens)
    handle.remove()
    return seen[0][:, 1:].flatten(0, 1)


def gained_transcoder(hf: Any, layer: int, *, skip: bool, seed: int = 0) -> Any:
    """A transcoder from ``mlp.hook_in`` to ``hook_mlp_out``, a few percent of its features active."""
    x = norm_outputs(hf, layer)
    d = x.shape[1]
    names = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
    code = random_sae(d, 96, *names, d_out=d, seed=seed)
    if skip:
        code = _with_skip(code, seed)
    pre = x @ code.W_enc + code.b_enc
    code.threshold.data = pre.quantile(1 - DENSITY, dim=0).clamp(min=0.02)
    return code


def _with_skip(code: Any, seed: int) -> Any:
    from sae_lens import SAE

    name = "jumprelu_skip_transcoder"
    config = SAE.get_sae_config_class_for_architecture(name).from_dict(code.cfg.to_dict())
    skipping: Any = SAE.get_sae_class_for_architecture(name)(config)
    state = {**code.state_dict(), "W_skip": skip_matrix(code.cfg.d_in, seed).T.contiguous()}
    skipping.load_state_dict(state)
    return skipping


def skip_matrix(d: int, seed: int = 0) -> torch.Tensor:
    """``A`` of ``x @ A``, upper triangular."""
    generator = torch.Generator().manual_seed(seed + 7)
    return torch.randn(d, d, generator=generator).triu() * 0.2


@contextmanager
def transcoded(hf: Any, codes: list[Any], tokens: torch.Tensor, *, transpose=False, gain=True):
    """The transformers model with ``f(x) @ W_dec + b_dec + x @ A`` in place of each MLP's output.

    ``transpose`` and ``gain=False`` make the two mistakes that are to be noticed.
    """
    keep = (tokens >= FIRST_WORD_ID)[..., None]
    handles = []
    for code in codes:
        layer = hf.model.layers[int(code.cfg.metadata.hook_name.split(".")[1])]
        look, write = _pair(code, keep, transpose, gain)
        handles.append(layer.pre_feedforward_layernorm.register_forward_hook(look))
        handles.append(layer.post_feedforward_layernorm.register_forward_hook(write))
    try:
        yield hf
    finally:
        for handle in handles:
            handle.remove()


def _pair(code: Any, keep: torch.Tensor, transpose: bool, gain: bool) -> tuple[Any, Any]:
    seen: list[torch.Tensor] = []

    def look(module, args, output):
        seen[:] = [output if gain else output / (1 + module.weight)]

    def write(module, args, output):
        x = seen.pop()
        made = features(code, x) @ code.W_dec + code.b_dec
        if hasattr(code, "W_skip"):
            matrix = code.W_skip.T
            made = made + x @ (matrix.T if transpose else matrix)
        return torch.where(keep, made, output)

    return look, write


def folded(model: Any) -> Any:
    """A copy of a tiny model with the gains folded into the weights, as both classes do it."""
    model = copy.deepcopy(model)
    if hasattr(model, "enable_compatibility_mode"):
        model.process_weights(fold_ln=True, center_unembed=False)
        return model.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"center_unembed": False, "center_writing_weights": False}
    model.load_and_process_state_dict(state, fold_ln=True, fold_value_biases=False, **options)
    return model.requires_grad_(False)
