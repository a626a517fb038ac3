"""Whatever goes wrong, the model is found as it was left; nothing is kept alive; modes of torch agree."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import (
    GemmaScopeError,
    HookNotFiredError,
    MissingHookError,
    ModelError,
    WidthMismatchError,
)
from gemmascope_plugin.models import gradients
from gemmascope_plugin.splice import Add, Custom, HookedSAE, splice
from gemmascope_plugin.splice.pass_features import SUB_HOOKS, listened
from tests import factories
from tests.factories import n_hooks, random_sae, tiny_hf
from tests.splice.cross_layer_reference import clt
from tests.splice.kinds import TWO_KINDS
from tests.splice.reference import largest, reconstruction
from tests.tiny_models import random_tokens

TOKENS = random_tokens()
FEW = TOKENS[:1, :6]
SITE = "blocks.1.hook_resid_post"
ACTS = f"{SITE}.hook_sae_acts_post"
PARTS = [name.removeprefix("hook_sae_") for name in SUB_HOOKS]


def metric(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits[:, -1] * weights).sum()


OWN_NOTES = {"_capture_hf_cache", "_last_hf_cache", "_derived_position_ids_ok"}
"""What the bridge's ``generate`` notes on the model, and leaves there when it fails."""


def state(model: Any, saes: list[Any]) -> dict[str, Any]:
    """Everything that a splice could leave behind, but for values of parameters."""
    points = model.hook_dict.items()
    return {
        "hooks": n_hooks(model),
        "points": {name: (id(p), p.name, len(p.fwd_hooks), len(p.bwd_hooks)) for name, p in points},
        "contexts": {name: dict(p.ctx) for name, p in points},
        "training": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "attributes": sorted(set(vars(model)) - OWN_NOTES),
        "recording": torch.is_grad_enabled(),
        "names": [site.name for sae in saes for site in sae.sites],
        "listened": [listened(site.points) for sae in saes for site in sae.sites],
        "forwards": [sorted(k for k in vars(m) if k == "forward") for m in model.modules()],
    }


class StopError(Exception):
    """Raised by the tests."""


def failing(error: BaseException, *, at: int = 1) -> Callable[..., None]:
    """A hook that raises in its ``at``-th call."""
    calls = 0

    def hook_fn(x: torch.Tensor, hook: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error

    return hook_fn


# --------------------------------------------------------------------------- exceptions
def in_a_users_hook(model, spliced, saes) -> None:
    spliced.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.hook_attn_out", failing(StopError()))])


def in_a_users_hook_at_a_site(model, spliced, saes) -> None:
    model.run_with_hooks(TOKENS, fwd_hooks=[(SITE, failing(StopError()))])


def between_input_and_output(model, spliced, saes) -> None:
    spliced.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.mlp.hook_post", failing(StopError()))])


def in_a_dictionarys_hook(model, spliced, saes) -> None:
    spliced.run_with_hooks(
        TOKENS, fwd_hooks=[(f"{SITE}[1].hook_sae_acts_pre", failing(StopError()))]
    )


def by_the_keyboard(model, spliced, saes) -> None:
    spliced.run_with_hooks(TOKENS, fwd_hooks=[(SITE, failing(KeyboardInterrupt()))])


def in_the_third_token(model, spliced, saes) -> None:
    with spliced.hooks([(SITE, failing(StopError(), at=3))]):
        spliced.generate(FEW, max_new_tokens=5, stop_at_eos=False)


def in_the_cache(model, spliced, saes) -> None:
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", failing(StopError()))]):
        spliced.run_with_cache(TOKENS, names_filter=[SITE, f"{SITE}[0].hook_sae_acts_post"])


def going_backward(model, spliced, saes) -> None:
    hooks = [(f"{SITE}[0].hook_sae_acts_post", lambda grad, hook: failing(StopError())(grad, hook))]
    with spliced.hooks([("hook_embed", lambda x, hook: x.requires_grad_(True))], hooks):
        metric(spliced(TOKENS)).backward()


def in_a_gradient(model, spliced, saes) -> None:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise StopError

    gradients(spliced, TOKENS, broken, [f"{SITE}[0].hook_sae_acts_post"])


def by_an_unknown_hook(model, spliced, saes) -> None:
    hooks = [(SITE, failing(StopError())), ("blocks.1.hook_resid_pots", failing(StopError()))]
    spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)


def in_a_splice_inside(model, spliced, saes) -> None:
    with splice(model, factories.residual(model, 1, seed=8), error="drop") as inner:
        inner.run_with_hooks(TOKENS, fwd_hooks=[(ACTS, failing(StopError()))])


def at_the_door_of_a_splice_inside(model, spliced, saes) -> None:
    with splice(model, [saes[0], random_sae(7, 9, SITE)]):
        raise AssertionError("a dictionary of another width came in")


