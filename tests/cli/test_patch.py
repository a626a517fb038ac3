"""``gemmascope patch`` on the bundled model: what it prints and writes, and mistakes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gemmascope_plugin as gs
from gemmascope_plugin.cli.app import app

SUITE = ("--task", "ioi", "--n", "4")
WORDS = "when anna and george went to the store , {} gave a drink to"
OWN = (
    *("--clean", WORDS.format("george"), "--corrupt", WORDS.format("anna")),
    *("--answer", "anna", "--wrong", "george"),
)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["patch", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["patch", *arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


_tiny = cache(gs.tiny)


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands load the model each time, these tests once per class."""
    monkeypatch.setattr(gs, "tiny", _tiny)


@pytest.fixture(scope="module")
def suite() -> Any:
    return _tiny(backend="hooked")


def test_the_largest_effects_are_printed(suite: Any) -> None:
    lines = run(*SUITE, "--direction", "noising", "--top", "3").splitlines()
    task = suite.task("ioi", n=4)
    effects = gs.activation_patching(suite.model, task, "z", direction="noising")
    assert lines[0] == "z of gemma-2-tiny, exact patching"
    assert lines[1] == "  task     ioi, 4 held-out prompts"
    assert lines[2] == "  patched  noising: into the clean run, replacement other"
    assert lines[3].startswith("  metric   logit difference after the final soft-cap: clean 9.")
    assert lines[4].startswith("  result   Most is changed by layer 1, head ")
    assert lines[6].split() == ["layer", "head", "effect", "share", "se"]
    assert len(lines) == 11 and lines[10] == "... and 13 smaller effects"
    errors = effects.standard_error()
    for line, row in zip(lines[7:10], effects.top(3).itertuples(), strict=True):
        layer, head, effect, share, error = map(float, line.split())
        assert (layer, head) == (row.layer, row.head)
        assert effect == pytest.approx(row.effect, abs=1e-2)
        assert share == pytest.approx(row.share, abs=1e-3)
        assert error == pytest.approx(float(errors[row.layer, row.head]), abs=1e-2)


@pytest.mark.parametrize("method", ["exact", "atp", "ig", "atp*", "relp"])
def test_json_holds_what_is_measured(suite: Any, method: str) -> None:
    printed = json.loads(
        run(*SUITE, "--split", "train", "--method", method, "--top", "99", "--json")
    )
    task = suite.task("ioi", split="train", n=4)
    effects = (
        gs.activation_patching(suite.model, task, "z")
        if method == "exact"
        else gs.attribution_patching(suite.model, task, "z", method=method)
    )
    assert printed["model"] == "gemma-2-tiny" and printed["n_prompts"] == 4
    assert printed["method"] == effects.metadata["method"]
    assert printed["direction"] == "denoising" and printed["replacement"] == "other"
    assert printed["metric_clean"] == pytest.approx(effects.metadata["metric_clean"], abs=1e-4)
    assert printed["n_effects"] == len(printed["effects"]) == 16
    for row in printed["effects"]:
        expected = float(effects.values[row["layer"], row["head"]])
        assert row["effect"] == pytest.approx(expected, abs=1e-4)
        assert ("se" in row) == (method == "exact")


def test_options_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = gs.activation_patching

    def watched(model: Any, task: Any, component: str, **options: Any) -> Any:
        seen.update(options, model=type(model).__name__, component=component, task=task)
        return real(model, task, component, **options)

    monkeypatch.setattr(gs, "activation_patching", watched)
    chosen = ("--component", "mlp_out", "--axes", "layer, pos", "--replacement", "mean")
    run(*SUITE, *chosen, "--direction", "noising", "--backend", "bridge", "--before-cap")
    task = seen.pop("task")
    assert len(task) == 4 and task.question.before_cap and task.question.name == "logit difference"
    assert seen == {
        "model": "TransformerBridge",
        "component": "mlp_out",
        "direction": "noising",
        "axes": ["layer", "pos"],
        "replacement": "mean",
        "progress": False,
    }


@pytest.mark.parametrize(
    ("metric", "typed", "name"),
    [
        (None, OWN, "logit difference"),
        ("probability", OWN, "probability"),
        ("probability", OWN[:-2], "probability"),
        ("sequence_logprob", OWN, "sequence log-probability"),
        ("margin", OWN[:-2], "margin"),
        ("cross_entropy", OWN[:-2], "minus cross-entropy"),
        ("kl_divergence", OWN[:-4], "minus KL divergence"),
    ],
)
def test_own_prompts_with_every_metric(
    suite: Any, metric: str | None, typed: tuple[str, ...], name: str
) -> None:
    import gemmascope_plugin.causes as causes

    asked = () if metric is None else ("--metric", metric)
    printed = json.loads(run(*typed, *typed, *asked, "--component", "mlp_out", "--json"))
    assert printed["metric"] == name and printed["n_prompts"] == 2
    words = {"answer": ["anna"], "wrong": ["george"]}
    reads = {key: words[key] for key in words if f"--{key}" in typed}
    task = gs.Task(typed[1], typed[3], getattr(causes, metric or "logit_diff")(**reads))
    effects = gs.activation_patching(suite.model, task, "mlp_out")
    for row in printed["effects"]:
        expected = float(effects.values[row["layer"], row["pos"]])
        assert row["effect"] == pytest.approx(expected, abs=1e-4)


