"""Situations that a call may be in: other arguments that mean the same, and arguments that are wrong.

A change of the first sort goes by the names and kinds of arguments, so every function of ``arguments.py``
has it, and the call must give the same numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import gemmascope_plugin as gs
from tests.support.arguments import Arguments, public
from tests.support.calls import Scene

PROMPTS = ("prompt", "prompts", "tokens", "corpus")
"""Arguments that hold prompts; those of a task are in it."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""A chat template under which a conversation of one message is its text."""
NAN = float("nan")


def _rows(model: Any, prompts: Any) -> list[list[int]]:
    """The ids of texts, or ids."""
    if isinstance(prompts, torch.Tensor):
        return prompts.tolist()
    texts = [prompts] if isinstance(prompts, str) else prompts
    return [[2, *model.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]


def _single(rows: list[Any]) -> Any:
    """One prompt without the list around it."""
    return rows[0] if len(rows) == 1 else rows


def _encoded(rows: list[list[int]], n_in_front: int = 0) -> Any:
    """As a tokenizer gives them that pads on the left."""
    from transformers import BatchEncoding

    width = max(map(len, rows)) + n_in_front
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def _padded_behind(rows: list[list[int]], n: int) -> torch.Tensor:
    """Ids as a tensor, PAD behind the end of each."""
    width = max(map(len, rows)) + n
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _texts(model: Any, rows: list[list[int]], before: str = "") -> list[str]:
    return [before + model.tokenizer.decode(row[1:]) for row in rows]


def _chats(model: Any, rows: list[list[int]]) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in _texts(model, rows)]


FORMS: dict[str, Callable[[Any, list[list[int]]], Any]] = {
    "list": lambda model, rows: _single(rows),
    "array": lambda model, rows: np.array(_single(rows)),
    "BatchEncoding": lambda model, rows: _encoded(rows),
    "conversation": lambda model, rows: _single(_chats(model, rows)),
    "text with BOS": lambda model, rows: _texts(model, rows, "<bos>"),
    "padded in front, with a mask": lambda model, rows: _encoded(rows, 2),
    "padded in front, without": lambda model, rows: _encoded(rows, 2)["input_ids"],
    "padded behind": lambda model, rows: _padded_behind(rows, 3),
}
"""What a prompt may be handed over as, made from its ids."""
NO_FORMS: dict[str, Callable[[Any, list[list[int]]], Any]] = {
    "bytes": lambda model, rows: b"today the keys",
    "bytearray": lambda model, rows: bytearray(b"today"),
    "memoryview": lambda model, rows: memoryview(b"today"),
    "list of bytes": lambda model, rows: [b"today the keys"] * len(rows),
    "set": lambda model, rows: set(_texts(model, rows)),
    "frozenset": lambda model, rows: frozenset(rows[0]),
    "keys": lambda model, rows: dict.fromkeys(rows[0]).keys(),
}
"""What is not a prompt, though numbers or texts come out of it one by one."""


def prompts_of(arguments: Arguments) -> dict[str, Any]:
    """Arguments that hold prompts, tasks among them."""
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, gs.Task)
        # the lens has a prompt, and tokens that it is asked about
        or (name in PROMPTS and not (name == "tokens" and "prompt" in arguments))
    }


def in_form(arguments: Arguments, form: str) -> Arguments:
    """The same call, its prompts in a form, or in what is none."""
    model = arguments["model"]

    def formed(prompts: Any) -> Any:
        return (FORMS | NO_FORMS)[form](model, _rows(model, prompts))

    def changed(value: Any) -> Any:
        if isinstance(value, gs.Task):
            return dataclasses.replace(
                value, clean=formed(value.clean), corrupt=formed(value.corrupt)
            )
        return formed(value)

    formed_arguments = {name: changed(value) for name, value in prompts_of(arguments).items()}
    if "concepts" in arguments and form == "padded behind":  # marks of PAD as well
        marks, n = arguments["concepts"], formed_arguments["tokens"].shape[1]
        width = n - marks.shape[1]
        formed_arguments["concepts"] = torch.nn.functional.pad(marks, (0, 0, 0, width))
    return arguments | formed_arguments


LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda x: np.int64(x) if isinstance(x, int) else np.array(x),
    "torch": torch.tensor,
}


def with_numbers(arguments: Arguments, library: str) -> Arguments:
    """The same call, its integers those of a library."""

    def changed(value: Any) -> Any:
        is_list = isinstance(value, list) and all(type(item) is int for item in value)
        return LIBRARIES[library](value) if type(value) is int or is_list else value

    return {name: changed(value) for name, value in arguments.items()}


def too_long(arguments: Arguments) -> Arguments:
    """The same call, its prompts longer than the model's context."""
    length = int(arguments["model"].cfg.n_ctx) + 1

    def changed(value: Any) -> Any:
        rows = torch.full((3, length), 8)
        rows[:, 0] = 2
        if not isinstance(value, gs.Task):
            return rows[:1]
        corrupt = rows.clone()
        corrupt[:, 5] = 9
        return dataclasses.replace(value, clean=rows, corrupt=corrupt)

    return arguments | {name: changed(value) for name, value in prompts_of(arguments).items()}


COUNTS = {
    **dict.fromkeys(("max_rows", "batch_size", "steps", "top_k", "repeats", "max_new_tokens"), 0),
    **dict.fromkeys(("max_n_logits", "max_feature_nodes", "n_subsets", "k"), 0),
    **dict.fromkeys(("n_random", "min_tokens", "n_positions", "n_parents", "size", "n"), -1),
    **dict.fromkeys(("n_tokens", "seed", "sizes", "exclude"), -1),
}
"""The largest number that means nothing, by the name of the argument."""


def too_small(name: str, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Calls with counts of nothing, and what is wrong about each."""
    names = set(inspect.signature(public(name)).parameters) | set(arguments)
    for count in sorted(names & set(COUNTS)):
        for value in (COUNTS[count], -5):
            wrong: Any = [value] if count in ("sizes", "exclude") else value
            yield f"{count}={wrong!r}", arguments | {count: wrong}


def required(name: str) -> list[str]:
    """Arguments that a function cannot do without, in their order."""
    parameters = inspect.signature(public(name)).parameters.values()
    return [
        p.name for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    ]


WRONG = (None, "a text", 3, [3.5], {"a": 1}, NAN)
"""What nobody means."""


def wrong_arguments(name: str, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Calls that make no sense, with what is wrong about them."""
    order = required(name)
    for first, second in zip(order, order[1:], strict=False):
        swapped = {first: arguments[second], second: arguments[first]}
        yield f"{first} and {second} swapped", arguments | swapped
    for parameter in inspect.signature(public(name)).parameters.values():
        for value in WRONG:
            is_default = value is None and parameter.default is None
            is_right = parameter.name not in order and type(value) in (int, type(parameter.default))
            if parameter.kind != parameter.VAR_KEYWORD and not is_default and not is_right:
                yield f"{parameter.name}={value!r}", arguments | {parameter.name: value}


ILL: dict[str, Callable[[Scene], Scene]] = {}
"""A number that is not one, in one place."""


def _ill(place: str) -> Callable[[Callable[[Scene], None]], None]:
    def add(spoil: Callable[[Scene], None]) -> None:
        def make(sound: Scene) -> Scene:
            scene = Scene(copy.deepcopy(sound.model), copy.deepcopy(sound.saes), sound.n)
            scene.documents = sound.documents
            scene.results = dict(sound.results)
            spoil(scene)
            return scene

        ILL[place] = make

    return add


@_ill("unembedding")
def _unembedding(scene: Scene) -> None:
    weight = scene.model.unembed.W_U
    weight.data = weight.data.clone()
    weight.data[3] = NAN


@_ill("block")
def _block(scene: Scene) -> None:
    scene.model.blocks[1].mlp.W_out.data[3, 5] = NAN


@_ill("dictionaries")
def _dictionaries(scene: Scene) -> None:
    for sae in scene.saes.values():
        sae.W_dec.data[7, 2] = NAN