STAGES = {
    in_a_users_hook: StopError,
    in_a_users_hook_at_a_site: StopError,
    between_input_and_output: StopError,
    in_a_dictionarys_hook: StopError,
    by_the_keyboard: KeyboardInterrupt,
    in_the_third_token: StopError,
    in_the_cache: StopError,
    going_backward: StopError,
    in_a_gradient: StopError,
    by_an_unknown_hook: MissingHookError,
    in_a_splice_inside: StopError,
    at_the_door_of_a_splice_inside: WidthMismatchError,
}


def wrapped(model: Any) -> list[Any]:
    """Two on one site, a transcoder, and one without error; all kept by the caller."""
    return [
        HookedSAE(factories.residual(model, 1, seed=1)),
        HookedSAE(factories.residual(model, 1, seed=2), error="drop"),
        HookedSAE(factories.transcoder(model, 1, seed=3)),
        HookedSAE(factories.attention(model, 2, seed=4), error="detach"),
    ]


@TWO_KINDS
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("inside", [False, True], ids=["leaves the block", "is caught inside"])
def test_an_exception_leaves_everything_as_it_was(model, stage, inside: bool) -> None:
    saes = wrapped(model)
    edits = Add(features=5, amount=3.0, sae=saes[0])
    before, logits = state(model, saes), model(TOKENS)
    if inside:
        with splice(model, saes, edits=edits) as spliced:
            expected, within = spliced(TOKENS), state(model, saes)
            with pytest.raises(STAGES[stage]):
                stage(model, spliced, saes)
            assert state(model, saes) == within
            assert torch.equal(spliced(TOKENS), expected)
    else:
        with pytest.raises(STAGES[stage]), splice(model, saes, edits=edits) as spliced:
            stage(model, spliced, saes)
    assert state(model, saes) == before
    assert torch.equal(model(TOKENS), logits)


@pytest.mark.parametrize("part", PARTS)
def test_an_exception_in_any_sub_hook_leaves_everything_as_it_was(hooked2, part: str) -> None:
    saes = wrapped(hooked2)
    before, logits = state(hooked2, saes), hooked2(TOKENS)
    with pytest.raises(StopError), splice(hooked2, saes) as spliced:
        name = f"{SITE}[0].hook_sae_{part}"
        spliced.run_with_hooks(TOKENS, fwd_hooks=[(name, failing(StopError()))])
    assert state(hooked2, saes) == before
    assert torch.equal(hooked2(TOKENS), logits)


def broken(acts: torch.Tensor) -> torch.Tensor:
    raise StopError


@TWO_KINDS
@pytest.mark.parametrize(
    ("fn", "error"),
    [(broken, StopError), (lambda a: a[..., :0], ModelError)],
    ids=["raises", "shape"],
)
def test_a_broken_edit_leaves_everything_as_it_was(model, fn, error) -> None:
    saes = wrapped(model)
    before, logits = state(model, saes), model(TOKENS)
    edit = Custom(features=[1, 2], fn=fn, sae=saes[2])
    with pytest.raises(error), splice(model, saes, edits=edit) as spliced:
        spliced(TOKENS)
    assert state(model, saes) == before
    assert torch.equal(model(TOKENS), logits)


@TWO_KINDS
def test_a_pass_that_stops_early_leaves_everything_as_it_was(model) -> None:
    saes = wrapped(model)
    before, logits = state(model, saes), model(TOKENS)
    with pytest.raises(HookNotFiredError, match="never reached"), splice(model, saes) as spliced:
        spliced(TOKENS, stop_at_layer=1)
    assert state(model, saes) == before
    assert torch.equal(model(TOKENS), logits)


@TWO_KINDS
@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_abandoned_generator_leaves_everything_as_it_was(model, end: str) -> None:
    saes = wrapped(model)
    before, logits = state(model, saes), model(TOKENS)

    def prompts() -> Generator[torch.Tensor, None, None]:
        with splice(model, saes) as spliced:
            for _ in range(3):
                yield spliced(TOKENS)

    generator = prompts()
    next(generator)
    assert state(model, saes) != before
    if end == "close":
        generator.close()
    del generator
    assert state(model, saes) == before
    assert torch.equal(model(TOKENS), logits)


@TWO_KINDS
def test_the_first_exception_is_the_one_that_is_seen(model) -> None:
    """A dictionary that was never reached is not reported after another error."""
    with pytest.raises(StopError) as raised, splice(model, wrapped(model)) as spliced:
        spliced.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.0.hook_resid_pre", failing(StopError()))]
        )
    assert raised.value.__context__ is None


@torch.no_grad()
def test_a_dictionary_may_be_in_two_places_at_once(hooked2) -> None:
    """The same object twice works twice, or is refused; never once."""
    hooked = HookedSAE(factories.residual(hooked2, 1), error="drop", exclude=())
    x = factories.activations(hooked2, TOKENS, SITE)
    twice = reconstruction(hooked.sae, reconstruction(hooked.sae, x))
    with hooked2.hooks(fwd_hooks=[(SITE, lambda x, hook: twice)]):
        expected = hooked2(TOKENS)
    with splice(hooked2, hooked), splice(hooked2, hooked) as inner:
        assert largest(inner(TOKENS) - expected) < 1e-5
    try:
        with splice(hooked2, [hooked, hooked]) as spliced:
            assert largest(spliced(TOKENS) - expected) < 1e-5
            assert len(spliced.sites) == 2
    except GemmaScopeError as refused:
        assert SITE in str(refused)
    assert hooked.name == SITE