def test_another_metric_of_a_task_of_the_suite() -> None:
    printed = json.loads(run(*SUITE, "--metric", "probability", "--component", "mlp_out", "--json"))
    assert printed["metric"] == "probability"
    assert 0.9 < printed["metric_clean"] <= 1 and -1 <= printed["metric_corrupt"] < -0.9


def test_another_model_by_its_folder(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load_model(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        return suite.model

    monkeypatch.setattr(gs, "load_model", load_model)
    output = run(*OWN, "--model", "2b", "--backend", "bridge", "--component", "mlp_out")
    assert output.startswith("mlp_out of 2b, exact patching\n  task     1 own prompt\n")
    assert "One prompt says nothing about others." in output
    assert seen == {"name": "2b", "backend": "bridge", "device": "auto"}


def test_a_page_is_written(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    printed = run(*SUITE, "--component", "resid_post", "--top", "4", "--out", str(out))
    assert printed.splitlines()[-1] == f"page: {out}"
    page = out.read_text(encoding="utf-8")
    assert "<h1>Effects of resid_post on ioi</h1>" in page
    assert page.count("Plotly.newPlot(") == 1
    # with JSON on stdout, where the page is goes elsewhere
    json.loads(run(*SUITE, "--json", "--out", str(out)))


def test_the_example_of_the_help_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CliRunner().invoke(app, ["patch", "--help"], env={"COLUMNS": "200"}).output
    example = re.search(r"gemmascope patch (--task.*html)", text)
    assert example
    monkeypatch.chdir(tmp_path)
    assert "page: patch.html" in run(*example[1].split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "No prompts are named. There is: the tasks ioi, agreement"),
        (("--task", "iio"), "Unknown task 'iio'. There is: ioi, agreement"),
        ((*SUITE, *OWN[:2]), "--task ioi brings its own prompts, and there is --clean as well"),
        ((*SUITE[:2], "--n", "0"), "--n 0 leaves no prompt"),
        ((*SUITE[:1], "years", "--model", "gemma-2-2b"), "Unknown task 'years'. There is: ioi"),
        ((*SUITE, "--metric", "sequence_logprob"), "The answers of --task ioi are single tokens"),
        ((*SUITE, "--split", "test"), "Unknown split 'test'. There is: train, held_out"),
        ((*SUITE, "--component", "mlpout"), "Did you mean 'mlp_out'"),
        ((*SUITE, "--component", "feature"), "--component feature needs dictionaries"),
        (
            (*SUITE, "--direction", "noise"),
            "Unknown direction 'noise'. There is: denoising, noising",
        ),
        ((*SUITE, "--method", "atp**"), "Did you mean 'atp*'"),
        ((*SUITE, "--replacement", "median"), "Did you mean 'mean'"),
        ((*SUITE, "--axes", "layer,token"), "Unknown axis of z 'token'"),
        ((*SUITE, "--metric", "logits"), "Did you mean 'logit_diff'"),
        ((*SUITE, "--backend", "bridg"), "Did you mean 'bridge'"),
        ((*SUITE, "--top", "0"), "--top 0 shows nothing"),
        ((*SUITE, "--out", "/nowhere/a.html"), "no folder '/nowhere' for --out"),
        ((*OWN, *OWN[:2]), "There are 2 --clean, 1 --corrupt, 1 --answer, 1 --wrong"),
        (OWN[:4], "There are 1 --clean, 1 --corrupt, 0 --answer, 0 --wrong"),
        ((*OWN, "--metric", "margin"), "--metric margin does not read --wrong"),
        ((*OWN, "--n", "3"), "--n is for built-in tasks"),
        ((*OWN, "--split", "train"), "--split is for built-in tasks"),
        ((*OWN, "--answer", "xyzzy", *OWN[:4], *OWN[6:]), "'xyzzy' is not a single token"),
        ((*OWN, "--model", "/nowhere/model"), "There is no folder '/nowhere/model'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    assert message in mistake(*arguments)


def test_mistakes_of_a_name_cost_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(gs, "tiny", never)
    for wrong in (("--direction", "noise"), ("--axes", "token"), ("--replacement", "median")):
        mistake(*SUITE, *wrong)
