"""The page of effects: what it says of them, that it loads nothing, that no text is HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plotly.offline import get_plotlyjs

from gemmascope_plugin.causes import Effects
from gemmascope_plugin.pages import PageError, effects_html, write_effects
from gemmascope_plugin.pages.effects_page import MAX_BARS, how_to_read, meaning, top_frame
from tests.pages.test_circuit import BAD, Loads

META = {
    "component": "z",
    "task": "ioi",
    "metric": "logit difference",
    "direction": "noising",
    "replacement": "other",
    "method": "exact patching",
    "metric_clean": 3.0,
    "metric_corrupt": -1.0,
    "n_prompts": 4,
    "tokens": ["<bos>", "a", "b"],
    "exclude": (),
    "error": None,
    "options": {"seed": 0},
}
BY_PROMPT = torch.tensor(
    [[[-2.0, -2.0, -1.0, -3.0], [0.5, -0.5, 0.5, -0.5]], [[1.0, 1.0, 1.0, 1.0], [0.0] * 4]]
)


def effects(axes: tuple[str, str] = ("layer", "head"), **meta: Any) -> Effects:
    labels = {axes[0]: (0, 1), axes[1]: (1, 2)}
    return Effects(BY_PROMPT.mean(-1), axes, labels, {**META, **meta}, BY_PROMPT)


def test_the_table_has_standard_errors_where_every_prompt_was_patched() -> None:
    frame = top_frame(effects(), 3)
    assert frame["effect"].tolist() == [-2.0, 1.0, 0.0]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[0, 1], [1, 1], [0, 2]]
    # standard deviations sqrt(2/3), 0 and sqrt(1/3), over the root of 4 prompts
    assert frame["se"].tolist() == pytest.approx([6**-0.5, 0.0, 12**-0.5])
    assert frame["share"].tolist() == [-0.5, 0.25, 0.0]
    # the scatter of an estimate is not its error, and one prompt scatters nowhere
    assert "se" not in top_frame(effects(method="AtP*"), 3)
    of_one_prompt = Effects(
        BY_PROMPT[..., 0], ("layer", "head"), effects().labels, META, BY_PROMPT[..., :1]
    )
    assert "se" not in top_frame(of_one_prompt, 3)


def test_words_of_noising() -> None:
    noising = effects()
    assert how_to_read(noising) == (
        "Each number is the change of the logit difference of the clean run if z of one layer and head, "
        "alone, is replaced by its value in the corrupted run, and all that follows is computed again. "
        "Blue raises the logit difference, red lowers it; clean and corrupted are 4.000 apart."
    )
    # the head without scatter is sure, the one of both signs is not
    assert meaning(noising) == (
        "Most is changed by layer 0, head 1: -2.000 ± 0.408 (standard error), 50% of the way from 3.000 "
        "to -1.000. 2 of 4 effects are more than two standard errors from 0; they need not add up, as "
        "later parts may repeat or make up for what an earlier one does."
    )


def test_words_of_other_effects() -> None:
    denoising = effects(
        direction="denoising", replacement="mean", metric_clean=-1.0, metric_corrupt=3.0
    )
    assert "of the corrupted run if" in how_to_read(denoising)
    assert "replaced by the clean run's mean at its position" in how_to_read(denoising)
    # the way is the other one: from the corrupted to the clean metric
    assert "-2.000 ± 0.408 (standard error), 50% of the way from 3.000 to -1.000" in meaning(
        denoising
    )
    estimate = effects(method="AtP*", magnitudes=True)
    assert how_to_read(estimate).endswith("corrupted run. Sizes only: the sign says nothing.")
    assert "what AtP* gives for the change" in how_to_read(estimate)
    assert meaning(estimate).endswith("exact patching says how large the first ones really are.")
    assert "of the way" not in meaning(estimate)
    direct = effects(direction=None, form="norms frozen", method="direct logit attribution")
    assert how_to_read(direct) == (
        "Each number is by how much one entry raises the logit difference; direct logit attribution."
    )
    # contributions add up, and are not estimates
    assert meaning(direct) == (
        "Most is changed by layer 0, head 1: -2.000 ± 0.408 (standard error). 2 of 4 effects are more "
        "than two standard errors from 0."
    )


def test_the_page_shows_figure_table_and_metadata() -> None:
    page = effects_html(effects(("layer", "pos")), n=3)
    assert "<h1>Effects of z on ioi</h1>" in page
    assert page.count("Plotly.newPlot(") == 1
    assert "<th>token of the first prompt</th>" in page
    assert Loads(page).tags.count("tr") == 1 + 3
    assert "<td>-2.000</td><td>-0.5000</td><td>0.4082</td>" in page
    assert "<dt>first prompt</dt><dd>&lt;bos&gt; a b</dd>" in page
    assert "<dt>exclude</dt><dd>none</dd>" in page
    assert "<dt>options</dt>" not in page and "<dt>error</dt>" not in page


def test_one_axis_and_three_are_bars() -> None:
    of_heads = effects().at(layer=0)
    assert "layer" not in top_frame(of_heads, 2) and '"type":"bar"' in effects_html(of_heads)
    labels = {"layer": (0, 1, 2), "head": (0, 1, 2), "pos": (0, 1, 2)}
    three = Effects(torch.arange(27.0).reshape(3, 3, 3), tuple(labels), labels, META)
    page = effects_html(three)
    assert f"The {MAX_BARS} largest of 27 effects" in page
    assert "layer 2, head 2, pos 2" in page


def test_one_effect() -> None:
    effect = effects().at(layer=0, head=1)
    assert "run if z, alone, is replaced" in how_to_read(effect)
    assert "Most is changed by z: -2.000" in effects_html(effect)


def test_nothing_is_loaded_and_no_text_is_html() -> None:
    bad = effects(**{"task": BAD, "metric": BAD, "tokens": [BAD], BAD: BAD})
    page = effects_html(bad, title=BAD)
    assert page.count(get_plotlyjs()) == 1
    loads, rest = Loads(page), page.replace(get_plotlyjs(), "")
    assert loads.urls == ["data:,"]
    for forbidden in (BAD, "http://", "https://", "@import", "fetch(", "XMLHttpRequest", "url("):
        assert forbidden not in rest, forbidden
    assert "default-src 'none'; script-src 'unsafe-inline'" in page


def test_a_page_is_written(tmp_path: Path) -> None:
    path = write_effects(tmp_path / "new" / "page.html", effects(), n=2)
    assert path.read_text(encoding="utf-8") == effects_html(effects(), n=2)
    path = write_effects(path, effects(), title="Who did it")
    assert "<title>Who did it</title>" in path.read_text(encoding="utf-8")
    with pytest.raises(PageError, match="is a folder"):
        write_effects(tmp_path, effects())
