"""Whole folders, damaged at random: an error of ours or a dictionary of the right shape, never else.

The allocations of this process are watched: opening a damaged file may not take more memory than a
few times its own size.
"""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from gemma_scope_2_files import multi_spec, put_multi, put_single, put_tree, single_spec, tree_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from npz_files import arrays, save, spec
from safetensors.numpy import save_file

from gemmascope_plugin.errors import GemmaScopeError
from gemmascope_plugin.loading import load

FAST = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DAMAGE = st.tuples(
    st.none() | st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 0.9999999), st.integers(0, 7)), max_size=3),
)
MEMORY = 8_000_000
"""More than any of these files; the buffer for checking values is in it."""


def put_npz(folder, sae_spec) -> None:
    save(folder / sae_spec.filename, compress=True, **arrays())


LAYOUTS = {
    "npz": (lambda: spec(repo_id="google/x"), put_npz),
    "single": (lambda: single_spec("transcoder", "mlp", affine=True), put_single),
    "clt": (lambda: multi_spec("clt", affine=True), put_multi),
    "tree": (tree_spec, put_tree),
}


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory) -> None:
    """Everything is imported before memory is watched: modules are not what a file costs."""
    for name, (make, put) in LAYOUTS.items():
        folder, sae_spec = tmp_path_factory.mktemp(name), make()
        put(folder, sae_spec)
        load(sae_spec, local_dir=folder)


def damage(path, how) -> None:
    cut, flips = how
    data = bytearray(path.read_bytes())
    for where, bit in flips:
        data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])


def attempt(sae_spec, folder):
    """The dictionary or None; anything but our errors is a failure."""
    tracemalloc.start()
    try:
        made = load(sae_spec, local_dir=folder, check=True)
    except GemmaScopeError:
        made = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 * MEMORY + 1_000_000, f"{peak} bytes"
    return made


@pytest.mark.parametrize("layout", list(LAYOUTS))
@FAST
@given(how=DAMAGE)
def test_damaged_parameters(tmp_path, layout: str, how) -> None:
    make, put = LAYOUTS[layout]
    sae_spec = make()
    put(tmp_path, sae_spec)
    damage(tmp_path / sae_spec.filename, how)
    made = attempt(sae_spec, tmp_path)
    if made is not None and layout in ("npz", "single"):
        assert tuple(made.W_enc.shape) == (sae_spec.d_in, sae_spec.d_sae)
        assert all(bool(torch.isfinite(p).all()) for p in made.parameters())


@pytest.mark.parametrize("layout", ["single", "clt", "tree"])
@FAST
@given(how=DAMAGE)
def test_damaged_configs(tmp_path, layout: str, how) -> None:
    make, put = LAYOUTS[layout]
    sae_spec = make()
    put(tmp_path, sae_spec)
    damage(tmp_path / sae_spec.config_filename, how)
    attempt(sae_spec, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("layout", ["single", "clt", "tree"])
@FAST
@given(data=st.data())
def test_configs_of_the_wrong_types(tmp_path, layout: str, data) -> None:
    make, put = LAYOUTS[layout]
    sae_spec = make()
    put(tmp_path, sae_spec)
    path = tmp_path / sae_spec.config_filename
    content = json.loads(path.read_text())
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
    path.write_text(json.dumps(content))
    attempt(sae_spec, tmp_path)


ARRAYS = st.tuples(
    st.sampled_from(["float16", "float32", "float64", "int64", "int8", "bool"]),
    st.lists(st.integers(0, 5), max_size=4),
)


@FAST
@given(name=st.sampled_from(["w_enc", "w_dec", "b_enc", "threshold", "other"]), array=ARRAYS)
def test_wrong_types_and_ranks(tmp_path, name: str, array) -> None:
    sae_spec = single_spec()
    path = put_single(tmp_path, sae_spec)
    values = {("w" + k[1:] if k[:2] == "W_" else k): v for k, v in arrays().items()}
    values[name] = np.ones(array[1], array[0])
    save_file(values, path)
    assert attempt(sae_spec, tmp_path) is None


def test_objects_are_never_unpickled(tmp_path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    sae_spec = spec(repo_id="google/x")
    path = tmp_path / sae_spec.filename
    path.parent.mkdir(parents=True)
    for compress in (np.savez, np.savez_compressed):
        compress(path, **{**arrays(), "W_enc": np.array([Evil()], dtype=object)})
        assert attempt(sae_spec, tmp_path) is None
    assert not ran.exists()
