"""Which tokens are worked on: padding, chosen positions and rows, and the same during generation.

The oracle is the bare model: prompts one by one without padding, and for edits ``amount * W_dec[i]``
added by a plain hook at the absolute positions, the whole text run anew for every token.
"""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.splice import Add, HookedSAE, splice
from tests import factories
from tests.factories import activations
from tests.splice.kinds import TWO_KINDS
from tests.splice.padded_texts import (
    ADD,
    AMOUNT,
    FEATURE,
    LONG,
    OPTIONS,
    OUT,
    SETTINGS,
    SHORT,
    SIDES,
    SITE,
    TOKENS,
    adding,
    grid,
    padded,
)
from tests.splice.reference import features, largest, reconstruction
from tests.tiny_models import PAD_ID


# --------------------------------------------------------------------------- padding
@torch.no_grad()
@SIDES
@pytest.mark.parametrize("filler", [PAD_ID, 77])
def test_the_bare_model_gives_padded_prompts_their_logits(model, side: str, filler: int) -> None:
    """What the tests below take for granted."""
    tokens, mask, real = padded(side, filler)
    logits = model(tokens, attention_mask=mask)
    assert largest(logits[0, real] - model(SHORT)[0]) < 1e-5
    assert largest(logits[1] - model(LONG)[0]) < 1e-5


@TWO_KINDS
@torch.no_grad()
@OPTIONS
@SIDES
@pytest.mark.parametrize("filler", [PAD_ID, 77])
@pytest.mark.parametrize("site", ["residual", "transcoder"])
def test_padding_changes_nothing_for_real_tokens(model, side, filler, name, site) -> None:
    """Whether the filler is the tokenizer's or, with a mask, an ordinary word."""
    sae = getattr(factories, site)(model, 1)
    tokens, mask, real = padded(side, filler)
    with splice(model, sae, **SETTINGS[name]) as spliced:
        logits = spliced(tokens, attention_mask=mask)
        alone = spliced(SHORT), spliced(LONG)
    assert largest(logits[0, real] - alone[0][0]) < 1e-5
    assert largest(logits[1] - alone[1][0]) < 1e-5


@torch.no_grad()
@SIDES
@pytest.mark.parametrize(("filler", "with_mask"), [(PAD_ID, False), (PAD_ID, True), (77, True)])
def test_padding_is_left_alone_by_id_and_by_mask(model, side, filler, with_mask: bool) -> None:
    tokens, mask, real = padded(side, filler)
    options = {"attention_mask": mask} if with_mask else {}
    names = [SITE, OUT, f"{SITE}.hook_sae_acts_post"]
    padding = mask == 0
    for error in ("keep", "drop"):
        with splice(model, factories.residual(model, 1), error=error, edits=ADD) as spliced:
            _, cache = spliced.run_with_cache(tokens, names_filter=names, **options)
        assert torch.equal(cache[OUT][padding], cache[SITE][padding])
        assert not cache[names[2]][padding].any()
        assert (cache[OUT] != cache[SITE]).any(-1)[0, real][1:].all()


@TWO_KINDS
@torch.no_grad()
def test_a_mask_holds_for_its_own_pass_only(model) -> None:
    """Also where the next pass does not go through ``__call__``, which would forget it."""
    tokens, mask, _ = padded("right", 77)
    with splice(model, factories.residual(model, 1), edits=ADD) as spliced:
        expected = spliced(TOKENS)
        spliced(tokens, attention_mask=mask)
        assert torch.equal(spliced(TOKENS), expected)
        spliced(tokens, attention_mask=mask)
        assert torch.equal(model.forward(TOKENS), expected)


@TWO_KINDS
@torch.no_grad()
def test_a_mask_that_leaves_nothing_is_an_error(model) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0] = 0
    mask[0, 0] = 1  # BOS, which is excluded
    with (
        splice(model, factories.residual(model, 1), edits=ADD) as spliced,
        pytest.raises(EmptySelectionError, match="only excluded tokens"),
    ):
        spliced(TOKENS, attention_mask=mask)


