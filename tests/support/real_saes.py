"""Random SAEs and transcoders that fit the norms of a real Gemma, for tests that only need the algebra.

1. Activations of a text at the site; their mean and size over ordinary tokens.
2. Encoder rows random, in units of the centred activations; thresholds at a quantile of each feature, so
   that ``DENSITY`` of the tokens fire it.
3. Decoder rows as long as a few percent of the output.
"""

from __future__ import annotations

from typing import Any

from tests.factories import activations, random_sae

DENSITY = 0.05
TEXT = (
    "The history of the town begins with a bridge. Merchants crossed the river there every spring, "
    "and in 1432 the council built a wall, two gates and a market hall of red brick."
)


def fitted_sae(model: Any, hook_in: str, hook_out: str | None = None, d_sae: int = 256) -> Any:
    """A random SAE, or a transcoder if there is an output hook.

    Args:
        model: The model whose activations it fits.
        hook_in: Where it reads.
        hook_out: Where it writes, of a transcoder.
        d_sae: Features.
    """
    tokens = model.to_tokens(TEXT)
    x = activations(model, tokens, hook_in)[0, 1:].float()
    y = activations(model, tokens, hook_out)[0, 1:].float() if hook_out else x
    sae = random_sae(x.shape[-1], d_sae, hook_in, hook_out, d_out=y.shape[-1] if hook_out else None)
    mean, size = x.mean(0), float((x - x.mean(0)).square().mean().sqrt())
    sae.W_enc.data /= size
    sae.b_enc.data = -mean @ sae.W_enc.data
    pre = x @ sae.W_enc.data + sae.b_enc.data
    sae.threshold.data = pre.quantile(1 - DENSITY, dim=0).clamp(min=0.1) * 1.001
    sae.b_dec.data = y.mean(0)
    sae.W_dec.data *= (
        float((y - y.mean(0)).norm(dim=-1).mean()) / sae.W_dec.norm(dim=-1).mean() / 20
    )
    return sae


def fitted_transcoders(model: Any, d_sae: int = 256) -> list[Any]:
    """One transcoder for each layer."""
    return [
        fitted_sae(
            model, f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out", d_sae=d_sae
        )
        for i in range(model.cfg.n_layers)
    ]
