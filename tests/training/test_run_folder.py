"""A run folder has one writer, and what is damaged in it is named."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemmascope_plugin.errors import BadFileError, GemmaScopeError
from gemmascope_plugin.files.lock import FolderInUseError, folder_lock
from gemmascope_plugin.training import ActivationStore, store_activations
from gemmascope_plugin.training.run import Run
from gemmascope_plugin.training.run_folder import _digest, load_checkpoint, save_checkpoint
from tests.training.cases import corpus, run, same

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def stopped(hooked2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "r"
    run(hooked2, run_dir=folder, checkpoint_every=12, log_every=1)
    return folder


@pytest.fixture
def folder(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "r"))


def state_of(folder: Path) -> Path:
    return folder / "checkpoints/step_24/state.json"


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a state and its digest."""
    content = json.loads(path.read_text())
    change(content)
    content["digest"] = _digest(content)
    path.write_text(json.dumps(content))


def test_a_second_run_in_a_folder_is_refused(hooked2, folder, tmp_path) -> None:
    for path, resume in ((folder, True), (tmp_path / "new", False)):
        with (
            folder_lock(path, "a training run"),
            pytest.raises(FolderInUseError, match=f"{path.name}' is being written to by this proc"),
        ):
            run(hooked2, run_dir=path, resume=resume)
    assert not list(folder.glob("**/.*"))


def test_a_second_run_within_the_first_is_refused(hooked2, tmp_path, monkeypatch) -> None:
    real, refused = Run.train, []

    def train(self: Run, journal: Any) -> None:
        if not refused:
            with pytest.raises(FolderInUseError, match="a training run, since") as error:
                run(hooked2, run_dir=tmp_path / "r", resume=True)
            refused.append(error)
        real(self, journal)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", train)
        once = run(hooked2, run_dir=tmp_path / "r", log_every=1)
    assert refused and same(once, run(hooked2))
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if not row.get("final")] == list(range(1, 25))


