"""Prints what the catalog costs: building all tables, one search, a cold process, the size on disk.

Run it with ``python tests/benchmarks/catalog.py``; it is a measurement and not a test.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gemmascope_plugin.catalog as catalog
from gemmascope_plugin.catalog import find, tables

RUNS = 15
COLD = "from gemmascope_plugin import find; find({})"


def median(action: Callable[[], object], before: Callable[[], object] = int) -> float:
    """Median seconds of a few runs; ``before`` is not counted."""
    times = []
    for _ in range(RUNS):
        before()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cold(code: str) -> Callable[[], object]:
    """A new interpreter that runs some code."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    """Measure and print."""
    files = Path(catalog.__file__).parent
    data = sum(f.stat().st_size for f in files.rglob("*.json") if "tiny" not in f.name)
    rules = sum(f.stat().st_size for f in files.glob("*.py"))
    specs = sum(map(len, tables.tables().values()))
    print(f"tables: {specs} specs in {len(tables.tables())} releases")
    print(f"data {data / 1e3:.1f} kB, all code of the catalog {rules / 1e3:.1f} kB")
    print(f"building all tables: {1e3 * median(tables.tables, tables.clear_caches):.1f} ms")
    one = {"model": "4b-it", "site": "res", "layer": 17, "width": "16k"}
    print(f"find(model, site, layer, width), warm: {1e3 * median(lambda: find(**one)):.2f} ms")
    print(f"find(), warm: {1e3 * median(find):.1f} ms")
    print(f"bare interpreter: {1e3 * median(cold('pass')):.0f} ms")
    narrow = COLD.format("model='2b', site='res', layer=20")
    print(f"cold process, one model: {1e3 * median(cold(narrow)):.0f} ms")
    print(f"cold process, everything: {1e3 * median(cold(COLD.format(''))):.0f} ms")


if __name__ == "__main__":
    main()
