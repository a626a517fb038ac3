"""No public function holds logits of all positions, or a copy of the unembedding, at any moment."""

from __future__ import annotations

import pytest

from gemmascope_plugin.models import unembed
from tests.support.arguments import ARGUMENTS, call
from tests.support.calls import Scene, bundled
from tests.support.largest import LargestTensor

ROWS = 4
"""Rows of logits that a tile may have here, and twice as many runs of one prompt be compared at its end;
the calls read 36 to 72 positions."""
ASKED = ("splice", "custom", "kl_divergence", "margin")
"""Calls that hand all logits to somebody: one row for each prompt, or what a model gives."""


@pytest.fixture(scope="module")
def scene() -> Scene:
    built = bundled("hooked")
    for arguments in ARGUMENTS.values():
        arguments(built)  # what others start from
    return built


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in ASKED])
def test_never_all_logits(name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    width = int(scene.model.cfg.d_vocab)
    monkeypatch.setattr(unembed, "TILE", ROWS * width)
    with LargestTensor(width, exact=True) as largest:
        call(name, ARGUMENTS[name](scene))
    assert largest.numel <= 2 * ROWS * width, largest.shape
