"""``gemmascope find`` prints what ``find()`` returns, without heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gemmascope_plugin.catalog import find
from gemmascope_plugin.cli.app import app
from gemmascope_plugin.cli.options import table

ARGUMENTS = [
    *("find", "--model", "gemma-2-2b", "--site", "res", "--layer", "20"),
    *("--release", "gemma-scope-2b-pt-res"),
]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_table_holds_every_match() -> None:
    specs = find(release="gemma-scope-2b-pt-res", layer=20)
    lines = run(*ARGUMENTS).splitlines()
    assert lines[0].split() == [
        *("model", "kind", "site", "layer", "width", "l0", "size", "provenance"),
        *("release", "sae_id"),
    ]
    assert [line.split()[-1] for line in lines[1:-2]] == [spec.sae_id for spec in specs]
    assert lines[-1].startswith(f"{len(specs)} dictionaries")
    assert "layer_20/width_16k/average_l0_71" in {spec.sae_id for spec in specs}


def test_json_is_the_specs() -> None:
    printed = json.loads(run(*ARGUMENTS, "--width", "16k", "--json"))
    specs = find(release="gemma-scope-2b-pt-res", layer=20, width="16k")
    assert [each["sae_id"] for each in printed] == [spec.sae_id for spec in specs]
    assert printed[0]["hook_in"] == specs[0].hook_in


@pytest.mark.parametrize("l0", ["71", "nearest:80", "canonical"])
def test_l0_as_a_number_and_as_words(l0: str) -> None:
    lines = run(*ARGUMENTS, "--width", "16k", "--l0", l0).splitlines()
    assert lines[-1].startswith("1 dictionary")
    assert lines[1].endswith("layer_20/width_16k/average_l0_71")


def test_a_range_of_l0_and_the_flags_of_gemma_scope_2() -> None:
    lines = run(*ARGUMENTS, "--width", "16k", "--l0", "30-150").splitlines()
    assert [line.split()[5] for line in lines[1:-2]] == ["38", "71*", "139"]
    gs2 = ("find", "--model", "4b-it", "--site", "transcoder", "--layer", "9", "--width", "16k")
    lines = run(*gs2, "--l0", "small", "--affine").splitlines()
    assert [line.split()[-1] for line in lines[1:-2]] == [
        *("transcoder/layer_9_width_16k_l0_small_affine", "layer_9_width_16k_l0_small_affine"),
    ]
    assert run(*gs2, "--l0", "small", "--no-affine", "--variant", "all").splitlines()[-1] == (
        "1 dictionary"
    )
    lines = run("find", "--model", "1b", "--kind", "clt", "--provenance", "derived").splitlines()
    assert lines[-1] == "8 dictionaries (derived: not seen in a listing)"
    assert lines[1].split()[3:6] == ["0-25", "262k", "medium"]


def test_no_torch_and_no_pandas() -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['gemmascope', *{ARGUMENTS}]\n"
        "from gemmascope_plugin.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "heavy = ('torch', 'pandas', 'numpy', 'plotly', 'transformers', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_columns_are_aligned() -> None:
    assert table(("a", "long"), [("xyz", "1"), ("", "22")], right=["long"]) == [
        "a    long",
        "xyz     1",
        "       22",
    ]
