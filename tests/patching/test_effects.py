"""Effects: shares, tables, ranking, figures, from numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.errors import TaskError
from gemmascope_plugin.patching import Effects, FeatureId

META = {
    "component": "z",
    "method": "exact patching",
    "mode": "denoising",
    "metric_clean": 3.0,
    "metric_corrupt": -1.0,
    "exclude": (),
    "tokens": ["a", "b"],
}
GRID = Effects(
    torch.tensor([[1.0, -2.0], [0.5, 0.0]]),
    ("layer", "head"),
    {"layer": (0, 1), "head": (0, 1)},
    META,
)
FEATURES = Effects(
    torch.tensor([0.5, -1.0]),
    ("feature",),
    {"feature": (FeatureId("blocks.0.hook_resid_post", 7), FeatureId("blocks.1.hook_mlp_out", 9))},
    {**META, "component": "feature"},
)


def test_shares_are_fractions_of_the_gap() -> None:
    assert GRID.gap == 4.0
    assert GRID.share.tolist() == [[0.25, -0.5], [0.125, 0.0]]


def test_a_table_has_one_row_per_intervention() -> None:
    frame = GRID.to_frame()
    assert list(frame.columns) == ["layer", "head", "effect", "share"]
    assert frame.iloc[1].tolist() == [0, 1, -2.0, -0.5]


def test_features_are_spelled_out_in_tables() -> None:
    frame = FEATURES.to_frame()
    assert list(frame.columns) == ["site", "feature", "effect", "share"]
    assert frame.iloc[1].tolist() == ["blocks.1.hook_mlp_out", 9, -1.0, -0.25]
    assert str(FEATURES.labels["feature"][0]) == "blocks.0.hook_resid_post/7"


def test_top_ranks_by_size_whatever_the_sign() -> None:
    assert GRID.top(3)["effect"].tolist() == [-2.0, 1.0, 0.5]
    assert len(GRID.top(99)) == 4


def test_two_axes_make_a_heatmap_and_one_makes_bars() -> None:
    (heatmap,), (bars,) = GRID.plot().data, FEATURES.plot().data
    assert heatmap.type == "heatmap"
    assert heatmap.z[0][1] == -2.0
    assert bars.type == "bar"
    assert sorted(bars.x) == [-1.0, 0.5]


def test_columns_of_positions_are_tokens() -> None:
    by_position = Effects(GRID.values, ("layer", "pos"), {"layer": (0, 1), "pos": (0, 1)}, {**META})
    figure = by_position.plot()
    assert "a" in str(figure.data[0].x) + str(figure.layout.xaxis.ticktext)


def test_the_repr_states_the_essentials() -> None:
    assert repr(GRID) == (
        "Effects(z, exact patching, denoising, 2 layer x 2 head, metric clean 3.000, "
        "corrupt -1.000, excluded tokens ())"
    )


def test_labels_must_fit_the_values() -> None:
    with pytest.raises(AssertionError, match="labels for"):
        Effects(torch.zeros(2, 2), ("layer", "head"), {"layer": (0,), "head": (0, 1)}, META)


def test_spearman_by_hand_with_ties() -> None:
    def effects(*values: float) -> Effects:
        labels = {"layer": tuple(range(len(values)))}
        return Effects(torch.tensor(values), ("layer",), labels, {})

    # 1 - 6 * (1 + 1) / (4 * 15)
    assert effects(1, 2, 3, 4).spearman(effects(2, 1, 3, 4)) == pytest.approx(0.8)
    assert effects(1, 1, 2).spearman(effects(0, 0, 5)) == pytest.approx(1.0)
    with pytest.raises(TaskError, match="different interventions.*the same component"):
        effects(1, 2).spearman(effects(1, 2, 3))
