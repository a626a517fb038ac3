"""Every form of a prompt is the same ids; what cannot be one says so."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import gemmascope_plugin as gs
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    InputError,
    ModelError,
    TaskError,
    UnknownNameError,
)
from gemmascope_plugin.models.prompts import one_prompt, read_prompts, to_tokens
from gemmascope_plugin.models.protocol import check_model
from tests import factories
from tests.support.real_like import BOS, END, OTHER, PROMPT, SHORT, real_like, tokenizer
from tests.tiny_models import BOS_ID, PAD_ID

IDS = [BOS, 266, 364, 366, 362, 367]
FORMS = {
    "text": PROMPT,
    "text with BOS": f"<bos>{PROMPT}",
    "list of texts": [PROMPT],
    "ids": IDS,
    "tuple of ids": tuple(IDS),
    "several lists": [IDS],
    "numpy integers in a list": list(np.array(IDS)),
    "array": np.array(IDS),
    "matrix": np.array([IDS], dtype=np.int32),
    "tensor": torch.tensor(IDS),
    "tensor of one row": torch.tensor([IDS]),
    "list of tensors": [torch.tensor(IDS)],
    "list of rows": [torch.tensor([IDS])],
    "padded in front": torch.tensor([[0, 0, *IDS]]),
    "padded behind": [*IDS, 0, 0],
    "mapping": {"input_ids": IDS},
    "mapping with a mask": {"input_ids": [[9, *IDS]], "attention_mask": [[0] + [1] * 6]},
    "tokenizer": BatchEncoding({"input_ids": torch.tensor([IDS])}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_prompt_is_the_same_ids(form: str) -> None:
    prompts = read_prompts(real_like(), FORMS[form])
    tokens, lengths = prompts.packed()
    assert tokens.tolist() == [IDS]
    assert lengths.tolist() == [6]
    assert one_prompt(real_like(), FORMS[form], "each").tolist() == [IDS]


def test_the_tokenizer_itself_may_be_called() -> None:
    """Its padding is on the left, and its BOS is there already."""
    encoded = tokenizer()([SHORT, PROMPT], padding=True, return_tensors="pt")
    assert encoded["input_ids"][0, 0] == 0
    prompts = read_prompts(real_like(), encoded)
    tokens, lengths = prompts.packed()
    assert lengths.tolist() == [3, 6]
    assert tokens.tolist() == [[*to_tokens(real_like(), SHORT)[0].tolist(), 0, 0, 0], IDS]
    assert torch.equal(prompts.tokens, encoded["input_ids"])


def test_texts_lists_and_arrays_of_unequal_length_stand_side_by_side() -> None:
    tokens, lengths = read_prompts(real_like(), [SHORT, IDS, np.array([BOS, 266])]).packed()
    assert lengths.tolist() == [3, 6, 2]
    assert tokens[1].tolist() == IDS
    assert [row.tolist() for row in read_prompts(real_like(), [SHORT, IDS]).rows()][1] == IDS


@pytest.mark.parametrize("turns", [1, 3])
def test_messages_become_gemmas_turns(turns: int) -> None:
    messages = [
        {"role": "system", "content": "Yes"},
        {"role": "user", "content": " cat "},
        {"role": "assistant", "content": [{"type": "text", "text": "dog"}]},
        {"role": "user", "content": "mat"},
    ]
    text = "<bos><start_of_turn>user\nYes\n\ncat<end_of_turn>\n"
    if turns == 3:
        text += "<start_of_turn>model\ndog<end_of_turn>\n<start_of_turn>user\nmat<end_of_turn>\n"
    text += "<start_of_turn>model\n"
    expected = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert END in expected
    prompts = read_prompts(real_like(), messages[: turns + 1])
    assert prompts.tokens.tolist() == [expected]
    several = read_prompts(real_like(), [messages[: turns + 1], messages[1:2]])
    assert several.rows()[0].tolist() == expected
    assert len(several) == 2


def test_after_the_models_turn_nothing_is_opened() -> None:
    messages = [{"role": "user", "content": "cat"}, {"role": "model", "content": "dog"}]
    ids = read_prompts(real_like(), messages).tokens[0].tolist()
    assert tokenizer().decode(ids).endswith("model\ndog<end_of_turn>\n")


def test_a_template_of_the_tokenizer_is_used() -> None:
    model = copy.copy(real_like())
    model.tokenizer = copy.deepcopy(tokenizer())
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "cat"}, {"role": "model", "content": "dog"}]
    ids = read_prompts(model, messages).tokens[0].tolist()
    assert ids.count(BOS) == 1
    assert tokenizer().decode(ids) == "<bos>user: cat\nassistant: dog\n"


NO_PROMPTS = {
    "nothing": (None, InputError, "None is not a prompt.*a text, several texts"),
    "a number": (7, InputError, "7 is not a prompt"),
    "floats": (torch.zeros(1, 4), InputError, r"A tensor of shape \[1, 4\] is not a prompt"),
    "booleans": (np.ones(4, dtype=bool), InputError, "A ndarray is not a prompt"),
    "logits": (torch.zeros(2, 3, 4).long(), InputError, "is not a prompt"),
    "an empty list": ([], EmptySelectionError, "prompt is empty"),
    "an empty text": ("  ", EmptySelectionError, "prompt is empty"),
    "an empty row": ([IDS, []], EmptySelectionError, "prompt is empty"),
    "padding alone": ([0, 0], EmptySelectionError, "Prompt 0 has no tokens but padding"),
    "beyond the vocabulary": (
        [BOS, 10**6],
        UnknownNameError,
        "id 1000000 does not exist.*0 to 441",
    ),
    "below zero": ([BOS, -1], UnknownNameError, "id -1 does not exist"),
    "too long": ([BOS] + [300] * 64, ModelError, "Prompt 0 has 65 tokens.*context has 64"),
    "nested": ([[IDS, IDS]], InputError, "holds 2 prompts"),
    "several in a mapping of a list": ([{"input_ids": [IDS, IDS]}], InputError, "holds 2 prompts"),
    "another mapping": ({"text": PROMPT}, InputError, "A dict is not a prompt"),
    "a message without text": ([{"role": "user"}], InputError, "message has no text"),
    "another role": (
        [{"role": "tool", "content": "1"}],
        InputError,
        "no place for a message of 'tool'",
    ),
    "a hole in the mask": (
        {"input_ids": [IDS], "attention_mask": [[1, 1, 0, 1, 1, 1]]},
        TaskError,
        "mask of prompt 0 has a hole",
    ),
    "a mask of another shape": (
        {"input_ids": [IDS], "attention_mask": [[1, 1]]},
        TaskError,
        r"mask has shape \(1, 2\), the prompts are \(1, 6\)",
    ),
}


@pytest.mark.parametrize("situation", NO_PROMPTS)
def test_what_is_not_a_prompt_says_what_to_give(situation: str) -> None:
    prompts, error, words = NO_PROMPTS[situation]
    with pytest.raises(error, match=words):
        read_prompts(real_like(), prompts)


def test_messages_need_a_template(hooked2) -> None:
    with pytest.raises(ModelError, match="no chat template and no <start_of_turn>.*a text"):
        read_prompts(hooked2, [{"role": "user", "content": "w5"}])


def test_ids_with_padding_behind_keep_their_places(hooked2) -> None:
    """A corpus is a matrix; padding in front of it is moved, the rest stays."""
    tokens = torch.tensor([[BOS_ID, 5, 6], [BOS_ID, 7, PAD_ID]])
    assert torch.equal(to_tokens(hooked2, tokens), tokens)
    moved = to_tokens(hooked2, torch.tensor([[BOS_ID, 5, 6], [PAD_ID, BOS_ID, 7]]))
    assert torch.equal(moved, tokens)


def test_a_pad_that_means_something_else_too_is_a_token(hooked2) -> None:
    bare = copy.copy(hooked2)
    bare.tokenizer = SimpleNamespace(pad_token_id=BOS_ID, bos_token_id=BOS_ID)
    assert read_prompts(bare, torch.tensor([BOS_ID, 5, BOS_ID])).lengths.tolist() == [3]


class _Suite:
    def __init__(self, model: object) -> None:
        self.model = model


def test_what_is_not_a_model_says_what_comes_first(model) -> None:
    assert check_model(model) is model
    sae = factories.residual(factories.tiny_model("gemma2", "hooked"), 1)
    wrong = {
        "gemma-2-2b": r"The text 'gemma-2-2b' is not a model.*load_model\('gemma-2-2b'\), or f\(m\)",
        sae: "A JumpReLUSAE is not a model.*f.m.: the model comes first",
        _Suite(sae): "A _Suite is not a model.*its attribute .model",
        factories.tiny_hf("gemma2"): r"A Gemma2ForCausalLM is not.*load_model\(model\)",
        None: "None is not a model",
        (sae, sae): "A tuple of JumpReLUSAE is not a model",
        type(model): "The class .* is not a model",
    }
    for value, words in wrong.items():
        with pytest.raises(InputError, match=words):
            check_model(value, "f(m)")


def test_the_gate_is_the_first_thing_that_a_prompt_meets() -> None:
    with pytest.raises(GemmaScopeError, match="is not a model"):
        factories.unchecked(read_prompts)("gemma-2-2b", OTHER)


def test_words_that_the_tokenizer_does_not_know_are_refused() -> None:
    """Of a tokenizer without bytes, which would take any of them for the same."""
    model = gs.tiny().model
    with pytest.raises(
        UnknownNameError, match=r"does not know 'zebra', 'barks'.*462 tokens.*'<unk>'"
    ):
        read_prompts(model, "the zebra barks the zebra")
    with pytest.raises(UnknownNameError, match="does not know 'wolf'"):
        read_prompts(model, ["anna and george", "a <unk> wolf"])
    assert read_prompts(model, "anna <unk> george").tokens[0, 2] == model.tokenizer.unk_token_id
