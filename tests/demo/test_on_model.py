"""The demo on a model that is named, here the bundled one in its place: figures, page, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import gemmascope_plugin as gs
import gemmascope_plugin.demo.on_model as on_model
from gemmascope_plugin.catalog import SaeSpec, SpecList
from gemmascope_plugin.cli.app import app
from gemmascope_plugin.demo import model_page
from gemmascope_plugin.demo.on_model import ModelReport, run_on_model, splice_local
from gemmascope_plugin.errors import UnknownNameError
from gemmascope_plugin.loading.sources import locate
from gemmascope_plugin.pages import PageError

NAME = "gemma-3-270m"
D_SAE = 32


@pytest.fixture(scope="module")
def model() -> Any:
    return gs.tiny().model


def random_folder(folder: Path, width: int, seed: int = 0) -> Path:
    """A folder with a random SAE in Gemma Scope 2's layout."""
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(2, width, D_SAE, generator=draw)
    tensors = {
        "w_enc": encoder / width**0.5,
        "w_dec": decoder.T.contiguous() / width**0.5,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(width),
        "threshold": torch.full((D_SAE,), 0.5),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    return folder


@pytest.fixture(scope="module")
def specs(model: Any, tmp_path_factory: pytest.TempPathFactory) -> SpecList:
    """Two SAEs of a folder, and one that is nowhere."""
    folder = tmp_path_factory.mktemp("saes")
    local = [
        SaeSpec.from_folder(
            random_folder(folder / f"layer_{layer}", model.cfg.d_model, layer),
            model=NAME,
            site="res",
            layer=layer,
        )
        for layer in (1, 2)
    ]
    absent = gs.find(model=NAME, site="res", layer=9, width="16k", l0="canonical").one()
    return SpecList([absent, *local])


@pytest.fixture(scope="module")
def report(model: Any, specs: SpecList, tmp_path_factory: pytest.TempPathFactory) -> ModelReport:
    """One run for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_model, "load_model", lambda _: model)
        patch.setattr(on_model, "specs_of", lambda _: specs)
        page = tmp_path_factory.mktemp("demo") / "page.html"
        return run_on_model(NAME, page, n=4, progress=False)


def test_saes_of_a_folder_are_spliced_in(report: ModelReport) -> None:
    spliced = report.spliced
    assert spliced is not None and len(spliced.names) == 2
    assert 0 <= spliced.logit_difference < 1e-4
    assert list(spliced.features.fits) == [f"blocks.{i}.hook_resid_post" for i in (1, 2)]
    assert set(spliced.words) == {
        (row.site, row.feature) for row in spliced.features.top(model_page.N_FEATURES).itertuples()
    }
    page = report.path.read_text(encoding="utf-8")
    assert "<td>sae</td><td>res</td><td>3</td><td>3</td>" in page
    assert "writes towards" in page and all(name in page for name in spliced.names)
    assert "2 of those on this machine spliced in" in report.summary()


def test_the_circuit_is_found_on_other_prompts_than_it_is_checked_on(report: ModelReport) -> None:
    meta = report.scores.metadata
    assert report.task.origin is not None and report.task.origin.split == "held_out"
    assert meta["n_prompts"] == 4 and len(report.scores.random) == on_model.N_RANDOM
    circuit = report.scores.circuit
    assert circuit.graph.unit == "edge" and circuit.size == circuit.n_units // 10
    # a tenth of the edges brings back most of the metric, and random ones hardly any of it
    assert report.scores.faithfulness > 0.5 > 5 * report.best_random
    page = report.path.read_text(encoding="utf-8")
    assert f"The best {circuit.size} of {circuit.n_units} edges: faithfulness" in page
    assert "The best 20 edges:" in page and "source_layer" not in page


def test_the_page_says_what_was_done(report: ModelReport) -> None:
    page, task = report.path.read_text(encoding="utf-8"), report.task
    assert f"{task.clean[0]} …” against “{task.corrupt[0]}" in page
    assert "One held-out prompt." in page and "Mean over 4 held-out prompts." in page
    assert "the model that ships with this package" in page
    assert f"Spearman {report.heads.spearman:.3f}" in report.summary()
    assert repr(report).startswith("ModelReport(")


def test_without_saes_the_page_says_so(model: Any, report: ModelReport) -> None:
    absent = gs.find(model=NAME, site="res", layer=9, width="16k")
    assert splice_local(model, absent, "today") is None
    assert splice_local(model, SpecList([]), "today") is None
    section = model_page.saes_section(_without(report, absent))
    assert "None of their files is on this machine" in str(section.parts[-1])
    section = model_page.saes_section(_without(report, SpecList([])))
    assert section.parts == ("The catalog has none for this model.",)


def _without(report: ModelReport, specs: SpecList) -> ModelReport:
    from dataclasses import replace

    return replace(report, specs=specs, spliced=None)


def test_a_folder_that_mirrors_the_repository(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = gs.find(model="gemma-2-tiny", site="res", layer=1, l0="canonical").one()
    place = tmp_path / spec.filename
    place.parent.mkdir(parents=True)
    for path in locate(spec).values():
        (place.parent / path.name).write_bytes(path.read_bytes())
    others = gs.find(model="gemma-2-tiny", site="res")
    spliced = splice_local(model, others, "today the keys", tmp_path)
    assert spliced is not None and spliced.names == (f"{spec.release} {spec.sae_id}",)
    assert splice_local(model, others, "today the keys", tmp_path / "elsewhere") is None


def test_at_most_a_few_from_the_first_to_the_last_layer() -> None:
    specs = [
        gs.find(model=NAME, release=f"{'gemma-scope-2-270m-pt-res-all'}", layer=i)[0]
        for i in range(18)
    ]
    assert [spec.layer for spec in on_model._spread(specs)] == [0, 6, 11, 17]
    assert on_model._spread(specs[:1]) == specs[:1]


def test_mistakes_are_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(on_model, "load_model", refuse)
    with pytest.raises(UnknownNameError, match="Unknown task 'iox'.*Did you mean 'ioi'"):
        run_on_model(NAME, tmp_path / "a.html", task="iox", progress=False)
    with pytest.raises(PageError, match="is a folder"):
        run_on_model(NAME, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "agreement"), "--task agreement is for another model than the bundled one"),
        (("--model", "gemma-2-tiny", "--task", "ioi"), "gemmascope demo --model gemma-3-270m --task ioi"),
        (("--model", NAME, "--task", "captials"), "Did you mean 'capitals'"),
        (("--model", "gemma-9"), "'gemma-9' is not the name of a Gemma 2 or Gemma 3"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["demo", "--no-open", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