def test_a_refused_spec_leaves_no_folder(hooked2, tmp_path) -> None:
    with pytest.raises(GemmaScopeError):
        run(hooked2, None, torch.zeros(0, 17, dtype=torch.int64), run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


CONTENT = {
    "cut": b'{"step": ',
    "deep": b"[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "list": b"[1, 2]",
    "nan": b'{"step": NaN}',
    "twice": b'{"step": 1, "step": 2}',
    "empty": b"",
}
FILES = {
    "metrics.jsonl": "metrics.jsonl, line 1.*delete that line",
    "config.json": "config.json.*put the file back as it was",
    "checkpoints/step_24/state.json": "state.json.*delete this folder",
}


@pytest.mark.parametrize("damage", [*CONTENT, "device", "pipe"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(120)
def test_damaged_files_are_named(hooked2, folder, name, damage) -> None:
    path, message = folder / name, FILES[name]
    path.unlink()
    if damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(CONTENT[damage] + b"\n")
    if damage in ("device", "pipe"):
        message = f"{path.name}.*not a plain file|no run to go on with"
    with pytest.raises(GemmaScopeError, match=message):
        run(hooked2, run_dir=folder, resume=True)


def test_a_row_without_a_step_is_named_and_a_cut_one_left_out(hooked2, folder) -> None:
    path = folder / "metrics.jsonl"
    text = path.read_text()
    path.write_text('{"stp": 3}\n' + text)
    with pytest.raises(BadFileError, match="metrics.jsonl.*'step' is missing"):
        run(hooked2, run_dir=folder, resume=True)
    path.write_text(text + '{"step": 24, "l')
    run(hooked2, run_dir=folder, resume=True)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [*range(1, 25), 24]


def test_a_changed_state_and_changed_weights_are_found_out(hooked2, folder) -> None:
    path = state_of(folder)
    path.write_text(path.read_text().replace('"served"', '"swerved"'))
    with pytest.raises(BadFileError, match="state.json': it is not as it was written"):
        run(hooked2, run_dir=folder, resume=True)


def test_changed_weights_are_found_out(hooked2, folder) -> None:
    weights = folder / "checkpoints/step_24/res_1.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        BadFileError, match="res_1.safetensors': it is not the file that state.json"
    ):
        run(hooked2, run_dir=folder, resume=True)


NUMBERS = ("numbers", "res_1")
CHANGES: list[tuple[tuple[str, ...], Any]] = [
    (("step",), "x"),
    (("step",), 23),
    (("step",), True),
    (("source",), []),
    (("source", "bucket"), "a"),
    (("source", "bucket"), None),
    (("source", "before"), {}),
    (("source", "served"), 1 << 70),
    (("sha256",), {"res_1": 3}),
    (("sha256",), {}),
    (("numbers",), {}),
    (NUMBERS, 3),
    (NUMBERS, {}),
    ((*NUMBERS, "groups"), []),
    ((*NUMBERS, "groups"), 3),
    ((*NUMBERS, "lr_scheduler"), None),
    ((*NUMBERS, "coefficients"), {"no such": {}}),
    ((*NUMBERS, "coefficients"), 3),
    ((*NUMBERS, "counts"), []),
    ((*NUMBERS, "scales"), "wide"),
    ((*NUMBERS, "scales"), []),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_states_of_another_form_are_named(hooked2, folder, number) -> None:
    keys, value = CHANGES[number]

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    edited(state_of(folder), change)
    with pytest.raises(
        BadFileError, match="step_24|not those of the checkpoint|The checkpoint holds"
    ):
        run(hooked2, run_dir=folder, resume=True)


def test_a_full_disk_at_any_call_leaves_a_run_that_goes_on(hooked2, tmp_path, monkeypatch) -> None:
    whole, real = run(hooked2), os.fsync
    for nth in (2, 4):
        count, path = iter(range(1000)), tmp_path / f"r{nth}"

        def full(handle: int, count: Any = count, nth: int = nth) -> None:
            if stat.S_ISREG(os.fstat(handle).st_mode) and next(count) == nth:
                raise OSError(28, "No space left on device")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(GemmaScopeError, match="cannot write .*No space left"):
                run(hooked2, run_dir=path, checkpoint_every=8)
        resume = (path / "config.json").exists()
        assert same(run(hooked2, run_dir=path, resume=resume, checkpoint_every=8), whole)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damage_of_a_checkpoint_passes(stopped, tmp_path, place, byte, cut) -> None:
    source = stopped / "checkpoints/step_24"
    for name in ("state.json", "res_1.safetensors"):
        target = tmp_path / "step_24"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        data = bytearray((target / name).read_bytes())
        at = int(place * (len(data) - 1))
        if cut:
            del data[at:]
        elif data[at] == byte:
            continue
        else:
            data[at] = byte
        (target / name).write_bytes(data)
        try:
            again = load_checkpoint(target, ["res_1"])
        except BadFileError:
            continue
        assert name == "state.json" and again.step == 24  # white space
        assert again.numbers == load_checkpoint(source, ["res_1"]).numbers


def test_a_checkpoint_is_read_as_it_was_written(stopped, tmp_path) -> None:
    checkpoint = load_checkpoint(stopped / "checkpoints/step_24", ["res_1"])
    path = save_checkpoint(tmp_path, checkpoint, keep=1)
    again = load_checkpoint(path, ["res_1"])
    assert again.numbers == checkpoint.numbers and again.source == checkpoint.source
    for name, value in checkpoint.tensors["res_1"].items():
        assert torch.equal(again.tensors["res_1"][name], value)


INDEX: list[tuple[str, Any]] = [
    ("format", 9),
    ("hooks", []),
    ("hooks", {}),
    ("hooks", {HOOK: "wide"}),
    ("hooks", {HOOK: 1 << 70}),
    ("shards", []),
    ("shards", [64, -3]),
    ("shards", [1.5]),
    ("shards", "all"),
    ("model", 3),
    ("exclude", None),
    ("exclude", [[1]]),
    ("dtype", "float8"),
    ("dtype", []),
]


@pytest.fixture(scope="module")
def stored(hooked2, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    store_activations(hooked2, corpus(), [HOOK], path, tokens=128, shard=64)
    return path


@pytest.mark.parametrize("number", range(len(INDEX)))
def test_an_index_of_another_form_is_named(stored, tmp_path, number) -> None:
    name, value = INDEX[number]
    target = Path(shutil.copytree(stored, tmp_path / "s"))
    content = json.loads((target / "index.json").read_text())
    (target / "index.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(BadFileError, match="index.json|shard_00000"):
        ActivationStore(target)


def test_a_second_store_in_a_folder_is_refused(hooked2, tmp_path) -> None:
    with (
        folder_lock(tmp_path / "s", "storing activations"),
        pytest.raises(FolderInUseError, match="storing activations, since"),
    ):
        store_activations(hooked2, corpus(), [HOOK], tmp_path / "s", tokens=64, shard=64)
