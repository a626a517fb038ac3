"""Functions x situations: each cell gives what the plain call gives, or an error that says what to type.

Prompts in every form and in what is none, numbers of every library, prompts that are too long, swapped
and wrong arguments, counts of nothing, a weight that is not a number, padding at both ends, inference
mode, float16; bfloat16 has a file of its own (``test_half_precision.py``), options as well
(``test_options.py``). The functions are those of ``gemmascope_plugin.__all__``: one without an entry in
``tests/support/arguments.py`` fails here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemmascope_plugin as gs
from gemmascope_plugin.demo.corpus import make_corpus
from gemmascope_plugin.errors import GemmaScopeError, ModelError
from tests.support.arguments import ARGUMENTS, ELSEWHERE, FLOORS, METRICS, call, public
from tests.support.calls import Numbers, Scene, bundled, numbers
from tests.support.compared import check_close, compared
from tests.support.situations import (
    FORMS,
    ILL,
    LIBRARIES,
    NO_FORMS,
    TEMPLATE,
    in_form,
    prompts_of,
    too_long,
    too_small,
    with_numbers,
    wrong_arguments,
)

OUTSIDE = ("wandb='a text'", "run_dir='a text'")
"""What is right, and asks a service who one is, or leaves a folder behind."""
FUNCTIONS = pytest.mark.parametrize("name", ARGUMENTS)


def scene_of(dtype: torch.dtype = torch.float32) -> Scene:
    built = bundled("hooked", dtype)
    built.documents = make_corpus(6, seed=9, length=24)  # no document ends within 12 tokens
    built.model.tokenizer.chat_template = TEMPLATE
    return built


@pytest.fixture(scope="module")
def scene() -> Scene:
    return scene_of()


def plain(name: str, scene: Scene) -> Numbers:
    """What the call gives, made once."""
    return scene.once(f"plain {name}", lambda: facts(call(name, ARGUMENTS[name](scene))))


def facts(result: Any) -> Numbers:
    """All numbers of a result but seconds; those of a module's weights."""
    if isinstance(result, torch.nn.Module):
        result = dict(result.state_dict())
    return {name: x for name, x in numbers(result).items() if "seconds" not in name}


def check_same(result: Any, expected: Numbers, share: float = 1e-4) -> None:
    """Numbers agree within a share of the largest of their kind."""
    values = facts(result)
    assert values.keys() == expected.keys()
    for name, x in values.items():
        y = expected[name]
        size = float(y.nan_to_num().abs().max()) if y.numel() else 0.0
        assert torch.allclose(x, y, rtol=0, atol=share * size + 1e-6, equal_nan=True), name


def test_every_public_function_is_in_the_table() -> None:
    names = {*gs.__all__, *(name for floor in FLOORS for name in getattr(gs, floor).__all__)}
    functions = {name for name in names if not inspect.isclass(public(name))}
    assert functions == {*ARGUMENTS, *ELSEWHERE}
    assert all((Path(__file__).parents[1] / file).is_file() for file in ELSEWHERE.values())


@pytest.mark.parametrize("form", FORMS)
@FUNCTIONS
def test_prompts_of_every_form(name: str, form: str, scene: Scene) -> None:
    arguments = ARGUMENTS[name](scene)
    if prompts_of(arguments):
        check_same(call(name, in_form(arguments, form)), plain(name, scene))


@pytest.mark.parametrize("form", NO_FORMS)
@FUNCTIONS
def test_what_is_not_a_prompt_is_refused(name: str, form: str, scene: Scene) -> None:
    arguments = ARGUMENTS[name](scene)
    if prompts_of(arguments):
        with pytest.raises(GemmaScopeError):
            call(name, in_form(arguments, form))


@FUNCTIONS
def test_counts_of_nothing_are_refused(name: str, scene: Scene) -> None:
    accepted = []
    for case, arguments in too_small(name, ARGUMENTS[name](scene)):
        try:
            call(name, arguments)
        except GemmaScopeError:
            continue
        accepted.append(case)
    assert not accepted


@FUNCTIONS
def test_a_token_that_does_not_exist_cannot_be_left_out(name: str, scene: Scene) -> None:
    if "exclude" in inspect.signature(public(name)).parameters:
        arguments = ARGUMENTS[name](scene) | {"exclude": [2, scene.model.cfg.d_vocab]}
        with pytest.raises(GemmaScopeError, match=r"Token id 462 does not exist.*0 to 461"):
            call(name, arguments)


@pytest.mark.parametrize("library", LIBRARIES)
@FUNCTIONS
def test_numbers_of_every_library(name: str, library: str, scene: Scene) -> None:
    check_same(call(name, with_numbers(ARGUMENTS[name](scene), library)), plain(name, scene))


