"""find(): every argument, every alias, and the text of every refusal."""

import pytest

from gemmascope_plugin.catalog import SpecList, find
from gemmascope_plugin.errors import AmbiguousSpecError, UnknownNameError
from tests.factories import unchecked

RES_20 = {"model": "gemma-2-2b", "site": "res", "layer": 20, "format": "npz"}


@pytest.mark.parametrize("model", ["gemma-2-2b", "2b", "google/gemma-2-2b", "Gemma-2-2B"])
def test_a_model_has_several_names(model: str) -> None:
    assert {s.model for s in find(model=model)} == {"gemma-2-2b"}


@pytest.mark.parametrize(
    ("alias", "site"),
    [
        ("resid_post", "res"),
        ("residual", "res"),
        ("hook_resid_post", "res"),
        ("attn", "att"),
        ("attn_out", "att"),
        ("attn_z", "att"),
        ("z", "att"),
        ("mlp_out", "mlp"),
        ("embed", "embedding"),
    ],
)
def test_a_site_has_several_names(alias: str, site: str) -> None:
    assert find(model="2b", site=alias) == find(model="2b", site=site)


def test_transcoder_as_a_site_asks_for_the_kind() -> None:
    by_site = find(model="2b", site="transcoders")
    assert by_site == find(model="2b", kind="transcoder") == find(model="2b", kind="transcoders")
    assert len(by_site) == 26


def test_layers_and_widths_may_be_lists_ranges_and_numbers() -> None:
    assert {s.layer for s in find(model="2b", site="att", layer=[3, 5])} == {3, 5}
    assert {s.layer for s in find(model="2b", site="att", layer=range(24, 99))} == {24, 25}
    assert find(**RES_20, width=16384) == find(**RES_20, width="16k") == find(**RES_20, width="16K")
    assert {s.width for s in find(site="res", layer=12, width=["131k", 32768])} == {"131k", "32k"}


def test_l0_exact_canonical_nearest_and_range() -> None:
    assert [s.l0 for s in find(**RES_20, width="16k")] == [22, 38, 71, 139, 294]
    assert find(**RES_20, width="16k", l0="canonical").one().l0 == 71
    assert find(**RES_20, width="16k", l0=139).one().l0 == 139
    assert [s.l0 for s in find(**RES_20, l0="nearest:80")] == [71, 61]
    assert [s.l0 for s in find(**RES_20, width="16k", l0=(38, 139))] == [38, 71, 139]


def test_nearest_l0_takes_one_per_layer_and_width_and_the_sparser_of_a_tie() -> None:
    specs = find(model="2b", site="att", width="16k", l0="nearest:80")
    assert [s.layer for s in specs] == list(range(26))
    assert find(**RES_20, width="16k", l0="nearest:30").one().l0 == 22


def test_lists_ranges_and_pairs_of_numbers() -> None:
    assert [s.l0 for s in find(**RES_20, width="16k", l0=[38, 294])] == [38, 294]
    wide = find(model="2b", format="npz", width=range(2**18, 2**20))
    assert {s.width for s in wide} == {"262k", "524k"}
    assert find(model="2b", d_sae=(2**18, 2**19), format="npz") == wide
    small = find(model=["270m", "270m-it"], nbytes=(0, 90 * 10**6), variant="plain")
    assert {s.width for s in small} == {"16k"}
    assert {s.model for s in small} == {"gemma-3-270m", "gemma-3-270m-it"}
    assert {s.kind for s in find(model="1b", kind=["clt", "crosscoders"])} == {"clt", "crosscoder"}
    assert {s.d_in for s in find(d_in=[640, 2560])} == {640, 2560}


def test_what_an_l0_is() -> None:
    big = find(model="270m", l0_label="big", l0_is="target")
    assert len(big) > 0 and {(s.l0_label, s.l0_is) for s in big} == {("big", "target")}
    assert {s.l0_is for s in find(model="2b", l0_is="measured")} == {"measured"}


