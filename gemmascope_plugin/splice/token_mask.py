"""Which tokens the running forward pass sees, and which of them a dictionary leaves alone.

1. A hook before the embedding remembers the token ids, whatever way the model was called: directly,
   with a cache, with hooks, or token by token during generation.
2. Each dictionary asks for its mask once per forward pass. Asking twice means that the embedding was
   skipped (``start_at_layer``) and the remembered tokens are stale: an error, not a guess.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool

from gemmascope_plugin.errors import EmptySelectionError, HookNotFiredError
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import kept_positions, special_ids
from gemmascope_plugin.splice.hooked_sae import HookedSAE


class TokenMask:
    """The tokens of the running forward pass.

    Args:
        model: Model whose embedding is watched between ``attach`` and ``detach``.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._tokens: torch.Tensor | None = None
        self._asked: set[int] = set()
        self._handle: Any = None
        self.passes = 0
        """Forward passes seen."""

    def attach(self) -> None:
        """Starts watching."""
        self._handle = self._model.embed.register_forward_pre_hook(self._remember, with_kwargs=True)

    def detach(self) -> None:
        """Stops watching."""
        if self._handle is not None:
            self._handle.remove()

    def _remember(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else next(iter(kwargs.values()))
        self._tokens = tokens.detach()
        self._asked.clear()
        self.passes += 1

    def keep(self, sae: HookedSAE, activation: torch.Tensor) -> Bool[torch.Tensor, "batch pos"]:
        """False at the tokens that ``sae`` excludes.

        Raises:
            HookNotFiredError: The token ids of this pass are not known.
            EmptySelectionError: Every token of a row is excluded and more than one was given.
        """
        shape = activation.shape[:2]
        if not sae.exclude:
            return torch.ones(shape, dtype=torch.bool, device=activation.device)
        if self._tokens is None or id(sae) in self._asked or self._tokens.shape != shape:
            raise HookNotFiredError(
                f"The tokens at {sae.hook_out} are not known: the embedding did not run",
                fix="run from the tokens instead of start_at_layer, or splice with exclude=()",
            )
        self._asked.add(id(sae))
        keep = kept_positions(self._tokens, special_ids(self._model, sae.exclude))
        # During generation the model sees one token at a time, and that token may be special.
        if not keep.any() and self._tokens.shape[1] > 1:
            raise EmptySelectionError(
                "The prompt has only excluded tokens",
                exists=f"exclude={sae.exclude}",
                fix="a prompt with at least one word, or exclude=()",
            )
        return keep.to(activation.device)
