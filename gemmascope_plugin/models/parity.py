"""Does a TransformerLens model compute what transformers computes?

1. A fixed sequence of word ids, ``BEYOND`` tokens longer than the sliding window, so that local layers
   differ from global ones and rotary embeddings are asked for far positions.
2. Logits of both at the last ``KEPT`` positions, which depend on all others.  The stream is cut after
   the last block: all logits of 4,160 tokens and 256,000 words would be 4 GB.
3. The largest difference, in float32, against a tolerance that is a share of the standard deviation
   of transformers' logits:

   ========  ======  =============================================================
   float64   1e-8    rounding
   float32   1e-3    the models of the tests stay below 1e-5
   float16   0.1     both sides round after every operation, in different orders
   bfloat16  0.5     likewise with 8 bits; the models of the tests stay below 0.2
   ========  ======  =============================================================

A mask, cap, norm or rotary base that is wrong changes logits by the order of their standard deviation.

Costs two forward passes of a sequence longer than the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.errors import ModelError
from gemmascope_plugin.models.protocol import HookedModel, device_of, dtype_of
from gemmascope_plugin.models.record import write

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BEYOND = 64
KEPT = 32
TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 0.1,
    torch.bfloat16: 0.5,
}
"""Type of the weights to the largest difference allowed, in standard deviations of the logits."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far two models' logits are apart."""

    max_logit_difference: float
    tokens: int
    """Length of the sequence; compared are the logits of its last ``KEPT`` tokens."""
    tolerance: float
    """Largest difference that counts as rounding for this type of weights."""

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance; a NaN is not."""
        return self.max_logit_difference <= self.tolerance

    def check(self) -> Parity:
        """Itself.

        Raises:
            ModelError: The difference exceeds the tolerance.
        """
        if self.ok:
            return self
        raise ModelError(
            f"Logits differ from transformers' by {self.max_logit_difference:.2g} on "
            f"{self.tokens} tokens, more than the {self.tolerance:.2g} that rounding explains",
            fix='the other backend ("hooked" or "bridge"), or dtype=torch.float32',
        )


def parity(
    model: HookedModel, hf: PreTrainedModel, tokens: Int[torch.Tensor, "batch pos"]
) -> Parity:
    """Compare a model with the transformers model of the same weights.

    Args:
        model: From ``load_model``.
        hf: The transformers model; not one that a bridge has taken over.
        tokens: Token ids, best longer than the sliding window.

    Returns:
        The largest difference and what was allowed.
    """
    return compare(model, last_logits(hf, tokens), tokens)


def fixed_tokens(hf_config: PretrainedConfig) -> Int[torch.Tensor, "1 pos"]:
    """BOS and word ids, ``BEYOND`` tokens longer than the sliding window where the context allows."""
    longest = min(hf_config.max_position_embeddings, hf_config.sliding_window + BEYOND)
    # A walk through the vocabulary that repeats nothing soon; the first ids are special tokens.
    first = min(256, hf_config.vocab_size // 8)
    ids = first + torch.arange(longest) * 7919 % (hf_config.vocab_size * 9 // 10 - first)
    if hf_config.bos_token_id is not None:
        ids[0] = hf_config.bos_token_id
    return ids[None]


@torch.no_grad()
def last_logits(
    hf: PreTrainedModel, tokens: Int[torch.Tensor, "batch pos"]
) -> Float[torch.Tensor, "batch kept d_vocab"]:
    """Logits of transformers at the last positions."""
    n_last = min(KEPT, tokens.shape[1])
    return hf(tokens.to(hf.device), logits_to_keep=n_last, use_cache=False).logits.float().cpu()


@torch.no_grad()
def compare(
    model: HookedModel,
    reference: Float[torch.Tensor, "batch kept d_vocab"],
    tokens: Int[torch.Tensor, "batch pos"],
) -> Parity:
    """Compare a model's logits at the last positions with others."""
    n_last = reference.shape[1]
    # the model's own arithmetic is asked about, so its unembedding runs
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    cut = write(lambda stream: stream[:, -n_last:])
    logits = model.run_with_hooks(tokens.to(device_of(model)), fwd_hooks=[(last, cut)])
    difference = (logits.float().cpu() - reference).abs().max()
    return Parity(
        max_logit_difference=float(difference),
        tokens=tokens.shape[1],
        tolerance=TOLERANCES.get(dtype_of(model), 1e-3) * float(reference.std()),
    )