def test_gemma_scope_2_by_label_affine_variant_and_provenance() -> None:
    medium = find(model="4b", site="res", layer=17, width="262k", l0="medium")
    assert [(s.kind, s.variant) for s in medium] == [("sae", None), ("sae", "seed_1")]
    with pytest.raises(AmbiguousSpecError, match="variant=one of 'seed_1', 'plain'"):
        medium.one()
    skip = find(model="4b-it", site="transcoder_all", layer=3, width="16k", affine=True)
    assert [s.l0_label for s in skip] == ["small", "big"] and all(s.variant == "all" for s in skip)
    canonical = find(
        model="1b", site="res", width="16k", l0="canonical", variant="plain", format="gemma-scope-2"
    )
    assert {s.l0 for s in canonical if s.layer > 8} == {60}
    derived = find(model="27b-it", provenance="derived")
    assert len(derived) == 5 + 8 and "derived" in repr(derived)
    assert find(model="27b-it", provenance=["derived", "listed"]) == find(model="27b-it")
    assert {s.gain for s in find(kind=["transcoder", "clt"], format=["gemma-scope-2", "clt"])} == {
        "with"
    }


def test_a_crosscoder_has_all_of_its_layers_and_hooks() -> None:
    specs = find(model="1b-it", kind="crosscoder", layer=17)
    assert specs == find(model="1b-it", site="crosscoders", hook_in="blocks.22.hook_resid_post")
    assert specs == find(layers=(7, 13, 17, 22), model="1b-it") and len(specs) == 8
    with pytest.raises(UnknownNameError, match=r"layer 7, 13, 17, 22 \(the rest as given\)"):
        find(model="1b-it", kind="crosscoder", layer=8)


def test_a_site_means_dictionaries_of_one_layer_unless_others_are_named() -> None:
    at = {"model": "1b-it", "layer": 17}
    assert {s.kind for s in find(site="res", **at)} == {"sae"}
    assert {s.kind for s in find(site="mlp", **at)} == {"sae", "transcoder"}
    assert {s.kind for s in find(site=["res", "crosscoder"], **at)} == {"sae", "crosscoder"}
    assert {s.kind for s in find(site="res", kind=["sae", "crosscoder"], **at)} == {
        *("sae", "crosscoder")
    }
    assert find(site="mlp", kind="clt", **at) == find(site="clt", **at)
    named = find(site="res", release="gemma-scope-2-1b-it-crosscoders")
    assert {s.kind for s in named} == {"crosscoder"}
    with pytest.raises(UnknownNameError, match="width 16k, 65k, 262k, 1m"):
        find(site="res", width="524k", **at)  # only a crosscoder has it


def test_gemma_scope_comes_first_and_residual_before_attention_mlp_transcoders() -> None:
    for model in ("2b", "1b", "gemma-2-tiny"):
        order = list(dict.fromkeys((s.kind, s.site) for s in find(model=model)))
        order.remove(("sae", "embedding")) if model == "2b" else None
        want = [("sae", "res"), ("sae", "att"), ("sae", "mlp"), ("transcoder", "mlp")]
        assert order[:4] == want
    formats = [s.format for s in find(model="2b", site="res")]
    assert formats == sorted(formats) and set(formats) == {"npz", "sae_lens"}


@pytest.mark.parametrize("model", ["2b", "9b", "9b-it", "270m", "1b-it", "gemma-3-27b"])
def test_canonical_is_one_per_layer_and_width(model: str) -> None:
    for site, affine in (("res", None), ("att", None), ("mlp", None), ("transcoder", False)):
        try:
            specs = find(model=model, site=site, l0="canonical", kind=_kind(site), affine=affine)
        except UnknownNameError:
            assert model in ("2b", "9b", "9b-it")  # no canonical ones at this site
            continue
        assert len({(s.layer, s.width) for s in specs}) == len(specs)
        assert all("gemma-scope" in s.release for s in specs)
        assert [s.layer for s in specs] == sorted(s.layer for s in specs)


def _kind(site: str) -> str:
    return "transcoder" if site == "transcoder" else "sae"


