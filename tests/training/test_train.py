"""``train()``: what comes out, in every architecture, and what it says when it cannot go on."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class

import gemmascope_plugin as gs
from gemmascope_plugin import saes
from gemmascope_plugin.catalog import SaeSpec
from gemmascope_plugin.errors import (
    EmptySelectionError,
    GemmaScopeError,
    MissingExtraError,
    UnknownNameError,
)
from gemmascope_plugin.files.whole import remove
from gemmascope_plugin.loading import load
from gemmascope_plugin.loading.export import export
from gemmascope_plugin.splice import splice
from gemmascope_plugin.training import (
    ARCHITECTURES,
    Architecture,
    TrainingStoppedError,
    collect_activations,
    train,
    train_many,
)
from gemmascope_plugin.training.learner import Learner
from gemmascope_plugin.training.run_folder import unique_names
from tests.support.rounding import assert_rounded
from tests.training.cases import corpus, run, same, spec

RESIDUAL = "blocks.1.hook_resid_post"
EXPORTED: list[dict[str, Any]] = [
    {},
    {"scale": "unit", "subtract_b_dec": True, "sparsity": "step", "sparsity_coefficient": 1e-4},
    {"site": "att", "layout": "gemma-scope-2"},
    {"architecture": "batchtopk", "subtract_b_dec": True},
    {"architecture": "matryoshka_batchtopk", "levels": [8, 24], "scale": "none"},
    {"architecture": "gemma_scope_jumprelu", "scale": "unit", "subtract_b_dec": True},
    {"architecture": "standard", "sparsity_coefficient": 0.1, "sparsity_warm_up": 5},
    {"architecture": "jumprelu_transcoder"},
    {"architecture": "jumprelu_transcoder", "gain": "with"},
    {"architecture": "jumprelu_skip_transcoder", "gain": "with", "layout": "gemma-scope-2"},
    {"architecture": "jumprelu_skip_transcoder", "gain": "without"},
]

KEPT: list[dict[str, Any]] = [
    {"architecture": "topk"},
    {"architecture": "matryoshka_prefix_batchtopk", "levels": [8, 24]},
    {"architecture": "matryoshka_prefix_jumprelu", "levels": [8, 24], "scale": "unit"},
    {"architecture": "tree", "levels": [8, 24], "scale": "layer_norm"},
    {"architecture": "tree", "levels": [8, 16, 24], "subtract_b_dec": True},
    {"architecture": "softsae", "scale": "unit"},
    {"architecture": "softsae", "scale": "layer_norm", "subtract_b_dec": True},
    {"architecture": "soft_topk", "subtract_b_dec": True},
]
"""Architectures whose classes or levels have no place in Gemma Scope's layouts."""


def activations(model: Any, hook: str) -> torch.Tensor:
    return collect_activations(model, corpus(), [hook], exclude=(2, 1, 0))[hook]


