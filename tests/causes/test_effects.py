"""Effects: shares, tables, ranking, figures, from numbers made by hand."""

from __future__ import annotations

import json

import pytest
import torch

from gemmascope_plugin.causes import Effects, FeatureId
from gemmascope_plugin.errors import BadFileError, GemmaScopeError, TaskError, UnknownNameError
from gemmascope_plugin.graphs.edge_map import EdgeMap
from gemmascope_plugin.graphs.node import Node

META = {
    "component": "z",
    "method": "exact patching",
    "direction": "denoising",
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
        "corrupt -1.000, excluded tokens none)"
    )


EACH = torch.tensor([[[1.0, 1.0, 1.0], [-3.0, -1.0, -2.0]], [[0.0, 0.5, 1.0], [1.0, -1.0, 0.0]]])
BY_PROMPT = Effects(EACH.mean(-1), GRID.axes, GRID.labels, META, EACH)


def test_one_coordinate_drops_an_axis_and_several_keep_it() -> None:
    row = BY_PROMPT.at(layer=1)
    assert row.axes == ("head",)
    assert row.values.tolist() == [0.5, 0.0]
    assert torch.equal(row.values_by_prompt, EACH[1])
    assert row.metadata["at"] == {"layer": 1}
    column = BY_PROMPT.at(layer=[1, 0], head=1)
    assert column.labels == {"layer": (1, 0)}
    assert column.values.tolist() == [0.0, -2.0]
    cell = FEATURES.at(feature=FEATURES.labels["feature"][1])
    assert (cell.axes, float(cell.values)) == ((), -1.0)
    assert GRID.at(head=1).values_by_prompt is None


def test_what_is_not_among_the_effects_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="no layer 2 among.*0, 1"):
        GRID.at(layer=2)
    with pytest.raises(UnknownNameError, match="Unknown axis 'heads'.*Did you mean 'head'"):
        GRID.at(heads=0)
    with pytest.raises(UnknownNameError, match=r"no head \[3\]|no head 3"):
        GRID.at(head=[0, 3])


def test_tables_say_how_sure_they_are() -> None:
    frame = BY_PROMPT.to_frame(significance=True)
    assert list(frame.columns) == ["layer", "head", "effect", "share", "se", "low", "high"]
    lower, upper = BY_PROMPT.bootstrap()
    assert frame["low"].tolist() == lower.flatten().tolist()
    assert frame["high"].tolist() == upper.flatten().tolist()
    assert frame["se"].tolist() == pytest.approx([0, 1 / 3**0.5, 0.5 / 3**0.5, 1 / 3**0.5])
    assert BY_PROMPT.permutation_test().single.tolist() == [[0.25, 0.25], [0.5, 1.0]]


def test_means_alone_say_nothing_about_how_sure_they_are() -> None:
    for measure in (GRID.standard_error, GRID.bootstrap, GRID.permutation_test):
        with pytest.raises(
            TaskError, match="exact patching gives means .* only.*activation_patching"
        ):
            measure()
    of_one_prompt = Effects(EACH[..., 0], GRID.axes, GRID.labels, META, EACH[..., :1])
    with pytest.raises(TaskError, match="One prompt"):
        of_one_prompt.to_frame(significance=True)


def test_three_axes_are_drawn_one_layer_at_a_time() -> None:
    labels = {**GRID.labels, "pos": (0, 1)}
    cube = Effects(torch.ones(2, 2, 2), ("layer", "head", "pos"), labels, META)
    with pytest.raises(TaskError, match=r"have 3.*effects.at\(layer=0\).plot\(\)"):
        cube.plot()
    figure = cube.at(layer=1).plot()
    assert figure.data[0].type == "heatmap"
    assert "layer 1" in figure.layout.title.text
    with pytest.raises(TaskError, match="have 0.*one effect of 1"):
        cube.at(layer=0, head=0, pos=0).plot()


def test_chosen_positions_keep_their_tokens() -> None:
    chosen = Effects(torch.ones(2, 1), ("layer", "pos"), {"layer": (0, 1), "pos": (1,)}, META)
    assert chosen.plot().data[0].x == ("b",)


def test_labels_must_fit_the_values() -> None:
    with pytest.raises(AssertionError, match="labels for"):
        Effects(torch.zeros(2, 2), ("layer", "head"), {"layer": (0,), "head": (0, 1)}, META)


