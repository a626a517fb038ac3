"""Words and ids: the exact text first, nothing guessed where a vocabulary has both forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin.errors import InputError, UnknownNameError
from gemmascope_plugin.models.tokens import quoted_label, token_id, token_label, token_strings
from tests.support.real_like import real_like, tokenizer, vocabulary

PARIS, SPACED_PARIS = vocabulary().index("Paris"), vocabulary().index("\u2581Paris")


def _spelled(token: int) -> str:
    return vocabulary()[token].replace("\u2581", " ")


@pytest.mark.parametrize("number", [7, np.int64(7), torch.tensor(7), np.array(7), 7.0])
def test_ids_of_any_library_are_ids(number: object) -> None:
    assert token_id(real_like(), number) == 7


@pytest.mark.parametrize("wrong", [True, 1.5, None, ["Paris"], b"Paris", torch.tensor([1, 2])])
def test_what_is_neither_word_nor_id_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="is neither a word nor a token id"):
        token_id(real_like(), wrong)


@pytest.mark.parametrize("number", [-1, 442, 10**9])
def test_ids_outside_the_vocabulary_are_refused(number: int) -> None:
    with pytest.raises(UnknownNameError, match=f"Token id {number} does not exist.*ids 0 to 441"):
        token_id(real_like(), number)


@pytest.mark.parametrize(
    ("word", "prompt", "token"),
    [
        (" Paris", None, " Paris"),
        ("\n", None, "\n"),
        ("giver", None, " giver"),  # exists with a space only
        ("1", None, "1"),
        (".", None, "."),
        (",", "The cat", ","),
        (")", "The cat", ")"),
        (" .", "The cat", " ."),
        ("The", "a cat.\n", "The"),
        ("Yes", "<start_of_turn>model\n", "Yes"),
        ("cat", '<a href="', "cat"),
        ("cat", "the (", "cat"),
        ("cat", "the ", "cat"),
        ("cat", "a wild-", "cat"),
        (" cat", "the (", " cat"),
        ("Paris", [2], "Paris"),
        ("Paris", torch.tensor([2, 262]), "Paris"),
    ],
)
def test_the_text_itself_first_then_what_the_prompt_says(word: str, prompt, token: str) -> None:
    assert _spelled(token_id(real_like(), word, prompt)) == token


@pytest.mark.parametrize("word", ["Paris", "ing", "The", "Yes", "cat", "("])
@pytest.mark.parametrize("prompt", [None, "The capital is", "walk", "The cat.", "dogs'"])
def test_where_nothing_decides_both_tokens_are_named(word: str, prompt: str | None) -> None:
    exact, spaced = (vocabulary().index(w) for w in (word, f"\u2581{word}"))
    words = rf"token '\{word}' \(id {exact}\) or the token ' \{word}' \(id {spaced}\)"
    words = words if word == "(" else words.replace("\\" + word, word)
    with pytest.raises(UnknownNameError, match=words):
        token_id(real_like(), word, prompt)


def test_several_tokens_are_listed() -> None:
    with pytest.raises(UnknownNameError, match=r"it is 2: 'New' \+ ' York'.*sequence_logprob"):
        token_id(real_like(), "New York")
    with pytest.raises(UnknownNameError, match=r"it is 2: '<0xC3>' \+ '<0xBC>'"):
        token_id(real_like(), "\u00fc")


def test_labels_say_what_a_token_is() -> None:
    model = real_like()
    assert token_label(model, SPACED_PARIS) == " Paris"
    assert token_label(model, 0xC3 + 6) == "<0xC3>"
    assert token_label(model, ord("A") + 6) == "<0x41>"  # not the letter, which is another token
    assert token_label(model, 4) == "<start_of_turn>"
    assert token_label(model, 441) == "441"  # a row of the embedding that no token has
    assert quoted_label(model, torch.tensor(PARIS)) == f"'Paris' ({PARIS})"
    assert token_strings(model, torch.tensor([2, PARIS])) == ["<bos>", "Paris"]


def test_every_token_has_a_label() -> None:
    labels = [token_label(real_like(), i) for i in range(real_like().cfg.d_vocab)]
    assert all(labels)
    assert not any("\ufffd" in label for label in labels)
    assert len(set(labels)) == len(labels), "this vocabulary has no two that look alike"


def test_a_byte_is_one_token_by_its_number_only() -> None:
    ids = tokenizer()("\u00fc", add_special_tokens=False)["input_ids"]
    assert [token_label(real_like(), i) for i in ids] == ["<0xC3>", "<0xBC>"]


@pytest.mark.untyped
def test_the_name_of_a_byte_is_said_to_be_one() -> None:
    """As Gemma's tokenizer has it: the name is in the vocabulary, and its text is several tokens."""

    class Pieces:
        unk_token_id = 3

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [10] * len(text)}

        def get_vocab(self) -> dict[str, int]:
            return {"<0xE0>": 462}

        def decode(self, ids: list[int]) -> str:
            return "x"

    model: Any = SimpleNamespace(tokenizer=Pieces(), cfg=SimpleNamespace(d_vocab=500))
    for name in ("<0xE0>", "<0xe0>"):
        with pytest.raises(UnknownNameError, match="name of a byte token.*its id is 462.*Try: 462"):
            token_id(model, name)
    with pytest.raises(UnknownNameError, match="it is 6: 'x'"):
        token_id(model, "<0xE1>")
