"""The front door: what an import costs, and that every public name is there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import gemmascope_plugin as gs

HEAVY = ("torch", "pandas", "plotly", "transformer_lens", "sae_lens", "transformers", "numpy")


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout.strip()


def test_import_brings_no_heavy_library() -> None:
    code = f"import sys, gemmascope_plugin; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_the_program_brings_no_heavy_library() -> None:
    code = f"import sys, gemmascope_plugin.cli.app; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", gs.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(gs, name)
    assert not isinstance(value, ModuleType)
    assert value is getattr(importlib.import_module(gs._HOME_OF[name]), name)


def test_homes_and_all_agree() -> None:
    assert sorted(gs._HOME_OF) == gs.__all__ == sorted(gs.__all__)
    assert set(gs.__all__) <= set(dir(gs))


def test_the_function_splice_is_not_shadowed_by_its_floor() -> None:
    """Importing the floor first must not leave the module under the function's name."""
    code = (
        "import importlib, types, gemmascope_plugin as gs\n"
        "setattr(gs, 'splice', types.ModuleType('gemmascope_plugin.splice'))\n"
        "setattr(gs, 'figures', types.ModuleType('gemmascope_plugin.figures'))\n"
        "print('splice' in vars(gs), 'figures' in vars(gs))"
    )
    assert run_python(code) == "False True"


def test_unknown_name_says_what_was_meant() -> None:
    with pytest.raises(AttributeError) as caught:
        gs.load_modle  # noqa: B018
    assert str(caught.value).startswith(
        "module 'gemmascope_plugin' has no attribute 'load_modle'. Did you mean 'load_model'"
    )


def test_unknown_name_without_a_neighbour_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"There is: Ablate, Add, .*train, union, verify\.$"):
        gs.zzzzzzzz  # noqa: B018


def test_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"gemmascope_plugin": "1.2.3"}.__getitem__)
    assert gs._version() == "1.2.3"


def test_version_of_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert gs._version() == "0.0.0+source"


def test_type_checkers_see_the_same_names() -> None:
    stub = Path(gs.__file__).with_suffix(".pyi").read_text()
    names = set(re.findall(r"\w+ as (\w+)", stub))
    assert names == {*gs.__all__, *gs._FLOORS}


def test_a_name_of_a_floor_is_found() -> None:
    assert gs.measures.hierarchy is importlib.import_module("gemmascope_plugin.measures").hierarchy
    with pytest.raises(AttributeError, match=r"It is gemmascope_plugin\.measures\.hierarchy$"):
        gs.hierarchy  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_there_are_at_most_65_names() -> None:
    assert len(gs.__all__) <= 65
