"""The estimate of a pass is an upper bound, and a budget decides how many rows ride on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemmascope_plugin.causes import Task, activation_patching, custom, kl_divergence, logit_diff
from gemmascope_plugin.causes.bound_task import BoundTask
from gemmascope_plugin.causes.exact.activation_patching import sweep
from gemmascope_plugin.causes.exact.edge_patching import edge_footprint
from gemmascope_plugin.causes.experiment import experiment
from gemmascope_plugin.causes.gradient.edge_attribution import pass_bytes
from gemmascope_plugin.causes.gradient.site_runs import site_footprint
from gemmascope_plugin.causes.gradient.task_site import TaskSite
from gemmascope_plugin.causes.memory import LOGITS, Footprint, Limit, footprint
from gemmascope_plugin.causes.metric import Metric
from gemmascope_plugin.circuits.feature_ablation import ablation_footprint
from gemmascope_plugin.errors import GemmaScopeError, UnknownNameError
from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.block import Block
from tests import tiny_models
from tests.causes.tasks import TASK
from tests.factories import bridge_from_hf, hooked_from_hf, tiny_tokenizer
from tests.support.rounding import TINY


class Peak(TorchDispatchMode):
    """Bytes of tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.free, key)
        return out

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


WORDS = logit_diff([10] * 4, [11] * 4)
ALL = custom(lambda logits, prompts: logits.log_softmax(-1).amax(-1))


def _task(tokens: Any, metric: Metric) -> Task:
    """Prompts that differ in the middle."""
    corrupt = tokens.clone()
    corrupt[:, 2] = 10 + (tokens[:, 2] == 10).long()
    n = len(tokens)
    return Task(tokens, corrupt, metric.take(range(n)))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("shape", [{"hidden_size": 128}, {"intermediate_size": 1024}])
def test_the_estimate_of_a_row_is_an_upper_bound(backend: str, shape: dict[str, int]) -> None:
    build = {"hooked": hooked_from_hf, "bridge": bridge_from_hf}[backend]
    model = build(tiny_models.gemma2(**shape), tiny_tokenizer(), "tiny")
    hooks = [("blocks.1.hook_attn_out", lambda x, hook: x.clone())]
    # so few positions that logits would show
    long, short = (tiny_models.random_tokens(batch_size=4, length=n) for n in (64, 4))
    for tokens, metric in ((long, WORDS), (short, WORDS), (long, ALL), (short, ALL)):
        bound = _task(tokens, metric).bind(model)
        parts = {rows: bound.part(torch.arange(rows)) for rows in (1, 4)}

        def peak(part: BoundTask) -> int:
            with torch.no_grad(), Peak() as memory:
                part.measure(model, part.clean, fwd_hooks=hooks)
            return memory.peak

        peak(parts[1])
        measured = (peak(parts[4]) - peak(parts[1])) / 3
        need = footprint(model, "attn_out", parts[1], ["blocks.1.hook_attn_out"], {}).row
        assert measured <= need, (tokens.shape, metric.name)
        assert tokens is short or need <= 3 * measured, metric.name


def test_logits_count_where_all_are_read(hooked2) -> None:
    anatomy, sites = Anatomy(hooked2), [TaskSite("blocks.0.hook_mlp_out", "mlp", 32)]
    names = ["blocks.1.hook_attn_out"]
    needs: list[Callable[[BoundTask], int]] = [
        lambda bound: footprint(hooked2, "attn_out", bound, names, {}).row,
        lambda bound: edge_footprint(anatomy, bound).row,
        lambda bound: site_footprint(hooked2, bound, sites).row,
        lambda bound: ablation_footprint(hooked2, bound, sites).row,
        lambda bound: pass_bytes(anatomy, bound),
    ]
    words, divergence, everything = (
        _task(TASK.clean, metric).bind(hooked2) for metric in (WORDS, kl_divergence(), ALL)
    )
    logits = 4 * LOGITS * hooked2.cfg.d_vocab
    for need in needs:
        assert need(everything) - need(words) == logits
        assert need(divergence) == need(words)
    before = [need(words) for need in needs]
    with hooked2.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: None)]):
        seen = [need(words) for need in needs]
    assert [b - a for a, b in zip(before, seen, strict=True)] == [logits] * len(needs)


def test_what_is_held_is_counted(hooked2) -> None:
    for component in ("z", "pattern", "k", "neuron", "resid_post"):
        with experiment(hooked2, TASK, component, direction="noising") as run:
            held = sum(x.nbytes for each in (run.here, run.other) for x in each.values())
            for part in run.parts:
                earlier = [x for e in part.replay.earlier for x in (e.keys, e.values)]
                held += sum(x.nbytes for x in (*part.replay.pre, *part.replay.mid, *earlier))
            need = footprint(hooked2, component, run.bound, run.grid.hooks, {})
        assert held <= need.fixed <= 4 * held


def test_a_budget_decides_the_rows() -> None:
    need = Footprint(fixed=1_000_000, row=300_000)
    assert Limit(512).rows(need) == 512
    assert Limit(512, "2 MB").rows(need) == 3
    assert Limit(2, "2 MB").rows(need) == 2
    assert Limit(512, 1_300_000).rows(need) == 1
    text = r"budget of 1.2 MB is too small.*1.0 MB.*300.0 kB.*memory_budget=1_300_000 or"
    with pytest.raises(GemmaScopeError, match=text):
        Limit(512, "1.2 MB").rows(need)
    with pytest.raises(UnknownNameError, match="'much' is not a size"):
        Limit(512, "much")
    with pytest.raises(UnknownNameError, match="max_rows=0 leaves no row"):
        Limit(0)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_passes_stay_within_their_rows(hooked2, rows: int, monkeypatch) -> None:
    seen: list[int] = []
    whole = activation_patching(hooked2, TASK, "z")
    mlp = Block.mlp

    def counted(block, x, *args):
        seen.append(len(x))
        return mlp(block, x, *args)

    with experiment(hooked2, TASK, "z", direction="denoising", limit=Limit(rows)) as run:
        monkeypatch.setattr(Block, "mlp", counted)
        got = sweep(run) - run.base_by_prompt
    assert max(seen) <= rows
    assert torch.allclose(got.mean(1), whole.values.flatten(), atol=TINY)


def test_a_budget_for_activations(hooked2) -> None:
    whole = activation_patching(hooked2, TASK, "z")
    tight = activation_patching(hooked2, TASK, "z", memory_budget="120 kB")
    assert torch.allclose(whole.values, tight.values, atol=TINY)
    with pytest.raises(GemmaScopeError, match="too small"):
        activation_patching(hooked2, TASK, "z", memory_budget=1000)
