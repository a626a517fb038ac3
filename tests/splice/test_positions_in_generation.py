"""Positions are absolute in generation and in texts that come in pieces, with and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError
from gemmascope_plugin.splice import Add, HookedSAE, splice
from tests import factories
from tests.splice.kinds import TWO_KINDS
from tests.splice.padded_texts import (
    ADD,
    AMOUNT,
    FEATURE,
    LONG,
    OPTIONS,
    SETTINGS,
    SHORT,
    SITE,
    TOKENS,
    adding,
    grid,
    padded,
)
from tests.splice.reference import largest, reconstruction
from tests.tiny_models import BOS_ID, EOS_ID, FIRST_WORD_ID, PAD_ID, random_tokens

# --------------------------------------------------------------------------- generation
N, NEW = 6, 5
PROMPTS = random_tokens(batch_size=2, length=N, seed=4)
SOME = torch.zeros(2, N, dtype=torch.bool)
SOME[0, 2], SOME[1, [3, 5]] = True, True
EVERYWHERE = range(1, N + NEW)
GENERATED = {
    "all": (None, [EVERYWHERE] * 2),
    "inside the prompt": (4, [[4]] * 2),
    "the prompt's last": (-1, [[5]] * 2),
    "negative list": ([-2, 1], [[1, 4]] * 2),
    "inside what is generated": (N + 1, [[7]] * 2),
    "from the prompt on": (slice(N, None), [range(N, N + NEW)] * 2),
    "a part of what is generated": (slice(N + 1, N + 3), [[7, 8]] * 2),
    "from the end of the prompt": (slice(-2, None), [range(4, N + NEW)] * 2),
    "up to the end of the prompt": (slice(1, -1), [range(1, 5)] * 2),
    "mask of positions": (torch.arange(N) % 3 == 2, [[2, 5]] * 2),
    "mask of the batch": (SOME, [[2], [3, 5]]),
}
CACHES = pytest.mark.parametrize("cached", [True, False])
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False}


def long_grid(chosen: Any, rows: Any = slice(None)) -> torch.Tensor:
    made = torch.zeros(2, N + NEW, dtype=torch.bool)
    for row, positions in enumerate(chosen):
        made[row, list(positions)] = True
    in_rows = torch.zeros(2, 1, dtype=torch.bool)
    in_rows[rows] = True
    return made & in_rows


def by_hand(model: Any, here: torch.Tensor, change: Any) -> torch.Tensor:
    """Greedy continuation by the bare model, the whole text at every step.

    Args:
        model: The model.
        here: Positions that are worked on if their token is not special.
        change: From the tensor at the site to the one in its place.
    """
    text = PROMPTS
    for _ in range(NEW):
        mask = (here[:, : text.shape[1]] & (text >= FIRST_WORD_ID))[..., None]

        def hook_fn(x, hook, mask=mask):
            return torch.where(mask, change(x), x)

        with model.hooks(fwd_hooks=[(SITE, hook_fn)]):
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return text


def added(sae: Any) -> Any:
    return lambda x: x + AMOUNT * sae.W_dec[FEATURE]


@TWO_KINDS
@torch.no_grad()
@CACHES
@pytest.mark.parametrize("where", GENERATED)
def test_positions_are_absolute_during_generation(model, where: str, cached: bool) -> None:
    sae, (positions, chosen) = factories.residual(model, 1), GENERATED[where]
    expected = by_hand(model, long_grid(chosen), added(sae))
    edit = Add(features=FEATURE, amount=AMOUNT, positions=positions)
    with splice(model, sae, edits=edit) as spliced:
        assert torch.equal(spliced.generate(PROMPTS, use_past_kv_cache=cached, **GREEDY), expected)
    with splice(model, HookedSAE(sae, positions=positions), edits=ADD) as spliced:
        assert torch.equal(spliced.generate(PROMPTS, use_past_kv_cache=cached, **GREEDY), expected)


@torch.no_grad()
def test_the_edits_above_decide_what_is_generated(hooked2) -> None:
    """Negative control: different positions, different texts."""
    sae = factories.residual(hooked2, 1)
    texts = [by_hand(hooked2, long_grid(chosen), added(sae)) for _, chosen in GENERATED.values()]
    assert len({tuple(text.flatten().tolist()) for text in texts}) > 7


@TWO_KINDS
@torch.no_grad()
@CACHES
def test_rows_hold_during_generation(model, cached: bool) -> None:
    sae = factories.residual(model, 1)
    edit = Add(features=FEATURE, amount=AMOUNT, rows=1, positions=slice(2, None))
    expected = by_hand(model, long_grid([range(2, N + NEW)] * 2, 1), added(sae))
    with splice(model, sae, edits=edit) as spliced:
        got = spliced.generate(PROMPTS, use_past_kv_cache=cached, **GREEDY)
    assert torch.equal(got, expected)


@TWO_KINDS
@torch.no_grad()
@CACHES
@pytest.mark.parametrize("positions", [None, 3, slice(-2, None), slice(N, None)])
def test_without_error_generation_with_and_without_a_cache_agree(model, positions, cached) -> None:
    sae = factories.residual(model, 1)
    here = long_grid([EVERYWHERE if positions is None else chosen_of(positions)] * 2)
    text = by_hand(model, here, lambda x: reconstruction(sae, x))
    with splice(model, sae, error="drop", positions=positions) as spliced:
        got = spliced.generate(PROMPTS, use_past_kv_cache=cached, **GREEDY)
    assert torch.equal(got, text)


def chosen_of(positions: Any) -> list[int]:
    if isinstance(positions, int):
        return [positions]
    bounds = (positions.start + N if positions.start < 0 else positions.start, positions.stop)
    return list(range(N + NEW)[slice(*bounds)])


@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize("positions", [N + NEW, -N - 1, slice(N + NEW, None)])
def test_positions_after_the_last_token_are_an_error(model, positions) -> None:
    edit = Add(features=FEATURE, amount=AMOUNT, positions=positions)
    with (
        splice(model, factories.residual(model, 1), edits=edit) as spliced,
        pytest.raises(EmptySelectionError, match=f"positions 0 to {N + NEW - 1}"),
    ):
        spliced.generate(PROMPTS, **GREEDY)


DIRECT = {
    key: GENERATED[key] for key in ("all", "inside the prompt", "up to the end of the prompt")
}
DIRECT["to the end"] = (slice(2, None), [range(2, N + NEW)] * 2)


@TWO_KINDS
@torch.no_grad()
@CACHES
@pytest.mark.parametrize("where", ["the prompt's last", "mask of positions", *DIRECT])
def test_the_models_own_generate_runs_the_dictionaries(model, where: str, cached: bool) -> None:
    """Without a cache it is a row of ever longer prompts: what that changes is an error or nothing."""
    positions, chosen = {**GENERATED, **DIRECT}[where]
    sae = factories.residual(model, 1)
    edit = Add(features=FEATURE, amount=AMOUNT, positions=positions)
    options = {**GREEDY, "verbose": False, "return_type": "tokens", "use_past_kv_cache": cached}
    with splice(model, sae, edits=edit):
        try:
            got = model.generate(PROMPTS, **options)
        except EmptySelectionError as refused:
            assert not cached, refused
            return
    assert torch.equal(got, by_hand(model, long_grid(chosen), added(sae)))


@TWO_KINDS
@torch.no_grad()
@CACHES
def test_prompts_of_different_lengths_are_padded_by_the_models_own_generate(model, cached) -> None:
    sae, prompts = factories.residual(model, 1), ["w5 w6 w7 w8 w9", "w10 w11"]
    options = {**GREEDY, "verbose": False, "return_type": "tokens", "use_past_kv_cache": cached}
    with splice(model, sae, error="drop", edits=ADD) as spliced:
        together = model.generate(prompts, **options)
        alone = [spliced.generate(prompt, **GREEDY)[0, -NEW:] for prompt in prompts]
    assert torch.equal(together[:, -NEW:], torch.stack(alone))


# --------------------------------------------------------------------------- the user's own cache
def in_pieces(
    model: Any, run: Any, pieces: list[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the pieces of a text, run with the key-value cache of the model class."""
    mask = torch.ones_like(torch.cat(pieces, 1)) if mask is None else mask
    stops = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0).tolist()
    if hasattr(model, "enable_compatibility_mode"):
        logits, cache = [], None
        for piece, stop in zip(pieces, stops, strict=True):
            options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            options |= {"use_cache": True, "return_type": "logits_and_cache"}
            piece_logits, cache = run(piece, attention_mask=mask[:, :stop], **options)
            logits.append(piece_logits)
    else:  # which keeps the mask of earlier pieces itself
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(pieces[0]))
        logits = [
            run(piece, past_kv_cache=cache, attention_mask=mask[:, stop - piece.shape[1] : stop])
            for piece, stop in zip(pieces, stops, strict=True)
        ]
    return torch.cat(logits, dim=1)


