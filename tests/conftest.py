"""Tiny models shared by all tests; nothing reaches the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Neither a manifest nor a stamp of the person at this machine may reach a test, or a test's theirs.  Set
# before anything is imported or parametrised; subprocesses and notebook kernels inherit it.
_HOME = tempfile.TemporaryDirectory(prefix="gemmascope-tests-")
os.environ["GEMMASCOPE_HOME"] = _HOME.name
# Tiny tensors: more threads only wait for one another, above all on a shared machine.
torch.set_num_threads(1)


def ask_each_class_once(protocol: Any) -> None:
    """``isinstance`` of a protocol answers from memory for classes that it has seen.

    The type checker asks at every call, and asking ``TransformerBridge`` for its ``hook_dict`` makes the
    dictionary anew, for milliseconds.
    """
    known: dict[type, bool] = {}

    class Remembering(type(protocol)):
        def __instancecheck__(cls, instance: Any) -> bool:
            kind = type(instance)
            if kind not in known:
                known[kind] = super().__instancecheck__(instance)
            return known[kind]

    protocol.__class__ = Remembering


FAMILIES = ("gemma2", "gemma3")
BACKENDS = ("hooked", "bridge")


@pytest.fixture(scope="session", autouse=True)
def quick_protocols() -> None:
    """Type checks of models cost nothing."""
    from gemmascope_plugin.models.protocol import HookedModel

    ask_each_class_once(HookedModel)


@pytest.fixture(scope="session", autouse=True)
def home_of_the_tests() -> Iterator[str]:
    """The folder for what the package keeps between runs, removed when all tests are done."""
    yield _HOME.name
    _HOME.cleanup()


@pytest.fixture(scope="session", params=[f"{f}-{b}" for f in FAMILIES for b in BACKENDS])
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every family on every model class, as ``(family, backend)``."""
    family, backend = request.param.split("-")
    return family, backend


@pytest.fixture(scope="session")
def model(kind: tuple[str, str]) -> Any:
    """The tiny model of this family and class; never change it."""
    from tests.factories import tiny_model

    return tiny_model(*kind)


@pytest.fixture(scope="session")
def hf(kind: tuple[str, str]) -> Any:
    """The transformers model with the same weights as ``model``."""
    from tests.factories import tiny_hf

    return tiny_hf(kind[0])


@pytest.fixture(scope="session")
def hooked2() -> Any:
    """Gemma 2 as ``HookedTransformer``, where one model is enough."""
    from tests.factories import tiny_model

    return tiny_model("gemma2", "hooked")


@pytest.fixture(scope="session")
def double() -> Any:
    """Gemma 2 as ``HookedTransformer`` in float64, for finite differences."""
    from tests.factories import tiny_model

    return tiny_model("gemma2", "hooked", double=True)
