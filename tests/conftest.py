"""Tiny models shared by all tests; nothing reaches the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import real, shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Neither a manifest nor a stamp of the person at this machine may reach a test, or a test's theirs.  Set
# before anything is imported or parametrised; subprocesses and notebook kernels inherit it.
_HOME = tempfile.TemporaryDirectory(prefix="gemmascope-tests-")
real.share_converted_models(_HOME.name)
os.environ["GEMMASCOPE_HOME"] = _HOME.name
# Tiny tensors: more threads only wait for one another, above all on a shared machine. Who names a number
# of threads gets it.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--shapes``: the shapes and types of every call are checked."""
    shapes.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Shape checks are built in while the package is imported, so this comes before any test."""
    if config.getoption("shapes"):
        shapes.check()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the whole suite, shape checks run a part."""
    if config.getoption("shapes"):
        shapes.select(config, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the real model need its weights."""
    real.skip_if_absent(item)


FAMILIES = ("gemma2", "gemma3")
BACKENDS = ("hooked", "bridge")


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


@pytest.fixture(scope="session")
def real_model() -> Any:
    """Gemma 3 270M as ``HookedTransformer`` in float32; never change it."""
    return real.real("hooked", "float32")


@pytest.fixture(scope="session")
def real_bridge() -> Any:
    """Gemma 3 270M as ``TransformerBridge`` in float32; never change it."""
    return real.real("bridge", "float32")


@pytest.fixture(scope="session")
def real_half() -> Any:
    """Gemma 3 270M as ``HookedTransformer`` in bfloat16; never change it."""
    return real.real("hooked", "bfloat16")


@pytest.fixture(scope="session")
def real_bridge_half() -> Any:
    """Gemma 3 270M as ``TransformerBridge`` in bfloat16; never change it."""
    return real.real("bridge", "bfloat16")
