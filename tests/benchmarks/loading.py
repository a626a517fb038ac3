"""How fast and how small is opening a dictionary, against SAELens' own loader in the same process?

    python -m tests.benchmarks.loading [--smoke]

One file of real size is generated (2304 x 16384, 302 MB, as ``numpy.savez`` writes it) and linked
under the names of 26 layers in an offline hub cache.  One thread; everything is run once before it is
timed; medians.  The file lies in the page cache for both sides.  Memory is read from
``/proc/self/smaps_rollup``, so this runs on Linux only; ratios above 1 are in our favour.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

D_IN, D_SAE, LAYERS = 2304, 16384, 26
RELEASE = "gemma-scope-2b-pt-res-canonical"
TOKENS = 64
OWN_PROCESS = True  # the folders of the hub's cache are read when it is imported


def memory() -> tuple[float, float]:
    """Resident and anonymous memory in MB."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {row.split(":")[0]: int(row.split()[1]) / 1e3 for row in rows}
    return sizes["Rss"], sizes["Anonymous"]


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that does not count; garbage is collected in between.

    As in ``timeit`` not during the call, and not after every call: walking through all objects of
    SAELens' libraries empties the processor's caches, which short calls would pay for.
    """
    run()
    gc.disable()
    times = []
    for i in range(repeats):
        if memory()[1] > 3000 or i % 25 == 0:
            gc.collect()
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
        del result
    gc.enable()
    return statistics.median(times)


def grown(run: Callable[[], object]) -> tuple[object, float, float, float]:
    """Result of a call, growth of resident and anonymous memory, and the anonymous peak, in MB."""
    gc.collect()
    resident, anonymous = memory()
    peak, done = [anonymous], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(memory()[1])

    thread = threading.Thread(target=watch)
    thread.start()
    result = run()
    done.set()
    thread.join()
    after = memory()
    return result, after[0] - resident, after[1] - anonymous, max(peak) - anonymous


def generate(cache: Path, n_layers: int) -> None:
    """One file under the names of the first layers."""
    from gemmascope_plugin.catalog.tables import specs_of

    rng = np.random.default_rng(0)
    decoder = rng.standard_normal((D_SAE, D_IN), dtype=np.float32) / D_IN**0.5
    first: Path | None = None
    for spec in [spec for spec in specs_of(RELEASE) if spec.width == "16k"][:n_layers]:
        repo = cache / f"models--{spec.repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / "main").write_text("0" * 40)
        path = repo / "snapshots" / ("0" * 40) / spec.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        if first is None:
            np.savez(
                path,
                W_enc=np.ascontiguousarray(decoder.T),
                W_dec=decoder,
                b_enc=np.zeros(D_SAE, np.float32),
                b_dec=np.zeros(D_IN, np.float32),
                threshold=np.full(D_SAE, 0.1, np.float32),
            )
            os.utime(path, (1.7e9, 1.7e9))  # settled, as a file downloaded some time ago is
            first = path
        else:
            os.link(first, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two layers, every call once")
    smoke = parser.parse_args(arguments).smoke
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_CACHE": f"{folder}/hub", "GEMMASCOPE_HOME": f"{folder}/home"}
        os.environ |= {"HF_HUB_OFFLINE": "1"}
        generate(Path(folder) / "hub", n_layers=2 if smoke else LAYERS)
        start = time.perf_counter()
        import sae_lens  # noqa: F401

        print(f"importing sae_lens, not counted below: {time.perf_counter() - start:.1f} s")
        measure(smoke)


def measure(smoke: bool) -> None:
    """All measurements, in a process that has imported SAELens and nothing of the files yet."""
    import torch
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader

    from gemmascope_plugin.catalog.tables import specs_of
    from gemmascope_plugin.loading import load, load_suite

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    specs = [spec for spec in specs_of(RELEASE) if spec.width == "16k"][: 2 if smoke else LAYERS]
    first_spec = specs[20 % len(specs)]

    def often(run: Callable[[], object], repeats: int) -> float:
        return median(run, 1 if smoke else repeats)

    start = time.perf_counter()
    load(first_spec)
    print(
        f"first opening of a file in its life, with all checks: {time.perf_counter() - start:.2f} s"
    )
    for spec in specs:
        load(spec)  # every name is verified once

    def theirs() -> object:
        return gemma_2_sae_huggingface_loader(first_spec.repo_id, first_spec.path)

    a, b = often(theirs, 5), often(lambda: load(first_spec), 50)
    print(f"opening, SAELens' loader {a * 1e3:.0f} ms, ours {b * 1e3:.2f} ms: ratio {a / b:.0f}")
    c = often(lambda: SAE.from_pretrained(first_spec.release, first_spec.sae_id), 3)
    print(
        f"opening, SAE.from_pretrained {c * 1e3:.0f} ms, ours {b * 1e3:.2f} ms: ratio {c / b:.0f}"
    )
    sae, resident, anonymous, _ = grown(lambda: load(first_spec))
    print(f"memory after opening: resident {resident:+.1f} MB, anonymous {anonymous:+.1f} MB")
    x = torch.randn(TOKENS, D_IN)
    sae.encode(x)  # the first one here also warms the matrix library up
    del sae
    stock, resident, anonymous, peak = grown(
        lambda: SAE.from_pretrained(first_spec.release, first_spec.sae_id)
    )
    print(f"SAELens' memory: resident {resident:+.0f} MB, anonymous peak {peak:+.0f} MB")
    stock.encode(x)
    del stock
    openers = (
        lambda: SAE.from_pretrained(*key(first_spec)),
        lambda: load(first_spec),
        lambda: copied(first_spec),
    )
    first, later = encodes(openers, x, 1 if smoke else 15)
    for name, times in (("first encode", first), ("later encodes", later)):
        stock_ms, ours_ms, copy_ms = (1e3 * t for t in times)
        print(
            f"{name} of {TOKENS} tokens after opening, SAELens {stock_ms:.1f} ms, ours "
            f"{ours_ms:.1f} ms: ratio {stock_ms / ours_ms:.2f}; ours after copying W_enc to memory "
            f"{copy_ms:.1f} ms"
        )
    both = often(lambda: SAE.from_pretrained(*key(first_spec)).encode(x), 3)
    our_seconds = often(lambda: load(first_spec).encode(x), 10)
    print(
        f"opening and first encode, SAELens {both * 1e3:.0f} ms, ours {our_seconds * 1e3:.0f} ms: "
        f"ratio {both / our_seconds:.1f}"
    )
    suite_time = often(lambda: list(load_suite(specs).values()), 10)
    print(f"opening a suite of {len(specs)}: {suite_time:.3f} s")
    _, resident, anonymous, _ = grown(lambda: list(load_suite(specs).values()))
    print(f"its memory: resident {resident:+.1f} MB, anonymous {anonymous:+.1f} MB")
    _, _, anonymous, peak = grown(lambda: load(first_spec, dtype=torch.bfloat16))
    print(f"opening as bfloat16: anonymous {anonymous:+.0f} MB, peak {peak:+.0f} MB")
    _, _, anonymous, peak = grown(lambda: SAE.from_pretrained(*key(first_spec), dtype="bfloat16"))
    print(f"SAELens as bfloat16: anonymous {anonymous:+.0f} MB, peak {peak:+.0f} MB")


def key(spec: object) -> tuple[str, str]:
    """Release and id."""
    return spec.release, spec.sae_id  # type: ignore[attr-defined]


def copied(spec: object) -> object:
    """A dictionary whose encoder is a copy in memory: aligned, and touched."""
    from gemmascope_plugin.loading import load

    sae = load(spec)  # type: ignore[arg-type]
    sae.W_enc.data = sae.W_enc.data.clone()
    return sae


def encodes(
    openers: tuple[Callable[[], object], ...], x: object, repeats: int
) -> tuple[list[float], list[float]]:
    """Median seconds of the first and of the second encode of fresh objects.

    In turns, so that load hits all alike.
    """
    first: list[list[float]] = [[] for _ in openers]
    later: list[list[float]] = [[] for _ in openers]
    for _ in range(repeats):
        for i, opener in enumerate(openers):
            sae = opener()
            gc.collect()
            for taken in (first[i], later[i]):
                start = time.perf_counter()
                sae.encode(x)  # type: ignore[attr-defined]
                taken.append(time.perf_counter() - start)
            del sae
    return [statistics.median(t) for t in first], [statistics.median(t) for t in later]


if __name__ == "__main__":
    main()