@pytest.mark.parametrize("changes", EXPORTED, ids=str)
def test_both_formats_give_identical_activations(hooked2, tmp_path, changes: dict) -> None:
    recipe = spec(**changes, model="gemma-2-toy")
    sae = run(hooked2, recipe, run_dir=tmp_path / "r")
    from_saelens = SAE.load_from_disk(tmp_path / "r/final")
    transcoder = "transcoder" in recipe.architecture
    kind, site = ("transcoder", "mlp") if transcoder else ("sae", recipe.site)
    (file,) = (tmp_path / "r/export").rglob("params.*")
    entry = SaeSpec.from_folder(file.parent, model="gemma-2-toy", site=site, layer=1, kind=kind)
    assert entry.gain == recipe.gain and entry.hook_in == recipe.hooks(kind)[0]
    from_export = load(entry)
    assert type(from_saelens) is type(from_export) is type(sae)
    assert same(from_saelens, sae) and same(from_export, sae)
    assert entry.hook_in == sae.cfg.metadata.hook_name
    read, _ = recipe.hooks(kind)
    x = torch.randn(40, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
    acts = [saes.encode(dictionary, x) for dictionary in (sae, from_saelens, from_export)]
    # the same weights at other addresses: rounding may differ
    for other in acts[1:]:
        assert_rounded(other, acts[0], sae.cfg.d_in)
    out = [saes.decode(dictionary, acts[0], x) for dictionary in (sae, from_saelens, from_export)]
    for other in out[1:]:
        assert_rounded(other, out[0], sae.cfg.d_sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert not sae.cfg.apply_b_dec_to_input and float(sae.threshold.min()) >= 0
    assert read == sae.cfg.metadata.hook_name
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def test_embeddings_are_written_without_their_factor(hooked2, tmp_path) -> None:
    sae = run(hooked2, spec(site="embedding", layer=0), run_dir=tmp_path / "r")
    (file,) = (tmp_path / "r/export/embedding").rglob("params.npz")
    entry = SaeSpec.from_folder(file.parent, model="toy", site="embedding", layer=0)
    for name, value in load(entry).state_dict().items():
        torch.testing.assert_close(value, sae.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert entry.hook_in == sae.cfg.metadata.hook_name == "hook_embed"


@pytest.mark.parametrize("changes", KEPT, ids=str)
def test_saelens_reads_back_what_splices(hooked2, tmp_path, changes: dict) -> None:
    sae = run(hooked2, spec(**changes), run_dir=tmp_path / "r")
    loaded = SAE.load_from_disk(tmp_path / "r/final")
    assert type(loaded) is type(sae) and same(loaded, sae)
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    tokens = corpus()[:3]
    with splice(hooked2, sae, error="drop", exclude=(2, 1, 0)) as spliced:
        logits = spliced(tokens)
    with splice(hooked2, loaded, error="drop", exclude=(2, 1, 0)) as respliced:
        assert torch.equal(respliced(tokens), logits)
    x = activations(hooked2, RESIDUAL)
    acts = sae.encode(x)
    torch.testing.assert_close(saes.coder_of(sae).encode_sparse(x).to_dense(), acts)
    torch.testing.assert_close(saes.reconstruct(saes.coder_of(sae), acts, x), sae(x))
    assert 0 < sae.cfg.metadata.l0 <= 24
    assert (
        not changes.get("levels")
        or "tree" in changes["architecture"]
        or (sae.cfg.metadata.levels == [8, 24])
    )


@pytest.mark.parametrize("changes", [*EXPORTED, *KEPT], ids=str)
def test_the_result_is_the_trained_dictionary_in_raw_units(hooked2, monkeypatch, changes) -> None:
    import gemmascope_plugin.training.run as module

    learners: list[Learner] = []
    real = module.finished
    monkeypatch.setattr(module, "finished", lambda item: learners.append(item) or real(item))
    sae = run(hooked2, spec(**changes))
    (learner,) = learners
    generator = torch.Generator().manual_seed(1)
    bucket = {
        hook: 3 * torch.randn(64, width, generator=generator)
        for hook, width in (
            (learner.hooks_in[0], sae.cfg.d_in),
            (learner.hooks_out[0], sae.W_dec.shape[1]),
        )
    }
    trained = learner.sae.eval()
    inputs = learner.inputs(bucket)
    with torch.no_grad():
        if "batchtopk" in learner.spec.architecture:
            # Trained on the largest of a batch, saved with one threshold.
            pre = trained.encode_with_hidden_pre(inputs)[1]
            acts = torch.where(pre > trained.topk_threshold, pre.relu(), 0)
            expected = trained.decode(acts) / learner.scales[1][0]
        else:
            expected = trained(inputs[:, : sae.cfg.d_in]) / learner.scales[1][0]
    if sae.cfg.reshape_activations == "hook_z":
        sae.turn_off_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(sae(bucket[learner.hooks_in[0]]), expected, rtol=1e-3, atol=1e-4)


def test_training_explains_the_activations_and_says_how_much(hooked2, tmp_path) -> None:
    recipe = spec(d_sae=64, steps=250, target_l0=6.0, lr=1e-2, sparsity_coefficient=0.05)
    sae = run(hooked2, recipe, run_dir=tmp_path / "r")
    x = activations(hooked2, RESIDUAL)
    acts = saes.encode(sae, x)
    fvu = (x - saes.decode(sae, acts)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert fvu < 0.5
    assert sae.cfg.metadata.l0 == pytest.approx(float(acts.gt(0).sum(-1).float().mean()), rel=0.15)
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    keys = ["dictionary", "step", "tokens", "loss", "losses", "l0", "fvu", "dead_share", "lr"]
    assert list(rows[0]) == [*keys, "tokens_per_second"]
    assert (rows[0]["step"], rows[0]["tokens"], len(rows)) == (10, 320, 26)
    assert rows[0]["loss"] == pytest.approx(sum(rows[0]["losses"].values()), rel=1e-5)
    assert rows[-1]["final"] and rows[-1]["fvu"] == sae.cfg.metadata.fvu < rows[0]["fvu"]
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["specs"]["res_1"]["seed"] == 7 and "torch" in config["versions"]


def test_the_seed_decides_and_the_random_state_of_others_is_left_alone(hooked2) -> None:
    before = torch.get_rng_state()
    first = run(hooked2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert same(first, run(hooked2))
    assert not same(first, run(hooked2, spec(seed=8)))


def test_trained_together_is_trained_alone(hooked2) -> None:
    specs = [
        spec(),
        spec(layer=0, site="att"),
        spec(architecture="jumprelu_skip_transcoder"),
        spec(),
    ]
    together = train_many(hooked2, specs, corpus(), progress=False)
    assert list(together) == ["res_1", "att_0", "jumprelu_skip_transcoder_1", "res_1-2"]
    for recipe, sae in zip(specs, together.values(), strict=True):
        assert same(sae, run(hooked2, recipe))
    assert same(together["res_1"], together["res_1-2"])
    assert list(unique_names(specs)) == list(together)
    with pytest.raises(GemmaScopeError, match="differ in batch"):
        train_many(hooked2, [spec(), spec(batch_size=16)], corpus(), progress=False)
    with pytest.raises(GemmaScopeError, match="nothing to train"):
        train_many(hooked2, [], corpus())


def test_the_affine_skip_starts_at_zero_and_learns_what_is_linear(hooked2) -> None:
    hooks = {"hook_in": "blocks.1.attn.hook_z", "hook_out": "blocks.1.hook_attn_out"}
    # The post-norm divides by a norm, otherwise this would be linear.
    values = {"d_sae": 16, "steps": 200, "lr": 1e-2, "target_l0": 2.0, **hooks}
    plain = run(hooked2, spec(architecture="jumprelu_transcoder", **values))
    skip = run(hooked2, spec(architecture="jumprelu_skip_transcoder", **values))
    assert plain.W_enc.shape == (48, 16) and plain.W_dec.shape == (16, 32)
    assert skip.W_skip.shape == (32, 48)
    assert skip.cfg.metadata.fvu < 0.5 * plain.cfg.metadata.fvu
    bucket = {
        name: torch.randn(8, width) for name, width in zip(hooks.values(), (48, 32), strict=True)
    }
    recipe = spec(architecture="jumprelu_skip_transcoder", **values)
    fresh = Learner(recipe, bucket, model_name="m", device=torch.device("cpu"))
    assert not fresh.sae.W_skip.any()
    assert not torch.equal(fresh.sae.W_enc[:32].T, fresh.sae.W_dec)


@pytest.mark.parametrize("architecture", ["jumprelu", "jumprelu_skip_transcoder"])
def test_the_result_can_be_spliced(model, architecture: str) -> None:
    gain = {} if architecture == "jumprelu" else {"gain": "with"}
    sae = run(model, spec(architecture=architecture, **gain))
    tokens = corpus()[:3]
    bare = model(tokens)
    with gs.splice(model, gs.HookedSAE(sae, exclude=(2,))) as spliced:
        torch.testing.assert_close(spliced(tokens), bare, rtol=1e-4, atol=1e-4)
    with gs.splice(model, gs.HookedSAE(sae, exclude=(2,), error="drop")) as spliced:
        assert not torch.allclose(spliced(tokens), bare, atol=1e-3)


def test_layer_norm_stays_in_the_dictionary_and_has_no_gemma_scope_form(hooked2, tmp_path) -> None:
    sae = run(hooked2, spec(scale="layer_norm"), run_dir=tmp_path / "r")
    assert SAE.load_from_disk(tmp_path / "r/final").cfg.normalize_activations == "layer_norm"
    assert not (tmp_path / "r/export").exists()
    x = activations(hooked2, RESIDUAL)[:8]
    torch.testing.assert_close(sae.encode(5 * x + 3), sae.encode(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(GemmaScopeError, match="cannot be written.*it normalises its input"):
        export(sae, tmp_path / "e", layout="npz", site="res", layer=1, l0=1.0)
    topk = run(hooked2, spec(architecture="topk"))
    with pytest.raises(GemmaScopeError, match="a 'topk' is not a JumpReLU dictionary"):
        export(topk, tmp_path / "e", layout="npz", site="res", layer=1, l0=1.0)
    skip = run(hooked2, spec(architecture="jumprelu_skip_transcoder"), run_dir=tmp_path / "s")
    with pytest.raises(GemmaScopeError, match="has no affine skip; layout='gemma-scope-2' has"):
        export(skip, tmp_path / "e", layout="npz", site="mlp", layer=1, l0=1.0)
    plain = run(hooked2, spec(architecture="jumprelu_transcoder", gain="with"))
    with pytest.raises(GemmaScopeError, match="read without gain; layout='gemma-scope-2'"):
        export(plain, tmp_path / "e", layout="npz", site="mlp", layer=1, l0=1.0, gain="with")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"jumprelu_tanh_scal": 2.0}}, "Did you mean 'jumprelu_tanh_scale'"),
        ({"options": {"l0_coefficient": 2.0}}, "'l0_coefficient' is not an option of"),
        ({"architecture": "topk", "target_l0": 2.5}, "target_l0=2.5 is not a number of features"),
        ({"architecture": "matryoshka_batchtopk"}, r"levels=\(\) do not make a Matryoshka"),
        ({"architecture": "tree"}, r"levels=\(\) do not make a tree"),
        (
            {"architecture": "tree", "levels": [8, 24], "target_l0": 1},
            "target_l0=1 is too little for 2 layers",
        ),
        (
            {"architecture": "soft_topk", "target_l0": 2.5},
            "target_l0=2.5 is not a number of features",
        ),
        ({"architecture": "softsae", "target_l0": 13}, "k is 13.0, for 24 features"),
    ],
)
def test_what_an_architecture_refuses(hooked2, changes: dict, message: str) -> None:
    with pytest.raises(GemmaScopeError, match=message):
        run(hooked2, spec(**changes))
    sae = run(hooked2, spec(sparsity="tanh", options={"jumprelu_tanh_scale": 2.0}, steps=8))
    assert sae.cfg.metadata.training_architecture_details["jumprelu_tanh_scale"] == 2.0


@pytest.mark.parametrize("name", ["gated", "matching_pursuit"])
def test_any_training_class_of_saelens_is_one_entry(hooked2, tmp_path, monkeypatch, name) -> None:
    sae_class, config_class = get_sae_training_class(name)
    row = Architecture(
        sae_class, config_class, lambda spec: {}, frozenset({"options", "subtract_b_dec"})
    )
    monkeypatch.setitem(ARCHITECTURES, name, row)
    recipe = spec(architecture=name, options={"decoder_init_norm": 1.0})
    sae = run(hooked2, recipe, run_dir=tmp_path / "r", checkpoint_every=10)
    remove(tmp_path / "r/checkpoints/step_24")
    resumed = run(hooked2, recipe, run_dir=tmp_path / "r", resume=True)
    assert sae.cfg.architecture() == name and same(sae, resumed)
    assert same(sae, SAE.load_from_disk(tmp_path / "r/final"))


def test_stops_say_step_checkpoint_and_advice(hooked2, tmp_path, monkeypatch) -> None:
    def failing_at(step: int, fault: Exception | None) -> Any:
        real = Learner.inputs

        def inputs(self: Learner, bucket: Any) -> torch.Tensor:
            x = real(self, bucket)
            if self.trainer.n_training_steps != step:
                return x
            if fault is not None:
                raise fault
            return x * float("inf")

        return inputs

    cases: list[tuple[Exception | None, str]] = [
        (None, r"step 11: the loss is (nan|inf) .*step_10.*lower lr"),
        (MemoryError("no room"), r"step 11: out of memory \(no room\).*step_10.*smaller batch"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory .*step_10"),
    ]
    for number, (fault, message) in enumerate(cases):
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "inputs", failing_at(11, fault))
            with pytest.raises(TrainingStoppedError, match=message) as caught:
                run(hooked2, run_dir=tmp_path / str(number), checkpoint_every=5)
        assert caught.value.step == 11
        assert caught.value.checkpoint == tmp_path / str(number) / "checkpoints/step_10"
        resumed = run(hooked2, run_dir=tmp_path / str(number), resume=True)
        assert same(resumed, run(hooked2))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "inputs", failing_at(3, None))
        with pytest.raises(TrainingStoppedError, match="last good checkpoint: none"):
            run(hooked2)


def test_gradients_that_are_not_finite_change_no_weight(hooked2) -> None:
    bucket = {RESIDUAL: torch.randn(32, 32, generator=torch.Generator().manual_seed(0))}
    learner = Learner(spec(), bucket, model_name="m", device=torch.device("cpu"))
    learner.step(bucket)
    before = {name: p.detach().clone() for name, p in learner.sae.named_parameters()}
    learner.sae.b_enc.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ArithmeticError, match="the norm of the gradients is nan"):
        learner.step(bucket)
    assert all(torch.equal(p, before[name]) for name, p in learner.sae.named_parameters())


