"""What this package asks of a TransformerLens model, as a structural type.

``HookedTransformer`` and ``TransformerBridge`` both fit, in TransformerLens 3.9; neither class is
imported here, so the code does not break when one of them goes away.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from gemmascope_plugin.types import HookFn, Hooks


@runtime_checkable
class Runner(Protocol):
    """A model, or what runs one as its ``model``, such as a model with dictionaries in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        ...

    def hooks(self, fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ...) -> Any:
        """Context manager that attaches hooks and removes them."""
        ...


@runtime_checkable
class HookedModel(Protocol):
    """A language model with named hook points."""

    cfg: Any
    tokenizer: Any
    embed: Any
    blocks: Any
    hook_dict: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass; token ids in, logits ``[batch, pos, d_vocab]`` out."""
        ...

    def hooks(self, fwd_hooks: Hooks = ..., bwd_hooks: Hooks = ...) -> Any:
        """Context manager that attaches hooks and removes them."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass that also returns activations by hook name."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass with temporary hooks."""
        ...

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample a continuation."""
        ...

    def parameters(self) -> Any:
        """All parameters."""
        ...

    def register_forward_hook(self, hook: HookFn, *, always_call: bool = ...) -> Any:
        """Calls ``hook`` after every forward pass."""
        ...

    def register_forward_pre_hook(self, hook: HookFn, *, with_kwargs: bool = ...) -> Any:
        """Calls ``hook`` before every forward pass."""
        ...


def device_of(model: HookedModel) -> torch.device:
    """Device of the embedding, where token ids belong."""
    return next(iter(model.parameters())).device


def dtype_of(model: HookedModel) -> torch.dtype:
    """Type of the weights."""
    return next(iter(model.parameters())).dtype


def weights_of(model: HookedModel) -> str | None:
    """Where the weights come from, for results and pages; None of a model that was made elsewhere."""
    return getattr(model, "gemmascope_source", None)
