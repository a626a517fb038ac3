"""How the streams that receivers read differ when a set of senders changes.

``paths`` says what may carry the change from the senders to a receiver:

``direct``  nothing: every other head and MLP is frozen at its value in the base run. The difference is
            closed form. Embedding and MLPs: other minus base. The heads of a layer, *jointly*:
            ``ln1_post(a + sum_h dr_h) - ln1_post(a)`` with ``dr_h = (z'_h - z_h) W_O[h]``, which is no
            sum over heads where a norm follows attention, as in Gemma.
``mlps``    MLPs in between are recomputed, heads are frozen (Wang et al., arXiv 2211.00593).
``total``   everything in between is recomputed.

Of a stream that is a sender all that was written before it is sent, senders before it included.

Cost: ``direct`` a few products; the others one forward pass with a copy of the prompts per set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from gemmascope_plugin.models.anatomy import Anatomy
from gemmascope_plugin.models.hooks import hooking
from gemmascope_plugin.models.precision import wide
from gemmascope_plugin.models.protocol import dtype_of
from gemmascope_plugin.patching.nodes import read
from gemmascope_plugin.patching.path_changes import Change
from gemmascope_plugin.patching.timeline import is_stream, is_z, layer_of, written

Paths = Literal["direct", "mlps", "total"]
Difference = Float[torch.Tensor, "prompt pos d_model"]


class Flow:
    """Both runs, and how changes travel in the base run.

    Args:
        runner: The model, or the model with dictionaries spliced in.
        anatomy: The model's.
        base: Tokens of the run that is patched.
        other: Tokens of the run that new values come from.
        changes: All changes that will be asked for.
        streams: Hooks of all streams that will be asked for.
        paths: What may carry the changes.
    """

    def __init__(
        self,
        runner: Any,
        anatomy: Anatomy,
        base: Int[torch.Tensor, "prompt pos"],
        other: Int[torch.Tensor, "prompt pos"],
        changes: Sequence[Change],
        streams: Sequence[str],
        paths: Paths,
    ) -> None:
        self._runner, self._anatomy, self._base, self._paths = runner, anatomy, base, paths
        replaced = {hook for change in changes for hook in change.replaced}
        here = {*replaced, *(hook for change in changes for hook in change.added if is_z(hook))}
        if paths != "direct":
            here |= set(streams)
        if paths == "mlps":
            here |= {f"blocks.{layer}.attn.hook_z" for layer in range(anatomy.n_layers)}
        self._here = read(runner, base, sorted(here)) if here else {}
        self._there = read(runner, other, sorted(replaced)) if replaced else {}

    def differences(
        self, changes: Sequence[Change], streams: Sequence[str]
    ) -> list[dict[str, Difference]]:
        """For each change, hook of a stream to the difference there."""
        if self._paths == "direct":
            return [{hook: self._direct(change, hook) for hook in streams} for change in changes]
        return self._recomputed(changes, streams)

    def _direct(self, change: Change, stream: str) -> Difference:
        """With everything else frozen."""
        until = written(stream)
        whole = [h for h in change.replaced if is_stream(h) and written(h) <= until]
        start = max(whole, key=written, default=None)
        since = -2 if start is None else written(start)
        difference = self._zero()
        if start is not None:
            difference = wide(self._there[start]) - wide(self._here[start])
        hooks = {*change.replaced, *change.added}
        for hook in sorted(h for h in hooks if since < written(h) <= until):
            step = self._attention(change, hook) if is_z(hook) else self._added(change, hook)
            difference = difference + step.to(difference)
        return difference

    def _zero(self) -> Difference:
        model = self._anatomy.model
        shape = (*self._base.shape, self._anatomy.d_model)
        return wide(torch.zeros(shape, device=self._base.device, dtype=dtype_of(model)))

    def _added(self, change: Change, hook: str) -> torch.Tensor:
        """What the tensor at a hook changes by."""
        fixed = change.added.get(hook)
        if hook not in change.replaced:
            assert fixed is not None
            return fixed
        heads = change.replaced[hook]
        step = wide(self._there[hook]) - wide(self._here[hook])
        if heads is not None:
            others = [h for h in range(step.shape[2]) if h not in heads]
            step[:, :, others] = 0
        return step if fixed is None else step + fixed

    def _attention(self, change: Change, hook: str) -> Difference:
        """What the heads of a layer change together, after the norm."""
        layer, z = layer_of(hook), self._here[hook]
        dz = wide(self._added(change, hook)).to(z.device)
        post = self._anatomy.norm(layer, "ln1_post")
        a, da = self._anatomy.head_sum(layer, z), self._anatomy.head_sum(layer, dz)
        # its bias is in both
        da = da - self._anatomy.head_sum(layer, torch.zeros_like(dz))
        return da if post is None else post(a + da) - post(a)

    @torch.no_grad()
    def _recomputed(
        self, changes: Sequence[Change], streams: Sequence[str]
    ) -> list[dict[str, Difference]]:
        """Runs the base prompts once per change, side by side, and sees what becomes of the streams."""
        n = len(self._base)
        hooks: dict[str, list[Callable[[torch.Tensor], None]]] = {}
        if self._paths == "mlps":
            for layer in range(self._anatomy.n_layers):
                name = f"blocks.{layer}.attn.hook_z"
                hooks[name] = [self._freeze(name)]
        for j, change in enumerate(changes):
            rows = slice(j * n, (j + 1) * n)
            for name in change.replaced:
                hooks.setdefault(name, []).append(self._replace(name, change.replaced[name], rows))
            for name, value in change.added.items():
                # the two model classes disagree about what is returned from the middle of a layer
                there = name.replace("hook_resid_mid", "hook_attn_out")
                hooks.setdefault(there, []).append(_add(value, rows))
        edits = [(name, _clone_and(edit)) for name, edit in hooks.items()]
        tokens = self._base.repeat(len(changes), 1)
        with hooking(self._runner, fwd_hooks=edits):
            seen = read(self._runner, tokens, list(streams))
        return [
            {
                hook: wide(x[j * n : (j + 1) * n]) - wide(self._here[hook])
                for hook, x in seen.items()
            }
            for j in range(len(changes))
        ]

    def _freeze(self, name: str) -> Callable[[torch.Tensor], None]:
        value = self._here[name]

        def edit(x: torch.Tensor) -> None:
            x.copy_(value.repeat(len(x) // len(value), 1, 1, 1))

        return edit

    def _replace(
        self, name: str, heads: tuple[int, ...] | None, rows: slice
    ) -> Callable[[torch.Tensor], None]:
        value = self._there[name]

        def edit(x: torch.Tensor) -> None:
            if heads is None:
                x[rows] = value
            else:
                index = list(heads)
                x[rows, :, index] = value[:, :, index]

        return edit


def _add(value: torch.Tensor, rows: slice) -> Callable[[torch.Tensor], None]:
    def edit(x: torch.Tensor) -> None:
        x[rows] += value.to(x)

    return edit


def _clone_and(edits: list[Callable[[torch.Tensor], None]]) -> Callable[..., torch.Tensor]:
    """A hook function that edits a copy."""

    def hook_fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
        copy = x.clone()
        for edit in edits:
            edit(copy)
        return copy

    return hook_fn
