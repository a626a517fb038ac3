"""What ``train`` takes as model, spec, corpus and folder: one result a form, one error a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemmascope_plugin.errors import GemmaScopeError, InputError, ModelError, UnknownNameError
from gemmascope_plugin.training import collect_activations, train, train_many
from gemmascope_plugin.training.text_batches import TokenStream
from tests.tiny_models import BOS_ID, PAD_ID
from tests.training.cases import corpus, run, same, spec

FIELDS: dict[str, Any] = {"layer": 1, "d_sae": 24, "target_l0": 4.0, "steps": 2, "batch_size": 32}


def short(**changes: Any) -> Any:
    return spec(steps=2, lr_warm_up=0, **changes)


def padded(at_front: int) -> torch.Tensor:
    """The corpus with three tokens of padding, some of them in front."""
    pad = torch.full((len(corpus()), 3), PAD_ID)
    return torch.cat([pad[:, :at_front], corpus(), pad[:, at_front:]], 1)


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: ids.tolist(),
        lambda ids: ids.numpy(),
        lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        lambda _: padded(0),
        lambda _: padded(2),
        lambda _: {"input_ids": padded(3), "attention_mask": (padded(3) != PAD_ID).int()},
    ],
    ids=[
        "lists",
        "array",
        "tokenizer output",
        "padding behind",
        "padding around",
        "padding masked",
    ],
)
def test_ids_of_any_form_train_the_same_dictionary(hooked2: Any, form: Any) -> None:
    assert same(run(hooked2, short(), form(corpus())), run(hooked2, short()))


def test_padding_in_front_of_a_batch_is_not_attended_to(hooked2: Any) -> None:
    """PAD may be kept by ``exclude=()``, and is left out all the same where it fills rows."""
    hooks = ["blocks.1.hook_resid_post"]
    for batches in ([padded(3)], [{"input_ids": padded(1)}]):
        stream = TokenStream(hooked2, batches, context=8, rows=5, seed=0)
        rows = stream.read()
        assert rows is not None and int(rows.real.sum()) == corpus().numel()
        torch.testing.assert_close(rows.tokens[rows.real], corpus().flatten())
    a, b = (collect_activations(hooked2, ids, hooks)[hooks[0]] for ids in (corpus(), padded(3)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_texts_are_cut_to_the_models_context(hooked2: Any) -> None:
    text = " ".join(["hello world"] * hooked2.cfg.n_ctx)
    stream = TokenStream(hooked2, text, context=10 * hooked2.cfg.n_ctx, rows=2, seed=0)
    rows = stream.read()
    assert rows is not None and rows.tokens.shape[1] == hooked2.cfg.n_ctx
    assert rows.tokens[:, 0].tolist() == [BOS_ID] * len(rows.tokens)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_that_are_off_outside_are_on_in_training(hooked2: Any, mode: Any) -> None:
    with mode():
        sae = run(hooked2, short())
    assert same(sae, run(hooked2, short()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: ("gemma-3-270m", FIELDS, corpus()), r"is not a model.*load_model\('gemma-3-270m'\)"),
        (lambda m: (FIELDS, m, corpus()), r"A dict is not a model.*train\(model, spec, corpus\)"),
        (lambda m: (m, ["a text"], FIELDS), "A list of str is not a training spec.*TrainSpec, or a dict"),
        (lambda m: (m, "jumprelu", corpus()), "The text 'jumprelu' is not a training spec"),
        (lambda m: (m, None, corpus()), "None is not a training spec"),
    ],
)  # fmt: skip
def test_arguments_in_another_order_or_of_another_kind(
    hooked2: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(*arguments(hooked2), progress=False)


@pytest.mark.untyped
def test_several_specs_are_a_list(hooked2: Any) -> None:
    with pytest.raises(InputError, match="The text 'layer' is not a training spec"):
        train_many(hooked2, FIELDS, corpus(), progress=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="The text 'x' is not a model"):
        collect_activations("x", corpus(), [])  # pyright: ignore[reportArgumentType]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (None, ModelError, "None is not a corpus.*texts, token ids"),
        (5, ModelError, "5 is not a corpus"),
        ({"text": ["a"]}, ModelError, "A dict is not a corpus"),
        (Path("some.txt"), ModelError, r"'some.txt' is a file.*read_text\(\).splitlines\(\)"),
        (__file__, ModelError, "is a file, and its text is meant"),
        (corpus() + 10_000, UnknownNameError, r"Token id \d+ does not exist. There is: token ids 0 to"),
        (corpus() - 10_000, UnknownNameError, r"Token id -\d+ does not exist"),
        ([[2, 10_000]], UnknownNameError, "Token id 10000 does not exist"),
        (np.full((2, 10_000), 5), ModelError, "Prompt 0 has 10000 tokens, the model's context has"),
        ([corpus() + 10_000], UnknownNameError, "does not exist"),
        (corpus().float(), InputError, r"A tensor of shape \[24, 17\] is not a prompt"),
        ((text for text in ["a", "b"]), InputError, r"'a' is not a batch of token ids.*list\(corpus\)"),
        ([3.5, "a"], InputError, "3.5 is not a prompt"),
    ],
)  # fmt: skip
def test_what_is_not_a_corpus(hooked2: Any, text: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        train(hooked2, FIELDS, text, progress=False)


def test_a_folder_that_is_a_file(hooked2: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "run", str(file / "a" / "b")):
        with pytest.raises(GemmaScopeError, match="file' is a file, not a folder. Try: another"):
            run(hooked2, short(), run_dir=folder)
    assert file.read_text() == "x"


@pytest.mark.parametrize("option", ["checkpoint_every", "keep", "log_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "10", None, True])
def test_counts_are_whole_numbers_from_1(hooked2: Any, option: str, value: Any) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    problem = "is out of range.*numbers from 1" if is_whole else "is not a whole number"
    with pytest.raises(GemmaScopeError, match=f"{option}=.* {problem}"):
        run(hooked2, short(), **{option: value})
