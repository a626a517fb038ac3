"""SAELens' own splicing models around the tiny models, as oracles and as negative controls."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.factories import tiny_model


def peer(family: str, backend: str) -> Any:
    """A new ``HookedSAETransformer`` or ``SAETransformerBridge``; splicing may damage it for good."""
    model = tiny_model(family, backend)
    if backend == "hooked":
        from sae_lens import HookedSAETransformer

        cfg = copy.deepcopy(model.cfg)  # ``.to()`` writes into it
        peer_model = HookedSAETransformer(cfg, tokenizer=model.tokenizer, move_to_device=False)
        peer_model.load_state_dict(model.state_dict(), strict=False)
    else:
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        peer_model = copy.deepcopy(model)
        peer_model.__class__ = SAETransformerBridge  # as their ``boot_transformers`` does it
        peer_model._acts_to_saes, peer_model._transcoder_output_hooks = {}, {}
    return peer_model.eval().requires_grad_(False)


def name_in_peer(peer_model: Any, sae: Any, part: str) -> str:
    """The name of a sub-hook in SAELens' caches: the bridge takes canonical names only."""
    if hasattr(peer_model, "get_sae_hook_name"):
        return peer_model.get_sae_hook_name(sae, f"hook_sae_{part}")
    return f"{output_hook(sae)}.hook_sae_{part}"


def output_hook(sae: Any) -> str:
    return sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name


def with_heads(sae: Any) -> Any:
    """A copy that flattens heads itself, as SAELens loads attention SAEs of Gemma Scope 1."""
    sae = copy.deepcopy(sae)
    sae.cfg.reshape_activations = "hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    return sae


def renamed(sae: Any, hook_in: str, hook_out: str | None = None) -> Any:
    """A copy at other hooks."""
    sae = copy.deepcopy(sae)
    sae.cfg.metadata.hook_name = hook_in
    if hook_out is not None:
        sae.cfg.metadata.hook_name_out = hook_out
    return sae


def peer_without_error(peer_model: Any, tokens: torch.Tensor, *saes: Any) -> torch.Tensor:
    """Logits with SAELens' splice and nothing but reconstructions."""
    return peer_model.run_with_saes(tokens, saes=list(saes), use_error_term=False)
