"""find(): every argument, every alias, and the text of every refusal."""

import pytest

from gemmascope_plugin.catalog import SpecList, find
from gemmascope_plugin.errors import AmbiguousSpecError, UnknownNameError

RES_20 = {"model": "gemma-2-2b", "site": "res", "layer": 20}


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
    found = find(model="2b", site="att", width="16k", l0="nearest:80")
    assert [s.layer for s in found] == list(range(26))
    assert find(**RES_20, width="16k", l0="nearest:30").one().l0 == 22


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
            "no site 'resid_pst'. There is: res, att, mlp, embedding, transcoder. Did you mean "
            "'resid_post'",
            "Try: site='resid_post'",
        ),
        (
            {"model": "gemma-2-2c"},
            "no dictionary has model='gemma-2-2c'. There is: model gemma-2-2b",
            "Try: find(model='gemma-2-2b')",
        ),
        (
            {"model": "2b", "layer": 26},
            "no dictionary has layer=26. There is: layer 0 to 25. Did you mean 25?",
            "Try: find(layer=25)",
        ),
        ({"layer": [3, 99]}, "no dictionary has layer=99. ", "Try: find(layer=25)"),
        (
            {"width": "17k"},
            "no dictionary has width='17k'. There is: width ",
            "Did you mean '16k' or '131k'? Try: find(width='16k')",
        ),
        (
            {"kind": "crosscodr"},
            "no dictionary has kind='crosscodr'. There is: kind sae, transcoder.",
            "Try: find(kind='transcoder')",
        ),
        (
            {"l0": "canonicl"},
            "l0='canonicl' is not understood. Did you mean 'canonical'?",
            "Try: l0='canonical', l0=71, l0='nearest:80' or l0=(50, 100)",
        ),
        ({"l0": "nearest:many"}, "l0='nearest:many' is not understood.", "or l0=(50, 100)"),
        ({"l0": (1, 2, 3)}, "l0=(1, 2, 3) is not a range (low, high).", "or l0=(50, 100)"),
        ({"l0": (0.1, 0.2)}, "no dictionary has l0=(0.1, 0.2). There is: l0 ", ")"),
        (
            {"release": "gemma-scope-2b-pt-transcoders", "l0": "canonical"},
            "nothing is marked canonical here. There is: l0 5 to 95.",
            "Try: find(l0=5)",
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
        "no dictionary has model='2b', layer=7, width='131k' together. There is: layer 12 (the "
        "rest as given); width 16k, 65k (the rest as given). Did you mean layer=12? Try: find() "
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
    found = find(**RES_20)
    assert isinstance(found[:3], SpecList) and len(found[:3]) == 3
    assert found[:3] == SpecList(list(found)[:3]) and hash(found[:3]) == hash(SpecList(found[:3]))
    lines = repr(found).splitlines()
    assert lines[0].split() == [
        *("release", "id", "kind", "site", "layer", "width", "l0", "canonical", "size"),
    ]
    assert lines[3].split()[-3:] == ["71", "*", "302.1"] or "71   *          302.1 MB" in lines[3]
    assert repr(find(model="2b")).endswith(" dictionaries, 852 more not shown")
    frame = found.to_frame()
    assert list(frame["l0"])[:5] == [22, 38, 71, 139, 294] and frame.shape[0] == len(found)
    html = find(model="2b")._repr_html_()
    assert len(html) < 100_000 and "862 dictionaries, 812 more not shown" in html
    assert "<script" not in html and "http" not in html
