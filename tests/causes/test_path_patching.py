"""Path patching equals brute force, for every kind of sender and receiver and every kind of path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemmascope_plugin.causes import FeatureId, Task, logit_diff
from gemmascope_plugin.causes.exact.path_patching import path_patching
from gemmascope_plugin.causes.names import Stream
from gemmascope_plugin.errors import EmptySelectionError, TaskError, UnknownNameError
from gemmascope_plugin.graphs.node import Node, Reader
from gemmascope_plugin.models import flatten_heads, restore_heads
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.arithmetic import Arithmetic
from gemmascope_plugin.models.load_model import bridge_from_hf, hooked_from_hf
from tests import factories
from tests.causes.paths_slow import CORRUPT, TASK, base_metric, copied, delivered, difference
from tests.causes.tasks import CLEAN, LATE, metric_under, values_at
from tests.factories import tiny_hf, tiny_model, tiny_tokenizer
from tests.splice import cross_layer_cases
from tests.splice.cross_layer_reference import layer_features
from tests.splice.reference import features
from tests.support.rounding import TINY
from tests.tiny_models import FIRST_WORD_ID

SENDERS: dict[Any, dict[str, Any]] = {
    "embed": {"hook_embed": None},
    "L0H1": {"blocks.0.attn.hook_z": [1]},
    "MLP0": {"blocks.0.hook_mlp_out": None},
    "L0H0 + L0H3": {"blocks.0.attn.hook_z": [0, 3]},
    "blocks.1.hook_resid_pre": {"blocks.1.hook_resid_pre": None},
}
RECEIVERS: dict[str, tuple[str, str, int | None]] = {
    "L2H1.q": ("blocks.2.hook_resid_pre", "blocks.2.hook_q_input", 1),
    "L1KV1.k": ("blocks.1.hook_resid_pre", "blocks.1.hook_k_input", 1),
    "L2KV0.v": ("blocks.2.hook_resid_pre", "blocks.2.hook_v_input", 0),
    "MLP1": ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in", None),
    "blocks.2.hook_resid_pre": ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_pre", None),
    "logits": ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post", None),
}
KEEP = (CLEAN >= FIRST_WORD_ID)[..., None]


def named(label: str) -> Any:
    return label.split(" + ") if " + " in label else label


def expected(model: Any, sent: dict[str, Any], receiver: str, paths: str = "direct") -> float:
    stream, hook, head = RECEIVERS[receiver]
    d = difference(model, sent, stream, paths)
    return delivered(model, {hook: (head, d)})


def check_grid(
    model: Any,
    paths: Any,
    senders: list[str],
    receivers: list[str],
    tolerance: float = 1e-5,
) -> None:
    effects = path_patching(
        model, TASK, [named(s) for s in senders], receivers, paths=paths, max_rows=14
    )
    assert effects.labels == {"sender": tuple(senders), "receiver": tuple(receivers)}
    sizes = []
    for row, sender in enumerate(senders):
        for column, receiver in enumerate(receivers):
            want = expected(model, SENDERS[sender], receiver, paths)
            assert abs(float(effects.values[row, column]) - want) < tolerance, (sender, receiver)
            sizes.append(abs(want))
    assert min(sizes) > 5 * tolerance  # each pair tells right from wrong


def test_direct_paths(model) -> None:
    check_grid(model, "direct", list(SENDERS), list(RECEIVERS))


def test_direct_paths_in_double_precision(double) -> None:
    check_grid(double, "direct", ["L0H1", "L0H0 + L0H3"], list(RECEIVERS), 1e-6)


def test_paths_through_mlps(model) -> None:
    check_grid(model, "mlps", ["L0H1"], ["L2H1.q", "MLP1", "logits"])


def test_all_paths(model) -> None:
    check_grid(model, "total", ["L0H0 + L0H3"], ["L2KV0.v", "blocks.2.hook_resid_pre", "logits"])


def test_all_paths_to_the_logits_are_the_patch_itself(hooked2) -> None:
    effects = path_patching(hooked2, TASK, "L0H1", "logits", paths="total")
    clean = values_at(hooked2, CLEAN, "blocks.0.attn.hook_z")

    def patch(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, 1] = clean[:, :, 1]
        return z

    want = metric_under(hooked2, CORRUPT, {"blocks.0.attn.hook_z": patch}) - base_metric(hooked2)
    assert abs(float(effects.values) - want) < 1e-5
    direct = path_patching(hooked2, TASK, "L0H1", "logits")
    assert abs(float(direct.values) - want) > 1e-3


@torch.no_grad()
def test_the_naive_difference_is_another_effect(model) -> None:
    """Without the norm after attention; and heads of a layer one by one do not sum to both."""
    anatomy = Anatomy(model)
    dz = values_at(model, CLEAN, "blocks.0.attn.hook_z")
    dz = dz - values_at(model, CORRUPT, "blocks.0.attn.hook_z")
    naive = anatomy.head_results(0, dz)[:, :, 1]
    got = float(path_patching(model, TASK, "L0H1", "L2H1.q").values)
    wrong = delivered(model, {"blocks.2.hook_q_input": (1, naive)})
    assert abs(wrong - got) > 0.1 * abs(got)
    both = difference(model, SENDERS["L0H0 + L0H3"], "blocks.2.hook_resid_post")
    each = [
        difference(model, {"blocks.0.attn.hook_z": [h]}, "blocks.2.hook_resid_post") for h in (0, 3)
    ]
    assert float((both - sum(each)).norm() / both.norm()) > 1e-2


@pytest.mark.parametrize("port", ["k", "v"])
def test_the_copy_of_one_query_head(model, port) -> None:
    d = difference(model, SENDERS["embed"], "blocks.1.hook_resid_pre")
    receivers = [f"L1H{head}.{port}" for head in (0, 3)]
    effects = path_patching(model, TASK, "embed", [*receivers, f"L1KV0.{port}"])
    for head, got in zip((0, 3), effects.values[0].tolist(), strict=False):
        want = copied(model, 1, head, port, d)
        assert abs(got - want) < 1e-5
        assert abs(want) > 1e-4
    assert abs(float(effects.values[0, 0] - effects.values[0, 2])) > 1e-4


def test_copies_for_a_whole_group_are_the_group(hooked2) -> None:
    copies = [["L1H0.k", "L1H1.k", "L2H2.k", "L2H3.k", "L2H2.v", "L2H3.v", "L2H3.q"]]
    groups = [["L1KV0.k", "L2KV1.k", "L2KV1.v", "L2H3.q"]]
    of_copies, of_groups = (
        path_patching(hooked2, TASK, "embed", r).values for r in (copies, groups)
    )
    assert abs(float(of_copies - of_groups)) < 1e-5
    assert abs(float(of_copies)) > 1e-3


def test_sets_change_together(model) -> None:
    """Later receivers see what earlier ones make of their change, and get their own on top."""
    names = ["L1KV1.k", "L2H1.q", "MLP1", "logits"]
    effects = path_patching(model, TASK, ["embed", "L0H1"], names, joint=True)
    assert effects.labels == {"sender": ("embed + L0H1",), "receiver": (" + ".join(names),)}
    sent = {**SENDERS["embed"], **SENDERS["L0H1"]}
    received = {
        hook: (head, difference(model, sent, stream))
        for stream, hook, head in (RECEIVERS[name] for name in names)
    }
    assert abs(float(effects.values) - delivered(model, received)) < 1e-5


def test_noising_is_the_other_direction(hooked2) -> None:
    noising = path_patching(hooked2, TASK, "L0H1", "MLP1", direction="noising")
    swapped = Task(CORRUPT, CLEAN, TASK.metric)
    assert torch.allclose(
        noising.values, path_patching(hooked2, swapped, "L0H1", "MLP1").values, atol=TINY
    )
    assert noising.metadata["direction"] == "noising"
    assert noising.metadata["method"] == "path patching, direct"


def change_of(sae: Any, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How all features change from the first tensor to the second, where tokens are words."""
    return (features(sae, flatten_heads(other)) - features(sae, flatten_heads(x))) * KEEP


