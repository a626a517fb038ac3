"""A catalog that lists generated files, and an offline hub cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The package is imported inside fixtures: ``pytest --shapes`` has to come before it.
if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec


@dataclass
class Suite:
    """A bundled release family of its own: res, att and transcoders, one layer each."""

    assets: Path
    specs: dict[str, SaeSpec]

    def file(self, name: str) -> Path:
        sae_spec = self.specs[name]
        return self.assets / sae_spec.release / sae_spec.filename


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch) -> Path:
    """No test reads or writes the user's cache folder."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("GEMMASCOPE_HOME", str(folder))
    return folder


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Iterator[Suite]:
    from npz_files import arrays, save, spec

    from gemmascope_plugin.catalog import tables
    from gemmascope_plugin.loading import sources

    specs = {
        "res": spec(),
        "att": spec(site="att"),
        "transcoder": spec(kind="transcoder", site="mlp"),
    }
    folder = tmp_path / "tables"
    folder.mkdir()
    for listed in specs.values():
        tables.dump_release([listed], folder=folder)
    monkeypatch.setattr(tables, "TABLES", folder)
    monkeypatch.setattr(sources, "ASSETS", tmp_path / "assets")
    made = Suite(tmp_path / "assets", specs)
    for name in specs:
        save(made.file(name), **arrays())
    tables.clear_caches()
    yield made
    monkeypatch.undo()
    tables.clear_caches()
    forget_releases(s.release for s in specs.values())


def forget_releases(names: Iterable[str]) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    for name in names:
        get_pretrained_saes_directory().pop(name, None)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Callable[..., Path]:
    """An offline Hugging Face cache; the function puts a file of a spec into it."""
    from huggingface_hub import constants
    from npz_files import save

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def put(wanted: SaeSpec, revision: str = "main", **values) -> Path:
        repo = root / f"models--{wanted.repo_id.replace('/', '--')}"
        commit = f"{len(revision):040d}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        return save(repo / "snapshots" / commit / wanted.filename, **values)

    return put
