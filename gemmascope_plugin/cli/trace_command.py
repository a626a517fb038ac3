"""``gemmascope trace``: the attribution graph of a prompt, as a page, and as JSON for other viewers.

1. The dictionaries are named as in ``find``: one for each layer, or a CLT. The bundled model has its own,
   whose features have names.
2. Everything that can be checked without the model is checked before it is loaded.
3. The graph is pruned; features get the words that they write towards.

Cost: loading the model and the dictionaries, then that of ``trace``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmascope_plugin.cli.catalog_commands import Affine, Level, Width
from gemmascope_plugin.cli.options import (
    BUNDLED,
    LocalDir,
    ModelOptions,
    Seed,
    SplitName,
    TaskName,
    builtin_task,
    check_out,
    split_of,
    table,
    task_names,
    typed_one_by_one,
)
from gemmascope_plugin.cli.trace_dictionaries import dictionaries, find_files
from gemmascope_plugin.errors import (
    EmptySelectionError,
    TaskError,
    check_choice,
    shorten,
)

if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec
    from gemmascope_plugin.graphs import Graph

_SHOWN = 12


@dataclass(frozen=True)
class _Drawn:
    """A prompt of a built-in task."""

    task: str | None
    row: int
    split: Any
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be traced, checked."""

    prompt: str | None
    """None until the task has said."""
    drawn: _Drawn
    choice: ModelOptions
    specs: Sequence[SaeSpec]
    local_dir: str | None
    options: dict[str, Any]
    """Of ``trace``."""
    thresholds: dict[str, float]
    """Of ``prune``."""


@typed_one_by_one
def trace_command(
    choice: ModelOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="Text whose next token is explained.")
    ] = None,
    task: TaskName = None,
    row: Annotated[int, typer.Option("--row", help="Which prompt of the task.")] = 0,
    split: SplitName = None,
    seed: Seed = 0,
    transcoders: Annotated[
        str | None, typer.Option(help="Release of the dictionaries, or transcoder or clt.")
    ] = None,
    width: Width = None,
    l0: Level = None,
    affine: Affine = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Words to explain, a,b; differences, a-b. By default the likeliest."),
    ] = None,
    max_features: Annotated[
        int | None, typer.Option(help="Explain only so many features, the most influential.")
    ] = None,
    node_threshold: Annotated[
        float, typer.Option(help="Share of the influence that the kept nodes have.")
    ] = 0.8,
    edge_threshold: Annotated[
        float, typer.Option(help="Share of the influence that the kept edges carry.")
    ] = 0.98,
    memory_budget: Annotated[str, typer.Option(help="Memory for all but the graph.")] = "4 GB",
    local_dir: LocalDir = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("gemmascope_trace.html"),
    as_json: Annotated[
        Path | None,
        typer.Option("--json", help="File for circuit-tracer's viewer and Neuronpedia."),
    ] = None,
) -> None:
    r"""Show how a model comes to its next token: which features cause which, from the words on.

    An example on the bundled model, without a network:

    gemmascope trace "the capital of the state containing dallas is" --out trace.html

    and the first prompt of a task: gemmascope trace --task two_hop

    On a real model the transcoders of all layers, or a CLT, are downloaded first:

    gemmascope trace --task ioi --model gemma-3-270m --width 16k --l0 small --no-affine \
    --transcoders gemma-scope-2-270m-pt-transcoders-all
    """
    from gemmascope_plugin.graphs.viewer_files import check_slug

    choice.check()
    check_out(out)
    check_out(as_json, "--json")
    if as_json is not None:
        check_slug(as_json.stem)
    _check_prompt(prompt, task, row, choice.model)
    drawn = _Drawn(task, row, split_of(split, task is not None), seed)
    options = _options(targets, max_features, memory_budget)
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    _check_shares(thresholds)
    specs = dictionaries(choice.model, transcoders, width=width, l0=l0, affine=affine)
    request = _Request(
        prompt=prompt,
        drawn=drawn,
        choice=choice,
        specs=specs,
        local_dir=local_dir,
        options=options,
        thresholds=thresholds,
    )
    request, graph, words = _traced(request)
    for line in _report(request, graph):
        typer.echo(line)

    from gemmascope_plugin.pages.trace_page import write_trace

    write_trace(out, graph, top_tokens=words)
    typer.echo(f"page: {out}")
    if as_json is not None:
        _write_json(as_json, request, graph)
        typer.echo(f"graph: {as_json}")


def parse_targets(text: str | None) -> list[Any] | None:
    """``a,b-c`` is the word ``a`` and the difference of ``b`` and ``c``."""
    if text is None:
        return None
    targets: list[Any] = []
    for part in (each.strip() for each in text.split(",")):
        word, dash, other = (each.strip() for each in part.partition("-"))
        if not word or (dash and not other):
            raise TaskError(f"--targets {text!r} has a part without a word", fix="--targets a,b-c")
        targets.append((word, other) if dash else word)
    return targets


def _check_prompt(prompt: str | None, task: str | None, row: int, model: str) -> None:
    """Refuses no prompt, and two."""
    if task is None:
        if prompt is None or not prompt.strip():
            raise EmptySelectionError(
                "The prompt is empty", fix='gemmascope trace "some words", or --task ioi'
            )
        return
    if prompt is not None:
        raise TaskError(f"--task {task} brings its own prompt", fix="one of the two")
    check_choice("task", task, task_names(model))
    if row < 0:
        raise EmptySelectionError(f"--row {row} is before the first prompt", fix="--row 0")


