"""The main job on a real model: its SAEs, a task, patching, a circuit that is checked, one page.

1. Ask the catalog for SAEs of the model. Those whose files are on this machine, the smallest at each
   hook, are spliced in: the logits are compared with the bare model's, and their features looked at.
2. Build a task from single tokens of the model's own tokenizer.
3. Patch the residual stream by layer and position of one prompt, and every head, exactly and by
   attribution, on some of the held-out prompts.
4. Discover a circuit of edges on training prompts; evaluate it on held-out ones beside random circuits of
   its size. Few of a model's heads and MLPs make no circuit that says much, as one of several random
   choices holds all that matters; of thousands of edges none does.

Cost: for Gemma 3 270M under a minute on two cores, most of it for patching heads and evaluating circuits;
no network once the model is there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gemmascope_plugin.catalog import SaeSpec, SpecList, find
from gemmascope_plugin.causes import Task, activation_patching
from gemmascope_plugin.causes.builtin import TASKS
from gemmascope_plugin.circuits import Scores, discover, evaluate
from gemmascope_plugin.demo.model_page import N_FEATURES, ModelReport, SplicedSaes, write
from gemmascope_plugin.demo.steps import Steps, compare, logit_change
from gemmascope_plugin.errors import UnknownNameError, check_choice
from gemmascope_plugin.features import Features, analyze
from gemmascope_plugin.features.analyze import top_words
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.sources import is_here
from gemmascope_plugin.models import load_model
from gemmascope_plugin.models.protocol import HookedModel, device_of, weights_of
from gemmascope_plugin.pages import prepare
from gemmascope_plugin.types import SAE

N_STEPS = 8
N_PROMPTS = 8
N_PATCHED = 4
"""Prompts that heads are patched on, each in a run of its own."""
N_RANDOM = 5
N_SAES = 4
"""SAEs that are spliced in at most, when files of more are on this machine."""
CIRCUIT_SIZE = 200
"""Edges of the circuit, of models that have ten times as many."""
SIZES = (0, 25, 50, 100, 200, 400, 800)
"""Edges that are kept."""


def run_on_model(
    name: str,
    out: str | Path = Path("gemmascope_demo.html"),
    *,
    task: str = "ioi",
    n: int = N_PROMPTS,
    local_dir: str | Path | None = None,
    progress: bool = True,
) -> ModelReport:
    """Runs find, task, patch, discover, evaluate on a model and writes a page.

    ``n`` prompts check the circuit, the first of them are patched, as many others find it. ``local_dir``
    mirrors the SAEs' repository and is looked at instead of the hub's cache. That the page cannot be
    written is found out before any work is done.
    """
    started = time.monotonic()
    path = prepare(out)
    check_choice("task", task, TASKS)
    with Steps(N_STEPS, progress) as step:
        specs = step("find SAEs", specs_of, name)
        model = step("load the model", load_model, name)
        train, held_out = step("build the task", both_splits, task, model, n)
        prompt = str(held_out.clean[0])
        spliced = step("splice SAEs", splice_local, model, specs, prompt, local_dir)
        first = held_out.first(1)
        positions = step(
            "patch layers and positions", activation_patching, model, first, "resid_pre"
        )
        heads = step("patch heads", compare, model, held_out.first(N_PATCHED), "z")
        scores = step("discover and evaluate", checked_circuit, model, train, held_out)
        report = ModelReport(
            path=path,
            model=name,
            source=weights_of(model) or name,
            specs=specs,
            spliced=spliced,
            task=held_out,
            positions=positions,
            heads=heads,
            scores=scores,
            seconds=time.monotonic() - started,
        )
        step("write the page", write, report)
    return report


def specs_of(name: str) -> SpecList:
    """What the catalog has for the model; nothing for a model it does not know."""
    try:
        return find(model=name)
    except UnknownNameError:
        return SpecList([])


def both_splits(task: str, model: HookedModel, n: int) -> tuple[Task, Task]:
    """Training and held-out prompts."""
    train = Task.builtin(task, model, n=n, split="train")
    return train, Task.builtin(task, model, n=n, split="held_out")


# --------------------------------------------------------------------------- SAEs
def splice_local(
    model: HookedModel, specs: SpecList, prompt: str, local_dir: str | Path | None = None
) -> SplicedSaes | None:
    """Splices in SAEs whose files are on this machine, the smallest of a hook, and looks at a prompt."""
    smallest: dict[str, SaeSpec] = {}
    for spec in sorted(specs, key=lambda spec: spec.nbytes):
        if spec.kind == "sae" and spec.hook_out not in smallest and is_here(spec, local_dir):
            smallest[spec.hook_out] = spec
    if not smallest:
        return None
    chosen = _spread(sorted(smallest.values(), key=lambda spec: (spec.layer or 0, spec.site)))
    place = {"device": device_of(model), "dtype": model.cfg.dtype}
    saes = [load(spec, offline=True, local_dir=local_dir, **place) for spec in chosen]
    features = analyze(model, saes, prompt)
    return SplicedSaes(
        names=tuple(f"{spec.release} {spec.sae_id}" for spec in chosen),
        logit_difference=logit_change(model, saes, prompt),
        features=features,
        words=_words(model, dict(zip(chosen, saes, strict=True)), features),
    )


def _spread(specs: Sequence[SaeSpec]) -> list[SaeSpec]:
    """At most ``N_SAES``, from the first to the last."""
    n = min(N_SAES, len(specs))
    return [specs[round(i * (len(specs) - 1) / max(n - 1, 1))] for i in range(n)]


def _words(
    model: HookedModel, saes: dict[SaeSpec, SAE], features: Features
) -> dict[tuple[str, int], tuple[str, ...]]:
    """What the most active features write towards, where they write to the stream itself."""
    decoders = {spec.hook_out: sae.W_dec for spec, sae in saes.items() if spec.site != "att"}
    rows = [row for row in features.top(N_FEATURES).itertuples() if row.site in decoders]
    if not rows:
        return {}
    directions = torch.stack([decoders[row.site][row.feature] for row in rows])
    words = top_words(model, directions, k=3)
    return {(row.site, row.feature): each.top for row, each in zip(rows, words, strict=True)}


# --------------------------------------------------------------------------- causes
def checked_circuit(model: HookedModel, train: Task, held_out: Task) -> Scores:
    """A circuit of edges from training prompts, evaluated on held-out ones."""
    edges = discover(model, train, method="eap-ig")
    circuit = edges.top(min(CIRCUIT_SIZE, edges.n_units // 10))
    sizes = [size for size in SIZES if size < edges.n_units]
    return evaluate(model, circuit, held_out, sizes=sizes, n_random=N_RANDOM)
