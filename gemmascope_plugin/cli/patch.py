"""``gemmascope patch``: what replacing each part of a model, alone, does to its answer.

1. The task is named, or its prompts are typed, see ``options.py``.
2. ``exact`` runs every patch; the other methods estimate all of them from gradients.
3. The largest effects are printed; ``--out`` writes a page with a figure, and says how to read it.

Cost: loading the model, then that of ``activation_patching`` or ``attribution_patching``.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from gemmascope_plugin.cli.options import (
    AsJson,
    Out,
    Question,
    SplitName,
    check_out,
    refuse_dictionaries,
    split_of,
    table,
    typed_one_by_one,
)
from gemmascope_plugin.errors import EmptySelectionError, check_choice
from gemmascope_plugin.types import Direction

if TYPE_CHECKING:
    from gemmascope_plugin.causes import Effects

_N_PROMPTS = 64


@typed_one_by_one
def patch_command(
    question: Question,
    split: SplitName = None,
    component: Annotated[
        str, typer.Option(help="What is patched: z, q, k, v, pattern, mlp_out, resid_post...")
    ] = "z",
    direction: Annotated[
        str,
        typer.Option(help="denoising: clean values into corrupted runs; noising: the reverse."),
    ] = "denoising",
    axes: Annotated[
        str | None, typer.Option(help="One patch per coordinate of these: layer,head,pos.")
    ] = None,
    replacement: Annotated[
        str, typer.Option(help="other (run), zero, mean, overall_mean or resample.")
    ] = "other",
    method: Annotated[
        str, typer.Option(help="exact, or an estimate: atp, ig, ig-inputs, atp*, relp.")
    ] = "exact",
    top: Annotated[int, typer.Option(help="Effects to show, the largest.")] = 20,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    r"""Replace parts of a model one at a time, and show what that does to its answer.

    An example on the bundled model, without a network:

    gemmascope patch --task ioi --component z --direction noising --n 16 --out patch.html

    and on a real one: gemmascope patch --task ioi --model gemma-3-270m --n 16
    """
    question.check()
    named = [name.strip() for name in axes.split(",")] if axes is not None else None
    options = {"direction": direction, "axes": named, "replacement": replacement}
    chosen = split_of(split, question.builtin)
    _check(component, method, top, options)
    check_out(out)

    effects = _effects(question, chosen, component, method, options)

    from gemmascope_plugin.pages.effects_page import write_effects

    if as_json:
        typer.echo(json.dumps(_record(question, effects, top), indent=2))
    else:
        for line in _report(question, chosen, effects, top):
            typer.echo(line)
    if out is not None:
        write_effects(out, effects, n=top)
        typer.echo(f"page: {out}", err=as_json)


def _check(component: str, method: str, top: int, options: dict[str, Any]) -> None:
    """Refuses, without the model, what would be refused with it."""
    from gemmascope_plugin.causes.components import COMPONENTS, needs_dictionaries
    from gemmascope_plugin.causes.gradient.attribution_patching import METHODS
    from gemmascope_plugin.causes.grid import Choice
    from gemmascope_plugin.causes.replace import check_replacement

    check_choice("component", component, COMPONENTS)
    if needs_dictionaries(component):
        refuse_dictionaries(
            f"--component {component}", f"activation_patching(model, task, {component!r}, saes=...)"
        )
    check_choice("direction", options["direction"], get_args(Direction))
    check_choice("method", method, ("exact", *METHODS))
    check_replacement(options["replacement"], component)
    Choice(axes=options["axes"]).axes_of(component)
    if top < 1:
        raise EmptySelectionError(f"--top {top} shows nothing", fix="--top 20")


def _effects(
    question: Question, split: Any, component: str, method: Any, options: dict[str, Any]
) -> Effects:
    import gemmascope_plugin as gs

    model = question.load()
    task = question.ask(model, split, _N_PROMPTS)
    if method == "exact":
        watched = sys.stderr.isatty()
        return gs.activation_patching(model, task, component, progress=watched, **options)
    return gs.attribution_patching(model, task, component, method=method, **options)


def _report(question: Question, split: str, effects: Effects, top: int) -> list[str]:
    """What was patched, and the largest effects."""
    from gemmascope_plugin.pages.effects_page import NUMBERS, meaning, top_frame
    from gemmascope_plugin.pages.report_page import even_digits

    meta, frame = effects.metadata, top_frame(effects, top)
    noun = "prompt" if meta["n_prompts"] == 1 else "prompts"
    kind = split.replace("_", "-") if question.builtin else "own"
    prompts = f"{meta['n_prompts']} {kind} {noun}"
    runs = {"noising": "the clean run", "denoising": "the corrupted run"}[meta["direction"]]
    pairs = [
        ("task", f"{meta['task']}, {prompts}" if question.builtin else prompts),
        ("patched", f"{meta['direction']}: into {runs}, replacement {meta['replacement']}"),
        (
            "metric",
            f"{meta['metric']} {meta['logits']}: clean {meta['metric_clean']:.3f}, "
            f"corrupted {meta['metric_corrupt']:.3f}",
        ),
        *([("numbers", "sizes only, no direction")] if meta.get("magnitudes") else []),
        ("result", meaning(effects)),
    ]
    shown = even_digits(frame, [name for name in NUMBERS if name in frame])
    rows = [[str(cell) for cell in row] for row in shown.itertuples(index=False, name=None)]
    names = list(frame.columns)
    left = effects.values.numel() - len(frame)
    return [
        f"{meta['component']} of {question.model}, {meta['method']}",
        *(f"  {name.ljust(9)}{text}" for name, text in pairs),
        "",
        *table(names, rows, right=names),
        *([f"... and {left} smaller effects"] if left else []),
    ]


def _record(question: Question, effects: Effects, top: int) -> dict[str, Any]:
    """The same as plain values."""
    from gemmascope_plugin.pages.effects_page import top_frame

    texts = ("task", "component", "method", "direction", "replacement", "metric", "logits", "sign")
    numbers = ("n_prompts", "metric_clean", "metric_corrupt")
    return {
        "model": question.model,
        **{name: effects.metadata[name] for name in (*texts, *numbers)},
        "axes": list(effects.axes),
        "n_effects": effects.values.numel(),
        "effects": top_frame(effects, top).to_dict("records"),
    }
