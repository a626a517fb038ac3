"""Steering: generation with a feature's decoder direction added at its site.

``x + strength * W_dec[feature]`` at every token that is not excluded, at every step: the same as
``Add(features=feature, amount=strength)`` with the error kept.

Cost: two generations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gemmascope_plugin.models import to_tokens, token_strings
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.splice.edits import Add
from gemmascope_plugin.splice.splicing import splice


@dataclass(frozen=True)
class Steering:
    """A continuation without and with steering."""

    prompt: str
    before: str
    """Continuation of the bare model."""
    after: str
    """Continuation of the steered model."""
    feature: int
    strength: float
    site: str

    def __repr__(self) -> str:
        return (
            f"Steering({self.site} feature {self.feature}, strength {self.strength:g})\n"
            f"  prompt: {self.prompt}\n  before: {self.before}\n  after:  {self.after}"
        )


def steer(
    model: HookedModel,
    sae: Any,
    feature: int,
    strength: float,
    prompt: str,
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    seed: int = 0,
) -> Steering:
    """Continues a prompt with and without ``strength * W_dec[feature]`` added at the site.

    Args:
        model: Model with a tokenizer.
        sae: The dictionary.
        feature: Index of the feature to add.
        strength: In units of the feature's activation; may be negative.
        prompt: Text to continue.
        max_new_tokens: Length of the continuation.
        temperature: 0 for the most probable token at every step, else sampling.
        seed: Seed of the sampling; both continuations use the same one.

    Raises:
        FeatureIndexError: No such feature.
        EmptySelectionError: An empty prompt.
    """
    tokens = to_tokens(model, prompt)
    options = {"do_sample": temperature > 0, "temperature": temperature or 1.0}
    edit = Add(features=feature, amount=strength)
    texts = []
    for edits in ((), (edit,)):
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            splice(model, sae, edits=edits) as spliced,
        ):
            torch.manual_seed(seed)
            ids = spliced.generate(tokens, max_new_tokens=max_new_tokens, **options)
            texts.append(" ".join(token_strings(model, ids[0, tokens.shape[1] :])))
            site = spliced.saes[0].hook_out
    return Steering(prompt, texts[0], texts[1], feature, strength, site)