def strongest(change: torch.Tensor) -> int:
    """The feature that changes most at the end, where the logits are read."""
    return int(change[:, -1].abs().amax(0).argmax())


@pytest.mark.parametrize("site", ["residual", "attention", "mlp", "transcoder"])
def test_features_send_their_decoder_rows(model, site) -> None:
    check_feature(model, site, "direct")


@pytest.mark.parametrize("site", ["residual", "attention"])
def test_features_send_along_all_paths(hooked2, site) -> None:
    check_feature(hooked2, site, "total")


@torch.no_grad()
def check_feature(model: Any, site: str, paths: Any) -> None:
    sae = getattr(factories, site)(model, 0, seed=11)
    meta = sae.cfg.metadata
    name = meta.hook_name_out or meta.hook_name
    x, other = (values_at(model, tokens, meta.hook_name) for tokens in (CORRUPT, CLEAN))
    change = change_of(sae, x, other)
    f = strongest(change)
    step = change[..., [f]] * sae.W_dec[f]
    step = restore_heads(step, x) if site == "attention" else step
    receivers = ["L2H1.q", "logits"]
    got = path_patching(model, TASK, FeatureId(name, f), receivers, saes=[sae], paths=paths)
    for receiver, value in zip(receivers, got.values[0].tolist(), strict=True):
        assert abs(value - expected(model, {name: step}, receiver, paths)) < 1e-5
    assert got.labels["sender"] == (f"{name}/{f}",)
    assert abs(float(got.values[0, 1])) > 1e-4


