"""Arguments of public functions pass gates before anything else happens: one line above a function.

1. What is annotated as a number, several of them or a yes or no becomes Python's, whatever library it
   comes from; anything else is refused. The annotation as it is written is the key, so a new argument is
   judged without another word. Counts are judged by their name as well (``LEAST``): a pass of no rows and
   -1 random circuits mean nothing, whoever is asked.
2. ``@gate(model=check_model, saes=check_saes)`` gives each named argument, and how the function is
   called, to its check, in this order. A check raises or says nothing; what else an argument becomes is
   the function's own business. Swapped arguments are refused by the first of them, with the order that
   is right.
3. The function runs outside of inference mode: gradients are what many functions are made of. What a
   model has made inside it is copied: ``HookedTransformer`` extends its table of rotary embeddings when
   a text is long, and a table from inside could never again take part in a backward pass. Weights that
   were loaded inside it stay unusable for gradients, which is said here.

Class methods have the gate below ``@classmethod``.

Cost: binding the arguments.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from gemmascope_plugin.arguments import BYTES, as_index, as_indices, parse_size
from gemmascope_plugin.errors import InputError, ModelError
from gemmascope_plugin.models.protocol import describe

Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[Any, str], object]


def gate(**checks: Check) -> Callable[[Function], Function]:
    """A decorator that checks arguments by name: what judges one is given it and the call in words."""

    def around(function: Function) -> Function:
        signature = inspect.signature(function)
        call = call_of(function)
        kinds = {
            name: kind
            for name, parameter in signature.parameters.items()
            if (kind := kind_of(parameter)) is not None
        }

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python says best what is missing
            arguments = bound.arguments
            for name, check in checks.items():
                if name in arguments:
                    check(arguments[name], call)
            for name, kind in kinds.items():
                if name in arguments:
                    parameter = signature.parameters[name]
                    arguments[name] = as_kind(parameter, arguments[name], kind)
                    check_count(parameter, arguments[name])
            with usual_mode(arguments.get("model")):
                return function(*bound.args, **bound.kwargs)

        return cast("Function", checked)

    return around


def call_of(function: Callable[..., Any]) -> str:
    """How a function is called: its name and the arguments that it cannot do without.

    A class method goes by its class: ``Task.builtin(name, model)``.
    """
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    name = getattr(function, "__name__", "function")
    if needed[:1] == ["cls"]:
        name, needed = function.__qualname__.split("<locals>.")[-1], needed[1:]
    return f"{name}({', '.join(needed)})"


@contextmanager
def usual_mode(model: object = None) -> Iterator[None]:
    """The block runs outside of inference mode, with the tables of a model mended."""
    # inside inference mode gradients are off whatever is wanted, so that does not answer
    wanted = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        if isinstance(model, torch.nn.Module):
            _mend(model)
        yield


def _mend(model: torch.nn.Module) -> None:
    for block in getattr(model, "blocks", ()):
        attention = getattr(block, "attn", None)
        buffers = getattr(attention, "_buffers", {})
        for name in ("rotary_sin", "rotary_cos"):
            table = buffers.get(name)
            if table is not None and table.is_inference():
                buffers[name] = table.clone()
    weight = next(iter(model.parameters()), None)
    if weight is not None and weight.is_inference():
        raise ModelError(
            "The model was made inside torch.inference_mode(), so nothing can be differentiated",
            fix="load it outside of the block",
        )


LEAST = {
    **dict.fromkeys(("max_rows", "batch_size", "steps", "top_k", "size"), 1),
    **dict.fromkeys(("n_random", "min_tokens", "seed"), 0),
}
"""Counts by the name of their argument, and the smallest that means something."""


@dataclass(frozen=True)
class Kind:
    """What may stand at an argument."""

    noun: str
    read: Callable[[Any], Any]
    """The value as Python's, or None where it is something else."""
    types: tuple[type, ...] = ()
    """Values that are left alone."""
    may_be_none: bool = False


