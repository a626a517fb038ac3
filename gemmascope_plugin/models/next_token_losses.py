"""Next-token losses of several passes over the same tokens; layers below the first difference run once.

1. The first pass of :meth:`SharedLayers.passing` is whole, and what the last layer below returns is kept.
2. In later passes every layer below returns that at once. The embedding still runs, and so does whoever
   watches the model's calls; hooks inside the layers below do not fire.
3. Where somebody else listens in the model, every pass is whole.
4. A pass that leaves at a position what the first one left there, to the last bit, has its loss without
   another look at the vocabulary.

Cost: one tensor ``[batch, pos, d_model]``; it saves ``layer / n_layers`` of every pass but the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemmascope_plugin.models.asked import computed_by, final_residuals, has_hooks, model_of
from gemmascope_plugin.models.points import can_restart
from gemmascope_plugin.models.protocol import HookedModel, Runner
from gemmascope_plugin.models.readout import cross_entropy


class SharedLayers:
    """The layers below the lowest in which later passes differ."""

    def __init__(self, model: HookedModel, layer: int) -> None:
        shares = layer > 0 and can_restart(model)
        self._below: list[Any] = list(model.blocks[:layer]) if shares else []
        self._returned: Any = None

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside the block one pass runs, always over the same tokens."""
        with ExitStack() as stack:
            if self._below and self._returned is None:
                handle = self._below[-1].register_forward_hook(self._hold)
                stack.callback(handle.remove)
            else:
                for block in self._below:
                    stack.enter_context(computed_by(block, lambda *args, **kwargs: self._returned))
            yield

    def _hold(self, module: object, args: object, output: object) -> None:
        self._returned = output


class NextTokenLosses:
    """Cross-entropies of next tokens in nats, of several passes over the same tokens.

    They are read at ``mask[row, pos]``, for the token after it; ``layer`` is the lowest in which the
    passes differ, and the layers below it run in the first pass alone.
    """

    def __init__(
        self,
        model: HookedModel,
        tokens: Int[torch.Tensor, "batch pos"],
        mask: Bool[torch.Tensor, "batch next"],
        layer: int = 0,
    ) -> None:
        self._shared = SharedLayers(model, layer)
        self._tokens = tokens
        self._mask = mask
        self._targets = tokens[:, 1:][mask.to(tokens.device)]
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, runner: Runner) -> Float[torch.Tensor, " read"]:
        """Those of one pass of a model, or of what runs one as its ``model``."""
        model = model_of(runner)
        if has_hooks(model.unembed.hook_out):  # pyright: ignore[reportAttributeAccessIssue]
            return self._of_logits(runner(self._tokens))
        with final_residuals(runner) as ends, self._shared.passing():
            runner(self._tokens)
        (normed,) = ends.normed
        rows = normed[:, :-1][self._mask.to(normed.device)]
        targets = self._targets.to(rows.device)
        if self._first is None:
            losses = cross_entropy(model, rows, targets, normed=True)
            self._first = rows, losses
            return losses
        before, losses = self._first
        differs = (rows != before).any(-1)
        losses = losses.clone()
        losses[differs] = cross_entropy(model, rows[differs], targets[differs], normed=True)
        return losses

    def _of_logits(self, logits: torch.Tensor) -> Float[torch.Tensor, " read"]:
        rows = logits[:, :-1][self._mask.to(logits.device)].float()
        targets = self._targets.to(rows.device)
        return torch.nn.functional.cross_entropy(rows, targets, reduction="none")
