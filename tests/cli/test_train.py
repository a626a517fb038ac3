"""``gemmascope train`` on the bundled model: what it prints and writes; mistakes are one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gemmascope_plugin as gs
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.cli.app import app
from gemmascope_plugin.cli.train_command import _value

SITE = ("--model", "gemma-2-tiny", "--site", "res", "--layer", "1")
SMALL = ("--d-sae", "64", "--steps", "30", "--set", "batch_size=256", "--no-progress")


@pytest.fixture(autouse=True)
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemmascope_plugin.cli.train_command._DOCUMENTS", 40)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_it_prints_is_where_things_are(tmp_path) -> None:
    out = tmp_path / "run"
    lines = run(*SITE, *SMALL, "--architecture", "jumprelu", "--out", str(out)).splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["trained", "measured", "SAELens", "export", "metrics"]
    assert "jumprelu of 64 features at blocks.1.hook_resid_post, 30 steps" in lines[0]
    assert re.search(r"L0 [\d.]+, FVU 0\.\d+, excluded bos, eos, pad", lines[1])
    folder = Path(lines[3].removeprefix("export").strip())
    sae = gs.load(SaeSpec.from_folder(folder, model="gemma-2-tiny", site="res", layer=1))
    assert sae.cfg.d_sae == 64
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["l0"] == pytest.approx(float(lines[1].split()[2].strip(",")), abs=0.01)


def test_resume_needs_model_and_folder_alone(tmp_path) -> None:
    out = ("--out", str(tmp_path / "run"))
    first = run(*SITE, *SMALL, *out, "--checkpoint-every", "10")
    weights = (tmp_path / "run/final/sae_weights.safetensors").read_bytes()
    last = tmp_path / "run/checkpoints/step_30"
    last.rename(tmp_path / "gone")
    assert run("--model", "gemma-2-tiny", *out, "--resume", "--no-progress") == first
    assert (tmp_path / "run/final/sae_weights.safetensors").read_bytes() == weights
    line = mistake("--model", "gemma-2-tiny", *out, "--resume", "--steps", "40")
    assert "--resume with steps" in line and "config.json" in line


def test_presets_settings_and_text_of_ones_own(tmp_path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("the keys near the cabinet are old .\n\nalice gave the ring to bob .\n" * 20)
    out = tmp_path / "run"
    settings = ("--set", "lr_warm_up=2", "--set", "context=8", "--set", "options.tied_init=true")
    steps = ("--set", "batch_size=64", "--set", "bucket=128", "--set", "target_l0=8")
    run(
        *("--model", "gemma-2-tiny", "--layer", "1", "--d-sae", "32", "--steps", "10"),
        *("--architecture", "jumprelu_skip_transcoder", "--preset", "gemma-scope-2"),
        *("--corpus", str(text), "--out", str(out), *settings, *steps, "--no-progress"),
    )
    config = json.loads((out / "config.json").read_text())
    (spec,) = config["specs"].values()
    assert (spec["lr"], spec["gain"], spec["options"]) == (7e-5, "with", {"tied_init": True})
    (folder,) = (out / "export/transcoder").iterdir()
    entry = SaeSpec.from_folder(folder, model="gemma-2-tiny", site="transcoder", layer=1)
    sae = gs.load(entry)
    assert entry.affine and entry.hook_in == "blocks.1.mlp.hook_in"
    described = json.loads((folder / "config.json").read_text())
    assert described["hf_hook_point_in"] == "model.layers.1.pre_feedforward_layernorm.output"
    assert sae.W_skip.shape == (128, 128)


def test_the_example_of_the_help_works(tmp_path) -> None:
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "120"}).output
    example = re.search(r"gemmascope train (--model.*?--out) run", text, re.S)
    assert example
    words = re.findall(r"[^\s\\]+", example[1])
    assert "jumprelu of 256 features" in run(*words, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "lrr=1"), "Did you mean 'lr'"),
        (("--set", "lr"), "'lr' is not key=value"),
        (("--set", "target_l0=65"), "target_l0=65 is out of range. There is: 64 features"),
        (("--architecture", "jumprelo"), "Did you mean 'jumprelu'"),
        (("--preset", "quik"), "Did you mean 'quick'"),
        (("--site", "ress"), "Unknown site 'ress'"),
        (("--backend", "bridg"), "Did you mean 'bridge'"),
        (("--corpus", "/nowhere.txt"), "no file '/nowhere.txt'"),
        (("--model", "gemma-2-2b"), "no corpus for gemma-2-2b"),
    ],
)
def test_mistakes(tmp_path, arguments: tuple[str, ...], message: str) -> None:
    assert message in mistake(*SITE, *SMALL, "--out", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume_and_empty_text(tmp_path) -> None:
    line = mistake("--model", "gemma-2-tiny", "--out", str(tmp_path), "--resume")
    assert "no run to go on with" in line
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert "has no text" in mistake(*SITE, "--out", str(tmp_path / "r"), "--corpus", str(empty))


def test_a_cross_layer_transcoder(tmp_path) -> None:
    printed = run(
        *("--model", "gemma-2-tiny", "--architecture", "jumprelu_clt", "--d-sae", "32"),
        *("--steps", "10", "--set", "layers=[0,2]", "--set", "gain=with", "--no-progress"),
        *("--out", str(tmp_path / "r")),
    )
    assert "jumprelu_clt of 32 features at blocks.0.mlp.hook_in -> blocks.0.hook_mlp_out" in printed
    assert "and the same of layers 2, 10 steps" in printed
    folder = tmp_path / "r/export/clt"
    assert str(folder) in printed
    (file,) = folder.rglob("params_layer_1.safetensors")
    spec = SaeSpec.from_layers_folder(file.parent, model="gemma-2-tiny", kind="clt", layers=[0, 2])
    assert gs.load(spec).cfg.layers == (0, 2)


def test_text_of_the_command_line() -> None:
    assert [_value(t) for t in ("1e-3", "true", "null", "[1, 2]", "step")] == [
        *(1e-3, True, None, [1, 2], "step"),
    ]
