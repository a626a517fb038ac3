"""A run that was killed goes on as if it had not been, bit by bit; another run is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import BadFileError, GemmaScopeError, MissingFileError
from gemmascope_plugin.training import train_many
from gemmascope_plugin.training.learner import Learner, Objective
from gemmascope_plugin.training.run_folder import checkpoints
from tests.training.cases import corpus, run, same, spec

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"dead_features": "ghost", "max_grad_norm": 0.5},
    {"architecture": "topk"},
    {"architecture": "batchtopk"},
    {"architecture": "matryoshka_batchtopk", "levels": [8, 24]},
    {"architecture": "jumprelu_transcoder"},
    {"architecture": "jumprelu_skip_transcoder", "gain": "with", "layout": "gemma-scope-2"},
]


class KilledError(Exception):
    """Stands for whatever ends a process in the middle of a step."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Fails between the backward pass and the optimiser of that step, counted over dictionaries."""
    real, seen = Objective.prepare_gradients, []

    def failing(self: Objective) -> None:
        seen.append(None)
        if len(seen) == step + 1:
            raise KilledError
        real(self)

    monkeypatch.setattr(Objective, "prepare_gradients", failing)


@pytest.mark.parametrize("changes", ARCHITECTURES, ids=lambda c: c.get("architecture", "jumprelu"))
def test_an_exception_in_mid_step(hooked2, tmp_path, monkeypatch, changes: dict) -> None:
    recipe = spec(**changes)
    whole = run(hooked2, recipe)
    options: dict[str, Any] = {"run_dir": tmp_path / "r", "checkpoint_every": 5, "log_every": 1}
    with monkeypatch.context() as patch:
        kill_at(patch, 13)
        with pytest.raises(KilledError):
            run(hooked2, recipe, **options)
    assert [path.name for path in checkpoints(tmp_path / "r/checkpoints")] == ["step_5", "step_10"]
    resumed = run(hooked2, recipe, **options, resume=True)
    assert same(resumed, whole)
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if not row.get("final")] == list(range(1, 25))


SCRIPT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from gemmascope_plugin.training.learner import Learner
from gemmascope_plugin.training.learner import Objective
from tests.factories import tiny_model
from tests.training.cases import run

real = Learner.inputs
def inputs(self, bucket):
    if self.trainer.n_training_steps == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, bucket)
Learner.inputs = inputs
run(tiny_model("gemma2", "hooked"), run_dir=sys.argv[1], checkpoint_every=5)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_sigkill_of_a_process(hooked2, tmp_path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "r")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "r/final").exists()
    resumed = run(hooked2, run_dir=tmp_path / "r", resume=True)
    assert same(resumed, run(hooked2))


def test_killed_before_the_first_checkpoint_begins_again(hooked2, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(KilledError):
            run(hooked2, run_dir=tmp_path / "r")
    assert same(run(hooked2, run_dir=tmp_path / "r", resume=True), run(hooked2))


def test_killed_while_a_checkpoint_is_written(hooked2, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        real = os.replace

        def failing(a: Any, b: Any) -> None:
            if Path(b).name == "step_10":
                raise KilledError
            real(a, b)

        patch.setattr(os, "replace", failing)
        with pytest.raises(KilledError):
            run(hooked2, run_dir=tmp_path / "r", checkpoint_every=5)
    assert [path.name for path in checkpoints(tmp_path / "r/checkpoints")] == ["step_5"]
    assert same(run(hooked2, run_dir=tmp_path / "r", resume=True), run(hooked2))


def test_several_dictionaries_and_a_finished_run(hooked2, tmp_path, monkeypatch) -> None:
    specs = [spec(), spec(layer=2, architecture="topk")]
    options: dict[str, Any] = {"run_dir": tmp_path / "r", "checkpoint_every": 4, "keep": 3}
    with monkeypatch.context() as patch:
        kill_at(patch, 2 * 9)
        with pytest.raises(KilledError):
            train_many(hooked2, specs, corpus(), progress=False, **options)
    options["resume"] = True
    first = train_many(hooked2, specs, corpus(), progress=False, **options)
    assert len(checkpoints(tmp_path / "r/checkpoints")) == 3
    second = train_many(hooked2, specs, corpus(), progress=False, **options)
    for name, sae in first.items():
        assert same(sae, second[name])
    assert same(first["res_2"], run(hooked2, specs[1]))


@pytest.fixture(scope="module")
def stopped(hooked2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "r"
    run(hooked2, run_dir=folder, checkpoint_every=12)
    return folder


def test_another_run_is_refused_with_the_keys(hooked2, stopped, monkeypatch) -> None:
    def refused(recipe: Any, message: str, text: Any = None) -> None:
        with pytest.raises(BadFileError, match=message):
            run(hooked2, recipe, text, run_dir=stopped, resume=True)

    refused(spec(lr=0.1), r"another one: specs.res_1.lr was 0.005 and is 0.1")
    refused(spec(architecture="topk"), "specs.res_1.architecture was 'jumprelu' and is 'topk'")
    refused(spec(model="other"), "model was .* and is 'other'")
    refused(spec(), "not those of the checkpoint", corpus(1))
    with monkeypatch.context() as patch:
        patch.setattr("gemmascope_plugin.training.run_folder.version", lambda name: "0.0")
        refused(spec(), r"versions.torch was .* and is '0.0'")


def test_folders_that_cannot_be_used(hooked2, stopped, tmp_path) -> None:
    with pytest.raises(GemmaScopeError, match="is not empty.*resume=True"):
        run(hooked2, run_dir=stopped)
    with pytest.raises(MissingFileError, match="no run to go on with"):
        run(hooked2, run_dir=tmp_path / "none", resume=True)
    with pytest.raises(GemmaScopeError, match="resume=True without run_dir"):
        run(hooked2, resume=True)
    with pytest.raises(GemmaScopeError, match="keep=0 is out of range"):
        run(hooked2, run_dir=tmp_path / "r", keep=0)


@pytest.mark.parametrize("damage", ["cut", "gone", "state", "shapes"])
def test_damaged_checkpoints_are_named(hooked2, tmp_path, damage: str) -> None:
    run(hooked2, run_dir=tmp_path / "r")
    folder = tmp_path / "r/checkpoints/step_24"
    weights = folder / "res_1.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        weights.unlink()
    elif damage == "state":
        (folder / "state.json").write_text("{")
    else:
        from safetensors.torch import load_file, save_file

        save_file({**load_file(weights), "sae.b_enc": torch.zeros(3)}, weights)
    message = "step_24|other tensors or shapes"
    with pytest.raises(BadFileError, match=message):
        run(hooked2, run_dir=tmp_path / "r", resume=True)


def test_taking_out_and_putting_back_changes_nothing(hooked2) -> None:
    generator = torch.Generator().manual_seed(0)
    bucket = {"blocks.1.hook_resid_post": torch.randn(32, 32, generator=generator)}
    place = torch.device("cpu")
    first = Learner(spec(), bucket, model_name="m", device=place)
    for _ in range(3):
        first.step(bucket)
    tensors = {name: value.clone() for name, value in first.tensors().items()}
    numbers = json.loads(json.dumps(first.numbers()))
    second = Learner(spec(), {k: 2 * v for k, v in bucket.items()}, model_name="m", device=place)
    second.restore(tensors, numbers)
    for learner in (first, second):
        learner.step(bucket)
    assert first.scales == second.scales
    assert json.dumps(first.numbers()) == json.dumps(second.numbers())
    assert all(
        torch.equal(value, second.tensors()[name]) for name, value in first.tensors().items()
    )
