"""The main job on a real model: its SAEs, a task, patching, a circuit that is checked, one page.

1. Ask the catalog for SAEs of the model; those whose files are on this machine are spliced in, and the
   logits compared with the bare model's.
2. Build a task from single tokens of the model's own tokenizer.
3. Patch the residual stream by layer and position of one prompt, and every head, exactly and by
   attribution.
4. Discover a circuit of heads and MLPs on training prompts; evaluate it on held-out ones beside random
   circuits of its size.

Cost: for Gemma 3 270M under three minutes on two cores, most of it for patching heads and evaluating
circuits; no network once the model is there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemmascope_plugin.attribution import attribution_patching
from gemmascope_plugin.catalog import SpecList, find
from gemmascope_plugin.circuits import Scores, discover, evaluate
from gemmascope_plugin.demo.progress import Steps, versions
from gemmascope_plugin.errors import MissingFileError, UnknownNameError
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.sources import locate
from gemmascope_plugin.models import load_model
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.pages import prepare
from gemmascope_plugin.pages.report import Section, write_page
from gemmascope_plugin.pages.sections import (
    Comparison,
    agreement,
    circuit_section,
    heads_section,
    positions_section,
)
from gemmascope_plugin.patching import Task, activation_patching
from gemmascope_plugin.splice import splice

N_STEPS = 8
N_PROMPTS = 12
N_RANDOM = 5
N_SAES = 4
"""SAEs that are spliced in at most, when files of more are on this machine."""
CIRCUIT_SIZE = 40
SIZES = (0, 10, 20, 40, 60)
"""Circuits that are run, beside the whole model."""


@dataclass(frozen=True)
class ModelReport:
    """What was measured on a model, and where its page is."""

    path: Path
    model: str
    source: str
    """Where the weights come from."""
    specs: SpecList
    """SAEs that the catalog has for the model."""
    spliced: tuple[str, ...]
    """Those whose files are on this machine, as far as they were spliced in."""
    logit_difference: float | None
    """Largest change of a logit by splicing them in, error kept."""
    task: Task
    positions: Any
    heads: Comparison
    scores: Scores
    seconds: float = field(default=0.0, compare=False)

    def summary(self) -> str:
        """The main figures, one per line."""
        circuit = self.scores.circuit
        best = max(self.scores.random)
        rows = [
            ("model", f"{self.model}, weights from {self.source}"),
            ("SAEs", f"{len(self.specs)} in the catalog, {self._local()}"),
            ("task", repr(self.task)),
            ("attribution vs exact, heads", f"Spearman {self.heads.spearman:.3f}"),
            (
                f"circuit, {circuit.size} of {len(circuit.ranking)} nodes",
                f"faithfulness {self.scores.faithfulness:.3f} held out, "
                f"best of {len(self.scores.random)} random {best:.3f}",
            ),
            ("time", f"{self.seconds:.0f} s"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)

    def _local(self) -> str:
        if not self.spliced:
            return "none of them on this machine"
        return (
            f"{len(self.spliced)} of those on this machine spliced in: "
            f"logits change by at most {self.logit_difference:.2g}"
        )

    def __repr__(self) -> str:
        return f"ModelReport({str(self.path)!r})\n{self.summary()}"


def run_on_model(
    name: str,
    out: str | Path = Path("gemmascope_demo.html"),
    *,
    task: str = "ioi",
    n: int = N_PROMPTS,
    progress: bool = True,
) -> ModelReport:
    """Runs find, task, patch, discover, evaluate on a model and writes a page.

    Args:
        name: As for :func:`gemmascope_plugin.load_model`.
        out: The page; an older one is replaced.
        task: Name of a built-in task.
        n: Prompts for patching and for the circuit, and as many held-out ones.
        progress: Show a progress bar.

    Raises:
        PageError: The page cannot be written there; found out before any work is done.
        MissingFileError: The model is nowhere, and may not or could not be downloaded.
        UnknownNameError: There is no such task.
    """
    started = time.monotonic()
    path = prepare(out)
    with Steps(N_STEPS, progress) as step:
        specs = step("find SAEs", specs_of, name)
        model = step("load the model", load_model, name)
        spliced, difference = step("splice SAEs", splice_local, model, specs)
        train = step("build the task", lambda: Task.builtin(task, model, n=n, split="train"))
        held_out = Task.builtin(task, model, n=n, split="held_out")
        positions = step(
            "patch layers and positions", activation_patching, model, train.first(1), "resid_pre"
        )
        heads = step("patch heads", compared, model, train)
        scores = step("discover and evaluate", checked_circuit, model, train, held_out)
        report = ModelReport(
            path=path,
            model=name,
            source=str(getattr(model, "gemmascope_source", name)),
            specs=specs,
            spliced=spliced,
            logit_difference=difference,
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


def splice_local(model: HookedModel, specs: SpecList) -> tuple[tuple[str, ...], float | None]:
    """Splices in SAEs whose files are on this machine, one per hook; the largest change of a logit."""
    chosen = {}
    for spec in specs:
        if spec.kind == "sae" and spec.hook_out not in chosen and _is_local(spec):
            chosen[spec.hook_out] = spec
        if len(chosen) == N_SAES:
            break
    if not chosen:
        return (), None
    saes = [load(spec, offline=True) for spec in chosen.values()]
    prompt = "The quick brown fox jumps over the lazy dog."
    with torch.no_grad():
        bare = model(prompt)
        with splice(model, saes) as run:
            # asking for the reconstructions makes every SAE run; otherwise none would have to
            logits, _ = run.run_with_cache(prompt, names_filter=_is_reconstruction)
    names = tuple(f"{spec.release} {spec.sae_id}" for spec in chosen.values())
    return names, float((logits - bare).abs().max())


def _is_reconstruction(name: str) -> bool:
    return name.endswith("sae_recons")


def _is_local(spec: Any) -> bool:
    try:
        locate(spec, offline=True)
    except MissingFileError:
        return False
    return True


def compared(model: HookedModel, task: Task) -> Comparison:
    """Heads patched exactly and by attribution."""
    exact = activation_patching(model, task, "z")
    estimate = attribution_patching(model, task, "z")
    return Comparison(exact, estimate, exact.spearman(estimate))


def checked_circuit(model: HookedModel, train: Task, held_out: Task) -> Scores:
    """A circuit of heads and MLPs from training prompts, evaluated on held-out ones."""
    nodes = discover(model, train)
    circuit = nodes.top(min(CIRCUIT_SIZE, len(nodes.ranking) // 2))
    n_nodes = len(circuit.ranking)
    sizes = [*(size for size in SIZES if size < n_nodes), n_nodes]
    return evaluate(circuit, model, held_out, sizes=sizes, n_random=N_RANDOM)


# --------------------------------------------------------------------------- the page
def write(report: ModelReport) -> Path:
    """Writes the page."""
    circuit = report.scores.circuit
    key_figures = [
        (f"{report.heads.spearman:.2f}", "rank correlation of attribution with exact patching"),
        (
            f"{report.scores.faithfulness:.2f}",
            f"faithfulness of {circuit.size} of {len(circuit.ranking)} nodes on held-out prompts "
            f"(best random circuit: {max(report.scores.random):.2f})",
        ),
    ]
    sections = [
        saes_section(report),
        positions_section(report.positions, f"The prompt: {report.task.first(1)!r}"),
        heads_section(report.heads.exact, report.heads.estimate, agreement(report.heads)),
        circuit_section(report.scores),
    ]
    footer = [
        ("model", report.model),
        ("weights", report.source),
        ("task", repr(report.task)),
        ("random seed", "0"),
        ("versions", versions()),
    ]
    return write_page(
        report.path,
        f"From SAEs to a checked circuit: {report.model}",
        sections,
        lead=f"The task is {report.task.name}: {_first_prompts(report.task)}.",
        key_figures=key_figures,
        footer=footer,
    )


def _first_prompts(task: Task) -> str:
    """The first clean prompt and its corrupted partner."""
    pair: Sequence[Any] = (task.clean, task.corrupt)
    clean, corrupt = (p if isinstance(p, str) else p[0] for p in pair)
    return f"“{clean} …” against “{corrupt} …”"


def saes_section(report: ModelReport) -> Section:
    """What the catalog has for the model, and what splicing changed."""
    frame = report.specs.to_frame()
    parts: list[Any] = []
    if len(frame):
        columns = ["kind", "site", "width", "provenance"]
        counts: Any = frame.groupby(columns).size()
        parts.append(counts.rename("SAEs").reset_index())
    if report.spliced:
        parts.append(
            f"Spliced in: {', '.join(report.spliced)}. Largest change of a logit, reconstruction "
            f"error kept: {report.logit_difference:.2g}."
        )
    else:
        parts.append(
            "None of their files is on this machine, so none was spliced in: gemmascope download, or "
            "load(spec) with a network, fetches one."
        )
    return Section(
        "SAEs for this model",
        "What the catalog lists for the model, without a network. An SAE that is spliced in with its "
        "reconstruction error kept must not change the model.",
        tuple(parts),
    )