# --------------------------------------------------------------------------- training
def test_the_models_flags_are_its_own(hooked2) -> None:
    """A model in training mode with trainable parameters stays one, and its gradients are right."""
    model = copy.deepcopy(hooked2).train().requires_grad_(True)
    model.blocks[0].requires_grad_(False)
    metric(model(TOKENS)).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before = state(model, [])
    with splice(model, factories.four_dictionaries(model)) as spliced:
        assert state(model, [])["training"] == before["training"]
        assert state(model, [])["trainable"] == before["trainable"]
        hooks = [(f"{SITE.replace('1', '0')}.hook_sae_acts_post", lambda x, hook: None)]
        metric(spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)).backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (wanted is None)
        if wanted is not None:
            assert largest(parameter.grad - wanted) < 1e-5 * max(1.0, largest(wanted))
    model.zero_grad()
    assert state(model, []) == before


# --------------------------------------------------------------------------- memory
def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())


def resident() -> int:
    """Bytes of memory of this process, where the system tells."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * 4096 if told.exists() else 0


def one_round(model: Any, saes: list[Any], number: int) -> None:
    """A splice that ends in one of several ways, mostly without a pass, which takes the time."""
    edit = Add(features=number % 96, amount=3.0, sae=saes[0])
    way = number % 50
    saes = saes if way < 4 else saes[:1]
    try:
        with splice(model, saes, edits=edit, error="drop" if number % 100 < 50 else "keep") as s:
            if way == 0:
                s(FEW)
            elif way == 1:
                s.run_with_hooks(FEW, fwd_hooks=[(ACTS, failing(StopError()))])
            elif way == 2:
                s(FEW, stop_at_layer=1)
            elif way == 3:
                s.run_with_cache(FEW, names_filter=[ACTS, SITE])
            elif way % 2:
                raise StopError
    except (StopError, HookNotFiredError):
        assert way % 2 or way == 2


def test_a_thousand_splices_leave_no_hook_no_tensor_and_no_memory(hooked2) -> None:
    saes = [
        factories.residual(hooked2, 1),
        factories.transcoder(hooked2, 0),
        clt(tiny_hf("gemma2")),
    ]
    before = state(hooked2, [])
    for number in range(100):
        one_round(hooked2, saes, number)
    tensors, memory = live_tensors(), resident()
    for number in range(1000):
        one_round(hooked2, saes, number)
    assert live_tensors() == tensors
    assert resident() - memory < 8e6
    assert state(hooked2, []) == before


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("error", ["keep", "drop", "detach"])
@pytest.mark.parametrize("several", [False, True], ids=["sae", "clt"])
def test_nothing_keeps_activations_alive(hooked2, recording: bool, error: Any, several) -> None:
    """Counted references alone free them, inside the block and after it: there is no cycle."""
    sae = clt(tiny_hf("gemma2")) if several else factories.residual(hooked2, 1)
    name = "blocks.1.hook_mlp_out" if several else SITE
    seen: list[weakref.ref] = []
    hooks = [
        (hook, lambda x, hook: seen.append(weakref.ref(x)))
        for hook in (name, *(f"{name}.hook_sae_{part}" for part in PARTS))
        if error != "drop" or not hook.endswith("_error")
    ]
    edit = Add(features=3, amount=2.0, layer=1)
    gc.disable()
    try:
        with (
            torch.set_grad_enabled(recording),
            splice(hooked2, sae, error=error, edits=edit) as spliced,
        ):
            spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)
            inside = [ref() is None for ref in seen]
        after = [ref() is None for ref in seen]
    finally:
        gc.enable()
    assert len(seen) == len(hooks)
    assert all(inside)
    assert all(after)


def test_a_pass_that_failed_keeps_no_activation(hooked2) -> None:
    """Neither after the block nor after the next pass in it."""
    code = clt(tiny_hf("gemma2"))
    seen: list[weakref.ref] = []

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise StopError

    hooks = [
        ("blocks.0.hook_mlp_out.hook_sae_acts_post", lambda x, hook: seen.append(weakref.ref(x))),
        ("blocks.1.hook_mlp_out", fail),
    ]
    for again in (False, True):
        with splice(hooked2, code, error="drop") as spliced:
            with pytest.raises(StopError):
                spliced.run_with_hooks(TOKENS, fwd_hooks=hooks)
            if again:
                spliced(TOKENS)
                gc.collect()
                assert seen[-1]() is None
            else:
                spliced(TOKENS[:1], stop_at_layer=None)
        gc.collect()
        assert seen[-1]() is None
