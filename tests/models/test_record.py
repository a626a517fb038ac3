"""What passes leave at hooks, and what is put there."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.errors import MissingHookError
from gemmascope_plugin.models.record import keep, put, record, write
from gemmascope_plugin.splice import splice
from tests import factories
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=4, length=9)


def test_recorded_activations_are_those_of_the_whole_pass(model) -> None:
    names = ["blocks.1.attn.hook_z", "hook_embed", "blocks.1.hook_mlp_out", "hook_embed"]
    reached = []
    later = [("blocks.2.hook_resid_pre", lambda x, hook: reached.append(1))]
    got = record(model, TOKENS, names, fwd_hooks=later)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
    assert set(got) == set(names) and not reached
    assert all(torch.equal(got[name], cache[name]) for name in set(names))
    point = model.hook_dict["blocks.1.hook_mlp_out"]
    assert not point.fwd_hooks
    assert record(model, TOKENS, []) == {}


def test_what_is_recorded_comes_after_hooks_that_change_it(model) -> None:
    zero = [("blocks.0.hook_resid_post", lambda x, hook: x * 0)]
    got = record(
        model, TOKENS, ["blocks.0.hook_resid_post", "ln_final.hook_normalized"], fwd_hooks=zero
    )
    assert float(got["blocks.0.hook_resid_post"].abs().max()) == 0
    assert len(got) == 2


def test_a_hook_that_never_fires(hooked2) -> None:
    with pytest.raises(MissingHookError, match="hook_mlp_in.*never fires"):
        record(hooked2, TOKENS, ["blocks.0.hook_mlp_in"])


def test_passes_with_dictionaries_are_whole(hooked2) -> None:
    names = ["blocks.0.hook_resid_post"]
    with splice(hooked2, factories.residual(hooked2, 1)) as spliced:
        got = record(
            spliced, TOKENS, names
        )  # an end before layer 1 would be an error of the splice
    plain = record(hooked2, TOKENS, names)
    assert torch.equal(got[names[0]], plain[names[0]])


def test_values_that_are_put_are_what_is_kept(hooked2) -> None:
    acts: dict[str, torch.Tensor] = {}
    name = "blocks.1.hook_resid_pre"
    value = torch.randn(1, hooked2.cfg.d_model)
    hooks = [
        (name, put(value.expand(*TOKENS.shape, -1))),
        (name, write(lambda x: 2 * x)),
        (name, keep(acts, "sums", lambda x: x.sum(-1))),
        (name, keep(acts, "alive", None)),
    ]
    with torch.enable_grad():
        hooked2.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.equal(acts["sums"], (2 * value).sum(-1).expand(TOKENS.shape))
    assert torch.equal(acts["alive"], (2 * value).expand(*TOKENS.shape, -1))
