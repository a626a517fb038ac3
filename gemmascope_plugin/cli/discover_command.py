"""``gemmascope discover``: a circuit for a task, and what ablating all the rest does to the answer.

1. The task is named, or its prompts are typed, see ``options.py``.
2. Edges or nodes are scored on training prompts and the best of them kept.
3. The circuit is evaluated on held-out prompts of the task. Own prompts have no others: they are used
   twice, and the output says so.

Cost: loading the model, then that of ``discover`` and ``evaluate``; most of it for random circuits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from gemmascope_plugin.cli.options import (
    AsJson,
    Out,
    Question,
    check_out,
    refuse_dictionaries,
    table,
    typed_one_by_one,
)
from gemmascope_plugin.errors import EmptySelectionError, TaskError, check_choice, number_of

if TYPE_CHECKING:
    from gemmascope_plugin.circuits import Scores
    from gemmascope_plugin.graphs import Circuit

_N_PROMPTS, _N_RANDOM = 32, 10


@typed_one_by_one
def discover_command(
    question: Question,
    method: Annotated[
        str,
        typer.Option(
            help="Edges: eap-ig, eap, eap-ig-activations, clean-corrupted, acdc, exact. "
            "Nodes: exact, atp, ig, atp*, relp."
        ),
    ] = "eap-ig",
    units: Annotated[
        str | None, typer.Option(help="edges or nodes; by default what the method scores.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Units to keep.")] = None,
    tau: Annotated[
        float | None, typer.Option(help="Keep units with a score of at least this instead.")
    ] = None,
    select: Annotated[
        str, typer.Option(help="top scores, or of edges greedy growth from the logits.")
    ] = "top",
    rank: Annotated[
        str,
        typer.Option(
            help="By absolute score; positive or negative: for or against the metric first."
        ),
    ] = "absolute",
    nodes: Annotated[
        str | None, typer.Option(help="Kinds, for circuits of nodes: head,mlp.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Check it by ablation.")
    ] = True,
    random: Annotated[
        int | None, typer.Option(help="Random circuits of each size beside it; 10 if not given.")
    ] = None,
    out: Out = None,
    save: Annotated[Path | None, typer.Option(help="File to keep the circuit in.")] = None,
    as_json: AsJson = False,
) -> None:
    r"""Find the circuit of a task, and check it on other prompts.

    An example on the bundled model, without a network:

    gemmascope discover --task ioi --method eap-ig --size 30 --n 8 --out circuit.html

    and on a real one: gemmascope discover --task ioi --model gemma-3-270m --n 16 --size 200
    """
    question.check()
    options = {"method": method, "units": units, "size": size, "tau": tau}
    options |= {"select": select, "rank": rank}
    kinds = _check(options, nodes)
    _check_random(random, evaluate)
    check_out(out)
    check_out(save, "--save")

    n_random = (_N_RANDOM if random is None else random) if evaluate else None
    circuit, scores = _circuit(question, {**options, "nodes": kinds}, n_random)
    if as_json:
        typer.echo(json.dumps(_record(question, circuit, scores), indent=2))
    else:
        for line in _report(question, circuit, scores):
            typer.echo(line)
    if save is not None:
        circuit.save(save)
        typer.echo(f"circuit: {save}", err=as_json)
    if out is not None:
        from gemmascope_plugin.pages.circuit_page import write_circuit

        write_circuit(out, circuit, scores, held_out=question.builtin)
        typer.echo(f"page: {out}", err=as_json)


def _check_random(random: int | None, evaluate: bool) -> None:
    """Refuses random circuits that nobody evaluates."""
    if random is not None and random < 0:
        raise EmptySelectionError(
            f"--random {random} is not a number of circuits", fix=f"--random {_N_RANDOM}"
        )
    if random is not None and not evaluate:
        raise TaskError(f"--random {random} says nothing here: --no-evaluate leaves the check out")


def _check(options: dict[str, Any], nodes: str | None) -> tuple[str, ...]:
    """Refuses what says nothing or contradicts itself; the kinds of nodes."""
    from gemmascope_plugin.circuits.circuit_methods import Selection
    from gemmascope_plugin.circuits.discover import find_method
    from gemmascope_plugin.graphs.graph_arrays import Rank
    from gemmascope_plugin.graphs.node import check_kinds

    method = find_method(options["method"], options["units"], of_features=False)
    check_choice("selection", options["select"], get_args(Selection))
    check_choice("rank", options["rank"], get_args(Rank))
    if options["size"] is not None and options["tau"] is not None:
        raise TaskError(
            f"Both --size {options['size']} and --tau {options['tau']} say what to keep",
            fix="one of them",
        )
    useless = {
        "--nodes": nodes is not None and "nodes" not in method.options,
        "--select greedy": options["select"] == "greedy" and "select" not in method.options,
        "--size": options["size"] is not None and "size" not in method.options,
    }
    chooses = "keeps nodes, not edges" if method.scores == "nodes" else "chooses by itself"
    for option, is_useless in useless.items():
        if is_useless:
            reason = "keeps edges, not nodes" if option == "--nodes" else chooses
            raise TaskError(f"{option} says nothing here: --method {method.name} {reason}")
    kinds = check_kinds([kind.strip() for kind in (nodes or "head,mlp").split(",")])
    if "feature" in kinds:
        refuse_dictionaries(
            "--nodes feature", 'discover(model, task, nodes=("head", "mlp", "feature"), saes=...)'
        )
    return kinds


def _circuit(
    question: Question, options: dict[str, Any], n_random: int | None
) -> tuple[Circuit, Scores | None]:
    """The circuit, and what was measured of it."""
    import gemmascope_plugin as gs

    model, watched = question.load(), sys.stderr.isatty()
    task = question.ask(model, "train", _N_PROMPTS)
    circuit = gs.discover(model, task, progress=watched, **options)
    if n_random is None:
        return circuit, None
    held_out = question.ask(model, "held_out", _N_PROMPTS)
    scores = gs.evaluate(model, circuit, held_out, n_random=n_random, progress=watched)
    return circuit, scores


def _report(question: Question, circuit: Circuit, scores: Scores | None) -> list[str]:
    """How it was found, how faithful it is, and what is kept."""
    from gemmascope_plugin.pages.circuit_page import ranked

    meta, unit = circuit.metadata, circuit.graph.unit
    kind, n = "training" if question.builtin else "own", question.n_prompts(_N_PROMPTS)
    pairs = [("found on", f"{number_of(n, f'{kind} prompt')}, {meta['metric']}")]
    pairs += [] if scores is None else _measured(question, scores)
    frame = ranked(circuit)
    frame = frame[frame["kept"]].drop(columns="kept")
    rows = [[str(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
    return [
        f"{meta['task']} on {question.model}: {circuit.size} of {circuit.n_units} {unit}s by "
        f"{meta['method']}",
        *(f"  {name.ljust(14)}{text}" for name, text in pairs),
        "",
        *table(list(frame.columns), rows, right=("rank", "layer", "score")),
    ]


def _measured(question: Question, scores: Scores) -> list[tuple[str, str]]:
    from gemmascope_plugin.pages.circuit_page import FAITHFUL

    meta, unit = scores.metadata, scores.circuit.graph.unit
    interval, smallest = _interval(scores), scores.smallest(FAITHFUL)
    between = "" if interval is None else f", 95 % {_fixed(interval[0])} to {_fixed(interval[1])}"
    n = meta["n_prompts"]
    where = (
        number_of(n, "held-out prompt")
        if question.builtin
        else f"the same {number_of(n, 'prompt')}, as there are no others: this tests nothing new"
    )
    beside = "none"
    if scores.random:
        n_random = number_of(len(scores.random), "random circuit")
        beside = f"{_fixed(max(scores.random))}, the best of {n_random} of this size"
    from_there = f"{smallest} {unit}s, with faithfulness of at least {FAITHFUL} from there on"
    return [
        ("evaluated on", where),
        ("faithfulness", f"{_fixed(scores.faithfulness)}{between}"),
        ("random", beside),
        ("completeness", f"{_fixed(scores.completeness)} of the metric without the circuit"),
        ("KL", f"{scores.kl:.4f} nats from the full model"),
        ("smallest", "none" if smallest is None else from_there),
    ]


def _fixed(value: float) -> str:
    """Three digits, and no minus before zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _interval(scores: Scores) -> tuple[float, float] | None:
    """The interval over prompts, where there are several."""
    several = scores.by_prompt is not None and scores.by_prompt.shape[1] > 1
    return scores.interval() if several else None


