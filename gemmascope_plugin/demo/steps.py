"""The steps of the demo, one function each, from dictionaries to steering, and their progress bar.

Each takes the suite's model and dictionaries and returns values that a page or a test can show.
Cost: named in ``bundled_run.py``; the exact sweeps dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int

import gemmascope_plugin.demo.lexicon as lex
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.causes import (
    FeatureId,
    Task,
    activation_patching,
    attribution_patching,
    probability,
)
from gemmascope_plugin.circuits import Scores, discover, evaluate
from gemmascope_plugin.demo.corpus import Label
from gemmascope_plugin.demo.tasks import make_task
from gemmascope_plugin.demo.tiny_suite import TinySuite
from gemmascope_plugin.features import Features
from gemmascope_plugin.loading import load
from gemmascope_plugin.models import to_tokens, token_strings
from gemmascope_plugin.models.protocol import HookedModel
from gemmascope_plugin.models.tokens import token_id
from gemmascope_plugin.pages.effects_page import Comparison
from gemmascope_plugin.pages.walkthrough import Ablation
from gemmascope_plugin.splice import Ablate, Add, Steering, splice, steer
from gemmascope_plugin.splice.edit import Edit
from gemmascope_plugin.types import SAE

TASK = "ioi"
N_TRAIN, N_RANDOM, SEED = 64, 20, 0
N_FEATURE_PROMPTS = 16
"""Prompts on which features are ranked."""
SHORTLIST = 40
"""Features that attribution hands on to exact patching."""
WELL_LABELLED = 0.8
"""Least F1 of the labels that are coloured and ablated."""
N_COLOURED = 8
"""Features that the sentence is coloured by."""

STEERED_LAYER, N_STEERED_WORDS = 2, 2
NUMBER_PROMPT = "today the keys near the cabinet"
STRENGTHS = (4.0, 8.0, 16.0, 32.0)
STEERED = 0.9
"""Steering is strong enough when the wanted word has this probability."""

Dictionaries = dict[SaeSpec, SAE]
"""Loaded dictionaries by their spec."""
Labels = dict[FeatureId, Label]
_BAR = "{desc:<32} |{bar}| {n_fmt}/{total_fmt} {elapsed}"

P = ParamSpec("P")
T = TypeVar("T")


class Steps:
    """A progress bar over ``total`` steps that names the running one."""

    def __init__(self, total: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, disable=not progress, bar_format=_BAR)

    def __call__(self, name: str, run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one step under its name."""
        self._bar.set_description_str(name)
        result = run(*args, **kwargs)
        self._bar.update()
        return result

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


# --------------------------------------------------------------------------- dictionaries
def load_dictionaries(suite: TinySuite) -> Dictionaries:
    """The plain dictionaries of the suite, by their specs."""
    plain = (spec for spec in suite.specs if not (spec.variant or spec.affine))
    return {spec: load(spec) for spec in plain}


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


def splice_difference(model: HookedModel, saes: Dictionaries, task: Task) -> float:
    """Largest change of a logit when all dictionaries are spliced in and the error is kept.

    MLP dictionaries and transcoders write the same tensor, so they take turns.
    """
    tokens = to_tokens(model, task.clean)
    groups = (
        [sae for spec, sae in saes.items() if spec.kind != "transcoder"],
        [sae for spec, sae in saes.items() if spec.kind == "transcoder" or spec.site != "mlp"],
    )
    return max(logit_change(model, group, tokens) for group in groups)


@torch.no_grad()
def logit_change(
    model: HookedModel, saes: Sequence[SAE], prompts: str | Int[torch.Tensor, "prompt pos"]
) -> float:
    """Largest change of a logit when dictionaries are spliced in and the error is kept."""
    bare = model(prompts)
    with splice(model, saes) as spliced:
        # Asking for the reconstructions makes every dictionary run; otherwise none would have to.
        logits, _ = spliced.run_with_cache(prompts, names_filter=_is_reconstruction)
    return float((logits - bare).abs().max())


def _is_reconstruction(name: str) -> bool:
    return name.endswith("sae_recons")


# --------------------------------------------------------------------------- features
def sentence(task: Task) -> str:
    """The first prompt with its answer."""
    return " ".join(_pair(task, 0))


def _pair(task: Task, i: int) -> tuple[str, str]:
    """One prompt and its answer."""
    return str(task.clean[i]), str(task.metric.answer[i])


def grammatical(features: Features, labels: Labels) -> list[FeatureId]:
    """Features that are active on the text and surely stand for a concept of the grammar.

    Features of single words (``word=to``) are left out: they only repeat the text.
    """
    return [
        feature
        for feature, label in labels.items()
        if label.f1 >= WELL_LABELLED
        and not label.concept.startswith("word=")
        and features.acts[feature.site][:, feature.feature].any()
    ]


def choose(features: Features, labels: Labels, always: FeatureId) -> tuple[FeatureId, ...]:
    """The best feature of each concept on the text, in the order of the text; ``always`` is one."""
    best = {labels[always].concept: always}
    for feature in sorted(grammatical(features, labels), key=lambda f: -labels[f].f1):
        best.setdefault(labels[feature].concept, feature)
    peak = {f: int(features.acts[f.site][:, f.feature].argmax()) for f in best.values()}
    return tuple(sorted(list(best.values())[:N_COLOURED], key=lambda f: peak[f]))