def kind_of(parameter: inspect.Parameter) -> Kind | None:
    """By the annotation as it is written; None for what is left to the function."""
    written = parameter.annotation
    text = written if isinstance(written, str) else inspect.formatannotation(written)
    plain = text.removesuffix(" | None")
    kind = _MARKS if plain.startswith("Bool[torch.Tensor") and plain.endswith("]") else None
    kind = _KINDS.get(plain, kind)
    may_be_none = plain != text or parameter.default is None
    return None if kind is None else replace(kind, may_be_none=may_be_none)


def as_kind(parameter: inspect.Parameter, value: object, kind: Kind) -> Any:
    """The value of an argument as what it stands for."""
    if (value is None and kind.may_be_none) or type(value) in kind.types:
        return value
    read = None if value is None else kind.read(value)
    if read is None:
        is_needed = parameter.default is parameter.empty
        fix = None if is_needed else f"{parameter.name}={parameter.default!r}, the default"
        raise InputError(f"{parameter.name}={_shown(value)} is not {kind.noun}", fix=fix)
    return read


def check_count(parameter: inspect.Parameter, value: object) -> None:
    """Refuses a number of things that is smaller than there can be."""
    least = LEAST.get(parameter.name)
    if least is None or type(value) is not int or value >= least:
        return
    default = parameter.default
    raise InputError(
        f"{parameter.name}={value} is out of range",
        exists=f"whole numbers from {least}",
        fix=f"{parameter.name}={default!r}, the default" if type(default) is int else None,
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else describe(value)


def _flag(value: object) -> bool | None:
    is_bool = str(getattr(value, "dtype", "")).endswith("bool")
    return bool(value) if is_bool and not getattr(value, "ndim", 0) else None


def _real(value: Any) -> float | None:
    if isinstance(value, (bool, str)) or getattr(value, "ndim", 0):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _position(value: object) -> int | list[int] | None:
    single = as_index(value)
    return as_indices(value) if single is None else single


def _listed(value: object) -> list[Any] | None:
    if isinstance(value, (str, *BYTES, Mapping)) or not isinstance(value, Iterable):
        return None
    return list(value) if getattr(value, "ndim", 1) == 1 else None


def _texts(value: object) -> list[str] | None:
    texts = (
        [value] if isinstance(value, str) else None if isinstance(value, Set) else _listed(value)
    )
    return texts if texts is not None and all(isinstance(t, str) for t in texts) else None


def _special(value: object) -> str | int | tuple[str | int, ...] | None:
    single = value if isinstance(value, str) else as_index(value)
    if single is not None:
        return single
    items = [item if isinstance(item, str) else as_index(item) for item in _listed(value) or []]
    return None if None in items or _listed(value) is None else tuple(items)  # pyright: ignore


def _marks(value: object) -> torch.Tensor | None:
    try:
        marks = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return marks if marks.dtype == torch.bool and marks.ndim else None


def _path(value: object) -> Any:
    return value if isinstance(value, (str, os.PathLike)) else None


def _source(value: object) -> Any:
    return value if isinstance(value, (str, os.PathLike, Mapping)) else None


_WHOLE = Kind("a whole number", as_index, (int,))
_REAL = Kind("a number", _real, (float, int))
_SPECIAL = Kind("bos, eos, pad or token ids, one or several", _special)
_TEXTS = Kind("a list of texts", _texts)
_MARKS = Kind("an array of True and False", _marks)
_KINDS = {
    "int": _WHOLE,
    "SupportsIndex": _WHOLE,
    "float": _REAL,
    "float | int": _REAL,
    "int | float": _REAL,
    "bool": Kind("True or False", _flag, (bool,)),
    "str": Kind("a text", lambda value: str(value) if isinstance(value, str) else None, (str,)),
    "str | Path": Kind("a path", _path),
    "str | Path | Mapping[str, Any]": Kind("a path, or what such a file holds", _source),
    "Sequence[int]": Kind("a list of whole numbers", as_indices),
    "Sequence[str]": _TEXTS,
    "str | Sequence[str]": replace(_TEXTS, types=(str,)),
    "int | str": Kind("a size", parse_size),
    "Sequence[str | int]": _SPECIAL,
    "str | int | Sequence[str | int]": _SPECIAL,
    "Exclude": _SPECIAL,
    "Position": Kind("a position, or one for each prompt", _position, (int,)),
}
"""Annotations to what may stand there; ``| None`` behind one lets None pass."""
