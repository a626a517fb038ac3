"""SaeSpec.from_folder and the header reader under it."""

import json

import numpy as np
import pytest

from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.catalog.headers import read_headers
from gemmascope_plugin.errors import BadFileError, MissingFileError, UnknownNameError


def write(folder, d_in=6, d_sae=16, d_out=6, prefix="W", **extra):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{prefix}_enc": np.ones((d_in, d_sae), np.float32),
        f"{prefix}_dec": np.ones((d_sae, d_out), np.float32),
        "b_enc": np.zeros(d_sae, np.float32),
        "b_dec": np.zeros(d_out, np.float32),
        "threshold": np.zeros(d_sae, np.float32),
    }
    np.savez(folder / "params.npz", **{**arrays, **extra})
    return folder


@pytest.mark.parametrize("prefix", ["W", "w"])
def test_shapes_come_from_the_headers(tmp_path, prefix) -> None:
    folder = write(tmp_path / "average_l0_12", d_out=5, prefix=prefix)
    spec = SaeSpec.from_folder(folder, model="mine", site="transcoder", layer=2)
    assert (spec.d_in, spec.d_sae, spec.d_out, spec.width) == (6, 16, 5, "16")
    assert (spec.kind, spec.site, spec.l0) == ("transcoder", "mlp", 12.0)
    assert spec.hook_in == "blocks.2.ln2.hook_normalized"
    assert spec.local and not spec.bundled and spec.url is None
    assert spec.repo_id == folder.as_posix() and spec.filename == "params.npz"


def test_a_width_of_gemma_scope_gets_its_label(tmp_path) -> None:
    spec = SaeSpec.from_folder(write(tmp_path, 1, 4096, 1), model="m", site="attn_z", layer=0)
    assert (spec.width, spec.l0, spec.site, spec.kind) == ("4k", None, "att", "sae")


def test_only_headers_are_read(tmp_path) -> None:
    folder = write(tmp_path, 1, 4096, 1)
    header = read_headers(folder / "params.npz")["b_enc"]
    data = bytearray((folder / "params.npz").read_bytes())
    data[header.offset + header.header_size + 8000] ^= 0xFF  # the values no longer fit the checksum
    (folder / "params.npz").write_bytes(data)
    assert SaeSpec.from_folder(folder, model="m", site="res", layer=0).d_sae == 4096


def test_errors_name_what_there_is(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=r"no file '.*params\.npz'\. There is: nothing in"):
        SaeSpec.from_folder(tmp_path, model="m", site="res", layer=0)
    write(tmp_path)
    with pytest.raises(UnknownNameError, match=r"no site 'rez'\. There is: res, att, mlp, embed"):
        SaeSpec.from_folder(tmp_path, model="m", site="rez", layer=0)
    with pytest.raises(UnknownNameError) as error:
        SaeSpec.from_folder(tmp_path, model="m", site="res", layer=0, kind="transcoder")
    assert str(error.value) == (
        "no dictionary of kind 'transcoder' at site 'res'. There is: sae at res, sae at att, sae "
        "at mlp, sae at embedding, transcoder at mlp."
    )
    write(tmp_path, W_dec=np.ones((15, 6), np.float32))
    with pytest.raises(BadFileError) as error:
        SaeSpec.from_folder(tmp_path, model="m", site="res", layer=0)
    assert "has no matching matrices W_enc [d_in, d_sae] and W_dec [d_sae, d_out]" in str(
        error.value
    )
    assert "W_enc [6, 16], W_dec [15, 6]" in str(error.value)


def test_the_card_is_escaped_and_self_contained(tmp_path) -> None:
    spec = SaeSpec.from_folder(write(tmp_path), model="<b>&", site="res", layer=3)
    html = spec._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>&" not in html
    assert "6 -&gt; 16 -&gt; 6" in html and "blocks.3.hook_resid_post" in html
    assert "<script" not in html and "http" not in html
    transcoder = SaeSpec.from_folder(write(tmp_path), model="m", site="transcoder", layer=3)
    assert "ln2.hook_normalized, without the gain of the norm" in transcoder._repr_html_()


def safetensors(folder, shapes, cut=None):
    folder.mkdir(parents=True, exist_ok=True)
    end, rows = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        rows[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(rows).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(end)
    (folder / "params.safetensors").write_bytes(data[:cut])
    return folder


SHAPES = {
    **{"w_enc": (6, 16), "w_dec": (16, 5), "b_enc": (16,), "b_dec": (5,), "threshold": (16,)},
    "affine_skip_connection": (6, 5),
}


def test_a_folder_of_the_second_suite_reads_the_tensor_with_gain(tmp_path) -> None:
    folder = safetensors(tmp_path, SHAPES)
    spec = SaeSpec.from_folder(folder, model="m", site="transcoder", layer=3)
    assert (spec.d_in, spec.d_sae, spec.d_out, spec.affine) == (6, 16, 5, True)
    assert (spec.format, spec.gain, spec.hook_in) == (
        *("gemma-scope-2", "with", "blocks.3.mlp.hook_in"),
    )
    assert spec.nbytes == 4 * (16 * 13 + 5 + 30) and spec.filename == "params.safetensors"
    plain = SaeSpec.from_folder(folder, model="m", site="transcoder", layer=3, gain="without")
    assert plain.hook_in == "blocks.3.ln2.hook_normalized"
    assert SaeSpec.from_folder(folder, model="m", site="res", layer=3).gain == "without"


@pytest.mark.parametrize("cut", [0, 5, 20])
def test_a_truncated_header_is_an_error(tmp_path, cut) -> None:
    safetensors(tmp_path, SHAPES, cut=cut)
    with pytest.raises(BadFileError, match="truncated or not a safetensors file|no matching"):
        SaeSpec.from_folder(tmp_path, model="m", site="res", layer=0)


@pytest.mark.parametrize(
    "text", [b"[]", b'{"a": 1}', b'{"a": {"shape": 3}}', b'{"a": {"shape": [-1]}}']
)
def test_an_odd_header_is_an_error(tmp_path, text) -> None:
    data = len(text).to_bytes(8, "little") + text
    (tmp_path / "params.safetensors").write_bytes(data)
    with pytest.raises(BadFileError):
        SaeSpec.from_folder(tmp_path, model="m", site="res", layer=0)
    (tmp_path / "params.safetensors").write_bytes((1 << 40).to_bytes(8, "little"))
    with pytest.raises(BadFileError, match="claims a header of"):
        SaeSpec.from_folder(tmp_path, model="m", site="res", layer=0)