def _record(question: Question, circuit: Circuit, scores: Scores | None) -> dict[str, Any]:
    """The same as plain values."""
    from gemmascope_plugin.pages.circuit_page import FAITHFUL

    meta = circuit.metadata
    record = {
        "model": question.model,
        **{name: meta[name] for name in ("task", "metric", "method", "sign")},
        "unit": circuit.graph.unit,
        "n_units": circuit.n_units,
        "size": circuit.size,
    }
    frame = circuit.to_frame().query("kept").drop(columns="kept")
    units = json.loads(str(frame.to_json(orient="records")))
    if scores is None:
        return {**record, "kept": units, "scores": None}
    return {
        **record,
        "kept": units,
        "scores": {
            "prompts": "held-out" if question.builtin else "the same",
            "n_prompts": scores.metadata["n_prompts"],
            "faithfulness": scores.faithfulness,
            "interval": _interval(scores),
            "random": list(scores.random),
            "completeness": scores.completeness,
            "kl": scores.kl,
            "metric_full": scores.metric_full,
            "metric_empty": scores.metric_empty,
            f"smallest_{FAITHFUL}": scores.smallest(FAITHFUL),
            "sizes": list(scores.sizes),
            "faithfulness_by_size": list(scores.faithfulness_by_size),
        },
    }