PIECES = {
    "two": [12, 8],
    "one by one at the end": [17, 1, 1, 1],
}


@TWO_KINDS
@torch.no_grad()
@OPTIONS
@pytest.mark.parametrize("how", PIECES)
def test_a_text_in_pieces_is_the_same_text(model, name: str, how: str) -> None:
    pieces = list(TOKENS.split(PIECES[how], dim=1))
    assert largest(in_pieces(model, model, pieces) - model(TOKENS)) < 1e-5, "the bare model"
    with splice(model, factories.residual(model, 1), **SETTINGS[name]) as spliced:
        expected = spliced(TOKENS)
        assert largest(in_pieces(model, spliced, pieces) - expected) < 1e-5
        assert largest(in_pieces(model, model, pieces) - expected) < 1e-5


@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (5, [5]),
        (slice(4, None), range(4, 20)),
        (slice(2, -1), range(2, 11)),
        (-1, [11]),
        (torch.arange(12) == 6, [6]),
    ],
)
def test_positions_are_absolute_over_the_pieces(model, positions, chosen) -> None:
    """Negative ones and masks are over what the text started with, the first piece."""
    sae = factories.residual(model, 1)
    edit = Add(features=FEATURE, amount=AMOUNT, positions=positions)
    with splice(model, sae, edits=edit) as spliced:
        got = in_pieces(model, spliced, list(TOKENS.split([12, 8], dim=1)))
    with model.hooks(fwd_hooks=[(SITE, adding(sae, grid([list(chosen)] * 2)))]):
        assert largest(got - model(TOKENS)) < 1e-5