def test_canonical_prefers_the_suite_of_the_chosen_layers() -> None:
    specs = find(model="1b", site="res", width="16k", l0="canonical")
    assert [s.layer for s in specs] == list(range(26))
    assert [s.layer for s in specs if s.variant is None] == [7, 13, 17, 22]
    everything = find(model="1b", site="res", width="16k", l0="canonical", variant=["plain", "all"])
    assert len(everything) == 30


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("gemma-3-4b-it", "gemma-3-4b-it"),
        ("4b-it", "gemma-3-4b-it"),
        ("google/gemma-3-4b-it", "gemma-3-4b-it"),
        ("gemma-v3-4b-it", "gemma-3-4b-it"),
        ("gemma-3-4b", "gemma-3-4b-pt"),
        ("4b", "gemma-3-4b-pt"),
        ("gemma-3-270m", "gemma-3-270m"),
        ("google/gemma-3-270m-pt", "gemma-3-270m"),
        ("270m", "gemma-3-270m"),
        ("9b-it", "gemma-2-9b-it"),
        ("gemma-2-27b-pt", "gemma-2-27b"),
        ("openai-community/gpt2", "gpt2-small"),
    ],
)
def test_models_by_their_names(text: str, model: str) -> None:
    assert {s.model for s in find(model=text)} == {model}


