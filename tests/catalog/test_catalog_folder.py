"""SaeSpec.from_folder and the header reader under it."""

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
    with pytest.raises(MissingFileError, match=r"no file '.*params\.npz'\. Try: check the folder"):
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
    assert "blocks.3.hook_mlp_out (reconstructed)" in transcoder._repr_html_()
