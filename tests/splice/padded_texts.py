"""Texts with and without padding, and the settings under which both files of their tests run them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.splice import Add, Clamp
from tests.tiny_models import random_tokens

SITE = "blocks.1.hook_resid_post"
OUT = f"{SITE}.hook_sae_output"
FEATURE, AMOUNT = 3, 12.0
ADD = Add(features=FEATURE, amount=AMOUNT)
TOKENS = random_tokens()
SHORT, LONG = random_tokens(batch_size=1, length=14), random_tokens(batch_size=1, length=20, seed=7)
SIDES = pytest.mark.parametrize("side", ["left", "right"])
SETTINGS = {
    "keep and edit": {"error": "keep", "edits": Clamp(features=[3, 8], value=4.0)},
    "drop": {"error": "drop"},
    "drop and edit": {"error": "drop", "edits": ADD},
}
OPTIONS = pytest.mark.parametrize("name", SETTINGS)


def padded(side: str, filler: int) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """A batch of a short and a long prompt, its mask, and where the short one's tokens are."""
    fill = torch.full((1, 6), filler)
    short = torch.cat([fill, SHORT] if side == "left" else [SHORT, fill], dim=1)
    mask = torch.ones(2, 20, dtype=torch.long)
    real = slice(6, None) if side == "left" else slice(0, 14)
    mask[0] = 0
    mask[0, real] = 1
    return torch.cat([short, LONG]), mask, real


def grid(chosen: list[list[int]]) -> torch.Tensor:
    made = torch.zeros(2, 20, dtype=torch.bool)
    for row, positions in enumerate(chosen):
        made[row, positions] = True
    return made


def adding(sae: Any, here: torch.Tensor) -> Any:
    """A hook that adds ``AMOUNT * W_dec[FEATURE]`` where the text has a True."""

    def hook_fn(x, hook):
        return x + here[:, : x.shape[1], None] * AMOUNT * sae.W_dec[FEATURE]

    return hook_fn
