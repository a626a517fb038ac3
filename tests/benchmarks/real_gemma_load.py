"""How long does ``load_model`` take, and how much memory, against transformers' own loading?

    python -m tests.benchmarks.real_gemma_load [--repeats 3] [--smoke]

Each load is a process of its own, which has imported everything and loaded a tiny model before it is
timed: transformers' ``from_pretrained`` of model and tokenizer, and ``load_model`` on both classes, from
the same folder (Gemma 3 270M of the extra ``[gemma]``, converted before), in the same type.  Cases take
turns; medians of CPU seconds, which a busy machine changes least.  Memory is the growth since then, in
units of the float32 weights: the largest resident size, which counts mapped pages of the file (half a
unit here, for everybody), and the largest anonymous memory, which is what the process needs.  All hold
model and tokenizer at the end; Gemma's tokenizer is a quarter of a unit.  One thread.  Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

OWN_PROCESS = True
DTYPES = ("float32", "bfloat16")
LOADERS = ("transformers", "hooked", "bridge")
BOUNDS = {"hooked": (1.5, 2.2), "bridge": (1.2, 1.3)}
"""Seconds against transformers', and peak memory against the float32 weights, that are aimed at."""


def load(loader: str, folder: str, dtype: str) -> dict[str, float]:
    """One load in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models import gemma2, gemma3  # noqa: F401 - lazily imported otherwise

    import gemmascope_plugin as gs

    if loader != "transformers":
        import transformer_lens.model_bridge.sources  # noqa: F401

    warm = Path(
        folder, "warm"
    )  # a random model of one layer: everything is imported that loading needs
    if warm.is_dir():
        _load(gs, AutoModelForCausalLM, AutoTokenizer, loader, str(warm), dtype)
    torch.set_num_threads(1)
    start, (resident, anonymous) = time.process_time(), _memory()
    with _peak() as peak:
        model, tokenizer = _load(gs, AutoModelForCausalLM, AutoTokenizer, loader, folder, dtype)
    assert tokenizer is not None
    seconds = time.process_time() - start
    numbers = {p.data_ptr(): p.numel() for p in model.parameters()}
    return {
        "cpu": seconds,
        "resident": peak[0] - resident,
        "anonymous": peak[1] - anonymous,
        "numbers": sum(numbers.values()),
    }


def _load(gs, model_class, tokenizer_class, loader: str, folder: str, dtype: str):
    import torch

    if loader == "transformers":
        tokenizer = tokenizer_class.from_pretrained(folder)
        return model_class.from_pretrained(folder, dtype=getattr(torch, dtype)), tokenizer
    model = gs.load_model(folder, backend=loader, dtype=dtype, device="cpu")
    return model, model.tokenizer


def _memory() -> tuple[int, int]:
    """Resident and anonymous bytes of this process now."""
    rows = dict(row.split(":") for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024, int(rows["RssAnon"].split()[0]) * 1024


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The largest of both while the block runs, looked at a hundred times a second."""
    peak, stop = list(_memory()), threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[:] = map(max, peak, _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak[:] = map(max, peak, _memory())


def measured(loader: str, folder: str, dtype: str) -> dict[str, float]:
    """One load in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--one", loader, folder, dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def small_folder(folder: Path, *, layers: int = 2) -> None:
    """A random Gemma 3 of ordinary shape, with a tokenizer, as a folder."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.utils import logging

    from tests.tiny_models import tokenizer

    config = Gemma3TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a small random model, once")
    parser.add_argument("--one", nargs=3, metavar=("LOADER", "FOLDER", "DTYPE"))
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(load(*options.one)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if options.smoke:
            folder, repeats, dtypes = Path(temporary), 1, DTYPES[:1]
            small_folder(folder)
            small_folder(folder / "warm", layers=1)
        else:
            folder, repeats, dtypes = _linked(Path(temporary)), options.repeats, DTYPES
        for dtype in dtypes:
            compare(str(folder), dtype, repeats)


def _linked(folder: Path) -> Path:
    """The converted model beside a tiny one that warms a process up."""
    from gemmascope_plugin.models.gguf_folder import converted_package

    for path in converted_package().iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "warm").mkdir()
    small_folder(folder / "warm", layers=1)
    return folder


def compare(folder: str, dtype: str, repeats: int) -> None:
    """The three loaders in turns, and a table of them."""
    runs: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    for _ in range(repeats):
        for loader in LOADERS:
            runs[loader].append(measured(loader, folder, dtype))
    float32 = 4 * runs["transformers"][0]["numbers"]
    usual = statistics.median(run["cpu"] for run in runs["transformers"])
    print(f"\n{dtype}: {'CPU s':>20} {'ratio':>6} {'resident':>9} {'anonymous':>10}   aimed at")
    for loader in LOADERS:
        seconds = statistics.median(run["cpu"] for run in runs[loader])
        peaks = [max(r[kind] for r in runs[loader]) / float32 for kind in ("resident", "anonymous")]
        aim = "{} {}".format(*BOUNDS[loader]) if loader in BOUNDS else ""
        sizes = f"{peaks[0]:>9.2f} {peaks[1]:>10.2f}"
        print(f"  {loader:<14} {seconds:>12.2f} {seconds / usual:>6.2f} {sizes}   {aim}")


if __name__ == "__main__":
    main()
