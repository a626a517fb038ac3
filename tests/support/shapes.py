"""``pytest --shapes``: the jaxtyping shapes and the types of every call are checked, by beartype.

Checks at every call make a test up to twice as slow, so they have a run of their own. ``pytest --shapes``
over whole folders runs the first case of every test function: it calls every function that the others
call, which is what a shape check wants to see; and nothing of ``WITHOUT``. A file that is named on
the command line runs as a whole.

Of a list beartype checks one item, a random one, when a function is called and another when it returns.
Here they are neighbours instead: items whose sizes differ under one name fail every time, not sometimes.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any

import pytest

WITHOUT = (
    "tests/cli/",
    "tests/demo/",
    "tests/notebooks/",
    "tests/test_situations.py",
    "tests/training/test_resume.py",
)
"""Folders and files that run whole paths whose parts other files call, or processes of their own, or that
hand over what annotations do not allow. Single tests of the last kind have the mark ``untyped``."""


def add_option(parser: pytest.Parser) -> None:
    """Adds ``--shapes``."""
    parser.addoption(
        "--shapes",
        action="store_true",
        help="check the shapes and types of every call, on the first case of each test function",
    )


def check() -> None:
    """From here on modules of the package are imported with their calls checked."""
    from jaxtyping import install_import_hook

    loaded = [name for name in sys.modules if name.split(".")[0] == "gemmascope_plugin"]
    assert not loaded, f"imported before --shapes took effect: {loaded[:3]}"
    _take_items_in_turn()
    install_import_hook("gemmascope_plugin", "beartype.beartype")

    from gemmascope_plugin.models.protocol import HookedModel

    _ask_each_class_once(HookedModel)


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what a run with shape checks leaves out."""
    start = config.invocation_params.dir
    named = {(start / argument.split("::")[0]).resolve() for argument in config.args}
    seen: set[tuple[Any, ...]] = set()
    selected, deselected = [], []
    for item in items:
        function = item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name)
        is_first = function not in seen
        seen.add(function)
        path = item.path.relative_to(config.rootpath).as_posix()
        is_selected = item.path in named or (is_first and not path.startswith(WITHOUT))
        is_selected &= item.get_closest_marker("untyped") is None
        (selected if is_selected else deselected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)


def _take_items_in_turn() -> None:
    """The numbers by which checks choose an item count up from check to check."""
    checks = importlib.import_module("beartype._check.code.codemain")
    assert hasattr(checks, "getrandbits"), "beartype chooses items in another way"
    turn = itertools.count()
    setattr(checks, "getrandbits", lambda bits: next(turn))  # noqa: B010


def _ask_each_class_once(protocol: Any) -> None:
    """``isinstance`` of a protocol answers from memory for classes that it has seen.

    The type checker asks at every call, and asking ``TransformerBridge`` for its ``hook_dict`` makes the
    dictionary anew, for milliseconds.
    """
    answers: dict[type, bool] = {}

    class Remembering(type(protocol)):
        def __instancecheck__(cls, instance: Any) -> bool:
            kind = type(instance)
            if kind not in answers:
                answers[kind] = super().__instancecheck__(instance)
            return answers[kind]

    protocol.__class__ = Remembering
