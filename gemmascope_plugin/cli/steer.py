"""``gemmascope steer``: a prompt continued with and without one feature, and what that changed.

1. The dictionary is named as in ``find``; arguments that match several are an error.
2. Everything that can be checked without the model is checked before it is loaded.
3. ``gemma-2-tiny`` ships with the package, and its features have names; other models come from the
   cache or the hub.

Cost: loading the model, then that of ``steer()``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from gemmascope_plugin.cli.catalog_commands import Filters, Release
from gemmascope_plugin.cli.options import (
    BUNDLED,
    AsJson,
    BackendName,
    LocalDir,
    load_named,
    table,
    typed_one_by_one,
)
from gemmascope_plugin.errors import (
    EmptySelectionError,
    UnknownNameError,
    check_choice,
    check_feature,
)
from gemmascope_plugin.types import Backend

if TYPE_CHECKING:
    from gemmascope_plugin.catalog import SaeSpec
    from gemmascope_plugin.splice import Steering, SteeringSweep
    from gemmascope_plugin.splice.steering_report import AnswerChange, Method

_N_POSITIONS = 6
"""Positions shown of one run, those where the prediction changed most."""


@typed_one_by_one
def steer_command(
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    feature: Annotated[
        str, typer.Option(help="Index of the feature, or its label in the bundled suite.")
    ],
    strength: Annotated[
        list[float], typer.Option(help="How hard to push; given several times, a table.")
    ],
    filters: Filters,
    release: Release = None,
    sae_id: Annotated[str | None, typer.Option(help="Id in the release.")] = None,
    method: Annotated[
        str, typer.Option(help="add the direction, or orthogonal: multiply what points along it.")
    ] = "add",
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 20,
    temperature: Annotated[float, typer.Option(help="0 for no sampling.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from so much probability.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    answer: Annotated[
        str | None,
        typer.Option(help="Text behind the prompt, of any length: its log-probability, both ways."),
    ] = None,
    wrong: Annotated[str | None, typer.Option(help="Text to compare the answer with.")] = None,
    backend: BackendName = "hooked",
    local_dir: LocalDir = None,
    as_json: AsJson = False,
) -> None:
    r"""Continue a prompt with a feature pushed, and show what that changed.

    The dictionary is named as in find. An example on the bundled model, without a network:

    gemmascope steer --model gemma-2-tiny --site res --layer 2 --l0 canonical \
    --feature next_is_singular_verb --strength 16 --max-new-tokens 3 \
    --prompt "today the keys near the cabinet"

    With --answer " is clean ." also how likely that text is, before and after.
    """
    spec = filters.find(release=release, sae_id=sae_id).one()
    check_choice("backend", backend, get_args(Backend))
    if answer is None and wrong is not None:
        raise EmptySelectionError(
            f"--wrong {wrong!r} has no answer to be compared with", fix="--answer TEXT"
        )
    index, label = _feature(spec, feature)

    import gemmascope_plugin as gs
    from gemmascope_plugin.splice.sampling import Sampling
    from gemmascope_plugin.splice.steering_report import METHODS

    check_choice("steering method", method, METHODS)
    drawn: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn |= {"max_new_tokens": max_new_tokens, "seed": seed}
    Sampling(**drawn)
    sae = gs.load(spec, local_dir=local_dir)
    runs = gs.steer(
        load_named(spec.model, backend, "auto"),
        sae,
        index,
        strength,
        prompt,
        method=cast("Method", method),
        answer=answer,
        wrong=wrong,
        **drawn,
    )
    if as_json:
        typer.echo(json.dumps(_record(spec, label, runs), indent=2))
        return
    described = f"feature {index}" + (f", {label}" if label else "")
    typer.echo(f"{spec.release} {spec.sae_id}: {described}")
    for line in _text(runs[0]) if len(runs) == 1 else _table(runs):
        typer.echo(line)


def _feature(spec: SaeSpec, text: str) -> tuple[int, str | None]:
    """Index and description of a feature that was typed by index or label."""
    bundled = spec.model == BUNDLED
    index = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
    if index is not None:
        check_feature(index, spec.d_sae, spec.sae_id)
    elif not bundled:
        raise UnknownNameError(
            f"--feature {text!r} is not a number, and the features of {spec.model} have no labels here",
            exists=f"features 0 to {spec.d_sae - 1}; labels for {BUNDLED} only",
            fix="--feature 219",
        )
    if index is not None and not bundled:
        return index, None
    from gemmascope_plugin.demo import tiny

    suite = tiny()
    index = suite.feature(spec, text) if index is None else index
    label = suite.labels_of(spec).get(index)
    return index, None if label is None else str(label)


def _text(run: Steering) -> list[str]:
    """Both continuations and the figures of one strength, then where the prediction changed most."""
    from gemmascope_plugin.figures.theme import visible
    from gemmascope_plugin.splice.steering_report import one_line

    pairs = [
        ("steered", f"{run.method}, strength {run.strength:g}, {_where(run)}"),
        ("prompt", one_line(run.prompt)),
        ("before", one_line(run.before)),
        ("after", one_line(run.after)),
        ("KL", run.summary()),
        *([] if run.answer is None else [("answer", repr(run.answer))]),
    ]
    most = run.to_frame().nlargest(_N_POSITIONS, "kl").sort_index()
    columns = ("pos", "token", "KL", "next before", "p", "next after", "p")
    rows = [
        (
            *(str(row.pos), visible(row.token), f"{row.kl:.3f}"),
            *(visible(row.top_before), f"{row.p_before:.3f}"),
            *(visible(row.top_after), f"{row.p_top_after:.3f}"),
        )
        for row in most.itertuples()
    ]
    return [
        *(f"  {name.ljust(9)}{text}" for name, text in pairs),
        "",
        *table(columns, rows, right=("pos", "KL", "p")),
    ]


def _table(runs: SteeringSweep) -> list[str]:
    """One row per strength."""
    from gemmascope_plugin.splice.steering_report import one_line

    first = runs[0]
    pairs = [
        ("steered", f"{first.method}, {_where(first)}"),
        ("prompt", one_line(first.prompt)),
        ("before", one_line(first.before)),
        *([] if first.answer is None else [("answer", _asked(first.answer))]),
    ]
    asked = first.answer is not None
    columns = ("strength", "mean KL", "max KL", "push", "changed", *["answer"] * asked, "after")
    rows = [
        (
            *(f"{run.strength:g}", f"{run.mean_kl:.3f}", f"{run.max_kl:.3f}"),
            *(f"{run.relative_push:.3f}", str(run.tokens_changed)),
            *([] if run.answer is None else [f"{run.answer.after:+.3f}"]),
            one_line(run.after),
        )
        for run in runs
    ]
    lines = table(columns, rows, right=columns[:-1])
    return [*(f"  {name.ljust(9)}{text}" for name, text in pairs), "", *lines]


def _asked(answer: AnswerChange) -> str:
    """The answer of a sweep, which a column of the table says the values of."""
    against = "" if answer.wrong is None else f" against {answer.wrong!r}"
    return f"{answer.answer!r}{against}, {answer.before:+.3f} nats before"


def _where(run: Steering) -> str:
    excluded = ", ".join(map(str, run.exclude)) or "nothing"
    return f"at {run.site}, excluded {excluded}"


def _record(spec: SaeSpec, label: str | None, runs: SteeringSweep) -> dict[str, Any]:
    """All that was measured, as plain values."""
    from dataclasses import asdict

    first = runs[0]
    figures = ("mean_kl", "max_kl", "max_kl_pos", "relative_push", "tokens_changed")
    return {
        "release": spec.release,
        "sae_id": spec.sae_id,
        "site": first.site,
        "feature": first.feature,
        "label": label,
        "method": first.method,
        "exclude": list(first.exclude),
        "sampling": asdict(first.sampling),
        "prompt": first.prompt,
        "before": first.before,
        "answer": None if first.answer is None else first.answer.answer,
        "wrong": None if first.answer is None else first.answer.wrong,
        "logprob_before": None if first.answer is None else first.answer.before,
        "tokens": list(first.tokens),
        "runs": [
            {
                "strength": run.strength,
                "after": run.after,
                **{name: getattr(run, name) for name in (*figures, "first_difference")},
                "logprob_after": None if run.answer is None else run.answer.after,
                "kl": run.kl.tolist(),
            }
            for run in runs
        ],
    }
