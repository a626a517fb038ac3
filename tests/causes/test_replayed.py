"""Parts of a task: which prompts run together, from where, and what they leave out."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes import Task, activation_patching, kl_divergence, logit_diff
from gemmascope_plugin.causes.metrics import probability
from gemmascope_plugin.causes.replayed import replayed, together
from gemmascope_plugin.models.arithmetic import Arithmetic
from tests.tiny_models import PAD_ID, random_tokens

LENGTHS, STARTS = [18, 18, 9, 14], [11, 11, 4, 11]
CLEAN = random_tokens(batch_size=4, length=18, seed=5)
for _row, _length in enumerate(LENGTHS):
    CLEAN[_row, _length:] = PAD_ID
CORRUPT = CLEAN.clone()
for _row, _start in enumerate(STARTS):
    CORRUPT[_row, _start] = (CLEAN[_row, _start] + 3) % 200 + 4
MASK = CLEAN != PAD_ID
METRICS = {
    "logits of two words": logit_diff([10, 20, 30, 40], [11, 21, 31, 41]),
    "all logits": probability([10, 20, 30, 40]),
    "the clean run": kl_divergence(),
}


def task(metric: str) -> Task:
    return Task(CLEAN, CORRUPT, METRICS[metric], mask=MASK)


def test_prompts_of_one_shape_run_together() -> None:
    assert together([10, 14, 10, 14], [15, 19, 15, 19], 9) == [[0, 1, 2, 3]]  # so few: as cheap
    assert together([10, 60] * 20, [15, 65] * 20, 99) == [
        list(range(0, 40, 2)),
        list(range(1, 40, 2)),
    ]
    assert together([3] * 5, [8] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_each_part_starts_where_its_prompts_differ(model) -> None:
    bound = task("logits of two words").bind(model)
    names = ["blocks.1.hook_resid_pre"]
    with torch.no_grad():
        whole = [model.run_with_cache(x, names_filter=names)[1][names[0]] for x in (CLEAN, CORRUPT)]
    seen = []
    for part in replayed(
        model, bound, CLEAN, CORRUPT, rows=2, base_points=names, other_points=names
    ):
        index, width = part.index, part.bound.clean.shape[1]
        seen += index.tolist()
        assert part.start == min(STARTS[i] for i in index)
        for acts, expected in zip((part.base_acts, part.other_acts), whole, strict=True):
            inside = MASK[index, :width]
            difference = acts[names[0]] - expected[index, :width]
            assert float(difference[inside].abs().max()) < 1e-5
    assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [3, 512])
def test_effects_are_those_of_whole_passes(model, metric: str, rows: int, monkeypatch) -> None:
    late = activation_patching(model, task(metric), "z", direction="noising", max_rows=rows)
    by_pos = activation_patching(
        model, task(metric), "resid_post", direction="noising", max_rows=rows
    )
    pattern = activation_patching(
        model, task(metric), "pattern", direction="noising", max_rows=rows
    )
    monkeypatch.setattr(Arithmetic, "of", lambda *args: None)
    for effects, component in ((late, "z"), (by_pos, "resid_post"), (pattern, "pattern")):
        whole = activation_patching(model, task(metric), component, direction="noising")
        assert whole.values_by_prompt is not None and effects.values_by_prompt is not None
        assert torch.allclose(effects.values_by_prompt, whole.values_by_prompt, atol=1e-5)


def test_what_does_not_change_has_no_effect_at_all(model) -> None:
    effects = activation_patching(model, task("all logits"), "resid_post", direction="noising")
    assert effects.values_by_prompt is not None
    for row, start in enumerate(STARTS):
        assert not effects.values_by_prompt[:, :start, row].any()
        assert not effects.values_by_prompt[:, LENGTHS[row] :, row].any()