def test_spearman_by_hand_with_ties() -> None:
    def effects(*values: float) -> Effects:
        labels = {"layer": tuple(range(len(values)))}
        return Effects(torch.tensor(values).float(), ("layer",), labels, {})

    # 1 - 6 * (1 + 1) / (4 * 15)
    assert effects(1, 2, 3, 4).spearman(effects(2, 1, 3, 4)) == pytest.approx(0.8)
    assert effects(1, 1, 2).spearman(effects(0, 0, 5)) == pytest.approx(1.0)
    with pytest.raises(TaskError, match="different interventions.*the same component"):
        effects(1, 2).spearman(effects(1, 2, 3))


EDGE_MAP = EdgeMap(2, 2, 1)
EDGES = Effects(
    torch.arange(7.0 * 11).reshape(7, 11) * EDGE_MAP.mask,
    ("writer", "reader"),
    {"writer": EDGE_MAP.writers, "reader": EDGE_MAP.readers},
    {**META, "component": "edge", "n_prompts": 2},
)
FOR_FILES = [GRID, FEATURES, BY_PROMPT, EDGES, BY_PROMPT.at(layer=1), EDGES.at(writer="L0H1")]


@pytest.mark.parametrize(
    "effects", [*FOR_FILES, FEATURES.at(feature=FEATURES.labels["feature"][1])]
)
def test_a_file_gives_back_what_was_saved(effects: Effects, tmp_path) -> None:
    loaded = Effects.load(effects.save(tmp_path / "folder" / "effects.safetensors"))
    assert torch.equal(loaded.values, effects.values)
    assert loaded.axes == effects.axes and loaded.labels == effects.labels
    assert loaded.metadata == {**effects.metadata, "tokens": ("a", "b")}
    if effects.values_by_prompt is None:
        assert loaded.values_by_prompt is None
    else:
        assert torch.equal(loaded.values_by_prompt, effects.values_by_prompt)
    assert repr(loaded) == repr(effects)
    assert loaded.to_frame().equals(effects.to_frame())


def test_a_damaged_file_is_found_out(tmp_path) -> None:
    path = GRID.save(tmp_path / "effects.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(BadFileError, match="not as it was written"):
        Effects.load(path)
    broken = Effects(GRID.values / 0, GRID.axes, GRID.labels, META)
    with pytest.raises(GemmaScopeError, match="cannot be saved.*not finite"):
        broken.save(path)
    odd = Effects(GRID.values, GRID.axes, {"layer": (0, 1), "head": (0.5, 1)}, META)
    with pytest.raises(GemmaScopeError, match="label 0.5 of 'head' cannot be saved"):
        odd.save(path)


def test_json_is_plain() -> None:
    content = json.loads(json.dumps(EDGES.to_json(), allow_nan=False))
    assert content["values"] == EDGES.values.tolist()
    assert content["labels"]["reader"]["entries"][0] == [
        ["head", "blocks.0.attn.hook_z", 0, None],
        "q",
    ]


def test_edges_are_rows_of_their_own() -> None:
    frame = EDGES.to_frame()
    assert list(frame.columns) == ["source", "target", "port", "effect", "share"]
    assert len(frame) == EDGE_MAP.n_edges == len(EDGES.flat)
    assert EDGES.edges == EDGE_MAP
    assert frame["effect"].tolist() == EDGES.values[EDGE_MAP.mask].tolist()
    by_name, by_node = EDGES.at(writer="L0H1"), EDGES.at(writer=Node.head(0, 1))
    assert torch.equal(by_name.values, by_node.values)
    with pytest.raises(TaskError, match="some edges of a model only"):
        _ = EDGES.at(writer=["embed", "L0H1"]).edges
    with pytest.raises(TaskError, match="is not of edges"):
        _ = GRID.edges
    assert EDGES.plot().data[0].type == "heatmap"
    assert len(EDGES.at(writer=["embed", "MLP1"]).to_frame()) == 12


def test_notebooks_show_a_table() -> None:
    named = Effects(GRID.values, GRID.axes, GRID.labels, {**META, "component": "<b>"})
    text = named._repr_html_()
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "<table" in text and "-2" in text
