"""Activations from a model and from disk: the right tensors, in an order that can be gone back to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from gemmascope_plugin.errors import (
    BadFileError,
    EmptySelectionError,
    GemmaScopeError,
    InputError,
    MissingFileError,
    MissingHookError,
    ModelError,
)
from gemmascope_plugin.models.points import reading
from gemmascope_plugin.training import ActivationStore, collect_activations, store_activations
from gemmascope_plugin.training.buckets import ForwardReader, ShuffledActivations
from gemmascope_plugin.training.store import StoreReader
from gemmascope_plugin.training.text_batches import TokenStream
from tests.tiny_models import BOS_ID, EOS_ID, PAD_ID
from tests.training.cases import corpus, run, same, spec

EXCLUDE = (BOS_ID, EOS_ID, PAD_ID)
HOOKS = ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z")


def reader(model: Any, text: Any = None, hooks: Any = HOOKS, bucket: int = 96) -> ForwardReader:
    text = corpus() if text is None else text
    stream = TokenStream(model, text, context=8, rows=5, seed=3)
    return ForwardReader(model, stream, hooks, exclude=EXCLUDE, bucket=bucket)


def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0].argsort()]


def test_an_epoch_is_every_kept_token_once(model) -> None:
    text = corpus()
    text[3, 9] = EOS_ID
    source, parts = reader(model, text, bucket=10_000), []
    parts.append(source.next_bucket())
    expected = collect_activations(model, text, HOOKS, exclude=EXCLUDE)
    for name in HOOKS:
        assert len(parts[0][name]) == len(expected[name]) == 24 * 16 - 1
        torch.testing.assert_close(
            sorted_rows(parts[0][name]), sorted_rows(expected[name]), atol=1e-5, rtol=1e-5
        )
    assert source.next_bucket() is parts[0]  # fits into one bucket: the model runs once


def test_the_gained_tensor_of_gemma_scope_2_is_read_everywhere(model) -> None:
    name = "blocks.1.mlp.hook_in"
    x = reader(model, hooks=(name,), bucket=10_000).next_bucket()[name]
    how = reading(model, name)
    _, cache = model.run_with_cache(corpus())
    expected = how(cache[how.hook])[:, 1:].reshape(-1, x.shape[1])
    torch.testing.assert_close(sorted_rows(x), sorted_rows(expected), atol=1e-5, rtol=1e-5)


def batches(source: ShuffledActivations, n: int) -> list[dict[str, torch.Tensor]]:
    return [source.next_batch() for _ in range(n)]


def assert_equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> None:
    for left, right in zip(a, b, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("place", [0, 1, 2, 5, 11, 17])
@pytest.mark.parametrize("where", ["model", "one bucket", "disk"])
def test_any_place_can_be_gone_back_to(hooked2, tmp_path, place: int, where: str) -> None:
    store = None
    if where == "disk":
        text = corpus()
        store = store_activations(
            hooked2, text, HOOKS, tmp_path / "s", tokens=300, shard=100, exclude=EXCLUDE
        )

    def fresh() -> ShuffledActivations:
        if store is not None:
            return ShuffledActivations(StoreReader(store, HOOKS, seed=3), batch_size=32, seed=5)
        size = 96 if where == "model" else 10_000
        return ShuffledActivations(reader(hooked2, bucket=size), batch_size=32, seed=5)

    source = fresh()
    batches(source, place)
    state = json.loads(json.dumps(source.state()))
    expected = batches(source, 9)
    again = fresh()
    again.restore(state)
    assert_equal(batches(again, 9), expected)


def test_batches_are_a_shuffle_without_repetition(hooked2) -> None:
    source = ShuffledActivations(reader(hooked2, bucket=10_000), batch_size=64, seed=5)
    first = torch.cat([b[HOOKS[0]] for b in batches(source, 6)])
    second = torch.cat([b[HOOKS[0]] for b in batches(source, 6)])
    whole = source.bucket()[HOOKS[0]]
    assert torch.equal(sorted_rows(first), sorted_rows(whole))
    assert not torch.equal(first, second) and not torch.equal(first, whole)
    assert torch.equal(sorted_rows(first), sorted_rows(second))


def test_other_text_is_not_gone_on_with(hooked2) -> None:
    for size in (96, 10_000):
        source = ShuffledActivations(reader(hooked2, bucket=size), batch_size=32, seed=5)
        batches(source, 4)
        other = ShuffledActivations(reader(hooked2, corpus(1), bucket=size), batch_size=32, seed=5)
        with pytest.raises(BadFileError, match="not those of the checkpoint"):
            other.restore(source.state())


def test_text_is_cut_into_pieces_with_bos_and_filling_is_never_read(tmp_path, hooked2) -> None:
    import gemmascope_plugin as gs

    model = gs.tiny().model
    texts = ["the keys near the cabinet", "alice gave the ring to bob and the keys", "  "]
    stream = TokenStream(model, texts, context=5, rows=8, seed=0)
    rows = stream.read()
    assert rows is not None and stream.read() is None
    bos = model.tokenizer.bos_token_id
    assert rows.tokens[:, 0].tolist() == [bos] * len(rows.tokens)
    assert int(rows.real[:, 1:].sum()) == 5 + 9
    stream = TokenStream(model, texts, context=5, rows=8, seed=0)
    hook = "blocks.0.hook_resid_post"
    source = ForwardReader(model, stream, [hook], exclude=("bos",), bucket=100)
    assert len(source.next_bucket()[hook]) == 14  # exclude= does not name the padding


def test_iterables_are_read_again_and_iterators_once(hooked2) -> None:
    parts = list(corpus().split(6))
    again = ShuffledActivations(reader(hooked2, parts), batch_size=32, seed=0)
    batches(again, 40)
    once = ShuffledActivations(reader(hooked2, iter(parts)), batch_size=32, seed=0)
    assert_equal(
        batches(once, 8),
        batches(ShuffledActivations(reader(hooked2, parts), batch_size=32, seed=0), 8),
    )
    with pytest.raises(EmptySelectionError, match="The corpus ended after 4 batches"):
        batches(once, 40)


@pytest.mark.untyped
def test_empty_and_foreign_corpora(hooked2) -> None:
    specials = torch.full((4, 6), BOS_ID)
    with pytest.raises(EmptySelectionError, match="only excluded tokens"):
        reader(hooked2, specials).next_bucket()
    with pytest.raises(EmptySelectionError, match="The corpus is empty"):
        reader(hooked2, iter([])).next_bucket()
    with pytest.raises(EmptySelectionError, match="The corpus is empty"):
        reader(hooked2, [" "])
    with pytest.raises(EmptySelectionError, match="has no tokens"):
        reader(hooked2, torch.empty(0, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="is not a prompt"):
        reader(hooked2, torch.rand(2, 3))
    with pytest.raises(ModelError, match="3 is not a corpus"):
        reader(hooked2, 3)
    small = ShuffledActivations(reader(hooked2, corpus()[:2]), batch_size=64, seed=0)
    with pytest.raises(EmptySelectionError, match="32 tokens are fewer than one batch of 64"):
        small.next_batch()
    with pytest.raises(MissingHookError, match="hook_resid_post"):
        reader(hooked2, hooks=("blocks.1.hook_resid_pst",))


def test_activations_that_are_not_finite(hooked2, monkeypatch) -> None:
    source = reader(hooked2)
    real = source.run

    def broken(rows: Any) -> Any:
        bucket = real(rows)
        bucket[HOOKS[0]][2, 3] = float("nan")
        return bucket

    monkeypatch.setattr(source, "run", broken)
    with pytest.raises(BadFileError, match="activations at 'blocks.1.hook_resid_post' hold values"):
        source.next_bucket()


def test_a_dictionary_from_disk_and_without_the_model(hooked2, tmp_path) -> None:
    hook = HOOKS[0]
    store = store_activations(
        hooked2, corpus(), [hook], tmp_path / "s", tokens=300, shard=128, exclude=EXCLUDE
    )
    assert (len(store), store.widths) == (384, {hook: 32})
    assert "384 activations" in repr(store)
    recipe = spec(exclude=list(EXCLUDE))
    first = run(None, recipe, store)
    assert same(first, run(None, recipe, ActivationStore(tmp_path / "s")))
    assert first.cfg.metadata.hook_name == hook
    with pytest.raises(GemmaScopeError, match="stored with exclude="):
        run(None, spec(exclude=[]), store)
    with pytest.raises(MissingHookError, match="'blocks.2.hook_resid_post' were not stored"):
        run(None, spec(layer=2, exclude=list(EXCLUDE)), store)
    with pytest.raises(ModelError, match="no model"):
        run(None, recipe, corpus())


def test_stores_that_are_not_whole(hooked2, tmp_path) -> None:
    folder = tmp_path / "s"
    store_activations(hooked2, corpus(), HOOKS, folder, tokens=64, shard=64, exclude=EXCLUDE)
    with pytest.raises(GemmaScopeError, match="is not empty"):
        store_activations(hooked2, corpus(), HOOKS, folder, tokens=64)
    shard = folder / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(BadFileError, match="shard_00000"):
        ActivationStore(folder)
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(BadFileError, match="format 9"):
        ActivationStore(folder)
    index.unlink()
    with pytest.raises(MissingFileError, match="no whole activations"):
        ActivationStore(folder)
