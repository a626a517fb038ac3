"""``gemmascope steer`` on the bundled model: what it prints, and that mistakes are one line."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

import gemmascope_plugin as gs
from gemmascope_plugin.cli.app import app

PROMPT = "today the keys near the cabinet"
LABEL = "next_is_singular_verb"
SAE = (
    *("--model", "gemma-2-tiny", "--site", "res", "--layer", "2"),
    *("--l0", "canonical"),
)
TEXT = ("--prompt", PROMPT, "--max-new-tokens", "3")
ARGUMENTS = (*SAE, "--feature", LABEL, *TEXT)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["steer", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["steer", *arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


GOLDEN = """\
gemma-2-tiny-res layer_2/width_512/average_l0_10: feature 280, next_is_singular_verb \
(precision 0.94, recall 1.00)
  steered  add, strength 16, at blocks.2.hook_resid_post, excluded bos, eos, pad
  prompt   today the keys near the cabinet
  before   are quiet .
  after    is clean .
  KL       mean 1.03 nats, max 5.75 after 'cabinet' (position 6); push 0.968 of the activation; \
texts differ from position 7

pos  token       KL  next before      p  next after      p
  1  today    0.055  the          0.775  the         0.806
  2  the      0.142  key          0.040  houses      0.054
  3  keys     2.327  beside       0.217  is          0.863
  4  near     0.216  the          1.000  the         0.805
  5  the      0.707  river        0.053  was         0.230
  6  cabinet  5.749  are          0.999  is          0.988
