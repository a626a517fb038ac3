"""What people hand over: functions x {forms of ids, indices, swapped arguments, padding, threads}."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.errors import FeatureIndexError, InputError, ModelError
from gemmascope_plugin.models.chat import stop_ids
from gemmascope_plugin.models.record import attached, hooking
from tests import factories
from tests.support.real_like import (
    END,
    EOS,
    PROMPT,
    SHORT,
    real_like,
    real_like_sae,
    tokenizer,
    vocabulary,
)

PROMPTS = [SHORT, PROMPT, "a"]
BOTH = pytest.mark.parametrize("backend", ["hooked", "bridge"])


def _ids(text: str) -> list[int]:
    return [2, *tokenizer()(text, add_special_tokens=False)["input_ids"]]


FORMS = {
    "list": _ids(PROMPT),
    "array": np.array(_ids(PROMPT)),
    "tensor": torch.tensor([_ids(PROMPT)]),
    "tokenizer": tokenizer()(PROMPT, return_tensors="pt"),
    "padded in front": torch.tensor([[0, 0, *_ids(PROMPT)]]),
    "padded behind": torch.tensor([[*_ids(PROMPT), 0, 0, 0]]),
    "list of one text": [PROMPT],
}
READERS = {
    "analyze": lambda p: gs.analyze(real_like(), real_like_sae(), p).frame["activation"].tolist(),
    "logit_lens": lambda p: repr(gs.logit_lens(real_like(), p, top_k=2)),
    "verify": lambda p: gs.verify(real_like(), real_like_sae(), p).l0,
    "measure": lambda p: gs.measure(real_like(), real_like_sae(), p).l0,
    "steer": lambda p: (
        gs.steer(real_like(), real_like_sae(), 3, 9.0, p, max_new_tokens=2).ids_after
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_every_form_of_a_prompt(reader: str, form: str) -> None:
    assert READERS[reader](FORMS[form]) == READERS[reader](PROMPT)


@BOTH
def test_functions_of_one_prompt_end_where_it_ends(backend: str) -> None:
    suite = gs.tiny(backend=backend)
    model, prompt = suite.model, "today the keys near the cabinet"
    affine = gs.find(model="gemma-2-tiny", kind="transcoder", affine=True)
    transcoders = gs.load_suite(affine)
    ids = model.to_tokens(prompt)
    pad = torch.full((1, 3), model.tokenizer.pad_token_id)

    def lens(prompt: Any) -> np.ndarray:
        return np.asarray(gs.logit_lens(model, prompt).values)

    def traced(prompt: Any) -> np.ndarray:
        return gs.trace(model, prompt, transcoders, max_feature_nodes=8).edges.matrix.data

    def qk(prompt: Any) -> np.ndarray:
        paths = gs.qk_attribution(model, prompt, transcoders, layer=2, head=1, query=5, key=2)
        return np.array([paths.score, *paths.by_query["weight"], *paths.by_key["weight"]])

    for function in (lens, traced, qk):
        np.testing.assert_array_equal(function(torch.cat([ids, pad], 1)), function(ids))


@pytest.mark.parametrize("prompt", [b"today", bytearray(b"today"), [b"today"]])
def test_bytes_are_neither_text_nor_ids(prompt: Any) -> None:
    with pytest.raises(InputError, match=r"neither text nor token ids.*data.decode\(\)"):
        gs.analyze(real_like(), real_like_sae(), prompt)
    with pytest.raises(InputError):
        gs.splice(real_like(), real_like_sae(), exclude=prompt)


@pytest.mark.parametrize("prompt", [{"a", "b"}, frozenset([2, 300]), {2: 0, 300: 0}.keys()])
def test_what_has_no_order_is_not_a_prompt(prompt: Any) -> None:
    with pytest.raises(InputError, match="it has no order.*a list of the same"):
        gs.logit_lens(real_like(), prompt)


def _swapped() -> dict[str, tuple[Any, str]]:
    model = factories.tiny_model("gemma2", "hooked")
    sae = factories.residual(model, 1)
    specs = gs.find(model="gemma-2-tiny", site="res", kind="sae")
    first = "the model comes first"
    return {
        "splice": (lambda: gs.splice(sae, model), rf"splice\(model, saes\): {first}"),
        "analyze": (
            lambda: gs.analyze(model, "w5", sae),
            "'w5' is not a loaded dictionary.*analyze",
        ),
        "measure": (
            lambda: gs.measure(sae, model, "w5"),
            rf"measure\(model, sae, tokens\): {first}",
        ),
        "trace": (lambda: gs.trace(model, "w5", specs), "load_suite"),
        "a spec": (lambda: gs.splice(model, specs[0]), r"SaeSpec is not a loaded.*load\(spec\)"),
        "model twice": (lambda: gs.splice(model, model), "model stands where a dictionary belongs"),
        "evaluate": (lambda: gs.evaluate(None, model, None), r"evaluate\(model, circuit, task\)"),
        "task": (
            lambda: gs.activation_patching(model, "ioi", "z"),
            r"text 'ioi' is not a task.*Task.builtin\('ioi', model\)",
        ),
        "discover": (lambda: gs.discover("2b", None), r"load_model\('2b'\)"),
        "verify": (lambda: gs.verify(model, [sae, sae], "w5"), "2 were given.*once for each"),
        "suite": (lambda: gs.discover(gs.tiny(), None), "its attribute .model"),
        "prompt": (lambda: gs.analyze(model, sae, model), "is not a prompt"),
        "intervene": (lambda: gs.intervene(model, sae, "x", {}), "is not an attribution graph"),
        "names": (lambda: gs.Ablate(features="giver"), "'giver' does not say which features"),
    }


@pytest.mark.parametrize("case", _swapped())
def test_swapped_and_wrong_arguments_say_what_to_type(case: str) -> None:
    call, words = _swapped()[case]
    with pytest.raises((InputError, FeatureIndexError), match=words):
        call()


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("positions", [None, -1, slice(-1, None)])
def test_prompts_of_unequal_length_are_as_one_by_one(backend: str, positions: Any) -> None:
    model, sae = real_like(backend), real_like_sae(backend)
    edit = gs.Add(features=3, amount=1e4, positions=positions)
    options = {"max_new_tokens": 3, "do_sample": False}
    with gs.splice(model, sae, edits=edit) as spliced:
        logits, texts = spliced(PROMPTS), spliced.generate(PROMPTS, **options)
        for row, prompt in enumerate(PROMPTS):
            alone, text = spliced(prompt)[0], spliced.generate(prompt, **options)[0]
            assert (logits[row, : len(alone)] - alone).abs().max() < 1e-3
            assert texts[row, : len(text)].tolist() == text.tolist()
            assert not texts[row, len(text) :].any()


@torch.no_grad()
@BOTH
def test_padding_in_front_is_masked_with_and_without_a_mask(backend: str) -> None:
    encoded = tokenizer()([SHORT, PROMPT], padding=True, return_tensors="pt")
    with gs.splice(real_like(backend), real_like_sae(backend)) as spliced:
        alone = spliced(SHORT)[0, -1]
        for prompts in (encoded, encoded["input_ids"]):
            assert (spliced(prompts)[0, -1] - alone).abs().max() < 1e-3


def test_several_prompts_give_several_results() -> None:
    listed = gs.analyze(real_like(), real_like_sae(), PROMPTS)
    assert [len(features.tokens) for features in listed] == [3, 6, 2]
    alone = gs.analyze(real_like(), real_like_sae(), SHORT)
    assert listed[0].frame.equals(alone.frame)
    steered = gs.steer(real_like(), real_like_sae(), 3, 9.0, PROMPTS[:2], max_new_tokens=2)
    assert [run.prompt.endswith(p) for run, p in zip(steered, PROMPTS, strict=False)] == [True] * 2


@pytest.mark.parametrize(
    "index", [np.int64(3), torch.tensor(3), torch.tensor([0, 9]).topk(1).indices]
)
def test_indices_of_any_library_are_features(index: Any) -> None:
    edit = gs.Ablate(features=index)
    assert edit.indices in ((3,), (1,))
    if getattr(index, "ndim", 0) == 0:
        gs.steer(real_like(), real_like_sae(), index, 9.0, SHORT, max_new_tokens=1)


def test_a_generation_ends_where_the_model_says_and_where_asked() -> None:
    hooked, bridge = real_like(), real_like("bridge")
    assert stop_ids(hooked) == stop_ids(bridge) == [EOS, END]
    paris = vocabulary().index("\u2581Paris")
    assert stop_ids(hooked, " Paris") == [EOS, END, paris]
    with torch.no_grad(), gs.splice(hooked, real_like_sae()) as spliced:
        free = spliced.generate(SHORT, max_new_tokens=5, do_sample=False)[0]
        cut = spliced.generate(SHORT, max_new_tokens=5, do_sample=False, stop=int(free[3]))[0]
    assert cut.tolist() == free[:4].tolist()


def test_what_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(ModelError, match="61 tokens and 5 new ones.*max_new_tokens=3"):
        gs.steer(real_like(), real_like_sae(), 3, 9.0, [2] * 61, max_new_tokens=5)
    with pytest.raises(ModelError, match="Prompt 0 has 65 tokens"):
        gs.analyze(real_like(), real_like_sae(), [2] + [300] * 64)


def test_inference_mode_hinders_no_gradient_and_leaves_nothing_behind() -> None:
    model = factories.tiny_model("gemma3", "hooked")
    task = gs.Task(["w5 w6 w7"], ["w5 w9 w7"], gs.logit_diff(["w9"], ["w10"]))
    expected = gs.attribution_patching(model, task, "resid_pre").values
    with torch.inference_mode():
        inside = gs.attribution_patching(model, task, "resid_pre").values
        attention = model.blocks[0].attn
        attention.rotary_sin = attention.rotary_sin.clone()  # as a long generation leaves it
    assert attention.rotary_sin.is_inference()
    assert torch.equal(torch.as_tensor(inside), torch.as_tensor(expected))
    after = gs.attribution_patching(model, task, "resid_pre").values
    assert torch.equal(torch.as_tensor(after), torch.as_tensor(expected))
    assert not attention.rotary_sin.is_inference()


def test_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    model = factories.tiny_model("gemma2", "hooked")
    errors: list[Exception] = []

    def other() -> None:
        try:
            with gs.splice(model, factories.residual(model, 0)):
                pass
        except ModelError as error:
            errors.append(error)

    with gs.splice(model, factories.residual(model, 1)) as spliced:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        spliced("w5 w6")
    assert "inside a splice of dictionaries at blocks.1.hook_resid_post" in str(errors[0])
    other()
    assert len(errors) == 1, "once the first is gone the second may"


@BOTH
def test_an_interruption_leaves_no_hook(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while the model runs nor while hooks are being removed."""
    model = factories.tiny_model("gemma2", backend)
    model(torch.tensor([[2, 5]]))  # a bridge has hooks of its own once it has run
    before = factories.n_hooks(model)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]

    def stop(x: torch.Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hooking(model, [(name, stop) for name in names]):
        model(torch.tensor([[2, 5]]))
    assert factories.n_hooks(model) == before

    point = model.hook_dict[names[0]]
    with pytest.raises(KeyboardInterrupt), attached([(point, lambda x, hook: None, "fwd")] * 2):
        handle = point.fwd_hooks[-1].hook
        remove = handle.remove
        calls: list[int] = []

        def once() -> None:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            remove()

        monkeypatch.setattr(handle, "remove", once)
    assert factories.n_hooks(model) == before
