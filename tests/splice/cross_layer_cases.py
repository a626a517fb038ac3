"""Dictionaries over several layers and texts that both files of their tests use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.splice.cross_layer_reference import clt, crosscoder
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
ONE = random_tokens(batch_size=1)
KINDS = pytest.mark.parametrize("kind_of", ["clt", "affine clt", "crosscoder", "affine crosscoder"])
ERRORS = pytest.mark.parametrize("error", ["keep", "drop"])
CHOSEN = [3, 17, 40]
OUTS = [f"blocks.{i}.hook_mlp_out" for i in range(3)]


def made(kind_of: str, model: Any, hf: Any) -> Any:
    affine = kind_of.startswith("affine")
    if kind_of.endswith("clt"):
        return clt(hf, affine=affine)
    return crosscoder(model, affine=affine)


def outputs(code: Any) -> list[str]:
    return [f"{name}.hook_sae_output" for name in code.cfg.hooks_out]


def metric(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()