@FUNCTIONS
def test_inference_mode_changes_nothing(name: str, scene: Scene) -> None:
    arguments = ARGUMENTS[name](scene)
    with torch.inference_mode():
        check_same(call(name, arguments), plain(name, scene))


def test_what_is_loaded_in_inference_mode_can_be_differentiated() -> None:
    with torch.inference_mode():
        specs = gs.tiny().specs[:2]
        models = [gs.tiny(backend=backend).model for backend in ("hooked", "bridge")]
        loaded = [gs.load(specs[0]), gs.load_suite(specs)[specs[1]], *models]
    for module in loaded:
        assert not any(x.is_inference() for x in (*module.parameters(), *module.buffers()))


def test_a_dictionary_from_inside_inference_mode_says_so(scene: Scene) -> None:
    with torch.inference_mode():
        sae = copy.deepcopy(scene.saes["res"])
    with pytest.raises(ModelError, match="made inside torch.inference_mode.*outside"):
        gs.verify(scene.model, sae, scene.prompt)


@pytest.mark.parametrize("form", FORMS)
def test_a_task_has_an_entry_for_each_prompt(form: str, scene: Scene) -> None:
    for task in (scene.task, scene.task.first(1)):
        formed = in_form({"model": scene.model, "task": task}, form)["task"]
        assert len(formed) == len(task) and f"{len(task)} prompts" in repr(formed)
        expected, taken = (t.take([len(task) - 1]).bind(scene.model) for t in (task, formed))
        assert torch.equal(taken.clean, expected.clean)
        assert torch.equal(taken.corrupt, expected.corrupt)


@FUNCTIONS
def test_a_prompt_longer_than_the_context_is_refused(name: str, scene: Scene) -> None:
    arguments = ARGUMENTS[name](scene)
    if prompts_of(arguments) and name != "concept_scores":
        with pytest.raises(GemmaScopeError, match=r"129 tokens.* context has 128.*Try"):
            call(name, too_long(arguments))


@FUNCTIONS
def test_wrong_arguments_have_errors_of_ours(name: str, scene: Scene) -> None:
    """Never one of Python's or torch's; some values do mean something, as None for a default."""
    raw = []
    for case, arguments in wrong_arguments(name, ARGUMENTS[name](scene)):
        if case in OUTSIDE:
            continue
        try:
            call(name, arguments)
        except GemmaScopeError as error:
            assert len(str(error)) > 20, case
        except Exception as error:  # noqa: BLE001
            raw.append(f"{case}: {error!r}")
    assert not raw


@pytest.fixture(scope="module")
def half(scene: Scene) -> Scene:
    """In float16, with the circuits of the float32 model."""
    built = scene_of(torch.float16)
    for name in ("circuit", "feature_circuit"):
        built.results[name] = getattr(scene, name)
    return built


@FUNCTIONS
def test_float16_says_what_float32_says(name: str, half: Scene, scene: Scene) -> None:
    """A float16 number is off by ``2^-12`` at most: some 50 roundings of activations and 30 of weights
    that all point one way, see ``test_half_precision.py``.
    """
    if name not in ("train", "load", "find", "load_suite", "tiny", "footprint", "plot_comparison"):
        got, expected = (compared(name, call(name, ARGUMENTS[name](run))) for run in (half, scene))
        kind = "activation_patching" if name in METRICS else name
        check_close(kind, got, expected, 80 * 2.0**-12, 2.0**-11)


@pytest.mark.parametrize("place", ILL)
@FUNCTIONS
def test_no_result_rests_on_a_weight_that_is_not_a_number(
    name: str, place: str, scene: Scene, ill: Callable[[str], Scene]
) -> None:
    """An error that says so; or the same numbers, where the weight plays no part.

    A splice hands on what the model says, and is asked by somebody who sees it.
    """
    if name == "splice" and place != "dictionaries":
        return
    expected, arguments = plain(name, scene), ARGUMENTS[name](ill(place))
    try:
        result = call(name, arguments)
    except GemmaScopeError as error:
        assert "finite" in str(error) or "NaN" in str(error)
    else:
        check_same(result, expected)


@pytest.fixture(scope="module")
def ill(scene: Scene) -> Callable[[str], Scene]:
    made: dict[str, Scene] = {}

    def get(place: str) -> Scene:
        if place not in made:
            for arguments in ARGUMENTS.values():
                arguments(scene)  # results of a sound model, that others start from
            made[place] = ILL[place](scene)
        return made[place]

    return get
