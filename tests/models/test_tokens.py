"""Text to ids: BOS once, equal lengths, special tokens, words."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, ModelError, UnknownNameError
from gemmascope_plugin.models import special_ids, to_tokens, token_strings
from gemmascope_plugin.models.tokens import kept_positions, token_id
from tests.tiny_models import BOS_ID, EOS_ID, PAD_ID


@pytest.fixture
def speechless(hooked2):
    """The same model without a tokenizer."""
    bare = copy.copy(hooked2)
    bare.tokenizer = None
    return bare


def test_bos_is_put_in_front_once(model) -> None:
    for text in ("w5 w6", "<bos> w5 w6"):
        assert to_tokens(model, text).tolist() == [[BOS_ID, 5, 6]]


def test_a_tokenizer_without_bos_adds_none(hooked2) -> None:
    def words(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    words.bos_token_id = None
    bare = copy.copy(hooked2)
    bare.tokenizer = words
    assert to_tokens(bare, "w5 w6").tolist() == [[5, 6]]


def test_several_prompts_make_a_batch(model) -> None:
    assert to_tokens(model, ["w5 w6", "w7 w8"]).tolist() == [[BOS_ID, 5, 6], [BOS_ID, 7, 8]]


def test_ids_pass_through_and_one_row_becomes_a_batch(model) -> None:
    ids = torch.tensor([[BOS_ID, 5]])
    assert torch.equal(to_tokens(model, ids), ids)
    assert torch.equal(to_tokens(model, ids[0]), ids)


@pytest.mark.parametrize(
    "prompt", ["", "  \n", [], ["w5", ""], torch.zeros(1, 0, dtype=torch.long)]
)
def test_an_empty_prompt_is_an_error(hooked2, prompt) -> None:
    with pytest.raises(EmptySelectionError, match="prompt (is empty|has no tokens)"):
        to_tokens(hooked2, prompt)


def test_prompts_of_unequal_length_are_an_error(hooked2) -> None:
    with pytest.raises(ModelError, match=r"different lengths: \[2, 3\] tokens.*once per prompt"):
        to_tokens(hooked2, ["w5", "w6 w7"])


def test_text_without_a_tokenizer_is_an_error(speechless) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer.*token ids \[batch, pos\]"):
        to_tokens(speechless, "w5")
    with pytest.raises(ModelError, match="no tokenizer"):
        token_id(speechless, "w5")
    with pytest.raises(ModelError, match=r"exclude='bos' needs a tokenizer"):
        special_ids(speechless, ("bos",))


def test_ids_need_no_tokenizer(speechless) -> None:
    assert to_tokens(speechless, torch.tensor([[2, 5]])).tolist() == [[2, 5]]
    assert special_ids(speechless, (0, 7)) == {0, 7}
    assert token_strings(speechless, torch.tensor([2, 5])) == ["2", "5"]


def test_special_names_become_ids(hooked2) -> None:
    assert special_ids(hooked2, ("bos", "eos", "pad", 9)) == {BOS_ID, EOS_ID, PAD_ID, 9}
    assert special_ids(hooked2, ()) == frozenset()


def test_a_special_token_that_the_tokenizer_lacks_is_not_an_id(hooked2) -> None:
    bare = copy.copy(hooked2)
    bare.tokenizer = SimpleNamespace(bos_token_id=2, eos_token_id=1, pad_token_id=None)
    assert special_ids(bare, ("bos", "pad")) == {2}


def test_an_unknown_special_name_is_an_error(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="'boss' in exclude.*Did you mean 'bos'"):
        special_ids(hooked2, ("boss",))


def test_kept_positions_are_those_of_words() -> None:
    tokens = torch.tensor([[BOS_ID, 5, PAD_ID]])
    assert kept_positions(tokens, frozenset({BOS_ID, PAD_ID})).tolist() == [[False, True, False]]


def test_words_and_strings(hooked2) -> None:
    assert token_id(hooked2, "w17") == 17
    assert token_strings(hooked2, torch.tensor([BOS_ID, 17])) == ["<bos>", "w17"]


@pytest.mark.parametrize("word", ["w17x", "w17 w18", "nothing"])
def test_a_word_that_is_not_a_single_token_is_an_error(hooked2, word: str) -> None:
    with pytest.raises(UnknownNameError, match="is not a single token.*give the token id"):
        token_id(hooked2, word)


def test_the_nearest_word_is_named(hooked2) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'w17"):
        token_id(hooked2, "w17x")
