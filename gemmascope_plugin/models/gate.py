"""Arguments of public functions pass gates before anything else happens: one line above a function.

``@gate(model=check_model, saes=check_saes)`` gives each named argument, and how the function is called,
to its check, in this order. A check raises or says nothing; what an argument becomes is the function's
own business. Swapped arguments are refused by the first of them, with the order that is right.

Cost: binding the arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from gemmascope_plugin.models.inference import usual_mode

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

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # Python says best what is missing
            for name, check in checks.items():
                if name in arguments:
                    check(arguments[name], call)
            with usual_mode(arguments.get("model")):
                return function(*args, **kwargs)

        return cast("Function", checked)

    return around


def call_of(function: Callable[..., Any]) -> str:
    """How a function is called: its name and the arguments that it cannot do without."""
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return f"{getattr(function, '__name__', 'function')}({', '.join(needed)})"