# --------------------------------------------------------------------------- positions
GRID = torch.zeros(2, 20, dtype=torch.bool)
GRID[0, 4], GRID[1, [2, 19]] = True, True
PLACES = {
    "int": (4, [[4], [4]]),
    "negative": (-1, [[19], [19]]),
    "slice": (slice(5, 8), [[5, 6, 7]] * 2),
    "slice from the end": (slice(-2, None), [[18, 19]] * 2),
    "slice with a step": (slice(1, 9, 3), [[1, 4, 7]] * 2),
    "list": ([2, -3], [[2, 17]] * 2),
    "mask of positions": (torch.arange(20) % 7 == 5, [[5, 12, 19]] * 2),
    "mask of the batch": (GRID, [[4], [2, 19]]),
}


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_a_dictionary_works_at_its_positions_only(hooked2, where: str, wrapped: bool) -> None:
    sae, (positions, chosen) = factories.residual(hooked2, 1), PLACES[where]
    here = grid(chosen)
    x = activations(hooked2, TOKENS, SITE)
    dictionary = HookedSAE(sae, error="drop", positions=positions) if wrapped else sae
    names = [OUT, f"{SITE}.hook_sae_acts_post"]
    with splice(hooked2, dictionary, error="drop", positions=positions) as spliced:
        logits, cache = spliced.run_with_cache(TOKENS, names_filter=names)
        assert largest(spliced(TOKENS) - logits) < 1e-6
    expected = torch.where(here[..., None], reconstruction(sae, x), x)
    assert largest(cache[names[0]] - expected) < 1e-5
    assert largest(cache[names[1]] - features(sae, x) * here[..., None]) < 1e-5


@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 0, slice(1, 2)])
@pytest.mark.parametrize("where", PLACES)
def test_an_edit_works_at_its_positions_and_rows_only(model, where: str, rows) -> None:
    positions, chosen = PLACES[where]
    here = grid(chosen)
    is_edited = torch.ones(2, dtype=torch.bool)
    if rows is not None:
        is_edited[:] = False
        is_edited[rows] = True
    here &= is_edited[:, None]
    sae = factories.residual(model, 1)
    edit = Add(features=FEATURE, amount=AMOUNT, positions=positions, rows=rows)
    with splice(model, sae, edits=edit) as spliced:
        got = spliced(TOKENS)
    with model.hooks(fwd_hooks=[(SITE, adding(sae, here))]):
        assert largest(got - model(TOKENS)) < 1e-5


@torch.no_grad()
def test_positions_of_dictionary_and_edit_intersect(hooked2) -> None:
    sae = factories.residual(hooked2, 1)
    edit = Add(features=FEATURE, amount=AMOUNT, positions=slice(3, 6))
    with splice(hooked2, sae, positions=[2, 4, 5], edits=edit) as spliced:
        got = spliced(TOKENS)
    with hooked2.hooks(fwd_hooks=[(SITE, adding(sae, grid([[4, 5]] * 2)))]):
        assert largest(got - hooked2(TOKENS)) < 1e-5
    outside = Add(features=FEATURE, amount=AMOUNT, positions=3)
    with (
        splice(hooked2, sae, positions=[2, 4, 5], edits=outside) as spliced,
        pytest.raises(EmptySelectionError, match="touches excluded tokens only"),
    ):
        spliced(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("positions", [0, [0], slice(0, 1), torch.arange(20) == 0])
def test_positions_of_nothing_but_special_tokens_are_an_error(hooked2, positions) -> None:
    with (
        splice(hooked2, factories.residual(hooked2, 1), error="drop", positions=positions) as s,
        pytest.raises(EmptySelectionError, match="are excluded tokens.*exclude=()"),
    ):
        s(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("positions", [20, -21, slice(20, None), torch.ones(19).bool()])
def test_positions_outside_the_prompt_are_an_error(hooked2, positions) -> None:
    with (
        splice(hooked2, factories.residual(hooked2, 1), error="drop", positions=positions) as s,
        pytest.raises(EmptySelectionError),
    ):
        s(TOKENS)
