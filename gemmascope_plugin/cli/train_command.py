"""``gemmascope train``: a dictionary from a model and text, in a run folder that can be gone on with.

1. Options become the fields of a training spec; ``--set`` reaches all others. What can be checked without
   the model is checked before it is loaded.
2. ``gemma-2-tiny`` ships with the package and comes with a corpus that is generated; other models need
   ``--corpus``, a text file with one document per line.
3. ``--resume`` goes on with the run in ``--out``, which knows its spec: only model and corpus are given.

Cost: loading the model, then that of ``train()``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmascope_plugin.cli.options import BUNDLED, BackendName, load_named
from gemmascope_plugin.errors import (
    BadFileError,
    EmptySelectionError,
    GemmaScopeError,
    MissingFileError,
)

if TYPE_CHECKING:
    from gemmascope_plugin.training import TrainSpec
    from gemmascope_plugin.types import SAE

_DOCUMENTS = 2000
"""Of the generated corpus."""


def train_command(
    model: Annotated[str, typer.Option(help="Model: gemma-2-tiny, a name on the hub or a folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    site: Annotated[str | None, typer.Option(help="res, att, mlp; transcoders are at mlp.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer, from 0.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="jumprelu, batchtopk, tree, softsae, jumprelu_transcoder...")
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="Number of features.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Text file, one document per line.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="quick (default), gemma-scope, gemma-scope-2.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field of the spec: key=value.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    backend: BackendName = "hooked",
    device: Annotated[
        str, typer.Option(help="Where model and dictionary go: auto, cpu, cuda, cuda:1...")
    ] = "auto",
    wandb: Annotated[str | None, typer.Option(help="wandb project to log to.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    r"""Train a dictionary and write it in SAELens' format and in Gemma Scope's layout.

    An example on the bundled model, without a network:

    gemmascope train --model gemma-2-tiny --site res --layer 1 --architecture jumprelu \
    --d-sae 256 --steps 50 --out run

    A tree has --set levels=[64,256], a crosscoder or CLT --set layers=[0,1,2] and no --layer.
    """
    options: dict[str, Any] = {"site": site, "layer": layer, "architecture": architecture}
    options |= {"d_sae": d_sae, "steps": steps}
    values = {name: value for name, value in options.items() if value is not None}
    values |= _settings(settings or [])
    spec = _resumed(out, values, preset) if resume else _spec(model, values, preset)
    text = _text(corpus, model)

    from gemmascope_plugin.training import train

    sae = train(
        load_named(model, backend, device),
        spec,
        _generated() if text is None else text,
        run_dir=out,
        resume=resume,
        checkpoint_every=checkpoint_every,
        progress=progress,
        wandb=wandb,
    )
    for line in _report(sae, spec, out):
        typer.echo(line)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs; ``options.key=value`` for the architecture's own config."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise GemmaScopeError(f"--set {pair!r} is not key=value", fix="--set lr=0.001")
        head, dot, option = key.partition(".")
        if head == "options" and dot:
            values.setdefault("options", {})[option] = _value(text)
        else:
            values[key] = _value(text)
    return values


def _value(text: str) -> Any:
    """A value typed on a command line: ``0.01``, ``true``, ``null``, ``[64, 256]``, or plain text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _spec(model: str, values: dict[str, Any], preset: str | None) -> TrainSpec:
    from gemmascope_plugin.training.presets import whole_spec

    return whole_spec({"model": Path(model).name, **values}, preset)


def _resumed(out: Path, values: dict[str, Any], preset: str | None) -> TrainSpec:
    """The spec of the run that goes on."""
    from gemmascope_plugin.files.json_file import Record, read_json
    from gemmascope_plugin.training import TrainSpec
    from gemmascope_plugin.training.run_folder import CONFIG

    if values or preset:
        names = ", ".join([*values, *(["preset"] if preset else [])])
        raise GemmaScopeError(
            f"--resume with {names}",
            exists=f"the spec of the run, in {str(out / CONFIG)!r}",
            fix="--resume with --model, --corpus and --out alone",
        )
    if not (out / CONFIG).is_file():
        raise MissingFileError(
            f"There is no run to go on with in {str(out)!r}", fix="leave --resume out"
        )
    fix = "put the file back as it was, or begin another run"
    specs = Record(read_json(out / CONFIG, fix=fix), out / CONFIG, fix).dict_of("specs", dict)
    if not specs:
        raise BadFileError(f"{str(out / CONFIG)!r} has no specs", fix=fix)
    return TrainSpec.from_dict(next(iter(specs.values())))


def _text(path: Path | None, model: str) -> list[str] | None:
    """The documents of a file; None for the generated corpus."""
    if path is None:
        if model != BUNDLED:
            raise MissingFileError(
                f"There is no corpus for {model}", fix="--corpus FILE, one document per line"
            )
        return None
    if not path.is_file():
        raise MissingFileError(f"There is no file {str(path)!r}", fix="check --corpus")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise EmptySelectionError(f"{str(path)!r} has no text", fix="one document per line")
    return lines


def _generated() -> Any:
    from gemmascope_plugin.demo.corpus import TRAIN_SEED, make_corpus

    return make_corpus(_DOCUMENTS, TRAIN_SEED).tokens


def _report(sae: SAE, spec: TrainSpec, out: Path) -> list[str]:
    """What came out, and how to load it."""
    metadata = sae.cfg.metadata
    read, written = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
    route = read if read == written else f"{read} -> {written}"
    if spec.layers:
        route += f" and the same of layers {', '.join(map(str, spec.layers[1:]))}"
    excluded = ", ".join(map(str, spec.exclude)) or "nothing"
    parameters = sorted((out / "export").rglob("params*.*"))
    exported = str(parameters[0].parent) if parameters else "no form in Gemma Scope's layout"
    pairs = [
        ("trained", f"{spec.architecture} of {spec.d_sae} features at {route}, {spec.steps} steps"),
        ("measured", f"L0 {metadata.l0:.2f}, FVU {metadata.fvu:.4f}, excluded {excluded}"),
        ("SAELens", str(out / "final")),
        ("export", exported),
        ("metrics", str(out / "metrics.jsonl")),
    ]
    return [f"{name.ljust(10)}{text}" for name, text in pairs]