def _from_task(model: Any, drawn: _Drawn) -> tuple[str, list[Any] | None]:
    """A prompt, and its answer against the wrong one; None where either is several tokens."""
    assert drawn.task is not None
    task = builtin_task(drawn.task, model, drawn.row + 1, drawn.split, drawn.seed)
    question: Any = task.question
    answer, wrong = (_single(side[drawn.row]) for side in (question.answer, question.wrong))
    several = answer is None or wrong is None
    return str(task.clean[drawn.row]), None if several else [(answer, wrong)]


def _single(side: Any) -> str | int | None:
    """The word or token of one side, alone or in a list; None where there are several."""
    if isinstance(side, str | int):
        return side
    return side[0] if len(side) == 1 else None


def _options(targets: str | None, max_features: int | None, memory_budget: str) -> dict[str, Any]:
    """Arguments of ``trace``."""
    from gemmascope_plugin.arguments import parse_size

    if max_features is not None and max_features < 1:
        raise EmptySelectionError(
            f"--max-features {max_features} explains nothing", fix="--max-features 1000"
        )
    return {
        "targets": parse_targets(targets),
        "max_feature_nodes": max_features,
        "memory_budget": parse_size(memory_budget),
    }


def _check_shares(thresholds: dict[str, float]) -> None:
    for name, value in thresholds.items():
        if not 0 < value <= 1:
            option = f"--{name.replace('_', '-')}"
            raise EmptySelectionError(
                f"{option} {value} is not a share", exists="shares above 0, up to 1"
            )


def _traced(request: _Request) -> tuple[_Request, Graph, Any]:
    """The request with its prompt, the pruned graph, and words of its features."""
    import gemmascope_plugin as gs
    from gemmascope_plugin.models.protocol import device_of
    from gemmascope_plugin.tracing.graph_features import top_tokens

    find_files(request.specs, request.local_dir)
    model = request.choice.load()
    if request.drawn.task is not None:
        prompt, targets = _from_task(model, request.drawn)
        options = {**request.options, "targets": request.options["targets"] or targets}
        request = replace(request, prompt=prompt, options=options)
    assert request.prompt is not None
    place = device_of(model)
    saes = [gs.load(spec, local_dir=request.local_dir, device=place) for spec in request.specs]
    watched = sys.stderr.isatty()
    graph = gs.trace(model, request.prompt, saes, progress=watched, **request.options)
    graph = graph.prune(**request.thresholds)
    if request.choice.model == BUNDLED:
        graph = graph.with_labels(_labels(request.specs))
    return request, graph, top_tokens(graph, model, saes)


def _labels(specs: Sequence[SaeSpec]) -> dict[tuple[str, int], str]:
    """Concepts of the bundled suite by site and feature."""
    import gemmascope_plugin as gs

    suite: Any = gs.tiny()
    return {
        (spec.hook_out, feature): label.concept
        for spec in specs
        for feature, label in suite.labels_of(spec).items()
    }


def _report(request: _Request, graph: Graph) -> list[str]:
    """Sizes, scores and the most influential nodes."""
    from gemmascope_plugin.figures.theme import short_label

    whole, scores = graph.metadata["whole"], graph.scores
    nodes = graph.nodes
    targets = [f"{short_label(label)} ({weight:.3f})" for label, weight in _explained(graph)]
    pairs = [
        ("explained", shorten(targets)),
        ("replacement", f"{scores.replacement:.3f}, unpruned {whole['replacement']:.3f}"),
        ("completeness", f"{scores.completeness:.3f}, unpruned {whole['completeness']:.3f}"),
        ("residual", f"{graph.metadata['residual']:.1g} of the largest pre-activation"),
    ]
    inner = nodes.loc[graph.where("feature") | graph.where("error")]
    best = inner.sort_values("influence", kind="stable").head(_SHOWN)
    rows = [
        (
            row.label,
            row.kind,
            str(row.layer),
            short_label(graph.tokens[row.pos]),
            f"{row.influence:.3f}",
        )
        for row in best.itertuples()
    ]
    return [
        f"{request.choice.model}: {len(nodes)} of {whole['n_nodes']} nodes, "
        f"{graph.n_edges} of {whole['n_edges']} edges",
        *(f"  {name.ljust(14)}{text}" for name, text in pairs),
        "",
        *table(("node", "kind", "layer", "token", "share"), rows, right=("layer", "share")),
    ]


def _explained(graph: Graph) -> list[tuple[str, float]]:
    targets = graph.nodes.iloc[graph.targets]
    return list(zip(targets["label"], targets["weight"], strict=True))


def _write_json(path: Path, request: _Request, graph: Graph) -> None:
    from gemmascope_plugin.graphs.viewer_files import write_json

    content = graph.to_json(
        path.stem,
        scan=request.specs[0].model,
        source_set=_source_set(request.specs),
        description=f"{request.prompt} ({request.choice.model})",
    )
    write_json(path, content)


def _source_set(specs: Sequence[SaeSpec]) -> str | None:
    """Neuronpedia's name of the whole set, where all dictionaries are of one."""
    names = [spec.neuronpedia_id or "" for spec in specs]
    sets = {re.sub(r"^.+/\d+-", "", name) for name in names}
    return sets.pop() or None if len(sets) == 1 else None