def rank_features(model: HookedModel, task: Task, saes: list[SAE]) -> Comparison:
    """Exact effects of the features that attribution puts first.

    Each gets its corrupted activation in the clean run, so a feature that the answer needs has a
    negative effect.
    """
    guess = attribution_patching(model, task, "feature", direction="noising", saes=saes)
    first = guess.values.abs().argsort(descending=True)[:SHORTLIST].tolist()
    features = [guess.labels["feature"][i] for i in first]
    exact = activation_patching(
        model, task, "feature", direction="noising", saes=saes, features=features
    )
    estimate = guess.at(feature=features)
    return Comparison(exact, estimate, exact.spearman(estimate))


def ablate_best(
    model: HookedModel, saes: Dictionaries, task: Task, features: Features, labels: Labels
) -> Ablation:
    """Ablates every grammatical feature of the text alone; the answer needs one of them most."""
    at = {spec.hook_out: sae for spec, sae in saes.items()}
    few, tried = task.first(N_FEATURE_PROMPTS), {}
    for feature in grammatical(features, labels):
        edit = Ablate(features=feature.feature)
        tried[feature] = float(answer_probabilities(model, at[feature.site], few, edit).mean())
    best = min(tried, key=lambda feature: tried[feature])
    sae, edit = at[best.site], Ablate(features=best.feature)
    before = answer_probabilities(model, sae, task)
    after = answer_probabilities(model, sae, task, edit)
    worst = int((before - after).argmax())
    prompt, answer = _pair(task, worst)
    normal, edited = next_word(model, sae, prompt), next_word(model, sae, prompt, edit)
    words = top_words(model, normal, edited)
    means = float(before.mean()), float(after.mean())
    return Ablation(best, *means, len(task), len(tried), prompt, answer, words)


@torch.no_grad()
def answer_probabilities(
    model: HookedModel, sae: SAE, task: Task, *edits: Edit
) -> Float[torch.Tensor, " prompt"]:
    """Probability of the right answer of every prompt."""
    bound = replace(task, metric=probability(task.metric.answer)).bind(model)
    with splice(model, sae, edits=edits) as spliced:
        return bound.metric(spliced(bound.clean))


@torch.no_grad()
def next_word(
    model: HookedModel, sae: SAE, prompt: str, *edits: Edit
) -> Float[torch.Tensor, " d_vocab"]:
    """Probability of every word as the next one."""
    with splice(model, sae, edits=edits) as spliced:
        return spliced(prompt)[0, -1].softmax(-1)


def top_words(
    model: HookedModel,
    before: Float[torch.Tensor, " d_vocab"],
    after: Float[torch.Tensor, " d_vocab"],
    n: int = 4,
) -> Any:
    """The words that are most probable in either case."""
    import pandas as pd

    best = torch.maximum(before, after).topk(n).indices
    words = token_strings(model, best)
    columns = {"before": before[best], "after": after[best]}
    return pd.DataFrame(
        {"word": words, **{k: [round(p, 4) for p in v.tolist()] for k, v in columns.items()}}
    )


def steer_both(model: HookedModel, suite: TinySuite, task: Task) -> tuple[Steering, ...]:
    """Another receiver in the first prompt of the task, and another number of a verb."""
    sae = suite.load("res", STEERED_LAYER)
    prompt, _ = _pair(task, 0)
    names = {f"word={name}": name for name in lex.NAMES if name not in prompt.split()}
    labels = suite.labels_of(sae)
    return (
        steer_towards(model, sae, labels, prompt, names),
        steer_towards(model, sae, labels, NUMBER_PROMPT, {"next_is_singular_verb": "is"}),
    )


def steer_towards(
    model: HookedModel, sae: SAE, labels: dict[int, Label], prompt: str, wanted: dict[str, str]
) -> Steering:
    """Steers with the feature that makes its word the next one with the least strength.

    ``wanted`` has the concepts that may be pushed, and the word that each should bring about.
    """
    options = [(i, wanted[x.concept]) for i, x in labels.items() if x.concept in wanted]
    assert options, f"no feature is labelled {' or '.join(wanted)}"
    strong = (s for s in STRENGTHS if _best_option(model, sae, prompt, options, s)[0] >= STEERED)
    strength = next(strong, STRENGTHS[-1])
    _, feature = _best_option(model, sae, prompt, options, strength)
    return steer(model, sae, feature, strength, prompt, max_new_tokens=N_STEERED_WORDS)


def _best_option(
    model: HookedModel, sae: SAE, prompt: str, options: list[tuple[int, str]], strength: float
) -> tuple[float, int]:
    """Highest probability of a wanted word, and the feature that gives it."""
    edits = [(Add(features=i, amount=strength), token_id(model, word)) for i, word in options]
    reached = [float(next_word(model, sae, prompt, edit)[word]) for edit, word in edits]
    return max(zip(reached, (i for i, _ in options), strict=True))


# --------------------------------------------------------------------------- causes
def compare(model: HookedModel, task: Task, component: str) -> Comparison:
    """Exact patching and its first-order estimate."""
    exact = activation_patching(model, task, component)
    estimate = attribution_patching(model, task, component)
    return Comparison(exact, estimate, exact.spearman(estimate))


def find_circuit(model: HookedModel, held_out: Task) -> Scores:
    """A circuit of heads and MLPs from training prompts, evaluated on held-out ones."""
    circuit = discover(model, make_task(TASK, split="train", n=N_TRAIN, seed=SEED))
    sizes = range(0, len(circuit.ranking) + 1, 2)
    return evaluate(model, circuit, held_out, sizes=sizes, n_random=N_RANDOM, seed=SEED)
