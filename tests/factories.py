"""Tiny models and random JumpReLU dictionaries that fit them."""

from __future__ import annotations

import atexit
import copy
import inspect
import shutil
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from gemmascope_plugin.models.points import flatten_heads
from tests import tiny_models

D_SAE = 96
DENSITY = 0.06
"""Share of tokens on which each feature of a random dictionary is active."""


@lru_cache
def tiny_hf(family: str) -> Any:
    return {"gemma2": tiny_models.gemma2, "gemma3": tiny_models.gemma3}[family]()


@lru_cache
def tiny_tokenizer() -> Any:
    folder = tempfile.mkdtemp(prefix="tiny-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return tiny_models.tokenizer(Path(folder))


@lru_cache
def tiny_model(family: str, backend: str, double: bool = False) -> Any:
    hf = copy.deepcopy(tiny_hf(family))
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    return build(hf.double() if double else hf, tiny_tokenizer(), f"tiny-{family}")


def residual(model: Any, layer: int, **options: Any) -> Any:
    return dictionary(model, f"blocks.{layer}.hook_resid_post", **options)


def attention(model: Any, layer: int, **options: Any) -> Any:
    return dictionary(model, f"blocks.{layer}.attn.hook_z", **options)


def mlp(model: Any, layer: int, **options: Any) -> Any:
    return dictionary(model, f"blocks.{layer}.hook_mlp_out", **options)


def transcoder(model: Any, layer: int, **options: Any) -> Any:
    hook_in, hook_out = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    return dictionary(model, hook_in, hook_out, **options)


@cache
def dictionary(
    model: Any, hook_in: str, hook_out: str | None = None, *, seed: int = 0, d_sae: int = D_SAE
) -> Any:
    """A random SAE or transcoder whose features are each active on a few percent of random tokens.

    Made once per model and seed: copy it before changing it.
    """
    x = activations(model, tiny_models.random_tokens(batch_size=16, seed=99), hook_in)[:, 1:]
    d_out = (
        activations(model, tiny_models.random_tokens(), hook_out).shape[-1] if hook_out else None
    )
    sae = random_sae(x.shape[-1], d_sae, hook_in, hook_out, d_out=d_out, seed=seed).to(x.dtype)
    pre = (x @ sae.W_enc + sae.b_enc).flatten(0, 1)
    threshold = pre.float().quantile(1 - DENSITY, dim=0).clamp(min=0.02).to(x.dtype)
    # off the observed value, where rounding alone would decide
    sae.threshold.data = threshold * 1.001
    return sae


def random_sae(
    d_in: int,
    d_sae: int,
    hook_in: str | None,
    hook_out: str | None = None,
    *,
    d_out: int | None = None,
    seed: int = 0,
) -> Any:
    """SAELens' ``JumpReLUSAE``, or its ``JumpReLUTranscoder`` if there is an output hook."""
    from sae_lens import SAE

    architecture = "jumprelu_transcoder" if hook_out else "jumprelu"
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": hook_in, "hook_name_out": hook_out, "model_name": "tiny"},
    }
    if hook_out:
        config["d_out"] = d_out
    config_class = SAE.get_sae_config_class_for_architecture(architecture)
    sae_class: Any = SAE.get_sae_class_for_architecture(architecture)
    sae = sae_class(config_class.from_dict(config))
    generator = torch.Generator().manual_seed(seed)
    scales = {"W_enc": d_in**-0.5, "W_dec": 0.3, "b_enc": 0.1, "b_dec": 0.3, "threshold": 0.0}
    for name, scale in scales.items():
        parameter = getattr(sae, name)
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return sae


def activations(model: Any, tokens: torch.Tensor, hook: str) -> torch.Tensor:
    """The tensor at a hook of the bare model, heads flattened."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[hook])
    return flatten_heads(cache[hook])


def four_dictionaries(model: Any) -> list[Any]:
    """Residual, attention, MLP and transcoder dictionaries, on different layers."""
    return [
        residual(model, 0, seed=1),
        attention(model, 1, seed=2),
        mlp(model, 1, seed=3),
        transcoder(model, 2, seed=4),
    ]


def five_dictionaries(model: Any) -> list[Any]:
    """The same and a residual SAE; see ``crowded`` for several at one site."""
    return [*four_dictionaries(model), residual(model, 2, seed=5)]


def crowded(model: Any) -> list[Any]:
    """Five dictionaries on three sites: two SAEs on one stream, a transcoder and an SAE on one MLP."""
    return [
        residual(model, 0, seed=1),
        residual(model, 0, seed=2),
        transcoder(model, 1, seed=3),
        mlp(model, 1, seed=4),
        attention(model, 2, seed=5),
    ]


def unchecked(function: Any) -> Any:
    """The function without the type checks of the test run, for wrong input as a user would give it."""
    return inspect.unwrap(function)


def n_hooks(model: Any) -> int:
    """Hooks of every kind on every module of the model."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    points = {id(point): point for point in model.hook_dict.values()}
    listed = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points.values())
    modules = {id(module): module for module in [*model.modules(), *points.values()]}
    attached = sum(len(getattr(module, kind)) for module in modules.values() for kind in kinds)
    return listed + attached
