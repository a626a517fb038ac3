"""SAELens' list of dictionaries to compare with, and a home folder of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

# The package is imported inside fixtures: ``pytest --shapes`` has to come before it.


@pytest.fixture(scope="session")
def saelens() -> dict[str, Any]:
    """Release to what SAELens' file says of it, read without importing SAELens."""
    package = find_spec("sae_lens")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder for one test; afterwards the catalog is as before."""
    from gemmascope_plugin.catalog import tables
    from gemmascope_plugin.files.home import VARIABLE

    monkeypatch.setenv(VARIABLE, str(tmp_path / "home"))
    tables.clear_caches()
    yield tmp_path / "home"
    monkeypatch.undo()
    tables.clear_caches()
