"""Several dictionaries side by side, and the picture of them."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from gemmascope_plugin.errors import EmptySelectionError, ModelError, UnknownNameError
from gemmascope_plugin.measures import (
    adaptivity,
    compare,
    concept_scores_of,
    cost,
    hierarchy,
    measure,
    plot_comparison,
)
from gemmascope_plugin.splice import HookedSAE
from tests import factories
from tests.factories import unchecked
from tests.splice.test_level_and_encoder import matryoshka
from tests.splice.test_tree_splice import tree
from tests.tiny_models import random_tokens

TOKENS = random_tokens(batch_size=3)


@pytest.fixture(scope="module")
def frame(hooked2) -> pd.DataFrame:
    saes = {
        "residual": factories.residual(hooked2, 1),
        "transcoder": factories.transcoder(hooked2, 1),
        "coarse": HookedSAE(matryoshka(hooked2), level=0),
    }
    return compare(hooked2, saes, TOKENS, n_positions=2)


def test_one_row_per_dictionary_as_measured_alone(hooked2, frame) -> None:
    assert list(frame["name"]) == ["residual", "transcoder", "coarse"]
    alone = measure(hooked2, factories.transcoder(hooked2, 1), TOKENS, n_positions=2).row()
    assert list(frame.columns) == ["name", *alone]
    row = frame.iloc[1].to_dict()
    assert pd.isna(row.pop("level")) and alone.pop("level") is None
    assert {name: row[name] for name in alone} == alone
    assert frame["level"][2] == 0 and frame["d_sae"][2] == 8


EXTRA = ["concept_f1", "splitting", "absorption", "k_spearman"]
TREES = ["coverage", "s_res", "tree_precision", "tree_recall", "tree_f1"]
COSTS = ["n_parameters", "nbytes", "encode_madds", "decode_madds"]
COSTS += ["encode_seconds", "round_trip_seconds"]


def test_what_was_asked_for_is_added_as_measured_alone(hooked2, frame) -> None:
    tokens = random_tokens(batch_size=12)
    concepts = torch.stack([tokens < 200, tokens < 130, tokens % 2 == 0, tokens < 6], -1)
    labels = {"concepts": concepts, "names": ["low", "lower", "even", "rare"]}
    saes = {"residual": factories.residual(hooked2, 1), "tree": tree()}
    options = {"min_tokens": 10, "n_parents": 4}
    table = compare(hooked2, saes, tokens, n_positions=0, cost=True, **labels, **options)
    assert list(table.columns) == [*frame.columns, *EXTRA, *TREES, *COSTS]
    for name, sae in saes.items():
        row = table.set_index("name").loc[name]
        scores = concept_scores_of(hooked2, sae, tokens, *labels.values())
        assert scores["n_tokens"][3] < 10
        scores = scores[:3]
        assert row["concept_f1"] == pytest.approx(scores["f1"].mean())
        assert row["splitting"] == scores["splitting"].mean()
        assert row["absorption"] == pytest.approx(scores["absorption"].mean())
        assert row["k_spearman"] == adaptivity(hooked2, sae, tokens, **labels).k_spearman
        trees = hierarchy(hooked2, sae, tokens, **labels, **options).row()
        assert [row[column] for column in TREES] == pytest.approx(
            [trees[column] for column in TREES], nan_ok=True
        )
        costs = cost(hooked2, sae, tokens, repeats=1).costs()
        assert [row[column] for column in COSTS[:4]] == [costs[column] for column in COSTS[:4]]
    assert table["coverage"][1] == 1 and (table["round_trip_seconds"] > 0).all()
    figure = plot_comparison(table, y="k_spearman")
    assert figure.data[1].y[1] == table["k_spearman"][1]
    for column in (*EXTRA, *TREES, *COSTS):
        plot_comparison(table, y=column)


def test_probes_without_concepts_add_the_forest_alone(hooked2, frame) -> None:
    saes = {"tree": tree()}
    table = compare(hooked2, saes, TOKENS, n_positions=0, n_parents=4, min_tokens=3)
    assert list(table.columns) == [*frame.columns, "coverage", "s_res"]
    assert table["s_res"].notna().all()


def test_each_dictionary_is_a_point_of_fit_against_sparsity(frame) -> None:
    figure = plot_comparison(frame, title="three")
    assert [trace.name for trace in figure.data] == list(frame["name"])
    for i, trace in enumerate(figure.data):
        points = [(x, y) for x, y in zip(trace.x, trace.y, strict=True) if not math.isnan(y)]
        assert points == [(frame["l0"][i], frame["fvu"][i])]
    assert figure.layout.xaxis.title.text.startswith("L0")
    assert "variance" in figure.layout.yaxis.title.text


def test_other_figures_can_be_drawn_and_equal_names_hide_nothing(frame) -> None:
    twice = pd.concat([frame, frame])
    figure = plot_comparison(twice, y="share_of_zero")
    assert len(figure.data) == 6
    assert figure.data[3].name == "3 residual"
    assert figure.data[3].y[3] == frame["share_of_zero"][0]


def test_what_cannot_be_compared_is_an_error(hooked2, frame) -> None:
    with pytest.raises(UnknownNameError, match="No dictionary was given.*Try: compare"):
        compare(hooked2, {}, TOKENS)
    with pytest.raises(UnknownNameError, match="a name for each dictionary, and got a list.*Try"):
        unchecked(compare)(hooked2, [factories.residual(hooked2, 1)], TOKENS)
    with pytest.raises(UnknownNameError, match="Unknown column 'fvv'.*Did you mean 'fvu'"):
        plot_comparison(frame, y="fvv")
    with pytest.raises(
        UnknownNameError, match="no column 's_res'.*There is: fvu, .*Try: compare.*n_parents="
    ):
        plot_comparison(frame, y="s_res")
    with pytest.raises(ModelError, match="There are names and no concepts.*Try: both"):
        unchecked(compare)(hooked2, {"a": factories.residual(hooked2, 1)}, TOKENS, names=["a"])
    with pytest.raises(EmptySelectionError, match="no dictionary to draw"):
        plot_comparison(frame[:0])