@pytest.mark.parametrize("clip", [0.01, 1.0, 50.0])
def test_gradients_are_clipped_where_the_spec_says(clip: float) -> None:
    bucket = {RESIDUAL: torch.randn(64, 32, generator=torch.Generator().manual_seed(0))}
    recipe = spec(max_grad_norm=clip)
    learner = Learner(recipe, bucket, model_name="m", device=torch.device("cpu"))
    twin = Learner(recipe, bucket, model_name="m", device=torch.device("cpu"))
    step_input = SimpleNamespace(
        sae_in=twin.inputs(bucket),
        coefficients={"l0": recipe.sparsity_coefficient},
        dead_neuron_mask=torch.zeros(24, dtype=torch.bool),
    )
    twin.sae.training_forward_pass(step_input).loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.sae.parameters(), clip)
    seen: list[torch.Tensor] = []
    learner.trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in learner.sae.parameters())
    )
    learner.step(bucket)
    for gradient, parameter in zip(seen, twin.sae.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_wandb_only_if_asked_for(hooked2, monkeypatch) -> None:
    logged: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **kwargs: logged.append(kwargs) or fake,
        log=lambda row, step: logged.append((step, row)),
        finish=lambda: logged.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(hooked2, spec(steps=20), wandb="project")
    assert logged[0]["project"] == "project" and logged[-1] == "finished"
    assert [entry[0] for entry in logged[1:-1]] == [10, 20, 20]
    assert {"res_1/loss", "res_1/mse_loss", "res_1/l0"} <= set(logged[1][1])
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(hooked2, spec(steps=20))
    with pytest.raises(MissingExtraError, match="wandb was asked for and is not installed"):
        run(hooked2, spec(steps=20), wandb="project")


def test_some_fields_and_a_preset_make_a_spec(hooked2) -> None:
    fields = {"layer": 0, "d_sae": 16, "steps": 12, "batch_size": 64, "exclude": (2, 1, 0)}
    sae = train(hooked2, fields, corpus(), preset="quick", progress=False)
    assert sae.W_enc.shape == (32, 16)
    assert same(sae, train(hooked2, fields, corpus(), progress=False))
    with pytest.raises(UnknownNameError, match="Did you mean 'quick'"):
        train(hooked2, fields, corpus(), preset="quck")


def test_mistakes_come_before_work(hooked2, tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="Unknown architecture"):
        run(hooked2, spec(architecture="gatd"), run_dir=tmp_path / "r")
    with pytest.raises(EmptySelectionError, match="fewer than one batch of 1000"):
        run(hooked2, spec(batch_size=1000, bucket=1000), run_dir=tmp_path / "r")
    with pytest.raises(UnknownNameError, match="is not an option of"):
        run(hooked2, spec(options={"x": 1}), run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()
