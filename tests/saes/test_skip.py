"""The affine skip of a transcoder: ``x @ A``, never its transpose, never forgotten."""

from __future__ import annotations

import pytest
import torch

import gemmascope_plugin.saes as saes
from gemmascope_plugin.errors import ModelError
from tests.factories import random_sae, tiny_hf
from tests.splice.gained_transcoders import gained_transcoder, norm_outputs, skip_matrix


@torch.no_grad()
def test_the_skip_is_added_as_saelens_forward_adds_it() -> None:
    hf = tiny_hf("gemma2")
    code, x = gained_transcoder(hf, 1, skip=True), norm_outputs(hf, 1)
    made = saes.decode(code, saes.encode(code, x), x)
    assert torch.allclose(made, code(x), atol=1e-5)
    plain = saes.encode(code, x) @ code.W_dec + code.b_dec
    assert torch.allclose(made, plain + x @ skip_matrix(x.shape[1]), atol=1e-5)
    assert (made - plain - x @ skip_matrix(x.shape[1]).T).abs().max() > 1


def test_decoding_without_the_input_is_refused() -> None:
    code = gained_transcoder(tiny_hf("gemma2"), 1, skip=True)
    saes.check_architecture(code)
    assert saes.has_skip(code)
    with pytest.raises(ModelError, match=r"affine skip.*decode\(sae, acts, x\)"):
        saes.decode(code, torch.zeros(2, 96))


def test_without_a_skip_the_input_makes_no_difference() -> None:
    sae = random_sae(8, 12, "blocks.0.hook_resid_post")
    acts, x = torch.rand(3, 12), torch.rand(3, 8)
    assert not saes.has_skip(sae)
    assert torch.equal(saes.decode(sae, acts, x), saes.decode(sae, acts))
