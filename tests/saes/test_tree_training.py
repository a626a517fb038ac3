"""Training a Tree SAE: losses against loops, the tree's life, and a planted hierarchy."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from gemmascope_plugin.errors import ModelError, UnknownNameError
from gemmascope_plugin.saes import TreeSAE, TreeTrainingSAE, TreeTrainingSAEConfig
from gemmascope_plugin.saes.training.step_parts import geometric_median
from gemmascope_plugin.saes.training.tree_steps import aux_loss

D, SIZES, K = 8, (4, 6, 8), (2, 3, 2)
N = sum(SIZES)
WEIGHTS = {"aux": 0.5, "sum_consistency": 2.0, "l0": 0.1}


def learner(seed: int = 0, **changes: Any) -> TreeTrainingSAE:
    fields: dict[str, Any] = {"d_in": D, "d_sae": N, "features_per_layer": SIZES, "k_per_layer": K}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TreeTrainingSAE(TreeTrainingSAEConfig(**{**fields, **changes}))


def batch(n: int = 30, seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 2


def step(sae: TreeTrainingSAE, x: torch.Tensor, number: int = 1) -> Any:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=WEIGHTS,
            dead_neuron_mask=None,
            n_training_steps=number,
            is_logging_step=False,
        )
    )


def test_every_prefix_is_a_reconstruction_of_its_own() -> None:
    sae, x = learner(), batch()
    out = step(sae, x)
    acts = sae.encode(x)
    expected = [(x - sae.decode(acts, x, layers=n)).pow(2).mean() / x.var() for n in (1, 2, 3)]
    got = [out.losses[name] for name in ("prefix_loss_0", "prefix_loss_1", "mse_loss")]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected))
    torch.testing.assert_close(out.sae_out, sae.decode(acts, x))
    torch.testing.assert_close(out.loss, torch.stack(list(out.losses.values())).sum())
    assert not out.losses["auxk_loss"]  # nobody is dead yet
    out.loss.backward()
    assert all(p.grad is not None for p in sae.parameters())


@pytest.mark.parametrize("layer", [0, 1])
def test_dead_features_explain_the_residual(layer: int) -> None:
    sae, x = learner(aux_layers=(layer,), k_aux=2, dead_after_tokens=5), batch()
    start, stop, _ = sae.cfg.layers[layer]
    sae.tokens_since_fired[start : stop - 1] = 6
    with torch.no_grad():
        acts, pre = sae.encode_with_hidden_pre(x)
        out = sae.decode(acts)
    errors = []
    for t, token in enumerate(x):
        residual = (token - out[t]) / (token.std() + 1e-5)
        candidates = [
            (float(pre[t, i]), i)
            for i in range(start, stop - 1)
            if sae.parent[i] == -1 or acts[t, sae.parent[i]] > 1e-3
        ]
        best = [(v, i) for v, i in sorted(candidates, reverse=True)[:2] if v > 0]
        guess = sum((v * sae.W_dec[i] for v, i in best), start=torch.zeros(D))
        errors.append((guess - residual).pow(2).mean() / residual.var())
    got = step(sae, x).losses["auxk_loss"]
    torch.testing.assert_close(got, 0.5 * torch.stack(errors).mean())


def test_aux_loss_trains_dead_features_alone() -> None:
    decoder = torch.randn(4, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pre = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dead = torch.tensor([True, False, True, False])
    aux_loss(batch(5), pre, dead, decoder, k_aux=9).backward()
    assert pre.grad is not None and decoder.grad is not None
    assert (pre.grad[:, dead] != 0).all() and not pre.grad[:, ~dead].any()
    assert not decoder.grad[~dead].any()


@pytest.mark.parametrize("form", ["scalar", "vector"])
def test_sum_consistency_is_the_sum_over_families(form: str) -> None:
    sae, x = learner(sum_consistency=form), batch()
    got = step(sae, x).losses["sum_consistency_loss"]
    acts = sae.encode(x).detach()
    parents = [p for p in range(N) if sae.children_of(p)]
    total = torch.zeros(())
    for p in parents:
        for a in acts:
            if form == "scalar":
                total += (a[p] - sum(a[c] for c in sae.children_of(p))) ** 2
            else:
                below = sum(a[c] * sae.W_dec[c] for c in sae.children_of(p))
                total += (a[p] * sae.W_dec[p] - below).pow(2).sum()
    torch.testing.assert_close(got, 2 * total / len(x) / len(parents))


@pytest.mark.parametrize("form", ["scalar", "vector"])
def test_sum_consistency_of_a_tree_without_families_is_zero(form: str) -> None:
    sae = learner(sum_consistency=form)
    sae.parent.fill_(-1)
    assert step(sae, batch()).losses["sum_consistency_loss"] == 0


def test_thresholds_learn_from_the_number_of_active_features() -> None:
    sae, x = learner(k_per_layer=(2, None, None), bandwidth=1.0), batch()
    losses = step(sae, x).losses
    acts = sae.encode(x)
    expected = 0.1 * (acts[:, 4:] > 0).float().sum(-1).mean()
    torch.testing.assert_close(losses["l0_loss"], expected)
    losses["l0_loss"].backward()
    assert sae.threshold is not None and sae.threshold.grad is not None
    assert (sae.threshold.grad[4:] <= 0).all() and sae.threshold.grad[4:].any()
    assert set(sae.get_coefficients()) == {"aux", "l0"}


def test_the_first_batch_sets_the_bias_and_rows_stay_unit() -> None:
    sae, x = learner(), batch()
    x[0] = 1000 * torch.arange(D)
    step(sae, x, 0)
    scaled = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(scaled))
    around = [(scaled - sae.b_dec - 0.01 * e).norm(dim=-1).sum() for e in torch.eye(D)]
    assert (scaled - sae.b_dec).norm(dim=-1).sum() <= min(around)
    sae.W_dec.data *= 3
    step(sae, x)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(N))


def test_dead_children_move_at_the_scheduled_steps_and_the_tree_freezes() -> None:
    sae = learner(first_reallocation=2, longest_interval=4, freeze_step=12, dead_after_tokens=40)
    x, seen = batch(), []
    sae.W_enc.data[:, 7:] = 0  # these never fire
    for number in range(20):
        before = sae.parent.clone()
        step(sae, x, number)
        changed = (sae.parent != before).nonzero()[:, 0].tolist()
        assert all(child >= 7 for child in changed), "a living child moved"
        if changed:
            seen.append(number)
    assert seen and set(seen) <= {2, 6, 10, 12}  # 2, then +4, then +4; 12 is the root reset
    assert (sae.parent[sae.dead] == -1).all() and sae.dead[7:].all()
    assert not sae.capacity.any()


def test_parents_that_did_not_fire_lately_gain_no_children() -> None:
    sae = learner(dead_after_tokens=10, parent_within_tokens=100)
    sae.tokens_since_fired[:] = 101
    sae.tokens_since_fired[2] = 0
    sae.parent[4:10] = 0
    sae.capacity[1, :5] = 1.0
    sae.reallocate()
    assert sorted(sae.parent[4:10].tolist()) == [-1, -1, -1, 2, 2, 2]


def trained(sae: TreeTrainingSAE, data: Iterator[torch.Tensor], steps: int, size: int) -> None:
    config = SAETrainerConfig(
        total_training_samples=steps * size,
        train_batch_size_samples=size,
        lr=5e-3,
        lr_end=5e-4,
        lr_scheduler_name="constant",
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, data).fit()


def planted(n_parents: int, n_children: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal directions of parents and of their children."""
    rng = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    return basis[:n_parents], basis[n_parents : n_parents * (1 + n_children)]


