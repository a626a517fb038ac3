"""Pages in headless Chromium, where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--no-first-run", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"),
    *("--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom"),
)


def opened(path: Path, profile: Path, script: str = "") -> str:
    """The document after its scripts have run, and after ``script``, which is added at its end.

    Fails if anything was written to the console, skips without a browser.
    """
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    if script:
        page = path.read_text(encoding="utf-8")
        path = path.with_name("scripted.html")
        added = f"<script>setTimeout(() => {{ {script} }}, 500)</script></body>"
        path.write_text(page.replace("</body>", added), encoding="utf-8")
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    assert "<html" in result.stdout, result.stderr[-2000:]
    return result.stdout


def attribute(document: str, name: str) -> str:
    """An attribute of the document's root."""
    match = re.search(rf'<html[^>]*\b{name}="([^"]*)"', document)
    assert match is not None, f"{name} was not set: {document[:300]}"
    return match[1]