@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "chosen"),
    [(None, range(12, 20)), (14, [14]), (slice(15, None), range(15, 20)), (-1, [19])],
)
def test_a_splice_may_begin_in_the_middle_of_a_text(model, positions, chosen) -> None:
    """The first piece ran on the bare model; positions count from the start of the text all the same."""
    sae = factories.residual(model, 1)
    first, second = TOKENS.split([12, 8], dim=1)
    edit = Add(features=FEATURE, amount=AMOUNT, positions=positions)

    def run(piece: torch.Tensor, **options: Any) -> Any:
        if torch.equal(piece, first):
            return model(piece, **options)
        with splice(model, sae, edits=edit) as spliced:
            return spliced(piece, **options)

    got = in_pieces(model, run, [first, second])
    with model.hooks(fwd_hooks=[(SITE, adding(sae, grid([list(chosen)] * 2)))]):
        assert largest(got - model(TOKENS)) < 1e-5


@TWO_KINDS
@torch.no_grad()
def test_padding_with_a_cache_is_left_alone(model) -> None:
    """Left padding by an ordinary word, told by the mask of each piece."""
    tokens, mask, real = padded("left", 77)
    sae = factories.residual(model, 1)
    with splice(model, sae, error="drop", edits=ADD) as spliced:
        alone = spliced(SHORT), spliced(LONG)
        got = in_pieces(model, spliced, list(tokens.split([12, 8], dim=1)), mask)
    assert largest(got[0, real] - alone[0][0]) < 1e-5
    assert largest(got[1] - alone[1][0]) < 1e-5


# --------------------------------------------------------------------------- special tokens on the way
@TWO_KINDS
@torch.no_grad()
@pytest.mark.parametrize("special", [EOS_ID, PAD_ID, BOS_ID])
@pytest.mark.parametrize("split", [[12, 8], [15, 1, 4]])
def test_special_tokens_in_later_pieces_are_left_alone(model, special: int, split) -> None:
    """Also where a piece is nothing but one of them."""
    tokens = TOKENS.clone()
    tokens[:, 15] = special
    with splice(model, factories.residual(model, 1), error="drop", edits=ADD) as spliced:
        mask = torch.ones_like(tokens)
        expected = spliced(tokens, attention_mask=mask)
        got = in_pieces(model, spliced, list(tokens.split(split, dim=1)))
    assert largest(got - expected) < 1e-5


@TWO_KINDS
@torch.no_grad()
@CACHES
def test_special_tokens_that_are_generated_are_left_alone(model, cached: bool) -> None:
    sae = factories.residual(model, 1)
    texts = []
    for run in ("spliced", "by hand"):
        with model.hooks(fwd_hooks=[("unembed.hook_out", Forcing(EOS_ID, at=2))]):
            if run == "spliced":
                with splice(model, sae, edits=ADD) as spliced:
                    texts.append(spliced.generate(PROMPTS, use_past_kv_cache=cached, **GREEDY))
            else:
                texts.append(by_hand(model, long_grid([EVERYWHERE] * 2), added(sae)))
    assert (texts[0][:, N + 1] == EOS_ID).all()
    assert torch.equal(texts[0], texts[1])


class Forcing:
    """A hook on the logits that makes one token the only choice in one pass.

    Args:
        token: Its id.
        at: Which pass, counted from 1.
    """

    def __init__(self, token: int, at: int) -> None:
        self.token, self.at, self.passes = token, at, 0

    def __call__(self, x: torch.Tensor, hook: Any) -> torch.Tensor:
        self.passes += 1
        if self.passes != self.at:
            return x
        return x + 1000 * torch.nn.functional.one_hot(torch.tensor(self.token), x.shape[-1])
