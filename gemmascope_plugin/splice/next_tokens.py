"""What a model says next with and without an intervention, at every position of one text.

``KL(before || after) = sum_v p_v (log p_v - log q_v)`` in nats, ``p`` and ``q`` the distributions of
the next token, in float32 whatever the type of the model. Both runs read the same tokens, so what is
compared is the intervention and not where two continuations have drifted apart.

Cost: four times the vocabulary per position, in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float

from gemmascope_plugin.models import token_strings
from gemmascope_plugin.models.finite import check_finite
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.readout import Readout


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Distributions of the next token before and after, per position."""

    kl: Float[torch.Tensor, " pos"]
    """``KL(before || after)`` in nats."""
    top_before: tuple[str, ...]
    """The most probable next token before."""
    p_before: Float[torch.Tensor, " pos"]
    """Its probability before."""
    p_after: Float[torch.Tensor, " pos"]
    """Its probability after."""
    top_after: tuple[str, ...]
    """The most probable next token after."""
    p_top_after: Float[torch.Tensor, " pos"]
    """Its probability after."""


@torch.no_grad()
def compare_next(model: HookedModel, before: Readout, after: Readout) -> NextTokens:
    """Compares two runs over the same tokens.

    Args:
        model: Whose tokens these are.
        before: What the one run says.
        after: What the other says.

    Raises:
        ModelError: A distribution that is not finite.
    """
    best, top_before, lse_before = before.top(1)
    best_after, top_after, lse_after = after.top(1)
    for lse, run in ((lse_before, "before"), (lse_after, "with")):
        check_finite(lse, f"What the model says next, by position, {run} the intervention", model)
    still = after.pick(top_before)[:, 0] - lse_after
    return NextTokens(
        # rounding may leave it a little below 0
        after.divergence_from(before).clamp(min=0).cpu(),
        tuple(token_strings(model, top_before[:, 0])),
        (best[:, 0] - lse_before).exp().cpu(),
        still.exp().cpu(),
        tuple(token_strings(model, top_after[:, 0])),
        (best_after[:, 0] - lse_after).exp().cpu(),
    )
