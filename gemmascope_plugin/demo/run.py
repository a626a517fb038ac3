"""The whole main job on the bundled suite, on the indirect-object task, as one report and one page.

1. Find and load the dictionaries; splice all of them in and compare the logits with the bare model's.
2. Analyze a sentence; rank the features of its prompt; ablate the best labelled one.
3. Patch the residual stream by layer and position, and every head, exactly and by attribution.
4. Discover a circuit of heads and MLPs on training prompts; evaluate it on held-out ones.
5. Rank features on the task; steer with the feature that carries a fact.

Cost: about 15 seconds on two cores, most of it exact patching.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

import gemmascope_plugin.demo.lexicon as lex
from gemmascope_plugin.attribution import attribution_patching
from gemmascope_plugin.circuits import Scores, discover, evaluate
from gemmascope_plugin.demo.labels import Label
from gemmascope_plugin.demo.suite import TinySuite, tiny
from gemmascope_plugin.demo.tasks import make_task
from gemmascope_plugin.features import Features, analyze
from gemmascope_plugin.loading import load
from gemmascope_plugin.models import to_tokens
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import word_id
from gemmascope_plugin.pages import prepare
from gemmascope_plugin.pages.walkthrough import (
    Ablation,
    Comparison,
    Walkthrough,
    write_walkthrough,
)
from gemmascope_plugin.patching import FeatureId, Task, activation_patching
from gemmascope_plugin.splice import Ablate, Add, splice, steer
from gemmascope_plugin.splice.edits import Edit
from gemmascope_plugin.splice.steering import Steering

TASK = "ioi"
N_TRAIN, N_FEATURE_PROMPTS, N_RANDOM, SEED = 64, 16, 20, 0
SHORTLIST = 40
"""Features that attribution hands on to exact patching."""
N_COLOURED = 8
"""Features that the sentence is coloured by."""

STEERED_CITY = "dallas"
STEERING_PROMPT = f"the capital of the state containing {STEERED_CITY} is"
STRENGTHS = (4.0, 8.0, 16.0, 32.0)
STEERED = 0.9
"""Steering is strong enough when the wanted word has this probability."""

Labels = dict[FeatureId, Label]
P = ParamSpec("P")
T = TypeVar("T")


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
            ("dictionaries", f"{len(specs)} of gemma-2-tiny ({', '.join(dict.fromkeys(specs['site']))})"),
            ("splice, error kept", f"logits change by at most {walk.logit_difference:.1e}"),
            (
                f"ablate {walk.describe(edit.feature)}",
                f"p({edit.answer}) {edit.before:.3f} -> {edit.after:.3f}",
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
            (
                f"steer {walk.describe(FeatureId(walk.steering.site, walk.steering.feature))}",
                f"{walk.steering.before} -> {walk.steering.after}",
            ),
            ("time", f"{self.seconds:.0f} s"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)

    def __repr__(self) -> str:
        return f"DemoReport({str(self.path)!r})\n{self.summary()}"


def run_demo(out: str | Path = Path("gemmascope_demo.html"), *, progress: bool = True) -> DemoReport:
    """Runs the whole path on the bundled suite and writes its page; needs no network.

    Args:
        out: The page; an older one is replaced.
        progress: Show a progress bar.

    Raises:
        PageError: The page cannot be written there; found out before any work is done.
        MissingFileError: The package was installed without its data.
    """
    started = time.monotonic()
    path = prepare(out)
    suite = tiny()
    with _Steps(9, progress) as step:
        model = step("load the model", lambda: suite.model)
        saes = step("find and load dictionaries", load_dictionaries, suite)
        walk = walk_through(suite, model, saes, step)
        step("write the page", write, path, walk)
    return DemoReport(path, walk, time.monotonic() - started)


def walk_through(suite: TinySuite, model: HookedModel, saes: Dictionaries, step: Step) -> Walkthrough:
    """All results, one step after the other."""
    task = suite.tasks[TASK]
    residual = [sae for spec, sae in saes.items() if spec.site == "res"]
    labels = residual_labels(suite, saes)
    everything = list(saes.values())
    difference = step("splice", splice_difference, model, everything, task)
    features = step("analyze a sentence", analyze, model, residual, sentence(task))
    ablation = step("ablate a feature", ablate_best, model, residual, task, labels)
    positions = step("patch layers and positions", compare, model, task, "resid_pre")
    heads = step("patch heads", compare, model, task, "z")
    scores = step("discover and evaluate a circuit", find_circuit, model, task)
    few = task.first(N_FEATURE_PROMPTS)
    ranked = step("rank features", rank_features, model, few, residual)
    steering = step("steer", steer_fact, model, suite, saes)
    chosen = choose(features, labels)
    return Walkthrough(
        dictionaries=dictionary_frame(suite, saes),
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


# --------------------------------------------------------------------------- dictionaries
def load_dictionaries(suite: TinySuite) -> Dictionaries:
    """Every dictionary of the suite, by its spec."""
    return {spec: load(spec) for spec in suite.specs}


def residual_labels(suite: TinySuite, saes: Dictionaries) -> Labels:
    """What the features of the residual dictionaries stand for."""
    return {
        FeatureId(spec.hook_out, i): label
        for spec in saes
        if spec.site == "res"
        for i, label in suite.labels_of(spec).items()
    }


def dictionary_frame(suite: TinySuite, saes: Dictionaries) -> Any:
    """One row per dictionary, with what was measured when it was trained."""
    import pandas as pd

    measured = suite.metrics["dictionaries"]["scores"]
    rows = []
    for spec in saes:
        scores = measured[f"{spec.release}/{spec.sae_id}"]
        rows.append(
            {
                "site": "transcoder" if spec.kind == "transcoder" else spec.site,
                "layer": spec.layer,
                "features": spec.d_sae,
                "L0": f"{scores['l0']:.1f}",
                "FVU": f"{scores['fvu']:.3f}",
                "labelled": len(suite.labels_of(spec)),
                "release": spec.release,
                "id": spec.sae_id,
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def splice_difference(model: HookedModel, saes: list[Any], task: Task) -> float:
    """Largest change of a logit when all dictionaries are spliced in and the error is kept."""
    tokens = to_tokens(model, task.clean)
    bare = model(tokens)
    with splice(model, saes) as spliced:
        # Asking for the reconstructions makes every dictionary run; otherwise none would have to.
        logits, _ = spliced.run_with_cache(tokens, names_filter=lambda n: n.endswith("sae_recons"))
    return float((logits - bare).abs().max())


# --------------------------------------------------------------------------- features
def sentence(task: Task) -> str:
    """The first prompt with its answer."""
    return f"{task.clean[0]} {task.metric.answer[0]}"


def choose(features: Features, labels: Labels) -> tuple[FeatureId, ...]:
    """The best feature of each grammatical concept on the text, in the order of the text.

    Features of single words (``word=to``) are left out: they only repeat the text.
    """
    best: dict[str, tuple[float, int, FeatureId]] = {}
    for feature, label in labels.items():
        active = features.acts[feature.site][:, feature.feature].nonzero().flatten().tolist()
        if active and not label.concept.startswith("word="):
            best[label.concept] = max(
                best.get(label.concept, (0.0, 0, feature)), (label.f1, -active[0], feature)
            )
    strongest = sorted(best.values(), reverse=True)[:N_COLOURED]
    return tuple(feature for _, _, feature in sorted(strongest, key=lambda row: -row[1]))


def rank_features(model: HookedModel, task: Task, saes: list[Any]) -> Comparison:
    """Exact effects of the features that attribution puts first.

    Each gets its corrupted activation in the clean run, so a feature that the answer needs has a
    negative effect.
    """
    guess = attribution_patching(model, task, "feature", mode="noising", saes=saes)
    first = guess.values.abs().argsort(descending=True)[:SHORTLIST].tolist()
    features = [guess.labels["feature"][i] for i in first]
    exact = activation_patching(
        model, task, "feature", mode="noising", saes=saes, features=features
    )
    estimate = replace(guess, values=guess.values[first], labels={"feature": tuple(features)})
    return Comparison(exact, estimate, spearman(exact.values, estimate.values))


def ablate_best(model: HookedModel, saes: list[Any], task: Task, labels: Labels) -> Ablation:
    """Sets the labelled feature that the first prompt needs most to zero and reads the answer."""
    prompt, answer = task.clean[0], task.metric.answer[0]
    ranked = rank_features(model, task.first(1), saes).exact
    order = ranked.values.argsort().tolist()
    features = [ranked.labels["feature"][i] for i in order]
    best = next((f for f in features if f in labels), features[0])
    edit = Ablate(features=best.feature, sae=best.site)
    before = answer_probability(model, saes, prompt, answer)
    after = answer_probability(model, saes, prompt, answer, edit)
    return Ablation(prompt, answer, best, before, after)


@torch.no_grad()
def answer_probability(
    model: HookedModel, saes: list[Any], prompt: str, answer: str, *edits: Edit
) -> float:
    """Probability of a word as the next one."""
    with splice(model, saes, edits=edits) as spliced:
        logits = spliced(prompt)[0, -1]
    return float(logits.softmax(-1)[word_id(model, answer)])


def steer_fact(model: HookedModel, suite: TinySuite, saes: Dictionaries) -> Steering:
    """Steers the two-hop fact towards another state with the feature that does it with least force.

    A city makes the model think of its state (features ``in_texas``); adding the feature of another
    state should make it answer with that state's capital.
    """
    capitals = {
        f"in_{s.name}": s.facts["capital"] for s in lex.STATES if STEERED_CITY not in s.cities
    }
    options = [
        (spec, feature, capitals[label.concept])
        for spec in saes
        if spec.site == "res"
        for feature, label in suite.labels_of(spec).items()
        if label.concept in capitals
    ]
    best = max(
        ((spec, feature, strength, word) for strength in STRENGTHS for spec, feature, word in options),
        key=lambda o: _steered(model, saes[o[0]], *o[1:]),
    )
    spec, feature, strength, _ = best
    return steer(model, saes[spec], feature, strength, STEERING_PROMPT, max_new_tokens=2)