@torch.no_grad()
def test_cross_layer_features_send_at_every_output(model, hf) -> None:
    code = cross_layer_cases.made("clt", model, hf)
    weights, mid = (
        code.weights(0),
        [values_at(model, t, "blocks.0.hook_resid_mid") for t in (CORRUPT, CLEAN)],
    )
    ln2 = Anatomy(model).norm(0, "ln2")
    assert ln2 is not None
    gained = code.cfg.hooks_in[0].endswith("mlp.hook_in")
    x, other = (ln2(m) if gained else m / ln2.scale(m) for m in mid)
    change = (layer_features(weights, other) - layer_features(weights, x)) * KEEP
    f = strongest(change)
    sent = {
        f"blocks.{layer}.hook_mlp_out": change[..., [f]] * weights.W_dec[f, layer]
        for layer in range(3)
    }
    label = f"{code.cfg.hooks_out[0]}/{f}"
    got = path_patching(model, TASK, label, ["L2H1.q", "logits"], saes=code)
    for receiver, value in zip(("L2H1.q", "logits"), got.values[0].tolist(), strict=True):
        assert abs(value - expected(model, sent, receiver)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("site", ["residual", "transcoder"])
def test_features_receive(model, site) -> None:
    sae = getattr(factories, site)(model, 1, seed=12)
    meta = sae.cfg.metadata
    name = meta.hook_name_out or meta.hook_name
    stream = name if site == "residual" else "blocks.1.hook_resid_mid"
    x = values_at(model, CORRUPT, stream)
    other = x + difference(model, SENDERS["embed"], stream)
    if site == "transcoder":
        x, other = (
            t / (t.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() for t in (x, other)
        )
    change = change_of(sae, x, other)
    f = strongest(change)
    step = change[..., [f]] * sae.W_dec[f]
    want = metric_under(model, CORRUPT, {name: lambda y: y + step}) - base_metric(model)
    got = path_patching(model, TASK, "embed", f"{name}/{f}", saes=[sae])
    assert abs(float(got.values) - want) < 1e-5
    assert abs(want) > 1e-4


def test_half_precision(hooked2) -> None:
    half = copy.deepcopy(hooked2).to(torch.bfloat16)
    receivers = ["L2H1.q", "L1H1.k", "L1H1.v", "MLP1", "logits"]
    rough, fine = (path_patching(m, TASK, ["embed", "L0H1"], receivers) for m in (half, hooked2))
    assert torch.allclose(rough.values, fine.values, atol=0.02)


def test_where_no_path_leads_there_is_no_effect(hooked2) -> None:
    effects = path_patching(hooked2, TASK, ["L1H0", "embed"], ["MLP0", "L2H0.q", "logits"])
    assert effects.values[0, 0] == 0
    assert (effects.values != 0).sum() == 5
    with pytest.raises(
        EmptySelectionError, match="No path leads from L1H0 to MLP0, L1H2.q.*behind"
    ):
        path_patching(hooked2, TASK, "L1H0", ["MLP0", "L1H2.q"])


def test_prompts_of_several_lengths(hooked2) -> None:
    clean, corrupt = ["w9 w8 w7", "w30 w31 w32 w33 w34"], ["w9 w5 w7", "w30 w31 w42 w33 w34"]
    both = Task(clean, corrupt, logit_diff([10, 20], [30, 40]))
    single = [
        Task(c, k, logit_diff([r], [w]))
        for c, k, r, w in zip(clean, corrupt, (10, 20), (30, 40), strict=True)
    ]
    for paths in ("direct", "total"):
        whole = path_patching(hooked2, both, ["L0H1", "MLP0"], ["L2H1.q", "logits"], paths=paths)
        each = [
            path_patching(hooked2, task, ["L0H1", "MLP0"], ["L2H1.q", "logits"], paths=paths).values
            for task in single
        ]
        assert torch.allclose(whole.values, torch.stack(each).mean(0), atol=1e-5)


def test_nodes_stand_for_their_names(hooked2) -> None:
    by_node = path_patching(
        hooked2, TASK, [Node.head(0, 1), Stream("blocks.1.hook_resid_pre")], "logits"
    )
    by_name = path_patching(
        hooked2, TASK, ["L0H1", "blocks.1.hook_resid_pre"], Reader(Node.logits()), max_rows=1
    )
    assert by_node.labels == by_name.labels
    assert torch.allclose(by_node.values, by_name.values, atol=TINY)
    assert by_node.values_by_prompt is not None
    assert by_node.values_by_prompt.shape == (2, 1, len(CLEAN))
    assert by_name.to_frame()["sender"].tolist() == ["L0H1", "blocks.1.hook_resid_pre"]
    assert by_node.plot().data[0].type == "heatmap"


def test_mistakes(hooked2) -> None:
    sae = factories.mlp(hooked2, 0)
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        ("l0h1", "logits", {}, UnknownNameError, "'l0h1' names no node.*Did you mean 'L0H1'"),
        ("L9H1", "logits", {}, UnknownNameError, "no L9H1.*layers 0 to 2, heads 0 to 3"),
        ("L0KV1", "logits", {}, UnknownNameError, "L0KV1 writes nothing.*MLP0"),
        ("embed", "L1H1", {}, UnknownNameError, "several inputs.*L1H1.q, L1H1.k, L1H1.v"),
        ("embed", "L1KV0.q", {}, UnknownNameError, "Unknown input of L1KV0 'q'.*k, v"),
        ("embed", "embed", {}, UnknownNameError, "The embedding reads nothing"),
        ([], "logits", {}, EmptySelectionError, "No sender or no receiver is named"),
        (
            "blocks.0.hook_mlp_out/3",
            "logits",
            {},
            UnknownNameError,
            "no dictionary was given.*load",
        ),
        ("embed", "blocks.0.hook_mlp_out/3", {"saes": sae}, UnknownNameError, "is not a stream"),
        (
            [["MLP0", "blocks.0.hook_mlp_out/3"]],
            "logits",
            {"saes": sae},
            TaskError,
            "blocks.0.hook_mlp_out/3 is a part of MLP0.*one of the two",
        ),
        ("embed", [["L1KV0.k", "L1H1.k"]], {}, TaskError, "L1H1.k may be a copy of L1KV0.k"),
    ]
    for senders, receivers, options, error, message in cases:
        with pytest.raises(error, match=message):
            path_patching(hooked2, TASK, senders, receivers, **options)
    assert factories.n_hooks(hooked2) == 0


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("paths", ["direct", "mlps", "total"])
def test_late_passes_give_what_whole_ones_do(paths: str, backend: str, monkeypatch) -> None:
    """Prompts begin to differ at several positions; whole passes are those of the model's modules."""
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    half = build(copy.deepcopy(tiny_hf("gemma3")).to(torch.bfloat16), tiny_tokenizer(), "half")
    senders = ["embed", "L0H1", "MLP0", "L1H2", "MLP1", "blocks.1.hook_resid_pre"]
    receivers = ["L1H1.q", "L2H0.k", "L2H3.v", "MLP1", "MLP2", "blocks.2.hook_resid_pre", "logits"]
    for model, share in ((tiny_model("gemma3", backend), 1e-5), (half, 0.1)):
        late = path_patching(model, LATE, senders, receivers, paths=paths)
        with monkeypatch.context() as patched:
            patched.setattr(Arithmetic, "of", lambda *args: None)
            whole = path_patching(model, LATE, senders, receivers, paths=paths)
        assert late.values_by_prompt is not None and whole.values_by_prompt is not None
        difference = late.values_by_prompt - whole.values_by_prompt
        assert float(difference.norm()) < share * float(whole.values_by_prompt.norm())
