"""What the catalog costs: building all tables, one search, a cold process, the size on disk.

python -m tests.benchmarks.catalog [--smoke]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gemmascope_plugin.catalog as catalog
from gemmascope_plugin.catalog import find, tables

RUNS = 15
COLD = "from gemmascope_plugin import find; find({})"


def median(
    action: Callable[[], object], before: Callable[[], object] = int, runs: int = RUNS
) -> float:
    """Median milliseconds of a few runs; ``before`` is not counted."""
    times = []
    for _ in range(runs):
        before()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def cold(code: str) -> Callable[[], object]:
    """A new interpreter that runs some code."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one run of each")
    median_ms = partial(median, runs=1 if parser.parse_args(arguments).smoke else RUNS)
    files = Path(catalog.__file__).parent
    data = sum(f.stat().st_size for f in files.rglob("*.json") if "tiny" not in f.name)
    rules = sum(f.stat().st_size for f in files.glob("*.py"))
    specs = sum(map(len, tables.tables().values()))
    print(f"tables: {specs} specs in {len(tables.tables())} releases")
    print(f"data {data / 1e3:.1f} kB, all code of the catalog {rules / 1e3:.1f} kB")
    print(f"building all tables: {median_ms(tables.tables, tables.clear_caches):.1f} ms")
    query = {"model": "4b-it", "site": "res", "layer": 17, "width": "16k"}
    print(f"find(model, site, layer, width), warm: {median_ms(lambda: find(**query)):.2f} ms")
    print(f"find(), warm: {median_ms(find):.1f} ms")
    print(f"bare interpreter: {median_ms(cold('pass')):.0f} ms")
    narrow = COLD.format("model='2b', site='res', layer=20")
    print(f"cold process, one model: {median_ms(cold(narrow)):.0f} ms")
    print(f"cold process, everything: {median_ms(cold(COLD.format(''))):.0f} ms")


if __name__ == "__main__":
    main()
