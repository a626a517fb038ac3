"""``gemmascope discover`` on the bundled model: what it prints and writes, and mistakes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gemmascope_plugin as gs
from gemmascope_plugin.cli.app import app
from tests.cli.test_patch import OWN

BARE = ("--task", "ioi", "--n", "3")
SUITE = (*BARE, "--random", "1")
NODES = (*SUITE, "--method", "exact", "--size", "5")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["discover", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["discover", *arguments])
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


def test_edges_are_found_on_training_prompts_and_checked_on_others(suite: Any) -> None:
    printed = json.loads(run(*SUITE, "--size", "20", "--json"))
    training = suite.task("ioi", split="train", n=3)
    circuit = gs.discover(suite.model, training, method="eap-ig", size=20)
    assert (printed["unit"], printed["size"], printed["n_units"]) == ("edge", 20, 343)
    ends = [(row["source"], row["target"], row["port"]) for row in printed["kept"]]
    assert ends == [(w.label, r.node.label, r.port) for w, r in circuit.edges]
    assert [row["rank"] for row in printed["kept"]] == list(range(1, 21))
    got = printed["scores"]
    scores = gs.evaluate(suite.model, circuit, suite.task("ioi", n=3), n_random=1)
    assert got["prompts"] == "held-out" and got["n_prompts"] == 3
    expected = {
        "faithfulness": scores.faithfulness,
        "interval": scores.interval(),
        "random": scores.random,
        "completeness": scores.completeness,
        "kl": scores.kl,
        "metric_full": scores.metric_full,
        "faithfulness_by_size": scores.faithfulness_by_size,
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-4), name
    assert got["smallest_0.9"] == scores.smallest(0.9)


def test_nodes_are_printed_with_what_was_measured() -> None:
    lines = run(*NODES).splitlines()
    assert lines[0] == "ioi on gemma-2-tiny: 5 of 20 nodes by exact"
    assert lines[1] == "  found on      3 training prompts, logit difference"
    assert lines[2] == "  evaluated on  3 held-out prompts"
    figure = r"-?\d\.\d+"
    assert re.fullmatch(rf"  faithfulness  {figure}, 95 % {figure} to {figure}", lines[3])
    best = "the best of 1 random circuit of this size"
    assert re.fullmatch(rf"  random        {figure}, {best}", lines[4])
    assert re.fullmatch(rf"  completeness  {figure} of the metric without the circuit", lines[5])
    assert re.fullmatch(rf"  KL            {figure} nats from the full model", lines[6])
    wanted = r"  smallest      \d+ nodes, with faithfulness of at least 0.9 from there on"
    assert re.fullmatch(wanted, lines[7])
    assert lines[9].split() == ["rank", "node", "kind", "layer", "score", "role"]
    assert [line.split()[0] for line in lines[10:]] == ["1", "2", "3", "4", "5"]
    assert lines[10].split()[1:4] == ["L1H1", "head", "1"]


def test_own_prompts_are_used_twice_and_that_is_said(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = (*OWN, "--method", "exact", "--nodes", "head", "--size", "3", "--random", "0")
    lines = run(*arguments, "--out", str(out)).splitlines()
    assert lines[0] == "own prompts on gemma-2-tiny: 3 of 16 nodes by exact"
    assert lines[1] == "  found on      1 own prompt, logit difference"
    assert lines[2] == (
        "  evaluated on  the same 1 prompt, as there are no others: this tests nothing new"
    )
    # neither an interval over one prompt nor a band of no circuits
    assert re.fullmatch(r"  faithfulness  -?\d\.\d+", lines[3])
    assert lines[4] == "  random        none"
    assert "on the 1 prompt that it was found on" in out.read_text(encoding="utf-8")
    assert json.loads(run(*arguments, "--json"))["scores"]["interval"] is None


def test_without_evaluation(suite: Any) -> None:
    arguments = (*BARE, "--select", "greedy", "--size", "4", "--no-evaluate")
    lines = run(*arguments).splitlines()
    assert lines[0] == "ioi on gemma-2-tiny: 4 of 343 edges by eap-ig"
    assert lines[2] == "" and len(lines) == 8
    printed = json.loads(run(*arguments, "--json"))
    assert printed["scores"] is None and len(printed["kept"]) == 4
    task = suite.task("ioi", split="train", n=3)
    grown = gs.discover(suite.model, task, method="eap-ig", select="greedy", size=4)
    assert [row["source"] for row in printed["kept"]] == [w.label for w, _ in grown.edges]


def test_a_bar_for_the_scores() -> None:
    units = json.loads(run(*BARE, "--tau", "2.5", "--no-evaluate", "--json"))["kept"]
    assert units and all(abs(row["score"]) >= 2.5 for row in units)


def test_page_and_circuit_are_kept(tmp_path: Path) -> None:
    out, folder = tmp_path / "page.html", tmp_path / "circuit"
    lines = run(*NODES, "--out", str(out), "--save", str(folder)).splitlines()
    assert lines[-2:] == [f"circuit: {folder}", f"page: {out}"]
    page = out.read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot(") == 2
    assert "Faithfulness on 3 held-out prompts" in page
    circuit = gs.Circuit.load(folder)
    assert circuit.size == 5 and circuit.metadata["task"] == "ioi"
    assert torch.equal(circuit.kept_order, circuit.order[:5])


def test_the_example_of_the_help_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CliRunner().invoke(app, ["discover", "--help"], env={"COLUMNS": "200"}).output
    example = re.search(r"gemmascope discover (--task.*html)", text)
    assert example
    monkeypatch.chdir(tmp_path)
    lines = run(*example[1].split(), "--no-evaluate").splitlines()
    assert lines[0] == "ioi on gemma-2-tiny: 30 of 343 edges by eap-ig"
    assert lines[-1] == "page: circuit.html"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "No prompts are named"),
        (("--task", "agrement"), "Did you mean 'agreement'"),
        ((*SUITE, *OWN), "--clean, --corrupt, --answer, --wrong as well"),
        ((*OWN, *OWN[:2]), "There are 2 --clean, 1 --corrupt, 1 --answer, 1 --wrong"),
        ((*SUITE, "--method", "eap-gi"), "Did you mean 'eap-ig'"),
        ((*SUITE, "--units", "heads"), "Unknown units 'heads'. There is: nodes, edges"),
        ((*SUITE, "--units", "nodes"), "--method eap-ig scores edges, not nodes"),
        ((*SUITE, "--size", "3", "--tau", "0.1"), "Both --size 3 and --tau 0.1 say what to keep"),
        ((*SUITE, "--size", "999"), "999"),
        ((*SUITE, "--select", "best"), "Unknown selection 'best'. There is: top, greedy"),
        ((*NODES, "--select", "greedy"), "--select greedy says nothing here: --method exact keeps nodes"),
        ((*SUITE, "--nodes", "mlp"), "--nodes says nothing here: --method eap-ig keeps edges"),
        ((*SUITE, "--method", "acdc", "--size", "3"), "--size says nothing here: --method acdc chooses"),
        ((*NODES, "--nodes", "head,mpl"), "Did you mean 'mlp'"),
        ((*NODES, "--nodes", "head,feature"), "--nodes feature needs dictionaries"),
        ((*SUITE, "--random", "-1"), "--random -1 is not a number of circuits"),
        ((*SUITE, "--no-evaluate", "--random", "3"), "--random 3 says nothing here: --no-evaluate"),
        ((*SUITE, "--size", "0"), "--size 0 is out of range. There is: whole numbers from 1"),
        ((*SUITE, "--out", "/nowhere/a.html"), "There is no folder '/nowhere' for --out"),
        ((*SUITE, "--save", "/nowhere/a"), "There is no folder '/nowhere' for --save"),
    ],
)  # fmt: skip
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    assert message in mistake(*arguments)
