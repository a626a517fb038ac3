"""The demo as a user runs it, on the bundled suite: figures, page, command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import gemmascope_plugin.demo.steps as steps
from gemmascope_plugin.cli.app import app
from gemmascope_plugin.demo.bundled_run import DemoReport, run_demo
from gemmascope_plugin.demo.lexicon import NAMES
from gemmascope_plugin.pages import PageError


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[DemoReport]]:
    """The command's result, and the report that it made: one run for all tests."""
    page, reports = tmp_path_factory.mktemp("demo") / "page.html", []

    def run_and_keep(*arguments: Any, **options: Any) -> DemoReport:
        reports.append(run_demo(*arguments, **options))
        return reports[-1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("gemmascope_plugin.demo.bundled_run.run_demo", run_and_keep)
        result = CliRunner().invoke(app, ["demo", "--out", str(page), "--no-open"])
    return result, reports


@pytest.fixture(scope="module")
def report(command: tuple[Result, list[DemoReport]]) -> DemoReport:
    result, reports = command
    assert reports, result.output
    return reports[0]


def test_every_dictionary_is_spliced_and_changes_nothing(report: DemoReport) -> None:
    assert len(report.walk.dictionaries) == 16
    assert report.walk.logit_difference < 1e-5


def test_chosen_features_are_labelled_concepts(report: DemoReport) -> None:
    concepts = [report.walk.labels[feature].concept for feature in report.walk.chosen]
    assert 4 <= len(concepts) == len(set(concepts)) <= steps.N_COLOURED
    assert not any(concept.startswith("word=") for concept in concepts)


def test_ablation_lowers_the_answer(report: DemoReport) -> None:
    ablation = report.walk.ablation
    assert ablation.feature in report.walk.chosen
    assert ablation.n_prompts == 64 and ablation.n_tried > 5
    assert ablation.before > 0.9
    assert ablation.after < ablation.before - 0.1
    row = ablation.words.set_index("word").loc[ablation.answer]
    assert row["after"] < row["before"] - 0.1


def test_attribution_agrees_with_exact_patching(report: DemoReport) -> None:
    assert report.walk.positions.spearman >= 0.8
    assert report.walk.heads.spearman >= 0.8


def test_circuit_is_faithful_and_beats_random_ones(report: DemoReport) -> None:
    scores = report.walk.scores
    assert scores.circuit.size <= len(scores.circuit.ranking) / 2
    assert report.walk.faithfulness >= 0.8
    assert len(scores.random) == 20
    assert report.walk.best_random < report.walk.faithfulness


def test_steering_changes_the_receiver_and_the_number(report: DemoReport) -> None:
    name, number = report.walk.steering
    assert name.before.split()[0] in name.prompt.split()
    new = name.after.split()[0]
    assert new in NAMES and new not in name.prompt.split()
    assert (number.before.split()[0], number.after.split()[0]) == ("are", "is")


def test_page_shows_the_results(report: DemoReport) -> None:
    html = report.path.read_text(encoding="utf-8")
    for text in (
        "First light on gemma-2-tiny",
        report.walk.ablation.prompt,
        f"faithfulness {report.walk.faithfulness:.3f}",
        report.walk.steering[0].after,
        "bos, eos, pad",
    ):
        assert text in html, text
    assert [path.name for path in report.path.parent.iterdir()] == ["page.html"]


def test_summary_has_the_figures(report: DemoReport) -> None:
    assert f"faithfulness {report.walk.faithfulness:.3f} held out" in report.summary()
    assert str(report.path) in repr(report)


def test_command(command: tuple[Result, list[DemoReport]], report: DemoReport) -> None:
    result, _ = command
    assert result.exit_code == 0, result.output
    assert "faithfulness" in result.stdout
    assert f"page: {report.path}" in result.stdout
    assert report.path.exists()


def test_bad_path_is_found_out_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gemmascope_plugin.demo.bundled_run.tiny", lambda: pytest.fail("work was begun")
    )
    with pytest.raises(PageError, match="is a folder"):
        run_demo(tmp_path, progress=False)
