"""Two mechanisms of a real Gemma 3 270M, head by head, and one that it does not have.

* *Induction.* Heads (5,1), (5,2), (11,2) attend to the token after the last occurrence of the current
  one; previous-token heads (2,3) and (4,1) feed their keys. How much of the induction effect do paths
  from these two into these keys remove (noising, direct and total)? Beside it, pairs of other heads.
* *Indirect objects.* L11H3 moves the name; L15H1 and L17H2 write against it: path patching into the
  logits, and where these heads attend from the last token.
* *Two hops.* Landmarks outside the capital: the model's accuracy against the local city.

Cost: about two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import gemmascope_plugin as gs

PREVIOUS = ("L2H3", "L4H1")
INDUCTION = ("L5KV0.k", "L11KV0.k")
OTHERS = (("L2H0", "L4H0"), ("L2H1", "L4H2"), ("L2H2", "L4H3"))
MOVERS = ("L11H3", "L15H1", "L17H2")
Line = tuple[str, str]


def induction(model: Any, task: Any) -> Iterator[Line]:
    """What paths from previous-token heads into the keys of induction heads carry."""
    task = with_other_predecessor(model, task)
    for paths in ("direct", "total"):
        for senders in (PREVIOUS, *OTHERS):
            effects = gs.path_patching(
                model, task, senders, INDUCTION, paths=paths, direction="noising", joint=True
            )
            share = float(effects.values.sum()) / effects.gap
            yield (
                f"{' + '.join(senders)} -> keys of layers 5 and 11, {paths}",
                f"{share:+.1%} of the gap",
            )
    scores = gs.activation_patching(model, task, "z", direction="noising", axes=("layer", "head"))
    for line in scores.top(6).to_dict("records"):
        name = f"L{line['layer']}H{line['head']}"
        yield f"{name} corrupted", f"{line['effect'] / scores.gap:+.1%} of the gap"


def with_other_predecessor(model: Any, task: Any) -> Any:
    """The same prompts, corrupted where the repeated word stood first: what it preceded stays.

    Only heads that tell a token what came before it see the difference at the token to be copied.
    """
    bound = task.bind(model)
    length = int(bound.lengths.min())
    clean = bound.clean[bound.lengths == length][:, :length]
    corrupt = clean.clone()
    for row in range(len(clean)):
        first = int((clean[row, :-1] == clean[row, -1]).nonzero()[0])
        others = clean[(row + 1) % len(clean)]
        corrupt[row, first] = next(word for word in others[1:] if word not in clean[row])
    rows = torch.arange(len(clean))
    places = [int((ids[:-1] == ids[-1]).nonzero()[0]) + 1 for ids in clean]
    answers = clean[rows, places]
    wrong = [
        next(int(w) for w in ids[2:-1] if w != a) for ids, a in zip(clean, answers, strict=True)
    ]
    return gs.Task(
        clean, corrupt, gs.logit_diff(answers, wrong), name="induction, other predecessor"
    )


def indirect_objects(model: Any, task: Any) -> Iterator[Line]:
    """Movers and heads against them: direct paths into the logits, and attention."""
    effects = gs.path_patching(model, task, list(MOVERS), ["logits"], direction="noising")
    for head, value in zip(MOVERS, effects.values.flatten().tolist(), strict=True):
        yield (f"{head} -> logits corrupted", f"{value / effects.gap:+.1%} of the gap")
    yield from attention(model, task)


@torch.no_grad()
def attention(model: Any, task: Any) -> Iterator[Line]:
    """Attention from the last token to both names, mean over prompts."""
    bound = task.bind(model)
    names = [f"blocks.{int(head[1:].split('H')[0])}.attn.hook_pattern" for head in MOVERS]
    _, cache = model.run_with_cache(bound.clean, names_filter=names)
    right, wrong = bound.metric.right.ids[:, :1], bound.metric.wrong.ids[:, :1]
    for head, name in zip(MOVERS, names, strict=True):
        rows = torch.arange(len(bound.clean))
        pattern = cache[name][rows, int(head.split("H")[1]), bound.lengths - 1]
        shares = [float((pattern * (bound.clean == ids)).sum(1).mean()) for ids in (right, wrong)]
        yield (
            f"{head} attends to the answer's name / to the other",
            f"{shares[0]:.2f} / {shares[1]:.2f}",
        )


def two_hops(model: Any, n: int) -> Iterator[Line]:
    """Whether the model names the capital of a landmark's country where another city is nearer."""
    yield ("two hops, landmarks outside the capital", repr(gs.Task.builtin("two_hop", model, n=n)))
