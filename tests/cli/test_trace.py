"""``gemmascope trace`` on the bundled model: what it prints and writes, and mistakes."""

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
from gemmascope_plugin.cli.trace_command import _Drawn, _from_task, parse_targets
from gemmascope_plugin.cli.trace_dictionaries import dictionaries
from gemmascope_plugin.errors import AmbiguousSpecError
from tests.graphs.graph_rules import check_rules

PROMPT = "the capital of the state containing dallas is"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["trace", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["trace", *arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


_tiny = cache(gs.tiny)


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands load the model each time, these tests once; pages go where they are thrown away."""
    monkeypatch.setattr(gs, "tiny", _tiny)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def graph() -> Any:
    suite = _tiny(backend="hooked")
    saes = [suite.load("skip-transcoder", layer) for layer in range(4)]
    return gs.trace(suite.model, PROMPT, saes).prune()


def test_a_summary_a_page_and_a_file_for_other_viewers(graph: Any, tmp_path: Path) -> None:
    lines = run(PROMPT, "--json", "dallas.json").splitlines()
    whole = graph.metadata["whole"]
    assert lines[0] == (
        f"gemma-2-tiny: {len(graph)} of {whole['n_nodes']} nodes, "
        f"{graph.n_edges} of {whole['n_edges']} edges"
    )
    assert lines[1] == "  explained     austin (1.000)"
    assert lines[2] == (
        f"  replacement   {graph.scores.replacement:.3f}, unpruned {whole['replacement']:.3f}"
    )
    assert re.fullmatch(r"  residual      \de-\d\d of the largest pre-activation", lines[4])
    assert lines[6].split() == ["node", "kind", "layer", "token", "share"]
    shares = [float(line.split()[-1]) for line in lines[7:19]]
    assert shares == sorted(shares)
    assert any(line.startswith("next_is_capital ") for line in lines[7:19])
    assert lines[19:] == ["page: gemmascope_trace.html", "graph: dallas.json"]

    page = (tmp_path / "gemmascope_trace.html").read_text(encoding="utf-8")
    assert f"<h1>{PROMPT}</h1>" in page and "asked_about_texas" in page
    content = json.loads((tmp_path / "dallas.json").read_text())
    check_rules(content)
    assert content["metadata"]["slug"] == "dallas"
    assert content["metadata"]["scan"] == "gemma-2-tiny"
    sites = content["metadata"]["gemmascope"]["metadata"]["dictionaries"]
    assert sites["blocks.2.hook_mlp_out"].startswith(
        "gemma-2-tiny-skip-transcoders/transcoder/layer_2"
    )
    restored = gs.Graph.from_json(content)
    assert list(restored.nodes["id"]) == list(graph.nodes["id"])


def test_options_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = gs.trace

    def watched(model: Any, prompt: str, saes: Any, **options: Any) -> Any:
        seen.update(options, releases={sae.cfg.metadata.release for sae in saes})
        return real(model, prompt, saes, **options)

    monkeypatch.setattr(gs, "trace", watched)
    choice = ("--transcoders", "gemma-2-tiny-transcoders", "--targets", "is-are,of")
    limits = ("--max-features", "20", "--memory-budget", "1 GB", "--node-threshold", "0.9")
    lines = run("the capital of", *choice, *limits, "--out", "other.html").splitlines()
    assert seen["targets"] == [("is", "are"), "of"] and seen["max_feature_nodes"] == 20
    assert seen["memory_budget"] == 10**9
    assert seen["releases"] == {"gemma-2-tiny-transcoders"}
    assert lines[1] == "  explained     is - are (0.500), of (0.500)"
    assert lines[-1] == "page: other.html"


def test_the_example_of_the_help_works() -> None:
    text = CliRunner().invoke(app, ["trace", "--help"], env={"COLUMNS": "200"}).output
    assert all(word in text for word in WHOLE[2:])
    example = re.search(r'gemmascope trace "(.*)" (--out trace.html)', text)
    assert example
    assert run(example[1], *example[2].split()).splitlines()[-1] == "page: trace.html"


def test_targets() -> None:
    assert parse_targets(None) is None
    assert parse_targets("a, b-c") == ["a", ("b", "c")]


def test_one_dictionary_for_each_layer() -> None:
    specs = dictionaries("gemma-2-2b", None, width=None, l0=None, affine=None)
    assert [spec.layer for spec in specs] == list(range(26))
    clts = dictionaries("270m", "clt", width="262k", l0="big", affine=True)
    assert [spec.kind for spec in clts] == ["clt"]
    with pytest.raises(AmbiguousSpecError, match=r"8 dictionaries match as a CLT.*--transcoders"):
        dictionaries("270m", "clt", width=None, l0=None, affine=None)


WHOLE = (
    *("--model", "270m", "--transcoders", "gemma-scope-2-270m-pt-transcoders-all"),
    *("--width", "16k", "--l0", "small", "--no-affine"),
)


def test_where_several_match_the_smallest_suite_of_all_layers_is_what_to_type() -> None:
    line = mistake("x", "--model", "270m")
    typed = f"Try: {' '.join(WHOLE[2:])} (18 dictionaries, 1.51 GB)"
    assert line.endswith(typed)
    filters = {"width": "16k", "l0": "small", "affine": False}
    specs = dictionaries("270m", WHOLE[3], **filters)
    assert [spec.layer for spec in specs] == list(range(18))
    line = mistake("x", "--model", "270m", "--transcoders", "clt")
    assert "--width 262k --l0 medium --no-affine (1 CLT, 12.75 GB)" in line


def test_missing_files_are_named_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(gs, "load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    line = mistake("--task", "ioi", *WHOLE)
    assert "A trace needs 18 dictionaries, 1.51 GB, and they are not on this machine: " in line
    assert (
        "hf download google/gemma-scope-2-270m-pt --include 'transcoder_all/layer_*_width" in line
    )
    assert line.endswith("then --local-dir FOLDER here")
    line = mistake("x", "--model", "2b")
    assert "26 dictionaries, 7.86 GB" in line
    assert "--include 'layer_*/width_16k/average_l0_*/params.npz' --local-dir" in line
    line = mistake("x", *WHOLE, "--local-dir", str(tmp_path))
    assert f"they are not in {str(tmp_path)!r}: no file" in line
    assert line.endswith("Try: another folder, or no --local-dir")


def test_a_prompt_of_a_task_is_traced_for_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    trace = gs.trace

    def watched(model: Any, prompt: Any, saes: Any, **options: Any) -> Any:
        asked.update(options, prompt=prompt)
        return trace(model, prompt, saes, **options)

    monkeypatch.setattr(gs, "trace", watched)
    task = _tiny(backend="hooked").task("two_hop", n=3)
    run("--task", "two_hop", "--row", "2", "--max-features", "20")
    assert asked["prompt"] == task.clean[2]
    assert asked["targets"] == [(task.metric.answer[2], task.metric.wrong[2])]
    run("--task", "greater_than", "--max-features", "20")
    assert asked["targets"] is None  # a set of years is not one target


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ",), "The prompt is empty"),
        ((), "The prompt is empty"),
        (("x", "--task", "ioi"), "--task ioi brings its own prompt"),
        (("--task", "iio"), "Did you mean 'ioi'"),
        (("--task", "ioi", "--row", "-1"), "--row -1 is before the first prompt"),
        (("x", "--split", "train"), "--split is for built-in tasks"),
        (("x", "--targets", "a,-b"), "--targets 'a,-b' has a part without a word"),
        (("x", "--max-features", "0"), "--max-features 0 explains nothing"),
        (("x", "--memory-budget", "much"), "'much' is not a size"),
        (("x", "--node-threshold", "1.5"), "--node-threshold 1.5 is not a share"),
        (("x", "--edge-threshold", "0"), "--edge-threshold 0.0 is not a share"),
        (("x", "--backend", "hoked"), "Did you mean 'hooked'"),
        (("x", "--transcoders", "gemma-2-tiny-transcoder"), "Did you mean 'gemma-2-tiny-transcoders'"),
        (("x", "--model", "gemma-9"), "no dictionary has --model gemma-9"),
        (("x", "--model", "270m"), "26 dictionaries match for layer 5"),
        (("x", "--out", "/nowhere/a.html"), "There is no folder '/nowhere' for --out"),
        (("x", "--json", "/nowhere/a.json"), "There is no folder '/nowhere' for --json"),
        (("x", "--json", "a b.json"), "The slug 'a b' is not a file name"),
        (("the capital", "--targets", "qwertz"), "qwertz"),
    ],
)  # fmt: skip
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    assert message in mistake(*arguments)


@pytest.mark.real
def test_a_task_on_a_real_model_asks_for_its_answer_against_the_wrong_one(real_model: Any) -> None:
    """Built-in tasks have lists of ids, of one id where one token is right."""
    prompt, targets = _from_task(real_model, _Drawn("ioi", 1, "held_out", 0))
    task = gs.Task.builtin("ioi", real_model, n=2, split="held_out")
    question: Any = task.question
    assert prompt == task.clean[1]
    assert targets == [(question.answer[1][0], question.wrong[1][0])]
    # Several years are right.
    assert _from_task(real_model, _Drawn("greater_than", 0, "held_out", 0))[1] is None