def hierarchy(parents: torch.Tensor, children: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Two concepts a token, each with one of its own children."""
    rng = torch.Generator().manual_seed(4)
    each = len(children) // len(parents)
    while True:
        scores = torch.rand(size, len(parents), generator=rng)
        x = torch.zeros(size, parents.shape[1])
        for chosen in scores.topk(2).indices.T:
            child = chosen * each + torch.randint(each, (size,), generator=rng)
            strength = 1 + torch.rand(size, 2, generator=rng)
            x += 2 * strength[:, :1] * parents[chosen] + strength[:, 1:] * children[child]
        yield x


def test_a_planted_hierarchy_is_recovered_by_saelens_own_trainer(tmp_path) -> None:
    parents, children = planted(6, 3, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = TreeTrainingSAE(
            TreeTrainingSAEConfig(
                d_in=32,
                d_sae=6 + 18,
                features_per_layer=(6, 18),
                k_per_layer=(2, 2),
                dead_after_tokens=1280,
                parent_within_tokens=2560,
                first_reallocation=20,
                longest_interval=40,
                freeze_step=700,
            )
        )
        trained(sae, hierarchy(parents, children, 128), 800, 128)
    x = next(hierarchy(parents, children, 4000))
    acts = sae.encode(x).detach()
    for child in range(6, 24):  # the gate, after training
        for above in sae.ancestors(child):
            assert (acts[:, above][acts[:, child] > 0] > 1e-3).all()
    right, counted = 0, 0
    rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    to_parent, to_child = rows @ parents.T, rows @ children.T
    for child in range(6, 24):
        best, which = to_child[child].max(0)
        if best > 0.7 and (acts[:, child] > 0).any() and sae.parent_of(child) != -1:
            counted += 1
            right += int(to_parent[sae.parent_of(child)].argmax()) == int(which) // 3
    assert counted >= 9
    assert right / counted > 0.75  # by chance 1 in 6
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TreeSAE and set(loaded.state_dict()) == {
        "W_enc",
        "W_dec",
        "b_dec",
        "parent",
    }
    assert torch.equal(loaded.encode(x), sae.encode(x)) and torch.equal(loaded(x), sae(x))
    details = loaded.cfg.metadata.training_architecture_details
    assert details["freeze_step"] == 700 and loaded.cfg.metadata.training_architecture == "tree"


def test_a_checkpoint_keeps_the_state_of_the_tree(tmp_path) -> None:
    sae = learner(sum_consistency="vector", aux_layers=(0, 1))
    for number in range(3):
        step(sae, batch(seed=number), number)
    sae.save_model(tmp_path)
    again = TreeTrainingSAE.load_from_disk(tmp_path)
    assert type(again) is TreeTrainingSAE and again.cfg.to_dict() == sae.cfg.to_dict()
    for name, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    torch.testing.assert_close(step(again, batch(), 3).loss, step(sae, batch(), 3).loss)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"aux_layers": (3,)}, ModelError, r"aux_layers=\(3,\).*layers 0 to 2"),
        ({"sum_consistency": "both"}, UnknownNameError, "Unknown sum consistency 'both'"),
        ({"sum_consistency": "vector", "gate": "none"}, ModelError, "children fire without"),
        ({"gate": "closed"}, UnknownNameError, "Unknown gate 'closed'.*coverage, none"),
        ({"first_reallocation": 0}, ModelError, "is 0 steps"),
        ({"k_per_layer": (5, 3, 2)}, ModelError, "layer 0 has 4 features and k = 5"),
    ],
)
def test_impossible_training(changes, error, match: str) -> None:
    from tests.factories import unchecked

    fields: dict[str, Any] = {"d_in": D, "d_sae": N, "features_per_layer": SIZES, "k_per_layer": K}
    cfg = object.__new__(TreeTrainingSAEConfig)
    with pytest.raises(error, match=match):
        unchecked(TreeTrainingSAEConfig.__init__)(cfg, **{**fields, **changes})
