"""What steering makes of an answer: equal to a loop over its tokens, without and with the push."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, TaskError
from gemmascope_plugin.models import to_tokens
from gemmascope_plugin.splice import Add, splice, steer
from tests import factories
from tests.factories import n_hooks

PROMPT = "w5 w6 w7"
RIGHT, WRONG = [10, 11, 12], [13]
FEATURE, STRENGTH, LAYER = 3, 8.0, 1


@torch.no_grad()
def slow(model: Any, ids: list[int], runner: Any = None) -> float:
    text, total = to_tokens(model, PROMPT), 0.0
    for token in ids:
        logits = (runner or model)(text)[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        text = torch.cat([text, torch.tensor([[token]])], 1)
    return total


@pytest.mark.parametrize("positions", [None, slice(0, -1), slice(-1, None)])
def test_an_answer_of_several_tokens(model: Any, positions: Any) -> None:
    sae, before = factories.residual(model, LAYER), n_hooks(model)
    options: dict[str, Any] = {"max_new_tokens": 2, "positions": positions}
    run = steer(model, sae, FEATURE, STRENGTH, PROMPT, answer=RIGHT, wrong=WRONG, **options)
    assert run.answer is not None and run.answer.answer.split() == ["w10", "w11", "w12"]
    assert run.answer.before == pytest.approx(slow(model, RIGHT) - slow(model, WRONG), abs=1e-4)
    # BOS and three words: positions that count from the end count from that of the prompt
    places = {None: None, (0, -1): slice(0, 3), (-1, None): slice(3, None)}
    edit = Add(
        features=FEATURE,
        amount=STRENGTH,
        positions=places[positions and (positions.start, positions.stop)],
    )
    with splice(model, sae, edits=edit) as spliced:
        expected = slow(model, RIGHT, spliced) - slow(model, WRONG, spliced)
    assert run.answer.after == pytest.approx(expected, abs=1e-4)
    assert run.answer.after != pytest.approx(run.answer.before, abs=1e-3)
    assert n_hooks(model) == before
    assert f"against 'w13' {run.answer.before:+.3f} -> " in repr(run)
    assert "w10 w11 w12" in run._repr_html_()


def test_a_sweep_has_columns_for_it(hooked2: Any) -> None:
    sae = factories.residual(hooked2, LAYER)
    sweep = steer(
        hooked2, sae, FEATURE, [0.0, STRENGTH], PROMPT, max_new_tokens=2, answer="w10 w11"
    )
    frame = sweep.to_frame()
    assert frame["answer_before"].tolist() == pytest.approx([slow(hooked2, [10, 11])] * 2, abs=1e-4)
    assert frame["answer_after"][0] == pytest.approx(frame["answer_before"][0], abs=1e-4)
    plain = steer(hooked2, sae, FEATURE, [0.0, STRENGTH], PROMPT, max_new_tokens=2)
    assert "answer_before" not in plain.to_frame() and plain[0].answer is None


def test_mistakes(hooked2: Any) -> None:
    sae = factories.residual(hooked2, LAYER)
    with pytest.raises(EmptySelectionError, match="wrong='w10' has no answer to be compared with"):
        steer(hooked2, sae, FEATURE, 1.0, PROMPT, wrong="w10")
    with pytest.raises(TaskError, match="'w999' has a part that this tokenizer does not know"):
        steer(hooked2, sae, FEATURE, 1.0, PROMPT, answer="w999")