"""
FIGURE = r"\d+\.\d+"


def test_one_strength() -> None:
    printed = run(*ARGUMENTS, "--strength", "16")
    assert re.sub(FIGURE, "#", printed) == re.sub(FIGURE, "#", GOLDEN)
    figures, expected = (map(float, re.findall(FIGURE, text)) for text in (printed, GOLDEN))
    assert list(figures) == pytest.approx(list(expected), rel=0.01, abs=0.002)


def test_a_sweep_is_a_table() -> None:
    lines = run(*ARGUMENTS, "--strength", "0", "--strength", "16", "--strength", "32").splitlines()
    assert lines[1:4] == [
        "  steered  add, at blocks.2.hook_resid_post, excluded bos, eos, pad",
        f"  prompt   {PROMPT}",
        "  before   are quiet .",
    ]
    assert lines[5].split() == [
        *("strength", "mean", "KL", "max", "KL", "push", "changed", "after"),
    ]
    assert lines[6].split() == ["0", "0.000", "0.000", "0.000", "0", "are", "quiet", "."]
    assert lines[7].split()[-4:] == ["2", "is", "clean", "."]
    assert lines[8].split()[-4:] == ["3", "is", "is", "is"]


def test_json_holds_what_steer_measures() -> None:
    printed = json.loads(run(*ARGUMENTS, "--strength", "16", "--strength", "-4", "--json"))
    suite = gs.tiny()
    sae = suite.load("res", 2)
    sweep = gs.steer(suite.model, sae, 280, [16.0, -4.0], PROMPT, max_new_tokens=3)
    assert printed["feature"] == 280
    assert printed["label"].startswith(LABEL)
    assert printed["exclude"] == ["bos", "eos", "pad"]
    assert printed["tokens"] == list(sweep[0].tokens)
    assert printed["before"] == sweep.before
    assert printed["sampling"]["max_new_tokens"] == 3
    for got, wanted in zip(printed["runs"], sweep, strict=True):
        assert got["after"] == wanted.after
        assert got["strength"] == wanted.strength
        assert got["kl"] == pytest.approx(wanted.kl.tolist(), abs=1e-6)
        assert got["mean_kl"] == pytest.approx(wanted.mean_kl, abs=1e-6)
        assert got["first_difference"] == wanted.first_difference


def test_how_likely_an_answer_of_several_tokens_is() -> None:
    asked = ("--answer", "is clean .", "--wrong", "are quiet .")
    lines = run(*ARGUMENTS, *asked, "--strength", "16").splitlines()
    suite = gs.tiny()
    options: dict[str, Any] = {"answer": "is clean .", "wrong": "are quiet .", "max_new_tokens": 3}
    runs = gs.steer(suite.model, suite.load("res", 2), 280, [16.0, 32.0], PROMPT, **options)
    change = runs[0].answer
    assert change is not None and change.before < 0 < change.after
    assert lines[6] == f"  answer   {change!r}"

    both = ("--strength", "16", "--strength", "32")
    lines = run(*ARGUMENTS, *asked, *both).splitlines()
    assert lines[4] == (
        f"  answer   {change.answer!r} against {change.wrong!r}, {change.before:+.3f} nats before"
    )
    assert lines[6].split()[-3:] == ["changed", "answer", "after"]
    assert lines[7].split()[5] == f"{change.after:+.3f}"

    printed = json.loads(run(*ARGUMENTS, *asked, *both, "--json"))
    assert (printed["answer"], printed["wrong"]) == (change.answer, change.wrong)
    assert printed["logprob_before"] == pytest.approx(change.before, abs=1e-5)
    for got, wanted in zip(printed["runs"], runs, strict=True):
        assert wanted.answer is not None
        assert got["logprob_after"] == pytest.approx(wanted.answer.after, abs=1e-5)


def test_options_reach_steer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = gs.steer

    def watched(model: Any, *rest: Any, **options: Any) -> Any:
        seen.update(options, model=type(model).__name__)
        return real(model, *rest, **options)

    monkeypatch.setattr(gs, "steer", watched)
    index = ("--feature", "280", "--backend", "bridge", "--method", "orthogonal")
    sampling = ("--temperature", "0.5", "--top-k", "4", "--seed", "7")
    output = run(*SAE, *index, *TEXT, *sampling, "--strength", "0")
    assert "steered  orthogonal, strength 0," in output
    assert seen == {
        "model": "TransformerBridge",
        "method": "orthogonal",
        "answer": None,
        "wrong": None,
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": None,
        "seed": 7,
    }


def test_the_example_of_the_help_works() -> None:
    text = CliRunner().invoke(app, ["steer", "--help"], env={"COLUMNS": "120"}).output
    example = re.search(r"gemmascope steer (--model.*?--prompt \"[^\"]*\")", text, re.S)
    assert example
    words = re.findall(r'"[^"]*"|[^\s\\]+', example[1])
    assert run(*(word.strip('"') for word in words)) == run(*ARGUMENTS, "--strength", "16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--feature", "next_is_singlar_verb"), f"Did you mean '{LABEL}'"),
        (("--feature", "512"), "Feature 512 does not exist"),
        (("--feature", "-1"), "Feature -1 does not exist"),
        (("--feature", "1", "--method", "orthogonl"), "Did you mean 'orthogonal'"),
        (("--feature", "1", "--backend", "bridg"), "Did you mean 'bridge'"),
        (("--feature", "1", "--temperature", "-1"), "--temperature -1.0 is out of range"),
        (("--feature", "1", "--top-p", "0.5"), "--top-p 0.5 has no effect at temperature 0"),
        (("--feature", "1", "--local-dir", "/nowhere"), "/nowhere"),
        (("--feature", "1", "--wrong", "are"), "--wrong 'are' has no answer to be compared with"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    line = mistake(*SAE, *TEXT, "--strength", "1", *arguments)
    assert line.startswith("error: ")
    assert message in line


def test_mistakes_of_the_dictionary() -> None:
    several = ("--model", "gemma-2-tiny", "--site", "mlp", "--layer", "2", "--feature", "1")
    line = mistake(*several, *TEXT, "--strength", "1")
    assert "3 dictionaries match, one is needed" in line and "--kind (sae, transcoder)" in line
    big = ("--release", "gemma-scope-2b-pt-res", "--layer", "20", "--width", "16k", "--l0", "71")
    line = mistake(*big, *TEXT, "--strength", "1", "--feature", LABEL)
    assert "the features of gemma-2-2b have no labels here" in line
    line = mistake(*SAE, *TEXT, "--strength", "nan", "--feature", "1")
    assert "--strength nan is not a finite number" in line
