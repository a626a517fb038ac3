"""Which entries a patch covers, and what cannot be chosen."""

from __future__ import annotations

import pytest
import torch

from gemmascope_plugin.causes.components import COMPONENTS, sizes_of
from gemmascope_plugin.causes.grid import Choice, Grid, Patch, component_grid, inserted
from gemmascope_plugin.errors import EmptySelectionError, UnknownNameError

EVERY = slice(None)


def grid(model, component: str, **choice) -> Grid:
    made = Choice(**choice)
    made.check(component)
    made.axes_of(component)
    return component_grid(component, made, sizes_of(model, component, 8))


def test_default_axes_and_sizes(hooked2) -> None:
    shapes = {name: (grid(hooked2, name).axes, grid(hooked2, name).shape) for name in MODEL_PARTS}
    by_position = ("layer", "pos"), (3, 8)
    assert shapes["resid_mid"] == shapes["mlp_out"] == shapes["ln2_scale"] == by_position
    assert shapes["z"] == shapes["pattern"] == (("layer", "head"), (3, 4))
    assert shapes["k"] == shapes["v"] == (("layer", "head"), (3, 2))
    assert shapes["neuron"] == (("layer", "neuron"), (3, 64))
    assert shapes["ln_final_scale"] == (("pos",), (8,))


MODEL_PARTS = [name for name, component in COMPONENTS.items() if "{site}" not in component.hook]


@pytest.mark.parametrize("component", MODEL_PARTS)
def test_every_hook_exists_and_has_these_dimensions(model, component: str) -> None:
    made = grid(model, component, axes=COMPONENTS[component].all_axes)
    tokens = torch.arange(2, 10)[None]
    names = made.hooks
    with torch.no_grad():
        cache = model.run_with_cache(tokens, names_filter=names)[1]
    last = made.patches[-1]
    assert all(isinstance(at, int) for at in last.index)
    for name in names:
        # the last coordinate of every axis is the last of the activation
        assert torch.equal(last.entries(cache[name]), cache[name][(EVERY, *[-1] * len(last.index))])


def test_cells_follow_the_order_of_the_axes(hooked2) -> None:
    made = grid(hooked2, "z", axes=("pos", "layer"), positions=[5, 2], layers=[1, 2], heads=[3])
    assert made.labels == {"pos": (5, 2), "layer": (1, 2)}
    hooks = ["blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]
    assert [p.hook for p in made.patches] == hooks * 2
    assert [p.index for p in made.patches] == [(5, (3,))] * 2 + [(2, (3,))] * 2
    assert made.hooks == hooks


def test_an_axis_without_a_name_is_covered(hooked2) -> None:
    assert grid(hooked2, "z", axes="layer").patches[1] == Patch(
        ("blocks.1.attn.hook_z",), (EVERY, EVERY)
    )
    (patch,) = grid(hooked2, "mlp_out", axes=("pos",), positions=[3]).patches
    assert patch.hooks == tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(3))


def test_entries_and_their_sums() -> None:
    x = torch.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    patches = (Patch(("a",), (1, (0, 3))), Patch(("a", "b"), (EVERY, 2)))
    assert torch.equal(patches[0].entries(x), x[:, 1, [0, 3]])
    assert torch.equal(patches[1].entries(x), x[:, :, 2])
    sums = Grid("z", ("layer",), {"layer": (0, 1)}, patches).sums({"a": x, "b": 10 * x})
    assert torch.equal(sums[0], x[:, 1, [0, 3]].sum((1, 2)))
    assert torch.equal(sums[1], 11 * x[:, :, 2].sum((1, 2)))


@pytest.mark.parametrize(
    "indices",
    [
        [(1,), (0,), (1,)],
        [(EVERY, 3), (EVERY, 0), (EVERY, 3)],
        [(2, 1), (0, 0), (2, 3)],
        [(EVERY, EVERY)] * 3,
        [((0, 2), 1), ((0, 2), 3), ((0, 2), 0)],
        [(1, (0, 2)), (2, (0, 2)), (0, (0, 2))],
        [((0, 2), (1, 3))] * 3,
    ],
    ids=str,
)
def test_patches_of_many_copies_at_once(indices) -> None:
    """One assignment equals one loop; the second of four copies has no patch."""
    x, other = torch.randn(4 * 2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    copies = [0, 2, 3]
    expected = x.clone()
    for copy, index in zip(copies, indices, strict=True):
        rows = expected[2 * copy : 2 * copy + 2]
        covered = torch.zeros(3, 4, dtype=torch.bool)
        chosen = [list(at) if isinstance(at, tuple) else at for at in index]
        part = covered[[chosen[0]] if isinstance(chosen[0], int) else chosen[0]]
        part[:, chosen[1] if len(chosen) > 1 else EVERY] = True
        covered[[chosen[0]] if isinstance(chosen[0], int) else chosen[0]] = part
        rows[:, covered] = other[:, covered]
    before = x.clone()
    assert torch.equal(inserted(x, copies, indices, other), expected)
    assert torch.equal(x, before)


BAD = {
    "axis": ("resid_pre", {"axes": ("layer", "head")}, "axis of resid_pre 'head'.*layer, pos"),
    "typo": ("z", {"axes": ("layers",)}, "'layers'.*Did you mean 'layer'"),
    "axis twice": ("z", {"axes": ("pos", "pos")}, "named twice"),
    "layer": ("z", {"layers": [3]}, "Layer 3 does not exist.*layers 0 to 2"),
    "negative": ("z", {"layers": [-1]}, "Layer -1 does not exist"),
    "head": ("z", {"heads": [4]}, "Head 4 .*heads 0 to 3"),
    "key-value head": ("k", {"heads": [2]}, "Head 2 .*heads 0 to 1"),
    "position": ("resid_pre", {"positions": [8]}, "Position 8 .*positions 0 to 7"),
    "neuron": ("neuron", {"neurons": [64]}, "Neuron 64 .*neurons 0 to 63"),
    "layer twice": ("z", {"layers": [1, 1]}, "layer is named twice"),
    "no heads": ("mlp_out", {"heads": [0]}, "mlp_out has no heads.*layers"),
    "no neurons": ("z", {"neurons": [0]}, "z has no neurons"),
    "no layers": ("ln_final_scale", {"layers": [0]}, "no layers.*positions"),
    "no features": ("z", {"features": ()}, "z has no features"),
    "several mids": ("resid_mid", {"axes": ("pos",)}, "one layer at a time"),
    "features together": ("feature", {"axes": ("pos",)}, "do not tell features apart"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_there_is_an_error(hooked2, case: str) -> None:
    component, choice, text = BAD[case]
    with pytest.raises(UnknownNameError, match=text):
        grid(hooked2, component, **choice)


def test_nothing_chosen_is_an_error(hooked2) -> None:
    with pytest.raises(EmptySelectionError, match="No layer is named"):
        grid(hooked2, "z", layers=[])
    with pytest.raises(EmptySelectionError, match="ln_final_scale have no axis.*pos"):
        grid(hooked2, "ln_final_scale", per_position=False)
