"""Every notebook runs from top to bottom, without a warning, and is kept without outputs.

The first one runs in a kernel, as a reader runs it. The others run cell by cell in this process, which
spares seven imports of everything: the same code in the same order, and the last value of each cell is
formatted for every way of showing it, as a kernel would.
"""

from __future__ import annotations

import ast
import json
import linecache
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter

SAYS = {
    "00_start_here": "faithfulness",
    "01_find_and_load": "does not fit: wrong layer",
    "02_splice_and_edit": "touches excluded tokens only",
    "03_architectures": "levels=(64, 16, 128) is out of range",
    "04_patching": "Unknown component 'mlp_outs'",
    "05_component_circuits": "ACDC keeps",
    "06_feature_circuits": "are about one state each",
    "07_attribution_graphs": "swaps the answer in",
}
"""What each notebook must have printed at the end of its run."""
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel that is this interpreter, whatever kernels the machine has."""
    folder = tmp_path / "kernels" / "this-python"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "this Python", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Threads that wait for each other on a busy machine cost more than they give.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The package may be used from its source tree.
    paths = [str(NOTEBOOKS[0].parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return "this-python"


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert any("assert " in cell.source for cell in cells)


def test_the_first_notebook_runs_in_a_kernel(kernel: str, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, kernel_name=kernel, resources=resources)
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = [output.get("text", "") for cell in cells for output in cell.outputs]
    assert any(SAYS[NOTEBOOKS[0].stem] in text for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.enable_grad():  # and leaves the mode as it was, whatever a cell sets
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                run_cell(cell.source, f"{path.name}, cell {number}", names)
    assert SAYS[path.stem] in capsys.readouterr().out


def run_cell(source: str, title: str, names: dict[str, Any]) -> None:
    """Runs a cell and formats the value of its last line if that is an expression."""
    # A traceback shows the line.
    linecache.cache[title] = (len(source), None, source.splitlines(keepends=True), title)
    tree = ast.parse(source, title)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, title, "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), title, "eval"), names)
        DisplayFormatter().format(value)
