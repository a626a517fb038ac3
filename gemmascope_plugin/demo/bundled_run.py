"""The whole main job on the bundled suite, on the indirect-object task, as one report and one page.

1. Find and load the dictionaries; splice all of them in and compare the logits with the bare model's.
2. Analyze a sentence; ablate its labelled features one by one.
3. Patch the residual stream by layer and position, and every head, exactly and by attribution.
4. Discover a circuit of heads and MLPs on training prompts; evaluate it on held-out ones.
5. Rank features on the task; steer with a name's feature and with a number's.

Cost: about 15 seconds on one core, half of it for random circuits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import gemmascope_plugin.demo.steps as steps
from gemmascope_plugin.demo.model_page import aligned, versions
from gemmascope_plugin.demo.steps import Steps
from gemmascope_plugin.demo.tiny_suite import TinySuite, tiny
from gemmascope_plugin.features import analyze
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.pages import prepare
from gemmascope_plugin.pages.walkthrough import Walkthrough, write_walkthrough

N_STEPS = 11


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured, and where its page is."""

    path: Path
    walk: Walkthrough
    seconds: float

    def summary(self) -> str:
        """The main figures, one per line."""
        walk, circuit, edit = self.walk, self.walk.scores.circuit, self.walk.ablation
        specs = walk.dictionaries
        rows = [
            (
                "dictionaries",
                f"{len(specs)} of gemma-2-tiny ({', '.join(dict.fromkeys(specs['site']))})",
            ),
            ("splice, error kept", f"logits change by at most {walk.logit_difference:.2g}"),
            (
                f"ablate {walk.describe(edit.feature)}",
                f"probability of the answer {edit.before:.3f} -> {edit.after:.3f}",
            ),
            (
                "attribution vs exact",
                f"Spearman {walk.positions.spearman:.3f} (layer x position), "
                f"{walk.heads.spearman:.3f} (heads)",
            ),
            (
                f"circuit, {circuit.size} of {len(circuit.ranking)} nodes",
                f"faithfulness {walk.faithfulness:.3f} held out, "
                f"best of {len(walk.scores.random)} random {walk.best_random:.3f}",
            ),
            *(
                (f"steer {walk.steered(each)}", f"{each.before.strip()} -> {each.after.strip()}")
                for each in walk.steering
            ),
            ("time", f"{self.seconds:.0f} s"),
        ]
        return aligned(rows)

    def __repr__(self) -> str:
        return f"DemoReport({str(self.path)!r})\n{self.summary()}"


def run_demo(
    out: str | Path = Path("gemmascope_demo.html"), *, progress: bool = True
) -> DemoReport:
    """Runs the whole path on the bundled suite and writes its page; needs no network.

    That the page cannot be written there is found out before any work is done.
    """
    started = time.monotonic()
    path = prepare(out)
    suite = tiny()
    with _one_thread(), Steps(N_STEPS, progress) as step:
        model = step("load the model", lambda: suite.model)
        saes = step("find and load dictionaries", steps.load_dictionaries, suite)
        walk = walk_through(suite, model, saes, step)
        step("write the page", write, path, walk)
    return DemoReport(path, walk, time.monotonic() - started)


def walk_through(
    suite: TinySuite, model: HookedModel, saes: steps.Dictionaries, step: Steps
) -> Walkthrough:
    """All results, one step after the other."""
    task = suite.tasks[steps.TASK]
    residual = [sae for spec, sae in saes.items() if spec.site == "res"]
    labels = steps.residual_labels(suite, saes)
    difference = step("splice", steps.splice_difference, model, saes, task)
    features = step("analyze a sentence", analyze, model, residual, steps.sentence(task))
    ablation = step("ablate features", steps.ablate_best, model, saes, task, features, labels)
    positions = step("patch layers and positions", steps.compare, model, task, "resid_pre")
    heads = step("patch heads", steps.compare, model, task, "z")
    scores = step("discover and evaluate a circuit", steps.find_circuit, model, task)
    few = task.first(steps.N_FEATURE_PROMPTS)
    ranked = step("rank features", steps.rank_features, model, few, residual)
    steering = step("steer", steps.steer_both, model, suite, task)
    chosen = steps.choose(features, labels, ablation.feature)
    return Walkthrough(
        dictionaries=steps.dictionary_frame(suite, saes),
        logit_difference=difference,
        features=features,
        chosen=chosen,
        labels=labels,
        ablation=ablation,
        positions=positions,
        heads=heads,
        scores=scores,
        ranked=ranked,
        steering=steering,
    )


# --------------------------------------------------------------------------- page and progress
def write(path: Path, walk: Walkthrough) -> None:
    """Writes the page."""
    n_prompts = walk.positions.exact.metadata["n_prompts"]
    footer = [
        ("model", "gemma-2-tiny, bundled, float32 on the CPU"),
        (
            "task",
            f"{steps.TASK}, {n_prompts} held-out prompts, circuit from {steps.N_TRAIN} training prompts",
        ),
        ("random seed", str(steps.SEED)),
        ("excluded tokens", ", ".join(map(str, walk.features.exclude))),
        ("versions", versions()),
        (
            "caveat",
            "A small model, trained on a grammar whose concepts are known. Its features and circuits "
            "are real, but what holds here need not hold on a Gemma of billions of parameters.",
        ),
    ]
    lead = (
        "From a catalog of dictionaries to a verified circuit, on the indirect-object task: who gets "
        "the gift in “when A and B went to the store, B gave a ring to …”?"
    )
    write_walkthrough(path, "First light on gemma-2-tiny", walk, lead=lead, footer=footer)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: tensors this small gain nothing from more.

    On a busy machine threads that wait for each other make the demo ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
