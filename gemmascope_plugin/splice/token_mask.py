"""Which tokens the running forward pass sees, and which of them a dictionary leaves alone.

1. A hook before the embedding remembers the token ids, whatever way the model was called: directly,
   with a cache, with hooks, or token by token during generation.
2. Each dictionary asks for its mask once per forward pass. Asking twice means that the embedding was
   skipped (``start_at_layer``) and the remembered tokens are stale: an error, not a guess.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int

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
        self._text: torch.Tensor | None = None
        self._asked: set[int] = set()
        self._handles: list[Any] = []
        self.ran = False
        """Whether the model or its embedding was called."""

    def attach(self) -> None:
        """Starts watching."""
        for module, fn in ((self._model.embed, self._remember), (self._model, self._note)):
            self._handles.append(module.register_forward_pre_hook(fn, with_kwargs=True))

    def detach(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran = True

    def _remember(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = (args[0] if args else next(iter(kwargs.values()))).detach()
        before = self._text if self._text is not None else tokens[:, :0]
        self._text = torch.cat([before, tokens], 1) if len(before) == len(tokens) else tokens
        self._tokens = tokens
        self._asked.clear()
        self.ran = True

    def _of(self, shape: torch.Size) -> Int[torch.Tensor, "batch pos"] | None:
        """The tokens behind an activation: those embedded last, or all that were embedded one by one.

        The latter is how ``HookedTransformer`` generates without its key-value cache.
        """
        if self._tokens is not None and self._tokens.shape == shape:
            self._text = self._tokens
            return self._tokens
        return self._text if self._text is not None and self._text.shape == shape else None

    def keep(self, sae: HookedSAE, activation: torch.Tensor) -> Bool[torch.Tensor, "batch pos"]:
        """False at the tokens that ``sae`` excludes.

        Raises:
            HookNotFiredError: The token ids of this pass are not known.
            EmptySelectionError: Every token of a row is excluded, and rows are longer than one token.
        """
        shape = activation.shape[:2]
        if not sae.exclude:
            return torch.ones(shape, dtype=torch.bool, device=activation.device)
        tokens = self._of(shape)
        if tokens is None or id(sae) in self._asked:
            raise HookNotFiredError(
                f"The tokens at {sae.hook_out} are not known: the embedding did not run",
                fix="run from the tokens instead of start_at_layer, or splice with exclude=()",
            )
        self._asked.add(id(sae))
        # During generation the model sees one token at a time, and that token may be special.
        if tokens.shape[1] > 1:
            refuse_empty(self._model, sae, tokens)
        keep = kept_positions(tokens, special_ids(self._model, sae.exclude))
        return keep.to(activation.device)


def refuse_empty(
    model: HookedModel, sae: HookedSAE, tokens: Int[torch.Tensor, "batch pos"]
) -> None:
    """Refuses prompts in which ``sae`` would do nothing at all.

    Raises:
        EmptySelectionError: A prompt has only excluded tokens.
    """
    if not kept_positions(tokens, special_ids(model, sae.exclude)).any(-1).all():
        raise EmptySelectionError(
            "The prompt has only excluded tokens",
            exists=f"exclude={sae.exclude}",
            fix="a prompt with at least one word, or exclude=()",
        )