@pytest.mark.parametrize("word", ["27b", "27b-pt"])
def test_a_name_of_two_models_is_refused(word: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        find(model=word)
    assert str(error.value) == (
        f"model '{word}' could be several. There is: gemma-2-27b, gemma-3-27b-pt. Try: "
        "model='gemma-2-27b' or model='gemma-3-27b-pt'"
    )


def test_no_file_is_found_twice_and_canonical_releases_answer_by_name() -> None:
    everything = find()
    assert len({(s.repo_id, s.path) for s in everything}) == len(everything)
    named = find(release="gemma-scope-2b-pt-res-canonical", layer=20, width="16k").one()
    assert named.sae_id == "layer_20/width_16k/canonical"


@pytest.mark.parametrize(
    ("arguments", "start", "end"),
    [
        (
            {"site": "resid_pst"},
            "no site 'resid_pst'. There is: res, att, mlp, embedding, transcoder, crosscoder, clt. "
            "Did you mean 'resid_post'",
            "Try: site='resid_post'",
        ),
        (
            {"model": "gemma-2-2c"},
            "no dictionary has model='gemma-2-2c'. There is: model gemma-2-27b",
            "Try: find(model='gemma-2-2b')",
        ),
        (
            {"model": "2b", "layer": 26},
            "no dictionary of gemma-2-2b has layer=26. There is: layer 0 to 25. Did you mean 25?",
            "Try: find(layer=25)",
        ),
        ({"layer": [3, 99]}, "no dictionary has layer=99. ", "Try: find(layer=61)"),
        (
            {"width": "17k"},
            "no dictionary has width='17k'. There is: width ",
            "Did you mean '16k' or '131k'? Try: find(width='16k')",
        ),
        (
            {"kind": "crosscodr"},
            "no dictionary has kind='crosscodr'. There is: kind clt, crosscoder, sae, transcoder.",
            "Try: find(kind='crosscoder')",
        ),
        (
            {"l0": "canonicl"},
            "l0='canonicl' is not understood. Did you mean 'canonical'?",
            "Try: l0='canonical', l0='medium', l0=71, l0='nearest:80', l0=(50, 100) or l0=[38, 71]",
        ),
        (
            {"l0": "nearest:many"},
            "l0='nearest:many' is not understood.",
            "l0=(50, 100) or l0=[38, 71]",
        ),
        (
            {"l0": (1, 2, 3)},
            "l0=(1, 2, 3) is not a range (low, high).",
            "l0=(50, 100) or l0=[38, 71]",
        ),
        ({"l0": (0.1, 0.2)}, "no dictionary has l0=(0.1, 0.2). There is: l0 ", ")"),
        (
            {"release": "gemma-scope-2b-pt-transcoders", "l0": "canonical"},
            "nothing of gemma-scope-2b-pt-transcoders is marked canonical. There is: l0 5 to 95.",
            "Try: find(l0=5)",
        ),
        (
            {"model": "27b-it", "site": "embedding"},
            "no dictionary of gemma-3-27b-it has site='embedding'. There is: site att, crosscoder, "
            "mlp, res.",
            "Try: find(site='att')",
        ),
        (
            {"release": "gemma-scope-2b-pt-res", "model": "9b"},
            "no dictionary of gemma-scope-2b-pt-res has model='9b'. There is: model gemma-2-2b.",
            "Try: find(model='gemma-2-2b')",
        ),
        (
            {"model": "2b", "affine": True},
            "no dictionary of gemma-2-2b has affine=True. There is: affine False.",
            "Try: find(affine=False)",
        ),
        ({"variant": "seed_2"}, "no dictionary has variant='seed_2'. ", "find(variant='seed_1')"),
        (
            {"provenance": "guessed"},
            "no dictionary has provenance='guessed'. There is: provenance derived, listed.",
            "Try: find(provenance='derived')",
        ),
        (
            {"nbytes": (0, 10)},
            "no dictionary has nbytes=(0, 10). There is: nbytes 528896 to 112751366144.",
            "Try: find(nbytes=528896)",
        ),
        (
            {"release": "gemma-scope-2b-pt-rse"},
            "no release 'gemma-scope-2b-pt-rse'.",
            "Try: find() without release= searches all of them",
        ),
        (
            {"sae_id": "layer_20/width_16k/average_l0_1"},
            "no dictionary has sae_id='layer_20/width_16k/average_l0_1'.",
            "')",
        ),
    ],
)
def test_a_value_that_does_not_exist(arguments: dict, start: str, end: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        find(**arguments)
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(end)


def test_values_that_do_not_exist_together_list_what_each_could_be() -> None:
    with pytest.raises(UnknownNameError) as error:
        find(model="2b", layer=7, width="131k")
    assert str(error.value) == (
        "no dictionary has model='2b', layer=7, width='131k' together. There is: model "
        "gemma-2-9b (the rest as given); layer 12 (the rest as given); width 16k, 32k, 65k (the "
        "rest as given). Did you mean layer=12? Try: find() "
        "with fewer arguments shows what there is"
    )
    with pytest.raises(UnknownNameError) as error:
        find(**RES_20, width="16k", l0=72)
    assert "l0 22, 38, 71, 139, 294 (the rest as given)" in str(error.value)
    assert "Did you mean l0=71?" in str(error.value)


def test_one_says_which_argument_tells_the_matches_apart() -> None:
    with pytest.raises(AmbiguousSpecError) as error:
        find(**RES_20, width="16k").one()
    assert str(error.value) == (
        "5 dictionaries match, one is needed. There is: gemma-scope-2b-pt-res "
        "layer_20/width_16k/average_l0_22, gemma-scope-2b-pt-res layer_20/width_16k/average_l0_38, "
        "gemma-scope-2b-pt-res layer_20/width_16k/average_l0_71, gemma-scope-2b-pt-res "
        "layer_20/width_16k/average_l0_139 and 1 more. Try: l0='canonical' or one of 22, 38, 71, "
        "139, 294"
    )
    with pytest.raises(AmbiguousSpecError, match="kind=one of 'sae', 'transcoder'"):
        find(model="2b", site="mlp", layer=3, width="16k").one()
    with pytest.raises(AmbiguousSpecError, match=r"^one\(\) of an empty list\. Try: find"):
        SpecList().one()


def test_a_list_shows_itself_as_text_html_and_frame() -> None:
    specs = find(**RES_20)
    assert isinstance(specs[:3], SpecList) and len(specs[:3]) == 3
    assert specs[:3] == SpecList(list(specs)[:3]) and hash(specs[:3]) == hash(SpecList(specs[:3]))
    lines = repr(specs).splitlines()
    assert lines[0].split() == [
        *("release", "id", "kind", "site", "layer", "width", "l0", "canonical", "size"),
        "provenance",
    ]
    assert lines[3].split()[-5:] == ["71", "*", "302.1", "MB", "listed"]
    assert repr(find(model="2b")).endswith(" dictionaries, 902 more not shown")
    assert repr(specs[:1]).endswith("\n1 dictionary") and repr(specs[:2]).endswith("2 dictionaries")
    frame = specs.to_frame()
    assert list(frame["l0"])[:5] == [22, 38, 71, 139, 294] and frame.shape[0] == len(specs)
    html = find(model="2b")._repr_html_()
    assert len(html) < 100_000 and "912 dictionaries, 862 more not shown" in html
    assert "<script" not in html and "http" not in html


def test_a_layer_is_a_number() -> None:
    import numpy as np

    assert find(model="2b", layer=np.int64(12)) == find(model="2b", layer=[12])
    with pytest.raises(UnknownNameError, match="layer='12' is not the number.*Try: layer=12"):
        unchecked(find)(model="2b", layer="12")
