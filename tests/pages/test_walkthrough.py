"""Sections made of results: what they show, and that no text of a model reaches the page raw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gemmascope_plugin.figures as figures
from gemmascope_plugin.causes import Effects, FeatureId
from gemmascope_plugin.circuits import Scores, top_n
from gemmascope_plugin.demo.corpus import Label
from gemmascope_plugin.features import Features
from gemmascope_plugin.features.analyze import SiteFit
from gemmascope_plugin.graphs import Graph
from gemmascope_plugin.graphs.node import Node
from gemmascope_plugin.pages import (
    circuit_section,
    feature_frame,
    features_section,
    heads_section,
    positions_section,
    site_name,
    steering_html,
    write_page,
)
from gemmascope_plugin.splice import Steering
from gemmascope_plugin.splice.sampling import Sampling
from gemmascope_plugin.splice.steering_report import NextTokens

BAD = "<script>alert(1)</script>"
SITE = "blocks.2.hook_resid_post"


@pytest.fixture
def features() -> Features:
    acts = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
    tokens = ("<bos>", BAD, "mary")
    return Features(tokens, {SITE: acts}, {SITE: SiteFit(1.5, 0.9)}, ("bos",), 5)


def effects(axes: dict[str, int], method: str) -> Effects:
    """Effects that count upwards, with hostile tokens."""
    labels = {name: tuple(range(size)) for name, size in axes.items()}
    shape = tuple(axes.values())
    values = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    meta = {
        "metric": "LogitDiff",
        "metric_clean": 2.0,
        "metric_corrupt": -2.0,
        "n_prompts": 8,
        "tokens": [BAD, "mary", "to"],
        "method": method,
    }
    return Effects(values, tuple(axes), labels, meta)


def hostile_steering() -> Steering:
    value = torch.tensor([1.0])
    yes = torch.tensor([True])
    return Steering(
        prompt=BAD,
        before=BAD,
        after=BAD,
        feature=1,
        strength=2.0,
        method="add",
        site=SITE,
        exclude=("bos",),
        sampling=Sampling(),
        tokens=(BAD,),
        ids_before=(),
        ids_after=(),
        is_kept=yes,
        steered=yes,
        next_tokens=NextTokens(value, (BAD,), value, value, (BAD,), value),
        relative_push=1.0,
    )


def scores(n: int = 4) -> Scores:
    ranking = tuple(Node.head(0, head) for head in range(n))
    metadata = {"task": BAD, "metric": "LogitDiff"}
    circuit = top_n(Graph.of_nodes(ranking, [4.0, -3.0, 2.0, 1.0], metadata), 2)
    return Scores(
        circuit,
        0.9,
        (0, 2, 4),
        (0.0, 0.9, 1.0),
        ((0.0,), (0.3,), (1.0,)),
        3.0,
        -3.0,
        metadata={"n_prompts": 8},
    )


@pytest.mark.parametrize(
    ("site", "name"),
    [
        (SITE, "res 2"),
        ("blocks.11.attn.hook_z", "att 11"),
        ("blocks.0.hook_mlp_out", "mlp 0"),
        ("hook_embed", "hook_embed"),
    ],
)
def test_site_names(site: str, name: str) -> None:
    assert site_name(site) == name


def test_feature_frame_says_what_is_unlabelled() -> None:
    labels = {FeatureId(SITE, 1): Label("giver", 0.987, 0.5, 0.66)}
    rows = [(FeatureId(SITE, 1), {"x": 1}), (FeatureId(SITE, 2), {"x": 2})]
    frame = feature_frame(rows, labels)
    assert frame.values.tolist() == [
        ["res 2 / 1", "giver", "0.99", "0.50", 1],
        ["res 2 / 2", "none", "", "", 2],
    ]


def test_features_section_colours_the_chosen(features: Features) -> None:
    labels = {FeatureId(SITE, 1): Label("name", 0.9, 0.8, 0.85)}
    section = features_section(features, [FeatureId(SITE, 1)], labels, n=2)
    rows, fit, _, table = section.parts
    assert "name  (res 2 / 1)" in rows
    assert 'class="words"' in rows  # tokens without blanks are set apart
    assert (
        fit == "Fit on this sentence. res 2: L0 1.5, variance explained 0.90. Excluded tokens: bos."
    )
    assert table["feature"].tolist() == ["res 2 / 1", "res 2 / 0"]
    assert table["token"].tolist() == ["mary", BAD]


def test_heatmaps_of_heads_share_their_colours() -> None:
    exact, estimate = effects({"layer": 2, "head": 2}, "a"), effects({"layer": 2, "head": 3}, "b")
    (panels, note) = heads_section(exact, estimate, "agrees").parts
    limits = [figure.data[0].zmax for figure in panels.parts]
    assert limits == [1.25, 1.25]
    assert note == "agrees"


def test_circuit_section_lists_the_kept_nodes() -> None:
    text, _, table = circuit_section(scores()).parts
    assert "The best 2 of 4 nodes: faithfulness 0.900; one random circuit of that size" in text
    assert "L0H1" in table and "L0H2" not in table
    assert "… and 2 more rows" in table


def test_no_text_of_a_model_is_html(tmp_path: Path, features: Features) -> None:
    label = Label(BAD, 0.9, 0.8, 0.85)
    steering = hostile_steering()
    sections = [
        features_section(features, [FeatureId(SITE, 1)], {FeatureId(SITE, 1): label}),
        positions_section(effects({"layer": 2, "pos": 3}, BAD), BAD),
        heads_section(
            effects({"layer": 2, "head": 2}, BAD), effects({"layer": 2, "head": 2}, BAD), BAD
        ),
        circuit_section(scores()),
    ]
    sections[0] = type(sections[0])(BAD, BAD, (*sections[0].parts, steering_html(steering)))
    html = write_page(tmp_path / "page.html", BAD, sections).read_text(encoding="utf-8")
    assert "<script>alert" not in html + steering._repr_html_()
    assert html.count("Plotly.newPlot(") >= 5
    assert figures.PAGE_CSS.strip().splitlines()[0] in html
