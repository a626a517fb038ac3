"""``gemmascope info``: one dictionary, everything about it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gemmascope_plugin.catalog import find, get
from gemmascope_plugin.cli.app import app
from gemmascope_plugin.cli.catalog_commands import card_lines

SKIP = ("gemma-scope-2-4b-it-transcoders-all", "layer_9_width_262k_l0_small_affine")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_card_has_everything() -> None:
    facts = {line[2:16].strip(): line[16:] for line in run(*SKIP).splitlines()[1:]}
    path = "transcoder_all/layer_9_width_262k_l0_small_affine"
    assert facts == {
        "kind, site": "transcoder, mlp",
        "model": "gemma-3-4b-it",
        "layer": "9",
        "reads": "blocks.9.mlp.hook_in, with the gain of the norm before it",
        "reconstructs": "blocks.9.hook_mlp_out",
        "shape": "2560 -> 262144 -> 2560",
        "width": "262k",
        "l0": "17 target (small)",
        "affine skip": "yes",
        "variant": "all",
        "canonical": "no",
        "size": "5.40 GB",
        "format": "gemma-scope-2",
        "repository": "google/gemma-scope-2-4b-it",
        "file": f"{path}/params.safetensors",
        "provenance": "listed",
        "url": f"https://huggingface.co/google/gemma-scope-2-4b-it/tree/main/{path}",
        "neuronpedia": "https://www.neuronpedia.org/gemma-3-4b-it/9-gemmascope-2-transcoder-262k",
        "load with": f'gemmascope_plugin.load(("{SKIP[0]}", "{SKIP[1]}"))',
    }


def test_arguments_of_find_name_one_too() -> None:
    by_arguments = run(
        *("--model", "4b-it", "--site", "transcoder", "--layer", "9", "--width", "262k"),
        *("--l0", "small", "--affine", "--variant", "all"),
    )
    assert by_arguments == run(*SKIP)
    assert run("gemma-scope-2b-pt-res", "--layer", "20", "--width", "16k", "--l0", "71").startswith(
        "gemma-scope-2b-pt-res layer_20/width_16k/average_l0_71\n"
    )


def test_several_matches_say_what_tells_them_apart() -> None:
    result = CliRunner().invoke(app, ["info", "--model", "4b-it", "--site", "res"])
    assert result.exit_code == 1
    assert "dictionaries match, one is needed" in result.stderr and "--layer (" in result.stderr


def test_an_unknown_id_names_the_nearest() -> None:
    result = CliRunner().invoke(app, ["info", SKIP[0], SKIP[1] + "e"])
    assert result.exit_code == 1 and f"Did you mean '{SKIP[1]}'" in result.stderr


def test_json_is_every_field() -> None:
    printed = json.loads(run(*SKIP, "--json"))
    spec = get(*SKIP)
    assert printed.pop("url") == spec.url
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in printed.items()} == spec.to_dict()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kind": "clt", "model": "1b"}, "blocks.0.mlp.hook_in and the same of the other layers"),
        ({"kind": "clt", "model": "1b"}, "derived: follows from the published pattern"),
        ({"kind": "crosscoder", "model": "1b"}, "medium, target not published"),
        ({"model": "gpt2", "variant": "tree-4"}, "1536, 4608, 13824, 24576"),
        ({"model": "2b", "site": "transcoder"}, "without the gain of the norm before it"),
    ],
)
def test_what_other_kinds_say(arguments: dict[str, str], expected: str) -> None:
    assert expected in "\n".join(card_lines(find(**arguments)[0]))
