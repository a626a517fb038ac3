"""An export is there whole, with the file that says how it reads, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.loading.export import export

OPTIONS: dict[str, Any] = {"layout": "gemma-scope-2", "site": "mlp", "layer": 1, "l0": 5.0}


def transcoder() -> Any:
    from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

    cfg = JumpReLUTranscoderConfig(d_in=8, d_sae=16, d_out=8, apply_b_dec_to_input=False)
    cfg.metadata.model_name = "tiny"
    sae = JumpReLUTranscoder(cfg)
    with torch.no_grad():
        for value in sae.parameters():
            value.normal_()
    return sae


def gain_of(folder: Path) -> str:
    return SaeSpec.from_folder(folder, model="tiny", site="mlp", layer=1, kind="transcoder").gain


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("old", [False, True])
def test_a_fault_at_any_call_leaves_no_half_of_an_export(tmp_path, monkeypatch, call, old) -> None:
    sae, real = transcoder(), getattr(os, call)
    for nth in range(12):
        count, base = iter(range(1000)), tmp_path / str(nth)
        if old:
            target = export(sae, base, gain="without", **OPTIONS)

        def full(*args: Any, count: Any = count, nth: int = nth) -> Any:
            if next(count) == nth:
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                target = export(sae, base, gain="without", **OPTIONS)
            except GemmaScopeError as error:
                assert "No space left" in str(error)
                if not old:
                    assert not list(base.rglob("params*"))
                    continue
        # without its config a transcoder of this layout would be read with the gain
        assert sorted(p.name for p in target.iterdir()) == ["config.json", "params.safetensors"]
        assert gain_of(target) == "without"
        assert not list(base.rglob(".*"))


def test_an_export_replaces_its_like_and_nothing_else(tmp_path) -> None:
    first = export(transcoder(), tmp_path, gain="without", **OPTIONS)
    assert export(transcoder(), tmp_path, gain="with", **OPTIONS) == first
    assert gain_of(first) == "with"
    (first / "notes.txt").write_text("mine")
    with pytest.raises(GemmaScopeError, match="holds other files, which would be lost: notes.txt"):
        export(transcoder(), tmp_path, gain="without", **OPTIONS)
    assert gain_of(first) == "with" and (first / "notes.txt").read_text() == "mine"
