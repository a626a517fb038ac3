"""The shipped weights are reloaded and every bar they were released under is measured again."""

from __future__ import annotations

import pytest

from gemmascope_plugin.demo import TASK_NAMES, tiny
from gemmascope_plugin.demo.build import HELD_OUT_SEED, dictionary_scores, label_corpus, task_scores
from gemmascope_plugin.demo.corpus import make_corpus
from gemmascope_plugin.errors import InputError, UnknownNameError
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.sources import ASSETS
from gemmascope_plugin.measures import measure
from gemmascope_plugin.saes import MatryoshkaSAE
from gemmascope_plugin.splice import HookedSAE

MAX_BYTES = 20_000_000
MAX_L0, MAX_DELTA_LOSS_SHARE, MAX_DEAD_SHARE = 24, 0.05, 0.25
MAX_FVU = {"sae": 0.10, "transcoder": 0.25}
MIN_LABELS, MIN_LABEL_F1 = 20, 0.5
SPECS = tuple(tiny().specs)


@pytest.fixture(scope="module")
def suite():
    return tiny()


@pytest.fixture(scope="module")
def documents():
    """Enough for every bar: L0, FVU and dead features differ by few percent from those of 150."""
    return make_corpus(50, HELD_OUT_SEED)


def test_package_data_is_at_most_20_megabytes():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_the_model_says_what_it_is_and_where_its_weights_come_from(backend):
    model = tiny(backend=backend).model
    assert model.cfg.model_name == "gemma-2-tiny"
    assert model.gemmascope_source == "gemma-2-tiny, the model that ships with this package"


def test_there_is_a_dictionary_of_every_kind_for_every_layer(suite):
    assert len(suite.specs) == 24
    plain, matryoshka = ("npz", None), ("gemma-scope-2", "matryoshka")
    assert {(s.kind, s.site, s.layer, s.affine, s.format, s.variant) for s in suite.specs} == {
        (kind, site, layer, affine, *suite_of)
        for kind, site, affine, suite_of in (
            ("sae", "res", False, plain),
            ("sae", "att", False, plain),
            ("sae", "mlp", False, plain),
            ("transcoder", "mlp", False, plain),
            ("sae", "res", False, matryoshka),
            ("transcoder", "mlp", True, ("gemma-scope-2", None)),
        )
        for layer in range(4)
    }


def test_matryoshkas_have_levels_and_skip_transcoders_read_the_gained_norm(suite):
    for layer in range(4):
        nested, skip = suite.load("matryoshka", layer), suite.load("skip-transcoder", layer)
        assert isinstance(nested, MatryoshkaSAE) and nested.cfg.levels == (64, 192, 512)
        assert skip.cfg.metadata.hook_name == f"blocks.{layer}.mlp.hook_in"
        assert float(skip.W_skip.norm()) > 0
        assert suite.load("transcoder", layer).cfg.architecture() == "jumprelu_transcoder"
        assert suite.load("res", layer).cfg.architecture() == "jumprelu"


def test_coarser_levels_fit_worse(suite, documents):
    sae = suite.load("matryoshka", 1)
    fits = [
        measure(
            suite.model, HookedSAE(sae, level=level), documents.tokens, batch_size=50, n_positions=0
        )
        for level in (0, 1, -1)
    ]
    assert 0.5 > fits[0].fvu > fits[1].fvu > fits[2].fvu and fits[0].l0 < fits[1].l0 < fits[2].l0


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_every_task_is_solved_on_held_out_prompts(backend):
    scores = task_scores(tiny(backend=backend).model, n=128)
    assert set(scores) == set(TASK_NAMES)
    assert all(score >= 0.95 for score in scores.values()), scores


@pytest.mark.parametrize("spec", SPECS, ids=[f"{s.release}-{s.layer}" for s in SPECS])
def test_dictionary_meets_its_bars_on_held_out_text(spec, suite, documents):
    sae = load(spec)
    scores = dictionary_scores(suite.model, sae, documents.tokens)
    assert scores["l0"] <= MAX_L0
    assert scores["fvu"] <= MAX_FVU[spec.kind]
    assert scores["delta_loss_share"] <= MAX_DELTA_LOSS_SHARE
    assert scores["dead_share"] <= MAX_DEAD_SHARE
    assert scores["l0"] == pytest.approx(spec.l0, rel=0.1), "declared and measured L0"
    stored = (suite.metrics["dictionaries"]["scores"] | suite.metrics["further"]["scores"])[
        f"{spec.release}/{spec.sae_id}"
    ]
    for name in ("l0", "fvu"):
        assert scores[name] == pytest.approx(stored[name], rel=0.15)


@pytest.mark.parametrize("spec", SPECS, ids=[f"{s.release}-{s.layer}" for s in SPECS])
def test_labels_hold_on_held_out_text(spec, suite, documents):
    labels = suite.labels_of(spec)
    assert len(labels) >= MIN_LABELS
    assert all(label.f1 >= MIN_LABEL_F1 for label in labels.values())
    again = label_corpus(suite.model, load(spec), documents)
    same = [i for i, label in labels.items() if i in again and again[i].concept == label.concept]
    assert len(same) >= 0.7 * len(labels), "labels depend on the sample"


def test_the_json_says_how_to_rebuild_the_suite(suite):
    for part in ("model", "dictionaries", "further"):
        record = suite.metrics[part]
        assert record["command"].startswith("python -m gemmascope_plugin.demo.build")
        assert "seed" in str(record["recipe"])
    assert suite.metrics["model"]["minutes"] <= 60


def test_suite_finds_features_by_concept_and_names_the_nearest(suite):
    sae = suite.load("res", 2)
    concept = next(iter(suite.labels_of(sae).values())).concept
    assert suite.labels_of(sae)[suite.feature(sae, concept)].concept == concept
    with pytest.raises(UnknownNameError, match="No feature is labelled 'indirect_objekt'"):
        suite.feature(sae, "indirect_objekt")
    with pytest.raises(InputError, match=r"^3 is not a loaded dictionary"):
        suite.feature(3, "nope")
    with pytest.raises(InputError, match=r"^3 is not a concept.*suite.feature\(sae, concept\)"):
        suite.feature(sae, 3)
