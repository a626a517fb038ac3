"""Arguments of public functions pass gates before anything else happens: one line above a function.

1. What is annotated as a number, several of them or a yes or no becomes Python's, whatever library it
   comes from; anything else is refused, and so are counts that are too small (``kinds.py``).
2. ``@gate(model=check_model, saes=check_saes)`` gives each named argument, and how the function is
   called, to its check, in this order. A check raises or says nothing; what else an argument becomes is
   the function's own business. Swapped arguments are refused by the first of them, with the order that
   is right.
3. The function runs outside of inference mode (``inference.py``).

Class methods have the gate below ``@classmethod``.

Cost: binding the arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from gemmascope_plugin.models.inference import usual_mode
from gemmascope_plugin.models.kinds import as_kind, check_count, kind_of

Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[Any, str], object]


def gate(**checks: Check) -> Callable[[Function], Function]:
    """A decorator that checks arguments by name.

    Args:
        **checks: Name of an argument to what judges it, given the argument and the call in words.
    """

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
